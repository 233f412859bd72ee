"""Round to nearest with a clipped range: of 80 ranges for each group the one with the least squared error.

The search is that of GPTQ's quantiser (``mse=True`` in its ``quant.py``): the range is shrunk to 0.99, 0.98, ... 0.21
of itself. There both ends shrink towards 0, here an asymmetric range shrinks towards its middle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_int4mm.quantizers.rtn import errors, scale_and_zero

STEPS = 80


def quantize_mse(
    groups: jax.Array, counted: jax.Array, *, symmetric: bool, dtype: np.dtype
) -> tuple[jax.Array, jax.Array]:
    """The scale and the zero of each group, f32 [n, k/group_size], of values that dtype has.

    Args:
      groups: [n, k/group_size, group_size] float32.
      counted: [k/group_size, group_size], 1 for weights and 0 for padding.
      symmetric: zero is 0.
      dtype: of scale and zero: bfloat16 or float16.
    """
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    middle, half = (low + high) / 2, (high - low) / 2

    def judged(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        scale, zero = scale_and_zero(low, high, symmetric=symmetric, dtype=dtype)
        _, error = errors(groups, scale, zero)
        return (error**2 * counted).sum(axis=-1), scale, zero

    def better(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part = 1 - i.astype(jnp.float32) / 100
        found = judged(*((low * part, high * part) if symmetric else (middle - half * part, middle + half * part)))
        return tuple(jnp.where(found[0] < best[0], new, old) for new, old in zip(found, best, strict=True))

    # The whole range as it is, not as the sum of its middle and its half.
    _, scale, zero = jax.lax.fori_loop(1, STEPS, better, judged(low, high))
    return scale, zero
