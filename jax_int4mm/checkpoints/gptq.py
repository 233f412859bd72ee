"""GPTQ checkpoints: AutoGPTQ, GPTQModel, and AutoRound where it packs as they do.

Of a linear layer [n, k]: `qweight` int32 [k/8, n], eight values of k in a word; `scales` [groups, n]; `qzeros` int32
[groups, n/8], the zero points; `g_idx` int32 [k], the group of each k, where the file has it. w = scale * (q - zero
point). Formats "gptq" (v1) store each zero point less 1, subtracted from whole words; "gptq_v2" stores it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.affine import AffineGroups, unpack_nibbles, zero_from_point
from jax_int4mm.checkpoints.entry import Entry, int4_entry, plain_entries
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from jax_int4mm.checkpoints.settings import Settings, check_bits, group_size_of, matches, object_in

# Of each stored zero point's own, in all eight of a word: v1 has subtracted it from the word, borrows included.
_ONE_IN_EACH_NIBBLE = np.uint32(0x11111111)


def read_gptq(files: SafetensorsFiles, settings: Settings, dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint whose `quantization_config` is `settings`, of quant_method "gptq"."""
    checkpoint_format = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        checkpoint_format = "marlin"
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{files.folder} is a GPTQ checkpoint of format {checkpoint_format!r}, whose weights are laid out for one "
            "kernel; the formats 'gptq' and 'gptq_v2' are read: take the model's original GPTQ checkpoint, or load the "
            "bf16 model and quantise it with jax_int4mm.quantize"
        )
    dynamic = object_in(files, settings, "dynamic")

    def of_module(module: str) -> Settings:
        for pattern, changed in dynamic.items():
            if isinstance(changed, Mapping) and matches(pattern.removeprefix("+:"), module, re.match):
                return {**settings, **changed}
        return settings

    return read_gptq_layers(files, of_module, less_one=checkpoint_format == "gptq", dtype=dtype)


def read_gptq_layers(
    files: SafetensorsFiles, of_module: Callable[[str], Settings], *, less_one: bool, dtype: DTypeLike | None
) -> dict[str, Entry]:
    """The parameters of a checkpoint packed in GPTQ's way.

    Args:
      files: the checkpoint.
      of_module: bits and group_size of a module by its name.
      less_one: whether zero points are stored less 1.
      dtype: as in to_int4_weight.
    """
    entries, consumed = {}, set()
    for name in files:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        settings = of_module(module)
        check_bits(files, module, settings)
        words, n = files.expect(name, ["I32"], [None, None], "GPTQ stores qweight as int32 [k/8, n]")
        k = 8 * words
        rule = f"GPTQ stores scales [groups, n] and qzeros [groups, n/8] beside qweight {[words, n]}"
        groups, _ = files.expect(f"{module}.scales", FLOAT_TYPES, [None, n], rule)
        files.expect(f"{module}.qzeros", ["I32"], [groups, -(-n // 8)], rule)
        parts = {"q": name, "scale": f"{module}.scales", "zero_point": f"{module}.qzeros"}
        if f"{module}.g_idx" in files:
            consumed.add(f"{module}.g_idx")
            if files.shape(f"{module}.g_idx") != (0,):
                files.expect(f"{module}.g_idx", ["I32"], [k], "GPTQ stores g_idx as int32 [k]")
                parts["group"] = f"{module}.g_idx"
        group_size = group_size_of(files, module, settings, k, groups)
        entries[f"{module}.weight"] = int4_entry(
            files, parts, n, k, group_size, dtype, _groups(group_size, less_one, f"{module!r} in {files.path_of(name)}")
        )
        consumed |= set(parts.values())
    return plain_entries(files, consumed) | entries


def perm_of_groups(group: np.ndarray, group_size: int, source: str) -> np.ndarray | None:
    """The order of k in which groups are consecutive, None where they already are.

    Args:
      group: the group of each k.
      group_size: values of k in each but the last.
      source: what is read, for messages.
    """
    in_order = np.arange(len(group)) // group_size
    if np.array_equal(group, in_order):
        return None
    perm = np.argsort(group, kind="stable")
    if not np.array_equal(group[perm], in_order):
        raise CheckpointError(
            f"{source} assigns values of k to groups of other sizes than group_size {group_size}; the file is damaged, "
            "or of a kind that is not read"
        )
    return perm.astype(np.int32)


def _groups(group_size: int, less_one: bool, source: str) -> Callable[[Mapping[str, np.ndarray]], AffineGroups]:
    def groups(arrays: Mapping[str, np.ndarray]) -> AffineGroups:
        q = unpack_nibbles(arrays["q"].T)
        words = arrays["zero_point"].view(np.uint32)
        points = unpack_nibbles(words + _ONE_IN_EACH_NIBBLE if less_one else words)[:, : q.shape[0]]
        scale = arrays["scale"].T
        perm = perm_of_groups(arrays["group"], group_size, source) if "group" in arrays else None
        return AffineGroups(
            q if perm is None else q[:, perm], scale, zero_from_point(points.T, scale), group_size, perm
        )

    return groups
