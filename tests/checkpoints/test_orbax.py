"""Orbax saves and restores trees with Int4Weights as it does any pytree."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jax_int4mm as i4


@pytest.fixture
def params(rng: np.random.Generator) -> dict[str, object]:
    w = rng.normal(0, 1, (2, 256, 64)).astype(np.float32)
    one = i4.quantize(w[0], 64, dtype=jnp.bfloat16)
    perm = jnp.asarray(rng.permutation(256), jnp.int32)
    return {
        "stacked": i4.quantize(w, 32, dtype=jnp.float16),
        "ragged": i4.quantize(w[0, :200, :13], 128, "hqq"),
        "permuted": i4.Int4Weight(one.packed, one.scales_and_zeros, perm, group_size=64, k=256, n=64),
        "dense": jnp.asarray(w[1]),
    }


def assert_same(found: object, expected: object) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))


def test_save_and_restore(tmp_path: Path, params: dict[str, object]) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.eval_shape(lambda: params))
    assert_same(restored, params)


def test_restore_onto_a_mesh(tmp_path: Path, params: dict[str, object]) -> None:
    w4 = params["permuted"]
    mesh = jax.make_mesh((2,), ("n",), devices=jax.devices("cpu")[:2])
    shardings = w4.shardings(NamedSharding(mesh, PartitionSpec(None, "n")))
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), w4, shardings
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", w4)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", target)
    assert_same(restored, w4)
    assert restored.packed.sharding == shardings.packed
