"""The rules of the op's arguments, each broken one a sentence: the op, what was given, the rule, the remedy."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_int4mm.layout import GROUP_SIZES, check_packed, unpacked_shape
from jax_int4mm.ops._sharding import axes_of

ArrayOrShape: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct

ACTIVATION_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def check_group_size(op: str, group_size: int) -> int:
    """``group_size`` as an int, or a TypeError or ValueError."""
    try:
        value = operator.index(group_size)
    except TypeError:
        raise TypeError(
            f"{op}: group_size is a {type(group_size).__name__}; it must be a Python int, known when traced."
        ) from None
    if value not in GROUP_SIZES:
        raise ValueError(
            f"{op}: group_size is {value}; it must be 32, 64, 128 or 256. "
            "Repeat the scales of larger groups, or requantise."
        )
    return value


def check_weight(op: str, packed: ArrayOrShape, scales_and_zeros: ArrayOrShape, group_size: int) -> None:
    """Raise unless packed, scales_and_zeros and group_size describe one weight."""
    check_packed(op, packed.shape, packed.dtype)
    n, k, _ = unpacked_shape(packed.shape)
    if scales_and_zeros.dtype not in ACTIVATION_DTYPES:
        raise TypeError(
            f"{op}: scales_and_zeros has dtype {scales_and_zeros.dtype}; it must be bfloat16 or float16. "
            "Cast it: scales_and_zeros.astype(x.dtype)."
        )
    if k % group_size:
        raise ValueError(
            f"{op}: group_size {group_size} does not divide k = {k} of packed {list(packed.shape)}. "
            "quantize(w) pads k to whole groups; a raw weight must be padded before it is packed."
        )
    expected = (k // group_size, n, 2)
    if tuple(scales_and_zeros.shape) != expected:
        raise ValueError(
            f"{op}: scales_and_zeros has shape {list(scales_and_zeros.shape)}; packed {list(packed.shape)} is "
            f"n = {n}, k = {k}, so with group_size {group_size} it must be [k/group_size, n, 2] = {list(expected)}."
        )


def check_activations(op: str, x: ArrayOrShape, packed: ArrayOrShape, scales_and_zeros: ArrayOrShape) -> None:
    """Raise unless x [..., k] fits a weight that :func:`check_weight` accepted."""
    _, k, _ = unpacked_shape(packed.shape)
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(
            f"{op}: x has dtype {x.dtype}; it must be bfloat16 or float16. Cast it: x.astype({scales_and_zeros.dtype})."
        )
    if x.dtype != scales_and_zeros.dtype:
        raise TypeError(
            f"{op}: x has dtype {x.dtype} and scales_and_zeros {scales_and_zeros.dtype}; they must be the same. "
            f"Cast one: x.astype({scales_and_zeros.dtype}) or scales_and_zeros.astype({x.dtype})."
        )
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)} and the packed weight k = {k}; x must be [..., k]. "
            "An Int4Weight pads x to the packed k by itself: x @ w4."
        )


def check_result_dtype(name: str, dtype: DTypeLike, x_dtype: DTypeLike) -> np.dtype:
    """``dtype`` as a dtype, or a TypeError unless it is x's or float32."""
    dtype = jnp.dtype(dtype)
    if dtype not in (x_dtype, jnp.dtype(jnp.float32)):
        raise TypeError(f"int4pack_mm: {name} is {dtype}; it must be float32 or the dtype of x, {x_dtype}.")
    return dtype


def check_out_sharding(
    out_sharding: NamedSharding | PartitionSpec | None, mesh: Any, ndim: int
) -> PartitionSpec | None:
    """Its PartitionSpec, or a ValueError unless a result of this rank on this mesh of named axes can be divided so."""
    if out_sharding is None:
        return None
    if mesh is None:
        raise ValueError(
            f"int4pack_mm: out_sharding is {out_sharding}, but no argument's type names mesh axes. Where XLA divides "
            "arrays, use jax.lax.with_sharding_constraint or out_shardings of jax.jit; otherwise put the arguments on "
            "a mesh whose axes are AxisType.Explicit."
        )
    spec = out_sharding.spec if isinstance(out_sharding, NamedSharding) else out_sharding
    unknown = {axis for entry in spec for axis in axes_of(entry)} - set(mesh.explicit_axes)
    if len(spec) > ndim or unknown:
        raise ValueError(
            f"int4pack_mm: out_sharding is {spec}; the result has {ndim} dimensions, and the mesh of the arguments has "
            f"the explicit axes {list(mesh.explicit_axes)}."
        )
    return spec
