"""A plain read of some bytes on a GPU: read_floor.cu, compiled when a benchmark runs, as a JAX function."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

TARGET = "jax_int4mm_benchmarks_read_floor"
SOURCE = pathlib.Path(__file__).with_suffix(".cu")
CTAS_PER_SM = (2, 3, 4, 8)  # Which reads fastest depends on the GPU and on how much there is to read.


def find_nvcc() -> pathlib.Path | None:
    """The nvcc of CUDACXX, CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel, the first that is there."""
    home = os.environ.get("CUDA_HOME")
    spec = importlib.util.find_spec("nvidia")
    wheels = [pathlib.Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    candidates = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc"]
    candidates += sorted((str(nvcc) for wheel in wheels for nvcc in wheel.glob("cu*/bin/nvcc")), reverse=True)
    found = (shutil.which(candidate) for candidate in candidates if candidate)
    return next((pathlib.Path(nvcc) for nvcc in found if nvcc), None)


def compile_library(nvcc: pathlib.Path, architecture: str, folder: pathlib.Path) -> ctypes.CDLL:
    """Compile the kernel for one architecture ("sm_90") into `folder` and load it.

    Raises:
      RuntimeError: nvcc refuses; the message is its last line.
    """
    library = folder / "read_floor.so"
    options = ["-std=c++17", "-O3", "-w", f"-arch={architecture}", "--shared", "-Xcompiler=-fPIC"]
    # The wheels keep the runtime in lib, where their nvcc may not look.
    options += ["-isystem", jax.ffi.include_dir(), f"-L{nvcc.resolve().parents[1] / 'lib'}"]
    done = subprocess.run([nvcc, *options, SOURCE, "-o", library], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"{nvcc} does not compile {SOURCE.name}: {''.join(last)}")
    return ctypes.CDLL(str(library))


@functools.cache
def why_missing() -> str | None:
    """Make the kernel known to JAX; why that cannot be done here, or None."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc in CUDACXX, CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel to compile its kernel"
    architecture = "sm_" + str(jax.devices("cuda")[0].compute_capability).replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = compile_library(nvcc, architecture, pathlib.Path(folder))
        except (OSError, RuntimeError) as error:
            return str(error)
    register(library)
    return None


def register(library: ctypes.CDLL) -> None:
    """Register the handler of a compiled library with JAX."""
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.ReadFloorHandler), platform="CUDA")


def read(data: jax.Array, ctas_per_sm: int) -> jax.Array:
    """Read `data`, whose size in bytes is a multiple of 16; the result, uint32 [1], means nothing."""
    result = jax.ShapeDtypeStruct((1,), jnp.uint32)
    return jax.ffi.ffi_call(TARGET, result)(data, ctas_per_sm=np.int32(ctas_per_sm), wanted=np.uint32(0x9E3779B9))
