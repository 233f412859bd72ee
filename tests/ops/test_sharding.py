"""The op over a mesh: what is divided as it is, what is moved, and the numbers."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cases
import jax_int4mm as i4
from jax_int4mm.ops import _ffi
from jax_int4mm.ops._sharding import (
    PACKED,
    SCALES_AND_ZEROS,
    Division,
    W,
    axes_of,
    batched,
    divide,
    divided_by_xla,
    weight_units,
)
from jax_int4mm.ops.dequantize import dequantize_reference
from kernels import int4_weight

GROUP_SIZE = 64
N, K = 64, 1024
AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)

# How x [m, k] and w [n, k] are divided, and what a product of them costs.
WAYS = {
    "not at all": (P(), P(), []),
    "data": (P("d"), P(), []),
    "column": (P(), P("t"), []),
    "column of two axes": (P(), P(("d", "t")), []),
    "row": (P(None, "t"), P(None, "t"), ["all-reduce"]),
    "row of two axes": (P(None, ("d", "t")), P(None, ("d", "t")), ["all-reduce"]),
    "row, x on every device": (P(), P(None, "t"), ["all-reduce"]),
    "row, the weight on every device": (P(None, "t"), P(), ["all-reduce"]),
    "data and column": (P("d"), P("t"), []),
    "data and row": (P("d", "t"), P(None, "t"), ["all-reduce"]),
    "row and column": (P(None, "t"), P("d", "t"), ["all-reduce"]),
}


@contextlib.contextmanager
def grid(platform: str, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """The devices of a mesh. What no mesh holds is computed by the same kernels, on the first of them."""
    devices = np.array(jax.devices(platform)).reshape(shape)
    with jax.default_device(devices.flat[0]):
        yield devices


# On GPUs one axis has them all, since there may be two only.
@pytest.fixture(
    params=[
        pytest.param(("cpu", (2, 4)), id="cpu"),
        pytest.param(("cuda", (1, -1)), id="gpus_t", marks=pytest.mark.gpu(2)),
        pytest.param(("cuda", (-1, 1)), id="gpus_d", marks=pytest.mark.gpu(2)),
    ]
)
def devices(request: pytest.FixtureRequest) -> Iterator[np.ndarray]:
    with grid(*request.param) as devices:
        yield devices


@pytest.fixture
def cpu_grid() -> Iterator[np.ndarray]:
    with grid("cpu", (2, 4)) as devices:
        yield devices


def make_mesh(devices: np.ndarray, axis_type: AxisType = AxisType.Auto) -> Mesh:
    return Mesh(devices, ("d", "t"), axis_types=(axis_type,) * 2)


def parts(mesh: Mesh, entry: str | tuple[str, ...] | None) -> int:
    """Into how many parts an entry of a PartitionSpec divides a dimension."""
    return math.prod(mesh.shape[axis] for axis in axes_of(entry))


def compiled_text(f: Callable[..., Any], *arguments: Any) -> str:
    jitted = f if isinstance(f, jax.stages.Wrapped) else jax.jit(f)
    return jitted.lower(*arguments).compile().as_text()


def collectives(f: Callable[..., Any], *arguments: Any) -> list[str]:
    """The communication in the compiled program."""
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+"
    return re.findall(rf" ({names})(?:-start)?\(", compiled_text(f, *arguments))


def put(mesh: Mesh, x: Any, weight: cases.Weight, x_spec: P, w_spec: P) -> tuple[jax.Array, jax.Array, jax.Array]:
    n, k = (*w_spec, None, None)[:2]
    arrays = (x, x_spec), (weight.packed, P(n, k)), (weight.scales_and_zeros, P(k, n))
    x, packed, scales_and_zeros = (jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in arrays)
    return x, packed, scales_and_zeros


def product(*operands: Any, **options: Any) -> jax.Array:
    return i4.int4pack_mm(*operands, GROUP_SIZE, **options)


def assert_same(found: jax.Array, expected: jax.Array) -> None:
    """Equal but for the order in which an f32 sum was taken: at most a bfloat16's next neighbour."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=2**-9 * np.abs(expected).max())
    assert (found != expected).mean() < 0.02


