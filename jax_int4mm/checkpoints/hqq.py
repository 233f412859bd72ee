"""HQQ checkpoints in safetensors: the hqq library's own and those of transformers.

Of a linear layer [n, k], reshaped to rows of one group each (axis 1): `W_q` uint8, row r of the first half of the rows
in the high nibbles and of the second half in the low ones; `scale` and `zero`, one a row; `shape`, `group_size`,
`axis`, `nbits`, `packing` and more as tensors of their own. w = (q - zero) * scale with a float zero.

Along axis 0 a group takes every (n*k/group_size)-th value of the weight, so its values are of different n: such a
weight is dequantised and quantised anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.affine import AffineGroups, DenseWeight, zero_from_point
from jax_int4mm.checkpoints.entry import Entry, int4_entry, plain_entries
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from jax_int4mm.checkpoints.settings import Settings, object_in

_PACKING = "4bit_u8"
_SETTINGS = (
    *("axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size", "nbits", "offload_meta", "optimize"),
    *("packing", "quant_scale", "quant_zero", "round_zero", "shape", "stores_quant_config", "unpack_view_dtype"),
    "view_as_float",
)


def read_hqq(files: SafetensorsFiles, settings: Settings, dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint with HQQ weights; `settings` is its `quantization_config` if it has one."""
    said = object_in(files, object_in(files, settings, "quant_config"), "weight_quant_params")
    entries, consumed = {}, set()
    for name in files:
        if not name.endswith(".W_q"):
            continue
        module = name.removesuffix(".W_q")
        n, k = _integers(files, f"{module}.shape", 2)
        axis = _setting(files, module, "axis", said, 1)
        bits = _setting(files, module, "nbits", said, 4)
        packing = _text(files, f"{module}.packing")
        if bits != 4 or packing != _PACKING:
            raise CheckpointError(
                f"{files.folder} has HQQ module {module!r} in {bits} bits, packed as {packing!r}; 4 bits in "
                f"{_PACKING!r} are read: load the bf16 model and quantise it with jax_int4mm.quantize"
            )
        rule = "HQQ stores scale and zero with one number for each group of the weight"
        shape = files.expect(f"{module}.scale", FLOAT_TYPES, [None, 1] if axis == 1 else [1, None], rule)
        files.expect(f"{module}.zero", FLOAT_TYPES, shape, rule)
        count = 0 if axis not in (0, 1) else shape[0] if axis == 1 else shape[1]
        group_size = n * k // count if count and n > 0 and k > 0 else 0
        stored = (count, group_size) if axis == 1 else (group_size, count)
        if not group_size or n * k % count or stored[0] % 2:
            raise CheckpointError(
                f"{files.folder} has HQQ module {module!r} of shape {[n, k]} with scales {list(shape)} along axis "
                f"{axis}, which do not divide it; the file is damaged, or of a kind that is not read"
            )
        rule = f"HQQ packs {stored[0]} rows of {stored[1]} values in half as many bytes"
        # With view_as_float the bytes are those of a float tensor, [rows, fewer columns].
        octets = {"BF16": 2, "F16": 2, "F32": 4}.get(files.element_type(name), 1)
        columns = stored[1] // octets if stored[1] % octets == 0 else 0
        files.expect(name, ["U8", *FLOAT_TYPES], [stored[0] // 2, columns], rule)
        parts = {"q": name, "scale": f"{module}.scale", "zero": f"{module}.zero"}
        requantized = None
        if axis == 0 or k % group_size:
            along = "along axis 0" if axis == 0 else f"of {group_size} that do not divide k"
            requantized = f"HQQ groups {along} hold values of several output features"
        entries[f"{module}.weight"] = int4_entry(
            files, parts, n, k, group_size, dtype, _groups(n, k, group_size, requantized is None), requantized
        )
        consumed |= {*parts.values(), *(f"{module}.{setting}" for setting in _SETTINGS)}
    return plain_entries(files, consumed) | entries


def _setting(files: SafetensorsFiles, module: str, name: str, said: Mapping[str, int], default: int) -> int:
    if f"{module}.{name}" in files:
        return _integers(files, f"{module}.{name}")[0]
    return said.get(name, default)


def _integers(files: SafetensorsFiles, name: str, count: int | None = None) -> tuple[int, ...]:
    shape = [] if count is None else [count]
    files.expect(name, ["I32", "I64", "U8"], shape, "HQQ stores the settings of a weight as integer tensors")
    return tuple(map(int, files[name].reshape(-1)))


def _text(files: SafetensorsFiles, name: str) -> str:
    files.expect(name, ["U8"], [None], "HQQ stores the name of the packing as bytes")
    return bytes(files[name]).decode("ascii", "replace")


def _groups(
    n: int, k: int, group_size: int, within_rows: bool
) -> Callable[[Mapping[str, np.ndarray]], AffineGroups | DenseWeight]:
    def groups(arrays: Mapping[str, np.ndarray]) -> AffineGroups | DenseWeight:
        octets = arrays["q"].view(np.uint8)
        q = np.concatenate([octets >> 4, octets & 0xF])
        scale, zero = arrays["scale"], arrays["zero"]
        if not within_rows:
            dense = (q - zero.astype(np.float32)) * scale.astype(np.float32)
            return DenseWeight(dense.reshape(n, k), group_size, scale.dtype)
        scale, zero = scale.reshape(n, -1), zero.reshape(n, -1)
        return AffineGroups(q.reshape(n, k), scale, zero_from_point(zero, scale), group_size)

    return groups
