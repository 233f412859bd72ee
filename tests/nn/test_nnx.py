"""int4 layers of Flax NNX beside the dense ones that they stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_int4mm as i4
from jax_int4mm.quantizers import Recipe, Rules

nnx = pytest.importorskip("flax.nnx")
from jax_int4mm.nn import nnx as i4nnx  # noqa: E402

G32 = Rules(Recipe(group_size=32))


def dense_twin(layer: Any, dense: Any, attribute: str = "kernel") -> Any:
    """The dense layer with the values that the int4 one stands for."""
    twin = nnx.clone(dense)
    variable = getattr(twin, attribute)
    variable[...] = layer.kernel.dequantize().astype(variable.dtype)
    return twin


def assert_close(found: jax.Array, expected: jax.Array, bound: float = 0.01) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def normal(rng: np.random.Generator, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "float32"])
def test_linear_has_the_dtypes_and_values_of_the_dense_layer(
    use_bias: bool, dtype: str | None, param_dtype: str, x_dtype: str, rng: np.random.Generator
) -> None:
    options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
    bias_init = nnx.initializers.normal(1.0)
    dense = nnx.Linear(70, 41, rngs=nnx.Rngs(int(rng.integers(99))), bias_init=bias_init, **options)
    layer = i4nnx.Int4Linear.from_linear(dense, group_size=32)
    assert layer.bias is dense.bias
    assert layer.weight.dtype == (jnp.float16 if param_dtype == "float16" else jnp.bfloat16)
    x = normal(rng, 2, 3, 70, dtype=x_dtype)
    # Inputs are rounded to the weight's dtype, and products in it are not rounded on the way to f32.
    expected = dense_twin(layer, dense)(x.astype(layer.weight.dtype).astype(x_dtype))
    assert_close(layer(x), expected)
    assert_close(nnx.jit(lambda layer, x: layer(x))(layer, x), expected)


def test_linear_of_a_weight_and_of_sizes(rng: np.random.Generator) -> None:
    weight, bias = i4.quantize(normal(rng, 64, 32), 32), normal(rng, 32)
    layer = i4nnx.Int4Linear.from_weight(weight, bias)
    x = normal(rng, 5, 64)
    np.testing.assert_array_equal(layer(x), x @ weight + bias)
    np.testing.assert_array_equal(i4nnx.Int4Linear.from_weight(weight)(x), x @ weight)

    made = i4nnx.Int4Linear(64, 32, group_size=64, method="mse", symmetric=True, rngs=nnx.Rngs(3))
    dense = nnx.Linear(64, 32, rngs=nnx.Rngs(3))
    expected = i4.quantize(dense.kernel[...], 64, "mse", symmetric=True)
    np.testing.assert_array_equal(made.weight.packed, expected.packed)
    abstract = nnx.eval_shape(lambda: i4nnx.Int4Linear(64, 32, group_size=64, rngs=nnx.Rngs(0)))
    assert abstract.packed.shape == made.packed.shape
    with pytest.raises(ValueError, match="group_size is 48"):
        i4nnx.Int4Linear(64, 32, group_size=48, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("equation", "kernel", "bias", "x"),
    [
        ("BTD,NDH->BTNH", (4, 64, 16), (4, 16), (2, 3, 64)),
        ("...NH,NHD->...D", (4, 16, 24), (24,), (2, 3, 4, 16)),
        ("TED,EDF->TEF", (3, 64, 8), (3, 8), (5, 3, 64)),
        ("BSD,CKDH->CBSKH", (2, 2, 64, 16), None, (2, 3, 64)),
    ],
)
def test_einsum(
    equation: str, kernel: tuple[int, ...], bias: tuple[int, ...] | None, x: tuple[int, ...], rng: np.random.Generator
) -> None:
    dense = nnx.Einsum(equation, kernel, bias, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0))
    layer = i4nnx.Int4Einsum.from_einsum(dense, group_size=32)
    inputs = normal(rng, *x, dtype=jnp.float32)
    expected = dense_twin(layer, dense)(inputs.astype(jnp.bfloat16).astype(jnp.float32))
    assert_close(layer(inputs), expected)
    assert_close(layer(inputs, equation), expected)
    made = i4nnx.Int4Einsum(
        equation, kernel, bias, group_size=32, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0)
    )
    np.testing.assert_array_equal(made(inputs), layer(inputs))
    with pytest.raises(ValueError, match="its kernel is quantised for"):
        layer(inputs, "ab,bc->ac")


@pytest.mark.parametrize(
    ("arguments", "options", "x"),
    [
        ((64, (4, 16)), {}, (2, 3, 64)),
        (((4, 16), 24), {"axis": (-2, -1)}, (2, 3, 4, 16)),
        ((64, (3, 5)), {"axis": 1}, (2, 64, 3)),
        ((64, 8), {"batch_axis": {0: 2}}, (2, 3, 64)),
    ],
)
@pytest.mark.parametrize("use_bias", [False, True])
def test_linear_general(
    arguments: tuple[Any, ...], options: dict[str, Any], x: tuple[int, ...], use_bias: bool, rng: np.random.Generator
) -> None:
    dense = nnx.LinearGeneral(
        *arguments, **options, use_bias=use_bias, rngs=nnx.Rngs(0), bias_init=nnx.initializers.normal(1.0)
    )
    layer = i4nnx.Int4LinearGeneral.from_linear_general(dense, group_size=32)
    inputs = normal(rng, *x, dtype=jnp.float32)
    assert_close(layer(inputs), dense_twin(layer, dense)(inputs.astype(jnp.bfloat16).astype(jnp.float32)))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_embed(dtype: str | None, rng: np.random.Generator) -> None:
    dense = nnx.Embed(50, 64, dtype=dtype, rngs=nnx.Rngs(0))
    layer = i4nnx.Int4Embed.from_embed(dense, group_size=32)
    assert layer.kernel.shape == (50, 64)
    twin = dense_twin(layer, dense, "embedding")
    tokens = jnp.asarray(rng.integers(0, 50, (2, 7)))
    np.testing.assert_array_equal(layer(tokens), twin(tokens))
    assert layer(tokens).dtype == twin(tokens).dtype
    query = normal(rng, 2, 64)
    assert_close(layer.attend(query), twin.attend(query))
    made = i4nnx.Int4Embed(50, 64, dtype=dtype, group_size=32, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(made(tokens), layer(tokens))
    with pytest.raises(TypeError, match="must be integers"):
        layer(query)


class Block(nnx.Module):
    def __init__(self, rngs: Any):
        self.attention = nnx.MultiHeadAttention(4, 64, 64, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 64, use_bias=False, rngs=rngs)
        self.norm = nnx.RMSNorm(64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(jax.nn.silu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, rngs: Any):
        self.embed = nnx.Embed(32, 64, rngs=rngs)
        shared = nnx.Linear(64, 64, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.named = nnx.Dict(first=shared, second=shared)
        self.sequence = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), jax.nn.relu, nnx.Dropout(0.0))
        self.experts = nnx.Einsum("TD,EDF->TEF", (3, 64, 32), rngs=rngs)
        self.lm_head = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.sequence(self.named.second(self.named.first(x)))
        return self.lm_head(x) + self.experts(x[0]).sum((0, 1))


def test_a_model_is_quantised_by_rules() -> None:
    model = Model(nnx.Rngs(0))
    model.eval()
    tokens = jnp.arange(6)[None]
    before, size = model(tokens), sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    kept = {id(model.embed), id(model.lm_head), id(model.blocks[1].down)}
    rules = Rules(Recipe(group_size=32), [(r"blocks/1/down", None), ("attention", Recipe("mse", 64))])
    found, report = i4nnx.quantize_model(model, rules)
    assert found is model
    names = {layer.name: layer for layer in report.layers}
    attention = [f"blocks/{i}/attention/{part}/kernel" for i in (0, 1) for part in ("query", "key", "value", "out")]
    others = ["blocks/0/up", "blocks/0/down", "blocks/1/up", "named/first", "sequence/layers/0", "experts"]
    assert sorted(names) == sorted(attention + [f"{name}/kernel" for name in others])
    assert names["blocks/0/attention/query/kernel"].recipe == Recipe("mse", 64)
    assert names["blocks/0/attention/query/kernel"].shape == (64, 4, 16)
    assert {id(model.embed), id(model.lm_head), id(model.blocks[1].down)} == kept
    assert model.named.first is model.named.second
    assert isinstance(model.sequence.layers[0], i4nnx.Int4Linear)
    assert report.bytes_before == size
    assert report.bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert f"{len(names)} layers; {report.bytes_before:,} bytes before" in str(report)
    after = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert after.dtype == before.dtype
    difference = float(jnp.abs(after - before).max() / jnp.abs(before).max())
    assert 0 < difference < 0.3

    again, second = i4nnx.quantize_model(model, rules)
    assert again is model
    assert second.layers == ()


def test_a_layer_alone_and_subclasses(rng: np.random.Generator) -> None:
    class Scaled(nnx.Linear):
        def __call__(self, inputs: jax.Array) -> jax.Array:
            return 2 * super().__call__(inputs)

    layer, report = i4nnx.quantize_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), G32)
    assert isinstance(layer, i4nnx.Int4Linear)
    assert [one.name for one in report.layers] == ["kernel"]
    scaled = Scaled(64, 32, rngs=nnx.Rngs(0))
    assert i4nnx.quantize_model(scaled, G32)[0] is scaled
    for equation in ("ab,bb->ab", "ab,bc->abc"):
        einsum = nnx.Einsum("ab,bc->ac", (64, 64), rngs=nnx.Rngs(0))
        einsum.einsum_str = equation
        assert i4nnx.quantize_model(einsum, G32)[0] is einsum
    embed, _ = i4nnx.quantize_model(nnx.Embed(40, 64, rngs=nnx.Rngs(0)), Rules(Recipe(group_size=32), embeddings=True))
    assert isinstance(embed, i4nnx.Int4Embed)


def test_an_error_names_the_layer() -> None:
    model = Model(nnx.Rngs(0))
    model.blocks[1].up.kernel[...] = model.blocks[1].up.kernel[...].at[3, 5].set(jnp.nan)
    with pytest.raises(ValueError, match=r"^blocks/1/up/kernel: quantize: the largest \|w\| is nan"):
        i4nnx.quantize_model(model, G32)


def test_gradients_reach_real_parameters_alone(rng: np.random.Generator) -> None:
    optax = pytest.importorskip("optax")
    model, _ = i4nnx.quantize_model(Model(nnx.Rngs(0)), G32)
    tokens = jnp.asarray(rng.integers(0, 32, (1, 6)))
    grads = nnx.grad(lambda model: jnp.sum(model(tokens) ** 2))(model)
    leaves = jax.tree.leaves(grads)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
    assert len(leaves) == len(jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads["lm_head"]))

    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
    packed, bias = np.asarray(model.blocks[0].up.packed[...]), np.asarray(model.blocks[0].up.bias[...])
    optimizer.update(model, grads)
    np.testing.assert_array_equal(model.blocks[0].up.packed[...], packed)
    assert np.abs(np.asarray(model.blocks[0].up.bias[...]) - bias).max() > 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_lora_over_a_frozen_base(wrapped: bool, rng: np.random.Generator) -> None:
    optax = pytest.importorskip("optax")
    base = i4nnx.Int4Linear(64, 32, group_size=32, rngs=nnx.Rngs(0))
    if wrapped:
        layer = nnx.LoRA(64, 4, 32, base_module=base, rngs=nnx.Rngs(1))
    else:
        layer = i4nnx.Int4LoRALinear(64, 32, lora_rank=4, group_size=32, rngs=nnx.Rngs(0))
    x = normal(rng, 16, 64, dtype=jnp.float32)
    # What some low-rank part would give, so that training can reach it.
    target = base(x) + x @ normal(rng, 64, 1, dtype=jnp.float32) @ normal(rng, 1, 32, dtype=jnp.float32)
    np.testing.assert_array_equal(layer(x), base(x))

    def loss(layer: Any) -> jax.Array:
        return jnp.mean((layer(x) - target) ** 2)

    optimizer = nnx.Optimizer(layer, optax.adam(0.05), wrt=nnx.LoRAParam)
    frozen = nnx.clone(nnx.state(layer, nnx.Not(nnx.LoRAParam)))

    @nnx.jit
    def train(layer: Any, optimizer: Any) -> jax.Array:
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
        optimizer.update(layer, grads)
        return value

    losses = [float(train(layer, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer, nnx.Not(nnx.LoRAParam)), frozen)


def test_a_lora_layer_is_quantised_with_its_low_rank_part(rng: np.random.Generator) -> None:
    dense = nnx.LoRALinear(64, 32, lora_rank=4, rngs=nnx.Rngs(0), b_initializer=nnx.initializers.normal(1.0))
    layer, _ = i4nnx.quantize_model(dense, G32)
    assert isinstance(layer, i4nnx.Int4LoRALinear)
    x = normal(rng, 3, 64, dtype=jnp.float32)
    assert_close(layer(x), dense(x), 0.1)
    assert float(jnp.abs(layer.lora(x)).max()) > 1
    plain = i4nnx.Int4LoRALinear.from_linear(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), group_size=32)
    assert plain.add_lora(2, rngs=nnx.Rngs(0)).lora.lora_a.shape == (64, 2)


def test_split_and_merge(rng: np.random.Generator) -> None:
    model, _ = i4nnx.quantize_model(Block(nnx.Rngs(0)), G32)
    x = normal(rng, 1, 5, 64, dtype=jnp.float32)
    graph, params, int4, rest = nnx.split(model, nnx.Param, i4nnx.Int4Param, ...)
    assert all(leaf.dtype in (jnp.int32, jnp.bfloat16) for leaf in jax.tree.leaves(int4))
    merged = nnx.merge(graph, params, int4, rest)
    np.testing.assert_array_equal(merged(x), model(x))
    shapes = jax.eval_shape(lambda params: nnx.merge(graph, params, int4, rest)(x), params)
    assert shapes.shape == (1, 5, 64)


def test_layers_that_are_stacked_are_scanned(rng: np.random.Generator) -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: Any) -> Block:
        return Block(rngs)

    blocks = stack(nnx.Rngs(0))
    dense = nnx.clone(blocks)
    blocks, report = i4nnx.quantize_model(blocks, G32)
    assert {layer.name: layer.shape for layer in report.layers}["attention/query/kernel"] == (3, 64, 4, 16)
    assert blocks.up.weight.shape == (3, 64, 128)
    x = normal(rng, 1, 5, 64, dtype=jnp.float32)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x: jax.Array, block: Block) -> jax.Array:
        return block(x)

    one_by_one = x
    graph, state = nnx.split(blocks)
    for i in range(3):
        one_by_one = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(one_by_one)
    assert_close(forward(x, blocks), one_by_one, 1e-5)
    assert_close(forward(x, blocks), forward(x, dense), 0.2)


def test_orbax(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    model, _ = i4nnx.quantize_model(Block(nnx.Rngs(0)), G32)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(lambda: i4nnx.quantize_model(Block(nnx.Rngs(1)), G32)[0])
        graph, state = nnx.split(abstract)
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "model", state))
    x = normal(rng, 1, 5, 64, dtype=jnp.float32)
    np.testing.assert_array_equal(restored(x), model(x))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax_int4mm.nn import nnx as i4nnx
from jax_int4mm.quantizers import Recipe, Rules

mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
heads = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "in", "out"))
with jax.set_mesh(mesh):
    dense = nnx.Dict(
        up=nnx.Linear(256, 128, rngs=nnx.Rngs(0), kernel_init=init),
        q=nnx.Einsum("BD,NDH->BNH", (4, 256, 16), rngs=nnx.Rngs(1), kernel_init=heads),
    )
    x = jnp.ones((4, 256), jnp.bfloat16)
    expected = nnx.clone(dense).up(x)
    model, _ = i4nnx.quantize_model(dense, Rules(Recipe(group_size=64)))
    specs = nnx.get_partition_spec(nnx.state(model))
    assert specs["up"]["packed"].get_value() == P("out", "in", None, None), specs
    assert specs["up"]["scales_and_zeros"].get_value() == P("in", "out", None), specs
    # The heads come first in n, and are not divided; what lies within a head cannot be.
    assert specs["q"]["packed"].get_value() == P(None, "in", None, None), specs
    assert model.up.packed[...].sharding.spec == P("out", "in", None, None)
    y = nnx.jit(lambda model, x: model.up(x))(model, x)
    assert float(jnp.abs(y - expected).max()) < 0.3, y
    np.testing.assert_allclose(y, model.up(x), rtol=0.02, atol=0.02)
print("done")
"""


def test_mesh_axes_of_the_kernel_become_those_of_the_leaves() -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout


def test_the_package_does_not_import_flax() -> None:
    script = "import sys, jax_int4mm, jax_int4mm.nn; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
