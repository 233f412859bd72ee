"""How a call is timed: on a GPU by the device's clock, one contender at a time; on a CPU all contenders in turn."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

ROTATED_BYTES = 256 * 2**20
EXECUTIONS = 9  # Samples of a GPU figure.
ROUNDS = 25  # Samples of a figure of the CPU's clock, which vary more.
ROUNDS_TO_WARM_UP = 2
QUEUED_CALLS = 200


def copies(nbytes: int) -> int:
    """How many weights of `nbytes` exceed what caches hold; at least 4, or 2 where single calls are timed."""
    return max(2 if jax.default_backend() == "cpu" else 4, -(-ROTATED_BYTES // nbytes))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call, one sample an execution, and how they were taken.

    `us_span` is there where gaps between kernels can be told from kernels: from the start of the first kernel to the
    end of the last, over the number of calls.
    """

    us: Sequence[float]
    method: str
    us_span: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class JaxCalls:
    """`product(x, w)` inside `jax.jit`, for every pair of `xs` and `weights`."""

    product: Callable[[Any, Any], jax.Array]
    xs: Sequence[Any]
    weights: Sequence[Any]

    @functools.cached_property
    def one(self) -> Callable[[Any, Any], jax.Array]:
        """The program of a single product."""
        return jax.jit(self.product)

    @functools.cached_property
    def all(self) -> Callable[[Sequence[Any], Sequence[Any]], list[jax.Array]]:
        """The program of all products, which XLA cannot merge, since each has operands of its own."""
        return jax.jit(lambda xs, weights: [self.product(x, w) for x, w in zip(xs, weights, strict=True)])

    def first_result(self) -> np.ndarray:
        """The product of the first pair by the program that is timed, as float32."""
        if jax.default_backend() == "cpu":
            y = self.one(self.xs[0], self.weights[0])
        else:
            y = self.all(self.xs, self.weights)[0]
        return np.asarray(y, np.float32)

    def blocking(self) -> list[Callable[[], object]]:
        """One call for each pair, which returns when its result is there."""

        def call(x: Any, w: Any) -> jax.Array:
            return self.one(x, w).block_until_ready()

        return [functools.partial(call, x, w) for x, w in zip(self.xs, self.weights, strict=True)]

    def time_on_gpu(self) -> Timing:
        """Sum and span of the kernels of one execution of all products, as JAX's profiler reports them."""
        jax.block_until_ready(self.all(self.xs, self.weights))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(EXECUTIONS):
                    jax.block_until_ready(self.all(self.xs, self.weights))
            (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
            kernels = device_kernels(jax.profiler.ProfileData.from_file(str(trace)))
        durations, spans = per_execution(kernels)
        per_us = 1e3 * len(self.weights)
        return Timing((durations / per_us).tolist(), "sum of kernel durations", (spans / per_us).tolist())


@dataclasses.dataclass(frozen=True)
class TorchCalls:
    """Calls into PyTorch, each on a weight of its own."""

    calls: Sequence[Callable[[], Any]]

    def first_result(self) -> np.ndarray:
        """What the first call returns, as float32."""
        return self.calls[0]().float().cpu().numpy()

    def blocking(self) -> list[Callable[[], object]]:
        """The calls; on a CPU PyTorch returns when the result is there."""
        return list(self.calls)

    def time_on_gpu(self) -> Timing:
        """CUDA events around replays of a CUDA graph of all calls, which holds the gaps between its nodes too."""
        import torch

        def run() -> None:
            for call in self.calls:
                call()

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        samples = []
        for _ in range(EXECUTIONS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / len(self.calls))
        return Timing(samples, "events around a CUDA graph")


@dataclasses.dataclass(frozen=True)
class CpuCalls:
    """Calls that return when they are done, and whose results mean nothing."""

    calls: Sequence[Callable[[], Any]]

    def blocking(self) -> list[Callable[[], object]]:
        """The calls."""
        return list(self.calls)


Calls = JaxCalls | TorchCalls | CpuCalls


def device_kernels(profile: jax.profiler.ProfileData) -> list[tuple[float, float]]:
    """(start, duration) in ns of everything that ran on the GPU's streams, in order."""
    events = [
        (event.start_ns, event.duration_ns)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return sorted(events)


def per_execution(kernels: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of durations, and time from the first start to the last end, of each of the executions in `kernels`."""
    count, rest = divmod(len(kernels), EXECUTIONS)
    if rest or not kernels:
        sys.exit(f"the profile holds {len(kernels)} kernels, not a multiple of the {EXECUTIONS} executions")
    starts, durations = np.reshape(kernels, (EXECUTIONS, count, 2)).transpose(2, 0, 1)
    return durations.sum(axis=1), (starts + durations).max(axis=1) - starts.min(axis=1)


def time_in_turn(contenders: Sequence[Calls]) -> list[Timing]:
    """Wall time of single calls, one of each contender in turn, so that a busy machine slows all of them alike.

    Each round begins with another contender, since each finds what the one before it has left: threads asleep, caches
    full. Those that share weights are at different ones, so that none is brought into a cache by another.
    """
    blocking = [calls.blocking() for calls in contenders]
    samples: list[list[float]] = [[] for _ in contenders]
    for i in range(ROUNDS_TO_WARM_UP + ROUNDS):
        for j in range(len(blocking)):
            contender = (i + j) % len(blocking)
            calls, us = blocking[contender], samples[contender]
            call = calls[(i + contender * len(calls) // len(blocking)) % len(calls)]
            start = time.perf_counter()
            call()
            us.append((time.perf_counter() - start) * 1e6)
    return [Timing(us[ROUNDS_TO_WARM_UP:], "wall time, in turn") for us in samples]


def time_host(calls: Sequence[Callable[[], jax.Array]]) -> list[Timing]:
    """Time that the calling thread spends on one call: many are queued, and waited for after the clock has stopped.

    The calls take turns, so that a busy machine slows all of them alike.
    """
    for call in calls:
        call().block_until_ready()
    samples: list[list[float]] = [[] for _ in calls]
    for i in range(ROUNDS):
        for j in range(len(calls)):
            contender = (i + j) % len(calls)
            start = time.perf_counter()
            results = [calls[contender]() for _ in range(QUEUED_CALLS)]
            samples[contender].append((time.perf_counter() - start) * 1e6 / QUEUED_CALLS)
            jax.block_until_ready(results)
    return [Timing(us, f"wall time of {QUEUED_CALLS} queued calls, in turn") for us in samples]
