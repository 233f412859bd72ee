"""torchao checkpoints in safetensors, and the export of ours as one.

The parts of a parameter `a.weight` are tensors `a._weight_<part>`; the file's metadata holds JSON under the parameter's
name with its type and what the type needs beside its parts. Three types are read:

- `Int4TilePackedTo4dTensor`: `qdata` and `scale_and_zero` are the packed format of this package, inner_k_tiles 8, with
  n padded to 8 and k to 1024.
- `Int4Tensor`: `qdata` int8 [n, k/2], even k in the low nibble, signed; `scale` and `zero_point` [groups, n];
  w = q * scale + zero_point. ExecuTorch stores unsigned q and w = (q - zero_point) * scale under the same name; told
  apart by zero points that are all whole numbers in 0..15.
- `IntxUnpackedToInt8Tensor`: `qdata` int8 [n, k]; `scale` and `zero_point` [n, groups]; w = (q - zero_point) * scale.
  With target_dtype int4 it holds -8..7; with another one it is read as a dense array.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.affine import (
    INNER_K_TILES,
    AffineGroups,
    on_device,
    rounded_pairs,
    to_int4_weight,
    unpack_nibbles,
    weight_dtype,
    zero_from_point,
)
from jax_int4mm.checkpoints.entry import Entry, int4_entry, plain_entries
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from jax_int4mm.layout import GROUP_SIZES, LANES, TILE_N, pack_int4, tile_k, unpack_int4
from jax_int4mm.weight import Int4Weight, padded_size

TILE_PACKED = "Int4TilePackedTo4dTensor"
_TORCHAO_K = 1024  # What torchao pads k to a multiple of.
_WORD_OF_EIGHTS = np.uint32(0x88888888).astype(np.int32)
_REMEDY = "load the bf16 model and quantise it with jax_int4mm.quantize"


def read_torchao(files: SafetensorsFiles, dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint that torchao's tensors were saved in."""
    entries, consumed = {}, set()
    for parameter, text in files.metadata.items():
        described = _described(files, parameter, text)
        kind = described.get("_type")
        if kind is None or kind == "Tensor":
            continue
        module, _, own_name = parameter.rpartition(".")
        reader, data, part_names = _READERS.get(str(kind)), described.get("_data"), described.get("_tensor_data_names")
        if reader is None or not isinstance(data, dict) or not isinstance(part_names, list):
            raise CheckpointError(
                f"{files.folder} has parameter {parameter!r} as torchao's {kind}, which is not read; "
                f"{', '.join(_READERS)} are: {_REMEDY}"
            )
        parts = {str(part): f"{module}._{own_name}_{part}" for part in part_names}
        if "act_pre_scale" in parts:
            raise CheckpointError(
                f"{files.folder} has parameter {parameter!r} with an act_pre_scale, by which activations would have to "
                f"be multiplied before the product; it is not read: {_REMEDY}"
            )
        entries[parameter] = reader(files, parameter, parts, data, dtype)
        consumed |= set(parts.values())
    return plain_entries(files, consumed) | entries


def _described(files: SafetensorsFiles, parameter: str, text: str) -> dict[str, Any]:
    if not text.startswith("{"):  # Entries of the metadata that are no parameters: "format", "tensor_names".
        return {}
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{files.folder} has metadata of {parameter!r} that is not valid JSON ({error}); copy or download it again"
        ) from error
    return described if isinstance(described, dict) else {}


def _block(parameter: str, data: Mapping[str, Any]) -> int:
    block: Any = data.get("block_size")
    if not _are_sizes(block, 2) or block[0] != 1:
        raise CheckpointError(
            f"torchao parameter {parameter!r} has block_size {block}; groups along k have block_size [1, group_size]"
        )
    return int(block[1])


