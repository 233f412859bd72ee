"""``Int4Weight``: a packed int4 matrix as a pytree, with the logical shape of the matrix that it stands for."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_int4mm.layout import TILE_N, as_array, tile_k, unpacked_shape
from jax_int4mm.ops._sharding import axes_of, weight_units
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

    On a mesh, ``jax.device_put(w4, w4.shardings(NamedSharding(mesh, P("in", "out"))))`` divides it. Inside
    ``shard_map`` it stands for what the device holds of it; :meth:`partition_specs` gives the specs.
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
        """The logical shape ``(*stacked, k, n)``; inside ``shard_map`` that of the device's part."""
        return (*self.packed.shape[:-4], *self._size())

    def _size(self) -> tuple[int, int]:
        """(k, n) of what the leaves hold: of a part of the weight where ``shard_map`` has divided them."""
        n, k, inner_k_tiles = unpacked_shape(self.packed.shape[-4:])
        padded_n, padded_k = padded_size(self.n, self.k, self.group_size, inner_k_tiles)
        for name, part, padded, size in (("k", k, padded_k, self.k), ("n", n, padded_n, self.n)):
            if part != padded and padded != size:
                raise ValueError(
                    f"Int4Weight: a part of {name} = {part} of a weight whose {name} = {size} is padded to {padded} "
                    f"has no size of its own. Divide another dimension, or pad the matrix to {name} = {padded} before "
                    "it is quantised."
                )
        if self.perm is not None and k != padded_k:
            raise ValueError(
                f"Int4Weight: a part of k = {k} of a weight that is stored in another order of its k = {self.k} cannot "
                "put x in that order. Divide n, or leave the division of k to JAX, outside shard_map."
            )
        return self.k if k == padded_k else k, self.n if n == padded_n else n

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

    def partition_specs(self, spec: PartitionSpec) -> Int4Weight:
        """The PartitionSpecs of the leaves, as an Int4Weight of them, for ``in_specs`` of ``shard_map`` and the like.

        Args:
          spec: of the matrix ``(*stacked, k, n)``.

        Raises:
          ValueError: spec has more entries than the matrix has dimensions.
        """
        if len(spec) > self.ndim:
            raise ValueError(f"Int4Weight.partition_specs: {spec} is longer than the shape {list(self.shape)}.")
        entries = [*spec, *[None] * (self.ndim - len(spec))]
        stacked, (k, n) = entries[:-2], entries[-2:]
        specs: dict[str, Any] = {
            "packed": PartitionSpec(*stacked, n, k, None, None),
            "scales_and_zeros": PartitionSpec(*stacked, k, n, None),
            # All of it: an x that is divided along k is put in order before.
            "perm": None if self.perm is None else PartitionSpec(*stacked, None),
        }
        return dataclasses.replace(self, **specs)

    def shardings(self, sharding: NamedSharding) -> Int4Weight:
        """The shardings of the leaves, as an Int4Weight of them, for ``jax.device_put``, ``jax.jit`` and the like.

        Args:
          sharding: of the matrix ``(*stacked, k, n)``.

        Raises:
          ValueError: the mesh axes of k or n do not divide its whole groups and tiles evenly.
        """
        specs: Any = self.partition_specs(sharding.spec)
        *_, n_axes, k_axes, _, _ = specs.packed
        padded_n, padded_k, _ = unpacked_shape(self.packed.shape[-4:])
        units = weight_units(self.packed.shape, self.group_size)
        for name, entry, size, padded in (("k", k_axes, self.k, padded_k), ("n", n_axes, self.n, padded_n)):
            axes = axes_of(entry)
            devices = math.prod(sharding.mesh.shape[axis] for axis in axes)
            if units[name] % devices:
                part = padded // units[name]
                raise ValueError(
                    f"Int4Weight.shardings: {name} = {size}{f', padded to {padded},' if padded != size else ''} has "
                    f"{units[name]} parts of {part} (whole groups and tiles), which {devices} devices of mesh axes "
                    f"{list(axes)} cannot share evenly. Divide another dimension or by fewer devices, or pad the "
                    f"matrix to a multiple of {devices * part} in {name} before it is quantised."
                )
        return jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), specs, is_leaf=_is_spec)

    def dequantize(self) -> jax.Array:
        """The dense ``(*stacked, k, n)`` matrix that this weight stands for, in its dtype, each value rounded once."""
        k, n = self._size()
        one = functools.partial(_dequantize_one, group_size=self.group_size, k=k, n=n)
        for _ in self.shape[:-2]:
            one = jax.vmap(one)
        return one(self.packed, self.scales_and_zeros, self.perm)

    def columns(self, indices: ArrayLike) -> jax.Array:
        """Columns of one (k, n) weight, dequantised: what an embedding looks up, its table [n, k] being the transpose.

        Only what is asked for is read. Indices count from the end where they are negative, and those out of range are
        taken for the nearest in range, as in ``table[indices]``.

        Args:
          indices: integers [...], columns of n.

        Returns:
          [..., k] in this weight's dtype, the values of :meth:`dequantize`.

        Raises:
          TypeError: indices are not integers.
          ValueError: the weight is stacked.
        """
        indices = as_array("Int4Weight.columns", "indices", indices)
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"Int4Weight.columns: indices have dtype {indices.dtype}; they must be integers.")
        if self.ndim != 2:
            raise ValueError(
                f"Int4Weight.columns: the weight is stacked, {list(self.shape)}; columns are of one [k, n]. Take one "
                "with jax.tree.map(lambda a: a[i], w4), or vmap."
            )
        k, n = self._size()
        if indices.size == 0:
            return jnp.zeros((*indices.shape, k), self.dtype)
        return _columns(self.packed, self.scales_and_zeros, self.perm, indices, group_size=self.group_size, k=k, n=n)

    def __rmatmul__(self, x: ArrayLike) -> jax.Array:
        """``x @ self`` for x [..., k] in this weight's dtype: [..., n]."""
        return matmul(x, self)

    def __repr__(self) -> str:
        dtype = getattr(self.scales_and_zeros, "dtype", "?")
        stacked = "".join(f"{size}, " for size in getattr(self.packed, "shape", ())[:-4])
        perm = "" if self.perm is None else ", perm"
        return f"Int4Weight([{stacked}{self.k}, {self.n}], {dtype}, group_size={self.group_size}{perm})"


