"""From what int4 formats store, integers with a scale and a zero for each group of k, to :class:`Int4Weight`.

Every format that is read says w = (q - z) * scale or w = q * scale + bias for groups of consecutive k. Here that
becomes w = (q - 8) * scale + zero; zero is computed in float32, and scale and zero are rounded once, to the dtype of
the weight.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.layout import GROUP_SIZES, pack_int4
from jax_int4mm.ops.validation import ACTIVATION_DTYPES
from jax_int4mm.quantizers import quantize
from jax_int4mm.weight import Int4Weight, padded_size

INNER_K_TILES = 8


@dataclasses.dataclass(frozen=True)
class AffineGroups:
    """A weight [n, k] in groups of consecutive values of k: w = (q - 8) * scale + zero.

    Attributes:
      q: uint8 [n, k], 0..15.
      scale: float [n, groups]; any sign.
      zero: float32 [n, groups], what is added; None for none.
      group_size: Values of k that share a scale, of any number; the last group may have fewer.
      perm: int32 [k], the order of k that q is stored in, or None.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    group_size: int
    perm: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class DenseWeight:
    """A weight [n, k] that no groups along k represent, to be quantised anew.

    Attributes:
      values: float32 [n, k].
      group_size: As near to which the new one is as can be.
      scale_dtype: Of the scales that it was stored with.
    """

    values: np.ndarray
    group_size: int
    scale_dtype: np.dtype


def zero_from_point(zero_point: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The zero that is added, of a zero point that is subtracted from q in 0..15 before it is scaled."""
    return (8 - zero_point.astype(np.float32)) * scale.astype(np.float32)


def zero_from_bias(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The zero that is added, of what is added to q in 0..15 times scale."""
    return bias.astype(np.float32) + 8 * scale.astype(np.float32)


def unpack_nibbles(words: np.ndarray) -> np.ndarray:
    """The 4-bit values of integers, least significant first: [..., m] of b bytes to uint8 [..., 2*b*m]."""
    octets = np.ascontiguousarray(words).astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    return np.stack([octets & 0xF, octets >> 4], axis=-1).reshape(*words.shape[:-1], -1)


def representable_group_size(group_size: int, k: int) -> int | None:
    """The largest group size of the packed format into which groups of `group_size` split without loss, or None."""
    if group_size >= k:
        # One group: whichever leaves k without padding.
        return next(
            (size for size in reversed(GROUP_SIZES) if k % size == 0), group_size if group_size in GROUP_SIZES else 128
        )
    return next((size for size in reversed(GROUP_SIZES) if group_size % size == 0), None)


def nearest_group_size(group_size: int) -> int:
    """The group size that a weight is quantised anew with where its own cannot be represented."""
    return next((size for size in reversed(GROUP_SIZES) if size <= group_size), GROUP_SIZES[0])


def weight_dtype(stored: np.dtype, asked: DTypeLike | None) -> np.dtype:
    """The dtype of an Int4Weight: the one asked for, else that of the stored scales if it can be, else bfloat16."""
    if asked is not None:
        return np.dtype(asked)
    return stored if stored in ACTIVATION_DTYPES else np.dtype(ml_dtypes.bfloat16)


def to_int4_weight(weight: AffineGroups | DenseWeight, dtype: DTypeLike | None, source: str) -> Int4Weight:
    """The Int4Weight (k, n) of one stored weight [n, k]; exact but for one rounding of scale and zero to its dtype.

    A weight that the packed format's groups do not represent is quantised anew by round to nearest.

    Args:
      weight: what the file stores.
      dtype: bfloat16, float16 or None, see weight_dtype.
      source: what is read, for messages.

    Raises:
      CheckpointError: a scale or zero is not finite, or too large for dtype.
    """
    if isinstance(weight, DenseWeight):
        return _quantize_anew(weight, weight_dtype(weight.scale_dtype, dtype), source)
    n, k = weight.q.shape
    dtype = weight_dtype(weight.scale.dtype, dtype)
    perm = None if weight.perm is None else jnp.asarray(weight.perm, jnp.int32)
    size = representable_group_size(weight.group_size, k)
    if size is None:
        dense = DenseWeight(_dequantize(weight), weight.group_size, weight.scale.dtype)
        return dataclasses.replace(_quantize_anew(dense, dtype, source), perm=perm)
    scale = weight.scale.astype(np.float32)
    zero = np.zeros_like(scale) if weight.zero is None else weight.zero
    stored_group = np.arange(-(-k // size)) * size // weight.group_size
    pairs = np.stack([scale, zero], axis=-1)[:, stored_group].transpose(1, 0, 2)  # [k/size, n, 2]
    scales_and_zeros = rounded_pairs(pairs, dtype, source)
    padded_n, padded_k = padded_size(n, k, size, INNER_K_TILES)
    q = weight.q
    if (padded_n, padded_k) != (n, k):
        q = np.pad(q, [(0, padded_n - n), (0, padded_k - k)], constant_values=8)
        scales_and_zeros = np.pad(
            scales_and_zeros, [(0, padded_k // size - len(stored_group)), (0, padded_n - n), (0, 0)]
        )
    return Int4Weight(pack_int4(q, INNER_K_TILES), jnp.asarray(scales_and_zeros), perm, group_size=size, k=k, n=n)


def _quantize_anew(weight: DenseWeight, dtype: np.dtype, source: str) -> Int4Weight:
    try:
        return quantize(
            weight.values.T, nearest_group_size(weight.group_size), dtype=dtype, inner_k_tiles=INNER_K_TILES
        )
    except ValueError as error:
        raise CheckpointError(f"{source} cannot be quantised anew: {error}") from error


def _dequantize(weight: AffineGroups) -> np.ndarray:
    group = np.arange(weight.q.shape[1]) // weight.group_size
    dense = (weight.q.astype(np.float32) - 8) * weight.scale.astype(np.float32)[:, group]
    return dense if weight.zero is None else dense + weight.zero[:, group]


def on_device(*leaves: np.ndarray | None) -> list[Any]:
    """Leaves of an Int4Weight on the default device, of views of a file.

    ``jax.device_put`` takes aligned memory as it is on a CPU, where ``jnp.asarray`` copies. Elsewhere the copies are
    under way when this returns, and those of several weights at a time.
    """
    return jax.device_put(list(leaves))


def rounded_pairs(pairs: np.ndarray, dtype: np.dtype, source: str) -> np.ndarray:
    """Scales and zeros rounded to dtype.

    Raises:
      CheckpointError: one is not finite, or too large for dtype.
    """
    # A damaged file may hold signalling NaNs, which even asking for them reports.
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = pairs.astype(dtype)
        fits, finite = np.isfinite(rounded).all(), np.isfinite(pairs).all()
    if fits:
        return rounded
    if finite:
        raise CheckpointError(
            f"{source} has a scale or zero of {float(np.abs(pairs).max()):.4g}, too large for {dtype}; "
            "load it with dtype=jnp.bfloat16"
        )
    raise CheckpointError(f"{source} has a scale or zero that is not a finite number; copy or download the file again")
