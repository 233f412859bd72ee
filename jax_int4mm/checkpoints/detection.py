"""Which format a checkpoint is in, by its configuration and its tensors' names, and its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from jax_int4mm.checkpoints import gguf_files, safetensors_files
from jax_int4mm.checkpoints.auto_round import read_auto_round
from jax_int4mm.checkpoints.awq import read_awq
from jax_int4mm.checkpoints.compressed_tensors import read_compressed_tensors
from jax_int4mm.checkpoints.entry import Entry, plain_entries
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.gguf import read_gguf
from jax_int4mm.checkpoints.gptq import read_gptq
from jax_int4mm.checkpoints.hqq import read_hqq
from jax_int4mm.checkpoints.mlx import read_mlx
from jax_int4mm.checkpoints.native import FORMAT, read_native
from jax_int4mm.checkpoints.safetensors_files import SafetensorsFiles
from jax_int4mm.checkpoints.settings import Settings
from jax_int4mm.checkpoints.torchao import read_torchao

_REMEDY = "load the bf16, f16 or f32 model that it was made from and quantise that with jax_int4mm.quantize"

Reader = Callable[[SafetensorsFiles, Settings, "DTypeLike | None"], dict[str, Entry]]

# By the quant_method of a quantization_config, its spellings made one.
_READERS: dict[str, Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "compressed-tensors": read_compressed_tensors,
    "hqq": read_hqq,
    "mlx": read_mlx,
    FORMAT: lambda files, settings, dtype: read_native(files, dtype),
    "torchao": lambda files, settings, dtype: read_torchao(files, dtype),
}

# What is not read, by its quant_method or mode, and what it is.
_REFUSED = {
    "aqlm": "AQLM, vectors from a codebook",
    "bitnet": "BitNet, ternary weights",
    "bitsandbytes": "bitsandbytes, whose 4-bit types nf4 and fp4 are codebooks and not steps of one size",
    "eetq": "EETQ, 8-bit weights",
    "exl2": "ExLlamaV2, of several bit widths in one matrix",
    "exl3": "ExLlamaV3, a trellis code",
    "fbgemm-fp8": "8-bit floats",
    "fp8": "8-bit floats",
    "higgs": "HIGGS, vectors from a codebook",
    "modelopt": "NVIDIA Model Optimizer, 8-bit or 4-bit floats",
    "mxfp4": "MXFP4, 4-bit floats",
    "quanto": "Quanto, pickled or 8-bit weights",
    "quark": "AMD Quark, of several formats",
    "spqr": "SpQR, with sparse outliers",
    "vptq": "VPTQ, vectors from a codebook",
}

# Files that older releases of the libraries wrote in place of config.json's quantization_config.
_SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

# Endings of tensor names that only a quantised checkpoint has, for files that come without a configuration.
_QUANTISED_NAMES = {
    ".weight_packed": "compressed-tensors",
    ".W_q": "hqq",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    "_blocks": "mxfp4",
    ".q_weight": "exl2",
    ".trellis": "exl3",
    ".weight_scale_inv": "fp8",
}


def read_entries(path: Path, dtype: DTypeLike | None) -> tuple[dict[str, Any] | None, str, dict[str, Entry]]:
    """The configuration, the format's name and the parameters of the checkpoint at `path`; see `load`."""
    gguf_path = gguf_files.find(path)
    if gguf_path is not None:
        gguf_config, entries = read_gguf(gguf_path, dtype)
        return gguf_config, "gguf", entries
    config_path = path / "config.json"
    config = safetensors_files.read_json_object(config_path) if config_path.is_file() else None
    method, settings = _configured(path, config or {})
    if method is not None:
        _refuse(method, f"{path} says that the checkpoint is quantised")
    files = safetensors_files.find(path)
    if method is None:
        method, settings = _by_names(files, path)
    if method is None:
        return config, "safetensors", plain_entries(files, ())
    return config, method, _READERS[method](files, settings, dtype)


def _configured(path: Path, config: Mapping[str, Any]) -> tuple[str | None, Settings]:
    """The method that the directory's configuration names, if any, and its settings."""
    if isinstance(config.get("quantization"), dict):
        return "mlx", config["quantization"]
    if config.get("quantization_config") is not None:
        settings = config["quantization_config"]
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path / 'config.json'} has a quantization_config that is not an object")
        method = settings.get("quant_method")
        if method is None:
            raise CheckpointError(
                f"{path / 'config.json'} has a quantization_config without a quant_method, so its format is not known"
            )
        return _one_spelling(method), settings
    for name, method in _SETTINGS_FILES.items():
        if (path / name).is_file():
            settings = safetensors_files.read_json_object(path / name)
            return _one_spelling(settings.get("quant_method", method)), settings
    return None, {}


def _one_spelling(method: object) -> str:
    spelled = str(method).lower()
    return spelled if spelled == FORMAT else spelled.replace("_", "-").removeprefix("intel/")


def _refuse(method: str, how_known: str) -> None:
    if method not in _READERS:
        what = _REFUSED.get(method, f"method {method!r}")
        raise CheckpointError(f"{how_known} ({what}), which is not read; {_REMEDY}")


def _by_names(files: SafetensorsFiles, path: Path) -> tuple[str | None, Settings]:
    """The method that the files' metadata and tensors' names give away, where no configuration names one."""
    if files.metadata.get("format") == FORMAT:
        return FORMAT, {}
    if "tensor_names" in files.metadata or any("_weight_qdata" in name for name in files):
        return "torchao", {}
    for name in files:
        for ending, method in _QUANTISED_NAMES.items():
            if name.endswith(ending):
                _refuse(method, f"{path} holds tensor {name!r}, so it is quantised")
                return method, {}
        if name.endswith(".scales"):
            return _scaled(files, path, name.removesuffix(".scales"))
    return None, {}


def _scaled(files: SafetensorsFiles, path: Path, module: str) -> tuple[str, Settings]:
    """The method of a file whose modules have scales: what is beside them says it."""
    scales = files.shape(f"{module}.scales")
    if f"{module}.qweight" in files:
        shape = files.shape(f"{module}.qweight")
        # GPTQ packs along k, so that qweight is as wide as scales; AWQ along n.
        if len(shape) == len(scales) == 2 and shape[1] == scales[1]:
            raise CheckpointError(
                f"{path} holds GPTQ weights without a configuration that says whether their zero points are stored "
                "less 1 (format 'gptq') or as they are ('gptq_v2'): give the directory with its config.json or "
                "quantize_config.json"
            )
        return "awq", {}
    if f"{module}.weight" in files and f"{module}.biases" in files:
        return "mlx", {}
    raise CheckpointError(
        f"{path} holds tensor '{module}.scales', so it is quantised, and no configuration that says how; {_REMEDY}"
    )