def _from_children(aux_data: Any, children: Any) -> Int4Weight:
    group_size, k, n = aux_data
    return Int4Weight(*children, group_size=group_size, k=k, n=n)


# So that jax.export can serialise programs that take or return one; the order is that of meta_fields.
jax.export.register_pytree_node_serialization(
    Int4Weight,
    serialized_name="jax_int4mm.Int4Weight",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda static: tuple(json.loads(static)),
    from_children=_from_children,
)


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, PartitionSpec)


def matmul(
    x: ArrayLike,
    w4: Int4Weight,
    *,
    implementation: str | None = None,
    preferred_element_type: DTypeLike | None = None,
    accum_dtype: DTypeLike = jnp.float32,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> jax.Array:
    """``x @ w4`` with a choice of implementation, of the result's dtype, and of how it is divided over a mesh.

    Args:
      x: [..., k] in ``w4.dtype``.
      w4: one (k, n) weight, not stacked.
      implementation: as in :func:`jax_int4mm.int4pack_mm`, and so are the others.
      preferred_element_type: of the result.
      accum_dtype: of the sums over parts of k.
      out_sharding: of the result.

    Returns:
      [..., n] in ``w4.dtype``, or in ``preferred_element_type``.

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
    k, _ = w4.shape
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x @ Int4Weight: x has shape {list(x.shape)}; against {list(w4.shape)} it must be [..., {k}]."
        )
    return _matmul(
        x,
        w4,
        implementation=resolve_implementation(implementation),
        preferred_element_type=preferred_element_type,
        accum_dtype=accum_dtype,
        out_sharding=out_sharding,
    )


@functools.partial(jax.jit, static_argnames=("implementation", "preferred_element_type", "accum_dtype", "out_sharding"))
def _matmul(x: jax.Array, w4: Int4Weight, *, implementation: str | None, **options: Any) -> jax.Array:
    k, n = w4.shape
    padded_n, padded_k, _ = unpacked_shape(w4.packed.shape)
    if w4.perm is not None:
        x = jnp.take(x, w4.perm, axis=-1)
    if padded_k != k:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded_k - k)])
    y = int4pack_mm(x, w4.packed, w4.scales_and_zeros, w4.group_size, implementation, **options)
    return y if padded_n == n else y[..., :n]


@functools.partial(jax.jit, static_argnames=("group_size", "k", "n"))
def _dequantize_one(
    packed: jax.Array, scales_and_zeros: jax.Array, perm: jax.Array | None, *, group_size: int, k: int, n: int
) -> jax.Array:
    w = dequantize_rows(packed, scales_and_zeros, group_size)[:n, :k].T
    return w if perm is None else jnp.zeros_like(w).at[perm].set(w)


@functools.partial(jax.jit, static_argnames=("group_size", "k", "n"))
def _columns(
    packed: jax.Array,
    scales_and_zeros: jax.Array,
    perm: jax.Array | None,
    indices: jax.Array,
    *,
    group_size: int,
    k: int,
    n: int,
) -> jax.Array:
    flat = indices.reshape(-1).astype(jnp.int32)
    flat = jnp.clip(jnp.where(flat < 0, flat + n, flat), 0, n - 1)
    # Of the eight columns of a tile only the one asked for is read; eight of those make a tile again.
    tiles_n, tiles_k, lanes, words = packed.shape
    lanes_of_column = lanes // TILE_N
    taken = packed.reshape(tiles_n, tiles_k, TILE_N, lanes_of_column, words)[flat // TILE_N, :, flat % TILE_N]
    missing = -len(flat) % TILE_N
    tiles = jnp.pad(taken, [(0, missing), (0, 0), (0, 0), (0, 0)]).reshape(-1, TILE_N, tiles_k, lanes_of_column, words)
    packed = tiles.swapaxes(1, 2).reshape(-1, tiles_k, lanes, words)
    scales_and_zeros = jnp.pad(scales_and_zeros[:, flat], [(0, 0), (0, missing), (0, 0)])
    w = dequantize_rows(packed, scales_and_zeros, group_size)[: len(flat), :k]
    if perm is not None:
        w = jnp.zeros_like(w).at[:, perm].set(w)
    return w.reshape(*indices.shape, k)


def concatenate(weights: Sequence[Int4Weight]) -> Int4Weight:
    """One weight of several that multiply the same x, side by side along n: ``x @ w`` reads x once.

    The query, key and value projections of attention and the gate and up projections of an MLP are such. Packed rows
    move and nothing else does: each column of ``x @ concatenate(weights)`` is what the weight it came from gives,
    as exactly as the kernel that the wider product takes.

    Args:
      weights: (*stacked, k, n_i), alike in all but n. Each n_i but the last is a multiple of 8.

    Returns:
      An Int4Weight (*stacked, k, sum of n_i).

    Raises:
      ValueError: there are none, or they differ in k, stacked dimensions, group_size, inner_k_tiles, dtype or perm, or
        an n_i but the last is padded.
    """
    weights = list(weights)
    if not weights:
        raise ValueError("concatenate: there are no weights; give at least one Int4Weight.")
    first = weights[0]
    for weight in weights[1:]:
        for name, of_first, other in (
            ("shape but for n", first.shape[:-1], weight.shape[:-1]),
            ("group_size", first.group_size, weight.group_size),
            ("inner_k_tiles", first.inner_k_tiles, weight.inner_k_tiles),
            ("dtype", first.dtype, weight.dtype),
        ):
            if of_first != other:
                raise ValueError(
                    f"concatenate: weights differ in {name}, {of_first} and {other}; they must be alike in all but n. "
                    "Leave them apart, or quantise them alike."
                )
        if not _same_order(first.perm, weight.perm):
            raise ValueError(
                "concatenate: weights are stored in different orders of k (perm); they meet no x of one order. "
                "Leave them apart, or quantise them with act_order=False."
            )
    for weight in weights[:-1]:
        if weight.shape[-1] % TILE_N:
            raise ValueError(
                f"concatenate: a weight before the last has n = {weight.shape[-1]}, which is padded; it must be a "
                f"multiple of {TILE_N}. Leave it apart, or put it last."
            )
    return dataclasses.replace(
        first,
        packed=jnp.concatenate([weight.packed for weight in weights], axis=-4),
        scales_and_zeros=jnp.concatenate([weight.scales_and_zeros for weight in weights], axis=-2),
        n=sum(weight.shape[-1] for weight in weights),
    )


def _same_order(first: jax.Array | None, other: jax.Array | None) -> bool:
    if first is None or other is None or isinstance(first, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
        return first is other
    return np.array_equal(first, other)
