"""The model that the benchmark of checkpoints is of, and a small run of it."""

from __future__ import annotations

import csv
import math
import pathlib
import sys

import pytest

import bench_checkpoints


def test_the_model_has_the_weights_of_voxtral() -> None:
    sizes = {name: math.prod(shape) for name, shape, _ in bench_checkpoints.voxtral_shapes()}
    chosen = [name for name, _, chosen in bench_checkpoints.voxtral_shapes() if chosen]
    # transformers counts 4,676,271,104 parameters: less the encoder's convolutions, positions, norms and biases.
    assert 0 < 4_676_271_104 - sum(sizes.values()) < 10_000_000
    assert len(chosen) == 32 * 6 + 30 * 7 + 1


def test_a_small_run_leaves_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    tiny = [("a.up.weight", (64, 96), True), ("a.norm.weight", (96,), False), ("embed.weight", (32, 96), False)]
    monkeypatch.setattr(bench_checkpoints, "voxtral_shapes", lambda layers=1.0: iter(tiny))
    monkeypatch.setattr(bench_checkpoints, "METHODS", ("rtn",))
    monkeypatch.setattr(bench_checkpoints, "COMMAND_METHODS", ("rtn",))
    output, folder = tmp_path / "new" / "checkpoints.csv", tmp_path / "folder"
    arguments = ["--folder", str(folder), "--output", str(output), "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_checkpoints.py", *arguments])
    bench_checkpoints.main()
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    loads = [
        (f"{step} {state}", kind)
        for state in ("cold", "warm")
        for kind in ("bf16", "int4")
        for step in ("read", "load")
    ]
    assert [(row["step"], row["what"]) for row in rows] == [
        *[("quantize", "rtn"), ("save", "bf16"), ("save", "int4")],
        *loads,
        ("command", "rtn"),
    ]
    assert 0.01 < float(rows[-1]["peak_gb"]) < 10
    assert not folder.exists()
