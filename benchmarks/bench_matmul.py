"""Times int4pack_mm on the default device, per shape, m, group size and implementation, and its peers in the same run.

    python benchmarks/bench_matmul.py --output benchmarks/results/h200/matmul.csv

Peers: a pure read of the same bytes ("read floor"), a jnp.int4 weight dequantised inside jit, PyTorch's int4 op, the
bf16 product by jax.jit and by PyTorch, and gemlite where it is installed. What cannot run here is left out, with a line
that says why.

On a GPU: one jitted program multiplies enough weights to exceed 256 MB, each by activations of its own, so that no
weight is still in a cache when its turn comes and XLA cannot merge products. `us` is device time: the durations of all
kernels that one execution ran, as JAX's profiler reports them, over the number of products; `us_span`, from the start
of the first kernel to the end of the last over the same number, holds the gaps between them as well, and is the smaller
one only where kernels overlapped. PyTorch's calls are timed by CUDA events around replays of a CUDA graph over as many
weights: a span, to be held against `us_span`. The read floor is timed as the op is, once for all m, with 2, 3, 4 and 8
CTAs per SM; the fastest counts.

On a CPU: wall time of single jitted calls, one of each contender in turn, each on the next of enough weights to exceed
256 MB, so that weights come from memory and a busy neighbour slows all of them alike. The read floor is XLA's xor over
all words of packed and scales_and_zeros, which a good kernel may undercut. PyTorch's int4 op has its weights packed, in
a form of its own, before the clock starts. All use all cores.

Figures are medians, with first and third quartile. The first result of every contender that has our weights is compared
with the reference before it is timed. "host eager" and "host jitted" are what one call of the op, or of a bf16 product,
takes of the calling thread at m = 1 and n = k = 256, where many are queued; a CPU may run them meanwhile.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jax_int4mm as i4
import peers
from peers import Contender, DenseLayer, Int4Layer
from result_table import write_csv
from shapes import SHAPES
from timing import Calls, Timing, time_host, time_in_turn

M_ON_GPU = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
M_ON_CPU = (1, 4, 16, 128)


def on_cpu() -> bool:
    """Whether the default device is a CPU."""
    return jax.default_backend() == "cpu"


def contenders(
    int4_layers: list[Int4Layer],
    dense_layers: list[DenseLayer],
    m: int,
    implementations: list[str],
    chosen: set[str],
    once: bool,
) -> Iterator[Contender]:
    """Everything to be timed at one shape and m; with `once`, also what does not depend on m."""
    for layer in int4_layers:
        for name in implementations:
            yield peers.int4pack_mm(layer, m, name)
        if "floor" in chosen and (on_cpu() or once):
            yield peers.pure_read(layer, m if on_cpu() else None)
        if "jnp.int4" in chosen:
            yield peers.dequantize_then_dot(layer, m)
        if "torch" in chosen:
            yield peers.torch_int4(layer, m)
        if "gemlite" in chosen:
            yield peers.gemlite(layer, m)
    for dense in dense_layers:
        yield peers.dense_dot(dense, m)
        if peers.why_missing("torch") is None:
            yield peers.torch_dense(dense, m)


def measure(entered: Iterable[Contender]) -> Iterator[tuple[Contender, str, Timing]]:
    """Each contender with its fastest kernel and that kernel's time."""
    if on_cpu():
        entered = list(entered)
        in_turn = iter(time_in_turn([calls for contender in entered for calls in contender.kernels.values()]))

    def time_one(calls: Calls) -> Timing:
        return next(in_turn) if on_cpu() else calls.time_on_gpu()

    for contender in entered:
        timings = {kernel: time_one(calls) for kernel, calls in contender.kernels.items()}
        kernel = min(timings, key=lambda kernel: float(np.median(timings[kernel].us)))
        yield contender, kernel, timings[kernel]