def assert_equal(found: jax.Array, expected: jax.Array) -> None:
    """Of sums that no device shares: equal, but that on a GPU the tile, and so the order, depends on a part's size."""
    if {device.platform for device in found.devices()} == {"cpu"}:
        np.testing.assert_array_equal(found, expected)
    else:
        assert_same(found, expected)


@pytest.fixture
def inner_k_tiles(request: pytest.FixtureRequest) -> int:
    """On GPUs 8, which the decode kernel asks for."""
    on_gpus = "devices" in request.fixturenames and request.getfixturevalue("devices").flat[0].platform != "cpu"
    return 8 if on_gpus else 4


@pytest.fixture
def weight(rng: np.random.Generator, inner_k_tiles: int) -> cases.Weight:
    return cases.random_weight(rng, N, K, GROUP_SIZE, inner_k_tiles)


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return cases.random_x(rng, (8, K))


@AXIS_TYPES
@pytest.mark.parametrize("way", WAYS)
def test_what_each_way_costs(
    axis_type: AxisType, way: str, x: np.ndarray, weight: cases.Weight, devices: np.ndarray
) -> None:
    x_spec, w_spec, cost = WAYS[way]
    mesh = make_mesh(devices, axis_type)
    operands = put(mesh, x, weight, x_spec, w_spec)
    if all(parts(mesh, (*spec, None, None)[1]) == 1 for spec in (x_spec, w_spec)):
        cost = []
    assert collectives(product, *operands) == cost
    y = jax.jit(product)(*operands)
    expected = product(x, weight.packed, weight.scales_and_zeros)
    rows, columns = (*x_spec, None)[0] if x_spec else None, (*w_spec, None)[0] if w_spec else None
    assert y.sharding.is_equivalent_to(NamedSharding(y.sharding.mesh, P(rows, columns)), 2)
    (assert_same if cost else assert_equal)(y, expected)


@AXIS_TYPES
@pytest.mark.parametrize("spec", [P("t"), P(None, "t"), P(None, None, "t"), P("d", "t")], ids=str)
def test_a_result_that_is_to_be_divided_takes_a_reduce_scatter(
    axis_type: AxisType, spec: P, weight: cases.Weight, rng: np.random.Generator, devices: np.ndarray
) -> None:
    x = cases.random_x(rng, (8, 8, K))
    mesh = make_mesh(devices, axis_type)
    operands = put(mesh, x, weight, P(None, None, "t"), P(None, "t"))
    if axis_type == AxisType.Explicit:
        f = jax.jit(functools.partial(product, out_sharding=spec))
    else:
        f = jax.jit(product, out_shardings=NamedSharding(mesh, spec))
    assert collectives(f, *operands) == (["reduce-scatter"] if parts(mesh, "t") > 1 else [])
    y = f(*operands)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    assert_same(y, product(x, weight.packed, weight.scales_and_zeros))


@AXIS_TYPES
def test_a_weight_is_not_gathered_for_its_x(
    axis_type: AxisType, x: np.ndarray, weight: cases.Weight, devices: np.ndarray
) -> None:
    # Both want the same devices: x follows.
    mesh = make_mesh(devices, axis_type)
    axis = "d" if parts(mesh, "d") > 1 else "t"
    operands = put(mesh, x, weight, P(axis), P(axis))
    results = re.findall(r"= (.*) all-gather(?:-start)?\(", compiled_text(product, *operands))
    # The largest is what is gathered; one that is begun and awaited apart names its part too.
    gathered = {
        max(re.findall(r"\[([\d,]+)\]", result), key=lambda dims: int(dims.split(",")[0])) for result in results
    }
    # XLA may also gather y, which it wants divided like x.
    assert f"8,{K}" in gathered
    assert gathered <= {f"8,{K}", f"8,{N}"}
    assert_equal(jax.jit(product)(*operands), product(x, weight.packed, weight.scales_and_zeros))


