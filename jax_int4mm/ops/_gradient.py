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
    dy: jax.Array | ad.Zero, x: Any, packed: jax.Array, scales_and_zeros: Any, *, group_size: int, **params: Any
) -> tuple[Any, None, Any]:
    del params
    x_type = x.aval if ad.is_undefined_primal(x) else jax.typeof(x)
    # How einsum names x, the weight and y.
    if packed.ndim == 4:
        x_is, w_is, y_is = "...k", "nk", "...n"
    else:
        x_is, w_is, y_is = "bmk" if x_type.ndim == 3 else "mk", "bnk", "bmn"
    if ad.is_undefined_primal(x):
        if isinstance(dy, ad.Zero):
            return ad.Zero(x_type), None, None
        w = dequantize_apart(packed, scales_and_zeros, group_size)
        dx = jnp.einsum(f"{y_is},{w_is}->{x_is}", dy.astype(w.dtype), w, preferred_element_type=w.dtype)
        return dx, None, None
    aval = scales_and_zeros.aval
    if isinstance(dy, ad.Zero):
        return None, None, ad.Zero(aval)
    if packed.ndim == 4:
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        x_is, y_is = "mk", "mn"
    dw = jnp.einsum(f"{y_is},{x_is}->{w_is}", dy.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return None, None, transposed_dequantize(dw, packed, group_size).astype(aval.dtype)


ad.primitive_transposes[int4pack_mm_p] = _transpose
