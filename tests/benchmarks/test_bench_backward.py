"""A small run of the backward benchmark on this machine's default device, and that it times what it says."""

from __future__ import annotations

import csv
import pathlib
import sys

import jax
import numpy as np
import pytest

import bench_backward
import peers
import timing
from jax_int4mm.ops import _ffi


def test_a_small_run_leaves_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "new" / "backward.csv"
    monkeypatch.setattr(timing, "ROTATED_BYTES", 2**17)
    monkeypatch.setattr(timing, "ROUNDS", 3)
    arguments = ["--shape", "256,512", "--m", "1", "3", "--group-size", "32", "--commit", "none"]
    monkeypatch.setattr(sys, "argv", ["bench_backward.py", *arguments, "--output", str(output)])
    bench_backward.main()
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["what"], row["m"]) for row in rows} == {
        ("dequantize", ""),
        *((what, m) for what in ("int4", "bf16") for m in ("1", "3")),
    }
    assert all(float(row["us_q1"]) <= float(row["us"]) <= float(row["us_q3"]) for row in rows)


def test_the_product_itself_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ffi, "has_dequantize_kernel", lambda: True)
    w4 = peers.random_weight(jax.random.key(0), 64, 256, 32)
    lowered = (
        jax.jit(bench_backward.backward).trace(np.zeros((3, 64), w4.dtype), w4).lower(lowering_platforms=("cuda",))
    )
    assert lowered.as_text().count("custom_call @") == 1
    assert f"custom_call @{_ffi.DEQUANTIZE_TARGET}(" in lowered.as_text()


def test_a_wrong_result_stops_the_run() -> None:
    w4 = peers.random_weight(jax.random.key(0), 64, 256, 32)
    (dy,) = peers.activations(3, 64, 1)
    dx = np.asarray(bench_backward.backward(dy, w4), np.float32)
    bench_backward.check(dx, dy, w4)
    with pytest.raises(SystemExit, match=r"wrong result: dx of dy \(3, 64\)"):
        bench_backward.check(1.1 * dx, dy, w4)
