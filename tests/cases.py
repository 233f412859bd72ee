"""Weights and activations to test with: the golden ones that PyTorch made, and fresh random ones."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib

import ml_dtypes
import numpy as np

import oracle

GOLDEN_FOLDER = pathlib.Path(__file__).parent / "data" / "golden"
GROUP_SIZES = (32, 64, 128, 256)
INNER_K_TILES = (2, 4, 8)
DTYPES = (oracle.BFLOAT16, oracle.FLOAT16)

# Around every tile edge of every kernel, and far beyond the largest tile.
M = (0, 1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 128, 255, 257, 1000)
# Multiples of 8 that fill no kernel's tile, and one that fills all.
N = (8, 24, 40, 136, 128)


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """An int4 weight before and after packing, and its dense forms, all by the oracle."""

    q: np.ndarray  # uint8 [n, k]
    scales_and_zeros: np.ndarray  # [k/group_size, n, 2]
    group_size: int
    inner_k_tiles: int

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def k(self) -> int:
        return self.q.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.scales_and_zeros.dtype

    @functools.cached_property
    def packed(self) -> np.ndarray:
        return oracle.pack(self.q, self.inner_k_tiles)

    @functools.cached_property
    def rounded(self) -> np.ndarray:
        return oracle.rounded_weight(self.q, self.scales_and_zeros, self.group_size)

    @functools.cached_property
    def unrounded(self) -> np.ndarray:
        return oracle.unrounded_weight(self.q, self.scales_and_zeros, self.group_size)

    def dense(self, weights: str) -> np.ndarray:
        """The weight [n, k] of a kernel that calls its weights "rounded" or "exact"."""
        return {"rounded": self.rounded, "exact": self.unrounded}[weights]


@dataclasses.dataclass(frozen=True, eq=False)
class Golden:
    """One case of PyTorch's CUDA op: its packed bytes, and activations and results by m."""

    weight: Weight
    packed: np.ndarray
    dequantized_kn: np.ndarray
    x: dict[int, np.ndarray]
    y: dict[int, np.ndarray]


def golden_names() -> list[str]:
    """The name, <file>/<case>, of every golden case."""
    names = []
    for path in sorted(GOLDEN_FOLDER.glob("*.npz")):
        with np.load(path) as file:
            names += sorted({f"{path.stem}/{key.split('/')[0]}" for key in file.files})
    return names


@functools.cache
def golden(name: str) -> Golden:
    """A golden case by its name, "<file>/n<n>_k<k>_g<group_size>_i<inner_k_tiles>"."""
    stem, case = name.split("/")
    with np.load(GOLDEN_FOLDER / f"{stem}.npz") as file:
        arrays = {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(f"{case}/")}
    _, _, group_size, inner_k_tiles = (int(part[1:]) for part in case.split("_"))
    floats = {key: array.view(oracle.BFLOAT16) for key, array in arrays.items() if array.dtype == np.uint16}
    weight = Weight(arrays["q"], floats["scales_and_zeros"], group_size, inner_k_tiles)
    m = [int(key[1:-2]) for key in floats if key.endswith("/x")]
    return Golden(
        weight,
        arrays["packed"],
        floats["dequant_kn"],
        {rows: floats[f"m{rows}/x"] for rows in m},
        {rows: floats[f"m{rows}/y"] for rows in m},
    )


@functools.cache
def double_rounding_traps(dtype: np.dtype) -> np.ndarray:
    """(scale, zero) [count, 2], float64, whose weight goes wrong for some q if the sum is first rounded to float32.

    All pairs of 1 <= scale < 2 whose zero is near the last bit of the float32 sum.
    """
    one = 1 << ml_dtypes.finfo(dtype).nmant
    significands = np.arange(one, 2 * one) / one
    traps = []
    for exponent in (-10, -11, -12) if dtype == oracle.FLOAT16 else (-21, -22, -23, -24):
        scale, zero = np.meshgrid(significands, significands * 2.0**exponent, indexing="ij")
        wrong = np.zeros(scale.shape, bool)
        for centred in (-7, -5, -3, -1, 1, 3, 5, 7):
            # Significands of 14 and 11 bits, 24 bits apart at most: float64 holds the sum.
            total = centred * scale + zero
            wrong |= oracle.round_once(total, dtype) != total.astype(np.float32).astype(dtype)
        traps.append(np.stack([scale[wrong], zero[wrong]], axis=-1))
    return np.concatenate(traps)


def random_scales_and_zeros(
    rng: np.random.Generator, n: int, k: int, group_size: int, dtype: np.dtype = oracle.BFLOAT16
) -> np.ndarray:
    """Scales of both signs and exactly 0, zeros up to 8 |scale| and exactly 0: the range of the signed golden file."""
    shape = (k // group_size, n)
    scale = rng.normal(0, 0.02, shape)
    scale[rng.random(shape) < 0.02] = 0
    zero = rng.uniform(-8, 8, shape) * scale
    zero[rng.random(shape) < 0.25] = 0
    return oracle.round_once(np.stack([scale, zero], axis=-1), dtype)


def with_double_rounding_traps(rng: np.random.Generator, scales_and_zeros: np.ndarray) -> np.ndarray:
    """The same with half of them replaced by pairs for which it shows whether the weight is rounded once."""
    dtype, shape = scales_and_zeros.dtype, scales_and_zeros.shape[:-1]
    float16 = dtype == oracle.FLOAT16
    known = rng.choice(double_rounding_traps(dtype), shape)
    known *= 2.0 ** rng.integers(-1 if float16 else -8, 3, (*shape, 1))
    # Zeros that a sum in float32 loses altogether, down to float16's smallest number.
    lost = np.stack([rng.uniform(1, 4, shape), 2.0 ** rng.integers(-24 if float16 else -60, -20, shape)], axis=-1)
    traps = oracle.round_once(np.where(rng.random((*shape, 1)) < 0.5, known, lost), dtype)
    traps *= rng.choice([-1, 1], traps.shape).astype(dtype)
    return np.where(rng.random((*shape, 1)) < 0.5, traps, scales_and_zeros)


def random_weight(
    rng: np.random.Generator,
    n: int,
    k: int,
    group_size: int = 128,
    inner_k_tiles: int = 8,
    dtype: np.dtype = oracle.BFLOAT16,
) -> Weight:
    q = rng.integers(0, 16, (n, k), dtype=np.uint8)
    return Weight(q, random_scales_and_zeros(rng, n, k, group_size, dtype), group_size, inner_k_tiles)


def random_x(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype = oracle.BFLOAT16) -> np.ndarray:
    """Normal activations with the outliers that language models have: one in 500 is up to 100 times larger."""
    x = rng.normal(0, 1, shape)
    outliers = rng.random(shape) < 0.002
    x[outliers] *= rng.uniform(10, 100, shape)[outliers]
    return oracle.round_once(x, dtype)


def legal_k(group_size: int, inner_k_tiles: int, at_most: int) -> list[int]:
    """Every k of this group size and inner_k_tiles up to ``at_most``."""
    step = math.lcm(group_size, 16 * inner_k_tiles)
    return list(range(step, at_most + 1, step))


FORMATS = list(itertools.product(DTYPES, GROUP_SIZES, INNER_K_TILES))
