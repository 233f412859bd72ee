"""Times the CUDA kernel of dequantize below XLA, beside a copy and a fill of as many bytes.

    python benchmarks/bench_dequantize.py --output benchmarks/results/h200/dequantize.csv

The kernel reads n k / 2 bytes of words and 4 n k / group_size of scales and zeros, and writes 2 n k. The copy reads and
writes as many in all, half of them each; the fill writes 2 n k. Each is captured in a CUDA graph over as many weights
as exceed 256 MB, and the graphs are replayed in turn; figures are medians, in microseconds a call. Every call writes a
matrix of its own, or ("one w") all the same one, which caches may hold. The first weight is compared with a float64 one
before anything is timed.

Needs a GPU, PyTorch for it, and nvcc, unless --library names what a run of bench_prefill.py or of this has compiled.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import planned_calls
from bench_prefill import Graph, Weights, describe_run, replay_in_turn, shape
from planned_calls import Problem
from result_table import write_csv

if TYPE_CHECKING:
    import torch

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096), (3072, 3072))
LARGEST_ERROR = 1e-4  # Relative. The two differ where float64 becomes bfloat16 by way of float32.


def moved_bytes(problem: Problem) -> int:
    """What has to be read and written for one weight."""
    values = problem.n * problem.k
    return values // 2 + 4 * values // problem.group_size + 2 * values


def calls(
    library: ctypes.CDLL, problem: Problem, weights: Weights, outputs: torch.Tensor, *, one_w: bool
) -> list[Callable[[], object]]:
    """A call of the kernel for each weight."""
    import torch

    def call(copy: int) -> None:
        buffers = weights.packed[copy], weights.scales_and_zeros[copy], outputs[0 if one_w else copy]
        pointers = (buffer.data_ptr() for buffer in buffers)
        planned_calls.dequantize(library, problem, *pointers, torch.cuda.current_stream().cuda_stream)

    return [functools.partial(call, copy) for copy in range(weights.copies)]


def measure(library: ctypes.CDLL, problem: Problem, rounds: int) -> Iterator[tuple[str, float]]:
    """What was timed, and microseconds a call of it."""
    import torch

    weights = Weights(problem.n, problem.k, problem.group_size)
    outputs = torch.full((weights.copies, problem.n, problem.k), float("nan"), device="cuda", dtype=torch.bfloat16)
    own, one = (calls(library, problem, weights, outputs, one_w=one_w) for one_w in (False, True))
    own[0]()
    error = ((outputs[0].double() - weights.w.double()).norm() / weights.w.double().norm()).item()
    if not error <= LARGEST_ERROR:
        sys.exit(f"wrong result: dequantize of {problem}: relative error {error}")

    half = torch.empty(weights.copies, 2, moved_bytes(problem) // 2, device="cuda", dtype=torch.uint8)
    copies = [functools.partial(target.copy_, source) for source, target in half]
    fills = [functools.partial(w.zero_) for w in outputs]
    names = "dequantize", "dequantize, one w", "copy", "fill"
    graphs = [Graph(its) for its in (own, one, copies, fills)]
    yield from zip(names, replay_in_turn(graphs, rounds), strict=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape, nargs="+", default=list(SHAPES), help="n,k; default: all")
    parser.add_argument("--group-size", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--rounds", type=int, default=9, help="samples of each figure")
    parser.add_argument("--library", type=pathlib.Path, help="the compiled library")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/benchmarks"), help="where to compile")
    parser.add_argument("--commit", help="of the code that is timed, where it is not a checkout")
    parser.add_argument("--output", type=pathlib.Path, help="the CSV to write, after every shape")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the table and write it."""
    arguments = parse()
    import torch

    library, _ = planned_calls.for_this_gpu(arguments.library, arguments.build)
    run = describe_run(arguments.commit)
    rows: list[dict[str, object]] = []
    for n, k in arguments.shape:
        for group_size in arguments.group_size:
            problem = Problem(0, n, k, group_size)
            for name, us in measure(library, problem, arguments.rounds):
                moved = 2 * n * k if name == "fill" else moved_bytes(problem)
                row = {"n": n, "k": k, "group_size": group_size, "what": name, "us": f"{us:.2f}"}
                rows.append(row | {"tb_per_s": f"{moved / us / 1e6:.3f}"} | run)
                print(
                    f"{n:6d} x {k:5d} g{group_size:<3d} {name:17s} {us:8.2f} us {moved / us / 1e6:.2f} TB/s", flush=True
                )
            torch.cuda.empty_cache()
            if arguments.output:
                write_csv(arguments.output, rows)


if __name__ == "__main__":
    main()
