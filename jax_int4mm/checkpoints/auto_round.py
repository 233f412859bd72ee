"""AutoRound checkpoints, in three packings: GPTQ's with and without shifted zero points, and AWQ's."""

from __future__ import annotations

from collections.abc import Mapping

from jax.typing import DTypeLike

from jax_int4mm.checkpoints.awq import read_awq_layers
from jax_int4mm.checkpoints.entry import Entry
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.gptq import read_gptq_layers
from jax_int4mm.checkpoints.safetensors_files import SafetensorsFiles
from jax_int4mm.checkpoints.settings import Settings, matches, object_in

_SHIFTED = ("auto_round:auto_gptq",)
_UNSHIFTED = ("auto_round", "auto_round:gptqmodel")
_AWQ = ("auto_round:auto_awq",)
_OF_BACKEND = {
    "None": "auto_round:auto_gptq",
    "auto": "auto_round:auto_gptq",
    "gptq": "auto_round:auto_gptq",
    "auto_round:gptq": "auto_round:auto_gptq",
    "gptq:exllamav2": "auto_round:auto_gptq",
    "auto_round:gptq:exllamav2": "auto_round:auto_gptq",
}


def read_auto_round(files: SafetensorsFiles, settings: Settings, dtype: DTypeLike | None) -> dict[str, Entry]:
    """The parameters of a checkpoint whose `quantization_config` is `settings`, of quant_method "auto-round"."""
    # Releases before packing_format named the packing by the kernel that they were to run on.
    packing = settings.get("packing_format") or _OF_BACKEND.get(str(settings.get("backend")), settings.get("backend"))
    extra = object_in(files, settings, "extra_config")

    def of_module(module: str) -> Settings:
        changed = extra.get(module)
        if changed is None:
            changed = next((of for pattern, of in extra.items() if matches(pattern, module)), None)
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
