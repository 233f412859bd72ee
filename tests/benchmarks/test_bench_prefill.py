"""Which products the prefill benchmark times, and what it makes of them; with a GPU, a small run of it."""

from __future__ import annotations

import csv
import pathlib
import sys

import pytest

import bench_prefill
from bench_prefill import CUBLAS, VOXTRAL, VOXTRAL_GROUP_SIZE, Timed
from planned_calls import Problem


def test_random_m_are_of_every_magnitude() -> None:
    drawn = bench_prefill.random_ms(400, seed=1)
    assert drawn == bench_prefill.random_ms(400, seed=1)
    assert all(17 <= m <= 8192 for m in drawn)
    assert min(drawn) < 24
    assert max(drawn) > 6000
    assert sum(m < 373 for m in bench_prefill.random_ms(20, seed=2)) in range(4, 17)


def test_voxtral_adds_its_layers_and_repeats_none() -> None:
    found = dict(bench_prefill.problems([(1280, 1280), (64, 256)], [17, 4500], [128, 32], voxtral=True))
    assert found[64, 256, 32] == found[64, 256, 128] == found[1280, 1280, 32] == [17, 4500]
    assert found[5120, 1280, VOXTRAL_GROUP_SIZE] == [4500]
    assert found[8192, 3072, VOXTRAL_GROUP_SIZE] == [1138]
    assert len(found) == 4 + 2 + 5


def test_totals_need_every_layer_and_count_it_as_often_as_the_model_has_it() -> None:
    m, layers = VOXTRAL["audio encoder"]
    table = []
    for n, k in layers:
        problem = Problem(m, n, k, VOXTRAL_GROUP_SIZE)
        table += [Timed(problem, CUBLAS, None, 20.0), Timed(problem, "hopper/128x256", 1, 10.0)]
    assert list(bench_prefill.totals(table[:-1])) == []
    ((name, int4, dense),) = bench_prefill.totals([*table, Timed(table[1].problem, "hopper/128x128", 1, 99.0)])
    assert (name, int4, dense) == ("audio encoder", pytest.approx(192 * 0.01), pytest.approx(192 * 0.02))


def test_a_shape_that_cannot_be_packed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_prefill.parse(["--shape", "12,256"])
    assert "n must be a multiple of 8" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_small_run_times_every_tile(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("torch")
    output = tmp_path / "new" / "prefill.csv"
    monkeypatch.setattr(bench_prefill, "ROTATED_BYTES", 2**20)
    arguments = ["--shape", "256,512", "--m", "17", "40", "--group-size", "32", "--every-tile", "--rounds", "1"]
    arguments += ["--build", str(tmp_path), "--seconds", "0.01", "--commit", "none", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench_prefill.py", *arguments])
    bench_prefill.main()
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["n"], row["k"], row["m"], row["group_size"]) for row in rows} == {
        ("256", "512", m, "32") for m in ("17", "40")
    }
    found = {(row["implementation"], row["split_k"]) for row in rows}
    assert {(CUBLAS, ""), ("hopper/128x64", "1"), ("hopper/128x64", "4")} <= found
    assert all(float(row["us"]) > 0 for row in rows)
