"""int4 layers of Flax Linen beside the dense ones that they stand for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_int4mm as i4
from jax_int4mm.quantizers import Recipe, Rules

nn = pytest.importorskip("flax.linen")
from jax_int4mm.nn.linen import Int4Dense, quantize_variables  # noqa: E402

G32 = Rules(Recipe(group_size=32))


class MLP(nn.Module):
    dense: Any = nn.Dense
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.dense(96, name="up", dtype=self.dtype, bias_init=nn.initializers.normal(1.0))(x)
        h = nn.LayerNorm()(jax.nn.silu(h))
        return self.dense(40, name="down", use_bias=False, dtype=self.dtype)(h)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def dequantised(variables: Any) -> dict[str, Any]:
    params = {name: dict(layer) for name, layer in variables["params"].items()}
    for name, layer in variables["int4"].items():
        params.setdefault(name, {})["kernel"] = layer["kernel"].dequantize().astype(jnp.float32)
    return {"params": params}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_converted_variables_give_the_dense_model_s_results(dtype: str | None, rng: np.random.Generator) -> None:
    x = normal(rng, 2, 3, 70)
    dense = MLP(dtype=dtype)
    variables = dense.init(jax.random.key(0), x)
    quantized, report = quantize_variables(variables, G32)
    assert sorted(layer.name for layer in report.layers) == ["down/kernel", "up/kernel"]
    assert report.bytes_before == sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert report.bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    assert "kernel" not in quantized["params"]["up"]
    expected = dense.apply(dequantised(quantized), x)
    found = jax.jit(MLP(Int4Dense, dtype).apply)(quantized, x)
    assert found.dtype == expected.dtype
    assert float(jnp.abs(found - expected).max()) < 0.02 * float(jnp.abs(expected).max())


def test_init_makes_the_same_variables(rng: np.random.Generator) -> None:
    x = normal(rng, 2, 70)
    made = MLP(lambda features, **options: Int4Dense(features, group_size=32, **options)).init(jax.random.key(0), x)
    converted, _ = quantize_variables(MLP().init(jax.random.key(0), x), G32)
    assert jax.tree.structure(made) == jax.tree.structure(converted)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(converted), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_gradients_are_of_params(rng: np.random.Generator) -> None:
    x = normal(rng, 4, 70)
    quantized, _ = quantize_variables(MLP().init(jax.random.key(0), x), G32)
    model = MLP(Int4Dense)
    grads = jax.grad(lambda params: jnp.sum(model.apply(quantized | {"params": params}, x) ** 2))(quantized["params"])
    assert jax.tree.structure(grads) == jax.tree.structure(quantized["params"])
    assert float(jnp.abs(grads["up"]["bias"]).max()) > 0


def test_layers_that_are_stacked_are_scanned(rng: np.random.Generator) -> None:
    class Layer(nn.Module):
        dense: Any = nn.Dense

        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(self.dense(64, name="dense")(x)), None

    def stack(dense: Any) -> Any:
        axes = {"params": 0, "int4": 0}
        return nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)(dense)

    x = normal(rng, 2, 64)
    variables = stack(nn.Dense).init(jax.random.key(0), x, None)
    quantized, report = quantize_variables(variables, G32)
    assert report.layers[0].shape == (3, 64, 64)
    found, _ = stack(Int4Dense).apply(quantized, x, None)
    expected, _ = stack(nn.Dense).apply(dequantised(quantized), x, None)
    assert float(jnp.abs(found - expected).max()) < 0.02


def test_mesh_axes_of_the_kernel_become_those_of_the_leaves(rng: np.random.Generator) -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    x = normal(rng, 2, 64)
    variables = nn.Dense(32, kernel_init=init).init(jax.random.key(0), x)
    quantized, _ = quantize_variables(variables, G32)
    packed = quantized["int4"]["kernel"].packed
    assert packed.names == ("out", "in", None, None)
    assert nn.get_partition_spec(quantized)["int4"]["kernel"].scales_and_zeros == jax.sharding.PartitionSpec(
        "in", "out", None
    )
    found = Int4Dense(32).apply(quantized, x)
    np.testing.assert_array_equal(found, Int4Dense(32).apply(nn.meta.unbox(quantized), x))


def test_what_is_refused(rng: np.random.Generator) -> None:
    x = normal(rng, 2, 64)
    quantized, _ = quantize_variables(nn.Dense(32).init(jax.random.key(0), x), G32)
    with pytest.raises(ValueError, match=r"the kernel must be \[64, 40\] and is \[64, 32\]"):
        Int4Dense(40).apply(quantized, x)
    bad = {"params": {"up": {"kernel": jnp.full((64, 32), jnp.nan)}}}
    with pytest.raises(ValueError, match=r"^up/kernel: quantize: the largest \|w\| is nan"):
        quantize_variables(bad, G32)
    kept = {"params": {"embed": {"embedding": jnp.ones((64, 32))}, "norm": {"scale": jnp.ones(3)}}}
    same, report = quantize_variables(kept)
    assert same == kept
    assert report.layers == ()
    assert isinstance(quantized["int4"]["kernel"], i4.Int4Weight)
