"""Times the backward product of int4pack_mm, dx = dy @ w, beside that of a bfloat16 weight.

    python benchmarks/bench_backward.py --output benchmarks/results/h200/backward.csv

"int4" is the derivative of int4pack_mm by x, from jax.vjp, jitted as a function of dy, packed and scales_and_zeros: it
dequantises the weight and multiplies. "bf16" is dy @ w with a dense w [n, k], jitted. "dequantize" is the first half of
"int4" alone. Each is a program over enough weights to exceed 256 MB, timed as bench_matmul.py does: on a GPU device
time, as JAX's profiler reports it, on a CPU wall time of single calls in turn. Figures are medians, in microseconds a
product, with first and third quartile. dx of the first weight is compared with the product of the weight that plain jnp
makes, before it is timed.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jax_int4mm as i4
import peers
from bench_matmul import describe_run, measure, shape
from jax_int4mm.ops.dequantize import dequantize_reference
from peers import Contender, DenseLayer, Int4Layer
from result_table import write_csv
from timing import JaxCalls

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096), (3072, 3072))
MS = (1024, 4096)
INT4 = "int4"
BF16 = "bf16"


def backward(dy: jax.Array, w4: i4.Int4Weight) -> jax.Array:
    """Dx [m, k] of dy [m, n]."""
    _, vjp = jax.vjp(
        lambda x: i4.int4pack_mm(x, w4.packed, w4.scales_and_zeros, w4.group_size),
        # Of which only the shape counts: the product itself is not asked for, and not computed.
        jnp.zeros((len(dy), w4.k), dy.dtype),
    )
    return vjp(dy)[0]


@jax.jit
def reference(dy: jax.Array, w4: i4.Int4Weight) -> jax.Array:
    """The same by plain jnp."""
    w = dequantize_reference(w4.packed, w4.scales_and_zeros, group_size=w4.group_size)
    return jnp.dot(dy.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST).astype(dy.dtype)


def check(dx: np.ndarray, dy: jax.Array, w4: i4.Int4Weight) -> None:
    """Stop the run where dx of a weight is wrong."""
    expected = np.asarray(reference(dy, w4), np.float32)
    error = np.linalg.norm(dx - expected) / np.linalg.norm(expected)
    if not error < peers.OUR_ERROR:
        sys.exit(f"wrong result: dx of dy {dy.shape}, w {w4}: relative error {error:.2e}")


def contenders(layer: Int4Layer, dense: DenseLayer, m: int, *, once: bool) -> Iterator[Contender]:
    """What is timed at one shape and m; with `once`, also what does not depend on m."""
    group_size = layer.group_size
    if once:

        def dequantize(_: None, w4: i4.Int4Weight) -> jax.Array:
            return i4.dequantize(w4.packed, w4.scales_and_zeros, w4.group_size)

        calls = JaxCalls(dequantize, [None] * len(layer.weights), layer.weights)
        yield Contender("dequantize", {"jax.jit": calls}, None, group_size)
    calls = JaxCalls(backward, peers.activations(m, layer.n, len(layer.weights)), layer.weights)
    check(calls.first_result(), calls.xs[0], layer.weights[0])
    yield Contender(INT4, {"jax.jit": calls}, m, group_size)
    yield peers.dense_dot(dense, m)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape, nargs="+", default=list(SHAPES), help="n,k; default: all")
    parser.add_argument("--m", type=int, nargs="+", default=list(MS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--commit", help="of the code that is timed, where it is not a checkout")
    parser.add_argument("--output", type=pathlib.Path, help="the CSV to write, after every shape")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the table and write it."""
    arguments = parse()
    run = describe_run(set(), arguments.commit)
    rows: list[dict[str, object]] = []
    for n, k in arguments.shape:
        layer = Int4Layer(n, k, arguments.group_size)
        dense = DenseLayer(k, n)  # dy @ w is x @ w of a layer from n to k.
        for m in arguments.m:
            us: dict[str, float] = {}
            for contender, _, timing in measure(contenders(layer, dense, m, once=m == arguments.m[0])):
                low, middle, high = np.quantile(timing.us, [0.25, 0.5, 0.75])
                us[contender.implementation] = middle
                row = {"n": n, "k": k, "m": contender.m, "group_size": contender.group_size}
                row |= {"what": contender.implementation, "us": f"{middle:.2f}", "us_q1": f"{low:.2f}"}
                rows.append(row | {"us_q3": f"{high:.2f}", "method": timing.method} | run)
            if "dequantize" in us:
                print(f"{n:6d} x {k:5d}         dequantize {us['dequantize']:9.1f} us", flush=True)
            ratio = f"bf16 {us[BF16]:9.1f} / int4 {us[INT4]:9.1f} us = {us[BF16] / us[INT4]:.2f}"
            print(f"{n:6d} x {k:5d} m={m:<5d} {ratio}", flush=True)
        if arguments.output:
            write_csv(arguments.output, rows)


if __name__ == "__main__":
    main()
