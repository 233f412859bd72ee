"""Times int4pack_mm on the default device against bf16 and against PyTorch's op, per shape, m and implementation.

    python benchmarks/bench_matmul.py --output benchmarks/results/h200/matmul.csv

Method: one jitted program multiplies enough weights to exceed 256 MB, each by activations of its own, so that no
weight is still in a cache when its turn comes and XLA cannot merge products. On a GPU a figure is device time: the
durations of all kernels that one execution ran, as JAX's profiler reports them, over the number of products; on a CPU
it is wall time. PyTorch's op and cuBLAS are timed by CUDA events around replays of a CUDA graph over as many weights,
which adds the gaps between graph nodes, about 0.1 us each. Medians over executions, with first and third quartile.
Each implementation's result is compared with the reference before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jax_int4mm as i4
from result_table import write_csv
from shapes import SHAPES

ROTATED_BYTES = 256 * 2**20
EXECUTIONS = 9


def copies(nbytes: int) -> int:
    """How many weights of `nbytes` exceed what caches hold, at least 4."""
    return max(4, -(-ROTATED_BYTES // nbytes))


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def time_jax(xs: list[jax.Array], weights: list, product: Callable) -> list[float]:
    """Microseconds per product of x and a weight, one sample an execution of all pairs."""
    program = jax.jit(lambda xs, weights: [product(x, w) for x, w in zip(xs, weights, strict=True)])
    jax.block_until_ready(program(xs, weights))
    if jax.default_backend() == "cpu":
        samples = []
        for _ in range(EXECUTIONS):
            start = time.perf_counter()
            jax.block_until_ready(program(xs, weights))
            samples.append((time.perf_counter() - start) * 1e6 / len(weights))
        return samples
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(EXECUTIONS):
                jax.block_until_ready(program(xs, weights))
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        kernels = device_kernels(jax.profiler.ProfileData.from_file(str(trace)))
    per_execution, rest = divmod(len(kernels), EXECUTIONS)
    if rest or not kernels:
        sys.exit(f"the profile holds {len(kernels)} kernels, not a multiple of the {EXECUTIONS} executions")
    nanoseconds = np.reshape([duration for _, duration in kernels], (EXECUTIONS, per_execution)).sum(axis=1)
    return list(nanoseconds / 1e3 / len(weights))


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


def time_torch(calls: list[Callable[[], object]]) -> list[float]:
    """Microseconds per call, one sample a replay of a CUDA graph of all of them."""
    import torch

    def run() -> None:
        for call in calls:
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
        samples.append(start.elapsed_time(end) * 1e3 / len(calls))
    return samples


def time_tinygemm(m: int, n: int, k: int, group_size: int) -> list[float]:
    """Microseconds per call of PyTorch's `_weight_int4pack_mm` on its own packed weights."""
    import torch

    def weight() -> tuple:
        q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randn(k // group_size, n, 2, dtype=torch.bfloat16, device="cuda") * 0.01
        return torch.ops.aten._convert_weight_to_int4pack(q, 8), scales

    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weights = [weight() for _ in range(copies(n * k // 2))]
    return time_torch(
        [functools.partial(torch.ops.aten._weight_int4pack_mm, x, packed, group_size, s) for packed, s in weights]
    )


def time_cublas(m: int, n: int, k: int) -> list[float]:
    """Microseconds per bf16 product through PyTorch, weights as [n, k]."""
    import torch

    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies(2 * n * k))]
    return time_torch([functools.partial(torch.mm, x, w.t()) for w in weights])


def check(x: jax.Array, w4: i4.Int4Weight, implementation: str | None) -> None:
    """Stop unless the implementation agrees with the reference on this problem."""
    y = np.asarray(i4.matmul(x, w4, implementation=implementation), np.float32)
    expected = np.asarray(i4.matmul(x, w4, implementation="reference"), np.float32)
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    if not error < 1e-3:
        sys.exit(f"wrong result: {implementation} at x {x.shape}, w {w4.shape}: relative error {error:.2e}")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_weight(key: jax.Array, n: int, k: int, group_size: int) -> i4.Int4Weight:
    """An int4 weight of random nibbles, scales and zeros."""
    q_key, s_key, z_key = jax.random.split(key, 3)
    packed = i4.pack_int4(jax.random.randint(q_key, (n, k), 0, 16, dtype=jnp.int32))
    scale = jax.random.uniform(s_key, (k // group_size, n), minval=0.5, maxval=1.5) / 64
    zero = jax.random.normal(z_key, (k // group_size, n)) / 16
    return i4.Int4Weight(packed, jnp.stack([scale, zero], -1).astype(jnp.bfloat16), group_size=group_size, k=k, n=n)


def describe_run() -> dict[str, str]:
    """What a figure must be read with."""
    device = jax.devices()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": device.device_kind,
        "runtime": device.client.platform_version.splitlines()[-1],
        "jax": jax.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    """Run the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 8, 16, 64, 128, 256, 512, 1024, 4096])
    parser.add_argument("--group-size", type=int, nargs="+", default=[128])
    parser.add_argument("--implementation", nargs="+", default=["auto"], help='names, "auto" for the plan\'s choice')
    parser.add_argument("--shape", nargs="+", help="n,k pairs; default: the shared table")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--commit", help="of the code that is timed, where it is not a checkout")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shape] if arguments.shape else list(SHAPES.values())
    gpu = jax.default_backend() == "gpu"

    rows = []
    run = describe_run()
    if arguments.commit:
        run["commit"] = arguments.commit

    def report(n: int, k: int, m: int, group_size: int | None, name: str, kernel: str, samples: list[float]) -> None:
        low, middle, high = quartiles(samples)
        row = {"n": n, "k": k, "m": m, "group_size": group_size, "implementation": name, "kernel": kernel}
        rows.append(row | {"us": f"{middle:.2f}", "us_q1": f"{low:.2f}", "us_q3": f"{high:.2f}"} | run)
        print(f"{n:6d} {k:6d} m={m:5d} g={group_size or '-':>3} {name:10s} {kernel:16s} {middle:9.2f} us", flush=True)

    def activations(m: int, k: int, count: int) -> list[jax.Array]:
        return [jax.random.normal(key, (m, k), jnp.bfloat16) for key in jax.random.split(jax.random.key(m), count)]

    for n, k in shapes:
        for group_size in arguments.group_size:
            keys = jax.random.split(jax.random.key(n + k), copies(n * k // 2))
            weights = [random_weight(key, n, k, group_size) for key in keys]
            for m in arguments.m:
                xs = activations(m, k, len(weights))
                for name in arguments.implementation:
                    implementation = None if name == "auto" else name
                    check(xs[0], weights[0], implementation)
                    plan = i4.explain(xs[0].shape, weights[0], implementation=implementation)
                    samples = time_jax(xs, weights, functools.partial(i4.matmul, implementation=implementation))
                    report(n, k, m, group_size, name, f"{plan.implementation}/{plan.tile}", samples)
                if arguments.peers and gpu:
                    report(n, k, m, group_size, "tinygemm", "torch", time_tinygemm(m, n, k, group_size))
            del weights
        if arguments.peers:
            dense = [jax.random.normal(key, (k, n), jnp.bfloat16) for key in keys[: copies(2 * n * k)]]
            for m in arguments.m:
                samples = time_jax(activations(m, k, len(dense)), dense, jnp.matmul)
                report(n, k, m, None, "bf16", "jax.jit", samples)
                if gpu:
                    report(n, k, m, None, "bf16", "cuBLAS", time_cublas(m, n, k))
            del dense

    if arguments.output:
        write_csv(arguments.output, rows)


if __name__ == "__main__":
    main()