@AXIS_TYPES
def test_partial_sums_are_added_in_f32_unless_asked_otherwise(
    axis_type: AxisType, x: np.ndarray, weight: cases.Weight, devices: np.ndarray
) -> None:
    both = ("d", "t")
    operands = put(make_mesh(devices, axis_type), x, weight, P(None, both), P(None, both))
    stated = i4.explain(x.shape, int4_weight(weight), devices.flat[0]).weights
    exact = x.astype(np.float64) @ weight.dense(stated).astype(np.float64).T

    def error(**options: Any) -> float:
        return np.abs(np.asarray(product(*operands, preferred_element_type=jnp.float32, **options)) - exact).max()

    assert error() == error(accum_dtype=jnp.float32) < 0.01 * error(accum_dtype=jnp.bfloat16)


def test_results_in_f32(chosen: Any, x: np.ndarray, weight: cases.Weight) -> None:
    y = product(x, weight.packed, weight.scales_and_zeros, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32
    rounded = product(x, weight.packed, weight.scales_and_zeros)
    np.testing.assert_array_equal(y.astype(rounded.dtype), rounded)


@AXIS_TYPES
@pytest.mark.parametrize("way", ["data", "column", "row", "data and row", "row and column"])
def test_gradients(axis_type: AxisType, way: str, x: np.ndarray, weight: cases.Weight, devices: np.ndarray) -> None:
    x_spec, w_spec, _ = WAYS[way]
    x, packed, scales_and_zeros = put(make_mesh(devices, axis_type), x, weight, x_spec, w_spec)

    def loss(x: jax.Array, scales_and_zeros: jax.Array, packed: jax.Array) -> jax.Array:
        return (product(x, packed, scales_and_zeros).astype(jnp.float32) ** 2).sum()

    found = jax.jit(jax.grad(loss, (0, 1)))(x, scales_and_zeros, packed)
    single = jax.device_put(jax.tree.map(np.asarray, (x, scales_and_zeros, packed)), devices.flat[0])
    for a, b, like in zip(found, jax.grad(loss, (0, 1))(*single), (x, scales_and_zeros), strict=True):
        assert a.sharding.is_equivalent_to(like.sharding, a.ndim)
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(b).max())


@AXIS_TYPES
@pytest.mark.parametrize("m", [8, 320])
def test_a_megatron_mlp_takes_one_all_reduce(
    axis_type: AxisType, m: int, rng: np.random.Generator, inner_k_tiles: int, devices: np.ndarray
) -> None:
    up, down = (cases.random_weight(rng, n, k, GROUP_SIZE, inner_k_tiles) for n, k in ((1024, 256), (256, 1024)))
    x = cases.random_x(rng, (m, 256))
    mesh = make_mesh(devices, axis_type)
    w_up, w_down = (
        jax.device_put(int4_weight(w), int4_weight(w).shardings(NamedSharding(mesh, spec)))
        for w, spec in ((up, P(None, "t")), (down, P("t", None)))
    )

    def mlp(x: jax.Array, up: i4.Int4Weight, down: i4.Int4Weight) -> jax.Array:
        return jnp.tanh(x @ up) @ down

    operands = jax.device_put(x, NamedSharding(mesh, P("d"))), w_up, w_down
    assert collectives(mlp, *operands) == (["all-reduce"] if parts(mesh, "t") > 1 else [])
    y = jax.jit(mlp)(*operands)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("d")), 2)
    assert_same(y, mlp(x, int4_weight(up), int4_weight(down)))


