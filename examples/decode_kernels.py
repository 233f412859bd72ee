"""Pallas kernels for the small operations of one decoding step on an NVIDIA GPU, where launches cost more than work.

Between two products of a layer XLA would run up to nine kernels of a few microseconds each. Here are `add_norm`, the
residual sum and the norm after it, and `attend_step`, which normalises, rotates and stores the new keys and attends to
the cache, divided over the GPU as in Flash-Decoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html). On other
platforms Pallas interprets them: slowly, for tests.

They stand on Pallas' Triton backend, which jax 0.10 to 0.12 have and 0.11.2 calls deprecated.

Tried on an H200 and slower: the last program to arrive combines the parts (by 2 us a layer, against a second launch),
and the first block's loads ahead of everything else (by 2 us).
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plgpu
import jax.numpy as jnp
from jax.typing import DTypeLike

warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

BLOCK = 64  # Positions of the cache that a program reads at a time.
DOT_ROWS = 16  # The fewest rows of a product on tensor cores.
PROGRAMS = 128  # As many programs as keep an H200's 132 multiprocessors busy.


def serve(dtype: DTypeLike, head_dim: int) -> bool:
    """Whether a step with heads of this size runs on these kernels here.

    They are for one NVIDIA GPU and 16 bits.
    """
    devices = jax.devices()
    if len(devices) > 1 or devices[0].platform != "gpu" or "nvidia" not in devices[0].device_kind.lower():
        return False
    if hasattr(plgpu, "get_gpu_info"):  # Of jax 0.12, whose Pallas asks for GPUs that it knows by name.
        try:
            plgpu.get_gpu_info()
        except ValueError:
            return False
    return jnp.dtype(dtype).itemsize == 2 and head_dim in (64, 128, 256)


def _call(kernel: Any, name: str, num_warps: int, **arguments: Any) -> Any:
    return pl.pallas_call(
        kernel,
        name=name,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=3),
        interpret=jax.default_backend() != "gpu",
        **arguments,
    )


def _scaled(normalised: jax.Array, weight: jax.Array, dtype: DTypeLike, unit_offset: bool) -> jax.Array:
    """Normalised f32 values times the weight of the norm, rounded as `decoder.rms_norm` does."""
    if unit_offset:
        return (normalised * (1 + weight.astype(jnp.float32))).astype(dtype)
    return weight * normalised.astype(dtype)


# --- residual sum and norm ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("eps", "unit_offset"))
def add_norm(
    x: jax.Array, y: jax.Array, weight: jax.Array, y_weight: jax.Array | None = None, *, eps: float, unit_offset: bool
) -> tuple[jax.Array, jax.Array]:
    """The sum s = x + y of x and y [rows, hidden], and s normalised by its root mean square with weight [hidden].

    With `y_weight` y is normalised first. Arithmetic and rounding are those of `decoder.rms_norm`.
    """
    rows, hidden = x.shape
    block = pl.next_power_of_2(hidden)

    def norm(values: jax.Array, weight: jax.Array) -> jax.Array:
        wide = values.astype(jnp.float32)
        mean = jnp.sum(wide * wide) / hidden
        return _scaled(wide * jax.lax.rsqrt(mean + eps), weight, values.dtype, unit_offset)

    def kernel(*refs: Any) -> None:
        *in_refs, sum_ref, normed_ref = refs
        inside = jnp.arange(block) < hidden
        x, y, *weights = (plgpu.load(ref, mask=inside, other=0) for ref in in_refs)
        if len(weights) == 2:
            y = norm(y, weights[1])
        total = x + y
        plgpu.store(sum_ref, total, mask=inside)
        plgpu.store(normed_ref, norm(total, weights[0]), mask=inside)

    weights = [weight] if y_weight is None else [weight, y_weight]
    of_row, of_all = pl.BlockSpec((None, block), lambda row: (row, 0)), pl.BlockSpec((block,), lambda _: (0,))
    return _call(
        kernel,
        "add_norm",
        num_warps=8,
        grid=(rows,),
        in_specs=[of_row, of_row] + [of_all] * len(weights),
        out_specs=(of_row, of_row),
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2,
    )(x, y, *weights)


# --- attention of one new position -------------------------------------------------------------------------------


def splits_of(batch: int, kv_heads: int, length: int) -> int:
    """Into how many parts, a power of two, the positions of a cache of `length` are divided."""
    wanted = min(PROGRAMS // (batch * kv_heads), length // BLOCK)
    return 1 << max(0, wanted.bit_length() - 1)


@functools.partial(
    jax.jit,
    static_argnames=("heads", "scale", "window", "softcap", "eps", "unit_offset", "splits"),
    donate_argnames=("k_cache", "v_cache"),
)
def attend_step(
    qkv: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    position: jax.Array,
    cos_sin: jax.Array,
    qk_norms: tuple[jax.Array, jax.Array] | None = None,
    *,
    heads: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    eps: float = 0.0,
    unit_offset: bool = False,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one new position in each row of a batch, which joins the cache.

    Args:
      qkv: [batch, (heads + 2 * kv_heads) * head_dim], the new queries, keys and values as the projections give them.
      k_cache: [batch, length, kv_heads, head_dim] of qkv's dtype.
      v_cache: likewise.
      position: int32 [batch], of the new position; the ones before it are attended to, and itself.
      cos_sin: f32 [2, batch, head_dim / 2] of the angles that queries and keys are rotated by.
      qk_norms: the weights [head_dim] of the norms of queries and keys, which come before the rotation.
      heads: of the queries.
      scale: of the scores; None for 1 / sqrt(head_dim).
      window: positions that are attended to, the new one included; None for all.
      softcap: scores s become softcap * tanh(s / softcap).
      eps: of the norms.
      unit_offset: the norms multiply by 1 + weight.
      splits: a power of two, `splits_of` the cache if None.

    Returns:
      [batch, heads * head_dim], and both caches with the new position.
    """
    batch, length, kv_heads, head_dim = k_cache.shape
    group, half = heads // kv_heads, head_dim // 2
    rows = max(DOT_ROWS, pl.next_power_of_2(group))
    splits = splits_of(batch, kv_heads, length) if splits is None else splits
    scale = head_dim**-0.5 if scale is None else scale
    dtype = qkv.dtype

    def capped(scores: jax.Array) -> jax.Array:
        scores = scores * scale
        return scores if softcap is None else softcap * jnp.tanh(scores / softcap)

    def kernel(*refs: Any) -> None:
        qkv_ref, k_ref, v_ref, position_ref, cos_sin_ref, *norm_refs = refs[: len(operands)]
        new_k_ref, new_v_ref, *out_refs = refs[len(operands) :]
        row, head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        halves = (pl.ds(0, half), pl.ds(half, half))
        at = jnp.minimum(position_ref[row], length - 1)

        def rotated(first: jax.Array, second: jax.Array, norm_ref: Any) -> tuple[jax.Array, jax.Array]:
            first, second = first.astype(jnp.float32), second.astype(jnp.float32)
            if norm_ref is not None:
                squares = jnp.sum(first * first, -1) + jnp.sum(second * second, -1)
                inverse = jax.lax.rsqrt(squares / head_dim + eps)[..., None]
                first, second = (
                    _scaled(part * inverse, norm_ref[columns], dtype, unit_offset).astype(jnp.float32)
                    for part, columns in zip((first, second), halves, strict=True)
                )
            cos, sin = (cos_sin_ref[i, row, pl.ds(0, half)] for i in (0, 1))
            return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)

        q_norm_ref, k_norm_ref = norm_refs or (None, None)
        is_head = (jnp.arange(rows) < group)[:, None]
        query_rows = pl.ds(head * group, rows)
        q = rotated(
            *(plgpu.load(qkv_ref.at[row, query_rows, part], mask=is_head, other=0) for part in halves), q_norm_ref
        )
        new_k = rotated(*(qkv_ref[row, pl.ds(heads + head, 1), part] for part in halves), k_norm_ref)
        new_v = qkv_ref[row, pl.ds(heads + kv_heads + head, 1), pl.ds(0, head_dim)]

        # The first part holds the new position too.
        holds_new = split == 0
        for part, value in zip(halves, new_k, strict=True):
            plgpu.store(new_k_ref.at[row, pl.ds(at, 1), head, part], value, mask=jnp.full((1, half), holds_new))
        plgpu.store(
            new_v_ref.at[row, pl.ds(at, 1), head, pl.ds(0, head_dim)], new_v, mask=jnp.full((1, head_dim), holds_new)
        )
        new_score = capped(
            sum(jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1) for a, b in zip(q, new_k, strict=True))
        )
        best = jnp.where(holds_new, new_score, -jnp.inf)
        total = jnp.where(holds_new, jnp.ones_like(new_score), 0.0)
        mixed = jnp.where(holds_new, jnp.broadcast_to(new_v.astype(jnp.float32), (rows, head_dim)), 0.0)

        first = 0 if window is None else jnp.maximum(at - window + 1, 0)
        share = pl.cdiv(pl.cdiv(at - first, splits), BLOCK) * BLOCK
        begin = first + split * share
        end = jnp.minimum(begin + share, at)

        def block(index: jax.Array, carry: Any) -> Any:
            best, total, mixed = carry
            start = begin + index * BLOCK
            positions = pl.ds(start, BLOCK)
            visible = start + jnp.arange(BLOCK) < end
            mask = visible[:, None]
            keys = [plgpu.load(k_ref.at[row, positions, head, part], mask=mask, other=0) for part in halves]
            values = plgpu.load(v_ref.at[row, positions, head, pl.ds(0, head_dim)], mask=mask, other=0)
            scores = capped(sum(plgpu.dot(a, b.T) for a, b in zip(q, keys, strict=True)))
            scores = jnp.where(visible[None], scores, -jnp.inf)
            higher = jnp.maximum(best, jnp.max(scores, axis=-1))
            weights, correction = jnp.exp(scores - higher[:, None]), jnp.exp(best - higher)
            mixed = mixed * correction[:, None] + plgpu.dot(weights.astype(dtype), values)
            return higher, total * correction + jnp.sum(weights, axis=-1), mixed

        blocks = pl.cdiv(jnp.maximum(end - begin, 0), BLOCK)
        best, total, mixed = jax.lax.fori_loop(0, blocks, block, (best, total, mixed))
        columns = pl.ds(0, head_dim)
        if splits == 1:
            (out_ref,) = out_refs
            plgpu.store(out_ref.at[row, query_rows, columns], (mixed / total[:, None]).astype(dtype), mask=is_head)
        else:
            mixed_ref, best_ref, total_ref = out_refs
            plgpu.store(mixed_ref.at[row, split, query_rows, columns], mixed, mask=is_head)
            plgpu.store(best_ref.at[row, split, query_rows], best, mask=is_head[:, 0])
            plgpu.store(total_ref.at[row, split, query_rows], total, mask=is_head[:, 0])

    operands = [qkv.reshape(batch, heads + 2 * kv_heads, head_dim), k_cache, v_cache, position, cos_sin]
    operands += qk_norms or ()
    caches = [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in (k_cache, v_cache)]
    if splits == 1:
        results = [jax.ShapeDtypeStruct((batch, heads, head_dim), dtype)]
    else:
        parts = (batch, splits, heads)
        results = [jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32)]
        results += [jax.ShapeDtypeStruct(parts, jnp.float32)] * 2
    k_cache, v_cache, *results = _call(
        kernel,
        "attend_step",
        num_warps=4,
        grid=(batch, kv_heads, splits),
        out_shape=caches + results,
        input_output_aliases={1: 0, 2: 1},
    )(*operands)
    attended = results[0] if splits == 1 else _combined(*results, dtype)
    return attended.reshape(batch, heads * head_dim), k_cache, v_cache


def _combined(mixed: jax.Array, best: jax.Array, total: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Attention [batch, heads, head_dim] from that of the parts, [batch, splits, heads, ...].

    `total` is the sum of a part's weights, exp(score - best), and `mixed` the sum of its values with these weights.
    """
    batch, splits, heads, head_dim = mixed.shape

    def kernel(mixed_ref: Any, best_ref: Any, total_ref: Any, out_ref: Any) -> None:
        row, head = pl.program_id(0), pl.program_id(1)
        all_splits, columns = pl.ds(0, splits), pl.ds(0, head_dim)
        best = best_ref[row, all_splits, head]
        weights = jnp.exp(best - jnp.max(best))
        total = jnp.sum(weights * total_ref[row, all_splits, head])
        sums = jnp.sum(weights[:, None] * mixed_ref[row, all_splits, head, columns], axis=0)
        out_ref[row, head, columns] = (sums / total).astype(dtype)

    shape = jax.ShapeDtypeStruct((batch, heads, head_dim), dtype)
    return _call(kernel, "attend_combine", num_warps=4, grid=(batch, heads), out_shape=shape)(mixed, best, total)
