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


def quantize_rtn(w: jax.Array, *, group_size: int, symmetric: bool, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """Quantise rows of w in groups along k.

    Args:
      w: [n, k] float32, k a multiple of group_size.
      group_size: values of k that share a scale and a zero.
      symmetric: zero is 0 and scale = max|w| / 7.5, the middle between clipping the positive end (8) and wasting a step
        (7), as GPTQ and compressed-tensors have it; else minimum and maximum are both representable.
      dtype: of scale and zero: bfloat16 or float16.

    Returns:
      q uint8 [n, k] in 0..15 and scales_and_zeros [k/group_size, n, 2] in dtype.
    """
    n, k = w.shape
    groups = w.reshape(n, k // group_size, group_size)
    # A constant group has no range: the smallest normal number keeps the division below defined and its result 0.
    smallest = jnp.finfo(dtype).smallest_normal.astype(jnp.float32)
    low = groups.min(axis=-1)
    high = groups.max(axis=-1)
    if symmetric:
        scale = jnp.maximum(jnp.maximum(-low, high) / 7.5, smallest).astype(dtype)
        zero = jnp.zeros_like(scale)
    else:
        scale = jnp.maximum((high - low) / 15, smallest).astype(dtype)
        zero = (low + 8 * scale.astype(jnp.float32)).astype(dtype)
    stored_scale, stored_zero = scale.astype(jnp.float32)[..., None], zero.astype(jnp.float32)[..., None]
    q = jnp.clip(jnp.round((groups - stored_zero) / stored_scale) + 8, 0, 15).astype(jnp.uint8)
    return q.reshape(n, k), jnp.stack([scale, zero], axis=-1).transpose(1, 0, 2)