def host_overhead(group_size: int) -> Iterator[tuple[Contender, str, Timing]]:
    """What a call of the op takes of the calling thread, eager and jitted."""
    layer = Int4Layer(256, 256, group_size)
    w4 = peers.random_weight(jax.random.key(0), layer.n, layer.k, group_size)
    (x,) = peers.activations(1, layer.k, 1)
    w = peers.random_matrix(jax.random.key(0), layer.k, layer.n)
    int4 = functools.partial(i4.int4pack_mm, group_size=group_size), (x, w4.packed, w4.scales_and_zeros)
    bf16 = jnp.matmul, (x, w)
    rows = []
    for f, operands in (int4, bf16):
        kernel, its_group_size = ("bf16", None) if f is jnp.matmul else ("int4pack_mm", group_size)
        for name, call in (("host eager", f), ("host jitted", jax.jit(f))):
            rows.append((Contender(name, {}, 1, its_group_size), kernel, functools.partial(call, *operands)))
    for (contender, kernel, _), timing in zip(rows, time_host([call for _, _, call in rows]), strict=True):
        yield contender, kernel, timing


def describe_run(chosen: set[str], commit: str | None) -> dict[str, str]:
    """What a figure must be read with."""
    device = jax.devices()[0]
    described = {"device": device.device_kind, "driver": "", "runtime": device.client.platform_version.splitlines()[-1]}
    if on_cpu():
        cpuinfo = pathlib.Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
        described |= {"device": f"{model}, {len(os.sched_getaffinity(0))} CPUs", "runtime": ""}
    elif shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        described["driver"] = said[0].strip() if said else ""
    described |= {"jax": jax.__version__, "torch": ""}
    if chosen & {"torch", "bf16", "f32", "gemlite"} and peers.why_missing("torch") is None:
        import torch

        described["torch"] = torch.__version__
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    return described | {"commit": commit}


def shape(text: str) -> tuple[int, int]:
    """A shape of the command line, "n,k"."""
    n, k = map(int, text.split(","))
    if n % 8 or k % 128:
        raise argparse.ArgumentTypeError(f"{text}: n must be a multiple of 8 and k one of 128 (and of the group size)")
    return n, k


def main() -> None:
    """Run the table and write it."""
    peers_help = "; ".join(f"{name}: {what}" for name, what in peers.PEERS.items()) + "; default: all"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=M_ON_CPU if on_cpu() else M_ON_GPU)
    parser.add_argument("--group-size", type=int, nargs="+", default=[128])
    parser.add_argument("--implementation", nargs="+", default=["auto"], help='names, "auto" for the plan\'s choice')
    parser.add_argument("--shape", type=shape, nargs="+", default=list(SHAPES.values()), help="n,k; default: all")
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=list(peers.PEERS), help=peers_help)
    parser.add_argument("--commit", help="of the code that is timed, where it is not a checkout")
    parser.add_argument("--output", type=pathlib.Path, help="the CSV to write, after every shape")
    arguments = parser.parse_args()

    chosen = set(arguments.peers)
    for peer in arguments.peers:
        if reason := peers.why_missing(peer):
            chosen.remove(peer)
            print(f"{peer} ({peers.PEERS[peer]}) is left out, since {reason}.", flush=True)
    run = describe_run(chosen, arguments.commit)
    rows: list[dict[str, object]] = []

    def report(n: int, k: int, measured: Iterable[tuple[Contender, str, Timing]]) -> None:
        for contender, kernel, timing in measured:
            m, g, name = contender.m, contender.group_size, contender.implementation
            low, middle, high = (f"{us:.2f}" for us in np.quantile(timing.us, [0.25, 0.5, 0.75]))
            span = f"{np.median(timing.us_span):.2f}" if timing.us_span else ""
            row: dict[str, object] = {"n": n, "k": k, "m": m, "group_size": g, "implementation": name, "kernel": kernel}
            row |= {"us": middle, "us_q1": low, "us_q3": high, "us_span": span, "method": timing.method}
            rows.append(row | run)
            print(f"{n:6d} {k:6d} m={m or '-':>4} g={g or '-':>3} {name:11s} {kernel:16s} {middle:>9} us", flush=True)

    report(256, 256, host_overhead(arguments.group_size[0]))
    for n, k in arguments.shape:
        int4_layers = [Int4Layer(n, k, group_size) for group_size in arguments.group_size]
        dense_layers = [
            DenseLayer(n, k, dtype) for peer, dtype in (("bf16", "bfloat16"), ("f32", "float32")) if peer in chosen
        ]
        for m in arguments.m:
            once = m == arguments.m[0]
            report(n, k, measure(contenders(int4_layers, dense_layers, m, arguments.implementation, chosen, once)))
        if arguments.output:
            write_csv(arguments.output, rows)


if __name__ == "__main__":
    main()
