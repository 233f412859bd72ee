"""int4pack_mm under JAX's transformations, and what it lowers to on each platform."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import acceptance
import cases
import jax_int4mm as i4
from jax_int4mm.ops import _ffi
from kernels import Kernel, int4_weight

CUSTOM_CALL = f"custom_call @{_ffi.TARGET}("

Operands = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def weight(rng: np.random.Generator) -> cases.Weight:
    return cases.random_weight(rng, 40, 256, 64, 4)


@pytest.fixture
def operands(weight: cases.Weight, rng: np.random.Generator) -> Operands:
    return cases.random_x(rng, (9, weight.k)), weight.packed, weight.scales_and_zeros


def op(x: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array, implementation: str | None = None) -> jax.Array:
    return i4.int4pack_mm(x, packed, scales_and_zeros, 64, implementation)


def bits(y: jax.Array) -> bytes:
    return np.asarray(y).tobytes()


def calls_in(jaxpr: jax.extend.core.ClosedJaxpr) -> int:
    return str(jaxpr).count(" int4pack_mm[")


def lowered_for(platform: str, *operands: np.ndarray, implementation: str | None = None) -> str:
    f = functools.partial(op, implementation=implementation)
    return jax.jit(f).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def test_jit_gives_the_bits_of_the_eager_call(chosen: Kernel, operands: Operands) -> None:
    eager = op(*operands)
    assert eager.devices() == {chosen.device}
    assert bits(jax.jit(op)(*operands)) == bits(eager)
    with jax.disable_jit():
        assert bits(op(*operands)) == bits(eager)


def test_it_is_one_primitive_in_a_jaxpr(operands: Operands) -> None:
    assert calls_in(jax.make_jaxpr(op)(*operands)) == 1


def test_shapes_and_dtypes_come_without_a_device() -> None:
    x = jax.ShapeDtypeStruct((2, 3, 256), jnp.float16)
    packed = jax.ShapeDtypeStruct((5, 4, 32, 2), jnp.int32)
    scales_and_zeros = jax.ShapeDtypeStruct((4, 40, 2), jnp.float16)
    y = jax.eval_shape(op, x, packed, scales_and_zeros)
    assert (y.shape, y.dtype) == ((2, 3, 40), jnp.float16)


def test_the_result_of_weakly_typed_operands_is_not_weakly_typed(operands: Operands) -> None:
    weak = [jax.ShapeDtypeStruct(o.shape, o.dtype, weak_type=True) for o in operands]
    assert jax.make_jaxpr(op)(*weak).in_avals[0].weak_type
    assert not jax.eval_shape(op, *weak).weak_type


def test_vmap_over_x_is_one_call_with_more_rows(chosen: Kernel, weight: cases.Weight, rng: np.random.Generator) -> None:
    x = cases.random_x(rng, (3, 5, weight.k))
    dense = weight.packed, weight.scales_and_zeros
    batched = jax.vmap(op, in_axes=(0, None, None))
    nested = jax.vmap(batched, in_axes=(0, None, None))
    for f, argument in [(batched, x), (nested, x[None])]:
        jaxpr = jax.make_jaxpr(f)(argument, *dense)
        assert calls_in(jaxpr) == 1
        assert "scan[" not in str(jaxpr)
    assert bits(batched(x, *dense)) == bits(op(x, *dense))
    inner = jax.vmap(op, in_axes=(1, None, None), out_axes=1)
    assert bits(inner(x, *dense)) == bits(op(x, *dense))


@pytest.mark.parametrize(
    ("in_axes", "out_axis"),
    [((0, 0, 0), 0), ((1, 0, 0), 2), ((0, None, 0), 1), ((None, 0, 0), 0), ((None, 1, 2), 1), ((None, None, 0), 2)],
    ids=str,
)
def test_vmap_over_weights_is_one_call(
    chosen: Kernel, in_axes: tuple[int | None, ...], out_axis: int, rng: np.random.Generator
) -> None:
    weights = [cases.random_weight(rng, 40, 256, 64, 4) for _ in range(3)]
    if in_axes[1] is None:
        weights = [dataclasses.replace(w, q=weights[0].q) for w in weights]
    each = cases.random_x(rng, (3, 9, 256)), [w.packed for w in weights], [w.scales_and_zeros for w in weights]
    operands = [one[0] if axis is None else np.stack(one, axis) for one, axis in zip(each, in_axes, strict=True)]
    f = jax.vmap(op, in_axes, out_axis)
    jaxpr = jax.make_jaxpr(f)(*operands)
    assert calls_in(jaxpr) == 1
    assert "scan[" not in str(jaxpr)
    ys = np.moveaxis(np.asarray(f(*operands)), out_axis, 0)
    for i, (y, weight) in enumerate(zip(ys, weights, strict=True)):
        x = each[0][0 if in_axes[0] is None else i]
        planned = i4.explain(x.shape, int4_weight(weight), chosen.device)
        acceptance.check([y], [x], weight.dense(planned.weights), chosen.device)


@pytest.mark.parametrize("inner", [(0, 0, 0), (None, 0, 0), (0, None, None)], ids=str)
@pytest.mark.parametrize("outer", [(0, 0, 0), (None, 0, 0), (0, None, None), (None, None, 0)], ids=str)
def test_nested_vmap_is_one_call(
    outer: tuple[int | None, ...], inner: tuple[int | None, ...], rng: np.random.Generator
) -> None:
    sizes, weight = (2, 3), [cases.random_weight(rng, 16, 256, 64, 4) for _ in range(6)]
    x = cases.random_x(rng, (6, 9, 256))  # As few as 8 rows may take unrounded weights.
    arrays = x, np.stack([w.packed for w in weight]), np.stack([w.scales_and_zeros for w in weight])

    def batched(array: np.ndarray, axes: tuple[int | None, int | None]) -> np.ndarray:
        array = array.reshape(*sizes, *array.shape[1:])
        return array[tuple(0 if axis is None else slice(None) for axis in axes)]

    operands = [batched(a, axes) for a, axes in zip(arrays, zip(outer, inner, strict=True), strict=True)]
    f = jax.vmap(jax.vmap(op, inner), outer)
    jaxpr = jax.make_jaxpr(f)(*operands)
    assert calls_in(jaxpr) == 1
    y = np.asarray(f(*operands))
    assert y.shape == (2, 3, 9, 16)
    for i, j in np.ndindex(sizes):
        indices = [
            tuple(at for at, axis in zip((i, j), axes, strict=True) if axis is not None)
            for axes in zip(outer, inner, strict=True)
        ]
        expected = op(*(operand[index] for operand, index in zip(operands, indices, strict=True)))
        np.testing.assert_array_equal(y[i, j], expected)


def test_a_program_exported_with_symbolic_m_serves_every_m(
    chosen: Kernel, weight: cases.Weight, rng: np.random.Generator
) -> None:
    (m,) = jax.export.symbolic_shape("m")
    exported = jax.export.export(
        jax.jit(op),
        platforms=[chosen.platform],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(_ffi.TARGET)],
    )(jax.ShapeDtypeStruct((m, weight.k), weight.dtype), weight.packed, weight.scales_and_zeros)
    for rows in (1, 9, 65, 300):
        x = cases.random_x(rng, (rows, weight.k))
        y = np.asarray(exported.call(x, weight.packed, weight.scales_and_zeros))
        # The kernel is chosen at the call, as for an m that is known.
        planned = i4.explain((rows, weight.k), int4_weight(weight), chosen.device)
        assert _ffi.last_launch(chosen.platform) == f"{planned.implementation}/{planned.tile}"
        acceptance.check([y], [x], weight.dense(planned.weights), chosen.device)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_it_lowers_to_one_custom_call_on_any_machine(platform: str, operands: Operands) -> None:
    assert lowered_for(platform, *operands).count(CUSTOM_CALL) == 1


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
def test_it_lowers_to_plain_jnp_where_no_kernel_of_ours_is(platform: str, operands: Operands) -> None:
    text = lowered_for(platform, *operands)
    assert "custom_call" not in text
    assert "dot_general" in text


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("implementation", ["reference", "dequantize"])
def test_plain_jnp_needs_no_custom_call_anywhere(
    platform: str, implementation: str, operands: Operands, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "dequantize":
        monkeypatch.setattr(_ffi, "has_dequantize_kernel", lambda: False)
    assert "custom_call" not in lowered_for(platform, *operands, implementation=implementation)


@pytest.mark.parametrize(
    ("platform", "implementation"), [("cuda", "scalar"), ("cpu", "ampere"), ("tpu", "ampere"), ("cpu", "nonesuch")]
)
def test_an_implementation_of_another_platform_is_an_error(
    platform: str, implementation: str, operands: Operands
) -> None:
    with pytest.raises(ValueError, match=f'int4pack_mm: implementation "{implementation}".*None'):
        lowered_for(platform, *operands, implementation=implementation)


def test_the_environment_names_the_default_implementation(monkeypatch: pytest.MonkeyPatch, operands: Operands) -> None:
    monkeypatch.setenv("JAX_INT4MM_IMPLEMENTATION", "reference")
    assert "custom_call" not in lowered_for("cpu", *operands)
    monkeypatch.setenv("JAX_INT4MM_IMPLEMENTATION", "nonesuch")
    assert CUSTOM_CALL in lowered_for("cpu", *operands, implementation="scalar")
    with pytest.raises(ValueError, match="nonesuch"):
        lowered_for("cpu", *operands)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_it_runs_inside_shard_map(chosen: Kernel, axis_type: jax.sharding.AxisType, operands: Operands) -> None:
    mesh = Mesh(np.array([chosen.device]), ("data",), axis_types=(axis_type,))
    mapped = jax.jit(jax.shard_map(op, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P("data")))
    x = jax.device_put(operands[0], NamedSharding(mesh, P("data")))
    assert bits(mapped(x, *operands[1:])) == bits(op(*operands))


def test_x_may_be_donated(chosen: Kernel, rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 256, 256, 64, 4)
    x = jnp.asarray(cases.random_x(rng, (9, weight.k)))
    expected = bits(op(x, weight.packed, weight.scales_and_zeros))
    donating = jax.jit(op, donate_argnums=0)
    assert bits(donating(x, weight.packed, weight.scales_and_zeros)) == expected
    assert x.is_deleted()
