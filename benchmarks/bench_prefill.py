"""Times int4pack_mm beside cuBLAS's bfloat16 product from 17 tokens on: thousands of products in minutes.

    python benchmarks/bench_prefill.py --random-m 20 --output benchmarks/results/h200/prefill.csv

The op's own plan and kernels are called below XLA (planned_calls.cu), cuBLAS through PyTorch, x @ w with w [k, n] and
with w [n, k] transposed; the faster one counts. Each is captured in a CUDA graph over as many weights as exceed 256 MB,
so that every weight comes from memory (over fewer where a product is so long that its weights hardly count), and the
graphs are replayed in turn; figures are medians, in microseconds a call. Before an int4 product is timed it is compared
with a float64 product of a few rows.

Totals over the linear layers of Voxtral Mini 3B, its audio encoder at 4500 tokens and its text model at 1138, follow
when their shapes and those m are among what was timed (--voxtral adds them).

--every-tile times every tile of the Hopper kernel and way to divide k, for fit_hopper_plan.py. --seconds repeats one
product, and cuBLAS's, for so long each, and reports the clock and power that nvidia-smi sees meanwhile.

Needs a GPU, PyTorch for it, and nvcc, unless --library names what a run here or elsewhere has compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

import planned_calls
from planned_calls import Planned, Problem
from result_table import write_csv
from timing import ROTATED_BYTES

if TYPE_CHECKING:
    import torch

MS = (17, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1138, 1500, 2048, 4096, 4500, 8192)
SHAPES = (
    *((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (131072, 3072)),
    *((3072, 3072), (8192, 3072), (3072, 8192), (1024, 3072), (1280, 1280), (5120, 1280), (1280, 5120)),
)
CUBLAS = "cuBLAS"
# Linear layers of one model: (n, k) and how many there are.
VOXTRAL: dict[str, tuple[int, Mapping[tuple[int, int], int]]] = {
    "audio encoder": (4500, {(1280, 1280): 4 * 32, (5120, 1280): 32, (1280, 5120): 32}),
    "text model": (
        1138,
        {(4096, 3072): 30, (1024, 3072): 2 * 30, (3072, 4096): 30, (8192, 3072): 2 * 30, (3072, 8192): 30},
    ),
}
VOXTRAL_GROUP_SIZE = 32
ROWS_CHECKED = 64
LARGEST_ERROR = 5e-3  # Relative, of a product of bfloat16 rounded once to bfloat16.
WORK_OF_A_GRAPH = 1e12  # Multiplications, but FEWEST_CALLS at least.
FEWEST_CALLS = 3
PAUSE = 1.0  # Seconds before each layer: its few tokens follow many of another, which leave the chip's clocks low.


@dataclasses.dataclass(frozen=True)
class Timed:
    """One line of the table."""

    problem: Problem
    implementation: str  # "hopper/128x64", or CUBLAS.
    split_k: int | None
    us: float


def random_ms(count: int, seed: int) -> list[int]:
    """That many m from 17 to 8192, each magnitude as likely as another."""
    drawn = np.random.default_rng(seed).uniform(np.log(17), np.log(8193), count)
    return sorted({int(m) for m in np.exp(drawn)})


def problems(
    shapes: Iterable[tuple[int, int]], ms: Iterable[int], group_sizes: Sequence[int], *, voxtral: bool
) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Every (n, k, group size) and its m, without repetition."""
    found: dict[tuple[int, int, int], set[int]] = {}
    for n, k in shapes:
        for group_size in group_sizes:
            found.setdefault((n, k, group_size), set()).update(ms)
    if voxtral:
        for m, layers in VOXTRAL.values():
            for n, k in layers:
                found.setdefault((n, k, VOXTRAL_GROUP_SIZE), set()).add(m)
    return ((layer, sorted(its_ms)) for layer, its_ms in found.items())


def totals(table: Iterable[Timed]) -> Iterator[tuple[str, float, float]]:
    """(model, int4, bfloat16) in milliseconds for each model all of whose layers were timed."""
    best: dict[tuple[Problem, bool], float] = {}
    for timed in table:
        key = timed.problem, timed.implementation == CUBLAS
        best[key] = min(timed.us, best.get(key, timed.us))
    for name, (m, layers) in VOXTRAL.items():
        needed = {Problem(m, n, k, VOXTRAL_GROUP_SIZE): count for (n, k), count in layers.items()}
        if all((problem, bf16) in best for problem in needed for bf16 in (False, True)):
            int4, dense = (sum(best[p, bf16] * c for p, c in needed.items()) / 1000 for bf16 in (False, True))
            yield name, int4, dense


