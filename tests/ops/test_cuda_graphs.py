"""On a GPU: calls inside CUDA graphs, from several host threads, and without waiting for the device."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jax_int4mm as i4
from kernels import int4_weight

pytestmark = pytest.mark.gpu

LAYERS = 32
SIZES = ((256, 256), (512, 1024), (1024, 512))  # n, k
# How many operations are worth a CUDA graph to XLA.
ALWAYS = {"xla_gpu_graph_min_graph_size": 1}
NEVER = {"xla_gpu_graph_min_graph_size": 1_000_000}


def mlp_stack(x: jax.Array, ups: list[i4.Int4Weight], downs: list[i4.Int4Weight]) -> jax.Array:
    for up, down in zip(ups, downs, strict=True):
        x = jnp.tanh(jnp.tanh(x @ up) @ down)
    return x


@pytest.fixture
def gpu() -> jax.Device:
    return jax.devices("cuda")[0]


def launches(f: Callable[[], jax.Array], folder: pathlib.Path) -> dict[str, int]:
    """How often a call launched a kernel of ours and a CUDA graph, and how many of our kernels ran: JAX's profiler."""
    with jax.profiler.trace(str(folder)):
        f().block_until_ready()
    (trace,) = folder.rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(trace))
    host, device = (
        [
            event.name
            for plane in profile.planes
            if plane.name.startswith(of)
            for line in plane.lines
            for event in line.events
        ]
        for of in ("/host:CPU", "/device:GPU")
    )
    return {
        "kernels": sum("int4mm::" in name for name in host),
        "graphs": sum(name.startswith("cuGraphLaunch") for name in host),
        "ran": sum("int4mm::" in name for name in device),
    }


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_a_stack_of_layers_is_a_cuda_graph(
    m: int, gpu: jax.Device, rng: np.random.Generator, tmp_path: pathlib.Path
) -> None:
    ups, downs = (
        [jax.device_put(int4_weight(cases.random_weight(rng, n, k, 128, 8)), gpu) for _ in range(LAYERS)]
        for n, k in ((512, 256), (256, 512))
    )
    x = jax.device_put(cases.random_x(rng, (m, 256)), gpu)
    lowered = jax.jit(mlp_stack).lower(x, ups, downs)
    in_graph, eager = (lowered.compile(compiler_options=options) for options in (ALWAYS, NEVER))
    assert in_graph.as_text().count('custom_call_target="jax_int4mm_int4pack_mm"') == 2 * LAYERS
    expected = np.asarray(eager(x, ups, downs))
    # The first runs build the graph, others update and replay it, on other buffers too.
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(in_graph(x, ups, downs)), expected)
    other = jax.device_put(-np.asarray(x), gpu)
    np.testing.assert_array_equal(np.asarray(in_graph(other, ups, downs)), np.asarray(eager(other, ups, downs)))
    assert launches(lambda: eager(x, ups, downs), tmp_path / "eager") == {
        "kernels": 2 * LAYERS,
        "graphs": 0,
        "ran": 2 * LAYERS,
    }
    launched = launches(lambda: in_graph(x, ups, downs), tmp_path / "graph")
    # The last call writes to a new buffer at each run, for which XLA may record it anew: that too is a launch, into a
    # graph.
    assert launched.pop("kernels") <= 1
    assert launched == {"graphs": 1, "ran": 2 * LAYERS}


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
def test_threads_that_call_at_the_same_time(devices: int, rng: np.random.Generator) -> None:
    threads, calls = 4, 1000
    weights = [int4_weight(cases.random_weight(rng, n, k, 64, 8)) for n, k in SIZES]
    pairs = [(cases.random_x(rng, (m, w4.k)), w4) for w4 in weights for m in (1, 8, 33, 200)]
    on_each = [jax.device_put(pairs, device) for device in jax.devices("cuda")[:devices]]
    f = jax.jit(lambda x, w4: x @ w4)
    expected = [[f(x, w4) for x, w4 in pairs] for pairs in on_each]
    for other in expected[1:]:
        for a, b in zip(expected[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        differ = [jnp.zeros((), jnp.int32, device=next(iter(ys[0].devices()))) for ys in expected]
        for device, i in zip(rng.integers(devices, size=calls), rng.integers(len(pairs), size=calls), strict=True):
            differ[device] += (f(*on_each[device][i]) != expected[device][i]).sum()
        wrong.extend(
            f"thread {seed}, device {i}: {int(count)} elements" for i, count in enumerate(differ) if int(count)
        )

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_calls_that_a_cuda_graph_may_run_side_by_side(gpu: jax.Device, rng: np.random.Generator) -> None:
    # Long products of few CTAs, none of which waits for another.
    weights = [jax.device_put(int4_weight(cases.random_weight(rng, 64, 16384, 128, 8)), gpu) for _ in range(16)]
    x = jax.device_put(cases.random_x(rng, (8, 16384)), gpu)

    @jax.jit
    def program(x: jax.Array, weights: list[i4.Int4Weight]) -> list[jax.Array]:
        return [x @ w4 for w4 in weights]

    expected = program.lower(x, weights).compile(compiler_options=NEVER)(x, weights)
    options = {**ALWAYS, "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    side_by_side = program.lower(x, weights).compile(compiler_options=options)
    for _ in range(20):
        for y, of_one in zip(side_by_side(x, weights), expected, strict=True):
            np.testing.assert_array_equal(y, of_one)


def test_a_call_does_not_wait_for_the_device(gpu: jax.Device, rng: np.random.Generator) -> None:
    weight = jax.device_put(int4_weight(cases.random_weight(rng, 1024, 1024, 128, 8)), gpu)
    x = jax.device_put(cases.random_x(rng, (16, 1024)), gpu)

    @jax.jit
    def slow(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 300, lambda _, a: jnp.tanh(a @ a), a)

    @jax.jit
    def behind(busy: jax.Array, x: jax.Array, w4: i4.Int4Weight) -> jax.Array:
        return (x + busy[0, 0] * 0) @ w4

    a = jax.device_put(jnp.ones((4096, 4096), jnp.bfloat16), gpu)
    expected = np.asarray(behind(slow(a), x, weight))
    busy = slow(a)
    after = behind(busy, x, weight)
    # The device is still at work on what came first: the call was queued behind it.
    assert not after.is_ready()
    np.testing.assert_array_equal(after, expected)
