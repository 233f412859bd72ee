"""A small run of the quality report."""

from __future__ import annotations

import csv
import importlib.util
import pathlib

import bench_quality


def test_a_small_run_leaves_a_row_for_each_method(tmp_path: pathlib.Path) -> None:
    output, figure = tmp_path / "quality.csv", tmp_path / "quality.svg"
    small = ["--group-sizes", "64", "--windows", "2", "--calibration-windows", "2"]
    bench_quality.main(["--output", str(output), "--figure", str(figure), *small])
    with output.open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["bf16", *bench_quality.METHODS]
    dense = float(rows["bf16"]["perplexity"])
    for method in bench_quality.METHODS:
        assert 0.97 * dense < float(rows[method]["perplexity"]) < 1.06 * dense
        assert float(rows[method]["perplexity"]) != dense
    assert float(rows["rtn"]["bits_per_weight"]) == 4.5
    assert int(rows["rtn"]["linear_bytes"]) * 16 == int(rows["bf16"]["linear_bytes"]) * 4.5
    assert figure.is_file() == bool(importlib.util.find_spec("matplotlib"))
