"""The metadata and raw tensors of one GGUF model, of one file or split over several: what the GGUF reader stands on.

The header is parsed here and not by the gguf package's own reader, which believes it: a length that lies lets that one
make an object of every byte of the file. Here every length is held against what is left of the file before it is used.
The tokenizer's lists of strings are passed over.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np

from jax_int4mm.checkpoints.errors import CheckpointError

MAGIC = b"GGUF"
_READ_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32

# Value types of metadata, by their number in the file.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9

# Bytes of the shortest description of a tensor, and of the shortest pair of a key and its value.
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8
_LEAST_PAIR = 8 + 4 + 1

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor, not yet read.

    Attributes:
      path: The file that holds it.
      type: Of its elements, as GGUF spells it: F32, Q4_K, ...
      shape: As Hugging Face has it, the reverse of GGUF's.
      row_bytes: Of one row along the last dimension.
      offset: Where it begins in the file.
      file: The mapped file.
    """

    path: Path
    type: str
    shape: tuple[int, ...]
    row_bytes: int
    offset: int
    file: mmap.mmap = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * self.row_bytes

    def read(self) -> np.ndarray:
        """Its bytes, uint8 [..., row_bytes]: a view of the mapped file."""
        octets = np.frombuffer(self.file, np.uint8, self.nbytes, self.offset)
        return octets.reshape(*self.shape[:-1], self.row_bytes)