def _tile_packed(
    files: SafetensorsFiles, parameter: str, parts: Mapping[str, str], data: Mapping[str, Any], dtype: DTypeLike | None
) -> Entry:
    group_size = _block(parameter, data)
    n, k = _shape(parameter, data)
    rule = f"{TILE_PACKED} stores qdata int32 [n/8, k/128, 32, 4] and scale_and_zero [k/group_size, n, 2], padded"
    tiles_n, tiles_k, _, _ = files.expect(
        _part(files, parts, "qdata", rule), ["I32"], [None, None, LANES, INNER_K_TILES // 2], rule
    )
    stored_n, stored_k = tiles_n * TILE_N, tiles_k * tile_k(INNER_K_TILES)
    pairs_name = _part(files, parts, "scale_and_zero", rule)
    files.expect(pairs_name, FLOAT_TYPES, [stored_k // group_size, stored_n, 2], rule)
    if n > stored_n or k > stored_k or stored_k % group_size or group_size not in GROUP_SIZES:
        raise CheckpointError(
            f"torchao parameter {parameter!r} is {n} by {k} in groups of {group_size}, and its tensors hold {stored_n} "
            f"by {stored_k}; they are not of one checkpoint"
        )

    source = f"{parameter!r} in {files.path_of(pairs_name)}"

    def read() -> Int4Weight:
        packed, scales_and_zeros = files[parts["qdata"]], files[pairs_name]
        scales_and_zeros = scales_and_zeros[: -(-k // group_size), :n]
        to = weight_dtype(scales_and_zeros.dtype, dtype)
        if padded_size(n, k, group_size, INNER_K_TILES) == (n, k):
            # What is padded is whole tiles and groups.
            pairs = rounded_pairs(scales_and_zeros, to, source)
            packed = packed[: n // TILE_N, : k // tile_k(INNER_K_TILES)]
            return Int4Weight(*on_device(packed, pairs), group_size=group_size, k=k, n=n)
        scale, zero = scales_and_zeros.transpose(2, 1, 0)
        groups = AffineGroups(np.asarray(unpack_int4(packed))[:n, :k], scale, zero.astype(np.float32), group_size)
        return to_int4_weight(groups, to, source)

    return Entry((n, k), "int4", files.nbytes(*parts.values()), read, group_size)


def _shape(parameter: str, data: Mapping[str, Any]) -> Sequence[int]:
    shape: Any = data.get("shape")
    if not _are_sizes(shape, 2):
        raise CheckpointError(
            f"torchao parameter {parameter!r} has shape {shape}; only matrices [n, k] are read, so it must be two sizes"
        )
    return tuple(shape)


def _are_sizes(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(size, int) and size > 0 for size in value)


def _part(files: SafetensorsFiles, parts: Mapping[str, str], part: str, rule: str) -> str:
    if part not in parts:
        raise CheckpointError(f"{files.folder} describes a parameter without {part}: {rule}")
    return parts[part]


def _int4_tensor(
    files: SafetensorsFiles, parameter: str, parts: Mapping[str, str], data: Mapping[str, Any], dtype: DTypeLike | None
) -> Entry:
    group_size = _block(parameter, data)
    n, k = _shape(parameter, data)
    rule = "Int4Tensor stores qdata int8 [n, k/2] and scale and zero_point [k/group_size, n]"
    if k % 2:
        raise CheckpointError(f"torchao parameter {parameter!r} has an odd k = {k}: {rule}")
    files.expect(_part(files, parts, "qdata", rule), ["I8", "U8"], [n, k // 2], rule)
    for part in ("scale", "zero_point"):
        files.expect(_part(files, parts, part, rule), FLOAT_TYPES, [-(-k // group_size), n], rule)

    def groups(arrays: Mapping[str, np.ndarray]) -> AffineGroups:
        q = unpack_nibbles(arrays["q"])
        scale, zero = arrays["scale"].T, arrays["zero_point"].T.astype(np.float32)
        if zero.any() and np.array_equal(zero, np.clip(np.round(zero), 0, 15)):
            return AffineGroups(q, scale, zero_from_point(zero, scale), group_size)
        return AffineGroups(q ^ 8, scale, zero, group_size)

    return _int4_entry(files, parts, n, k, group_size, dtype, groups)


def _unpacked(
    files: SafetensorsFiles, parameter: str, parts: Mapping[str, str], data: Mapping[str, Any], dtype: DTypeLike | None
) -> Entry:
    target = data.get("target_dtype")
    target = target.get("_data") if isinstance(target, dict) else None
    group_size = _block(parameter, data)
    rule = "IntxUnpackedToInt8Tensor stores qdata int8 [n, k] and scale and zero_point [n, k/group_size]"
    n, k = files.expect(_part(files, parts, "qdata", rule), ["I8"], [None, None], rule)
    if k % group_size:
        raise CheckpointError(f"torchao parameter {parameter!r} has k = {k} in groups of {group_size}: {rule}")
    for part, types in (("scale", FLOAT_TYPES), ("zero_point", ("I8", *FLOAT_TYPES))):
        files.expect(_part(files, parts, part, rule), types, [n, k // group_size], rule)

    def groups(arrays: Mapping[str, np.ndarray]) -> AffineGroups:
        q, scale = arrays["q"], arrays["scale"]
        if q.min() < -8 or q.max() > 7:
            raise CheckpointError(f"{parameter!r} in {files.path_of(parts['qdata'])} has values outside -8..7")
        zero_point = arrays["zero_point"].astype(np.float32) + 8
        return AffineGroups((q + 8).astype(np.uint8), scale, zero_from_point(zero_point, scale), group_size)

    def dense() -> np.ndarray:
        q, scale, zero_point = (files[parts[part]] for part in ("qdata", "scale", "zero_point"))
        spread = np.arange(k) // group_size
        with np.errstate(invalid="ignore", over="ignore"):  # What is not finite is an error below.
            values = (q - zero_point.astype(np.float32)[:, spread]) * scale.astype(np.float32)[:, spread]
        source = f"{parameter!r} in {files.path_of(parts['qdata'])}"
        return rounded_pairs(values, weight_dtype(scale.dtype, dtype), source)

    if target != "int4":  # Embeddings of 8 bits, beside linear layers of 4.
        return Entry((n, k), str(target), files.nbytes(*parts.values()), dense)
    return _int4_entry(files, parts, n, k, group_size, dtype, groups)


def _int4_entry(
    files: SafetensorsFiles,
    parts: Mapping[str, str],
    n: int,
    k: int,
    group_size: int,
    dtype: DTypeLike | None,
    groups: Callable[[Mapping[str, np.ndarray]], AffineGroups],
) -> Entry:
    roles = {"q": parts["qdata"], "scale": parts["scale"], "zero_point": parts["zero_point"]}
    return int4_entry(files, roles, n, k, group_size, dtype, groups)


_READERS = {TILE_PACKED: _tile_packed, "Int4Tensor": _int4_tensor, "IntxUnpackedToInt8Tensor": _unpacked}


def encode_torchao(name: str, value: np.ndarray | Int4Weight) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors that torchao stores a parameter as, and its entry in the metadata.

    Raises:
      ValueError: the weight is stacked or its k is in another order, or its name has no module.
    """
    if not isinstance(value, Int4Weight):
        return {name: value}, {name: json.dumps({"_type": "Tensor"})}
    module, _, own_name = name.rpartition(".")
    if not module or value.ndim != 2 or value.perm is not None:
        why = "its k is in another order" if value.perm is not None else f"its shape is {list(value.shape)}"
        raise ValueError(
            f"save: Int4Weight {name!r} has no form in torchao: "
            f"{why if module else 'its name has no module'}. Save it in the native format, or quantise it otherwise."
        )
    packed, pairs = _padded_as_torchao_does(value)
    prefix = f"{module}._{own_name}_"
    described = {
        "_type": TILE_PACKED,
        "_data": {"block_size": [1, value.group_size], "shape": [value.n, value.k]},
        "_tensor_data_names": ["qdata", "scale_and_zero"],
    }
    return {f"{prefix}qdata": packed, f"{prefix}scale_and_zero": pairs}, {name: json.dumps(described)}


def torchao_metadata(names: list[str]) -> dict[str, str]:
    """The metadata of a file with these parameters, beside their own entries."""
    return {"format": "pt", "tensor_names": json.dumps(names)}


def torchao_settings(group_sizes: list[int]) -> dict[str, Any]:
    """The quantization_config that transformers loads a directory with weights of these group sizes by."""
    (group_size, _), *_ = Counter(group_sizes).most_common()
    return {
        "quant_method": "torchao",
        "quant_type": {
            "default": {
                "_type": "Int4WeightOnlyConfig",
                "_version": 2,
                "_data": {
                    "group_size": group_size,
                    "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
                },
            }
        },
    }


def _padded_as_torchao_does(w4: Int4Weight) -> tuple[np.ndarray, np.ndarray]:
    """Packed words with inner_k_tiles 8 and bfloat16 scales and zeros, k padded to 1024 with words of 8 and zeros."""
    packed = np.asarray(w4.packed)
    if w4.inner_k_tiles != INNER_K_TILES:
        q = np.asarray(unpack_int4(packed))
        spare_k = -q.shape[1] % tile_k(INNER_K_TILES)
        packed = np.asarray(pack_int4(np.pad(q, [(0, 0), (0, spare_k)], constant_values=8), INNER_K_TILES))
    tiles_k = -(-w4.k // _TORCHAO_K) * _TORCHAO_K // tile_k(INNER_K_TILES)
    spare_tiles = tiles_k - packed.shape[1]
    packed = np.pad(packed, [(0, 0), (0, spare_tiles), (0, 0), (0, 0)], constant_values=_WORD_OF_EIGHTS)
    pairs = np.asarray(w4.astype(jnp.bfloat16).scales_and_zeros)
    spare_groups = tiles_k * tile_k(INNER_K_TILES) // w4.group_size - len(pairs)
    return packed, np.pad(pairs, [(0, spare_groups), (0, 0), (0, 0)])
