"""The JAX primitive ``int4pack_mm``: abstract evaluation, lowering to one custom call per platform, batching."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_int4mm.layout import unpacked_shape
from jax_int4mm.ops import _ffi
from jax_int4mm.ops._batching import batch_first, stack_rows
from jax_int4mm.ops._sharding import matrix_like
from jax_int4mm.ops.reference import int4pack_mm_dequantized, int4pack_mm_reference

REFERENCE = "reference"
DEQUANTIZE = "dequantize"
# Implementations whose product is XLA's own, on every platform.
_XLA_PROGRAMS = {REFERENCE: int4pack_mm_reference, DEQUANTIZE: int4pack_mm_dequantized}

# x [m, k], packed, scales_and_zeros -> y [m, n]; parameters group_size: int and implementation: str | None.
int4pack_mm_p = Primitive("int4pack_mm")


def _abstract_eval(
    x: jax.core.ShapedArray,
    packed: jax.core.ShapedArray,
    scales_and_zeros: jax.core.ShapedArray,
    *,
    group_size: int,
    implementation: str | None,
) -> jax.core.ShapedArray:
    # The public op has checked the arguments as the user gave them; the handlers check the buffers again.
    del scales_and_zeros, group_size, implementation
    n, _, _ = unpacked_shape(packed.shape)
    return matrix_like(x, (x.shape[0], n), rows=0)


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


def _lower_to_xla(ctx: mlir.LoweringRuleContext, *operands: Any, group_size: int, implementation: str | None) -> Any:
    program = _XLA_PROGRAMS.get(implementation or REFERENCE)
    if program is None:
        raise ValueError(
            f'int4pack_mm: implementation "{implementation}" has no kernel on platform '
            f'{"/".join(ctx.module_context.platforms)}; use None, "reference" or "dequantize" there.'
        )
    rule = mlir.lower_fun(functools.partial(program, group_size=group_size), multiple_results=False)
    return rule(ctx, *operands)


def _lower_to_kernel(
    platform: str,
    ctx: mlir.LoweringRuleContext,
    *operands: Any,
    group_size: int,
    implementation: str | None,
) -> Any:
    if implementation in _XLA_PROGRAMS:
        return _lower_to_xla(ctx, *operands, group_size=group_size, implementation=implementation)
    if platform == "cuda" and not _ffi.has_cuda_kernels() and jax.default_backend() == "gpu":
        raise RuntimeError(
            "int4pack_mm: this jax_int4mm was built without its CUDA kernels, and the program is for a GPU. Reinstall "
            'with JAX_INT4MM_CUDA=ON in the environment (pip install "."), or use implementation="reference".'
        )
    avals_in: Sequence[Any] = ctx.avals_in
    x, packed, _ = avals_in
    (y,) = ctx.avals_out
    n, k, inner_k_tiles = unpacked_shape(packed.shape)
    m = x.shape[0] if isinstance(x.shape[0], int) else _ffi.UNKNOWN_M
    plan = _ffi.plan(platform, m, n, k, group_size, inner_k_tiles, str(x.dtype), implementation)
    workspace = jax.core.ShapedArray((plan["workspace_bytes"],), jnp.uint8)
    rule = jax.ffi.ffi_lowering(
        _ffi.TARGET,
        # Row-major results; ffi_lowering derives the operands' layouts.
        result_layouts=[(1, 0), (0,)],
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
    operands: tuple[Any, Any, Any],
    axes: tuple[int | None, int | None, int | None],
    *,
    group_size: int,
    implementation: str | None,
) -> tuple[jax.Array, int]:
    bind = functools.partial(int4pack_mm_p.bind, group_size=group_size, implementation=implementation)
    x_axis, packed_axis, scales_axis = axes
    if x_axis is not None and packed_axis is None and scales_axis is None:
        # One weight for the whole batch: the batch is more rows of x.
        x = jnp.moveaxis(operands[0], x_axis, 0)
        y = bind(x.reshape(-1, x.shape[-1]), *operands[1:])
        return y.reshape(*x.shape[:-1], y.shape[-1]), 0
    if x_axis is None:
        # One x for all weights: they are one weight with more rows.
        packed, scales_and_zeros = batch_first(operands[1:], axes[1:])
        y = bind(operands[0], *stack_rows(packed, scales_and_zeros))
        return y.reshape(len(y), len(packed), -1), 1
    return jax.lax.map(lambda one: bind(*one), tuple(batch_first(operands, axes))), 0


batching.primitive_batchers[int4pack_mm_p] = _batch
