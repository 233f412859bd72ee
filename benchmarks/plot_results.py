"""Draws the figures of the documentation from the tables that bench_matmul.py wrote.

    python benchmarks/plot_results.py benchmarks/results/h200/matmul.csv

writes docs/figures/speedup_over_bf16.svg and docs/figures/fraction_of_read_floor.svg; the same tables and matplotlib
give the same bytes. Several tables, of parts of one table's shapes and m, are drawn as one. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import importlib.util
import itertools
import pathlib
import sys
from collections.abc import Sequence

FIGURES = pathlib.Path(__file__).parents[1] / "docs" / "figures"
MOST_TOKENS_OF_DECODE = 16

Shape = tuple[int, int]
Lines = dict[Shape, dict[int, float]]  # (n, k) -> m -> value.


@dataclasses.dataclass
class Times:
    """Microseconds by shape and m, of one implementation and group size and of what it is held against."""

    devices: set[str] = dataclasses.field(default_factory=set)
    op: Lines = dataclasses.field(default_factory=lambda: collections.defaultdict(dict))
    bf16: Lines = dataclasses.field(default_factory=lambda: collections.defaultdict(dict))
    floor: dict[Shape, dict[int | None, float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(dict)
    )

    def speedup_over_bf16(self) -> Lines:
        """Time of the faster bf16 product over the op's."""
        return {
            shape: {m: self.bf16[shape][m] / us for m, us in sorted(by_m.items()) if m in self.bf16[shape]}
            for shape, by_m in self.op.items()
        }

    def fraction_of_read_floor(self) -> Lines:
        """Time of the pure read over the op's, for few tokens; the read may have been timed once for all m."""
        lines: Lines = {}
        for shape, by_m in self.op.items():
            floor = {m: self.floor[shape].get(m, self.floor[shape].get(None)) for m in by_m}
            lines[shape] = {
                m: read / us
                for m, us in sorted(by_m.items())
                if m <= MOST_TOKENS_OF_DECODE and (read := floor[m]) is not None
            }
        return lines


def read_times(paths: Sequence[pathlib.Path], implementation: str, group_size: int) -> Times:
    """What the figures need of some tables."""
    times = Times()
    for path in paths:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            times.devices.add(row["device"])
            shape, us = (int(row["n"]), int(row["k"])), float(row["us"])
            m = int(row["m"]) if row["m"] else None
            if row["implementation"] == "bf16" and m is not None:
                times.bf16[shape][m] = min(us, times.bf16[shape].get(m, us))
            elif row["group_size"] != str(group_size):
                continue
            elif row["implementation"] == "read floor":
                times.floor[shape][m] = us
            elif row["implementation"] == implementation and m is not None:
                times.op[shape][m] = us
    return times


def draw(path: pathlib.Path, lines: Lines, title: str, y_label: str) -> None:
    """Draw one line a shape against m, and the line 1, into an SVG file."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # Otherwise ids are random.
    plt.rcParams.update(
        {"svg.hashsalt": path.stem, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    marks = list(zip("os^Dv<>", plt.get_cmap("Dark2").colors, strict=False))
    looks = itertools.cycle(itertools.product(("-", "--", ":"), marks))
    drawn = sorted(((shape, by_m) for shape, by_m in lines.items() if by_m), key=lambda line: line[0][0] * line[0][1])
    for ((n, k), by_m), (dashes, (marker, colour)) in zip(drawn, looks, strict=False):
        axes.plot(
            list(by_m), list(by_m.values()), dashes, marker=marker, color=colour, markersize=4, label=f"{n} x {k}"
        )
    axes.axhline(1, color="black", linewidth=1)
    ticks = sorted({m for _, by_m in drawn for m in by_m})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(m) for m in ticks])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set(title=title, xlabel="m, tokens (log scale)", ylabel=y_label)
    figure.legend(loc="outside right center", title="n x k", fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def main() -> None:
    """Read the tables and draw what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=pathlib.Path, nargs="+")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--folder", type=pathlib.Path, default=FIGURES)
    arguments = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("no figure is drawn, since matplotlib is not installed: pip install -e '.[benchmarks]'")
    times = read_times(arguments.tables, arguments.implementation, arguments.group_size)
    if len(times.devices) != 1:
        sys.exit(f"the tables are of several devices, or empty: {sorted(times.devices)}")
    where = f"{times.devices.pop()}, group size {arguments.group_size}"
    figures = {
        "speedup_over_bf16": (times.speedup_over_bf16(), "int4 over bf16", "time of bf16 / time of int4pack_mm"),
        "fraction_of_read_floor": (
            times.fraction_of_read_floor(),
            "int4 at the memory's speed",
            "time of a pure read / time of int4pack_mm",
        ),
    }
    for name, (lines, title, y_label) in figures.items():
        if not any(lines.values()):
            print(f"{name}.svg is left out, since the tables have nothing to hold the op against.")
            continue
        draw(arguments.folder / f"{name}.svg", lines, f"{title}: {where}", y_label)
        print(arguments.folder / f"{name}.svg")


if __name__ == "__main__":
    main()
