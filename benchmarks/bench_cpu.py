"""Times int4pack_mm on this CPU against PyTorch's CPU op and bf16, one call of each in turn.

    python benchmarks/bench_cpu.py --output benchmarks/results/cpu-2-cores/matmul.csv

Method: wall time of single calls on the same machine state: every repetition runs each contender once, on the next of
enough weights to exceed 256 MB, so that weights come from memory and a busy neighbour slows all of them alike. Medians.
PyTorch's op has a packed form of its own; its weights are packed before the clock starts. All use all cores. OpenMP's
threads are told not to spin after a call (OMP_WAIT_POLICY=PASSIVE): left to spin, as is PyTorch's default, they hold
the cores that the next contender needs.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from collections.abc import Callable

# Read when PyTorch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_int4mm as i4
from result_table import write_csv
from shapes import SHAPES

ROTATED_BYTES = 256 * 2**20
REPETITIONS = 25


def contenders(n: int, k: int, m: int, group_size: int) -> dict[str, Callable[[int], object]]:
    """Name -> a call on the i-th weight that returns when its result is there."""
    rng = np.random.default_rng(0)
    count = max(2, -(-ROTATED_BYTES // (n * k // 2)))
    q = rng.integers(0, 16, (n, k), dtype=np.int32)
    pairs = (0.02 * rng.standard_normal((k // group_size, n, 2))).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)

    jax_x = jnp.asarray(x, jnp.bfloat16)
    # Copies of one weight: the time does not depend on the values, and each lies at an address of its own.
    packed = np.asarray(i4.pack_int4(q))
    weights = [(jnp.array(packed), jnp.asarray(pairs, jnp.bfloat16)) for _ in range(count)]

    torch_x = torch.from_numpy(x).bfloat16()
    torch_packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(q), 2)
    torch_weights = [(torch_packed.clone(), torch.from_numpy(pairs).bfloat16()) for _ in range(count)]
    dense = [torch.from_numpy(q).bfloat16() for _ in range(max(2, -(-ROTATED_BYTES // (2 * n * k))))]

    def ours(i: int) -> object:
        return i4.int4pack_mm(jax_x, *weights[i % count], group_size).block_until_ready()

    def torch_int4(i: int) -> object:
        matrix, scales = torch_weights[i % count]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(torch_x, matrix, group_size, scales)

    def torch_bf16(i: int) -> object:
        return torch.nn.functional.linear(torch_x, dense[i % len(dense)])

    return {"int4pack_mm": ours, "torch int4": torch_int4, "torch bf16": torch_bf16}


def main() -> None:
    """Run the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--group-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown")
    versions = {"cpu": cpu, "threads": torch.get_num_threads(), "jax": jax.__version__, "torch": torch.__version__}

    rows = []
    for n, k in list(SHAPES.values())[:4]:
        for group_size in arguments.group_size:
            for m in arguments.m:
                calls = contenders(n, k, m, group_size)
                seconds: dict[str, list[float]] = {name: [] for name in calls}
                for i in range(REPETITIONS + 2):
                    for name, call in calls.items():
                        start = time.perf_counter()
                        call(i)
                        seconds[name].append(time.perf_counter() - start)
                medians = {name: float(np.median(times[2:])) * 1e6 for name, times in seconds.items()}
                row = {"n": n, "k": k, "m": m, "group_size": group_size}
                rows.append(row | {f"{name} us": f"{us:.0f}" for name, us in medians.items()} | versions)
                ratios = ", ".join(f"{name} {us / medians['int4pack_mm']:.2f}x" for name, us in medians.items())
                print(
                    f"{n:6d} {k:6d} m={m:4d} g={group_size:3d} {medians['int4pack_mm']:8.0f} us  {ratios}", flush=True
                )

    if arguments.output:
        write_csv(arguments.output, rows)


if __name__ == "__main__":
    main()