@AXIS_TYPES
def test_a_scan_over_divided_layers_and_its_gradients(
    axis_type: AxisType, rng: np.random.Generator, inner_k_tiles: int, devices: np.ndarray
) -> None:
    mesh = make_mesh(devices, axis_type)
    x = cases.random_x(rng, (8, 8, 256))
    up, down = (
        jax.tree.map(
            lambda *leaves: np.stack(leaves),
            *(int4_weight(cases.random_weight(rng, n, k, GROUP_SIZE, inner_k_tiles)) for _ in range(3)),
        )
        for n, k in ((1024, 256), (256, 1024))
    )

    def loss(x: jax.Array, up: i4.Int4Weight, down: i4.Int4Weight) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, weights: tuple[i4.Int4Weight, i4.Int4Weight]) -> tuple[jax.Array, None]:
            up, down = weights
            return x + jnp.tanh(x @ up) @ down, None

        return (jax.lax.scan(layer, x, (up, down))[0].astype(jnp.float32) ** 2).mean()

    operands = (
        jax.device_put(x, NamedSharding(mesh, P("d"))),
        jax.device_put(up, up.shardings(NamedSharding(mesh, P(None, None, "t")))),
        jax.device_put(down, down.shardings(NamedSharding(mesh, P(None, "t")))),
    )
    gradient = jax.grad(loss, (0, 1, 2), allow_int=True)
    # Of the mean over devices, of the row-parallel product, and in the loop backwards of dx; scales' over "d" after it.
    assert set(collectives(gradient, *operands)) == {"all-reduce"}
    found, expected = jax.jit(gradient)(*operands), jax.jit(gradient)(x, up, down)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if a.dtype != jax.dtypes.float0:
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=0.03, atol=0.03 * np.abs(b).max())


@pytest.mark.parametrize("manual", [{"d", "t"}, {"d"}], ids=["all", "some"])
@AXIS_TYPES
def test_shard_map_over_all_axes_and_over_some(
    axis_type: AxisType, manual: set[str], x: np.ndarray, weight: cases.Weight, devices: np.ndarray
) -> None:
    mesh = make_mesh(devices, axis_type)
    w4 = int4_weight(weight)
    inner = "t" if "t" in manual else None
    f = jax.shard_map(
        lambda x, w4: x @ w4,
        mesh=mesh,
        in_specs=(P("d"), w4.partition_specs(P(None, inner))),
        out_specs=P("d", inner),
        axis_names=manual,
    )
    sharded = jax.device_put(w4, w4.shardings(NamedSharding(mesh, P(None, "t"))))
    operands = jax.device_put(x, NamedSharding(mesh, P("d"))), sharded
    y = jax.jit(f)(*operands)
    if "t" in manual:
        assert collectives(f, *operands) == []
        assert_equal(y, x @ w4)
    else:
        # What is left to XLA is a program of XLA's own.
        implementation = "dequantize" if axis_type == AxisType.Auto else None
        assert_same(y, i4.matmul(x, w4, implementation=implementation))


def test_a_part_of_a_padded_weight_is_refused(rng: np.random.Generator, cpu_grid: np.ndarray) -> None:
    mesh = make_mesh(cpu_grid)
    w4 = i4.quantize(rng.standard_normal((1000, 60)).astype(np.float32), group_size=64)
    three = Mesh(cpu_grid.flat[:3], ("t",))
    with pytest.raises(ValueError, match=r"n = 60, padded to 64, has 8 parts of 8 .* 3 devices.*multiple of 24 in n"):
        w4.shardings(NamedSharding(three, P(None, "t")))
    f = jax.shard_map(
        lambda x, w4: x @ w4, mesh=mesh, in_specs=(P(), w4.partition_specs(P(None, "t"))), out_specs=P(None, "t")
    )
    with pytest.raises(ValueError, match=r"a part of n = 16 of a weight whose n = 60 is padded to 64"):
        f(np.ones((4, 1000), jnp.bfloat16), w4)
    # XLA divides it all the same.
    sharded = jax.device_put(w4, w4.shardings(NamedSharding(mesh, P(None, "t"))))
    x = cases.random_x(rng, (4, 1000))
    np.testing.assert_array_equal(jax.jit(lambda x, w4: x @ w4)(x, sharded), x @ w4)


