"""`env`: versions, devices, and the kernels that were built and would be chosen."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jax_int4mm as i4
from jax_int4mm.ops import _ffi

_PACKAGES = ("jax", "jaxlib", "numpy", "safetensors", "gguf", "huggingface_hub", "flax", "orbax-checkpoint")
_N_K = (4096, 4096)
_GROUP_SIZE = 128
_TOKENS = (1, 16, 64, 512, 4096)


def environment() -> dict[str, Any]:
    """A report of this machine as the library sees it."""
    n, k = _N_K
    w4 = jax.eval_shape(
        functools.partial(i4.quantize, group_size=_GROUP_SIZE), jax.ShapeDtypeStruct((k, n), jnp.bfloat16)
    )
    chosen = []
    for tokens in _TOKENS:
        try:
            explanation = i4.explain((tokens, k), w4)
            chosen.append({"tokens": tokens, "implementation": explanation.implementation, "tile": explanation.tile})
        except ValueError as error:
            chosen.append({"tokens": tokens, "error": str(error)})
    return {
        "jax_int4mm": i4.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "default_backend": jax.default_backend(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "cpu_kernels": _ffi.cpu_implementations(),
        "cuda_kernels_built": _ffi.has_cuda_kernels(),
        "chosen_for": {"n": n, "k": k, "group_size": _GROUP_SIZE, "dtype": "bfloat16"},
        "chosen": chosen,
    }


def print_environment(report: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    facts = Table(box=None, show_header=False)
    packages = (f"{name} {version or 'not installed'}" for name, version in report["packages"].items())
    for name, value in (
        ("jax_int4mm", report["jax_int4mm"]),
        ("python", f"{report['python']} on {report['platform']}"),
        ("packages", ", ".join(packages)),
        ("devices", f"{', '.join(report['devices'])} ({report['default_backend']})"),
        ("CPU kernels", ", ".join(report["cpu_kernels"])),
        ("CUDA kernels", "built" if report["cuda_kernels_built"] else "not built: JAX_INT4MM_CUDA=ON builds them"),
    ):
        facts.add_row(name, value)
    console.print(facts)
    of = report["chosen_for"]
    console.print(f"\nchosen for {of['n']} x {of['k']}, group size {of['group_size']}, {of['dtype']}:", highlight=False)
    table = Table("tokens", "kernel", "tile", box=None)
    for row in report["chosen"]:
        table.add_row(str(row["tokens"]), row.get("implementation", row.get("error", "")), row.get("tile", ""))
    console.print(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
