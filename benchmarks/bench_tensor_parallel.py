"""Times the layers of a tensor-parallel block over 1, 2, 4, ... GPUs of this machine.

    python benchmarks/bench_tensor_parallel.py --output benchmarks/results/<device>/tensor_parallel.csv

The linear layers of one block of Llama-3 70B: fused qkv, gate and up divided by columns, o and down by rows; what is
between them is left out. A jitted program runs them again and again, each time on what came out before and on weights
that are not in a cache; a figure is what one time more costs, the median of a long program less that of a short one,
so that starting a program does not count. `products_us` and `all_reduce_us` are the shares of int4 kernels and of
communication, as JAX's profiler reports them, each for the device that spends least on them.

XLA_FLAGS, which is written down too, may change how XLA communicates; `--accum-dtype bfloat16` adds up parts of 16
bits.

On CPUs (--cpu-devices) it runs small layers, to show that it works; such figures say nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_int4mm as i4
import peers
from result_table import write_csv

COLUMN, ROW = P(None, "part"), P("part", None)
# (n, k) and how the matrix [k, n] is divided.
LLAMA_70B = {
    "qkv": (10240, 8192, COLUMN),
    "o": (8192, 8192, ROW),
    "gate": (28672, 8192, COLUMN),
    "up": (28672, 8192, COLUMN),
    "down": (8192, 28672, ROW),
}
KV_HEADS = 8  # Each with its queries side by side in qkv, so that devices have heads of their own.
GROUP_SIZE = 128
BLOCKS = 2  # Of 430 MB each.
# Of a short program and of a long one. Of few tokens more, since starting varies by more than such a block takes.
REPEATS = (4, 20)
REPEATS_OF_FEW = (20, 100)
FEW = 64
SAMPLES = 15
# In names of NCCL's kernels, and of those that XLA makes for an all-reduce of jax.lax.psum.
COLLECTIVE_KERNELS = ("nccl", "psum", "all_reduce", "all-reduce")

Layers = Mapping[str, tuple[int, int, P]]
Block = Mapping[str, i4.Int4Weight]


def make_block(key: jax.Array, layers: Layers, mesh: Mesh) -> dict[str, i4.Int4Weight]:
    """Random weights of one block, made where they stay."""
    block = {}
    for name, (n, k, spec) in layers.items():
        key, own = jax.random.split(key)
        shape = jax.eval_shape(lambda key, n=n, k=k: peers.random_weight(key, n, k, GROUP_SIZE), own)
        shardings = shape.shardings(NamedSharding(mesh, spec))
        block[name] = jax.jit(peers.random_weight, static_argnums=(1, 2, 3), out_shardings=shardings)(
            own, n, k, GROUP_SIZE
        )
    return block


def qkv_and_o(x: jax.Array, block: Block, accum_dtype: str) -> jax.Array:
    """qkv and o, which takes the queries."""
    heads = (x @ block["qkv"]).reshape(len(x), KV_HEADS, -1)[..., : block["o"].k // KV_HEADS]
    return i4.matmul(heads.reshape(len(x), -1), block["o"], accum_dtype=accum_dtype)


def up_and_down(x: jax.Array, block: Block, accum_dtype: str) -> jax.Array:
    """Up and down."""
    return i4.matmul(x @ block["up"], block["down"], accum_dtype=accum_dtype)


def gate_up_and_down(x: jax.Array, block: Block, accum_dtype: str) -> jax.Array:
    """Gate, up and down."""
    return i4.matmul((x @ block["gate"]) * (x @ block["up"]), block["down"], accum_dtype=accum_dtype)


PARTS = {"qkv, o": qkv_and_o, "up, down": up_and_down, "gate, up, down": gate_up_and_down}


def device_us(program: jax.stages.Compiled, operands: tuple[object, ...]) -> tuple[float, float]:
    """Microseconds of int4 products and of collectives in one execution, each on the GPU that spends least on them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(*operands))
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
        kernels = [
            [
                (event.name, event.duration_ns / 1e3)
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
            ]
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
        ]

    def least(names: Sequence[str]) -> float:
        return min(
            (sum(us for kernel, us in of if any(n in kernel for n in names)) for of in kernels if of), default=0.0
        )

    return least(["int4mm::"]), least(COLLECTIVE_KERNELS)


