"""Int4Weight: the product it stands for, as a pytree and under JAX's transformations."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import acceptance
import cases
import jax_int4mm as i4
import oracle
from kernels import Kernel, int4_weight


def quantized(rng: np.random.Generator, *shape: int, dtype: Any = jnp.bfloat16, **arguments: Any) -> i4.Int4Weight:
    w = rng.normal(0, 0.02, shape).astype(np.float32)
    # A group of one value that is nearly 0 gets a scale that a CPU's bfloat16 kernel leaves to another.
    return i4.quantize(np.copysign(np.maximum(np.abs(w), 1e-4), w), dtype=dtype, **arguments)


def dense(w4: i4.Int4Weight, weights: str = "rounded") -> np.ndarray:
    """The [k, n] matrix of one weight, by the oracle, as a kernel of such weights multiplies by it."""
    q, scales_and_zeros = np.asarray(i4.unpack_int4(w4.packed)), np.asarray(w4.scales_and_zeros)
    weight = {"rounded": oracle.rounded_weight, "exact": oracle.unrounded_weight}[weights]
    stored = weight(q, scales_and_zeros, w4.group_size)[: w4.n, : w4.k].T
    if w4.perm is None:
        return stored
    rows = np.empty_like(stored)
    rows[np.asarray(w4.perm)] = stored
    return rows


def with_perm(w4: i4.Int4Weight, rng: np.random.Generator) -> i4.Int4Weight:
    return dataclasses.replace(w4, perm=rng.permutation(w4.k).astype(np.int32))


def bits(y: Any) -> bytes:
    return np.asarray(y).tobytes()


@pytest.mark.parametrize(("k", "n"), [(1, 1), (31, 9), (128, 8), (200, 30), (513, 136)])
@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_x_at_w_is_the_product_with_the_weight_that_explain_states(
    chosen: Kernel, k: int, n: int, permuted: bool, dtype: np.dtype, rng: np.random.Generator
) -> None:
    w4 = quantized(rng, k, n, dtype=dtype, group_size=int(rng.choice(cases.GROUP_SIZES)))
    if permuted:
        w4 = with_perm(w4, rng)
    np.testing.assert_array_equal(np.asarray(w4.dequantize()), dense(w4))
    xs = [cases.random_x(rng, (m, k), dtype) for m in (1, 5, 33)]
    outputs = [np.asarray(jnp.asarray(x) @ w4) for x in xs]
    for x, y in zip(xs, outputs, strict=True):
        weights = i4.explain(x.shape, w4, chosen.device).weights
        acceptance.check([y], [x], dense(w4, weights).T, chosen.device)
        assert bits(x @ w4) == bits(y), "numpy's x gives another result than jax's"
        assert bits(i4.matmul(x, w4)) == bits(y)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,)], ids=str)
def test_leading_dimensions_of_x_stay(leading: tuple[int, ...], rng: np.random.Generator) -> None:
    w4 = quantized(rng, 100, 12)
    x = cases.random_x(rng, (*leading, 100))
    assert (x @ w4).shape == (*leading, 12)
    assert bits(x @ w4) == bits(x.reshape(-1, 100) @ w4)


def test_a_named_implementation_and_the_environments(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    w4 = quantized(rng, 128, 16)
    x = cases.random_x(rng, (3, 128))
    expected = bits(i4.matmul(x, w4, implementation="reference"))
    with pytest.raises(ValueError, match='implementation "nonesuch"'):
        i4.matmul(x, w4, implementation="nonesuch")
    x @ w4
    monkeypatch.setenv("JAX_INT4MM_IMPLEMENTATION", "nonesuch")
    with pytest.raises(ValueError, match='implementation "nonesuch"'):
        x @ w4
    monkeypatch.setenv("JAX_INT4MM_IMPLEMENTATION", "reference")
    assert bits(x @ w4) == expected


def test_its_attributes_are_those_of_the_matrix(rng: np.random.Generator) -> None:
    w4 = quantized(rng, 5, 200, 30, group_size=64, inner_k_tiles=4)
    assert w4.shape == (5, 200, 30)
    assert w4.ndim == 3
    assert w4.dtype == jnp.bfloat16
    assert (w4.group_size, w4.inner_k_tiles) == (64, 4)
    # 200 x 30 is padded to 256 x 32: half a byte a value, and two bfloat16 for each group and column.
    assert w4.nbytes == 5 * (256 * 32 // 2 + 4 * 32 * 2 * 2)
    assert repr(w4) == "Int4Weight([5, 200, 30], bfloat16, group_size=64)"
    one = with_perm(quantized(rng, 200, 30), rng)
    assert one.nbytes == 256 * 32 // 2 + 2 * 32 * 2 * 2 + 200 * 4
    assert repr(one) == "Int4Weight([200, 30], bfloat16, group_size=128, perm)"


def test_astype_rounds_scales_and_zeros_once(rng: np.random.Generator) -> None:
    w4 = quantized(rng, 128, 16)
    half = w4.astype(jnp.float16)
    assert half.dtype == jnp.float16
    expected = oracle.round_once(np.asarray(w4.scales_and_zeros, np.float64), oracle.FLOAT16)
    np.testing.assert_array_equal(np.asarray(half.scales_and_zeros), expected)
    assert half.packed is w4.packed
    assert (cases.random_x(rng, (2, 128), oracle.FLOAT16) @ half).dtype == jnp.float16
    with pytest.raises(TypeError, match=r"Int4Weight\.astype: dtype is float32; .*dequantize\(\)\.astype"):
        w4.astype(jnp.float32)


@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
def test_it_is_a_pytree_of_whatever_leaves(permuted: bool, rng: np.random.Generator) -> None:
    w4 = quantized(rng, 200, 30)
    if permuted:
        w4 = with_perm(w4, rng)
    leaves, structure = jax.tree.flatten(w4)
    assert len(leaves) == 2 + permuted
    assert bits(jax.tree.unflatten(structure, leaves).dequantize()) == bits(w4.dequantize())
    for placeholder in (object(), 0, "sharding", jax.ShapeDtypeStruct((1,), jnp.int8), P()):
        rebuilt = jax.tree.unflatten(structure, [placeholder] * len(leaves))
        assert isinstance(rebuilt, i4.Int4Weight)
        assert rebuilt.group_size == w4.group_size
        assert "Int4Weight" in repr(rebuilt)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(w4)]
    assert names == [".packed", ".scales_and_zeros", ".perm"][: len(leaves)]


def test_shapes_come_without_a_device() -> None:
    w4 = jax.eval_shape(i4.quantize, jax.ShapeDtypeStruct((200, 30), jnp.float16))
    y = jax.eval_shape(lambda x, w4: x @ w4, jax.ShapeDtypeStruct((2, 3, 200), jnp.float16), w4)
    assert (y.shape, y.dtype) == ((2, 3, 30), jnp.float16)
    w = jax.eval_shape(lambda w4: w4.dequantize(), w4)
    assert (w.shape, w.dtype) == ((200, 30), jnp.float16)


def test_jit_takes_it_as_argument_and_as_constant(chosen: Kernel, rng: np.random.Generator) -> None:
    w4 = quantized(rng, 200, 30)
    x = cases.random_x(rng, (5, 200))
    expected = bits(x @ w4)
    assert bits(jax.jit(lambda x, w4: x @ w4)(x, w4)) == expected
    assert bits(jax.jit(lambda x: x @ w4)(x)) == expected


def test_scan_over_stacked_weights_takes_each_in_turn(chosen: Kernel, rng: np.random.Generator) -> None:
    layers = quantized(rng, 4, 72, 72, group_size=32)
    x = cases.random_x(rng, (3, 72))
    y, _ = jax.lax.scan(lambda x, w4: (x @ w4, None), x, layers)
    for i in range(4):
        x = x @ jax.tree.map(lambda leaf, i=i: leaf[i], layers)
    assert bits(y) == bits(x)


def test_vmap_over_stacked_weights(chosen: Kernel, rng: np.random.Generator) -> None:
    stacked = quantized(rng, 3, 100, 20)
    x = cases.random_x(rng, (3, 5, 100))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3)]
    batched = jax.vmap(lambda x, w4: x @ w4)(x, stacked)
    shared = jax.vmap(lambda w4: x[0] @ w4)(stacked)
    # On a GPU a batch may take another way to divide k.
    for found, xs in ((batched, x), (shared, x[[0, 0, 0]])):
        for y, one, w4 in zip(np.asarray(found, np.float32), xs, each, strict=True):
            np.testing.assert_allclose(y, np.asarray(one @ w4, np.float32), rtol=2**-7, atol=2**-7)
    assert bits(stacked.dequantize()) == b"".join(bits(w4.dequantize()) for w4 in each)


def test_it_goes_through_shard_map_and_device_put(chosen: Kernel, rng: np.random.Generator) -> None:
    mesh = Mesh(np.array([chosen.device]), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    w4 = jax.device_put(quantized(rng, 128, 16), jax.sharding.NamedSharding(mesh, P()))
    x = cases.random_x(rng, (4, 128))
    mapped = jax.shard_map(lambda x, w4: x @ w4, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert bits(jax.jit(mapped)(x, w4)) == bits(x @ w4)


def test_it_may_be_donated(chosen: Kernel, rng: np.random.Generator) -> None:
    w4 = jax.device_put(quantized(rng, 128, 16), chosen.device)
    expected = bits(w4.packed)
    moved = jax.jit(lambda w4: w4, donate_argnums=0)(w4)
    assert bits(moved.packed) == expected
    assert w4.packed.is_deleted()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0] * 200], TypeError, "x is a list; it must be a jax or numpy array"),
        (np.ones((3, 200), np.float32), TypeError, r"x has dtype float32 .*weight bfloat16.*x\.astype\(bfloat16\)"),
        (np.ones((3, 200), np.float16), TypeError, r"x has dtype float16 .*w4\.astype\(float16\)"),
        (np.ones((3, 256), jnp.bfloat16), ValueError, r"x has shape \[3, 256\]; .*\[200, 30\] .*\[\.\.\., 200\]"),
        (np.ones((), jnp.bfloat16), ValueError, r"x has shape \[\]"),
    ],
)
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_a_wrong_x_is_refused(
    x: Any, error: type[Exception], message: str, traced: bool, rng: np.random.Generator
) -> None:
    w4 = quantized(rng, 200, 30)
    with pytest.raises(error, match=f"^x @ Int4Weight: {message}"):
        jax.jit(lambda: x @ w4)() if traced else x @ w4


def test_a_stacked_weight_is_refused_by_the_product(rng: np.random.Generator) -> None:
    stacked = quantized(rng, 2, 128, 16)
    with pytest.raises(ValueError, match=r"x @ Int4Weight: the weight is stacked, \[2, 128, 16\]; .*Scan or vmap"):
        cases.random_x(rng, (3, 128)) @ stacked


def test_the_weight_on_the_left_is_refused(rng: np.random.Generator) -> None:
    w4 = quantized(rng, 128, 16)
    for right in (np.ones((16, 3), jnp.bfloat16), jnp.ones((16, 3), jnp.bfloat16)):
        with pytest.raises(TypeError, match="Int4Weight"):
            w4 @ right


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"group_size": 48}, ValueError, "group_size is 48"),
        ({"group_size": 32}, ValueError, r"scales_and_zeros has shape \[2, 32, 2\].*\[8, 32, 2\]"),
        ({"k": 128}, ValueError, "k = 128 and n = 30 do not fit packed .*k = 256 and n = 32.*next multiple of 8"),
        ({"n": 40}, ValueError, "k = 200 and n = 40 do not fit packed"),
        ({"packed": np.zeros((4, 2, 32), np.int32)}, ValueError, r"packed has shape \[4, 2, 32\] .*\*stacked"),
        ({"packed": np.zeros((4, 2, 32, 4), np.int64)}, TypeError, r"packed has dtype int64; .*pack_int4\(q\)"),
        ({"packed": np.zeros((3, 4, 2, 32, 4), np.int32)}, ValueError, ".*the same stacked dimensions"),
        ({"scales_and_zeros": np.zeros((2, 32, 2), np.float32)}, TypeError, "scales_and_zeros has dtype float32"),
        ({"perm": np.zeros(256, np.int32)}, ValueError, r"perm is int32\[256\]; it must be int32\[200\]"),
        ({"perm": np.zeros(200, np.int64)}, ValueError, r"perm is int64\[200\]; it must be int32\[200\]"),
    ],
)
def test_concrete_leaves_that_do_not_fit_are_refused(
    wrong: dict[str, Any], error: type[Exception], message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(error, match=f"^Int4Weight: {message}"):
        dataclasses.replace(quantized(rng, 200, 30), **wrong)


def test_it_takes_arrays_that_other_tools_packed(chosen: Kernel, rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 40, 256)
    w4 = int4_weight(weight)
    x = cases.random_x(rng, (7, 256))
    assert bits(x @ w4) == bits(i4.int4pack_mm(x, weight.packed, weight.scales_and_zeros))


@pytest.mark.parametrize(("k", "n"), [(64, 8), (200, 30), (513, 136)])
@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("inner_k_tiles", [2, 4, 8])
def test_columns_are_those_of_the_dense_matrix(
    k: int, n: int, permuted: bool, dtype: np.dtype, inner_k_tiles: int, rng: np.random.Generator
) -> None:
    w4 = quantized(rng, k, n, dtype=dtype, group_size=32, inner_k_tiles=inner_k_tiles)
    if permuted:
        w4 = with_perm(w4, rng)
    table = dense(w4).T
    indices = rng.integers(-n, n, (3, 5))
    found = w4.columns(indices)
    assert found.dtype == w4.dtype
    np.testing.assert_array_equal(np.asarray(found), table[indices])
    np.testing.assert_array_equal(np.asarray(jax.jit(i4.Int4Weight.columns)(w4, jnp.uint8(n - 1))), table[n - 1])
    np.testing.assert_array_equal(np.asarray(w4.columns(np.array([n + 7, -n - 7]))), table[[n - 1, 0]])
    assert w4.columns(np.zeros((2, 0), np.int32)).shape == (2, 0, k)


def test_columns_read_no_more_of_the_weight_than_they_need(rng: np.random.Generator) -> None:
    w4 = quantized(rng, 128, 4096)
    compiled = jax.jit(i4.Int4Weight.columns).lower(w4, jnp.zeros(4, jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w4.nbytes // 10


def test_columns_are_differentiable_in_scales_and_zeros(rng: np.random.Generator) -> None:
    w4 = quantized(rng, 64, 16, group_size=32)
    indices = jnp.array([3, 3, 9])

    def of_columns(scales_and_zeros: jax.Array) -> jax.Array:
        return dataclasses.replace(w4, scales_and_zeros=scales_and_zeros).columns(indices).astype(jnp.float32).sum()

    def of_all(scales_and_zeros: jax.Array) -> jax.Array:
        whole = dataclasses.replace(w4, scales_and_zeros=scales_and_zeros).dequantize()
        return whole.T[indices].astype(jnp.float32).sum()

    np.testing.assert_array_equal(*(np.asarray(jax.grad(f)(w4.scales_and_zeros)) for f in (of_columns, of_all)))


def test_columns_refuse_what_is_no_index(rng: np.random.Generator) -> None:
    w4 = quantized(rng, 2, 64, 8, group_size=32)
    with pytest.raises(ValueError, match="stacked"):
        w4.columns(np.zeros(3, np.int32))
    with pytest.raises(TypeError, match="float32; they must be integers"):
        jax.tree.map(lambda leaf: leaf[0], w4).columns(np.zeros(3, np.float32))


@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
def test_concatenated_weights_are_side_by_side(permuted: bool, rng: np.random.Generator) -> None:
    parts = [quantized(rng, 3, 200, n, group_size=32) for n in (16, 8, 30)]
    if permuted:
        perm = np.stack([rng.permutation(200) for _ in range(3)]).astype(np.int32)
        parts = [dataclasses.replace(part, perm=jnp.asarray(perm)) for part in parts]
    whole = i4.concatenate(parts)
    assert whole.shape == (3, 200, 54)
    dense_parts = [np.asarray(part.dequantize()) for part in parts]
    np.testing.assert_array_equal(np.asarray(whole.dequantize()), np.concatenate(dense_parts, axis=-1))
    assert sum(part.nbytes for part in parts) == whole.nbytes + (2 * perm.nbytes if permuted else 0)
    traced = jax.jit(lambda parts: i4.concatenate(parts))(parts if not permuted else parts[:1])
    assert traced.shape == (whole.shape if not permuted else parts[0].shape)


def test_weights_that_are_not_alike_are_not_concatenated(rng: np.random.Generator) -> None:
    w4 = quantized(rng, 128, 16, group_size=32)
    others = {
        "shape but for n": quantized(rng, 256, 16, group_size=32),
        "group_size": quantized(rng, 128, 16, group_size=64),
        "inner_k_tiles": quantized(rng, 128, 16, group_size=32, inner_k_tiles=4),
        "dtype": w4.astype(jnp.float16),
        "orders of k": with_perm(w4, rng),
    }
    for difference, other in others.items():
        with pytest.raises(ValueError, match=difference):
            i4.concatenate([w4, other])
    with pytest.raises(ValueError, match="n = 12, which is padded"):
        i4.concatenate([quantized(rng, 128, 12, group_size=32), w4])
    with pytest.raises(ValueError, match="no weights"):
        i4.concatenate([])
