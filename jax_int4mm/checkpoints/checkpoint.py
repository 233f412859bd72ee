"""What a checkpoint looks like from outside, whatever its format, and the choice of its reader."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_int4mm.checkpoints import safetensors_files
from jax_int4mm.checkpoints.safetensors_files import CheckpointError

# Endings of tensor names that only a quantised checkpoint has, for files that come without a config.json.
_QUANTISED_NAMES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".W_q": "HQQ",
    "_weight_qdata": "torchao",
    ".absmax": "bitsandbytes",
}


class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors of a checkpoint by name, as stored; one tensor is read at a time, when it is asked for.

    Attributes:
      path: The directory or file that was given to `load`.
      config: The parsed `config.json` of the directory; None where there is none.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None, tensors: Mapping[str, np.ndarray]):
        self.path = path
        self.config = config
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens an unquantised safetensors checkpoint: a Hugging Face directory (one file or shards), or one file.

    No tensor is read yet; `checkpoint[name]` gives a numpy array in the stored dtype (bf16 as `ml_dtypes.bfloat16`)
    and shape, so a linear layer is [out, in] as Hugging Face stores it.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      CheckpointError: a file is truncated or malformed, shards are missing or lie outside the directory, or the
        checkpoint is quantised, which is not read yet. Looking up a name that the checkpoint does not hold raises its
        subclass MissingTensorError, a KeyError.
      ImportError: the safetensors package is not installed.
    """
    path = Path(path)
    config_path = path / "config.json"
    config = safetensors_files.read_json_object(config_path) if config_path.is_file() else None
    _refuse_quantised_config(config or {}, config_path)
    tensors = safetensors_files.find(path)
    _refuse_quantised_names(tensors, path)
    return Checkpoint(path, config, tensors)


def _refuse_quantised_config(config: Mapping[str, Any], config_path: Path) -> None:
    if "quantization_config" in config:
        settings = config["quantization_config"]
        method = str(settings.get("quant_method", "unnamed")) if isinstance(settings, dict) else "unnamed"
    elif "quantization" in config:
        method = "MLX"
    else:
        return
    raise CheckpointError(
        f"{config_path} says that the checkpoint is quantised (method: {method}), which is not yet read; "
        "load the bf16, f16 or f32 model that it was made from and quantise that with jax_int4mm.quantize"
    )


def _refuse_quantised_names(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    for name in tensors:
        for ending, method in _QUANTISED_NAMES.items():
            if name.endswith(ending):
                raise CheckpointError(
                    f"{path} holds tensor {name!r}, so it is quantised ({method}), which is not yet read; "
                    "load the bf16, f16 or f32 model that it was made from and quantise that with jax_int4mm.quantize"
                )
