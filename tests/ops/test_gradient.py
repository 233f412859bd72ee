"""Derivatives of int4pack_mm and dequantize, against the formula in float64 and against differences."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import cases
import jax_int4mm as i4
from kernels import Kernel, int4_weight

GROUP_SIZE = 64
DTYPES = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


def make(rng: np.random.Generator, dtype: np.dtype = cases.DTYPES[0]) -> tuple[np.ndarray, cases.Weight]:
    weight = cases.random_weight(rng, 40, 256, GROUP_SIZE, 4, dtype)
    return cases.random_x(rng, (9, weight.k), dtype), weight


def of_x_and_scales(weight: cases.Weight) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda x, scales_and_zeros: i4.int4pack_mm(x, weight.packed, scales_and_zeros, GROUP_SIZE)


def assert_near(found: jax.Array, exact: np.ndarray, magnitude: np.ndarray) -> None:
    """An f32 sum of terms whose magnitudes add up to this, rounded to 16 bits."""
    bound = float(jnp.finfo(found.dtype).eps) * np.abs(exact) + 1e-5 * magnitude
    assert found.shape == exact.shape
    assert (np.abs(np.asarray(found, np.float64) - exact) <= bound).all()


@DTYPES
def test_the_gradient_of_x_is_dy_times_the_dequantized_weight(
    chosen: Kernel, dtype: np.dtype, rng: np.random.Generator
) -> None:
    x, weight = make(rng, dtype)
    dy = cases.random_x(rng, (9, weight.n), dtype)
    _, vjp = jax.vjp(lambda x: of_x_and_scales(weight)(x, weight.scales_and_zeros), x)
    (dx,) = vjp(dy)
    assert dx.dtype == dtype
    w, dy64 = weight.rounded.astype(np.float64), dy.astype(np.float64)
    assert_near(dx, dy64 @ w, np.abs(dy64) @ np.abs(w))


@DTYPES
def test_the_gradient_of_scales_and_zeros_is_that_of_the_formula(
    chosen: Kernel, dtype: np.dtype, rng: np.random.Generator
) -> None:
    x, weight = make(rng, dtype)
    dy = cases.random_x(rng, (9, weight.n), dtype)
    _, vjp = jax.vjp(lambda s: of_x_and_scales(weight)(x, s), weight.scales_and_zeros)
    (found,) = vjp(dy)
    dw = dy.astype(np.float64).T @ x.astype(np.float64)
    magnitude = np.abs(dy.astype(np.float64)).T @ np.abs(x.astype(np.float64))
    centred = np.asarray(i4.unpack_int4(weight.packed), np.float64) - 8
    grouped = (weight.n, weight.k // GROUP_SIZE, GROUP_SIZE)

    def add_up(of_scales: np.ndarray, of_zeros: np.ndarray) -> np.ndarray:
        return np.stack([a.reshape(grouped).sum(-1).T for a in (of_scales, of_zeros)], -1)

    assert found.dtype == dtype
    assert_near(found, add_up(dw * centred, dw), add_up(magnitude * np.abs(centred), magnitude))


@DTYPES
def test_derivatives_agree_with_differences(chosen: Kernel, dtype: np.dtype, rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 8, 64, GROUP_SIZE, 4, dtype)
    x = rng.normal(0, 0.25, (2, weight.k)).astype(np.float32)
    scales_and_zeros = rng.normal(0, 0.25, weight.scales_and_zeros.shape).astype(np.float32)

    def f(x: jax.Array, scales_and_zeros: jax.Array) -> jax.Array:
        # f32 outside, for the sums of the check itself.
        y = of_x_and_scales(weight)(x.astype(dtype), scales_and_zeros.astype(dtype))
        return y.astype(jnp.float32)

    def dense(scales_and_zeros: jax.Array) -> jax.Array:
        return i4.dequantize(weight.packed, scales_and_zeros.astype(dtype), GROUP_SIZE).astype(jnp.float32)

    # The op is linear in each: large steps are exact but for rounding.
    check = functools.partial(check_grads, order=1, modes=("fwd", "rev"), eps=1.0, atol=1.0, rtol=0.05)
    check(f, (x, scales_and_zeros))
    check(dense, (scales_and_zeros,))


@DTYPES
def test_second_derivatives_by_x(chosen: Kernel, dtype: np.dtype, rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 40, 256, GROUP_SIZE, 4, dtype)
    w = weight.rounded.astype(np.float64)
    x, v = (rng.normal(0, 1 / np.linalg.norm(w, axis=1).mean(), (9, weight.k)).astype(dtype) for _ in range(2))

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sin(of_x_and_scales(weight)(x, weight.scales_and_zeros).astype(jnp.float32)).sum()

    _, found = jax.jvp(jax.grad(loss), (x,), (v,))
    x, v = x.astype(np.float64), v.astype(np.float64)
    exact = (-np.sin(x @ w.T) * (v @ w.T)) @ w
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=0, atol=0.02 * np.abs(exact).max())


@DTYPES
def test_second_derivatives_that_mix_x_and_scales(chosen: Kernel, dtype: np.dtype, rng: np.random.Generator) -> None:
    x, weight = make(rng, dtype)
    dy = cases.random_x(rng, (9, weight.n), dtype)
    ds = cases.random_weight(rng, weight.n, weight.k, GROUP_SIZE, 4, dtype).scales_and_zeros

    def dx(scales_and_zeros: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: of_x_and_scales(weight)(x, scales_and_zeros), x)[1](dy)[0]

    _, found = jax.jvp(dx, (weight.scales_and_zeros,), (ds,))
    w = np.asarray(i4.dequantize(weight.packed, ds, GROUP_SIZE), np.float64)
    assert_near(found, dy.astype(np.float64) @ w, np.abs(dy.astype(np.float64)) @ np.abs(w))


def test_a_tangent_is_a_product_by_the_same_kernels(chosen: Kernel, rng: np.random.Generator) -> None:
    x, weight = make(rng)
    f = of_x_and_scales(weight)
    dx, ds = cases.random_x(rng, x.shape), weight.scales_and_zeros[::-1].copy()
    s = weight.scales_and_zeros
    y, of_x = jax.jvp(lambda x: f(x, s), (x,), (dx,))
    np.testing.assert_array_equal(y, f(x, s))
    np.testing.assert_array_equal(of_x, f(dx, s))
    _, of_s = jax.jvp(lambda s: f(x, s), (s,), (ds,))
    np.testing.assert_array_equal(of_s, f(x, ds))
    value, linear = jax.linearize(lambda x: f(x, s), x)
    np.testing.assert_array_equal(value, y)
    np.testing.assert_array_equal(linear(dx), of_x)


def test_a_weight_has_a_gradient_and_its_integers_have_none(chosen: Kernel, rng: np.random.Generator) -> None:
    x, weight = make(rng)
    gradient = jax.grad(lambda w4: (x @ w4).astype(jnp.float32).sum(), allow_int=True)(int4_weight(weight))
    assert isinstance(gradient, i4.Int4Weight)
    assert gradient.packed.dtype == jax.dtypes.float0
    assert np.asarray(gradient.scales_and_zeros, np.float32).any()


def test_what_is_kept_for_the_backward_pass_is_x_and_the_packed_weight(
    chosen: Kernel, rng: np.random.Generator
) -> None:
    x, weight = make(rng)
    _, vjp = jax.vjp(of_x_and_scales(weight), x, weight.scales_and_zeros)
    kept = sorted(residual.shape for residual in jax.tree.leaves(vjp))
    assert kept == sorted([x.shape, weight.packed.shape, weight.scales_and_zeros.shape])


def test_gradients_under_jit_scan_and_remat_are_those_without(chosen: Kernel, rng: np.random.Generator) -> None:
    layers = [cases.random_weight(rng, 256, 256, GROUP_SIZE, 4) for _ in range(3)]
    x = cases.random_x(rng, (5, 256))
    packed = np.stack([w.packed for w in layers])
    scales = np.stack([w.scales_and_zeros for w in layers])

    def layer(x: jax.Array, packed: jax.Array, scales: jax.Array) -> jax.Array:
        return jnp.tanh(i4.int4pack_mm(x, packed, scales, GROUP_SIZE))

    def in_turn(x: jax.Array, scales: jax.Array) -> jax.Array:
        for i in range(3):
            x = layer(x, packed[i], scales[i])
        return x.astype(jnp.float32).sum()

    def scanned(one: Callable[..., jax.Array], x: jax.Array, scales: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (one(x, *w), None), x, (packed, scales))[0].astype(jnp.float32).sum()

    by_name = jax.checkpoint_policies.save_only_these_names("int4pack_mm")
    expected = jax.grad(in_turn, (0, 1))(x, scales)
    for one in (layer, jax.checkpoint(layer), jax.checkpoint(layer, policy=by_name)):
        found = jax.jit(jax.grad(functools.partial(scanned, one), (0, 1)))(x, scales)
        for a, b in zip(found, expected, strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02 * np.abs(b).max())


def test_the_name_of_the_result_keeps_it_from_being_computed_again(rng: np.random.Generator) -> None:
    x, weight = make(rng)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sin(of_x_and_scales(weight)(x, weight.scales_and_zeros)).astype(jnp.float32).sum()

    def products(policy: Callable[..., bool] | None) -> int:
        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy)))(x)).count(" int4pack_mm[")

    assert products(None) == 2
    assert products(jax.checkpoint_policies.save_only_these_names("int4pack_mm")) == 1


def test_gradients_of_a_batch(chosen: Kernel, rng: np.random.Generator) -> None:
    x, weight = make(rng)
    scales = np.stack([weight.scales_and_zeros, weight.scales_and_zeros[::-1]])

    def loss(x: jax.Array, scales: jax.Array) -> jax.Array:
        return jnp.sin(of_x_and_scales(weight)(x, scales)).astype(jnp.float32).sum()

    gradient = jax.grad(loss, (0, 1))
    for in_axes, arguments in [((None, 0), (x, scales)), ((0, 0), (np.stack([x, -x]), scales))]:
        found = jax.vmap(gradient, in_axes)(*arguments)
        each = [gradient(x if in_axes[0] is None else arguments[0][i], scales[i]) for i in range(2)]
        for i, expected in enumerate(zip(*each, strict=True)):
            a, b = found[i], jnp.stack(expected)
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("specs", "out"),
    [((P("d"), P(), P()), P("d")), ((P(), P("d"), P(None, "d")), P(None, "d"))],
    ids=["rows of x", "columns of w"],
)
def test_gradients_through_shard_map(
    specs: tuple[P, ...], out: P, rng: np.random.Generator, cpu_devices: list[jax.Device]
) -> None:
    weight = cases.random_weight(rng, 64, 256, GROUP_SIZE, 4)
    x = cases.random_x(rng, (8, weight.k))
    op = functools.partial(i4.int4pack_mm, group_size=GROUP_SIZE)
    sharded = jax.shard_map(op, mesh=Mesh(np.array(cpu_devices), ("d",)), in_specs=specs, out_specs=out)

    def loss(f: Callable[..., jax.Array], x: jax.Array, scales: jax.Array) -> jax.Array:
        return (f(x, weight.packed, scales).astype(jnp.float32) ** 2).sum()

    found = jax.jit(jax.grad(functools.partial(loss, sharded), (0, 1)))(x, weight.scales_and_zeros)
    expected = jax.grad(functools.partial(loss, op), (0, 1))(x, weight.scales_and_zeros)
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(b).max())
