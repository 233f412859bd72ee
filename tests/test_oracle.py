"""The oracle against exact rational arithmetic and against what PyTorch's CUDA op gave."""

from __future__ import annotations

from fractions import Fraction

import jax
import ml_dtypes
import numpy as np
import pytest

import acceptance
import cases
import oracle


def round_rational(value: Fraction, dtype: np.dtype) -> float:
    """``value`` to the nearest number of ``dtype``, ties to even, in integers."""
    info = ml_dtypes.finfo(dtype)
    if value == 0:
        return 0.0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    spacing = Fraction(2) ** (max(exponent, info.minexp) - info.nmant)
    return float(round(value / spacing) * spacing)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_round_once_is_exact_at_and_around_every_kind_of_midpoint(dtype: np.dtype, rng: np.random.Generator) -> None:
    numbers = rng.integers(0, 0x7000, 500, dtype=np.uint16).view(dtype).astype(np.float64)
    midpoints = numbers + oracle.ulp(numbers, dtype) / 2
    values = np.concatenate([numbers, midpoints, np.nextafter(midpoints, 0), np.nextafter(midpoints, np.inf)])
    values = np.concatenate([values, -values])
    expected = [round_rational(Fraction(value), dtype) for value in values]
    np.testing.assert_array_equal(oracle.round_once(values, dtype).astype(np.float64), expected)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_weight_is_rounded_once_however_small_the_zero(dtype: np.dtype, rng: np.random.Generator) -> None:
    assert len(cases.double_rounding_traps(dtype)) > 100
    ordinary = cases.random_scales_and_zeros(rng, 1000, 32, 32, dtype)
    scales_and_zeros = cases.with_double_rounding_traps(rng, ordinary)
    q = rng.integers(0, 16, (1000, 32), dtype=np.uint8)

    expected = [
        [round_rational((int(value) - 8) * Fraction(float(scale)) + Fraction(float(zero)), dtype) for value in row]
        for row, (scale, zero) in zip(q, scales_and_zeros[0], strict=True)
    ]
    got = oracle.rounded_weight(q, scales_and_zeros, 32)
    np.testing.assert_array_equal(got.astype(np.float64), expected)


@pytest.mark.parametrize("name", cases.golden_names())
def test_the_oracle_packs_and_dequantizes_as_pytorch_does(name: str) -> None:
    golden = cases.golden(name)
    np.testing.assert_array_equal(golden.weight.packed, golden.packed)
    np.testing.assert_array_equal(golden.weight.rounded.T.astype(np.float32), golden.dequantized_kn.astype(np.float32))


@pytest.mark.parametrize("name", cases.golden_names())
def test_pytorchs_own_products_are_accepted(name: str) -> None:
    golden = cases.golden(name)
    device = None if golden.weight.k <= acceptance.SHORT_SUM else jax.devices("cpu")[0]
    acceptance.check(list(golden.y.values()), list(golden.x.values()), golden.weight.rounded, device)
