"""What the op does about meshes."""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding, PartitionSpec


def matrix_like(aval: jax.core.ShapedArray, shape: tuple[int, int], rows: int) -> jax.core.ShapedArray:
    """A matrix of this shape and of the dtype of ``aval``, its rows sharded as dimension ``rows`` of that.

    Updated, not made anew: inside ``shard_map`` it varies over the mesh axes over which ``aval`` does.
    """
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(aval.sharding.spec[rows], None))
    return aval.update(shape=shape, weak_type=False, sharding=sharding)


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, inside ``shard_map`` each as one that varies over the mesh axes over which any of them does.

    The transpose of such a cast is a sum over the axis: it makes gradients right where all devices have the same x and
    each has its own columns of the weight.
    """
    axes = [jax.typeof(a).mat.varying for a in arrays]
    all_axes = frozenset().union(*axes)
    missing = [tuple(sorted(all_axes - own)) for own in axes]
    return [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]
