"""The product, by every implementation, against float64."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import acceptance
import cases
import jax_int4mm as i4
from jax_int4mm.ops import _ffi
from kernels import CUDA_IMPLEMENTATIONS, Kernel, int4_weight, run_twice_on_poison

FORMATS = pytest.mark.parametrize(("dtype", "group_size", "inner_k_tiles"), cases.FORMATS, ids=str)


def assert_right(kernel: Kernel, xs: list[np.ndarray], weight: cases.Weight, device: jax.Device | None) -> None:
    if not kernel.takes(weight):
        pytest.skip(f"{kernel} is documented not to take {weight.dtype}, inner_k_tiles = {weight.inner_k_tiles}")
    kernel.check(kernel.multiply(xs, weight), xs, weight, device)


@pytest.mark.parametrize("name", cases.golden_names())
def test_golden_cases(kernel: Kernel, name: str) -> None:
    golden = cases.golden(name)
    device = None if golden.weight.k <= acceptance.SHORT_SUM else kernel.device
    assert_right(kernel, list(golden.x.values()), golden.weight, device)


@FORMATS
def test_every_m_on_random_weights(
    kernel: Kernel, dtype: np.dtype, group_size: int, inner_k_tiles: int, rng: np.random.Generator
) -> None:
    n = int(rng.choice(cases.N))
    k = int(rng.choice(cases.legal_k(group_size, inner_k_tiles, acceptance.SHORT_SUM)))
    weight = cases.random_weight(rng, n, k, group_size, inner_k_tiles, dtype)
    assert_right(kernel, [cases.random_x(rng, (m, k), dtype) for m in cases.M], weight, kernel.device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("n", cases.N)
def test_every_n_and_long_sums(kernel: Kernel, dtype: np.dtype, n: int, rng: np.random.Generator) -> None:
    k = int(rng.choice(cases.legal_k(256, 8, 16 * acceptance.SHORT_SUM)[4:]))
    weight = cases.random_weight(rng, n, k, int(rng.choice(cases.GROUP_SIZES)), 8, dtype)
    assert_right(kernel, [cases.random_x(rng, (m, k), dtype) for m in (1, 17, 129)], weight, kernel.device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_more_tiles_than_a_gpu_has_multiprocessors(kernel: Kernel, dtype: np.dtype, rng: np.random.Generator) -> None:
    # At least 147 tiles of any size: a CTA that takes several in turn has to keep its place in them.
    weight = cases.random_weight(rng, 6152, 256, 64, 8, dtype)
    assert_right(kernel, [cases.random_x(rng, (m, 256), dtype) for m in (40, 701)], weight, kernel.device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("tile", [name for name in CUDA_IMPLEMENTATIONS if name.startswith("hopper/")])
def test_a_last_wave_of_few_tiles(tile: str, dtype: np.dtype, rng: np.random.Generator) -> None:
    # Three tiles more than there are multiprocessors: the kernel divides those by rows.
    kernel = Kernel("cuda", tile)
    rows, tokens = map(int, tile.removeprefix("hopper/").split("x"))
    weight = cases.random_weight(rng, rows * (kernel.device.core_count + 3) - 72, 384, 32, 8, dtype)
    assert_right(kernel, [cases.random_x(rng, (tokens - 3, 384), dtype)], weight, kernel.device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(("split_k", "tiles"), [(8, 2), (4, 13), (2, 29)])
@pytest.mark.parametrize("tile", [name for name in CUDA_IMPLEMENTATIONS if name.startswith("hopper/")])
def test_ctas_that_divide_k(tile: str, split_k: int, tiles: int, dtype: np.dtype, rng: np.random.Generator) -> None:
    # Nine steps of 128, so that one CTA has a step more. For 13 tiles there is no room in clusters of 8 CTAs, for 29
    # none in clusters of 4.
    kernel = Kernel("cuda", tile)
    rows, tokens = map(int, tile.removeprefix("hopper/").split("x"))
    weight = cases.random_weight(rng, rows * tiles - 40, 1152, 128, 8, dtype)
    xs = [cases.random_x(rng, (m, weight.k), dtype) for m in (tokens, tokens - 5)]
    explanation = i4.explain(xs[0].shape, int4_weight(weight), kernel.device, tile)
    assert f"each by {split_k} CTAs that divide k" in explanation.reason
    assert_right(kernel, xs, weight, kernel.device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_result_in_f32_is_the_sum_before_its_rounding(
    kernel: Kernel, dtype: np.dtype, rng: np.random.Generator
) -> None:
    # Tails in every dimension, and for most tiles several waves or parts of k.
    weight = cases.random_weight(rng, 1032, 1152, int(rng.choice([32, 128])), 8, dtype)
    if not kernel.takes(weight):
        pytest.skip(f"{kernel} takes no {dtype}")
    xs = [cases.random_x(rng, (m, weight.k), dtype) for m in (1, 9, 33, 130, 701)]

    def program(xs: Sequence[jax.Array], *operands: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        f = functools.partial(i4.int4pack_mm, group_size=weight.group_size, implementation=kernel.implementation)
        return [(f(x, *operands), f(x, *operands, preferred_element_type=jnp.float32)) for x in xs]

    results = run_twice_on_poison(program, xs, weight.packed, weight.scales_and_zeros, device=kernel.device)
    for x, (rounded, unrounded) in zip(xs, results, strict=True):
        assert unrounded.dtype == np.float32
        np.testing.assert_array_equal(unrounded.astype(dtype), rounded)
        exact = x.astype(np.float64) @ weight.dense(kernel.weights(weight, len(x))).astype(np.float64).T
        magnitude = np.abs(x.astype(np.float64)) @ np.abs(weight.rounded.astype(np.float64)).T
        # Tensor cores truncate where they add: a chain of 64 or 72 additions, each off by 2^-23 of the sum at most.
        assert (np.abs(unrounded - exact) <= 1e-5 * magnitude).all()


@pytest.mark.parametrize("shared_x", [True, False], ids=["shared x", "own x"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_a_batch_of_weights(kernel: Kernel, dtype: np.dtype, shared_x: bool, rng: np.random.Generator) -> None:
    n, group_size = int(rng.choice(cases.N)), int(rng.choice([32, 64]))
    inner_k_tiles = 8 if (kernel.implementation or "").startswith("decode") else 4
    # Tails of k, behind which the next weight's scales lie: those of the last one are infinite.
    k = 384 if inner_k_tiles == 8 else 320
    weights = [cases.random_weight(rng, n, k, group_size, inner_k_tiles, dtype) for _ in range(3)]
    if not kernel.takes(weights[0]):
        pytest.skip(f"{kernel} takes no {dtype}")
    packed, scales = np.stack([w.packed for w in weights]), np.stack([w.scales_and_zeros for w in weights])
    scales[-1] = np.inf
    batches = [cases.random_x(rng, (m, k) if shared_x else (3, m, k), dtype) for m in (1, 5, 17, 33, 129, 300)]

    def program(xs: Sequence[jax.Array], *operands: jax.Array) -> list[jax.Array]:
        f = functools.partial(i4.int4pack_mm, group_size=group_size, implementation=kernel.implementation)
        return [jax.vmap(f, (None if shared_x else 0, 0, 0))(x, *operands) for x in xs]

    results = run_twice_on_poison(program, batches, packed, scales, device=kernel.device)
    for i, weight in enumerate(weights[:-1]):
        xs = [x if shared_x else x[i] for x in batches]
        kernel.check([y[i] for y in results], xs, weight, kernel.device)
    assert not any(np.isfinite(y[-1].astype(np.float32)).any() for y in results)


@FORMATS
def test_the_identity_reads_off_the_weight_that_dequantize_returns(
    kernel: Kernel, dtype: np.dtype, group_size: int, inner_k_tiles: int, rng: np.random.Generator
) -> None:
    weight = cases.random_weight(rng, 136, 512, group_size, inner_k_tiles, dtype)
    traps = cases.with_double_rounding_traps(rng, weight.scales_and_zeros)
    weight = dataclasses.replace(weight, scales_and_zeros=traps)
    if not kernel.takes(weight) or kernel.weights(weight, weight.k) != "rounded":
        pytest.skip(f"{kernel} states that it does not round weights, or takes no {dtype}")
    identity = np.eye(weight.k).astype(dtype)
    # One row of x takes another path than many; any few of the rows show whether it rounds alike.
    one_row = rng.integers(0, weight.k, 3 if kernel.weights(weight, 1) == "rounded" else 0)
    y, *rows = kernel.multiply([identity, *(identity[i : i + 1] for i in one_row)], weight)
    # Values, since a sum that begins at +0 turns a weight of -0 into +0.
    np.testing.assert_array_equal(y.astype(np.float64), weight.rounded.T.astype(np.float64))
    for i, row in zip(one_row, rows, strict=True):
        np.testing.assert_array_equal(row[0].astype(np.float64), weight.rounded[:, i].astype(np.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_long_sums_of_many_tokens(dtype: np.dtype, rng: np.random.Generator) -> None:
    # So many tiles that no other CTA takes a part of k: the sum is as long as it gets.
    weight = cases.random_weight(rng, 2056, 14336, 128, 8, dtype)
    explanation = i4.explain((1100, 14336), int4_weight(weight), jax.devices("cuda")[0])
    kernel = Kernel("cuda", f"{explanation.implementation}/{explanation.tile}")
    assert_right(kernel, [cases.random_x(rng, (1100, weight.k), dtype)], weight, kernel.device)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_plain_jnp(xla_program: Kernel, dtype: np.dtype, rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 136, 768, 32, 4, dtype)
    xs = [cases.random_x(rng, (m, weight.k), dtype) for m in (0, 1, 17, 257)]
    assert_right(xla_program, xs, weight, xla_program.device)


@pytest.mark.parametrize("name", cases.golden_names())
def test_plain_jnp_on_golden_cases(xla_program: Kernel, name: str) -> None:
    golden = cases.golden(name)
    assert_right(xla_program, [golden.x[1], golden.x[33]], golden.weight, xla_program.device)


@pytest.mark.parametrize("m", cases.M[1:])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize(("n", "k"), [(8, 128), (136, 1024), (4096, 4096)])
def test_the_chosen_kernel_is_the_one_that_explain_names(
    chosen: Kernel, m: int, n: int, k: int, group_size: int
) -> None:
    w4 = i4.quantize(np.ones((k, n), np.float32), group_size=group_size)
    explanation = i4.explain((m, k), w4, chosen.device)
    np.testing.assert_array_equal(np.ones((m, k), w4.dtype) @ w4, np.full((m, n), k))
    assert _ffi.last_launch(chosen.platform) == f"{explanation.implementation}/{explanation.tile}"


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("m", [1, 5, 9, 65, 200])
def test_a_named_kernel_is_the_one_that_runs(kernel: Kernel, m: int, group_size: int, rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 40, 256, group_size)
    explanation = i4.explain((m, weight.k), int4_weight(weight), kernel.device, kernel.implementation)
    kernel.multiply([cases.random_x(rng, (m, weight.k))], weight)
    launched = f"{explanation.implementation}/{explanation.tile}"
    assert _ffi.last_launch(kernel.platform) == launched
    assert launched == kernel.implementation or launched.startswith(f"{kernel.implementation}/")
    # The tile's name serves as an implementation, too.
    Kernel(kernel.platform, launched).multiply([cases.random_x(rng, (m, weight.k))], weight)
    assert _ffi.last_launch(kernel.platform) == launched


def test_the_cuda_tiles_are_those_of_the_plan() -> None:
    found = []
    for kernel in ("decode", "hopper", "ampere"):
        with pytest.raises(ValueError, match="names no tile") as error:
            _ffi.plan("cuda", _ffi.Problem(1, 8, 128, 128, 8, "bfloat16"), f"{kernel}/none", (90, 132))
        named = [part for part in str(error.value).split('"') if part.startswith(f"{kernel}/")]
        found += [kernel, *(name for name in named if name != f"{kernel}/none")]
    assert tuple(found) == CUDA_IMPLEMENTATIONS


def test_a_kernel_that_writes_nothing_leaves_poison(
    chosen: Kernel, untouched_results_target: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(_ffi, "TARGET", untouched_results_target)
    weight = cases.random_weight(rng, 24, 256)
    outputs = chosen.multiply([cases.random_x(rng, (m, weight.k)) for m in (1, 33)], weight)
    assert all(np.isnan(y.astype(np.float32)).all() for y in outputs)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3), (1, 1, 1, 5)])
def test_leading_dimensions_are_rows(chosen: Kernel, leading: tuple[int, ...], rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 24, 256)
    x = cases.random_x(rng, (*leading, weight.k))
    op = functools.partial(i4.int4pack_mm, packed=weight.packed, scales_and_zeros=weight.scales_and_zeros)
    y = op(x)
    assert y.shape == (*leading, weight.n)
    assert y.dtype == x.dtype
    flat = op(x.reshape(-1, weight.k))
    assert np.asarray(y).tobytes() == np.asarray(flat).tobytes()


def test_programs_on_many_host_threads_do_not_disturb_each_other(chosen: Kernel, rng: np.random.Generator) -> None:
    problems = []
    for m, n, k in [(1, 256, 1024), (17, 136, 512), (128, 40, 768), (257, 128, 256)]:
        weight = cases.random_weight(rng, n, k)
        operands = jax.device_put((cases.random_x(rng, (m, k)), weight.packed, weight.scales_and_zeros), chosen.device)
        problems.append((operands, np.asarray(i4.int4pack_mm(*operands)).tobytes()))

    def run(i: int) -> bool:
        operands, expected = problems[i % len(problems)]
        return np.asarray(i4.int4pack_mm(*operands)).tobytes() == expected

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(200)))


@pytest.mark.gpu
def test_a_replayed_command_buffer_gives_the_same_bits(rng: np.random.Generator) -> None:
    device = jax.devices("cuda")[0]
    first, second = cases.random_weight(rng, 256, 512), cases.random_weight(rng, 128, 256)

    def program(x: jax.Array, weights: list[i4.Int4Weight]) -> jax.Array:
        for w4 in weights:
            x = (x @ w4) * jnp.bfloat16(0.125)
        return x

    graphs = {"xla_gpu_enable_command_buffer": "CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}
    weights = jax.device_put([int4_weight(first), int4_weight(second)], device)
    for m in (1, 16, 257):
        lowered = jax.jit(program).lower(jax.ShapeDtypeStruct((m, 512), jnp.bfloat16), weights)
        plain, captured = lowered.compile(), lowered.compile(compiler_options=graphs)
        kept = []
        for _ in range(5):
            x = jax.device_put(cases.random_x(rng, (m, 512)), device)
            kept.append(x)  # At a new address each time: the graph has to be updated.
            assert np.asarray(captured(x, weights)).tobytes() == np.asarray(plain(x, weights)).tobytes()
        for x in kept:
            assert np.asarray(captured(x, weights)).tobytes() == np.asarray(plain(x, weights)).tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(2**15 + 8, 2**16, 2**7), (2**15 + 8, 8, 2**16), (16, 2**18, 2**16)],
    ids=["elements of y", "elements of x", "words of the weight"],
)
def test_more_than_2_to_the_31(m: int, n: int, k: int, rng: np.random.Generator) -> None:
    device = jax.devices("cuda")[0]
    # All but the far corner is 0: eight rows of x and eight of the weight.
    weight = cases.random_weight(rng, 8, k)
    corner = cases.random_x(rng, (8, k))
    with jax.default_device(device):
        x = jnp.zeros((m, k), corner.dtype).at[-8:].set(corner)
        packed = jnp.zeros((n // 8, *weight.packed.shape[1:]), jnp.int32).at[-1:].set(weight.packed)
        scales_and_zeros = jnp.zeros((k // 128, n, 2), weight.dtype).at[:, -8:].set(weight.scales_and_zeros)
        y = np.asarray(i4.int4pack_mm(x, packed, scales_and_zeros)[-8:, -8:])
    w4 = i4.Int4Weight(packed, scales_and_zeros, group_size=128, k=k, n=n)
    acceptance.check([y], [corner], weight.dense(i4.explain(x.shape, w4, device).weights), device)
