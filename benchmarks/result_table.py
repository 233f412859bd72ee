"""The file that a benchmark leaves behind."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence


def write_csv(path: pathlib.Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows with the same keys to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: pathlib.Path) -> list[dict[str, object]]:
    """The rows of a file that :func:`write_csv` wrote, values as strings."""
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]
