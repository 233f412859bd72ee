"""Round to nearest: each group's range cut into 15 steps.

The formulas are those of torchao's tinygemm quantiser (``torchao/quantization/quant_primitives.py``): asymmetric,
scale = (max - min) / 15 and zero = min + 8 * scale. One thing differs: torchao computes in the weight's dtype, while
here the statistics are f32, scale and zero are rounded once, and q is chosen for the rounded pair, so that the error is
that of what is stored.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def quantize_rtn(groups: jax.Array, *, symmetric: bool, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """The scale and the zero of each group, f32 [n, k/group_size], of values that dtype has.

    Args:
      groups: [n, k/group_size, group_size] float32.
      symmetric: zero is 0 and scale = max|w| / 7.5, the middle between clipping the positive end (8) and wasting a step
        (7), as GPTQ and compressed-tensors have it; else minimum and maximum are both representable.
      dtype: of scale and zero: bfloat16 or float16.
    """
    return scale_and_zero(groups.min(axis=-1), groups.max(axis=-1), symmetric=symmetric, dtype=dtype)


def scale_and_zero(low: jax.Array, high: jax.Array, *, symmetric: bool, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Scale and zero, rounded to dtype, in f32, that represent low and high or, symmetric, the larger of them."""
    # A constant group has no range: any scale keeps the division by it defined. The smallest normal number would do,
    # but a scale under 2^-30 keeps a CPU from products of bfloat16 (docs/kernels/cpu.md): it is left to constants so
    # small that 2^-30 matters.
    smallest = jnp.finfo(dtype).smallest_normal.astype(jnp.float32)
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    is_plain = (low == high) & ((size == 0) | (size >= 2.0**-18))
    smallest = jnp.where(is_plain, jnp.maximum(smallest, 2.0**-30), smallest)
    if symmetric:
        scale = rounded(jnp.maximum(jnp.maximum(-low, high) / 7.5, smallest), dtype)
        return scale, jnp.zeros_like(scale)
    scale = rounded(jnp.maximum((high - low) / 15, smallest), dtype)
    return scale, rounded(low + 8 * scale, dtype)


def rounded(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The nearest numbers of dtype, in f32."""
    if dtype == jnp.bfloat16:
        # XLA may fuse a conversion there and back into none; this it keeps. bfloat16 has float32's exponents.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def nearest(groups: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """Q in 0..15, as f32, of the value (q - 8) * scale + zero that is nearest to each weight."""
    return jnp.clip(jnp.round((groups - zero[..., None]) / scale[..., None]) + 8, 0, 15)


def errors(groups: jax.Array, scale: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q of each weight, and the weight less what q stands for."""
    q = nearest(groups, scale, zero)
    return q, groups - ((q - 8) * scale[..., None] + zero[..., None])
