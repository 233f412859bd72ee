"""AutoRound checkpoints, in three packings: GPTQ's with and without shifted zero points, and AWQ's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jax.typing import DTypeLike

from jax_int4mm.checkpoints.awq import read_awq_layers
from jax_int4mm.checkpoints.entry import Entry
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.gptq import Settings, read_gptq_layers
from jax_int4mm.checkpoints.safetensors_files import SafetensorsFiles

_SHIFTED = ("auto_round:auto_gptq",)
_UNSHIFTED = ("auto_round", "auto_round:gptqmodel")
_AWQ = ("auto_round:auto_awq",)


def read_auto_round(files: SafetensorsFiles, settings: Settings, dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint whose `quantization_config` is `settings`, of quant_method "auto-round"."""
    packing = settings.get("packing_format", "auto_round:auto_gptq")
    extra = settings.get("extra_config") or {}

    def of_module(module: str) -> Settings:
        changed = extra.get(module)
        if changed is None:
            changed = next((of for pattern, of in extra.items() if _matches(pattern, module)), None)
        return {**settings, **changed} if isinstance(changed, Mapping) else settings

    if packing in _AWQ:
        return read_awq_layers(files, of_module, dtype)
    if packing in _SHIFTED or packing in _UNSHIFTED:
        return read_gptq_layers(files, of_module, less_one=packing in _SHIFTED, dtype=dtype)
    raise CheckpointError(
        f"{files.folder} is an AutoRound checkpoint with packing_format {packing!r}; "
        f"{', '.join(map(repr, _SHIFTED + _UNSHIFTED + _AWQ))} are read: export the model in one of these, or load the "
        "bf16 model and quantise it with jax_int4mm.quantize"
    )


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.search(pattern, module) is not None
    except re.error:  # A module's name need not be a regular expression.
        return False
