"""``Int4Weight``: a packed int4 matrix as a pytree, with the logical shape of the matrix that it stands for."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_int4mm.layout import TILE_N, as_array, tile_k, unpacked_shape
from jax_int4mm.ops.dequantize import dequantize_rows
from jax_int4mm.ops.int4pack_mm import int4pack_mm, resolve_implementation
from jax_int4mm.ops.validation import ACTIVATION_DTYPES, check_group_size, check_weight


def padded_size(n: int, k: int, group_size: int, inner_k_tiles: int) -> tuple[int, int]:
    """(n, k) rounded up to what the packed format holds: n to 8, k to whole tiles and whole groups."""
    multiple_k = math.lcm(tile_k(inner_k_tiles), group_size)
    return -(-n // TILE_N) * TILE_N, -(-k // multiple_k) * multiple_k


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales_and_zeros", "perm"],
    meta_fields=["group_size", "k", "n"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Int4Weight:
    """A [k, n] matrix of int4 weights: write ``x @ w4`` where you would write ``x @ w``.

    Invariants, checked where the leaves are concrete arrays:
      packed: int32 ``[*stacked, padded_n/8, padded_k/(16*inner_k_tiles), 32, inner_k_tiles/2]``.
      scales_and_zeros: ``[*stacked, padded_k/group_size, padded_n, 2]`` bfloat16 or float16, (scale, zero).
      perm: None, or int32 ``[*stacked, k]``: the order of k that the weight is stored in (``x[..., perm]`` meets it),
        as activation-ordered GPTQ needs.
      padded_n is n rounded up to 8 and padded_k is k rounded up to whole tiles and groups; the padding multiplies to 0.

    ``group_size``, ``k`` and ``n`` are static. A stacked weight (leading dimensions, one matrix a layer) is scanned or
    vmapped over; the product takes one matrix. Make one with :func:`jax_int4mm.quantize`.
    """

    packed: jax.Array
    scales_and_zeros: jax.Array
    perm: jax.Array | None = None
    group_size: int = dataclasses.field(kw_only=True)
    k: int = dataclasses.field(kw_only=True)
    n: int = dataclasses.field(kw_only=True)

    # numpy leaves ``x @ w4`` to __rmatmul__.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        # Transformations rebuild the pytree around tracers, shapes, shardings, placeholders and the float0 tangents of
        # integers: none is checked.
        leaves = [self.packed, self.scales_and_zeros] + ([] if self.perm is None else [self.perm])
        if any(isinstance(x, jax.core.Tracer) or not isinstance(x, (jax.Array, np.ndarray)) for x in leaves):
            return
        if self.packed.dtype == jax.dtypes.float0:
            return
        check_group_size("Int4Weight", self.group_size)
        stacked = self.packed.shape[:-4]
        if self.packed.ndim < 4 or self.scales_and_zeros.ndim < 3 or self.scales_and_zeros.shape[:-3] != stacked:
            raise ValueError(
                f"Int4Weight: packed has shape {list(self.packed.shape)} and scales_and_zeros "
                f"{list(self.scales_and_zeros.shape)}; they must be [*stacked, n/8, k/(16*inner_k_tiles), 32, "
                "inner_k_tiles/2] and [*stacked, k/group_size, n, 2] with the same stacked dimensions."
            )
        one_packed = jax.ShapeDtypeStruct(self.packed.shape[-4:], self.packed.dtype)
        one_scales = jax.ShapeDtypeStruct(self.scales_and_zeros.shape[-3:], self.scales_and_zeros.dtype)
        check_weight("Int4Weight", one_packed, one_scales, self.group_size)
        padded_n, padded_k, inner_k_tiles = unpacked_shape(one_packed.shape)
        if (padded_n, padded_k) != padded_size(self.n, self.k, self.group_size, inner_k_tiles):
            raise ValueError(
                f"Int4Weight: k = {self.k} and n = {self.n} do not fit packed {list(self.packed.shape)}, which holds "
                f"k = {padded_k} and n = {padded_n}; padding goes no further than the next multiple of 8 in n and of "
                f"{math.lcm(tile_k(inner_k_tiles), self.group_size)} in k."
            )
        if self.perm is not None and (self.perm.shape != (*stacked, self.k) or self.perm.dtype != jnp.int32):
            raise ValueError(
                f"Int4Weight: perm is {self.perm.dtype}{list(self.perm.shape)}; "
                f"it must be int32{[*stacked, self.k]}, a permutation of k."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape ``(*stacked, k, n)``."""
        return (*self.packed.shape[:-4], self.k, self.n)

    @property
    def ndim(self) -> int:
        """Number of logical dimensions."""
        return self.packed.ndim - 2

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the scales, the zeros and the activations that this weight multiplies."""
        return self.scales_and_zeros.dtype

    @property
    def inner_k_tiles(self) -> int:
        """The packed format's inner_k_tiles: 2, 4 or 8."""
        return 2 * self.packed.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def astype(self, dtype: DTypeLike) -> Int4Weight:
        """This weight with scales and zeros in ``dtype`` (bfloat16 or float16), rounded once."""
        dtype = jnp.dtype(dtype)
        if dtype not in ACTIVATION_DTYPES:
            raise TypeError(
                f"Int4Weight.astype: dtype is {dtype}; scales, zeros and activations are bfloat16 or float16. "
                "For a dense weight in another dtype use w4.dequantize().astype(dtype)."
            )
        return dataclasses.replace(self, scales_and_zeros=jnp.asarray(self.scales_and_zeros).astype(dtype))

    def dequantize(self) -> jax.Array:
        """The dense ``(*stacked, k, n)`` matrix that this weight stands for, in its dtype, each value rounded once."""
        one = functools.partial(_dequantize_one, group_size=self.group_size, k=self.k, n=self.n)
        for _ in self.shape[:-2]:
            one = jax.vmap(one)
        return one(self.packed, self.scales_and_zeros, self.perm)

    def __rmatmul__(self, x: ArrayLike) -> jax.Array:
        """``x @ self`` for x [..., k] in this weight's dtype: [..., n]."""
        return matmul(x, self)

    def __repr__(self) -> str:
        dtype = getattr(self.scales_and_zeros, "dtype", "?")
        stacked = "".join(f"{size}, " for size in getattr(self.packed, "shape", ())[:-4])
        perm = "" if self.perm is None else ", perm"
        return f"Int4Weight([{stacked}{self.k}, {self.n}], {dtype}, group_size={self.group_size}{perm})"


