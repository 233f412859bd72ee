"""HQQ, half-quadratic quantisation without data (Badri and Shaji, 2023): zeros that make the many errors small.

The scale is that of round to nearest. The zero is improved in turns: what errors would remain if few were large (their
proximal step for |error|^0.7, with a penalty that grows by 1 % a turn), then the zero for which the rest has no mean.
The constants are those of torchao's ``_choose_qparams_and_quantize_affine_hqq``. Differences from it:

- f32 on every device; torchao takes float16 on CUDA.
- Each group stops for itself, at the turn with its least mean |error|, of what is stored, scale and zero rounded.
  torchao stops when the mean over the whole matrix, padding included, grows, and keeps the zero of that turn.
- It begins with the zero of round to nearest, not with a whole number of steps: no group gets worse than that.
- A constant group keeps its value; there scales have a bound of 1/20000 that small weights fall under.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_int4mm.quantizers.rtn import errors, quantize_rtn, rounded

TURNS = 20
NORM = 0.7
FIRST_PENALTY = 10.0
PENALTY_GROWTH = 1.01


def quantize_hqq(groups: jax.Array, counted: jax.Array, *, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    """The scale and the zero of each group, f32 [n, k/group_size], of values that dtype has.

    Args:
      groups: [n, k/group_size, group_size] float32.
      counted: [k/group_size, group_size], 1 for weights and 0 for padding.
      dtype: of scale and zero: bfloat16 or float16.
    """
    scale, first = quantize_rtn(groups, symmetric=False, dtype=dtype)
    share = counted / counted.sum(axis=-1, keepdims=True)

    def mean(x: jax.Array) -> jax.Array:
        return (x * share).sum(axis=-1)

    def turn(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        zero, best, best_error = state
        q, error = errors(groups, scale, zero)
        mean_error = mean(jnp.abs(error))
        best = jnp.where(mean_error < best_error, zero, best)
        penalty = FIRST_PENALTY * PENALTY_GROWTH ** i.astype(jnp.float32)
        size = jnp.abs(error)
        # Where there is no error the step is infinite, and no error remains.
        kept = jnp.sign(error) * jnp.maximum(size - size ** (NORM - 1) / penalty, 0)
        zero = rounded(mean(groups - kept - (q - 8) * scale[..., None]), dtype)
        return zero, best, jnp.minimum(mean_error, best_error)

    state = first, first, jnp.full_like(first, jnp.inf)
    zero, best, best_error = jax.lax.fori_loop(0, TURNS, turn, state)
    _, error = errors(groups, scale, zero)
    return scale, jnp.where(mean(jnp.abs(error)) < best_error, zero, best)
