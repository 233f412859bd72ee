"""dequantize gives the weight that rounded kernels multiply by, bit for bit."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import cases
import jax_int4mm as i4
from kernels import Kernel


@pytest.mark.parametrize("name", cases.golden_names())
def test_golden_cases(chosen: Kernel, name: str) -> None:
    golden = cases.golden(name)
    w = i4.dequantize(golden.packed, golden.weight.scales_and_zeros, golden.weight.group_size)
    # Values: PyTorch's were read off by a product, in which a weight of -0 becomes +0.
    np.testing.assert_array_equal(np.asarray(w, np.float32).T, golden.dequantized_kn.astype(np.float32))


@pytest.mark.parametrize(("dtype", "group_size", "inner_k_tiles"), cases.FORMATS, ids=str)
def test_random_weights_are_rounded_once(
    chosen: Kernel, dtype: np.dtype, group_size: int, inner_k_tiles: int, rng: np.random.Generator
) -> None:
    weight = cases.random_weight(rng, 136, 1024, group_size, inner_k_tiles, dtype)
    traps = cases.with_double_rounding_traps(rng, weight.scales_and_zeros)
    weight = dataclasses.replace(weight, scales_and_zeros=traps)
    arguments = weight.packed, weight.scales_and_zeros
    w = np.asarray(i4.dequantize(*arguments, group_size))
    assert w.dtype == dtype
    np.testing.assert_array_equal(w.astype(np.float32), weight.rounded.astype(np.float32))
    traced = jax.jit(i4.dequantize, static_argnums=2)(*arguments, group_size)
    assert np.asarray(traced).tobytes() == w.tobytes()


def test_it_maps_over_stacked_weights(chosen: Kernel, rng: np.random.Generator) -> None:
    weights = [cases.random_weight(rng, 16, 256) for _ in range(3)]
    packed = np.stack([weight.packed for weight in weights])
    scales_and_zeros = np.stack([weight.scales_and_zeros for weight in weights])
    w = np.asarray(jax.vmap(i4.dequantize)(packed, scales_and_zeros))
    np.testing.assert_array_equal(w, np.stack([weight.rounded for weight in weights]))
