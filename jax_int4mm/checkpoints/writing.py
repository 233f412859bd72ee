"""Writing checkpoints: parameter after parameter into shards, and nothing at the destination until all is written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_int4mm.checkpoints.native import Tensors, encode_native, native_metadata, native_settings
from jax_int4mm.checkpoints.safetensors_files import INDEX_FILE, SINGLE_FILE, write_safetensors
from jax_int4mm.checkpoints.torchao import encode_torchao, torchao_metadata, torchao_settings
from jax_int4mm.weight import Int4Weight

SHARD_BYTES = 4 << 30

# What of a model's directory goes along: configurations and tokenizers, by the endings of their names.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_REPLACED = ("config.json", "quantize_config.json", "quant_config.json")


class _Format(NamedTuple):
    encode: Callable[[str, np.ndarray | Int4Weight], tuple[Tensors, dict[str, str]]]
    metadata: Callable[[list[str]], dict[str, str]]
    settings: Callable[[list[int]], dict[str, Any]]


FORMATS = {
    "native": _Format(encode_native, native_metadata, native_settings),
    "torchao": _Format(encode_torchao, torchao_metadata, torchao_settings),
}


def save(
    path: str | os.PathLike[str],
    parameters: Mapping[str, Any] | Iterable[tuple[str, Any]],
    *,
    format: str = "native",
    config: Mapping[str, Any] | None = None,
    companions: str | os.PathLike[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint directory that :func:`load` reads.

    The directory appears when it is complete: an error leaves nothing behind. At most one shard is held in memory.

    Args:
      path: the directory to make; nothing may be there.
      parameters: arrays and Int4Weights by name, or pairs of both, taken one after the other.
      format: "native" (docs/format.md), or "torchao": tile-packed int4 tensors that PyTorch loads. torchao has bfloat16
        scales only, to which others are rounded, and no permutation of k.
      config: the `config.json`; its quantization_config is replaced. None: none is written.
      companions: a directory whose configuration and tokenizer files are copied beside the weights.
      shard_bytes: bytes of tensors in one file at most, unless one parameter has more.

    Raises:
      FileExistsError: there is something at `path`.
      TypeError: a parameter is neither an array nor an Int4Weight.
      ValueError: an unknown format, a name given twice, or a weight that the format cannot hold.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"save: format is {format!r}; it must be one of {', '.join(map(repr, FORMATS))}.")
    if os.path.lexists(path):
        raise FileExistsError(f"save: there is something at {path} already; name a directory that does not exist yet.")
    pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
    with _appearing(path) as folder:
        if companions is not None:
            _copy_companions(Path(companions), folder)
        group_sizes = _write_shards(folder, pairs, FORMATS[format], shard_bytes)
        if config is not None:
            written = {
                key: value for key, value in config.items() if key not in ("quantization_config", "quantization")
            }
            if group_sizes:
                written["quantization_config"] = FORMATS[format].settings(group_sizes)
            (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A directory to fill that becomes `path` at the end, and vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".incomplete", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _copy_companions(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _COMPANIONS and file.name not in _REPLACED and not file.name.endswith(".index.json")
        if wanted and file.is_file():
            shutil.copyfile(file, folder / file.name)


def _write_shards(folder: Path, pairs: Iterable[tuple[str, Any]], format: _Format, shard_bytes: int) -> list[int]:
    """Writes shards and their index; gives the group size of each Int4Weight."""
    shards: list[list[str]] = []
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    names: list[str] = []
    seen: set[str] = set()
    group_sizes: list[int] = []
    total = 0

    def close() -> None:
        shards.append(list(tensors))
        write_safetensors(_shard(folder, len(shards)), tensors, format.metadata(names) | metadata)
        tensors.clear()
        metadata.clear()
        names.clear()

    for name, value in pairs:
        if not isinstance(value, Int4Weight):
            value = _as_numpy(name, value)
        encoded, described = format.encode(name, value)
        size = sum(tensor.nbytes for tensor in encoded.values())
        if tensors and size + sum(tensor.nbytes for tensor in tensors.values()) > shard_bytes:
            close()
        for tensor_name in encoded:
            if tensor_name in seen:
                raise ValueError(f"save: tensor {tensor_name!r} is there twice; names have to differ.")
        seen |= set(encoded)
        tensors |= encoded
        metadata |= described
        names.append(name)
        total += size
        if isinstance(value, Int4Weight):
            group_sizes.append(value.group_size)
    if tensors or not shards:
        close()
    if len(shards) == 1:
        _shard(folder, 1).rename(folder / SINGLE_FILE)
        return group_sizes
    weight_map: dict[str, str] = {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _shard(folder, number).rename(folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return group_sizes


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def _as_numpy(name: str, value: Any) -> np.ndarray:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"save: parameter {name!r} is a {type(value).__name__}; it must be an array or an Int4Weight.")
    return np.asarray(value)
