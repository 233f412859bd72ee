"""Times int4pack_mm on the default device against bf16 and against PyTorch's op, per shape, m and implementation.

    python benchmarks/bench_matmul.py --output benchmarks/results/h200/matmul.csv

Method: one jitted program makes one call for each of enough weights to exceed 256 MB, so that no weight is still in a
cache when its turn comes; XLA records the calls in a CUDA graph (command buffer). Batches of such programs are enqueued
back to back, and a batch's wall time over its calls is one sample; the median of the samples is reported with the first
and third quartile. PyTorch's op is timed the same way, by replays of a CUDA graph over as many weights. Each
implementation's result is compared once with the reference before it is timed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jax_int4mm as i4
from shapes import SHAPES

ROTATED_BYTES = 256 * 2**20
CALLS_PER_PROGRAM = 256
SHORT_M = 128
SAMPLES = 9
SAMPLE_SECONDS = 0.02


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def sample_microseconds(enqueue: Callable[[], object], wait: Callable[[object], None], calls: int) -> list[float]:
    """Microseconds per call: `enqueue` starts a program of `calls` calls, `wait` blocks until a program has ended."""
    wait(enqueue())
    start = time.perf_counter()
    wait(enqueue())
    repeats = max(2, int(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-6)))
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(repeats):
            last = enqueue()
        wait(last)
        samples.append((time.perf_counter() - start) * 1e6 / (repeats * calls))
    return samples


def copies(nbytes: int) -> int:
    """How many weights of `nbytes` exceed what caches hold; at least 6, so that XLA makes a graph."""
    return max(6, -(-ROTATED_BYTES // nbytes))


def time_jax(x: jax.Array, weights: list, product: Callable) -> list[float]:
    """Microseconds per product of x with one of `weights`."""
    # Short calls are repeated with other activations until a program outlasts its own dispatch by the host.
    rounds = max(1, CALLS_PER_PROGRAM // len(weights)) if len(x) <= SHORT_M else 1
    xs = [x * (i + 1) for i in range(rounds)]
    program = jax.jit(lambda xs, weights: [product(x, w) for x in xs for w in weights])
    return sample_microseconds(lambda: program(xs, weights), jax.block_until_ready, rounds * len(weights))


def time_tinygemm(m: int, n: int, k: int, group_size: int) -> list[float]:
    """Microseconds per call of PyTorch's `_weight_int4pack_mm` on its own packed weights."""
    import torch

    def weight() -> tuple:
        q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randn(k // group_size, n, 2, dtype=torch.bfloat16, device="cuda") * 0.01
        return torch.ops.aten._convert_weight_to_int4pack(q, 8), scales

    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weights = [weight() for _ in range(copies(n * k // 2))]
    run = lambda: [torch.ops.aten._weight_int4pack_mm(x, p, group_size, s) for p, s in weights]  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return sample_microseconds(graph.replay, lambda _: torch.cuda.synchronize(), len(weights))


def check(x: jax.Array, w4: i4.Int4Weight, implementation: str | None) -> None:
    """Stop unless the implementation agrees with the reference on this problem."""
    y = np.asarray(i4.matmul(x, w4, implementation=implementation), np.float32)
    expected = np.asarray(i4.matmul(x, w4, implementation="reference"), np.float32)
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    if not error < 2e-3:
        sys.exit(f"wrong result: {implementation} at x {x.shape}, w {w4.shape}: relative error {error:.2e}")


def random_weights(key: jax.Array, n: int, k: int, group_size: int) -> list[i4.Int4Weight]:
    """Enough different int4 weights to defeat the caches."""

    @functools.partial(jax.jit, static_argnums=1)
    def one(key: jax.Array, group_size: int) -> i4.Int4Weight:
        q_key, s_key, z_key = jax.random.split(key, 3)
        packed = i4.pack_int4(jax.random.randint(q_key, (n, k), 0, 16, dtype=jnp.int32))
        scale = jax.random.uniform(s_key, (k // group_size, n), minval=0.5, maxval=1.5) / 64
        zero = jax.random.normal(z_key, (k // group_size, n)) / 16
        return i4.Int4Weight(packed, jnp.stack([scale, zero], -1).astype(jnp.bfloat16), group_size=group_size, k=k, n=n)

    return [one(key, group_size) for key in jax.random.split(key, copies(n * k // 2))]


def describe_run() -> dict[str, str]:
    """What a figure must be read with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jax_int4mm": i4.__version__,
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
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    shapes = [tuple(map(int, s.split(","))) for s in arguments.shape] if arguments.shape else list(SHAPES.values())

    rows = []
    run = describe_run()

    def report(n: int, k: int, m: int, group_size: int, name: str, kernel: str, samples: list[float]) -> None:
        low, middle, high = quartiles(samples)
        row = {"n": n, "k": k, "m": m, "group_size": group_size, "implementation": name, "kernel": kernel}
        rows.append(row | {"us": f"{middle:.2f}", "us_q1": f"{low:.2f}", "us_q3": f"{high:.2f}"} | run)
        print(f"{n:6d} {k:6d} m={m:5d} g={group_size:3d} {name:16s} {kernel:18s} {middle:10.2f} us", flush=True)

    for n, k in shapes:
        xs = {m: jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16) for m in arguments.m}
        for group_size in arguments.group_size:
            weights = random_weights(jax.random.key(n + k), n, k, group_size)
            for m, x in xs.items():
                for name in arguments.implementation:
                    implementation = None if name == "auto" else name
                    check(x, weights[0], implementation)
                    plan = i4.explain(x.shape, weights[0], implementation=implementation)
                    samples = time_jax(x, weights, functools.partial(i4.matmul, implementation=implementation))
                    report(n, k, m, group_size, name, f"{plan.implementation}/{plan.tile}", samples)
            del weights
            if arguments.peers:
                for m in arguments.m:
                    report(n, k, m, group_size, "tinygemm", "torch", time_tinygemm(m, n, k, group_size))
        if arguments.peers:
            dense = [
                jax.random.normal(key, (k, n), jnp.bfloat16)
                for key in jax.random.split(jax.random.key(0), copies(2 * n * k))
            ]
            for m, x in xs.items():
                report(n, k, m, 0, "bf16", "jax.jit", time_jax(x, dense, jnp.matmul))
            del dense

    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
