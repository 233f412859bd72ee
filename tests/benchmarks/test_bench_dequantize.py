"""What the benchmark of dequantize counts; with a GPU, a small run of it."""

from __future__ import annotations

import csv
import pathlib
import sys

import pytest

import bench_dequantize
import bench_prefill
from planned_calls import Problem


def test_moved_bytes_are_those_of_words_scales_and_the_dense_weight() -> None:
    assert bench_dequantize.moved_bytes(Problem(0, 16, 256, 64)) == 16 * 256 // 2 + 16 * 4 * 4 + 16 * 256 * 2


@pytest.mark.gpu
def test_a_small_run_leaves_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    output = tmp_path / "new" / "dequantize.csv"
    monkeypatch.setattr(bench_prefill, "ROTATED_BYTES", 2**20)
    arguments = ["--shape", "256,512", "--group-size", "32", "128", "--rounds", "1", "--build", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_dequantize.py", *arguments, "--commit", "none", "--output", str(output)])
    bench_dequantize.main()
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["what"], row["group_size"]) for row in rows} == {
        (what, g) for what in ("dequantize", "dequantize, one w", "copy", "fill") for g in ("32", "128")
    }
    assert all(float(row["us"]) > 0 for row in rows)
