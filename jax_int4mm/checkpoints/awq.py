"""AWQ checkpoints of the "gemm" version: AutoAWQ, llm-awq's converters, and AutoRound where it packs as they do.

Of a linear layer [n, k]: `qweight` int32 [k, n/8] and `qzeros` int32 [groups, n/8], eight values of n in a word in the
order 0, 2, 4, 6, 1, 3, 5, 7; `scales` [groups, n]. w = (q - zero point) * scale. What AWQ scales activations by is
already part of the layer before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.affine import AffineGroups, unpack_nibbles, zero_from_point
from jax_int4mm.checkpoints.entry import Entry, int4_entry, plain_entries
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from jax_int4mm.checkpoints.settings import Settings, check_bits, group_size_of

# Where in a word each of eight consecutive n is.
_NIBBLE_OF_N = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def read_awq(files: SafetensorsFiles, settings: Settings, dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint whose `quantization_config` is `settings`, of quant_method "awq"."""
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(
            f"{files.folder} is an AWQ checkpoint of version {version!r}, whose weights are laid out for another "
            "kernel; version 'gemm' is read: take the model's gemm checkpoint, or load the bf16 model and quantise it "
            "with jax_int4mm.quantize"
        )
    return read_awq_layers(files, lambda module: settings, dtype)


def read_awq_layers(
    files: SafetensorsFiles, of_module: Callable[[str], Settings], dtype: DTypeLike | None
) -> dict[str, Entry]:
    """The parameters of a checkpoint packed in AWQ's way; `of_module` gives bits and group_size of a module."""
    entries, consumed = {}, set()
    for name in files:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        settings = of_module(module)
        check_bits(files, module, settings)
        k, words = files.expect(name, ["I32"], [None, None], "AWQ stores qweight as int32 [k, n/8]")
        rule = f"AWQ stores scales [groups, n] and qzeros [groups, n/8] beside qweight {[k, words]}"
        groups, n = files.expect(f"{module}.scales", FLOAT_TYPES, [None, 8 * words], rule)
        parts = {"q": name, "scale": f"{module}.scales"}
        if settings.get("zero_point", True) or f"{module}.qzeros" in files:
            files.expect(f"{module}.qzeros", ["I32"], [groups, words], rule)
            parts["zero_point"] = f"{module}.qzeros"
        group_size = group_size_of(files, module, settings, k, groups)
        entries[f"{module}.weight"] = int4_entry(files, parts, n, k, group_size, dtype, _groups(group_size))
        consumed |= set(parts.values())
    return plain_entries(files, consumed) | entries


def _groups(group_size: int) -> Callable[[Mapping[str, np.ndarray]], AffineGroups]:
    def groups(arrays: Mapping[str, np.ndarray]) -> AffineGroups:
        scale = arrays["scale"].T
        zero = zero_from_point(_in_order_of_n(arrays["zero_point"]).T, scale) if "zero_point" in arrays else None
        return AffineGroups(np.ascontiguousarray(_in_order_of_n(arrays["q"]).T), scale, zero, group_size)

    return groups


def _in_order_of_n(words: np.ndarray) -> np.ndarray:
    nibbles = unpack_nibbles(words)
    return nibbles.reshape(len(words), -1, 8)[:, :, _NIBBLE_OF_N].reshape(nibbles.shape)
