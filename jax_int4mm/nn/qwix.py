"""Qwix's rules and interception with int4 kernels of this package: for Flax models whose code cannot be changed.

Written against qwix 0.1.8 (https://github.com/google/qwix), whose extension points it takes: extra ``qwix``.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.typing import DTypeLike
from qwix._src.core import dot_general, einsum, qarray

from jax_int4mm.layout import GROUP_SIZES
from jax_int4mm.ops.validation import ACTIVATION_DTYPES
from jax_int4mm.quantizers import quantize_tensor
from jax_int4mm.tensor import Int4Tensor, einsum_axes, int4_dot_general, int4_einsum

__all__ = ["Int4Provider"]

DEFAULT_GROUP_SIZE = 128
# What quantize calls Qwix's calibration of weights.
_SYMMETRIC = {"absmax": True, "minmax": False}


class Int4Provider(qwix.PtqProvider):
    """A ``qwix.PtqProvider`` that keeps int4 weights packed and multiplies by them with :func:`int4pack_mm`.

    It serves the rules whose ``weight_qtype`` is int4 and whose activations are not quantised: ``tile_size`` is the
    group size, None for 128, and ``weight_calibration_method`` "absmax" is symmetric, "minmax" not. Inputs are rounded
    to bfloat16, or float16 where the model computes in it, and the result has the dtype that it would have had. All
    other rules are Qwix's. Products in which x and the kernel share batch axes stay dense.

    Use it as Qwix's own: ``qwix.quantize_model(model, Int4Provider(rules), x)``.

    Raises:
      ValueError: an int4 rule asks for a tile_size or a calibration that int4 weights here do not have.
    """

    def __init__(self, rules: Sequence[qwix.QuantizationRule], **options: Any):
        """Takes Qwix's rules."""
        for rule in rules:
            if _is_ours(rule.weight_qtype, rule.act_qtype):
                _check(rule.tile_size, rule.weight_calibration_method)
        functions = types.SimpleNamespace(**vars(qarray))
        functions.quantize = _quantize
        super().__init__(
            rules,
            _qarray_module=functions,
            _dot_general_fn=_dot_general,
            _einsum_fn=_einsum,
            **options,
        )

    def dot_general(self, lhs: Any, rhs: Any, dimension_numbers: Any, *args: Any, **options: Any) -> jax.Array:
        """Takes the place of ``jax.lax.dot_general`` in the model."""
        if dimension_numbers[1][1] and not hasattr(rhs, "how"):
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **options)
        return super().dot_general(lhs, rhs, dimension_numbers, *args, **options)

    def einsum(self, einsum_str: str, *operands: Any, **options: Any) -> jax.Array:
        """Takes the place of ``jnp.einsum`` in the model."""
        if len(operands) == 2 and not hasattr(operands[1], "how"):
            try:
                _, batch = einsum_axes(einsum_str, len(operands[1].shape))
            except ValueError:
                batch = (0,)  # No product of x and a kernel.
            if batch:
                return jnp.einsum(einsum_str, *operands, **options)
        return super().einsum(einsum_str, *operands, **options)


def _is_ours(weight_qtype: Any, act_qtype: Any) -> bool:
    return weight_qtype in ("int4", jnp.int4, jnp.dtype("int4")) and act_qtype is None


def _check(tile_size: Any, calibration: str) -> None:
    if tile_size is not None and tile_size not in GROUP_SIZES:
        raise ValueError(
            f"Int4Provider: tile_size is {tile_size!r}; int4 weights have groups of {', '.join(map(str, GROUP_SIZES))}."
        )
    if calibration not in _SYMMETRIC:
        raise ValueError(
            f'Int4Provider: weight_calibration_method is {calibration!r}; it must be "absmax" or "minmax".'
        )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """How a kernel is quantised, out of Qwix's description of it."""

    contracted: tuple[int, ...]
    group_size: int
    symmetric: bool


def _kernel_of(how: Any, ndim: int) -> _Kernel:
    contracted = tuple(axis for axis in range(ndim) if axis not in how.channelwise_axes)
    (group_size,) = set(how.tiled_axes.values()) or {DEFAULT_GROUP_SIZE}
    return _Kernel(contracted, int(group_size), _SYMMETRIC[how.calibration_method])


def _quantize(array: jax.Array, how: Any) -> Any:
    """``qwix.quantize``, of int4 kernels into an Int4Tensor; activations are quantised to other types only."""
    if not _is_ours(how.qtype, None):
        return qarray.quantize(array, how)
    kernel = _kernel_of(how, array.ndim)
    return quantize_tensor(array, kernel.contracted, group_size=kernel.group_size, symmetric=kernel.symmetric)


def _product_dtypes(x: jax.Array, kernel: Int4Tensor) -> tuple[jax.Array, DTypeLike | None]:
    """x in the kernel's dtype, and what the product gives where that is another than x's."""
    if x.dtype == kernel.dtype:
        return x, None
    return x.astype(kernel.dtype), x.dtype if x.dtype in (*ACTIVATION_DTYPES, jnp.float32) else jnp.float32


def _dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, **options: Any) -> jax.Array:
    if not isinstance(rhs, Int4Tensor):
        return dot_general.dot_general(lhs, rhs, dimension_numbers, **options)
    x, dtype = _product_dtypes(lhs, rhs)
    y = int4_dot_general(x, rhs, dimension_numbers, preferred_element_type=dtype and jnp.float32, **options)
    return y if dtype is None else y.astype(dtype)


def _einsum(einsum_str: str, lhs: Any, rhs: Any) -> jax.Array:
    if not isinstance(rhs, Int4Tensor):
        return einsum.einsum(einsum_str, lhs, rhs)
    x, dtype = _product_dtypes(lhs, rhs)
    y = int4_einsum(einsum_str, x, rhs, preferred_element_type=dtype and jnp.float32)
    return y if dtype is None else y.astype(dtype)
