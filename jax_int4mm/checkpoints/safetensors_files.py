"""The raw tensors of one or several safetensors files, read lazily: what every reader stands on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, where safetensors looks it up by name)
import numpy as np

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Names of element types in a safetensors header that numpy, with ml_dtypes, represents.
_READABLE_DTYPES = {"BF16", "F16", "F32", "F64", "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


class CheckpointError(ValueError):
    """A checkpoint is malformed, incomplete or of a kind that is not read; the message says which."""


class MissingTensorError(CheckpointError, KeyError):
    """The checkpoint holds no tensor of that name."""

    # KeyError would print the sentence as a quoted string.
    __str__ = Exception.__str__


class SafetensorsFiles(Mapping[str, np.ndarray]):
    """Tensors by name over the safetensors files of one checkpoint; each is read when it is asked for.

    Every file is opened, and the index compared with what the files hold, when this is made: a missing or truncated
    shard is an error then and not in the middle of loading a model.
    """

    def __init__(self, files: Mapping[str, Path] | Path):
        """Takes one file, or the file of each tensor as an index gives it.

        Raises:
          CheckpointError: a file is missing, truncated, malformed or without a tensor that it should hold.
        """
        paths = {files} if isinstance(files, Path) else set(files.values())
        self._handles = {path: _open(path) for path in sorted(paths)}
        held = {path: set(handle.keys()) for path, handle in self._handles.items()}
        if isinstance(files, Path):
            files = dict.fromkeys(sorted(held[files]), files)
        for name, path in files.items():
            if name not in held[path]:
                raise CheckpointError(
                    f"{path} does not hold tensor {name!r}, which the index beside it says it does; "
                    "index and shards are not of one checkpoint: copy or download it again"
                )
        self._files = dict(files)

    def __getitem__(self, name: str) -> np.ndarray:
        path = self._files.get(name)
        if path is None:
            folders = sorted({str(path.parent) for path in self._handles})
            raise MissingTensorError(f"{', '.join(folders)} holds no tensor {name!r} among its {len(self)} tensors")
        handle = self._handles[path]
        dtype = handle.get_slice(name).get_dtype()
        if dtype not in _READABLE_DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {path} has elements of type {dtype}, which is not read; "
                "convert the checkpoint to bf16, f16 or f32"
            )
        tensor: np.ndarray = handle.get_tensor(name)
        return tensor

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
            raise CheckpointError(f"{path} is not a safetensors file; only files named *.safetensors are read")
        return SafetensorsFiles(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or directory {path}; give the path of a local checkpoint")
    if (path / SINGLE_FILE).is_file():
        return SafetensorsFiles(path / SINGLE_FILE)
    if (path / INDEX_FILE).is_file():
        return SafetensorsFiles(_read_index(path / INDEX_FILE))
    raise CheckpointError(
        f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints are read (pickled .bin and "
        ".pt files never are): convert it to safetensors, or give the path of one .safetensors file"
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Parses a JSON file that has to hold an object."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
