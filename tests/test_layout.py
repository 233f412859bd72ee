"""Packing is PyTorch's, bit for bit, and unpacking its inverse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jax_int4mm as i4
import oracle
from kernels import Kernel

INNER_K_TILES = pytest.mark.parametrize("inner_k_tiles", cases.INNER_K_TILES)


def as_bytes(q: np.ndarray) -> np.ndarray:
    """PyTorch's input: two values a byte, even k in the high nibble."""
    return q[:, ::2] << 4 | q[:, 1::2]


@pytest.mark.parametrize("name", cases.golden_names())
def test_golden_cases(chosen: Kernel, name: str) -> None:
    golden = cases.golden(name)
    q, inner_k_tiles = golden.weight.q, golden.weight.inner_k_tiles
    np.testing.assert_array_equal(i4.pack_int4(q, inner_k_tiles), golden.packed)
    np.testing.assert_array_equal(i4.pack_int4_bytes(as_bytes(q), inner_k_tiles), golden.packed)
    np.testing.assert_array_equal(i4.unpack_int4(golden.packed), q)


@INNER_K_TILES
@pytest.mark.parametrize("n", [8, 40, 136])
@pytest.mark.parametrize("tiles_k", [1, 2, 7])
def test_every_nibble_is_where_the_formula_puts_it(
    n: int, tiles_k: int, inner_k_tiles: int, rng: np.random.Generator
) -> None:
    q = rng.integers(0, 16, (n, 16 * inner_k_tiles * tiles_k), dtype=np.uint8)
    packed = i4.pack_int4(q, inner_k_tiles)
    assert packed.dtype == jnp.int32
    np.testing.assert_array_equal(packed, oracle.pack(q, inner_k_tiles))
    unpacked = i4.unpack_int4(packed)
    assert unpacked.dtype == jnp.uint8
    np.testing.assert_array_equal(unpacked, q)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint32", "uint4"])
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_any_integer_dtype_packs_alike(where: Any, dtype: str, rng: np.random.Generator) -> None:
    q = rng.integers(0, 16, (8, 128), dtype=np.uint8)
    np.testing.assert_array_equal(i4.pack_int4(where(q.astype(jnp.dtype(dtype)))), oracle.pack(q, 8))


@INNER_K_TILES
def test_it_works_under_jit_and_vmap(inner_k_tiles: int, rng: np.random.Generator) -> None:
    q = rng.integers(0, 16, (3, 16, 256), dtype=np.uint8)
    packed = jax.jit(jax.vmap(lambda q: i4.pack_int4(q, inner_k_tiles)))(q)
    np.testing.assert_array_equal(packed, [oracle.pack(one, inner_k_tiles) for one in q])
    np.testing.assert_array_equal(jax.jit(jax.vmap(i4.unpack_int4))(packed), q)


def test_under_a_trace_only_the_low_four_bits_count(rng: np.random.Generator) -> None:
    q = rng.integers(-128, 128, (8, 128), dtype=np.int8)
    np.testing.assert_array_equal(jax.jit(i4.pack_int4)(q), oracle.pack(q.view(np.uint8) & 15, 8))


@pytest.mark.parametrize("value", [16, 255, -1])
@pytest.mark.parametrize("where", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_a_concrete_value_outside_0_to_15_is_refused(where: Any, value: int) -> None:
    q = np.zeros((8, 128), np.int32)
    q[7, 127] = value
    with pytest.raises(ValueError, match=r"pack_int4: q has values outside 0\.\.15.* by adding 8\."):
        i4.pack_int4(where(q))


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("q", "inner_k_tiles", "error", "message"),
    [
        (np.zeros((8, 128), np.float32), 8, TypeError, r"q has dtype float32; .*quantize\(w\)"),
        ([[0] * 128] * 8, 8, TypeError, "q is a list; it must be a jax or numpy array"),
        (zeros(2, 8, 128), 8, ValueError, r"q has shape \[2, 8, 128\].*jax.vmap"),
        (zeros(12, 128), 8, ValueError, "the weight is n = 12, k = 128; n must be a positive multiple of 8.*Pad"),
        (zeros(8, 64), 8, ValueError, r"the weight is n = 8, k = 64; .*16 \* inner_k_tiles = 128.*Pad"),
        (zeros(0, 128), 8, ValueError, "the weight is n = 0, k = 128; n must be a positive multiple of 8"),
        (zeros(8, 128), 3, ValueError, "inner_k_tiles is 3; it must be 2, 4 or 8"),
        (zeros(8, 128), 16, ValueError, "inner_k_tiles is 16; it must be 2, 4 or 8"),
    ],
)
def test_pack_int4_refuses(q: Any, inner_k_tiles: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^pack_int4: {message}"):
        i4.pack_int4(q, inner_k_tiles)


@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        (np.zeros((8, 64), np.int32), TypeError, "pack_int4_bytes: b has dtype int32; it must be uint8"),
        (zeros(64), ValueError, r"pack_int4_bytes: b has shape \[64\]; it must be \[n, k/2\]"),
        (
            zeros(12, 64),
            ValueError,
            "pack_int4_bytes: the weight is n = 12, k = 128; n must be a positive multiple of 8",
        ),
    ],
)
def test_pack_int4_bytes_refuses(b: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        i4.pack_int4_bytes(b)


@pytest.mark.parametrize(
    ("packed", "error", "message"),
    [
        (np.zeros((1, 1, 32, 4), np.uint32), TypeError, r"packed has dtype uint32; it must be int32.*pack_int4\(q\)"),
        (np.zeros((8, 64), np.int32), ValueError, r"packed has shape \[8, 64\]; .*pack_int4\(q\)"),
        (np.zeros((1, 1, 32, 8), np.int32), ValueError, r"packed has shape \[1, 1, 32, 8\]; .*pack_int4\(q\)"),
    ],
)
def test_unpack_int4_refuses(packed: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^unpack_int4: {message}"):
        i4.unpack_int4(packed)
