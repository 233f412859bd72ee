"""The raw tensors of one or several safetensors files, read lazily: what every reader stands on."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jax_int4mm.checkpoints.errors import CheckpointError, MissingTensorError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What the tensors of a file that is written here begin at a multiple of: JAX on a CPU takes such memory as it is.
_ALIGNMENT = 64

# Bytes that the system is asked to read beyond a tensor, while that one is on its way to the device.
_READ_AHEAD = 256 << 20

# Element types in a safetensors header that numpy, with ml_dtypes, represents.
_READABLE_TYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        **{"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64, "BOOL": np.bool_},
        **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64},
        **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    }.items()
}
_TYPE_NAMES = {dtype: name for name, dtype in _READABLE_TYPES.items()}
FLOAT_TYPES = ("BF16", "F16", "F32")


class _File:
    """One file whose header the safetensors package has found right."""

    def __init__(self, path: Path):
        self._path = path
        handle = _open(path)
        self.metadata: dict[str, str] = handle.metadata() or {}
        with path.open("rb") as file:
            self._begin = 8 + int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(self._begin - 8))
            self._state = _state(file)
        header.pop("__metadata__", None)
        self.tensors: dict[str, dict[str, Any]] = header
        self._asked = (0, 0)  # What the system was last asked to read, from the first byte to behind the last.
        end = max((described["data_offsets"][1] for described in header.values()), default=0)
        if set(handle.keys()) != set(header) or self._state[0] != self._begin + end:
            raise CheckpointError(f"{path} was written to while it was opened; open it again")

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the file; what follows it there is read ahead."""
        described = self.tensors[name]
        dtype = _READABLE_TYPES[described["dtype"]]
        begin, end = (self._begin + offset for offset in described["data_offsets"])
        if begin == end:
            return np.empty(described["shape"], dtype)
        before = begin % mmap.ALLOCATIONGRANULARITY
        with self._path.open("rb") as file:
            if _state(file) != self._state:
                raise CheckpointError(f"{self._path} has changed since it was opened; load the checkpoint again")
            self._read_ahead(file, begin, end)
            # A map of its own, so that the memory is free when the tensor is no longer used.
            mapped = mmap.mmap(file.fileno(), end - begin + before, access=mmap.ACCESS_READ, offset=begin - before)
        tensor = np.frombuffer(mapped, np.uint8)[before:].view(dtype).reshape(described["shape"])
        # Files with headers of an odd length have their data anywhere, which devices do not take.
        return tensor if tensor.flags.aligned else tensor.copy()

    def _read_ahead(self, file: BinaryIO, begin: int, end: int) -> None:
        """Asks the system to read a tensor and what follows it, some of which it may have been asked for before.

        Asking takes time for every page, one that is in memory too: so half of it is asked for at a time.
        """
        if not hasattr(os, "posix_fadvise") or (self._asked[0] <= begin and end + _READ_AHEAD // 2 <= self._asked[1]):
            return
        first = self._asked[1] if self._asked[0] <= begin <= self._asked[1] else begin
        os.posix_fadvise(file.fileno(), first, end + _READ_AHEAD - first, os.POSIX_FADV_WILLNEED)
        self._asked = (begin, end + _READ_AHEAD)


def _state(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


class SafetensorsFiles(Mapping[str, np.ndarray]):
    """Tensors by name over the safetensors files of one checkpoint, as read-only views of the files.

    Every file is opened, and the index compared with what the files hold, when this is made: a missing or truncated
    shard is an error then and not in the middle of loading a model.
    """

    def __init__(self, files: Mapping[str, Path] | Path):
        """Takes one file, or the file of each tensor as an index gives it.

        Raises:
          CheckpointError: a file is missing, truncated, malformed or without a tensor that it should hold.
        """
        paths = {files} if isinstance(files, Path) else set(files.values())
        self._opened = {path: _File(path) for path in sorted(paths)}
        if isinstance(files, Path):
            files = dict.fromkeys(sorted(self._opened[files].tensors), files)
        for name, path in files.items():
            if name not in self._opened[path].tensors:
                raise CheckpointError(
                    f"{path} does not hold tensor {name!r}, which the index beside it says it does; "
                    "index and shards are not of one checkpoint: copy or download it again"
                )
        self._files = dict(files)
        described = {name: self._opened[path].tensors[name] for name, path in self._files.items()}
        self._types = {name: str(tensor["dtype"]) for name, tensor in described.items()}
        self._shapes = {name: tuple(tensor["shape"]) for name, tensor in described.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of all files."""
        merged: dict[str, str] = {}
        for file in self._opened.values():
            merged |= file.metadata
        return merged

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return self._shapes[name]

    def element_type(self, name: str) -> str:
        """The element type of a tensor as safetensors spells it: BF16, F16, I32, ..."""
        return self._types[name]

    def nbytes(self, *names: str) -> int:
        """Bytes of the named tensors in their files, 0 for element types that are not read."""
        return sum(
            math.prod(self._shapes[name]) * _READABLE_TYPES[self._types[name]].itemsize
            for name in names
            if self._types[name] in _READABLE_TYPES
        )

    def expect(self, name: str, types: Sequence[str], shape: Sequence[int | None], rule: str) -> tuple[int, ...]:
        """The shape of a tensor, if the file has it with one of these types and this shape (None: any size).

        Raises:
          CheckpointError: it does not; the message ends with `rule`, which says what the format stores there.
        """
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}: {rule}; the checkpoint is incomplete")
        found = self._shapes[name]
        fits = len(found) == len(shape) and all(want in (None, have) for want, have in zip(shape, found, strict=True))
        if self._types[name] not in types or not fits:
            raise CheckpointError(
                f"tensor {name!r} in {self._files[name]} is {self._types[name]} {list(found)}; {rule}, here "
                f"{' or '.join(types)} [{', '.join('any' if want is None else str(want) for want in shape)}]"
            )
        return found

    @property
    def folder(self) -> str:
        """Where the files are, for messages."""
        return ", ".join(sorted({str(path.parent) for path in self._opened}))

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._files.get(name)
        if path is None:
            raise MissingTensorError(f"{self.folder} holds no tensor {name!r} among its {len(self)} tensors")
        if self._types[name] not in _READABLE_TYPES:
            raise CheckpointError(
                f"tensor {name!r} in {path} has elements of type {self._types[name]}, which is not read; "
                "convert the checkpoint to bf16, f16 or f32"
            )
        return self._opened[path].tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def find(path: Path) -> SafetensorsFiles:
    """The safetensors files of a Hugging Face directory (`model.safetensors`, or shards and their index) or one file.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: the directory has no safetensors checkpoint, or what it has is not whole.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a safetensors file; files named *.safetensors or *.gguf are read")
        return SafetensorsFiles(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or directory {path}; give the path of a local checkpoint")
    if (path / SINGLE_FILE).is_file():
        return SafetensorsFiles(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return SafetensorsFiles(_read_index(path / INDEX_FILE))
    # Names like gptq_model-4bit-128g.safetensors, of older releases.
    for pattern, made in (("*.safetensors.index.json", _read_index), ("*.safetensors", lambda found: found)):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return SafetensorsFiles(made(found[0]))
    raise CheckpointError(
        f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints are read (pickled .bin and "
        ".pt files never are): convert it to safetensors, or give the path of one .safetensors file"
    )


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes one file, tensors in the order given. The safetensors package copies them and does not align their data.

    Raises:
      ValueError: a tensor has a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPE_NAMES:
            raise ValueError(
                f"tensor {name!r} has dtype {tensor.dtype}, which safetensors does not have; cast it to one of "
                f"{', '.join(map(str, _TYPE_NAMES))}"
            )
        shape, end = list(tensor.shape), begin + tensor.nbytes
        header[name] = {"dtype": _TYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.asarray(tensor, order="C").reshape(-1).view(np.uint8).data)


def read_json_object(path: Path) -> dict[str, Any]:
    """Parses a JSON file that has to hold an object."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} has to hold a JSON object, and holds a {type(parsed).__name__}")
    return parsed


def _read_index(index: Path) -> dict[str, Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no 'weight_map' object from tensor names to shard files")
    files = {}
    for name, shard in weight_map.items():
        # Compared as text: in a download cache the shards themselves are links to files elsewhere.
        if not isinstance(shard, str) or not shard or shard in {".", ".."} or any(mark in shard for mark in "/\\:\0"):
            raise CheckpointError(
                f"{index} places tensor {name!r} in {shard!r}; a shard has to be a plain file name in the index's own "
                "directory"
            )
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} places tensor {name!r} in {shard!r}; only .safetensors shards are read")
        files[name] = index.parent / shard
        if not files[name].is_file():
            raise CheckpointError(
                f"{index} places tensor {name!r} in {shard}, and there is no such file in {index.parent}; "
                "the checkpoint is incomplete: copy or download the missing shard"
            )
    return files


def _open(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f'reading {path} needs safetensors: pip install "jax_int4mm[checkpoints]"') from error
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error
