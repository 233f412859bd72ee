"""dequantize gives the weight that rounded kernels multiply by, bit for bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jax_int4mm as i4
from jax_int4mm.ops import _ffi
from kernels import Kernel, run_twice_on_poison

CUSTOM_CALL = f"custom_call @{_ffi.DEQUANTIZE_TARGET}("


def random_weight_with_traps(rng: np.random.Generator, *args: object) -> cases.Weight:
    weight = cases.random_weight(rng, *args)
    traps = cases.with_double_rounding_traps(rng, weight.scales_and_zeros)
    return dataclasses.replace(weight, scales_and_zeros=traps)


def dequantize_all(weights: list[tuple[jax.Array, jax.Array]], group_size: int) -> list[jax.Array]:
    return [i4.dequantize(packed, scales_and_zeros, group_size) for packed, scales_and_zeros in weights]


def lowered_for(platform: str, weight: cases.Weight) -> str:
    def backward(dy: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array) -> tuple[jax.Array]:
        x = jnp.zeros((3, weight.k), weight.dtype)
        return jax.vjp(lambda x: i4.int4pack_mm(x, packed, scales_and_zeros, weight.group_size), x)[1](dy)

    dy = np.zeros((3, weight.n), weight.dtype)
    traced = jax.jit(backward).trace(dy, weight.packed, weight.scales_and_zeros)
    return traced.lower(lowering_platforms=(platform,)).as_text()


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
    weight = random_weight_with_traps(rng, 136, 1024, group_size, inner_k_tiles, dtype)
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


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "group_size", "inner_k_tiles"), cases.FORMATS, ids=str)
def test_the_cuda_kernel_writes_every_shape_bit_for_bit(
    dtype: np.dtype, group_size: int, inner_k_tiles: int, rng: np.random.Generator
) -> None:
    # Rows of one piece of 128 and less, of whole ones and of a part more.
    ks = cases.legal_k(group_size, inner_k_tiles, 2048)
    weights = [
        random_weight_with_traps(rng, n, k, group_size, inner_k_tiles, dtype)
        for n in (8, 24, 136)
        for k in (*ks[:6], ks[-2], ks[-1])
    ]
    operands = [(weight.packed, weight.scales_and_zeros) for weight in weights]

    def program(operands: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
        return dequantize_all(operands, group_size)

    found = run_twice_on_poison(program, operands, device=jax.devices("cuda")[0])
    for w, weight in zip(found, weights, strict=True):
        np.testing.assert_array_equal(w.view(np.uint16), weight.rounded.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_cuda_kernel_on_the_largest_and_smallest_scales(dtype: np.dtype, rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 136, 1024, 32, 8, dtype)
    largest, smallest = jnp.finfo(dtype).max, jnp.finfo(dtype).smallest_subnormal
    scale = rng.choice(np.array([largest, largest / 2, smallest, 0], dtype), weight.scales_and_zeros.shape[:-1])
    zero = rng.choice(np.array([largest / 2, smallest, 0], dtype), scale.shape)
    signs = rng.choice(np.array([-1, 1], dtype), (*scale.shape, 2))
    weight = dataclasses.replace(weight, scales_and_zeros=np.stack([scale, zero], -1) * signs)
    (w,) = run_twice_on_poison(
        lambda *operands: dequantize_all([operands], 32),
        weight.packed,
        weight.scales_and_zeros,
        device=jax.devices("cuda")[0],
    )
    np.testing.assert_array_equal(w.view(np.uint16), weight.rounded.view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize(("group_size", "inner_k_tiles"), [(32, 2), (64, 4), (128, 8)])
def test_the_cuda_kernel_takes_a_batch_in_one_call(
    group_size: int, inner_k_tiles: int, rng: np.random.Generator
) -> None:
    weights = [random_weight_with_traps(rng, 24, 384, group_size, inner_k_tiles) for _ in range(3)]

    def program(packed: jax.Array, scales_and_zeros: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((3, 24, 384), scales_and_zeros.dtype)
        call = jax.ffi.ffi_call(_ffi.DEQUANTIZE_TARGET, result)
        return call(packed, scales_and_zeros, group_size=np.int64(group_size))

    packed = np.stack([weight.packed for weight in weights])
    scales_and_zeros = np.stack([weight.scales_and_zeros for weight in weights])
    w = run_twice_on_poison(program, packed, scales_and_zeros, device=jax.devices("cuda")[0])
    np.testing.assert_array_equal(w.view(np.uint16), np.stack([weight.rounded for weight in weights]).view(np.uint16))


@pytest.mark.gpu
def test_the_cuda_kernel_on_more_than_2_to_the_31_values(rng: np.random.Generator) -> None:
    n, k = 2**16 + 8, 2**15
    # All but the last eight rows are 0.
    weight = cases.random_weight(rng, 8, k)
    with jax.default_device(jax.devices("cuda")[0]):
        packed = jnp.zeros((n // 8, *weight.packed.shape[1:]), jnp.int32).at[-1:].set(weight.packed)
        scales_and_zeros = jnp.zeros((k // 128, n, 2), weight.dtype).at[:, -8:].set(weight.scales_and_zeros)
        w = i4.dequantize(packed, scales_and_zeros)
        np.testing.assert_array_equal(np.asarray(w[-8:]).view(np.uint16), weight.rounded.view(np.uint16))
        assert not w[:-8].any()


@pytest.mark.gpu
def test_a_replayed_command_buffer_gives_the_same_bits(rng: np.random.Generator) -> None:
    device = jax.devices("cuda")[0]
    weights = [cases.random_weight(rng, 136, 1024) for _ in range(5)]

    def program(packed: jax.Array, scales_and_zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
        return i4.dequantize(packed, scales_and_zeros), i4.dequantize(packed[::-1], scales_and_zeros)

    graphs = {"xla_gpu_enable_command_buffer": "CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1}
    kept = [jax.device_put((weight.packed, weight.scales_and_zeros), device) for weight in weights]
    captured = jax.jit(program).lower(*kept[0]).compile(compiler_options=graphs)
    for _ in range(2):
        for operands, weight in zip(kept, weights, strict=True):
            w, _ = captured(*operands)
            np.testing.assert_array_equal(np.asarray(w).view(np.uint16), weight.rounded.view(np.uint16))


@pytest.mark.gpu
def test_a_kernel_that_writes_nothing_leaves_poison(
    untouched_results_target: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(_ffi, "DEQUANTIZE_TARGET", untouched_results_target)
    weight = cases.random_weight(rng, 24, 256)
    operands = weight.packed, weight.scales_and_zeros
    w = run_twice_on_poison(lambda *operands: i4.dequantize(*operands), *operands, device=jax.devices("cuda")[0])
    assert np.isnan(w.astype(np.float32)).all()


def test_the_backward_product_for_cuda_holds_one_call(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(_ffi, "has_dequantize_kernel", lambda: True)
    weight = cases.random_weight(rng, 40, 256, 64, 4)
    text = lowered_for("cuda", weight)
    assert text.count(CUSTOM_CALL) == text.count("custom_call @") == 1
    assert "group_size = 64 : i64" in text
    for platform in ("cpu", "tpu", "rocm"):
        assert "custom_call @" not in lowered_for(platform, weight)


@pytest.mark.parametrize(
    ("has_kernels", "compute_capability", "expected"), [(False, 90, 0), (True, 75, 0), (True, 80, 1), (True, 120, 1)]
)
def test_it_is_plain_jnp_for_cuda_where_the_kernel_cannot_run(
    has_kernels: bool,
    compute_capability: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    rng: np.random.Generator,
) -> None:
    monkeypatch.setattr(_ffi, "has_cuda_kernels", lambda: has_kernels)
    monkeypatch.setattr(_ffi, "_gpu_description", lambda: (compute_capability, 40))
    assert lowered_for("cuda", cases.random_weight(rng, 40, 256, 64, 4)).count("custom_call @") == expected
