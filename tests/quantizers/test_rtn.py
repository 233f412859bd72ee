"""Round to nearest, against its formulas in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import cases
import jax_int4mm as i4
import oracle
from float_weights import DISTRIBUTIONS, sample, stored

SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
DTYPES = pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)


def assert_rounds(got: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> None:
    """``got`` is ``exact``, computed in float32, rounded to dtype."""
    slack = 2.0**-21 * np.abs(exact)
    low, high = (oracle.round_once(exact + sign * slack, dtype).astype(np.float64) for sign in (-1, 1))
    assert np.all((low <= got) & (got <= high))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("group_size", cases.GROUP_SIZES)
@SYMMETRIC
@DTYPES
def test_the_formulas(
    distribution: str, group_size: int, symmetric: bool, dtype: np.dtype, rng: np.random.Generator
) -> None:
    # So large that XLA fuses the statistics with what follows, where it would leave out the roundings if it could.
    w = sample(distribution, rng, 1024, 128)
    w4 = i4.quantize(w, group_size, symmetric=symmetric, dtype=dtype)
    q, scale, zero = stored(w4)
    groups = w.T.astype(np.float64).reshape(q.shape)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)

    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
    size = np.maximum(np.abs(low), np.abs(high))
    is_plain = (low == high) & ((size == 0) | (size >= 2.0**-18))
    smallest = np.where(is_plain, max(smallest, 2.0**-30), smallest)
    exact_scale = np.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    assert_rounds(scale, np.maximum(exact_scale, smallest), dtype)
    if symmetric:
        np.testing.assert_array_equal(zero, 0)
    else:
        # The sum of two float32 numbers may cancel: its error is that of the larger.
        noise = 2.0**-22 * (np.abs(low) + 8 * scale)
        spacing = oracle.ulp(zero, dtype)
        assert np.all(np.abs(zero - (low + 8 * scale)) <= spacing / 2 + noise)

    steps = (groups - zero) / scale + 8
    nearest = np.clip(steps, 0, 15)
    # The float32 quotient is rounded before 8 is added, so its error is relative to steps - 8.
    assert np.all(np.abs(q - nearest) <= 0.5 + 2.0**-20 * (np.abs(steps - 8) + np.abs(zero / scale)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@SYMMETRIC
@DTYPES
def test_no_weight_is_off_by_more_than_half_a_step(
    distribution: str, symmetric: bool, dtype: np.dtype, rng: np.random.Generator
) -> None:
    w = sample(distribution, rng, 512, 24)
    w4 = i4.quantize(w, 64, symmetric=symmetric, dtype=dtype)
    _, scale, zero = stored(w4)
    error = np.abs(np.asarray(w4.dequantize(), np.float64) - w).T.reshape(24, -1, 64)
    largest = np.abs(w.T.astype(np.float64).reshape(error.shape)).max(-1, keepdims=True) + scale
    # Scale, zero and weight are each rounded to dtype; 15 steps multiply the scale's error.
    rounding = 7.5 * oracle.ulp(scale, dtype) + (oracle.ulp(zero, dtype) + oracle.ulp(largest, dtype)) / 2
    assert np.all(error <= scale / 2 + rounding)


@pytest.mark.parametrize(
    ("distribution", "symmetric", "expected"),
    [
        ("normal", False, 0.00170950),
        ("normal", True, 0.00190491),
        ("heavy-tailed", False, 0.00448548),
        ("heavy-tailed", True, 0.00564375),
    ],
)
def test_the_mean_error_is_what_it_was(distribution: str, symmetric: bool, expected: float) -> None:
    # Frozen for this one sample; the formulas in float64 give the same.
    w = sample(distribution, np.random.default_rng(0), 1024, 256)
    w4 = i4.quantize(w, 128, symmetric=symmetric)
    error = np.abs(np.asarray(w4.dequantize(), np.float64) - w).mean()
    assert error == pytest.approx(expected, rel=1e-4)


def test_asymmetric_is_nearer_than_symmetric_and_small_groups_than_large(rng: np.random.Generator) -> None:
    w = sample("normal", rng, 1024, 256)

    def error(group_size: int, symmetric: bool) -> float:
        dense = i4.quantize(w, group_size, symmetric=symmetric).dequantize()
        return float(np.abs(np.asarray(dense, np.float64) - w).mean())

    assert error(32, False) < error(64, False) < error(128, False) < error(256, False)
    assert error(128, False) < error(128, True)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 9), (33, 8), (127, 7), (129, 8), (300, 50)])
@pytest.mark.parametrize(("group_size", "inner_k_tiles"), [(32, 8), (128, 2), (256, 4)])
@SYMMETRIC
def test_padding_multiplies_to_zero_and_changes_no_group(
    k: int, n: int, group_size: int, inner_k_tiles: int, symmetric: bool, rng: np.random.Generator
) -> None:
    w = sample("positive", rng, k, n)
    w4 = i4.quantize(w, group_size, symmetric=symmetric, inner_k_tiles=inner_k_tiles)
    assert w4.shape == (k, n)
    q = np.asarray(i4.unpack_int4(w4.packed))
    padded_n, padded_k = q.shape
    assert 0 <= padded_n - n < 8
    assert padded_n % 8 == 0
    assert 0 <= padded_k - k < np.lcm(16 * inner_k_tiles, group_size)
    assert (q[n:] == 8).all()
    assert (q[:, k:] == 8).all()
    scales_and_zeros = np.asarray(w4.scales_and_zeros, np.float32)
    whole_groups = -(-k // group_size)
    assert (scales_and_zeros[:, n:] == 0).all()
    assert (scales_and_zeros[whole_groups:] == 0).all()

    # The last group is quantised as a group of its own values alone would be.
    last = w[(whole_groups - 1) * group_size :]
    repeated = np.concatenate([last] * group_size)[:group_size] if len(last) < group_size else last
    alone = i4.quantize(repeated, group_size, symmetric=symmetric, inner_k_tiles=inner_k_tiles)
    np.testing.assert_array_equal(np.asarray(alone.scales_and_zeros, np.float32)[0], scales_and_zeros[whole_groups - 1])


@SYMMETRIC
def test_stacked_weights_are_quantised_one_by_one(symmetric: bool, rng: np.random.Generator) -> None:
    w = rng.normal(0, 1, (2, 3, 100, 20)).astype(np.float32)
    stacked = i4.quantize(w, 32, symmetric=symmetric)
    assert stacked.shape == w.shape
    for index in np.ndindex(2, 3):
        one = i4.quantize(w[index], 32, symmetric=symmetric)
        for got, expected in zip(jax.tree.leaves(stacked), jax.tree.leaves(one), strict=True):
            np.testing.assert_array_equal(np.asarray(got)[index], expected)


@pytest.mark.parametrize("where", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize(
    ("given", "dtype", "expected"),
    [
        (np.float32, None, jnp.bfloat16),
        (jnp.bfloat16, None, jnp.bfloat16),
        (np.float16, None, np.float16),
        (np.float16, jnp.bfloat16, jnp.bfloat16),
        (np.float32, "float16", np.float16),
    ],
)
def test_the_dtype_is_that_of_w_if_it_can_be(where: Any, given: Any, dtype: Any, expected: Any) -> None:
    w4 = i4.quantize(where(np.ones((128, 8), given)), dtype=dtype)
    assert w4.dtype == expected
    assert w4.dequantize().dtype == expected


def test_float64_is_quantised_as_float32(rng: np.random.Generator) -> None:
    w = rng.normal(0, 1, (128, 8))
    got, expected = i4.quantize(w), i4.quantize(w.astype(np.float32))
    np.testing.assert_array_equal(got.dequantize(), expected.dequantize())


def test_jit_gives_the_same_weight(rng: np.random.Generator) -> None:
    w = sample("normal", rng, 200, 30)
    eager = i4.quantize(w, 64)
    for other in (jax.jit(lambda w: i4.quantize(w, 64))(w), i4.quantize(jnp.asarray(w), 64)):
        assert jax.tree.structure(other) == jax.tree.structure(eager)
        jax.tree.map(np.testing.assert_array_equal, other, eager)


def test_shapes_come_without_a_device() -> None:
    shape = jax.eval_shape(lambda w: i4.quantize(w, 64), jax.ShapeDtypeStruct((5, 200, 30), jnp.float32))
    assert shape.shape == (5, 200, 30)
    assert shape.packed == jax.ShapeDtypeStruct((5, 4, 2, 32, 4), jnp.int32)
    assert shape.scales_and_zeros == jax.ShapeDtypeStruct((5, 4, 32, 2), jnp.bfloat16)


W = np.ones((128, 8), np.float32)


@pytest.mark.parametrize(
    ("w", "arguments", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "w is a list; it must be a jax or numpy array"),
        (W.astype(np.int32), {}, TypeError, r"w has dtype int32; .*pack_int4\(q\)"),
        (W[:, 0], {}, ValueError, r"w has shape \[128\]; it must be \[k, n\]"),
        (W[:0], {}, ValueError, r"w has shape \[0, 8\]; it must be \[k, n\]"),
        (W, {"group_size": 48}, ValueError, "group_size is 48; it must be 32, 64, 128 or 256"),
        (W, {"group_size": None}, TypeError, "group_size is a NoneType; it must be a Python int"),
        (W, {"inner_k_tiles": 1}, ValueError, "inner_k_tiles is 1; it must be 2, 4 or 8"),
        (W, {"method": "best"}, ValueError, "method is 'best'; it must be one of 'rtn'"),
        (W, {"dtype": np.float32}, TypeError, "dtype is float32; it must be bfloat16 or float16"),
        (W * np.nan, {}, ValueError, r"largest \|w\| is nan; .*Remove what is not finite"),
        (W * np.inf, {}, ValueError, r"largest \|w\| is inf; .*Remove what is not finite"),
        (W * 1e5, {"dtype": np.float16}, ValueError, r"largest \|w\| is 1e\+05; .*dtype=jnp.bfloat16"),
    ],
)
def test_quantize_refuses(w: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^quantize: (the )?{message}"):
        i4.quantize(w, **arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [64, 2048])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    dtype: str, value: float, size: int, rng: np.random.Generator
) -> None:
    w = jnp.asarray(rng.normal(size=(size, size)), dtype)
    for row, column in rng.integers(0, size, (3, 2)):
        with pytest.raises(ValueError, match="Remove what is not finite from w"):
            i4.quantize(w.at[row, column].set(value), 64)
