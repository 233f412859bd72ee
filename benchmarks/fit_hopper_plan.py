"""Fits the table of ffi/cuda/hopper_plan.cc to the times of every tile and split, and says how well it chooses.

    python benchmarks/fit_hopper_plan.py benchmarks/results/h200/hopper_tiles.csv

The table is one of `bench_prefill.py --every-tile`. Read are its columns n, k, group_size, m, implementation
("hopper/128x64"), split_k and us; lines of other products are left out. Needs scipy.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

SM_COUNT = 132
STEP_K = 128
ROWS_OF_A_WARPGROUP = 64
# CTAs that find room at the same time in clusters of so many (MostClusters in hopper_plan.cc).
MOST_CTAS = {1: SM_COUNT, 2: SM_COUNT, 4: 112, 8: 96}
# Multiplications. Longer products were timed on a chip that slows down for its power, tiles that keep it busy the most.
MOST_WORK = 3e10
# The parameters that are no step times, in the order of the fitted vector.
SHARED = ("start", "kPerTile", "kPerTileToken", "kSplit", "kPerSplitToken", "kPerOwnedToken", "kBusy", "kAlone")

Tile = tuple[int, int]  # Rows of w, tokens.


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Timed:
    """One tile and split of one problem, and its microseconds."""

    problem: tuple[int, int, int, int]  # n, k, group size, m.
    tile: Tile
    split_k: int
    us: float

    @property
    def tiles(self) -> int:
        """Tiles of the output."""
        n, _, _, m = self.problem
        return ceil_div(n, self.tile[0]) * ceil_div(m, self.tile[1])


def read_timed(path: pathlib.Path) -> list[Timed]:
    """The lines of a table that name a tile which the plan could take, of products that are not too long."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            named = re.fullmatch(r"hopper/(\d+)x(\d+)", row["implementation"])
            if named is None:
                continue
            n, k, group_size, m = (int(row[name]) for name in ("n", "k", "group_size", "m"))
            tile = int(named[1]), int(named[2])
            timed = Timed((n, k, group_size, m), tile, int(row["split_k"]), float(row["us"]))
            room = timed.split_k == 1 or timed.tiles * timed.split_k <= MOST_CTAS[timed.split_k]
            if room and n * k * m <= MOST_WORK:
                found.append(timed)
    return found


def fastest_times(timed: Sequence[Timed]) -> dict[tuple[int, int, int, int], float]:
    """The microseconds of each problem's fastest tile."""
    fastest: dict[tuple[int, int, int, int], float] = {}
    for t in timed:
        fastest[t.problem] = min(t.us, fastest.get(t.problem, t.us))
    return fastest


class Model:
    """The estimate of hopper_plan.cc for many timed problems at once, as a function of its parameters."""

    def __init__(self, timed: Sequence[Timed]) -> None:
        """Everything that does not depend on the parameters."""
        self.names = sorted({t.tile for t in timed})
        self.us = np.array([t.us for t in timed])
        fastest = fastest_times(timed)
        self.fastest = np.array([fastest[t.problem] for t in timed])
        self.split = np.array([t.split_k for t in timed])
        self.tokens = np.array([t.tile[0] * t.tile[1] / 128 for t in timed])
        ctas = np.array([t.tiles for t in timed]) * self.split
        self.busy = np.minimum(ctas, SM_COUNT) / SM_COUNT - 0.9
        # Tiles left for a last wave that warpgroups find room for one by one are divided among them.
        warpgroups = np.array([t.tile[0] // ROWS_OF_A_WARPGROUP for t in timed])
        left = ctas % SM_COUNT
        divided = (self.split == 1) & (ctas > SM_COUNT) & (left > 0) & (left * warpgroups <= SM_COUNT)
        self.waves = np.where(self.split > 1, 1, -(-ctas // SM_COUNT)) - divided
        self.divided = divided / warpgroups
        self.steps = np.array([ceil_div(ceil_div(t.problem[1], STEP_K), t.split_k) for t in timed])
        groups = np.array([t.problem[2] < STEP_K for t in timed])
        self.column = len(SHARED) + 2 * np.array([self.names.index(t.tile) for t in timed]) + groups

    def estimate(self, p: np.ndarray) -> np.ndarray:
        """Microseconds."""
        step = p[self.column] * (1 + p[6] * self.busy)
        split = np.where(self.split > 1, p[3] + (p[4] + p[5] / self.split) * self.tokens, 0)
        waves = self.waves + p[7] * self.divided
        return p[0] + waves * (self.steps * step + p[1] + p[2] * self.tokens) + split

    def fit(self) -> np.ndarray:
        """The parameters, SHARED and then two step times for each tile.

        Relative errors count, outliers less, and the nearer to the fastest of its problem a time is the more.
        """
        step_times = [t for rows, tokens in self.names for t in (max(0.4, tokens * rows / 128 * 8 / 1750),) * 2]
        start = np.array([3, 0.2, 0.002, 1, 0.005, 0, 0, 1.1, *step_times])

        def errors(p: np.ndarray) -> np.ndarray:
            return (np.log(np.maximum(self.estimate(p), 0.1)) - np.log(self.us)) * (self.fastest / self.us) ** 3

        return least_squares(errors, start, loss="soft_l1", f_scale=0.05).x


def regrets(timed: Sequence[Timed], estimate: np.ndarray) -> list[float]:
    """For each problem the time of the tile with the least estimate, over that of the fastest."""
    chosen: dict[tuple[int, int, int, int], tuple[float, float]] = {}
    for t, estimated in zip(timed, estimate, strict=True):
        chosen[t.problem] = min((estimated, t.us), chosen.get(t.problem, (math.inf, math.inf)))
    return [chosen[problem][1] / us for problem, us in fastest_times(timed).items()]


def main() -> None:
    """Print the fitted parameters as they stand in hopper_plan.cc."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=pathlib.Path)
    timed = read_timed(parser.parse_args().table)
    model = Model(timed)
    p = model.fit()
    for name, value in zip(SHARED, p, strict=False):
        print(f"{name} = {value:.4f}")
    for i, (rows, tokens) in enumerate(model.names):
        one_group, more_groups = p[len(SHARED) + 2 * i : len(SHARED) + 2 * i + 2]
        print(f"    {{{one_group:.3f}, {more_groups:.3f}}},  // {rows} x {tokens}")
    found = regrets(timed, model.estimate(p))
    print(f"{len(timed)} times of {len(found)} problems; chosen over fastest: mean {np.mean(found):.4f}, ", end="")
    print(f"largest {max(found):.4f}")


if __name__ == "__main__":
    main()
