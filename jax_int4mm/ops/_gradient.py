"""Derivatives of the primitive: it is linear in x, and in scales_and_zeros but for the rounding of the weight.

So a tangent is a product by the same kernels. The backward product dy @ w takes a dense weight, which lives for that
product: what a backward pass keeps of the forward one is x and the packed weight.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_int4mm.ops._primitive import int4pack_mm_p
from jax_int4mm.ops.dequantize import dequantize_apart, transposed_dequantize


def _tangent_of_x(
    tangent: jax.Array, x: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array, **params: Any
) -> jax.Array:
    del x
    return int4pack_mm_p.bind(tangent, packed, scales_and_zeros, **params)


def _tangent_of_scales_and_zeros(
    tangent: jax.Array, x: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array, **params: Any
) -> jax.Array:
    del scales_and_zeros
    return int4pack_mm_p.bind(x, packed, tangent, **params)


ad.defjvp(int4pack_mm_p, _tangent_of_x, None, _tangent_of_scales_and_zeros)


def _transpose(
    dy: jax.Array | ad.Zero, x: Any, packed: jax.Array, scales_and_zeros: Any, *, group_size: int, implementation: Any
) -> tuple[Any, None, Any]:
    del implementation
    if ad.is_undefined_primal(x):
        dx = ad.Zero(x.aval) if isinstance(dy, ad.Zero) else _dx(dy, packed, scales_and_zeros, group_size)
        return dx, None, None
    aval = scales_and_zeros.aval
    if isinstance(dy, ad.Zero):
        return None, None, ad.Zero(aval)
    dw = jax.lax.dot_general(dy, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return None, None, transposed_dequantize(dw, packed, group_size).astype(aval.dtype)


def _dx(dy: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array, group_size: int) -> jax.Array:
    w = dequantize_apart(packed, scales_and_zeros, group_size)
    dx = jax.lax.dot_general(dy, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(dy.dtype)


ad.primitive_transposes[int4pack_mm_p] = _transpose