class Weights:
    """Random weights of one shape, int4 and dense, more than the caches hold of each; the first are one weight."""

    def __init__(self, n: int, k: int, group_size: int) -> None:
        """All of them on the GPU."""
        import torch

        self.n, self.k, self.group_size = n, k, group_size
        int4_bytes = n * k // 2 + n * (k // group_size) * 4
        self.copies = max(3, -(-ROTATED_BYTES // int4_bytes))
        shape = self.copies, n // 8, k // 128, 32, 4
        self.packed = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
        sizes = self.copies, k // group_size, n
        scales = torch.rand(sizes, device="cuda") * 0.01 + 0.002
        zeros = torch.randn(sizes, device="cuda") * 0.01
        self.scales_and_zeros = torch.stack([scales, zeros], -1).bfloat16()
        q = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.int32)
        bytes_ = (q[:, ::2] << 4 | q[:, 1::2]).to(torch.uint8)
        self.packed[0] = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
        scale, zero = (self.scales_and_zeros[0, :, :, i].double().T.repeat_interleave(group_size, 1) for i in (0, 1))
        self.w = ((q.double() - 8) * scale + zero).bfloat16()
        dense_copies = max(2, -(-ROTATED_BYTES // (2 * n * k)))
        self.dense = torch.randn(dense_copies, n, k, device="cuda").bfloat16()

    def activations(self, m: int) -> torch.Tensor:
        """x [m, k]."""
        import torch

        return torch.randn(m, self.k, device="cuda").bfloat16()

    def call(self, planned: Planned, x: torch.Tensor, y: torch.Tensor, copy: int) -> None:
        """Enqueue one int4 product with one of the weights."""
        import torch

        pointers = (t.data_ptr() for t in (x, self.packed[copy], self.scales_and_zeros[copy], y))
        planned.launch(*pointers, torch.cuda.current_stream().cuda_stream)

    def check(self, planned: Planned, x: torch.Tensor) -> None:
        """Stop the run where the product of the first weight is wrong."""
        import torch

        y = torch.full((len(x), self.n), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.call(planned, x, y, 0)
        rows = torch.linspace(0, len(x) - 1, min(len(x), ROWS_CHECKED), device="cuda").long()
        exact = x[rows].double() @ self.w.double().T
        error = ((y[rows].double() - exact).norm() / exact.norm()).item()
        if not error <= LARGEST_ERROR:
            sys.exit(
                f"wrong result: {planned.name} at x {tuple(x.shape)}, w {(self.n, self.k)}: relative error {error}"
            )


class Graph:
    """Calls captured in a CUDA graph."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        """Run the first call once, then capture all."""
        import torch

        self.calls = len(calls)
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            calls[0]()
            self.stream.synchronize()
            with torch.cuda.graph(self.graph, stream=self.stream):
                for call in calls:
                    call()

    def replay(self) -> float:
        """Microseconds a call of one replay."""
        import torch

        with torch.cuda.stream(self.stream):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(self.stream)
            self.graph.replay()
            end.record(self.stream)
            self.stream.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / self.calls


def replay_in_turn(graphs: Sequence[Graph], rounds: int) -> list[float]:
    """Microseconds a call of each, medians of so many replays after a first one."""
    samples: list[list[float]] = [[] for _ in graphs]
    for i in range(rounds + 1):
        for graph, its in zip(graphs, samples, strict=True):
            us = graph.replay()
            if i > 0:
                its.append(us)
    return [statistics.median(its) for its in samples]


def graphs(weights: Weights, x: torch.Tensor, ways: Sequence[Planned]) -> Iterator[tuple[str, int | None, Graph]]:
    """(implementation, split_k, graph) of cuBLAS in both layouts and of every way."""
    import torch

    m = len(x)
    y = torch.empty(m, weights.n, device="cuda", dtype=torch.bfloat16)
    calls = max(FEWEST_CALLS, min(weights.copies, int(WORK_OF_A_GRAPH / (m * weights.n * weights.k))))

    def dense(w: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.mm(x, w, out=y)

    def int4(planned: Planned, copy: int) -> Callable[[], object]:
        return lambda: weights.call(planned, x, y, copy)

    rows = [weights.dense[i % len(weights.dense)] for i in range(calls)]
    yield CUBLAS, None, Graph([dense(w.T) for w in rows])
    # The same bytes, read as [k, n].
    yield CUBLAS, None, Graph([dense(w.view(weights.k, weights.n)) for w in rows])
    for planned in ways:
        yield planned.name, planned.split_k, Graph([int4(planned, i) for i in range(calls)])


def measure(weights: Weights, m: int, ways: Sequence[Planned], rounds: int) -> Iterator[Timed]:
    """Every way to compute one product, and cuBLAS's; the faster of its layouts."""
    problem = Problem(m, weights.n, weights.k, weights.group_size)
    x = weights.activations(m)
    for planned in ways:
        weights.check(planned, x)
    contenders = list(graphs(weights, x, ways))
    medians = replay_in_turn([graph for _, _, graph in contenders], rounds)
    timed = [Timed(problem, name, k, us) for (name, k, _), us in zip(contenders, medians, strict=True)]
    yield min(timed[:2], key=lambda t: t.us)
    yield from timed[2:]


def clock_and_power() -> str:
    """What nvidia-smi sees now."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader", "--id=0"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def sustain(weights: Weights, m: int, planned: Planned, seconds: float) -> Iterator[str]:
    """A line on each of cuBLAS's and our product, repeated for so long."""
    contenders = list(graphs(weights, weights.activations(m), [planned]))
    for name, _, graph in contenders:
        samples: list[float] = []
        seen = "not looked at"
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            samples.append(graph.replay())
            if seen == "not looked at" and time.monotonic() > end - seconds / 2:
                seen = clock_and_power()
        late = samples[len(samples) // 2 :]
        first, then = samples[0], statistics.median(late)
        problem = f"{weights.n} x {weights.k} g{weights.group_size} m={m}"
        yield f"{problem}: {name} {first:.1f} us at first, {then:.1f} in the second half of {seconds:g} s; {seen}"


def describe_run(commit: str | None) -> dict[str, object]:
    """What a figure must be read with."""
    import torch

    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit}


def row(timed: Timed, run: Mapping[str, object]) -> dict[str, object]:
    """A line of the CSV."""
    return {
        **{name: getattr(timed.problem, name) for name in ("n", "k", "group_size", "m")},
        **{"implementation": timed.implementation, "split_k": timed.split_k or "", "us": f"{timed.us:.2f}"},
        **run,
    }


def shape(text: str) -> tuple[int, int]:
    """A shape of the command line, "n,k"."""
    n, k = map(int, text.split(","))
    if n % 8 or k % 256:
        raise argparse.ArgumentTypeError(f"{text}: n must be a multiple of 8 and k one of 256")
    return n, k


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape, nargs="*", default=list(SHAPES), help="n,k; default: all")
    parser.add_argument("--m", type=int, nargs="+", default=list(MS))
    parser.add_argument("--random-m", type=int, default=0, metavar="COUNT", help="more m, log-uniform from 17 to 8192")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the random m")
    parser.add_argument("--group-size", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--rounds", type=int, default=5, help="samples of each figure")
    parser.add_argument("--every-tile", action="store_true")
    parser.add_argument("--voxtral", action="store_true")
    parser.add_argument("--seconds", type=float, default=0, help="also repeat the last m of every shape for so long")
    parser.add_argument("--library", type=pathlib.Path, help="the compiled library")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/benchmarks"), help="where to compile")
    parser.add_argument("--commit", help="of the code that is timed, where it is not a checkout")
    parser.add_argument("--output", type=pathlib.Path, help="the CSV to write, after every shape")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the table and write it."""
    arguments = parse()
    import torch

    library, device = planned_calls.for_this_gpu(arguments.library, arguments.build)
    ms = arguments.m + random_ms(arguments.random_m, arguments.seed)
    if arguments.random_m:
        print(f"random m of seed {arguments.seed}: {ms[len(arguments.m) :]}")
    run = describe_run(arguments.commit)
    table: list[Timed] = []
    lines: list[str] = []
    for (n, k, group_size), its_ms in problems(arguments.shape, ms, arguments.group_size, voxtral=arguments.voxtral):
        weights = Weights(n, k, group_size)
        torch.cuda.synchronize()
        time.sleep(PAUSE)
        for m in its_ms:
            problem = Problem(m, n, k, group_size)
            ways = planned_calls.plan(library, problem, device, every=arguments.every_tile)
            dense, *ours = measure(weights, m, ways, arguments.rounds)
            table += [dense, *ours]
            best = min(ours, key=lambda timed: timed.us)
            divided = f" / {best.split_k}" if best.split_k and best.split_k > 1 else ""
            ratio = f"{dense.us:9.1f} / {best.us:9.1f} us = {dense.us / best.us:.2f}"
            print(f"{n:6d} x {k:5d} g{group_size:<3d} m={m:<5d} {ratio}  {best.implementation}{divided}", flush=True)
        if arguments.seconds:
            chosen = planned_calls.plan(library, Problem(its_ms[-1], n, k, group_size), device)[0]
            for line in sustain(weights, its_ms[-1], chosen, arguments.seconds):
                lines.append(line)
                print(line, flush=True)
        del weights
        torch.cuda.empty_cache()
        if arguments.output:
            write_csv(arguments.output, [row(timed, run) for timed in table])
    for name, int4, dense_ms in totals(table):
        print(f"Voxtral Mini 3B, {name}: int4 {int4:.2f} ms, bfloat16 {dense_ms:.2f} ms, {dense_ms / int4:.2f}x")


if __name__ == "__main__":
    main()
