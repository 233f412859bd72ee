"""A plain read of some bytes on a CPU: read_floor_cpu.cc, compiled for this machine when a benchmark runs."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
OPTIONS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loop.

    Raises:
      RuntimeError: there is no compiler, or it refuses; the message is its last line.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise RuntimeError("there is no C++ compiler in CXX or PATH to compile its loop")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "read_floor_cpu.so"
        command = [compiler, *OPTIONS, str(SOURCE), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:]
            raise RuntimeError(f"{compiler} does not compile {SOURCE.name}: {''.join(last)}")
        loaded = ctypes.CDLL(str(path))
    loaded.read_words.restype = ctypes.c_uint64
    loaded.read_words.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return loaded


@functools.cache
def why_missing() -> str | None:
    """Why it cannot run here, or None."""
    try:
        library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def read(arrays: tuple[np.ndarray, ...]) -> int:
    """Read arrays, whose sizes in bytes are multiples of 8, on as many threads as OMP_NUM_THREADS says; their xor."""
    all_words = 0
    for array in arrays:
        all_words ^= library().read_words(array.ctypes.data, array.nbytes // 8)
    return all_words
