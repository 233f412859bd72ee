"""The benchmark runs, checks what it times, and leaves a table; its figures are not looked at."""

from __future__ import annotations

import csv
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bench_matmul
import peers
import read_floor
import read_floor_cpu
import timing
from shapes import SHAPES


@pytest.fixture(autouse=True)
def few_weights_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROTATED_BYTES", 2**17)
    monkeypatch.setattr(timing, "ROUNDS", 3)


def test_shapes_are_distinct_and_can_be_packed() -> None:
    assert len(set(SHAPES.values())) == len(SHAPES)
    assert all(n % 8 == 0 and k % 256 == 0 for n, k in SHAPES.values())


def test_a_small_run_leaves_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "new" / "matmul.csv"
    arguments = ["--shape", "256,512", "--m", "1", "3", "--group-size", "32", "128", "--commit", "none"]
    chosen = [peer for peer in peers.PEERS if peers.why_missing(peer) is None]
    monkeypatch.setattr(sys, "argv", ["bench_matmul.py", *arguments, "--output", str(output), "--peers", *chosen])
    bench_matmul.main()

    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["us_q1"]) <= float(row["us"]) <= float(row["us_q3"]) for row in rows)
    assert {row["commit"] for row in rows} == {"none"}
    found = {(row["implementation"], row["m"], row["group_size"]) for row in rows}
    expected = {("host eager", "1", "32"), ("host jitted", "1", "32")}
    for m in ("1", "3"):
        expected |= {(name, m, g) for name in ("auto", "jnp.int4") for g in ("32", "128")} | {
            ("bf16", m, ""),
            ("f32", m, ""),
        }
    assert expected <= found
    assert ("read floor" in {name for name, _, _ in found}) == ("floor" in chosen)
    assert bool({"torch int4", "tinygemm"} & {name for name, _, _ in found}) == ("torch" in chosen)
    with_span = {row["implementation"] for row in rows if row["us_span"] and float(row["us_span"]) > 0}
    assert ({"auto", "jnp.int4", "bf16", "f32"} <= with_span) == (jax.default_backend() == "gpu")


def test_a_wrong_result_stops_the_run() -> None:
    layer = peers.Int4Layer(64, 128, 32)
    (x,) = peers.activations(2, layer.k, 1)
    y = timing.JaxCalls(lambda x, w: 1.1 * (x @ w), [x], layer.weights[:1]).first_result()
    with pytest.raises(SystemExit, match=r"wrong result: ours at x \(2, 128\)"):
        layer.check("ours", x, y, peers.PEER_ERROR)


def test_a_span_holds_the_gaps_between_kernels() -> None:
    kernels = [(1000.0 * i + start, 10.0) for i in range(timing.EXECUTIONS) for start in (0, 15, 40)]
    durations, spans = timing.per_execution(kernels)
    assert durations.tolist() == [30] * timing.EXECUTIONS
    assert spans.tolist() == [50] * timing.EXECUTIONS
    with pytest.raises(SystemExit, match="not a multiple of"):
        timing.per_execution(kernels[1:])


@pytest.mark.parametrize("text", ["12,256", "64,100"])
def test_a_shape_that_cannot_be_packed_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_matmul.py", "--shape", text])
    with pytest.raises(SystemExit):
        bench_matmul.main()
    assert "n must be a multiple of 8" in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.why_missing("torch") == "torch is not installed"
    assert peers.why_missing("bf16") is None


def test_the_read_floor_of_a_cpu_reads_every_word() -> None:
    if reason := read_floor_cpu.why_missing():
        pytest.skip(reason)
    words = np.random.default_rng().integers(2**63, size=1001, dtype=np.int64)
    halves = words.view(np.uint16)[: 4 * 1000]
    assert read_floor_cpu.read((words,)) == int(np.bitwise_xor.reduce(words))
    assert read_floor_cpu.read((words, halves)) == int(words[-1])


def test_the_read_floor_compiles_and_lowers_for_a_gpu(tmp_path: pathlib.Path) -> None:
    nvcc = read_floor.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    library = read_floor.compile_library(nvcc, "sm_90", tmp_path)
    assert library.ReadFloorHandler
    program = jax.jit(lambda data: read_floor.read(data, 4))
    lowered = program.trace(jnp.zeros(64, jnp.uint32)).lower(lowering_platforms=("cuda",)).as_text()
    assert read_floor.TARGET in lowered
    assert "ctas_per_sm = 4 : i32" in lowered
