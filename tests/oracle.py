"""The op in plain numpy and float64: what every implementation is measured against.

Written from the specification of the format and its arithmetic; nothing here imports the package.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16 = np.dtype(np.float16)


def pack(q: np.ndarray, inner_k_tiles: int) -> np.ndarray:
    """int32 [n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2] of q [n, k]: each value's word and bit by the formula."""
    n, k = np.indices(q.shape)
    tile_k = 16 * inner_k_tiles
    lane = 4 * (n & 7) + ((k >> 1) & 3)
    word = (k % tile_k) >> 5
    bit = 16 * (k & 1) + 8 * ((k >> 4) & 1) + 4 * ((k >> 3) & 1)
    packed = np.zeros((q.shape[0] // 8, q.shape[1] // tile_k, 32, inner_k_tiles // 2), np.uint32)
    np.bitwise_or.at(packed, (n >> 3, k // tile_k, lane, word), q.astype(np.uint32) << bit.astype(np.uint32))
    return packed.view(np.int32)


def ulp(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The spacing of ``dtype``'s numbers at ``value``, a float64."""
    info = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(np.abs(value))
    return np.ldexp(1.0, np.maximum(exponent - 1, info.minexp) - info.nmant)


def round_once(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """``value``, a float64, to the nearest number of ``dtype``, ties to even.

    ``value.astype(bfloat16)`` is not that: it rounds to float32 on the way.
    """
    spacing = ulp(value, dtype)
    rounded = np.rint(value / spacing) * spacing
    overflow = np.abs(rounded) > float(ml_dtypes.finfo(dtype).max)
    return np.where(overflow, np.copysign(np.inf, value), rounded).astype(dtype)


def unrounded_weight(q: np.ndarray, scales_and_zeros: np.ndarray, group_size: int) -> np.ndarray:
    """(q - 8) * scale + zero as float64 [n, k].

    A sum that float64 does not hold (a zero beyond 53 bits below the scale) becomes the neighbour with an odd
    significand, which :func:`round_once` takes to where it would take the exact sum.
    """
    scale, zero = scales_and_zeros.astype(np.float64).repeat(group_size, axis=0).transpose(2, 1, 0)  # each [n, k]
    product = (q.astype(np.float64) - 8) * scale
    total = product + zero
    from_product = total - zero
    remainder = (product - from_product) + (zero - (total - from_product))
    outward = np.where((remainder > 0) == (total > 0), 1, -1)
    bits = total.view(np.int64)
    return np.where((remainder != 0) & (bits % 2 == 0), bits + outward, bits).view(np.float64)


def rounded_weight(q: np.ndarray, scales_and_zeros: np.ndarray, group_size: int) -> np.ndarray:
    """The weight [n, k] that ``dequantize`` returns, in the dtype of ``scales_and_zeros``: rounded once."""
    return round_once(unrounded_weight(q, scales_and_zeros, group_size), scales_and_zeros.dtype)
