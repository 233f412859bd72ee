"""MLX checkpoints of the affine mode: mlx-lm's `convert --quantize` and its kin.

Of a linear layer or an embedding [n, k]: `weight` uint32 [n, k/8], eight values of k in a word; `scales` and `biases`
[n, groups]. w = q * scale + bias with q in 0..15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.affine import AffineGroups, unpack_nibbles, zero_from_bias
from jax_int4mm.checkpoints.entry import Entry, int4_entry, plain_entries
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from jax_int4mm.checkpoints.settings import check_bits, group_size_of


def read_mlx(files: SafetensorsFiles, settings: Mapping[str, Any], dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint whose config.json has `settings` as its "quantization"."""
    entries, consumed = {}, set()
    for scales in files:
        if not scales.endswith(".scales"):
            continue
        module = scales.removesuffix(".scales")
        changed = settings.get(module)
        of_module = {**settings, **changed} if isinstance(changed, Mapping) else settings
        mode = of_module.get("mode", "affine")
        if mode != "affine":
            raise CheckpointError(
                f"{files.folder} has MLX module {module!r} in mode {mode!r}; 'affine' is read: load the bf16 model and "
                "quantise it with jax_int4mm.quantize"
            )
        check_bits(files, module, of_module)
        rule = "MLX stores weight uint32 [n, k/8], scales [n, groups] and biases [n, groups]"
        n, words = files.expect(f"{module}.weight", ["U32"], [None, None], rule)
        _, groups = files.expect(scales, FLOAT_TYPES, [n, None], rule)
        files.expect(f"{module}.biases", FLOAT_TYPES, [n, groups], rule)
        parts = {"q": f"{module}.weight", "scale": scales, "bias": f"{module}.biases"}
        group_size = group_size_of(files, module, of_module, 8 * words, groups)
        entries[f"{module}.weight"] = int4_entry(files, parts, n, 8 * words, group_size, dtype, _groups(group_size))
        consumed |= set(parts.values())
    return plain_entries(files, consumed) | entries


def _groups(group_size: int) -> Callable[[Mapping[str, np.ndarray]], AffineGroups]:
    def groups(arrays: Mapping[str, np.ndarray]) -> AffineGroups:
        scale = arrays["scale"]
        return AffineGroups(unpack_nibbles(arrays["q"]), scale, zero_from_bias(arrays["bias"], scale), group_size)

    return groups
