"""The op in a few lines of ``jnp``: what it means, and as XLA's own product of a weight dequantised for one call.

Every kernel is measured against the first, and it is the implementation on platforms that have no kernel of ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_int4mm.ops.dequantize import dequantize_apart, dequantize_reference


def int4pack_mm_reference(
    x: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array, group_size: int, dtype: DTypeLike
) -> jax.Array:
    """Multiply x [..., k] @ w^T with w = round((q - 8) * scale + zero) and an f32 sum, rounded once to ``dtype``."""
    # Nothing of ours that is compiled. The barrier is that of dequantize_apart.
    w = jax.lax.optimization_barrier(dequantize_reference(packed, scales_and_zeros, group_size=group_size))
    return _multiply_dense(x, w, jax.lax.Precision.HIGHEST).astype(dtype)


def int4pack_mm_dequantized(
    x: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array, group_size: int, dtype: DTypeLike
) -> jax.Array:
    """The same by whatever 16-bit product is XLA's fastest; the dense weight [n, k] lives only for the call."""
    w = dequantize_apart(packed, scales_and_zeros, group_size)
    return _multiply_dense(x, w, jax.lax.Precision.DEFAULT).astype(dtype)


def _multiply_dense(x: jax.Array, w: jax.Array, precision: jax.lax.Precision) -> jax.Array:
    # A 16-bit result would let XLA add up parts of k in 16 bits.
    return jnp.einsum("...k,nk->...n", x, w, precision=precision, preferred_element_type=jnp.float32)
