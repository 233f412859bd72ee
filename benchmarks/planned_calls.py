"""Calls below XLA, for timing by CUDA graphs: planned_calls.cu with the ops' own sources, by ctypes."""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib
import subprocess

from read_floor import find_nvcc

SOURCE = pathlib.Path(__file__).with_suffix(".cu")
FFI = SOURCE.parents[1] / "ffi"


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("m", "n", "k", "group_size", "inner_k_tiles", "float16")]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One product: y [m, n] = x [m, k] @ w^T, w [n, k] packed with inner_k_tiles = 8, bfloat16."""

    m: int
    n: int
    k: int
    group_size: int


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    compute_capability: int  # 90 for sm_90
    sm_count: int


@dataclasses.dataclass(frozen=True)
class Planned:
    """One way to compute a problem: "hopper/128x64", by CTAs of which `split_k` divide k among them."""

    library: ctypes.CDLL
    handle: int
    name: str
    split_k: int

    def launch(self, x: int, packed: int, scales_and_zeros: int, y: int, stream: int) -> None:
        """Enqueue the call on buffers given by their addresses.

        Raises:
          RuntimeError: the launch failed; the message says why.
        """
        pointers = (ctypes.c_void_p(address) for address in (x, packed, scales_and_zeros, y, stream))
        if self.library.launch(self.handle, *pointers) != 0:
            raise RuntimeError(self.library.last_text().decode())


def _sizes(problem: Problem) -> _Sizes:
    return _Sizes(problem.m, problem.n, problem.k, problem.group_size, 8, 0)


def build(folder: pathlib.Path, architecture: str = "90a") -> pathlib.Path:
    """Compile the library into `folder`, unless it is there and newer than every source.

    Raises:
      RuntimeError: there is no nvcc, or it refuses; the message is its last line.
    """
    library = folder / f"planned_calls_{architecture}.so"
    sources = [SOURCE, *FFI.glob("core/*.cc"), *FFI.glob("cuda/*_plan.cc"), FFI / "cuda" / "plan.cc"]
    sources += sorted(FFI.glob("cuda/kernels/**/*.cu"))
    read = [*sources, *FFI.glob("core/*.h"), *FFI.glob("cuda/**/*.h"), *FFI.glob("cuda/**/*.cuh")]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in read):
        return library
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc in CUDACXX, CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel")
    folder.mkdir(parents=True, exist_ok=True)
    # Static tables of two libraries, of two versions of the kernels, in one process stay apart without unique symbols.
    options = [
        "-std=c++17",
        "-O3",
        "-w",
        "--expt-relaxed-constexpr",
        "--threads=0",
        "--shared",
        "-Xcompiler=-fPIC,-fno-gnu-unique",
    ]
    options += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", f"-I{FFI}"]
    options += [f"-DINT4MM_HAS_SM_90A_CODE={int(architecture == '90a')}", f"-L{nvcc.resolve().parents[1] / 'lib'}"]
    done = subprocess.run([nvcc, *options, *sources, "-o", library], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"{nvcc} does not compile the kernels: {''.join(last)}")
    return library


def load(path: pathlib.Path) -> ctypes.CDLL:
    """The library, its functions declared."""
    library = ctypes.CDLL(str(path))
    library.name_of.restype = library.last_text.restype = ctypes.c_char_p
    return library


def for_this_gpu(library: pathlib.Path | None, folder: pathlib.Path) -> tuple[ctypes.CDLL, Device]:
    """The named library, or the one in `folder`, compiled where need be, and PyTorch's current GPU.

    Raises:
      RuntimeError: as :func:`build`.
    """
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = Device(10 * properties.major + properties.minor, properties.multi_processor_count)
    architecture = f"{device.compute_capability}{'a' if device.compute_capability == 90 else ''}"
    return load(library or build(folder, architecture)), device


def plan(library: ctypes.CDLL, problem: Problem, device: Device, *, every: bool = False) -> list[Planned]:
    """The plan that the op would take, or every tile of the Hopper kernel and way to divide k.

    Raises:
      RuntimeError: no kernel takes the problem; the message says why.
    """
    count = ctypes.c_int()
    args = (ctypes.byref(_sizes(problem)), device.compute_capability, device.sm_count, int(every), ctypes.byref(count))
    first = library.plan_calls(*args)
    if first < 0:
        raise RuntimeError(library.last_text().decode())
    handles = range(first, first + count.value)
    return [Planned(library, h, library.name_of(h).decode(), library.split_k_of(h)) for h in handles]


def dequantize(library: ctypes.CDLL, problem: Problem, packed: int, scales_and_zeros: int, w: int, stream: int) -> None:
    """Enqueue dequantize of a problem's weight, on buffers given by their addresses.

    Raises:
      RuntimeError: the launch failed; the message says why.
    """
    pointers = (ctypes.c_void_p(address) for address in (packed, scales_and_zeros, w, stream))
    if library.dequantize(ctypes.byref(_sizes(problem)), *pointers) != 0:
        raise RuntimeError(library.last_text().decode())
