"""Packed words, scales and zeros back to a dense weight, with the one rounding that the kernels use."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_int4mm.layout import as_array, unpack_int4
from jax_int4mm.ops import validation


def dequantize(packed: ArrayLike, scales_and_zeros: ArrayLike, group_size: int = 128) -> jax.Array:
    """The dense weight that ``rounded`` kernels multiply by, bit for bit.

    w = round((q - 8) * scale + zero), rounded once from the exact value to the dtype of ``scales_and_zeros``: the
    arithmetic of PyTorch's CUDA ``_weight_int4pack_mm``. One exception: XLA's CPU backend takes bfloat16 subnormals
    (below 1.2e-38) for zeros, and the kernels do not.

    Args:
      packed: int32 ``[n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]``.
      scales_and_zeros: [k/group_size, n, 2] bfloat16 or float16, (scale, zero).
      group_size: 32, 64, 128 or 256 values of k that share a scale and a zero.

    Returns:
      w [n, k] in the dtype of ``scales_and_zeros``.

    Raises:
      TypeError: a dtype breaks a rule above.
      ValueError: a shape or group_size breaks a rule above.
    """
    group_size = validation.check_group_size("dequantize", group_size)
    packed = as_array("dequantize", "packed", packed)
    scales_and_zeros = as_array("dequantize", "scales_and_zeros", scales_and_zeros)
    validation.check_weight("dequantize", packed, scales_and_zeros, group_size)
    return dequantize_rows(packed, scales_and_zeros, group_size)


@functools.partial(jax.jit, static_argnames="group_size")
def dequantize_rows(packed: jax.Array, scales_and_zeros: jax.Array, group_size: int) -> jax.Array:
    """:func:`dequantize` without its checks, for callers that have made them."""
    q = unpack_int4(packed)
    n, k = q.shape
    centred = q.astype(jnp.float32).reshape(n, k // group_size, group_size) - 8
    scale, zero = scales_and_zeros.astype(jnp.float32).transpose(2, 1, 0)[..., None]  # each [n, k/group_size, 1]
    # The product is exact in f32: 4 bits times at most 11.
    w = _add_rounded_to_odd(centred * scale, zero)
    return w.astype(scales_and_zeros.dtype).reshape(n, k)


def _add_rounded_to_odd(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum in f32, an inexact sum rounded to the neighbour with an odd significand.

    Rounding that again, to 16 bits, gives the same as rounding the exact sum once (Boldo and Melquiond, 2008), which a
    plain f32 sum does not where the zero is much smaller than the scale.
    """
    total = a + b
    # Knuth's two-sum: total + error == a + b exactly.
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    bits = jax.lax.bitcast_convert_type(total, jnp.int32)
    # An even significand with a remainder moves one step towards it: away from zero if they share a sign.
    step = jnp.where((error > 0) == (total > 0), 1, -1)
    inexact_and_even = (error != 0) & (bits & 1 == 0) & jnp.isfinite(total)
    return jax.lax.bitcast_convert_type(jnp.where(inexact_and_even, bits + step, bits), jnp.float32)
