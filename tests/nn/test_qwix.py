"""Qwix's provider interface with int4 kernels: NNX and Linen models whose code does not change."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_int4mm as i4

qwix = pytest.importorskip("qwix")
from flax import linen as nn  # noqa: E402
from flax import nnx  # noqa: E402

from jax_int4mm.nn.qwix import Int4Provider  # noqa: E402

# qwix 0.1.8 takes names of Flax that newer releases call deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Block(nnx.Module):
    def __init__(self, rngs: Any):
        self.up = nnx.Linear(128, 192, rngs=rngs, bias_init=nnx.initializers.normal(1.0))
        self.heads = nnx.Einsum("BD,NDH->BNH", (4, 192, 32), rngs=rngs)
        self.out = nnx.LinearGeneral((4, 32), 40, axis=(-2, -1), rngs=rngs)
        self.lm_head = nnx.Linear(40, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lm_head(self.out(self.heads(jax.nn.silu(self.up(x)))))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(40, name="down")(jax.nn.silu(nn.Dense(192, name="up")(x)))


def rules(**options: Any) -> list[Any]:
    return [
        qwix.QuantizationRule(module_path="lm_head"),
        qwix.QuantizationRule(module_path=".*", weight_qtype="int4", **options),
    ]


def tensors(tree: Any) -> list[i4.Int4Tensor]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, i4.Int4Tensor))
    return [leaf for leaf in leaves if isinstance(leaf, i4.Int4Tensor)]


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("calibration", "symmetric"), [("absmax", True), ("minmax", False)])
def test_an_nnx_model(calibration: str, symmetric: bool, rng: np.random.Generator) -> None:
    dense = Block(nnx.Rngs(0))
    x = normal(rng, 3, 128)
    provider = Int4Provider(rules(tile_size=32, weight_calibration_method=calibration))
    model = qwix.quantize_model(dense, provider, x)
    twin = nnx.clone(dense)
    for name in ("up", "heads", "out"):
        kernel = getattr(model, name).kernel.array
        assert isinstance(kernel, i4.Int4Tensor)
        unboxed = jax.tree.map(
            lambda leaf: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf,
            kernel,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        assert unboxed.weight.group_size == 32
        zeros = np.asarray(unboxed.weight.scales_and_zeros[..., 1], np.float32)
        assert (np.abs(zeros).max() == 0) == symmetric
        getattr(twin, name).kernel[...] = unboxed.dequantize().astype(jnp.float32)
    assert isinstance(model.lm_head.kernel, nnx.Param)
    found, expected = model(x), twin(x)
    assert found.dtype == expected.dtype == jnp.float32
    assert float(jnp.abs(found - expected).max()) < 0.02 * float(jnp.abs(expected).max())
    jitted = nnx.jit(lambda model, x: model(x))(model, x)
    assert float(jnp.abs(jitted - found).max()) < 0.01 * float(jnp.abs(found).max())
    assert float(jnp.abs(found - dense(x)).max()) > 0


def test_a_linen_model(rng: np.random.Generator) -> None:
    x = normal(rng, 3, 128)
    dense = MLP()
    model = qwix.quantize_model(dense, Int4Provider(rules()))
    variables = dense.init(jax.random.key(0), x)
    quantized = model.init(jax.random.key(0), x)
    kernels = tensors(quantized)
    assert sorted(kernel.shape for kernel in kernels) == [(128, 192), (192, 40)]
    assert {kernel.weight.group_size for kernel in kernels} == {128}
    twin = {
        name: layer | {"kernel": quantized["params"][name]["kernel"].array.dequantize().astype(jnp.float32)}
        for name, layer in variables["params"].items()
    }
    found, expected = model.apply(quantized, x), dense.apply({"params": twin}, x)
    assert float(jnp.abs(found - expected).max()) < 0.02 * float(jnp.abs(expected).max())


def test_other_rules_are_qwixs(rng: np.random.Generator) -> None:
    x = normal(rng, 3, 128)
    int8 = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8")]
    found = qwix.quantize_model(Block(nnx.Rngs(0)), Int4Provider(int8), x)(x)
    expected = qwix.quantize_model(Block(nnx.Rngs(0)), qwix.PtqProvider(int8), x)(x)
    np.testing.assert_array_equal(found, expected)


def test_kernels_that_share_axes_with_x_stay_dense(rng: np.random.Generator) -> None:
    class Experts(nnx.Module):
        def __init__(self, rngs: Any):
            self.experts = nnx.Einsum("TED,EDF->TEF", (3, 128, 32), rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.experts(x)

    x, dense = normal(rng, 5, 3, 128), Experts(nnx.Rngs(0))
    model = qwix.quantize_model(dense, Int4Provider(rules()), x)
    np.testing.assert_array_equal(model(x), dense(x))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"tile_size": 48}, "tile_size is 48"), ({"weight_calibration_method": "rms,3"}, "is 'rms,3'")],
)
def test_rules_that_int4_does_not_have(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Int4Provider(rules(**options))