def matmul(x: ArrayLike, w4: Int4Weight, *, implementation: str | None = None) -> jax.Array:
    """``x @ w4`` with a choice of implementation.

    Args:
      x: [..., k] in ``w4.dtype``.
      w4: one (k, n) weight, not stacked.
      implementation: as in :func:`jax_int4mm.int4pack_mm`.

    Returns:
      [..., n] in ``w4.dtype``.

    Raises:
      TypeError: x is no array or of another dtype.
      ValueError: k differs, w4 is stacked, or the named implementation cannot serve the call.
    """
    x = as_array("x @ Int4Weight", "x", x)
    if w4.ndim != 2:
        raise ValueError(
            f"x @ Int4Weight: the weight is stacked, {list(w4.shape)}; the product takes one [k, n]. "
            "Scan or vmap over the leading dimensions, or take one with jax.tree.map(lambda a: a[i], w4)."
        )
    if x.dtype != w4.dtype:
        raise TypeError(
            f"x @ Int4Weight: x has dtype {x.dtype} and the weight {w4.dtype}; they must be the same. "
            f"Cast one: x.astype({w4.dtype}), or once and for all w4.astype({x.dtype}) if that is bfloat16 or float16."
        )
    if x.ndim == 0 or x.shape[-1] != w4.k:
        raise ValueError(
            f"x @ Int4Weight: x has shape {list(x.shape)}; against {list(w4.shape)} it must be [..., {w4.k}]."
        )
    return _matmul(x, w4, implementation=resolve_implementation(implementation))


@functools.partial(jax.jit, static_argnames="implementation")
def _matmul(x: jax.Array, w4: Int4Weight, *, implementation: str | None) -> jax.Array:
    _, padded_k, _ = unpacked_shape(w4.packed.shape)
    if w4.perm is not None:
        x = jnp.take(x, w4.perm, axis=-1)
    if padded_k != w4.k:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded_k - w4.k)])
    y = int4pack_mm(x, w4.packed, w4.scales_and_zeros, w4.group_size, implementation)
    return y[..., : w4.n]


@functools.partial(jax.jit, static_argnames=("group_size", "k", "n"))
def _dequantize_one(
    packed: jax.Array, scales_and_zeros: jax.Array, perm: jax.Array | None, *, group_size: int, k: int, n: int
) -> jax.Array:
    w = dequantize_rows(packed, scales_and_zeros, group_size)[:n, :k].T
    return w if perm is None else jnp.zeros_like(w).at[perm].set(w)
