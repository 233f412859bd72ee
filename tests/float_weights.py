"""Float matrices to quantise, and what is stored of them."""

from __future__ import annotations

import numpy as np

import jax_int4mm as i4

# [k, n] float32 weights of every kind: name -> sample.
DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.normal(0, 0.02, shape),
    "heavy-tailed": lambda rng, shape: 0.02 * rng.standard_t(3, shape),
    "positive": lambda rng, shape: rng.uniform(1, 1.5, shape),
    "negative": lambda rng, shape: rng.uniform(-300, -299, shape),
    "constant": lambda rng, shape: np.broadcast_to(rng.normal(0, 1, shape[1]), shape),
    "zero": lambda rng, shape: np.zeros(shape),
    "one value in 32": lambda rng, shape: rng.normal(0, 1, shape) * (np.arange(shape[0])[:, None] % 32 == 5),
    "tiny": lambda rng, shape: rng.normal(0, 1e-7, shape),
    "huge": lambda rng, shape: rng.uniform(-3e4, 3e4, shape),
}


def sample(distribution: str, rng: np.random.Generator, k: int, n: int) -> np.ndarray:
    """One of DISTRIBUTIONS, [k, n] float32."""
    return DISTRIBUTIONS[distribution](rng, (k, n)).astype(np.float32)


def stored(w4: i4.Int4Weight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [n, k/group_size, group_size], scale and zero [n, k/group_size, 1], in float64, of a weight without padding."""
    q = np.asarray(i4.unpack_int4(w4.packed), np.float64).reshape(w4.n, -1, w4.group_size)
    scale, zero = np.asarray(w4.scales_and_zeros, np.float64).transpose(2, 1, 0)[..., None]
    return q, scale, zero