@dataclasses.dataclass(frozen=True)
class GgufFiles:
    """One model.

    Attributes:
      path: The file, or the first of those that the model is split over.
      metadata: Of that file: numbers, texts and, of lists of numbers, arrays.
      tensors: By their names in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def find(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that a directory without safetensors holds; None where there is none.

    Raises:
      FileNotFoundError: `path` is named like a GGUF file and is not there.
      CheckpointError: the directory holds several models.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file or directory {path}; give the path of a local checkpoint")
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return None
    # The parts of one model count as one.
    models: dict[str, Path] = {}
    for file in sorted(path.glob("*.gguf")):
        part = _PART.fullmatch(file.name)
        models.setdefault(part["stem"] if part else file.name, file)
    if len(models) > 1:
        names = ", ".join(file.name for file in models.values())
        raise CheckpointError(f"{path} holds {len(models)} GGUF models ({names}); give the path of one of them")
    return next(iter(models.values()), None)


def open_files(path: Path) -> GgufFiles:
    """Opens a GGUF file and, of a split model, the other files.

    Raises:
      CheckpointError: a file is truncated, malformed, of another version or byte order, or a part is missing.
      ImportError: the gguf package is not installed.
    """
    metadata, tensors = _read_header(path)
    count = metadata.get("split.count", 1)
    if count == 1:
        return GgufFiles(path, metadata, tensors)
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise CheckpointError(
            f"{path} is part of a model split over {count} files; the others are found by its name, which has to end "
            f"with -00001-of-{count:05}.gguf or another number: give it its own name back"
        )
    paths = [path.with_name(f"{named['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent} lacks {', '.join(missing)} of a model split over {count} files: copy or download what is "
            "missing"
        )
    parts = [_read_header(part) for part in paths]
    merged: dict[str, GgufTensor] = {}
    for number, (part, (of_part, its_tensors)) in enumerate(zip(paths, parts, strict=True)):
        if (of_part.get("split.no"), of_part.get("split.count")) != (number, count) or merged.keys() & its_tensors:
            raise CheckpointError(
                f"{part} says that it is part {of_part.get('split.no')} of {of_part.get('split.count')}, counted from "
                f"0, and its name says {number} of {count}, or it repeats a tensor; the files are not of one model"
            )
        merged |= its_tensors
    of_first = parts[0][0]
    total = of_first.get("split.tensors.count", len(merged))
    if total != len(merged):
        raise CheckpointError(f"{paths[0]} says that the model has {total} tensors, and its parts hold {len(merged)}")
    return GgufFiles(paths[0], of_first, merged)


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f'reading {path} needs gguf: pip install "jax_int4mm[gguf]"') from error
    header = _Header(path)
    tensors, pairs = header.counts()
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = header.text()
        if key in metadata:
            raise header.malformed(f"it has the key {key!r} twice")
        metadata[key] = header.value()
    described: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = header.text()
        if name in described:
            raise header.malformed(f"it has tensor {name!r} twice")
        dimensions = header.integer(4)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise header.malformed(
                f"tensor {name!r} has {dimensions} dimensions, and there are 1 to {_MOST_DIMENSIONS}"
            )
        shape = tuple(header.integer(8) for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise header.malformed(f"tensor {name!r} has shape {list(shape)}, and no dimension is 0")
        described[name] = shape, header.integer(4), header.integer(8)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.malformed(f"its general.alignment is {alignment!r}, and it has to be a power of 2")
    begin = -(-header.offset // alignment) * alignment
    found = {}
    for name, (shape, type_number, offset) in described.items():
        try:
            element_type = gguf.GGMLQuantizationType(type_number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[element_type]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"tensor {name!r} in {path} has elements of type {type_number}, which the gguf package does not know: "
                "pip install --upgrade gguf"
            ) from error
        if shape[-1] % block:
            raise header.malformed(
                f"tensor {name!r} has shape {list(shape)}, and {element_type.name} has blocks of {block} along the last"
            )
        tensor = GgufTensor(
            path, element_type.name, shape, shape[-1] // block * block_bytes, begin + offset, header.file
        )
        if tensor.offset + tensor.nbytes > len(header.file):
            raise CheckpointError(
                f"{path} is truncated or not a GGUF file (tensor {name!r} would end at byte "
                f"{tensor.offset + tensor.nbytes} of {len(header.file)}); copy or download it again"
            )
        found[name] = tensor
    return metadata, found


class _Header:
    """What is read of a header so far; nothing is read beyond the end of the file."""

    def __init__(self, path: Path):
        self.path = path
        self.offset = 0
        if path.stat().st_size < len(MAGIC):
            raise self.malformed("it is too short")
        with path.open("rb") as file:
            self.file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def malformed(self, what: str) -> CheckpointError:
        """The error to raise."""
        return CheckpointError(f"{self.path} is truncated or not a GGUF file ({what}); copy or download it again")

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        begin = self._pass(nbytes)
        return self.file[begin : self.offset]

    def _pass(self, nbytes: int) -> int:
        begin = self.offset
        if nbytes > len(self.file) - begin:
            raise self.malformed(f"its header asks for {nbytes} bytes at {begin} of {len(self.file)}")
        self.offset = begin + nbytes
        return begin

    def integer(self, nbytes: int) -> int:
        """The next unsigned integer."""
        return int.from_bytes(self.take(nbytes), "little")

    def text(self) -> str:
        """The next string."""
        octets = self.take(self.integer(8))
        try:
            return octets.decode()
        except UnicodeDecodeError as error:
            raise self.malformed(f"its header has a text that is not UTF-8: {error}") from error

    def counts(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata, before which the kind of file is checked."""
        if self.take(len(MAGIC)) != MAGIC:
            raise self.malformed(f"it does not begin with {MAGIC.decode()}")
        version = self.integer(4)
        if version and not version & 0xFFFF:
            raise CheckpointError(
                f"{self.path} is a big-endian GGUF file; little-endian ones are read: convert it with "
                "gguf-convert-endian of the gguf package"
            )
        if version not in _READ_VERSIONS:
            raise CheckpointError(
                f"{self.path} is a GGUF file of version {version}; versions 2 and 3 are read: convert the model anew"
            )
        tensors, pairs = self.integer(8), self.integer(8)
        if tensors * _LEAST_TENSOR + pairs * _LEAST_PAIR > len(self.file) - self.offset:
            raise self.malformed(f"it says that it holds {tensors} tensors and {pairs} metadata")
        return tensors, pairs

    def value(self) -> Any:
        """The next metadata value: a number, a text or an array of numbers; None for a list of texts."""
        kind = self.integer(4)
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return _plain(self._numbers(kind, 1)[0])
        kind, length = self.integer(4), self.integer(8)
        if kind != _STRING:
            return self._numbers(kind, length)
        for _ in range(length):
            self._pass(self.integer(8))
        return None

    def _numbers(self, kind: int, length: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise self.malformed(f"its header has a value of type {kind}, which there is not")
        dtype = np.dtype(_SCALARS[kind])
        begin = self._pass(length * dtype.itemsize)
        return np.frombuffer(self.file, dtype, length, begin)


def _plain(number: np.generic) -> bool | int | float:
    """A number of Python's; a float32 as the shortest decimal that it stands for, which is what was converted."""
    return float(str(number)) if number.dtype == np.float32 else number.item()
