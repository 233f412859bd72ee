"""The only module that touches the compiled extensions ``_cpu`` and ``_cuda``: registration and planning."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pathlib
import types
from typing import TypedDict

import jax

TARGET = "jax_int4mm_int4pack_mm"
DEQUANTIZE_TARGET = "jax_int4mm_dequantize"  # On CUDA alone.

# The device assumed where a program is lowered for CUDA on a machine without a GPU: an H100 or H200.
DEFAULT_COMPUTE_CAPABILITY = 90
DEFAULT_SM_COUNT = 132

# What a plan takes for an m that is not known when a program is traced (a symbolic dimension).
UNKNOWN_M = -1


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a call asks for (``ffi/core/problem.h``)."""

    m: int
    n: int
    k: int
    group_size: int
    inner_k_tiles: int
    dtype: str  # Of x.
    batch: int = 1
    shared_x: bool = False
    float32_result: bool = False


class Plan(TypedDict):
    """What the C++ plan says of itself (``ffi/core/explanation.h``)."""

    implementation: str
    tile: str
    weights: str
    workspace_bytes: int
    reason: str


def _import_extension(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(f"jax_int4mm.{name}")
    except ImportError as error:
        here = pathlib.Path(__file__).parent.parent
        if (here.parent / "pyproject.toml").exists():
            remedy = (
                f"Python imported the source tree in {here.parent}, which has no compiled extension: run "
                'pip install -e "." in that folder, or start Python in another folder if the package is installed.'
            )
        else:
            remedy = "Reinstall it: pip install --force-reinstall --no-cache-dir jax-int4mm."
        raise ImportError(
            f"jax_int4mm: the compiled extension {name} cannot be imported ({error}). {remedy}"
        ) from error


_cpu = _import_extension("_cpu")
# A build with CUDA kernels must have them: a _cuda that cannot be imported is broken, not a machine without a GPU.
_cuda = _import_extension("_cuda") if _cpu.built_with_cuda else None


def _register() -> None:
    for target, handler in _cpu.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    if _cuda is not None:
        for target, handler in _cuda.registrations().items():
            jax.ffi.register_ffi_target(target, handler, platform="CUDA")


_register()


def has_cuda_kernels() -> bool:
    """Whether this build holds the CUDA kernels."""
    return _cuda is not None


def has_dequantize_kernel() -> bool:
    """Whether this build holds the CUDA kernel of ``dequantize``, and the local GPU, if there is one, can run it."""
    return has_cuda_kernels() and _gpu_description()[0] >= _cpu.oldest_compute_capability


def cpu_implementations() -> list[str]:
    """The CPU implementations that this machine can run, best first."""
    return list(_cpu.isas())


def last_launch(platform: str) -> str | None:
    """``"<implementation>/<tile>"`` of the last kernel that this process launched on "cpu" or "cuda", or None."""
    module = _cpu if platform == "cpu" else _cuda
    return None if module is None else module.last_launch()


@functools.cache
def _gpu_description() -> tuple[int, int]:
    """(compute capability as 10 * major + minor, number of SMs) of the first local GPU, or the default."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return DEFAULT_COMPUTE_CAPABILITY, DEFAULT_SM_COUNT
    return describe_gpu(device)


def describe_gpu(device: jax.Device) -> tuple[int, int]:
    """(compute capability as 10 * major + minor, number of SMs) of a CUDA device."""
    major, minor = str(device.compute_capability).split(".")
    return 10 * int(major) + int(minor), int(device.core_count)


def plan(
    platform: str,
    problem: Problem,
    implementation: str | None,
    gpu: tuple[int, int] | None = None,
) -> Plan:
    """The kernel, tile and workspace for one problem on "cpu" (this machine's) or "cuda" (``gpu`` or the local one).

    Raises:
      ValueError: no kernel, or not the named one, can serve the problem.
    """
    arguments = {**dataclasses.asdict(problem), "implementation": implementation or ""}
    if platform == "cpu":
        return _cpu.plan(**arguments)
    compute_capability, sm_count = gpu or _gpu_description()
    return _cpu.cuda_plan(**arguments, compute_capability=compute_capability, sm_count=sm_count)
