"""Times the layers of a tensor-parallel block over 1, 2, 4, ... GPUs of this machine.

    python benchmarks/bench_tensor_parallel.py --output benchmarks/results/<device>/tensor_parallel.csv

The linear layers of one block of Llama-3 70B: fused qkv, gate and up divided by columns, o and down by rows; what is
between them is left out. One jitted program runs several blocks, each with weights of its own, so that every weight
comes from memory; a figure is the median time of an execution over the number of blocks. `all_reduce_us` is what the
first device spent in communication, waiting included, as JAX's profiler reports it.

On CPUs (--cpu-devices) it runs small layers, to show that it works; such figures say nothing.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping

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
GROUP_SIZE = 128
BLOCKS = 2  # Of 430 MB each.
SAMPLES = 15
PAIRS = {"attention": ("qkv", "o"), "mlp": ("gate", "up", "down")}

Layers = Mapping[str, tuple[int, int, P]]


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


def attention(x: jax.Array, block: dict[str, i4.Int4Weight]) -> jax.Array:
    """qkv and o, of as many columns of qkv as o takes."""
    return (x @ block["qkv"])[:, : block["o"].k] @ block["o"]


def mlp(x: jax.Array, block: dict[str, i4.Int4Weight]) -> jax.Array:
    """Gate, up and down."""
    return ((x @ block["gate"]) * (x @ block["up"])) @ block["down"]


def communication_us(program: jax.stages.Compiled, operands: tuple[object, ...]) -> float:
    """Microseconds of collectives on one device in one execution."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(*operands))
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
        return sum(
            event.duration_ns / 1e3
            for plane in profile.planes
            if plane.name == "/device:GPU:0"
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
            if "nccl" in event.name.lower() or "all_reduce" in event.name.lower()
        )


def measure(devices: list[jax.Device], layers: Layers, ms: list[int]) -> Iterator[dict[str, object]]:
    """A line for each pair of layers and m."""
    mesh = Mesh(np.array(devices), ("part",), axis_types=(AxisType.Auto,))
    blocks = [make_block(jax.random.key(i), layers, mesh) for i in range(BLOCKS)]
    hidden = layers["qkv"][1]
    for m in ms:
        x = jax.device_put(jnp.full((m, hidden), 1e-3, jnp.bfloat16), NamedSharding(mesh, P()))
        for name, part in (("attention", attention), ("mlp", mlp)):

            def run(x: jax.Array, blocks: list[dict[str, i4.Int4Weight]], part: object = part) -> list[jax.Array]:
                return [part(x, block) for block in blocks]

            operands = x, [{layer: block[layer] for layer in PAIRS[name]} for block in blocks]
            program = jax.jit(run, out_shardings=NamedSharding(mesh, P())).lower(*operands).compile()
            for _ in range(3):
                jax.block_until_ready(program(*operands))
            samples = []
            for _ in range(SAMPLES):
                start = time.perf_counter()
                jax.block_until_ready(program(*operands))
                samples.append((time.perf_counter() - start) * 1e6 / BLOCKS)
            yield {
                "layers": name,
                "m": m,
                "devices": len(devices),
                "us": round(statistics.median(samples), 2),
                "all_reduce_us": round(communication_us(program, operands) / BLOCKS, 2),
                "device": devices[0].device_kind,
                "jax": jax.__version__,
            }


def main() -> None:
    """Run the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 512, 4096])
    parser.add_argument("--cpu-devices", type=int, help="so many devices of the CPU, and small layers")
    parser.add_argument("--output", type=pathlib.Path, help="the CSV to write")
    arguments = parser.parse_args()
    layers: Layers = LLAMA_70B
    if arguments.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
        layers = {name: (n // 16, k // 16, spec) for name, (n, k, spec) in LLAMA_70B.items()}
    table: list[dict[str, object]] = []
    alone: dict[tuple[object, object], float] = {}
    count = 1
    while count <= jax.device_count():
        for line in measure(jax.devices()[:count], layers, arguments.m):
            table.append(line)
            us = float(str(line["us"]))
            one = alone.setdefault((line["layers"], line["m"]), us)
            print(
                f"{line['layers']:9s} m={line['m']:<5} {count} devices {us:10.1f} us, "
                f"{line['all_reduce_us']} of them communication, {one / us:.2f} times as fast as one",
                flush=True,
            )
        count *= 2
    if arguments.output:
        write_csv(arguments.output, table)


if __name__ == "__main__":
    main()
