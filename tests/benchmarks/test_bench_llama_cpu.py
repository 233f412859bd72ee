"""A small run of the benchmark of Llama on a CPU."""

from __future__ import annotations

import csv
import importlib.util
import pathlib

import pytest

import bench_llama_cpu
from decoder_config import Config


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
    )
    monkeypatch.setattr(bench_llama_cpu, "LLAMA_1B", small)


@pytest.mark.parametrize(
    "weights",
    [
        ["int4 g128", "int4 g32", "bf16", "f32"],
        pytest.param(
            [bench_llama_cpu.LLAMA_CPP],
            marks=pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python"),
        ),
    ],
    ids=["ours", "llama.cpp"],
)
def test_a_small_run_leaves_every_row(weights: list[str], tmp_path: pathlib.Path) -> None:
    output = tmp_path / "llama.csv"
    options = ["--layers", "1", "--prompt", "8", "--steps", "2", "--repeats", "1", "--output", str(output)]
    bench_llama_cpu.main(["--weights", *weights, *options])
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["weights"] for row in rows] == weights
    assert all(float(row["prefill_tokens_per_s"]) > 0 and float(row["decode_tokens_per_s"]) > 0 for row in rows)
