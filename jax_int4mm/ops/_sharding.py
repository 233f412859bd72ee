"""Meshes: how a product is divided among devices, in every way in which JAX lets it be divided.

The batch, m and n of y[batch, m, n] = x[batch, m, k] @ w[batch, n, k]^T are divided without communication; over k, each
device sums its part and the parts are added up: an all-reduce or, where the result is to be divided over the same mesh
axes, a reduce-scatter. The weight stays where it is, x follows it. A device holds whole n-tiles, k-tiles and groups: a
request that would cut one through is served as if it had not named that mesh axis.

Inside a ``shard_map`` over all axes of the mesh a product is what each device computes of its own. What XLA divides
(``AxisType.Auto``) reaches the kernel by ``custom_partitioning`` with a Shardy rule, what types divide
(``AxisType.Explicit``) by a ``shard_map`` of ours. Where a ``shard_map`` over some axes leaves others to XLA, neither
works; there the op lowers to an XLA program that dequantises.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax._src import dispatch
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_int4mm.layout import TILE_N, tile_k, unpacked_shape

Axes: TypeAlias = tuple[str, ...]
# Names of an array's dimensions; None is one that is never divided.
Dimensions: TypeAlias = tuple[str | None, ...]
# An array's dimensions and how it is divided, or is to be.
Wish: TypeAlias = tuple[Dimensions, PartitionSpec]

PACKED: Dimensions = ("n", "k", None, None)
SCALES_AND_ZEROS: Dimensions = ("k", "n", None)
W: Dimensions = ("n", "k")


def batched(dimensions: Dimensions) -> Dimensions:
    """Those of a batch of such arrays."""
    return ("batch", *dimensions)


def leading(count: int) -> tuple[str, ...]:
    """Those of x and y before k and n."""
    return tuple(f"m{i}" for i in range(count))


@dataclasses.dataclass(frozen=True)
class Division:
    """The mesh axes over which each dimension of a product is divided."""

    axes: Mapping[str, Axes]
    # The dimension of the result that is divided over k's axes too, when the parts of k are added up.
    scattered: str | None = None

    @property
    def over_k(self) -> Axes:
        """The mesh axes of k."""
        return self.axes.get("k", ())

    def spec(self, dimensions: Dimensions) -> PartitionSpec:
        """The PartitionSpec of an operand."""
        return PartitionSpec(*(self.axes.get(d, ()) or None if d else None for d in dimensions))

    def result_spec(self, dimensions: Dimensions) -> PartitionSpec:
        """The PartitionSpec of the result."""
        if self.scattered is None:
            return self.spec(dimensions)
        scattered = self.axes.get(self.scattered, ()) + self.over_k
        return Division({**self.axes, self.scattered: scattered}).spec(dimensions)

    def add_up(self, y: jax.Array, dimensions: Dimensions) -> jax.Array:
        """Of each device's sums over its part of k, the sum over all of k, or this device's part of that."""
        if not self.over_k:
            return y
        if self.scattered is None:
            return jax.lax.psum(y, self.over_k)
        scattered = dimensions.index(self.scattered)
        return jax.lax.psum_scatter(y, self.over_k, scatter_dimension=scattered, tiled=True)


UNDIVIDED = Division({})


def weight_units(packed_shape: tuple[int, ...], group_size: int) -> dict[str, int]:
    """Of a weight [*batch, n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2], how many parts can be told apart."""
    _, k, inner_k_tiles = unpacked_shape(packed_shape[-4:])
    # Groups and k-tiles are powers of two.
    batch = math.prod(packed_shape[:-4])
    return {"batch": batch, "n": packed_shape[-4], "k": k // max(group_size, tile_k(inner_k_tiles))}


def divide(
    sizes: Mapping[str, int], units: Mapping[str, int], wishes: Sequence[Wish], result: Wish | None = None
) -> Division:
    """The division that follows the wishes: of those that name the same dimension or mesh axis the weight's, the first.

    Args:
      sizes: devices along each mesh axis.
      units: how many parts of each dimension can be told apart.
      wishes: of the operands.
      result: of the result, which counts last; where it names the axes of k as well, the result is scattered.
    """
    axes: dict[str, Axes] = {}
    taken: set[str] = set()
    # The weight decides, x follows. It alone has dimensions that are never divided.
    by_weight = sorted(wishes, key=lambda wish: None not in wish[0])
    for dimensions, spec in [*by_weight, *([result] if result else [])]:
        for dimension, entry in zip(dimensions, spec, strict=False):
            if dimension is None or axes.get(dimension):
                continue
            own: Axes = ()
            for axis in axes_of(entry):
                if axis in taken or units[dimension] % _devices(sizes, (*own, axis)):
                    break
                own += (axis,)
            axes[dimension] = own
            taken.update(own)
    over_k = axes.get("k", ())
    if result is not None and over_k:
        for dimension, entry in zip(*result, strict=False):
            if dimension is None or dimension in ("batch", "k"):
                continue
            together = axes.get(dimension, ()) + over_k
            rows = units[dimension] * (TILE_N if dimension == "n" else 1)
            if axes_of(entry) == together and rows % _devices(sizes, together) == 0:
                return Division(axes, dimension)
    return Division(axes)


def axes_of(entry: str | Sequence[str] | None) -> Axes:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _devices(sizes: Mapping[str, int], axes: Axes) -> int:
    return math.prod(sizes[axis] for axis in axes)


class Context(enum.Enum):
    """Who divides the arrays of a program that is lowered."""

    LOCAL = "nobody: there is one device, or each computes on arrays of its own"
    XLA = "XLA"
    MIXED = "a shard_map over some axes, and XLA over others"


def context(ctx: mlir.LoweringRuleContext) -> Context:
    """That of a lowering."""
    axes: Any = ctx.module_context.axis_context
    if hasattr(axes, "manual_axes"):
        return Context.LOCAL if set(axes.manual_axes) == set(axes.mesh.axis_names) else Context.MIXED
    return Context.LOCAL if getattr(axes, "num_devices", 1) == 1 else Context.XLA


def needs_devices_to_lower(primitive: Primitive) -> None:
    """Let a primitive lower to :func:`divided_by_xla`: a custom_partitioning asks for the devices."""
    # JAX has no public name for this set.
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def divided_by_xla(
    local: Callable[[Division], Callable[..., jax.Array]],
    operands: Mapping[Dimensions, tuple[int, ...]],
    result: Dimensions,
    group_size: int,
) -> Callable[..., jax.Array]:
    """A program that XLA divides as it sees fit, within what the format allows.

    Args:
      local: for a division, what a device computes of its parts of the operands.
      operands: their dimensions and shapes in order.
      result: the dimensions of the result.
      group_size: of the weight.
    """
    packed_shape = next(shape for d, shape in operands.items() if d[-4:] == PACKED)
    units = weight_units(packed_shape, group_size)
    for dimensions, shape in operands.items():
        units |= {d: size for d, size in zip(dimensions, shape, strict=True) if d is not None and d not in units}

    _, _, inner_k_tiles = unpacked_shape(packed_shape[-4:])
    part = max(group_size, tile_k(inner_k_tiles))
    # What is never cut through, beside dimensions without a name: in Shardy's terms, factors that need replication.
    sizes = {"row": TILE_N, "value": part, "tile": part // tile_k(inner_k_tiles), "group": part // group_size}
    whole: list[str] = []

    def factors(array: int, dimensions: Dimensions) -> str:
        within = {"n": "row", "k": "value"}
        if dimensions[-4:] == PACKED:
            within = {"k": "tile"}
        elif dimensions[-3:] == SCALES_AND_ZEROS:
            within = {"n": "row", "k": "group"}
        found = []
        for i, dimension in enumerate(dimensions):
            if dimension is None:
                own = [f"z{array}{i}"]
                whole.append(own[0])
            else:
                inner = within.get(dimension)
                own = [dimension] if inner is None or sizes[inner] == 1 else [dimension, inner]
                whole.extend(factor for factor in own[1:] if factor not in whole)
            found.append(" ".join(own))
        return " ".join(f"({text})" if " " in text else text for text in found)

    mappings = [factors(i, d) for i, d in enumerate((*operands, result))]

    def partition(mesh: Any, arguments: Sequence[Any], wanted: Any) -> Any:
        wishes = [(d, a.sharding.spec) for d, a in zip(operands, arguments, strict=True)]
        division = divide(mesh.shape, units, wishes, (result, wanted.sharding.spec))
        shardings = tuple(NamedSharding(mesh, division.spec(d)) for d in operands)
        return mesh, local(division), NamedSharding(mesh, division.result_spec(result)), shardings

    program = custom_partitioning(local(UNDIVIDED))
    program.def_partition(
        partition,
        sharding_rule=f"{', '.join(mappings[:-1])} -> {mappings[-1]}",
        reduction_factors=() if "k" in result else ("k",),
        need_replication_factors=tuple(whole),
        **{factor: size for factor, size in sizes.items() if factor in whole},
    )
    return program


def explicit_mesh(*arrays: jax.Array) -> Any:
    """The mesh some of whose axes the types of arrays name, or None."""
    meshes = (jax.typeof(a).sharding.mesh for a in arrays)
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def divided_by_types(
    local: Callable[[Division], Callable[..., jax.Array]],
    operands: Mapping[Dimensions, jax.Array],
    result: Dimensions,
    units: Mapping[str, int],
    out_spec: PartitionSpec | None = None,
) -> jax.Array:
    """The result of arrays whose types say how they are divided.

    Args:
      local: for a division, what a device computes of its parts of the operands.
      operands: and their dimensions, in order.
      result: the dimensions of the result.
      units: how many parts of each dimension can be told apart.
      out_spec: how the result is to be divided; None for what costs least.
    """
    mesh = explicit_mesh(*operands.values())
    wishes = [(d, jax.typeof(a).sharding.spec) for d, a in operands.items()]
    division = divide(mesh.shape, units, wishes, None if out_spec is None else (result, out_spec))
    specs = [division.spec(d) for d in operands]
    placed = [
        jax.sharding.reshard(a, NamedSharding(mesh, spec)) for a, spec in zip(operands.values(), specs, strict=True)
    ]
    y = jax.shard_map(
        local(division),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=division.result_spec(result),
        axis_names=set(mesh.explicit_axes),
    )(*placed)
    return y if out_spec is None else jax.sharding.reshard(y, NamedSharding(mesh, out_spec))


def array_like(aval: jax.core.ShapedArray, shape: tuple[int, ...], dtype: Any) -> jax.core.ShapedArray:
    """An array of this shape and dtype that is a function of ``aval``, whose type divides no dimension.

    Updated, not made anew: inside ``shard_map`` it varies over the mesh axes over which ``aval`` does.
    """
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, inside ``shard_map`` each as one that varies over the mesh axes over which any of them does.

    The transpose of such a cast is a sum over the axis: it makes gradients right where all devices have the same x and
    each has its own columns of the weight.
    """
    axes = [jax.typeof(a).mat.varying for a in arrays]
    all_axes = frozenset().union(*axes)
    missing = [tuple(sorted(all_axes - own)) for own in axes]
    return [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]
