"""What every test shares: the seed, the devices, and the kernels of this machine."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

import untouched_results
from jax_int4mm.ops import _ffi
from kernels import CPU_IMPLEMENTATIONS, CUDA_IMPLEMENTATIONS, Kernel

SEED_VARIABLE = "JAX_INT4MM_TEST_SEED"
REQUIRE_GPU_VARIABLE = "JAX_INT4MM_REQUIRE_GPU"
CPU_DEVICES = 8


def why_no_gpu(count: int = 1) -> str | None:
    """Why tests marked gpu(count) cannot run here, or None if they can."""
    try:
        found = len(jax.devices("cuda"))
    except RuntimeError as error:
        return f"no NVIDIA GPU for JAX: {error}"
    if not _ffi.has_cuda_kernels():
        return "this build of jax_int4mm has no CUDA kernels: install it with JAX_INT4MM_CUDA=ON"
    return f"{found} of the {count} GPUs that it needs" if found < count else None


def pytest_configure() -> None:
    # In the environment, so that the workers of pytest-xdist, which start later, take it over.
    os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(2**32)))
    # Several, for meshes; the others run on the first.
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def pytest_report_header() -> list[str]:
    no_gpu = why_no_gpu()
    gpus = ", ".join(f"{d.device_kind}" for d in jax.devices("cuda")) if no_gpu is None else f"none ({no_gpu})"
    return [
        f"jax: {jax.__version__}, default backend {jax.default_backend()}",
        f"int4 kernels on this CPU: {', '.join(_ffi.cpu_implementations())}",
        f"int4 kernels on GPUs: {gpus}",
        f"random cases: repeat them with {SEED_VARIABLE}={os.environ[SEED_VARIABLE]}",
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Once more, since a quiet run has no header.
    if terminalreporter.stats.keys() & {"failed", "error"}:
        terminalreporter.write_line(f"random cases: repeat them with {SEED_VARIABLE}={os.environ[SEED_VARIABLE]}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = max((marker.args[0] if marker.args else 1 for marker in item.iter_markers("gpu")), default=0)
    reason = why_no_gpu(needed) if needed else None
    if reason is None:
        return
    required = os.environ.get(REQUIRE_GPU_VARIABLE, "0")
    if int(required) >= needed:
        pytest.fail(f"{REQUIRE_GPU_VARIABLE}={required} and {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def cpu_devices() -> list[jax.Device]:
    """Devices of one process that stand for those of a mesh."""
    return jax.devices("cpu")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test in this run: the same in any order, on any worker, and for every kernel."""
    name = request.node.nodeid
    if "kernel" in request.fixturenames:
        name = name.replace(str(request.getfixturevalue("kernel")), "")
    return np.random.default_rng([int(os.environ[SEED_VARIABLE]), zlib.crc32(name.encode())])


def _kernel_parameters(*, cpu: tuple[str | None, ...], cuda: tuple[str | None, ...]) -> list[object]:
    return [
        *(pytest.param(Kernel("cpu", name), id=str(Kernel("cpu", name))) for name in cpu),
        *(pytest.param(Kernel("cuda", name), id=str(Kernel("cuda", name)), marks=pytest.mark.gpu) for name in cuda),
    ]


@pytest.fixture(params=_kernel_parameters(cpu=CPU_IMPLEMENTATIONS, cuda=CUDA_IMPLEMENTATIONS))
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Every kernel by name."""
    kernel = request.param
    runs = _ffi.cpu_implementations()
    if kernel.platform == "cpu" and (kernel.implementation or "").partition("/")[0] not in runs:
        pytest.skip(f"this CPU has no {kernel.implementation}: it runs {', '.join(runs)}")
    return kernel


@pytest.fixture(params=_kernel_parameters(cpu=(None,), cuda=(None,)))
def chosen(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """The kernel that is chosen, on each platform, which is the default device meanwhile."""
    with jax.default_device(request.param.device):
        yield request.param


XLA_PROGRAMS = ("reference", "dequantize")


@pytest.fixture(params=_kernel_parameters(cpu=XLA_PROGRAMS, cuda=XLA_PROGRAMS))
def xla_program(request: pytest.FixtureRequest) -> Kernel:
    """The implementations that are plain jnp, on each platform."""
    return request.param


@pytest.fixture(scope="session")
def untouched_results_target() -> str:
    """A custom-call target whose results keep what their buffers held."""
    return untouched_results.register()