def median_us(program: jax.stages.Compiled, operands: tuple[object, ...]) -> float:
    """Of the wall time of an execution."""
    samples = []
    for _ in range(3 + SAMPLES):
        start = time.perf_counter()
        jax.block_until_ready(program(*operands))
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples[3:])


def measure(
    devices: Sequence[jax.Device], layers: Layers, ms: Sequence[int], accum_dtypes: Sequence[str]
) -> Iterator[dict[str, object]]:
    """A line for each part of a block, m, and dtype of what is communicated, if anything is."""
    mesh = Mesh(np.array(devices), ("part",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    blocks = [make_block(jax.random.key(i), layers, mesh) for i in range(BLOCKS)]
    hidden = layers["qkv"][1]
    if len(devices) == 1:
        accum_dtypes = ["float32"]
    for m, (name, part), accum_dtype in itertools.product(ms, PARTS.items(), accum_dtypes):
        lengths = REPEATS_OF_FEW if m <= FEW else REPEATS
        x = jax.device_put(jax.random.normal(jax.random.key(m), (m, hidden), jnp.bfloat16), everywhere)

        def run(repeats: int, x: jax.Array, blocks: list[Block], part=part, accum_dtype=accum_dtype) -> jax.Array:
            for i in range(repeats):
                # Between -1 and 1 again.
                x = jnp.tanh(part(x, blocks[i % BLOCKS], accum_dtype))
            return x

        short, long = (
            jax.jit(functools.partial(run, repeats), out_shardings=everywhere).lower(x, blocks).compile()
            for repeats in lengths
        )
        us = (median_us(long, (x, blocks)) - median_us(short, (x, blocks))) / (lengths[1] - lengths[0])
        products, all_reduce = device_us(long, (x, blocks))
        yield {
            "layers": name,
            "m": m,
            "devices": len(devices),
            "accum_dtype": accum_dtype,
            "us": round(us, 2),
            "products_us": round(products / lengths[1], 2),
            "all_reduce_us": round(all_reduce / lengths[1], 2),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "device": devices[0].device_kind,
            "jax": jax.__version__,
        }


def main() -> None:
    """Run the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 512, 4096])
    parser.add_argument("--accum-dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--cpu-devices", type=int, help="so many devices of the CPU, and small layers")
    parser.add_argument("--output", type=pathlib.Path, help="the CSV to write")
    arguments = parser.parse_args()
    layers: Layers = LLAMA_70B
    if arguments.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
        layers = {name: (n // 16, k // 16, spec) for name, (n, k, spec) in LLAMA_70B.items()}
    table: list[dict[str, object]] = []
    alone: dict[tuple[object, object], dict[str, object]] = {}
    count = 1
    while count <= jax.device_count():
        for line in measure(jax.devices()[:count], layers, arguments.m, arguments.accum_dtype):
            one = alone.setdefault((line["layers"], line["m"]), line)
            for key in ("us", "products_us"):
                of_one, of_several = float(str(one[key])), float(str(line[key]))
                line[f"speedup_of_{key}"] = round(of_one / of_several, 3) if of_several else ""
            table.append(line)
            print(
                f"{line['layers']:14s} m={line['m']:<5} {count} devices {line['accum_dtype']:8s} {line['us']:10} us "
                f"({line['products_us']} of products, {line['all_reduce_us']} of communication): "
                f"{line['speedup_of_us']} times as fast as one, products {line['speedup_of_products_us']} times",
                flush=True,
            )
        count *= 2
    if arguments.output:
        write_csv(arguments.output, table)


if __name__ == "__main__":
    main()
