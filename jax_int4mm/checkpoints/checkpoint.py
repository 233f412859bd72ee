"""What a checkpoint looks like from outside, whatever its format."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints import hub
from jax_int4mm.checkpoints.detection import read_entries
from jax_int4mm.checkpoints.entry import Entry
from jax_int4mm.checkpoints.errors import MissingTensorError, RequantizedWarning
from jax_int4mm.ops.validation import ACTIVATION_DTYPES
from jax_int4mm.weight import Int4Weight


class Checkpoint(Mapping[str, "np.ndarray | Int4Weight"]):
    """Parameters of a checkpoint by their Hugging Face names; each is read when it is asked for.

    Attributes:
      path: The directory or file that was given to `load`.
      config: The parsed `config.json` of the directory (of a GGUF file: the equivalent of its metadata); None where
        there is none.
      format: What the weights are stored as: "gptq", "awq", ..., "safetensors" for dense ones.
      entries: What is known of each parameter without reading it.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None, format: str, entries: Mapping[str, Entry]):
        self.path = path
        self.config = config
        self.format = format
        self.entries = entries

    def __getitem__(self, name: str) -> np.ndarray | Int4Weight:
        entry = self.entries.get(name)
        if entry is None:
            raise MissingTensorError(f"{self.path} holds no parameter {name!r} among its {len(self)} parameters")
        return entry.read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, format {self.format!r}, {len(self)} parameters)"


def load(path: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> Checkpoint:
    """Opens a checkpoint: a Hugging Face directory (one safetensors file or shards), one safetensors or GGUF file.

    docs/checkpoints.md lists the formats. No parameter is read yet, but every shape is checked. `checkpoint[name]`
    gives, under its Hugging Face name, a numpy array in the stored dtype and shape or, of a weight that is stored as
    4-bit integers in groups, an :class:`jax_int4mm.Int4Weight` on JAX's default device. Hugging Face stores a linear
    layer as [out, in]; the Int4Weight of one is (in, out): ``x @ checkpoint[name]``.

    Args:
      path: the directory or file, or "hf://org/name" for a repository of the Hugging Face hub.
      dtype: bfloat16 or float16, of quantised weights, whose scales and zeros are rounded to it once; None for the
        dtype of the stored scales if it is one of these, else bfloat16.

    Raises:
      FileNotFoundError: there is nothing at `path`, or the hub does not give it.
      TypeError: dtype is neither bfloat16 nor float16.
      CheckpointError: a file is truncated or malformed, shards are missing or lie outside the directory, a tensor is
        missing or of another shape than its format says, or the format is not read. Looking up a name that the
        checkpoint does not hold raises its subclass MissingTensorError, a KeyError.
      ImportError: the safetensors, gguf or huggingface_hub package is needed and not installed.

    Warns:
      RequantizedWarning: some weights will be dequantised and quantised anew, and why.
    """
    if dtype is not None and np.dtype(dtype) not in ACTIVATION_DTYPES:
        raise TypeError(f"load: dtype is {np.dtype(dtype)}; it must be bfloat16 or float16, that of the activations.")
    path = hub.fetch(path) if isinstance(path, str) and path.startswith(hub.SCHEME) else Path(path)
    config, format, entries = read_entries(path, dtype)
    _warn_of_requantized(path, entries)
    return Checkpoint(path, config, format, dict(sorted(entries.items(), key=_in_natural_order)))


def _in_natural_order(item: tuple[str, Entry]) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", item[0])]


def _warn_of_requantized(path: Path, entries: Mapping[str, Entry]) -> None:
    reasons: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry.requantized is not None:
            reasons.setdefault(entry.requantized, []).append(name)
    for reason, names in reasons.items():
        warnings.warn(
            f"{path}: {len(names)} of {len(entries)} parameters, {names[0]!r} first, are dequantised and quantised "
            f"anew (round to nearest) when they are read, which adds to their error: {reason}.",
            RequantizedWarning,
            stacklevel=3,
        )
