"""The native format: safetensors whose int4 weights are the leaves of an Int4Weight as they are; see docs/format.md."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.affine import on_device, rounded_pairs, weight_dtype
from jax_int4mm.checkpoints.entry import Entry, plain_entries
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.safetensors_files import SafetensorsFiles
from jax_int4mm.layout import GROUP_SIZES, INNER_K_TILES, packed_shape
from jax_int4mm.weight import Int4Weight, padded_size

FORMAT = "jax_int4mm"
FORMAT_VERSION = 1

Tensors = dict[str, np.ndarray]


def encode_native(name: str, value: np.ndarray | Int4Weight) -> tuple[Tensors, dict[str, str]]:
    """The tensors that a parameter is stored as, packed words first, and its entry in the metadata."""
    if not isinstance(value, Int4Weight):
        return {name: value}, {}
    tensors = {f"{name}.packed": value.packed, f"{name}.scales_and_zeros": value.scales_and_zeros}
    if value.perm is not None:
        tensors[f"{name}.perm"] = value.perm
    described = {
        "type": "Int4Weight",
        "k": value.k,
        "n": value.n,
        "group_size": value.group_size,
        "inner_k_tiles": value.inner_k_tiles,
        "stacked": list(value.shape[:-2]),
    }
    return {part: np.asarray(leaf) for part, leaf in tensors.items()}, {name: json.dumps(described)}


def native_metadata(names: list[str]) -> dict[str, str]:
    """The metadata of every native file."""
    return {"format": FORMAT, "format_version": str(FORMAT_VERSION)}


def native_settings(group_sizes: list[int]) -> dict[str, Any]:
    """The quantization_config of a directory in the native format."""
    return {"quant_method": FORMAT, "format_version": FORMAT_VERSION}


def read_native(files: SafetensorsFiles, dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint in the native format."""
    version = files.metadata.get("format_version", "none")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{files.folder} is of version {version} of the native format; this release reads version "
            f"{FORMAT_VERSION}: install a newer jax_int4mm"
        )
    entries, consumed = {}, set()
    for name, text in files.metadata.items():
        if name in ("format", "format_version"):
            continue
        described = _described(files, name, text)
        entries[name] = _entry(files, name, described, dtype)
        consumed |= {f"{name}.packed", f"{name}.scales_and_zeros", f"{name}.perm"}
    return plain_entries(files, consumed) | entries


def _described(files: SafetensorsFiles, name: str, text: str) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except json.JSONDecodeError:
        described = None
    if not isinstance(described, dict) or described.get("type") != "Int4Weight":
        raise CheckpointError(
            f"{files.folder} has metadata of {name!r} that does not describe an Int4Weight; copy or download it again"
        )
    stacked = described.get("stacked")
    sizes = [described.get("k"), described.get("n"), *(stacked if isinstance(stacked, list) else [None])]
    if (
        not all(isinstance(size, int) and size > 0 for size in sizes)
        or described.get("group_size") not in GROUP_SIZES
        or described.get("inner_k_tiles") not in INNER_K_TILES
    ):
        raise CheckpointError(
            f"{files.folder} describes {name!r} as {text}; k, n and stacked have to be positive sizes, group_size one "
            f"of {', '.join(map(str, GROUP_SIZES))} and inner_k_tiles one of {', '.join(map(str, INNER_K_TILES))}"
        )
    return described


def _entry(files: SafetensorsFiles, name: str, described: dict[str, Any], dtype: DTypeLike | None) -> Entry:
    k, n, group_size, stacked = (described[key] for key in ("k", "n", "group_size", "stacked"))
    padded_n, padded_k = padded_size(n, k, group_size, described["inner_k_tiles"])
    rule = f"the native format stores {[*stacked, k, n]} in groups of {group_size} as packed and scales_and_zeros"
    packed, pairs, perm = f"{name}.packed", f"{name}.scales_and_zeros", f"{name}.perm"
    files.expect(packed, ["I32"], [*stacked, *packed_shape(padded_n, padded_k, described["inner_k_tiles"])], rule)
    files.expect(pairs, ["BF16", "F16"], [*stacked, padded_k // group_size, padded_n, 2], rule)
    parts = [packed, pairs]
    if perm in files:
        files.expect(perm, ["I32"], [*stacked, k], "the native format stores perm as int32 [k]")
        parts.append(perm)

    def read() -> Int4Weight:
        scales_and_zeros = files[pairs]
        to = weight_dtype(scales_and_zeros.dtype, dtype)
        if scales_and_zeros.dtype != to:
            scales_and_zeros = rounded_pairs(scales_and_zeros, to, f"{name!r} in {files.path_of(pairs)}")
        order = _permutation(files, perm) if perm in files else None
        return Int4Weight(*on_device(files[packed], scales_and_zeros, order), group_size=group_size, k=k, n=n)

    return Entry((*stacked, n, k), "int4", files.nbytes(*parts), read, group_size)


def _permutation(files: SafetensorsFiles, name: str) -> np.ndarray:
    perm = files[name]
    if not np.array_equal(np.sort(perm, axis=-1), np.broadcast_to(np.arange(perm.shape[-1]), perm.shape)):
        raise CheckpointError(f"tensor {name!r} in {files.path_of(name)} is no permutation of k; the file is damaged")
    return perm
