"""Packed words, scales and zeros back to a dense weight, with the one rounding that the kernels use.

A primitive, since its derivative is not that of the bit operations which round it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from jax_int4mm.layout import as_array, unpack_int4, unpacked_shape
from jax_int4mm.ops import _ffi, validation
from jax_int4mm.ops._batching import batch_first
from jax_int4mm.ops._sharding import (
    PACKED,
    SCALES_AND_ZEROS,
    UNDIVIDED,
    Context,
    Division,
    W,
    array_like,
    batched,
    context,
    divided_by_types,
    divided_by_xla,
    explicit_mesh,
    needs_devices_to_lower,
    varying_alike,
    weight_units,
)


def dequantize(packed: ArrayLike, scales_and_zeros: ArrayLike, group_size: int = 128) -> jax.Array:
    """The dense weight that ``rounded`` kernels multiply by, bit for bit.

    w = round((q - 8) * scale + zero), rounded once from the exact value to the dtype of ``scales_and_zeros``: the
    arithmetic of PyTorch's CUDA ``_weight_int4pack_mm``. One exception: XLA's CPU backend takes bfloat16 subnormals
    (below 1.2e-38) for zeros, and the kernels do not. On NVIDIA GPUs, sm_80 and newer, a kernel of its own writes it.
    The derivative with respect to ``scales_and_zeros`` is that of the formula without its rounding.

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
    local = functools.partial(_local, group_size=group_size)
    if explicit_mesh(packed, scales_and_zeros) is None:
        return local(UNDIVIDED)(packed, scales_and_zeros)
    operands = {PACKED: packed, SCALES_AND_ZEROS: scales_and_zeros}
    return divided_by_types(local, operands, W, weight_units(packed.shape, group_size))


def _local(division: Division, *, group_size: int) -> Callable[..., jax.Array]:
    """What one of the devices that divide a weight computes."""
    del division
    return lambda *operands: _dequantize_p.bind(*varying_alike(*operands), group_size=group_size)


def dequantize_apart(packed: jax.Array, scales_and_zeros: jax.Array, group_size: int) -> jax.Array:
    """:func:`dequantize_rows` for an operand of a product.

    XLA does not see through the barrier. It may otherwise keep w in f32 between the fused operations (excess
    precision), skip its rounding, and multiply what are no 16-bit operands.
    """
    return jax.lax.optimization_barrier(dequantize_rows(packed, scales_and_zeros, group_size))


def transposed_dequantize(w: jax.Array, packed: jax.Array, group_size: int) -> jax.Array:
    """The transpose of dequantisation, which is linear in scales_and_zeros: w [n, k] -> [k/group_size, n, 2] in f32.

    Of a batch of weights, too.
    """
    if packed.ndim == 5:
        return jax.vmap(functools.partial(transposed_dequantize, group_size=group_size))(w, packed)
    n, k, _ = unpacked_shape(packed.shape)
    grouped = w.astype(jnp.float32).reshape(n, k // group_size, group_size)
    centred = unpack_int4(packed).astype(jnp.float32).reshape(grouped.shape) - 8
    return jnp.stack([(grouped * centred).sum(-1).T, grouped.sum(-1).T], axis=-1)


# packed, scales_and_zeros -> w [n, k], or a batch of weights, each array with one dimension more in front; parameter
# group_size: int.
_dequantize_p = Primitive("int4_dequantize")
needs_devices_to_lower(_dequantize_p)


@_dequantize_p.def_abstract_eval
def _abstract_eval(
    packed: jax.core.ShapedArray, scales_and_zeros: jax.core.ShapedArray, *, group_size: int
) -> jax.core.ShapedArray:
    del group_size
    n, k, _ = unpacked_shape(packed.shape[-4:])
    return array_like(scales_and_zeros, (*packed.shape[:-4], n, k), scales_and_zeros.dtype)


def dequantize_reference(packed: jax.Array, scales_and_zeros: jax.Array, *, group_size: int) -> jax.Array:
    """:func:`dequantize_rows` as plain jnp, on every platform; its derivative is that of its operations."""
    if packed.ndim == 5:
        return jax.vmap(functools.partial(dequantize_reference, group_size=group_size))(packed, scales_and_zeros)
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


_dequantize_p.def_impl(jax.jit(dequantize_reference, static_argnames="group_size"))
_lower_to_xla = mlir.lower_fun(dequantize_reference, multiple_results=False)


def _lower_to_kernel(ctx: mlir.LoweringRuleContext, *operands: Any, group_size: int) -> Any:
    where = context(ctx)
    # Where XLA divides the arrays further inside a shard_map, it has no way to divide a custom call.
    if where is Context.MIXED or not _ffi.has_dequantize_kernel():
        return _lower_to_xla(ctx, *operands, group_size=group_size)
    avals_in: Sequence[Any] = ctx.avals_in
    packed, scales_and_zeros = avals_in
    if where is Context.XLA:
        dimensions = PACKED, SCALES_AND_ZEROS, W
        of_packed, of_scales, of_w = map(batched, dimensions) if packed.ndim == 5 else dimensions
        shapes = {of_packed: packed.shape, of_scales: scales_and_zeros.shape}
        program = divided_by_xla(functools.partial(_local, group_size=group_size), shapes, of_w, group_size)
        return mlir.lower_fun(program, multiple_results=False)(ctx, *operands)
    # A row-major result; ffi_lowering derives the operands' layouts.
    rule = jax.ffi.ffi_lowering(_ffi.DEQUANTIZE_TARGET, result_layouts=[tuple(reversed(range(packed.ndim - 2)))])
    return rule(ctx, *operands, group_size=np.int64(group_size))


mlir.register_lowering(_dequantize_p, _lower_to_kernel, platform="cuda")
mlir.register_lowering(_dequantize_p, _lower_to_xla)
ad.defjvp(_dequantize_p, None, lambda tangent, packed, _, **params: _dequantize_p.bind(packed, tangent, **params))


def _transpose(
    w: jax.Array | ad.Zero, packed: jax.Array, scales_and_zeros: ad.UndefinedPrimal, *, group_size: int
) -> tuple[None, Any]:
    aval = scales_and_zeros.aval
    if isinstance(w, ad.Zero):
        return None, ad.Zero(aval)
    return None, transposed_dequantize(w, packed, group_size).astype(aval.dtype)


ad.primitive_transposes[_dequantize_p] = _transpose


def _batch(
    operands: tuple[jax.Array, jax.Array], axes: tuple[int | None, int | None], *, group_size: int
) -> tuple[jax.Array, int]:
    packed, scales_and_zeros = batch_first(operands, axes)
    # Batches of batches become one.
    batch = packed.shape[:-4]
    w = _dequantize_p.bind(
        packed.reshape(-1, *packed.shape[-4:]),
        scales_and_zeros.reshape(-1, *scales_and_zeros.shape[-3:]),
        group_size=group_size,
    )
    return w.reshape(*batch, *w.shape[-2:]), 0


batching.primitive_batchers[_dequantize_p] = _batch
