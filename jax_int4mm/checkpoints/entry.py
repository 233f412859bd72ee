"""One parameter of a checkpoint: what is known of it before it is read, and how to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.affine import AffineGroups, DenseWeight, representable_group_size, to_int4_weight
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.safetensors_files import SafetensorsFiles
from jax_int4mm.weight import Int4Weight


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter under its Hugging Face name.

    Attributes:
      shape: As Hugging Face stores the parameter; a linear layer is [out, in].
      element_type: As safetensors spells it (BF16, F16, ...) or, of a quantised weight, "int4"; as GGUF spells it
        (Q6_K, ...) where `read` dequantises.
      nbytes: Bytes in the file, scales, zeros and the like included.
      read: Reads it: a numpy array of that shape or, for a quantised weight, the Int4Weight (in, out).
      group_size: Of a quantised weight: values of k that share a scale, in the file.
      requantized: Why the weight is quantised anew when it is read; None where it is read as it is.
    """

    shape: tuple[int, ...]
    element_type: str
    nbytes: int
    read: Callable[[], np.ndarray | Int4Weight]
    group_size: int | None = None
    requantized: str | None = None


def plain_entry(files: SafetensorsFiles, name: str) -> Entry:
    """A tensor that is read as it is stored."""
    return Entry(files.shape(name), files.element_type(name), files.nbytes(name), lambda: files[name])


def plain_entries(files: SafetensorsFiles, consumed: Iterable[str]) -> dict[str, Entry]:
    """Every tensor but those that quantised weights are made of."""
    consumed = set(consumed)
    return {name: plain_entry(files, name) for name in files if name not in consumed}


def int4_entry(
    files: SafetensorsFiles,
    parts: Mapping[str, str],
    n: int,
    k: int,
    group_size: int,
    dtype: DTypeLike | None,
    weight: Callable[[Mapping[str, np.ndarray]], AffineGroups | DenseWeight],
    requantized: str | None = None,
) -> Entry:
    """A quantised weight [n, k] made of several tensors.

    Args:
      files: where they are.
      parts: the name of each tensor by its role; "q" is the integers.
      n: output features.
      k: input features.
      group_size: in the file.
      dtype: as in to_int4_weight.
      weight: makes the weight of the tensors by role.
      requantized: as in Entry; filled in where the group size is the reason.
    """

    def read() -> Int4Weight:
        arrays = {role: files[name] for role, name in parts.items()}
        # What is not finite is an error below, and no warning on the way there.
        with np.errstate(invalid="ignore", over="ignore"):
            return to_int4_weight(weight(arrays), dtype, f"{parts['q']!r} in {files.path_of(parts['q'])}")

    if n < 1 or k < 1:
        raise CheckpointError(f"tensor {parts['q']!r} in {files.path_of(parts['q'])} is of a weight of {n} by {k}")
    if requantized is None and representable_group_size(group_size, k) is None:
        requantized = f"groups of {group_size} do not split into groups of 32, 64, 128 or 256"
    return Entry((n, k), "int4", files.nbytes(*parts.values()), read, group_size, requantized)
