"""Layers of int4 as files store them, and what reading one has to give: what the tests of the readers share.

The words are unpacked here by the formulas of docs/format.md; nothing is taken from the readers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

import jax_int4mm as i4
import oracle
from oracle import BFLOAT16, FLOAT16

MODULE = "model.layers.0.mlp.up_proj"
WEIGHT = f"{MODULE}.weight"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight [n, k]: w = (q - 8) * scale + zero.

    Attributes:
      q: uint8 [n, k], 0..15.
      scale: [n, groups], in the dtype that it is stored in.
      zero: float64 [n, groups], exact.
      group: [k], the group of each k.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group: np.ndarray

    @property
    def exact(self) -> np.ndarray:
        """The weight as float64 [n, k]."""
        scale, zero = self.scale.astype(np.float64)[:, self.group], self.zero[:, self.group]
        return (self.q.astype(np.float64) - 8) * scale + zero

    def with_zero_point(self, zero_point: np.ndarray) -> Layer:
        """w = (q - zero_point) * scale."""
        return dataclasses.replace(self, zero=(8 - zero_point.astype(np.float64)) * self.scale.astype(np.float64))


def random_layer(rng: np.random.Generator, n: int, k: int, group_size: int, dtype: np.dtype | type = FLOAT16) -> Layer:
    """A layer without zeros, with scales of both signs."""
    groups = -(-k // group_size)
    scale = (rng.uniform(0.001, 0.01, (n, groups)) * rng.choice([-1, 1], (n, groups))).astype(dtype)
    q = rng.integers(0, 16, (n, k), np.uint8)
    return Layer(q, scale, np.zeros((n, groups)), np.arange(k) // group_size)


def random_zero_points(rng: np.random.Generator, layer: Layer) -> np.ndarray:
    """Integers 0..15 [n, groups], every one of them somewhere."""
    size = layer.scale.size
    return rng.permutation(np.arange(size) % 16).reshape(layer.scale.shape).astype(np.uint8)


def read_off(w4: i4.Int4Weight) -> Layer:
    """q, scale and zero of each value of a weight, from its words, in the order of k of the matrix it stands for."""
    words, pairs = np.asarray(w4.packed).view(np.uint32), np.asarray(w4.scales_and_zeros)
    tile_k = 16 * w4.inner_k_tiles
    n, k = np.indices((words.shape[0] * 8, words.shape[1] * tile_k))
    word = words[n // 8, k // tile_k, 4 * (n % 8) + k // 2 % 4, k % tile_k // 32]
    bit = 16 * (k % 2) + 8 * (k // 16 % 2) + 4 * (k // 8 % 2)
    q = (word >> bit.astype(np.uint32) & 15).astype(np.uint8)
    assert np.all(q[w4.n :] == 8), "padding of n"
    assert np.all(q[:, w4.k :] == 8), "padding of k"
    assert np.all(pairs[:, w4.n :] == 0), "padding of n"
    assert np.all(pairs[-(-w4.k // w4.group_size) :] == 0), "padding of k"
    perm = np.arange(w4.k) if w4.perm is None else np.asarray(w4.perm)
    order = np.argsort(perm)
    scale, zero = pairs[np.arange(w4.k) // w4.group_size, : w4.n].transpose(2, 1, 0)
    return Layer(q[: w4.n, order], scale[:, order], zero[:, order].astype(np.float64), np.arange(w4.k))


def check(w4: object, layer: Layer, dtype: np.dtype | None = None) -> None:
    """Whether a weight is a layer to the last bit, but for scale and zero, each rounded once to dtype."""
    assert isinstance(w4, i4.Int4Weight)
    if dtype is None:
        dtype = layer.scale.dtype if layer.scale.dtype in (BFLOAT16, FLOAT16) else BFLOAT16
    assert w4.dtype == dtype
    assert w4.shape == layer.q.T.shape
    found = read_off(w4)
    np.testing.assert_array_equal(found.q, layer.q)
    scale, zero = layer.scale.astype(np.float64)[:, layer.group], layer.zero[:, layer.group]
    np.testing.assert_array_equal(found.scale, oracle.round_once(scale, dtype))
    # What float32 does not hold has been rounded to float32 before.
    in_float32 = zero.astype(np.float32) == zero
    np.testing.assert_array_equal(found.zero[in_float32], oracle.round_once(zero, dtype).astype(np.float64)[in_float32])
    half_an_ulp = 0.5 * oracle.ulp(zero, dtype)
    assert np.all(np.abs(found.zero - zero) <= (1 + 2.0**-10) * half_an_ulp)

    dense = np.asarray(w4.dequantize()).T
    assert dense.dtype == dtype
    np.testing.assert_array_equal(dense, oracle.round_once(found.exact, dtype))
    # From the exact weight it is one rounding of the scale, one of the zero and one of their sum away.
    error = np.abs(dense.astype(np.float64) - layer.exact)
    of_scale = np.where(layer.scale.dtype == dtype, 0, 0.5 * oracle.ulp(scale, dtype))
    of_sum = 0.5 * oracle.ulp(np.maximum(np.abs(layer.exact), np.abs(dense.astype(np.float64))), dtype)
    steps = np.abs(layer.q.astype(np.float64) - 8)
    assert np.all(error <= steps * of_scale + (1 + 2.0**-10) * half_an_ulp * (zero != 0) + of_sum)
    if layer.scale.dtype == dtype and not zero.any():
        np.testing.assert_array_equal(dense, oracle.round_once(layer.exact, dtype))


def save(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    settings: object = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes model.safetensors and, unless settings is None, a config.json with it as the quantization_config."""
    contiguous = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, directory / "model.safetensors", metadata and dict(metadata))
    if settings is not None:
        (directory / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return directory
