"""The JAX primitive ``int4pack_mm``: abstract evaluation, lowering to one custom call per platform, batching."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.typing import DTypeLike

from jax_int4mm.layout import unpacked_shape
from jax_int4mm.ops import _ffi
from jax_int4mm.ops._batching import batch_first
from jax_int4mm.ops._sharding import (
    PACKED,
    SCALES_AND_ZEROS,
    Context,
    Dimensions,
    Division,
    array_like,
    batched,
    context,
    divided_by_xla,
    leading,
    needs_devices_to_lower,
    varying_alike,
)
from jax_int4mm.ops.reference import int4pack_mm_dequantized, int4pack_mm_reference

REFERENCE = "reference"
DEQUANTIZE = "dequantize"
# Implementations whose product is XLA's own, on every platform.
_XLA_PROGRAMS = {REFERENCE: int4pack_mm_reference, DEQUANTIZE: int4pack_mm_dequantized}

# x [..., k], packed, scales_and_zeros -> y [..., n]. Or a batch of weights: packed and scales_and_zeros with one
# dimension more in front, x [m, k], which they share, or [batch, m, k], and y [batch, m, n]. Parameters:
#   group_size: int
#   implementation: str | None
#   dtype: of y, x's or float32
#   accum_dtype: where k is divided among devices, of the parts that are added up
int4pack_mm_p = Primitive("int4pack_mm")
needs_devices_to_lower(int4pack_mm_p)


def _abstract_eval(
    x: jax.core.ShapedArray,
    packed: jax.core.ShapedArray,
    scales_and_zeros: jax.core.ShapedArray,
    *,
    group_size: int,
    implementation: str | None,
    dtype: np.dtype,
    accum_dtype: np.dtype,
) -> jax.core.ShapedArray:
    # The public op has checked the arguments as the user gave them; the handlers check the buffers again.
    del scales_and_zeros, group_size, implementation, accum_dtype
    n, _, _ = unpacked_shape(packed.shape[-4:])
    rows = x.shape[:-1] if packed.ndim == 4 else (packed.shape[0], x.shape[-2])
    return array_like(x, (*rows, n), dtype)


int4pack_mm_p.def_abstract_eval(_abstract_eval)


@int4pack_mm_p.def_impl
def _impl(*operands: jax.Array, **params: Any) -> jax.Array:
    # Reached by a bare bind outside any trace, also under jax.disable_jit(): a custom call exists only compiled. And
    # where JAX, having found a NaN, looks for its origin step by step: compiled, this call would send it in a circle.
    config: Any = jax.config  # jax 0.10 does not declare its flags.
    checks = [("nan", config.jax_debug_nans, jnp.isnan), ("inf", config.jax_debug_infs, jnp.isinf)]
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        y = jax.jit(functools.partial(int4pack_mm_p.bind, **params))(*operands)
        wrong = [value for value, looked_for, is_wrong in checks if looked_for and is_wrong(y).any()]
    if wrong:
        raise FloatingPointError(f"invalid value ({wrong[0]}) encountered in int4pack_mm")
    return y


def local_product(
    division: Division,
    dimensions: Dimensions,
    *,
    group_size: int,
    implementation: str | None,
    dtype: DTypeLike,
    accum_dtype: DTypeLike,
) -> Callable[..., jax.Array]:
    """What one of the devices that divide a product computes: x, packed, scales_and_zeros -> y, its part of each.

    Args:
      division: of the product.
      dimensions: of y.
      group_size: as in the op, and so are the others.
      implementation: None to choose.
      dtype: of y.
      accum_dtype: of the sums over parts of k.
    """

    def product(x: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array) -> jax.Array:
        y = int4pack_mm_p.bind(
            *varying_alike(x, packed, scales_and_zeros),
            group_size=group_size,
            implementation=implementation,
            dtype=jnp.dtype(accum_dtype if division.over_k else dtype),
            accum_dtype=jnp.dtype(accum_dtype),
        )
        return division.add_up(y, dimensions).astype(dtype)

    return product


def _lower_to_xla(
    ctx: mlir.LoweringRuleContext, *operands: Any, implementation: str | None, dtype: np.dtype, **params: Any
) -> Any:
    program = _XLA_PROGRAMS.get(implementation or REFERENCE)
    if program is None:
        raise ValueError(
            f'int4pack_mm: implementation "{implementation}" has no kernel on platform '
            f'{"/".join(ctx.module_context.platforms)}; use None, "reference" or "dequantize" there.'
        )
    one: Callable[..., Any] = functools.partial(program, group_size=params["group_size"], dtype=dtype)
    avals_in: Sequence[Any] = ctx.avals_in
    x, packed, _ = avals_in
    if packed.ndim == 5:
        one = jax.vmap(one, in_axes=(0 if x.ndim == 3 else None, 0, 0))
    return mlir.lower_fun(one, multiple_results=False)(ctx, *operands)


def _divided(
    x: jax.core.ShapedArray, packed: jax.core.ShapedArray, scales_and_zeros: jax.core.ShapedArray, **params: Any
) -> Callable[..., jax.Array]:
    """The program for operands that XLA divides."""
    if packed.ndim == 4:
        rows = leading(x.ndim - 1)
        operands = {(*rows, "k"): x, PACKED: packed, SCALES_AND_ZEROS: scales_and_zeros}
    else:
        rows = ("batch", "m")
        x_rows = rows if x.ndim == 3 else ("m",)
        operands = {(*x_rows, "k"): x, batched(PACKED): packed, batched(SCALES_AND_ZEROS): scales_and_zeros}
    shapes = {dimensions: operand.shape for dimensions, operand in operands.items()}
    result = (*rows, "n")
    local = functools.partial(local_product, dimensions=result, **params)
    return divided_by_xla(local, shapes, result, params["group_size"])


def _flattened(x: jax.Array, *weight: jax.Array, **params: Any) -> jax.Array:
    """The product with one weight of an x of other rank than two."""
    y = int4pack_mm_p.bind(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), *weight, **params)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _lower_to_kernel(
    platform: str,
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    group_size: int,
    implementation: str | None,
    dtype: np.dtype,
    accum_dtype: np.dtype,
) -> Any:
    params: dict[str, Any] = {"group_size": group_size, "dtype": dtype, "accum_dtype": accum_dtype}
    where = context(ctx)
    if implementation in _XLA_PROGRAMS or where is Context.MIXED:
        # Where XLA divides the arrays further inside a shard_map, it has no way to divide a custom call.
        own = implementation if implementation in _XLA_PROGRAMS else DEQUANTIZE
        return _lower_to_xla(ctx, *operands, implementation=own, **params)
    params["implementation"] = implementation
    avals_in: Sequence[Any] = ctx.avals_in
    x, packed, scales_and_zeros = avals_in
    (y,) = ctx.avals_out
    if where is Context.XLA:
        program = _divided(x, packed, scales_and_zeros, **params)
        return mlir.lower_fun(program, multiple_results=False)(ctx, *operands)
    if packed.ndim == 4 and x.ndim != 2:
        return mlir.lower_fun(functools.partial(_flattened, **params), multiple_results=False)(ctx, *operands)
    if platform == "cuda" and not _ffi.has_cuda_kernels() and jax.default_backend() == "gpu":
        raise RuntimeError(
            "int4pack_mm: this jax_int4mm was built without its CUDA kernels, and the program is for a GPU. Reinstall "
            'with JAX_INT4MM_CUDA=ON in the environment (pip install "."), or use implementation="reference".'
        )
    n, k, inner_k_tiles = unpacked_shape(packed.shape[-4:])
    problem = _ffi.Problem(
        m=x.shape[-2] if isinstance(x.shape[-2], int) else _ffi.UNKNOWN_M,
        n=n,
        k=k,
        group_size=group_size,
        inner_k_tiles=inner_k_tiles,
        dtype=str(x.dtype),
        batch=math.prod(packed.shape[:-4]),
        shared_x=x.ndim < y.ndim,
        float32_result=dtype != x.dtype,
    )
    plan = _ffi.plan(platform, problem, implementation)
    workspace = jax.core.ShapedArray((plan["workspace_bytes"],), jnp.uint8)
    rule = jax.ffi.ffi_lowering(
        _ffi.TARGET,
        # Row-major results; ffi_lowering derives the operands' layouts.
        result_layouts=[tuple(reversed(range(y.ndim))), (0,)],
    )
    results = rule(
        ctx.replace(avals_out=[y, workspace]),
        *operands,
        group_size=np.int64(group_size),
        # Empty where the handler is to choose: m is not known yet.
        implementation=implementation or plan["implementation"],
    )
    return results[:1]


for _platform in ("cpu", "cuda"):
    mlir.register_lowering(int4pack_mm_p, functools.partial(_lower_to_kernel, _platform), platform=_platform)
mlir.register_lowering(int4pack_mm_p, _lower_to_xla)


def _batch(
    operands: tuple[Any, Any, Any], axes: tuple[int | None, int | None, int | None], **params: Any
) -> tuple[jax.Array, int]:
    x, *weight = operands
    x_axis, *weight_axes = axes
    own = x_axis is not None
    if x_axis is not None:
        x = jnp.moveaxis(x, x_axis, 0)
    if weight_axes == [None, None]:
        # The same weights for all: the batch is more rows of x.
        if weight[0].ndim == 4:
            return int4pack_mm_p.bind(x, *weight, **params), 0
        x = jnp.moveaxis(x, 0, -3)
        y = int4pack_mm_p.bind(x.reshape(*x.shape[:-3], -1, x.shape[-1]), *weight, **params)
        return y.reshape(*y.shape[:-2], *x.shape[-3:-1], y.shape[-1]), 1
    packed, scales_and_zeros = batch_first(weight, weight_axes)
    size, *inner = packed.shape[:-4]
    if not inner:
        rows = x.shape[own:-1]
        x = x.reshape(*x.shape[:own], math.prod(rows), x.shape[-1])
    else:
        # A batch of batches becomes one. An x that is shared in one of them only is repeated.
        rows = x.shape[-2:-1]
        if own and x.ndim == 3:
            x = x[:, None]
        if x.ndim > 2:
            x = jnp.broadcast_to(x, (size, *inner, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
    y = int4pack_mm_p.bind(
        x,
        packed.reshape(-1, *packed.shape[-4:]),
        scales_and_zeros.reshape(-1, *scales_and_zeros.shape[-3:]),
        **params,
    )
    return y.reshape(size, *inner, *rows, y.shape[-1]), 0


batching.primitive_batchers[int4pack_mm_p] = _batch
