"""An Equinox model with int4 layers: jit, gradients and an optimiser, as docs/flax.md has it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_int4mm as i4

eqx = pytest.importorskip("equinox")


class Int4Linear(eqx.Module):
    weight: i4.Int4Weight
    bias: jax.Array

    def __call__(self, x: jax.Array, key: Any = None) -> jax.Array:
        return x.astype(self.weight.dtype) @ self.weight + self.bias


def is_linear(node: object) -> bool:
    return isinstance(node, eqx.nn.Linear)


def quantized(model: Any) -> Any:
    def int4(node: Any) -> Any:
        return Int4Linear(i4.quantize(node.weight.T, group_size=32), node.bias) if is_linear(node) else node

    return jax.tree.map(int4, model, is_leaf=is_linear)


def loss(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def test_forward_and_training(rng: np.random.Generator) -> None:
    optax = pytest.importorskip("optax")
    dense = eqx.nn.MLP(64, 16, 96, 2, key=jax.random.key(int(rng.integers(99))))
    model = quantized(dense)
    assert len(jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, i4.Int4Weight))) > 3
    x = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
    found = eqx.filter_jit(lambda model, x: jax.vmap(model)(x))(model, x)
    twin = eqx.tree_at(
        lambda mlp: [layer.weight for layer in mlp.layers],
        dense,
        [layer.weight.dequantize().T.astype(jnp.float32) for layer in model.layers],
    )
    expected = jax.vmap(twin)(x)
    assert float(jnp.abs(found - expected).max()) < 0.03 * float(jnp.abs(expected).max())

    # What other biases of the last layer would give, so that training can reach it.
    y = found + jnp.asarray(rng.normal(size=16), jnp.float32)
    biases = jax.tree.map(lambda _: False, model)
    biases = eqx.tree_at(lambda mlp: [layer.bias for layer in mlp.layers], biases, replace_fn=lambda _: True)
    trained, frozen = eqx.partition(model, biases)
    optimizer = optax.adam(0.05)
    state = optimizer.init(trained)

    @eqx.filter_jit
    def step(trained: Any, state: Any) -> Any:
        value, grads = eqx.filter_value_and_grad(lambda part: loss(eqx.combine(part, frozen), x, y))(trained)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(trained, updates), state, value

    values = []
    for _ in range(20):
        trained, state, value = step(trained, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    after = eqx.combine(trained, frozen)
    np.testing.assert_array_equal(after.layers[0].weight.packed, model.layers[0].weight.packed)
