"""The table of figures that examples/generate.py prints, with rich or without."""

from __future__ import annotations

import re


def figures(printed: str) -> dict[str, list[str]]:
    """The rows of the table by their first cells."""
    rows = [[cell.strip() for cell in re.split(r"│|\s{2,}", line) if cell.strip()] for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def numbers(printed: str, name: str) -> list[float]:
    """The numbers of one row."""
    return [float(cell.replace(",", "")) for cell in figures(printed)[name]]
