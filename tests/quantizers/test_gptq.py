"""GPTQ, against optimal brain quantisation in float64, column by column, with the inverse Hessian written out."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jax_int4mm as i4
from float_weights import sample
from jax_int4mm.quantizers import Hessian

SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
ACT_ORDER = pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act_order"])
DTYPES = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)

gptq = functools.partial(i4.quantize, method="gptq")


def correlated(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Inputs [..., k] that depend on each other, of very different sizes."""
    k = shape[-1]
    mixed = rng.normal(0, 1, (*shape[:-1], k // 2)) @ rng.normal(0, 1, (k // 2, k)) + rng.normal(0, 1, shape)
    return (mixed * np.exp(rng.normal(0, 1, k))).astype(np.float32)


def gptq_in_float64(
    w: np.ndarray,
    x: np.ndarray,
    group_size: int,
    *,
    symmetric: bool,
    dtype: np.dtype,
    act_order: bool = False,
    damping: float = 0.01,
) -> tuple[np.ndarray, np.ndarray]:
    """q [k, n] in the order in which it is stored, and the matrix [k, n], in its own order, that it stands for."""
    k, n = w.shape
    hessian = 2 * x.astype(np.float64).T @ x / len(x)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(k)
    hessian += damping * np.diag(hessian).mean() * np.eye(k)
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    left = w[order].astype(np.float64)
    q, dense = np.zeros((k, n)), np.zeros((k, n))
    for i in range(k):
        if i % group_size == 0:
            group = left[i : i + group_size]
            low, high = group.min(axis=0), group.max(axis=0)
            smallest = float(jnp.finfo(dtype).smallest_normal)
            step = np.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
            scale = np.maximum(step, smallest).astype(dtype).astype(np.float64)
            zero = np.zeros(n) if symmetric else (low + 8 * scale).astype(dtype).astype(np.float64)
        q[i] = np.clip(np.round((left[i] - zero) / scale) + 8, 0, 15)
        dense[order[i]] = (q[i] - 8) * scale + zero
        left -= np.outer(inverse[i], left[i] - dense[order[i]]) / inverse[i, i]
        inverse -= np.outer(inverse[i], inverse[i]) / inverse[i, i]
    return q, dense


def stored_q(w4: i4.Int4Weight) -> np.ndarray:
    return np.asarray(i4.unpack_int4(w4.packed))[: w4.n, : w4.k].T


def output_error(x: np.ndarray, w: np.ndarray, dense: Any) -> float:
    return float(np.linalg.norm(x.astype(np.float64) @ (np.asarray(dense, np.float64) - w)))


def assert_same(found: i4.Int4Weight, expected: i4.Int4Weight) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@SYMMETRIC
@ACT_ORDER
@DTYPES
def test_the_algorithm(symmetric: bool, act_order: bool, dtype: np.dtype, rng: np.random.Generator) -> None:
    # Two whole groups and 22 values.
    w, x = sample("normal", rng, 150, 9), correlated(rng, 400, 150)
    w4 = gptq(w, 64, symmetric=symmetric, dtype=dtype, calibration=x, act_order=act_order)
    q, dense = gptq_in_float64(w, x, 64, symmetric=symmetric, dtype=dtype, act_order=act_order)
    # A weight between two values may go the other way, and those after it in its column with it.
    assert (stored_q(w4) == q).mean() >= 0.9
    assert output_error(x, w, w4.dequantize()) == pytest.approx(output_error(x, w, dense), rel=0.05)


@pytest.mark.parametrize(
    ("group_size", "symmetric", "act_order"), [(32, False, False), (64, True, True), (256, False, True)]
)
def test_outputs_change_less_than_with_round_to_nearest(
    group_size: int, symmetric: bool, act_order: bool, rng: np.random.Generator
) -> None:
    w, x = sample("heavy-tailed", rng, 512, 16), correlated(rng, 1000, 512)
    found = gptq(w, group_size, symmetric=symmetric, calibration=x, act_order=act_order)
    plain = i4.quantize(w, group_size, symmetric=symmetric)
    assert output_error(x, w, found.dequantize()) < 0.95 * output_error(x, w, plain.dequantize())


@pytest.mark.parametrize(
    ("k", "n", "group_size", "symmetric", "dtype"),
    [
        (1, 1, 32, False, "bfloat16"),
        (300, 50, 128, True, "bfloat16"),
        (300, 50, 128, False, "float16"),
        (1000, 120, 32, False, "bfloat16"),
    ],
)
def test_inputs_that_do_not_depend_on_each_other_give_round_to_nearest(
    k: int, n: int, group_size: int, symmetric: bool, dtype: str, rng: np.random.Generator
) -> None:
    w = sample("heavy-tailed", rng, k, n)
    quantize = functools.partial(i4.quantize, w, group_size, symmetric=symmetric, dtype=dtype)
    assert_same(quantize(method="gptq", calibration=3 * np.eye(k, dtype=np.float32)), quantize())


def test_act_order_puts_large_inputs_first_and_equal_ones_in_order(rng: np.random.Generator) -> None:
    sizes = rng.integers(1, 5, 100)
    w = sample("normal", rng, 100, 20)
    w4 = gptq(w, 32, calibration=np.diag(sizes).astype(np.float32), act_order=True)
    order = np.argsort(-sizes, kind="stable")
    assert w4.perm is not None
    assert w4.perm.dtype == jnp.int32
    np.testing.assert_array_equal(w4.perm, order)
    # These inputs are independent: what is stored is what round to nearest makes of w in that order.
    plain = i4.quantize(w[order], 32)
    np.testing.assert_array_equal(w4.packed, plain.packed)
    np.testing.assert_array_equal(w4.scales_and_zeros, plain.scales_and_zeros)


@DTYPES
def test_x_meets_the_order_of_the_weight(dtype: np.dtype, rng: np.random.Generator) -> None:
    w, x = sample("normal", rng, 150, 9), correlated(rng, 400, 150)
    w4 = gptq(w, 64, dtype=dtype, calibration=x, act_order=True)
    x = x[:5].astype(dtype)
    expected = x.astype(np.float64) @ np.asarray(w4.dequantize(), np.float64)
    bound = 4 * float(jnp.finfo(dtype).eps) * (np.abs(x.astype(np.float64)) @ np.abs(w)).max()
    np.testing.assert_allclose(np.asarray(x @ w4, np.float64), expected, rtol=0, atol=bound)
    assert not np.array_equal(w4.perm, np.arange(150))


@pytest.mark.parametrize(("k", "n", "act_order"), [(33, 8, False), (129, 7, True)])
def test_padding_multiplies_to_zero(k: int, n: int, act_order: bool, rng: np.random.Generator) -> None:
    w = sample("positive", rng, k, n)
    w4 = gptq(w, 32, calibration=correlated(rng, 50, k), act_order=act_order)
    assert w4.shape == (k, n)
    q, scales_and_zeros = np.asarray(i4.unpack_int4(w4.packed)), np.asarray(w4.scales_and_zeros, np.float32)
    assert (q[n:] == 8).all()
    assert (q[:, k:] == 8).all()
    assert (scales_and_zeros[:, n:] == 0).all()
    assert (scales_and_zeros[-(-k // 32) :] == 0).all()


def test_inputs_that_are_always_zero(rng: np.random.Generator) -> None:
    w, x = sample("normal", rng, 192, 24), correlated(rng, 400, 192)
    x[:, 64:128] = 0
    w4 = gptq(w, 64, calibration=x)
    # A group of such inputs alone is rounded to nearest.
    dead = i4.quantize(w[64:128], 64)
    np.testing.assert_array_equal(stored_q(w4)[64:128], stored_q(dead))
    np.testing.assert_array_equal(w4.scales_and_zeros[1], dead.scales_and_zeros[0])
    # The others are as if they were alone; the mean that is damped by counts all inputs.
    live = np.r_[:64, 128:192]
    alone = gptq(w[live], 64, calibration=x[:, live], damping=0.01 * 128 / 192)
    assert (stored_q(w4)[live] == stored_q(alone)).mean() >= 0.9
    errors = [output_error(x[:, live], w[live], np.asarray(a)) for a in (w4.dequantize()[live], alone.dequantize())]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@ACT_ORDER
def test_fewer_samples_than_inputs(act_order: bool, rng: np.random.Generator) -> None:
    w, x = sample("normal", rng, 192, 24), correlated(rng, 10, 192)
    found = gptq(w, 64, calibration=x, act_order=act_order)
    # 192 weights of a column have to fit 10 outputs.
    assert output_error(x, w, found.dequantize()) < 0.8 * output_error(x, w, i4.quantize(w, 64).dequantize())


def test_too_little_damping_grows(rng: np.random.Generator) -> None:
    w, x = sample("normal", rng, 192, 24), correlated(rng, 10, 192)
    # In float32 such a Hessian has no Cholesky factor: it takes the next greater damping, or the one after.
    assert_same(gptq(w, 64, calibration=x, damping=2**-27), gptq(w, 64, calibration=x, damping=10 * 2**-27))


def test_a_hessian_that_no_damping_helps(rng: np.random.Generator) -> None:
    w, x = sample("normal", rng, 192, 24), correlated(rng, 10, 192)
    with pytest.raises(ValueError, match=r"^quantize: the Hessian .* no Cholesky factor with damping 1e-30, .*0\.01"):
        gptq(w, 64, damping=1e-30, calibration=x)
    # A traced one raises nothing: that matrix, and no other of its stack, is rounded to nearest.
    good = correlated(rng, 400, 192)
    hessians = np.stack([-1e6 * np.eye(192, dtype=np.float32), good.T @ good])
    traced = jax.jit(lambda w, hessians: gptq(w, 64, calibration=Hessian(hessians)))(np.stack([w, w]), hessians)
    dense, plain = traced.dequantize(), i4.quantize(w, 64).dequantize()
    np.testing.assert_array_equal(dense[0], plain)
    assert output_error(good, w, dense[1]) < 0.95 * output_error(good, w, plain)


def test_stacked_mapped_and_traced(rng: np.random.Generator) -> None:
    w, x = rng.normal(0, 1, (2, 3, 100, 20)).astype(np.float32), correlated(rng, 2, 3, 150, 100)
    quantize = functools.partial(gptq, group_size=32, act_order=True)
    together = quantize(w, calibration=x)
    traced = jax.jit(lambda w, x: quantize(w, calibration=x))(w, x)
    mapped = jax.vmap(lambda w, x: quantize(w, calibration=x))(w[0], x[0])
    assert together.shape == w.shape
    for index in np.ndindex(2, 3):
        alone = quantize(w[index], calibration=x[index])
        for found in (together, traced):
            one = jax.tree.map(lambda a: a[index], found)  # noqa: B023
            # A GPU may add the products of a stack in another order.
            assert (stored_q(one) == stored_q(alone)).mean() >= (1 if jax.default_backend() == "cpu" else 0.9)
        if index[0] == 0:
            one = jax.tree.map(lambda a: a[index[1]], mapped)  # noqa: B023
            assert (stored_q(one) == stored_q(alone)).mean() >= 0.9
    shapes = jax.eval_shape(lambda w, x: quantize(w, calibration=x), w, x)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(together), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


def test_batches_and_a_hessian_say_what_one_array_says(rng: np.random.Generator) -> None:
    # Small whole numbers, whose sums float32 represents.
    w, x = sample("normal", rng, 96, 8), rng.integers(-4, 5, (60, 96)).astype(np.float32)
    expected = gptq(w, 32, calibration=x)
    batches = [x[:10], x[10:30].reshape(4, 5, 96), x[30], jnp.asarray(x[31:])]
    hessian = functools.reduce(Hessian.add, batches, Hessian.zeros(96))
    np.testing.assert_array_equal(hessian.matrix, x.T @ x)
    for given in (batches, iter(batches), hessian, x.astype(np.float16), jnp.asarray(x, jnp.bfloat16), x.astype(float)):
        assert_same(gptq(w, 32, calibration=given), expected)
    # Its unit does not count.
    assert_same(gptq(w, 32, calibration=Hessian(hessian.matrix / 64)), expected)


def test_a_stack_of_hessians(rng: np.random.Generator) -> None:
    w, x = rng.normal(0, 1, (3, 96, 8)).astype(np.float32), correlated(rng, 3, 60, 96)
    # Nothing reached the last: an expert that no text has used.
    x[2] = 0
    hessian = Hessian.zeros(96, (3,)).add(x[:, :20]).add(x[:, 20:].reshape(3, 5, 8, 96))
    np.testing.assert_allclose(hessian.matrix, x.swapaxes(1, 2) @ x, rtol=1e-3, atol=1e-3 * np.abs(x).max() ** 2)
    stacked = gptq(w, 32, calibration=hessian)
    alone = [gptq(w[i], 32, calibration=Hessian(hessian.matrix[i])) for i in range(2)]
    for i, expected in enumerate([*alone, i4.quantize(w[2], 32)]):
        assert_same(jax.tree.map(lambda a: a[i], stacked), expected)  # noqa: B023


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({}, 0.569), ({"act_order": True}, 0.219), ({"symmetric": True}, 0.648)],
    ids=str,
)
def test_the_output_error_is_what_it_was(arguments: dict[str, Any], expected: float) -> None:
    # Frozen for this one sample, relative to round to nearest.
    rng = np.random.default_rng(0)
    w, x = sample("normal", rng, 512, 64), correlated(rng, 1000, 512)
    errors = [output_error(x, w, a.dequantize()) for a in (gptq(w, calibration=x, **arguments), i4.quantize(w))]
    assert errors[0] / errors[1] == pytest.approx(expected, rel=0.02)


W, X = np.ones((128, 8), np.float32), np.ones((10, 128), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r'method is "gptq" and there is no calibration; .*method="mse"'),
        ({"calibration": X, "method": "rtn"}, ValueError, 'calibration is given and method is "rtn"'),
        ({"act_order": True, "method": "hqq"}, ValueError, 'act_order is given and method is "hqq"'),
        ({"damping": 0.1, "method": "mse"}, ValueError, 'damping is given and method is "mse"'),
        ({"calibration": X, "damping": 0}, ValueError, "damping is 0; it must be greater than 0"),
        ({"calibration": X, "damping": np.nan}, ValueError, "damping is nan; it must be greater than 0"),
        ({"calibration": X, "damping": "1"}, TypeError, "damping is a str; it must be a Python float"),
        ({"calibration": X, "damping": True}, TypeError, "damping is a bool; it must be a Python float"),
        ({"calibration": 3}, TypeError, "calibration is a int; it must be a float array"),
        ({"calibration": [3]}, TypeError, "calibration is a int; it must be a jax or numpy array"),
        ({"calibration": X.astype(int)}, TypeError, "calibration has dtype int64; it must be floats"),
        ({"calibration": X[:, :64]}, ValueError, r"calibration has shape \[10, 64\]; it must be \[..., 128\]"),
        ({"calibration": X[:0]}, ValueError, r"calibration has shape \[0, 128\]; .* at least one sample"),
        ({"calibration": np.float32(1)[...]}, ValueError, r"calibration has shape \[\]; it must be \[..., 128\]"),
        ({"calibration": []}, ValueError, "calibration has no batches; .*read once is empty"),
        ({"calibration": X * np.nan}, ValueError, "calibration holds values that are not finite"),
        ({"calibration": X * 1e30}, ValueError, "calibration holds values .* whose squares float32 does not hold"),
        ({"calibration": X * 0}, ValueError, 'calibration is 0 throughout, .*method="rtn"'),
        (
            {"calibration": Hessian.zeros(64)},
            ValueError,
            r"calibration is a Hessian of shape \[64, 64\]; .*\[128, 128\]",
        ),
    ],
)
def test_quantize_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^quantize: {message}"):
        i4.quantize(W, **{"method": "gptq", **arguments})


def test_a_stack_needs_inputs_of_each_matrix() -> None:
    with pytest.raises(ValueError, match=r"calibration has shape \[10, 128\]; it must be \[2, \.\.\., 128\]"):
        gptq(np.stack([W, W]), calibration=X)


def test_a_hessian_refuses() -> None:
    hessian = Hessian.zeros(128)
    with pytest.raises(TypeError, match=r"^Hessian\.add: x is a list; it must be a jax or numpy array"):
        hessian.add([X])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Hessian\.add: x has dtype int64; it must be floats"):
        hessian.add(X.astype(int))
    with pytest.raises(ValueError, match=r"^Hessian\.add: x has shape \[10, 64\]; it must be \[\.\.\., 128\]"):
        hessian.add(X[:, :64])
