"""The acceptance checks have teeth: they pass a right product in any order of summation, and fail each wrong one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest

import acceptance
import cases
import oracle


def float32_weight(weight: cases.Weight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q - 8, scale and zero, each float32 [n, k]."""
    scale, zero = weight.scales_and_zeros.astype(np.float32).repeat(weight.group_size, axis=0).transpose(2, 1, 0)
    return weight.q.astype(np.float32) - 8, scale, zero


def rounded_twice(weight: cases.Weight) -> np.ndarray:
    centred, scale, zero = float32_weight(weight)
    return ((centred * scale).astype(weight.dtype).astype(np.float32) + zero).astype(weight.dtype)


def not_rounded(weight: cases.Weight) -> np.ndarray:
    return weight.unrounded


def with_swapped_nibbles(weight: cases.Weight) -> np.ndarray:
    swapped = weight.q.reshape(weight.n, -1, 2)[:, :, ::-1].reshape(weight.q.shape)
    return oracle.rounded_weight(swapped, weight.scales_and_zeros, weight.group_size)


def with_the_scale_of_the_next_group(weight: cases.Weight) -> np.ndarray:
    return oracle.rounded_weight(weight.q, np.roll(weight.scales_and_zeros, 1, axis=0), weight.group_size)


def with_the_scale_of_the_next_row(weight: cases.Weight) -> np.ndarray:
    return oracle.rounded_weight(weight.q, np.roll(weight.scales_and_zeros, 1, axis=1), weight.group_size)


def without_zeros(weight: cases.Weight) -> np.ndarray:
    return oracle.rounded_weight(weight.q, weight.scales_and_zeros * [1, 0], weight.group_size)


def with_one_wrong_tile(weight: cases.Weight) -> np.ndarray:
    q = weight.q.copy()
    q[:8, : 16 * weight.inner_k_tiles] ^= 1
    return oracle.rounded_weight(q, weight.scales_and_zeros, weight.group_size)


def check(y: np.ndarray, x: np.ndarray, weight: cases.Weight) -> None:
    acceptance.check([y], [x], weight.rounded, jax.devices("cpu")[0])


KINDS = pytest.mark.parametrize(
    ("dtype", "k"), [(dtype, k) for dtype in cases.DTYPES for k in (256, 1024, 4096)], ids=str
)


@pytest.fixture
def weight(dtype: np.dtype, k: int, rng: np.random.Generator) -> cases.Weight:
    return cases.random_weight(rng, 64, k, 64, 4, dtype)


@pytest.fixture
def x(dtype: np.dtype, k: int, rng: np.random.Generator) -> np.ndarray:
    return cases.random_x(rng, (65, k), dtype)


def multiply(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w^T without an error but the last rounding."""
    return oracle.round_once(x.astype(np.float64) @ w.astype(np.float64).T, x.dtype)


@KINDS
@pytest.mark.parametrize("slices", [1, 8, 32])
def test_any_order_of_a_float32_sum_is_accepted(weight: cases.Weight, x: np.ndarray, slices: int) -> None:
    w = weight.rounded.astype(np.float32).reshape(weight.n, slices, -1)
    parts = x.astype(np.float32).reshape(len(x), slices, -1)
    y = np.zeros((len(x), weight.n), np.float32)
    for i in range(slices):
        y += parts[:, i] @ w[:, i].T
    check(y.astype(x.dtype), x, weight)


@KINDS
@pytest.mark.parametrize(
    "wrong",
    [
        rounded_twice,
        not_rounded,
        with_swapped_nibbles,
        with_the_scale_of_the_next_group,
        with_the_scale_of_the_next_row,
        without_zeros,
        with_one_wrong_tile,
    ],
)
def test_a_wrong_dequantisation_fails(
    wrong: Callable[[cases.Weight], np.ndarray], weight: cases.Weight, x: np.ndarray
) -> None:
    y = multiply(x, wrong(weight))
    with pytest.raises(AssertionError, match="outputs"):
        check(y, x, weight)


@KINDS
@pytest.mark.parametrize("m", [1, 2])
def test_a_weight_rounded_twice_fails_on_few_outputs_too(weight: cases.Weight, x: np.ndarray, m: int) -> None:
    with pytest.raises(AssertionError, match="outputs"):
        check(multiply(x[:m], rounded_twice(weight)), x[:m], weight)


@KINDS
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_one_wrong_output_fails(weight: cases.Weight, x: np.ndarray, value: float) -> None:
    y = multiply(x, weight.rounded)
    y[64, 63] = value
    with pytest.raises(AssertionError, match=r"1 of 4160 .* row 64 of all and column 63"):
        check(y, x, weight)


@KINDS
def test_a_sum_in_the_activations_dtype_fails(weight: cases.Weight, x: np.ndarray) -> None:
    y = np.zeros((len(x), weight.n), x.dtype)
    for start in range(0, weight.k, 64):
        part = x[:, start : start + 64].astype(np.float32) @ weight.rounded[:, start : start + 64].astype(np.float32).T
        y = (y.astype(np.float32) + part).astype(x.dtype)
    with pytest.raises(AssertionError, match="outputs"):
        check(y, x, weight)