def test_a_weight_goes_to_a_mesh_from_the_host_part_by_part(weight: cases.Weight, devices: np.ndarray) -> None:
    mesh = make_mesh(devices)
    w4 = int4_weight(weight)
    shardings = w4.shardings(NamedSharding(mesh, P("d", "t")))
    placed = jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index]),
        w4,
        shardings,
    )
    for found in (placed, jax.device_put(w4, shardings)):
        n_tiles, k_tiles, *tile = w4.packed.shape
        part = (n_tiles // parts(mesh, "t"), k_tiles // parts(mesh, "d"), *tile)
        assert {shard.data.shape for shard in found.packed.addressable_shards} == {part}
        assert found.shape == w4.shape
        np.testing.assert_array_equal(found.dequantize(), w4.dequantize())


def test_groups_and_tiles_stay_whole() -> None:
    packed = (8, 4, 32, 4)  # n = 64, k = 512 in tiles of 128.
    units = {**weight_units(packed, 256), "m0": 6}
    assert units == {"batch": 1, "n": 8, "k": 2, "m0": 6}
    sizes = {"d": 2, "t": 4}
    x = ("m0", "k")

    def divided(packed: P, scales: P, x_spec: P, y: P | None = None) -> Division:
        wishes = [(PACKED, packed), (SCALES_AND_ZEROS, scales), (x, x_spec)]
        return divide(sizes, units, wishes, None if y is None else (("m0", "n"), y))

    # k has two whole groups: four devices cannot share them, two can.
    assert divided(P(None, "t"), P("t"), P(None, "t")).axes["k"] == ()
    assert divided(P(None, ("d", "t")), P(), P()).axes["k"] == ("d",)
    # Six rows do not go to four devices.
    assert divided(P(), P(), P("t")).spec(x) == P(None, None)
    # The weight comes first, x gets what it leaves.
    found = divided(P("d"), P(None, "d"), P(("d", "t")))
    assert (found.axes["n"], found.axes["m0"]) == (("d",), ())
    # A result divided over k's axes is scattered, where it can be.
    assert divided(P(None, "d"), P("d"), P(None, "d"), P("d")).scattered == "m0"
    assert divided(P(None, "d"), P("d"), P(None, "d"), P(None, "d")).result_spec(("m0", "n")) == P(None, "d")
    assert divided(P(None, "d"), P("d"), P(None, "d"), P("t")).scattered is None


@AXIS_TYPES
def test_a_k_that_would_be_cut_through_groups_is_gathered_and_right(
    axis_type: AxisType, rng: np.random.Generator, devices: np.ndarray
) -> None:
    weight = cases.random_weight(rng, 64, 512, 256, 2)
    x = cases.random_x(rng, (8, 512))
    mesh = make_mesh(devices, axis_type)
    # packed has 16 tiles of 32, so that JAX divides it by 4; the scales have 2 groups.
    operands = (
        jax.device_put(x, NamedSharding(mesh, P(None, "t"))),
        jax.device_put(weight.packed, NamedSharding(mesh, P(None, "t"))),
        jax.device_put(weight.scales_and_zeros, NamedSharding(mesh, P())),
    )
    y = jax.jit(functools.partial(i4.int4pack_mm, group_size=256))(*operands)
    assert_equal(y, i4.int4pack_mm(x, weight.packed, weight.scales_and_zeros, 256))


def test_out_sharding_is_checked(x: np.ndarray, weight: cases.Weight, devices: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"no argument's type names mesh axes.*with_sharding_constraint"):
        product(x, weight.packed, weight.scales_and_zeros, out_sharding=P("t"))
    operands = put(make_mesh(devices, AxisType.Explicit), x, weight, P("d"), P("t"))
    for spec in (P("other"), P(None, None, "t")):
        with pytest.raises(ValueError, match=r"2 dimensions.*explicit axes \['d', 't'\]"):
            product(*operands, out_sharding=spec)
    y = product(*operands, out_sharding=P("d", None))
    assert jax.typeof(y).sharding.spec == P("d", None)
    with pytest.raises(TypeError, match="accum_dtype is float16; it must be float32 or the dtype of x, bfloat16"):
        product(x, weight.packed, weight.scales_and_zeros, accum_dtype=jnp.float16)


@AXIS_TYPES
@pytest.mark.parametrize("way", ["column", "row"])
def test_dequantize_stays_where_the_weight_is(
    axis_type: AxisType, way: str, weight: cases.Weight, devices: np.ndarray
) -> None:
    _, w_spec, _ = WAYS[way]
    mesh = make_mesh(devices, axis_type)
    _, *operands = put(mesh, np.zeros((1, K), jnp.bfloat16), weight, P(), w_spec)
    f = functools.partial(i4.dequantize, group_size=GROUP_SIZE)
    assert collectives(f, *operands) == []
    w = jax.jit(f)(*operands)
    assert w.sharding.is_equivalent_to(NamedSharding(mesh, w_spec), 2)
    np.testing.assert_array_equal(w, f(weight.packed, weight.scales_and_zeros))


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("way", ["column", "row"])
def test_the_rule_by_which_xla_divides_the_dequantize_kernel(
    way: str, batch: tuple[int, ...], weight: cases.Weight, cpu_grid: np.ndarray
) -> None:
    # On CPUs XLA's own program is divided without a rule; here it stands for the kernel.
    dimensions = [batched(d) if batch else d for d in (PACKED, SCALES_AND_ZEROS, W)]
    operands = [np.broadcast_to(a, (*batch, *a.shape)) for a in (weight.packed, weight.scales_and_zeros)]
    shapes = {d: a.shape for d, a in zip(dimensions, operands, strict=False)}

    def local(packed: jax.Array, scales_and_zeros: jax.Array) -> jax.Array:
        return dequantize_reference(packed, scales_and_zeros, group_size=GROUP_SIZE)

    f = divided_by_xla(lambda division: local, shapes, dimensions[-1], GROUP_SIZE)
    division = Division({"n" if way == "column" else "k": ("t",), "batch": ("d",)})
    mesh = make_mesh(cpu_grid)
    placed = [
        jax.device_put(a, NamedSharding(mesh, division.spec(d))) for a, d in zip(operands, dimensions, strict=False)
    ]
    assert collectives(f, *placed) == []
    w = jax.jit(f)(*placed)
    assert w.sharding.is_equivalent_to(NamedSharding(mesh, division.spec(dimensions[-1])), w.ndim)
    np.testing.assert_array_equal(w, np.broadcast_to(weight.rounded, w.shape))


def test_experts_are_divided(rng: np.random.Generator, inner_k_tiles: int, devices: np.ndarray) -> None:
    experts = [cases.random_weight(rng, N, K, GROUP_SIZE, inner_k_tiles) for _ in range(4)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(int4_weight, experts))
    x = cases.random_x(rng, (4, 3, K))
    expected = np.stack([np.asarray(x_of_one @ int4_weight(e)) for x_of_one, e in zip(x, experts, strict=True)])
    mesh = make_mesh(devices)
    w4 = jax.device_put(stacked, stacked.shardings(NamedSharding(mesh, P("t"))))
    f = jax.vmap(lambda x, w4: x @ w4)
    operands = jax.device_put(x, NamedSharding(mesh, P("t"))), w4
    assert collectives(f, *operands) == []
    assert_equal(jax.jit(f)(*operands), expected)


def test_a_divided_program_is_exported(x: np.ndarray, weight: cases.Weight, devices: np.ndarray) -> None:
    operands = put(make_mesh(devices, AxisType.Explicit), x, weight, P("d", "t"), P(None, "t"))
    checks = [jax.export.DisabledSafetyCheck.custom_call(_ffi.TARGET)]
    program = jax.export.deserialize(jax.export.export(jax.jit(product), disabled_checks=checks)(*operands).serialize())
    np.testing.assert_array_equal(program.call(*operands), product(*operands))
