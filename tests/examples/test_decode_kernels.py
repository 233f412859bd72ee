"""The kernels of a decoding step against float64, on a GPU or interpreted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decode_kernels

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 8, 2, 64, 300


def as_float64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def normed(x: np.ndarray, weight: Any, unit_offset: bool, eps: float = 1e-6) -> np.ndarray:
    scale = as_float64(weight) + 1 if unit_offset else as_float64(weight)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def random_step(rng: np.random.Generator, batch: int, dtype: str) -> dict[str, Any]:
    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    position = rng.integers(0, LENGTH, batch)
    angles = position[:, None] * 1e4 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return {
        "qkv": normal(batch, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "k_cache": normal(batch, LENGTH, KV_HEADS, HEAD_DIM),
        "v_cache": normal(batch, LENGTH, KV_HEADS, HEAD_DIM),
        "position": jnp.asarray(position, jnp.int32),
        "cos_sin": jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32),
        "qk_norms": (normal(HEAD_DIM), normal(HEAD_DIM)),
        "angles": angles,
    }


def oracle(step: dict[str, Any], window: int | None, softcap: float | None, norms: bool, unit_offset: bool) -> Any:
    """Attention, and the new keys and values, in float64."""
    batch = len(step["position"])
    heads = as_float64(step["qkv"]).reshape(batch, -1, HEAD_DIM)
    q, k, v = np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
    if norms:
        q, k = (normed(x, weight, unit_offset) for x, weight in zip((q, k), step["qk_norms"], strict=True))
    q, k = rotated(q, step["angles"]), rotated(k, step["angles"])
    attended = np.empty((batch, HEADS, HEAD_DIM))
    for row, position in enumerate(np.asarray(step["position"])):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            keys = np.vstack([as_float64(step["k_cache"])[row, first:position, group], k[row, group]])
            values = np.vstack([as_float64(step["v_cache"])[row, first:position, group], v[row, group]])
            scores = keys @ q[row, head] / np.sqrt(HEAD_DIM)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            attended[row, head] = weights @ values / weights.sum()
    return attended.reshape(batch, -1), k, v


@pytest.mark.parametrize("splits", [None, 1, 4, 16])
@pytest.mark.parametrize(
    ("window", "softcap", "norms", "unit_offset"),
    [(None, None, False, False), (70, None, True, False), (1, 5.0, True, True), (None, 2.0, False, False)],
    ids=["plain", "window", "window of one", "softcap"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_attention_of_a_new_position(
    splits: int | None,
    window: int | None,
    softcap: float | None,
    norms: bool,
    unit_offset: bool,
    dtype: str,
    rng: np.random.Generator,
):
    step = random_step(rng, 3, dtype)
    # The first position has none before it; the last one fills the cache.
    step["position"] = step["position"].at[:2].set(jnp.array([0, LENGTH - 1], jnp.int32))
    step["angles"][0] = 0
    step["cos_sin"] = jnp.asarray(np.stack([np.cos(step["angles"]), np.sin(step["angles"])]), jnp.float32)
    expected, new_k, new_v = oracle(step, window, softcap, norms, unit_offset)
    rows, position = np.arange(3), np.asarray(step["position"])
    k_cache, v_cache = (np.array(step[name]) for name in ("k_cache", "v_cache"))
    # What comes later must not be seen.
    for cache in (k_cache, v_cache):
        for row, at in enumerate(position):
            cache[row, at:] = np.nan
    found, k_found, v_found = decode_kernels.attend_step(
        step["qkv"],
        jnp.asarray(k_cache),
        jnp.asarray(v_cache),
        step["position"],
        step["cos_sin"],
        step["qk_norms"] if norms else None,
        heads=HEADS,
        window=window,
        softcap=softcap,
        eps=1e-6,
        unit_offset=unit_offset,
        splits=splits,
    )
    bound = {"bfloat16": 0.01, "float16": 0.002}[dtype]
    assert found.dtype == dtype
    assert np.abs(as_float64(found) - expected).max() < bound * np.abs(expected).max()
    assert np.abs(as_float64(k_found)[rows, position] - new_k).max() < bound * np.abs(new_k).max()
    np.testing.assert_array_equal(as_float64(v_found)[rows, position], new_v)
    for before, after in ((k_cache, k_found), (v_cache, v_found)):
        after = np.array(after)
        after[rows, position] = before[rows, position]
        np.testing.assert_array_equal(as_float64(after), as_float64(before))


def test_the_cache_is_divided_among_as_many_programs_as_are_of_use():
    assert decode_kernels.splits_of(batch=1, kv_heads=8, length=1216) == 16
    assert decode_kernels.splits_of(batch=1, kv_heads=8, length=100_000) == 16
    assert decode_kernels.splits_of(batch=16, kv_heads=8, length=1216) == 1
    assert decode_kernels.splits_of(batch=4, kv_heads=8, length=1216) == 4
    assert decode_kernels.splits_of(batch=1, kv_heads=1, length=10) == 1


@pytest.mark.parametrize("hidden", [64, 200])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("output_norm", [False, True])
def test_residual_sum_and_norm(hidden: int, unit_offset: bool, output_norm: bool, rng: np.random.Generator):
    x, y = (jnp.asarray(rng.normal(size=(3, hidden)), jnp.bfloat16) for _ in range(2))
    weight, y_weight = (jnp.asarray(rng.normal(size=hidden), jnp.bfloat16) for _ in range(2))
    total, h = decode_kernels.add_norm(
        x, y, weight, y_weight if output_norm else None, eps=1e-6, unit_offset=unit_offset
    )
    added = normed(as_float64(y), y_weight, unit_offset) if output_norm else as_float64(y)
    exact = as_float64(x) + added
    assert np.abs(as_float64(total) - exact).max() < 0.01 * np.abs(exact).max()
    expected = normed(as_float64(total), weight, unit_offset)
    assert np.abs(as_float64(h) - expected).max() < 0.01 * np.abs(expected).max()


def test_which_steps_they_serve():
    assert decode_kernels.serve(jnp.bfloat16, 128) == (jax.default_backend() == "gpu" and len(jax.devices()) == 1)
    assert not decode_kernels.serve(jnp.float32, 128)
    assert not decode_kernels.serve(jnp.bfloat16, 96)
