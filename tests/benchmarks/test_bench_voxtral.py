"""A small run of the benchmark of Voxtral, and the sizes of the model that it is of."""

from __future__ import annotations

import csv
import math
import pathlib
from typing import Any

import jax
import pytest

import bench_voxtral
import voxtral
from decoder_config import Config


def parameters(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_model_has_the_parameters_of_voxtral() -> None:
    weights = bench_voxtral.RandomWeights(None)
    text = jax.eval_shape(lambda: bench_voxtral.text_params(bench_voxtral.VOXTRAL, weights))
    config = voxtral.AudioConfig()
    audio = jax.eval_shape(lambda: voxtral.random_params(config, weights.linear, weights.dense))
    # What transformers counts, and the biases of the keys, which are not stored.
    assert parameters((text, audio)) == 4_676_271_104 + config.num_hidden_layers * config.hidden_size


def test_a_small_run_leaves_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
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
    audio = voxtral.AudioConfig(128, 512, 2, 2, 8, 8, 128)
    monkeypatch.setattr(bench_voxtral, "VOXTRAL", small)
    monkeypatch.setattr(bench_voxtral, "LLAMA3_8B", small)
    monkeypatch.setattr(bench_voxtral.voxtral, "AudioConfig", lambda: audio)
    monkeypatch.setattr(bench_voxtral, "TOKENS", 40)
    monkeypatch.setattr(bench_voxtral, "LOOP", 2)
    steps = [f"{name}step batch {batch} context 1138" for name in ("", "apart ") for batch in (1, 16)]
    steps += [f"llama3_8b step batch {batch} context 1024" for batch in (1, 4, 16)]
    gib = {}
    for kind in ("bf16", "int4 g128"):
        output = tmp_path / kind / "voxtral.csv"
        bench_voxtral.main(["--weights", kind, "--repeats", "1", "--output", str(output)])
        with output.open(newline="") as file:
            rows = {row["row"]: row for row in csv.DictReader(file)}
        for name in ("peak", "peak batch 16"):
            rows.pop(name, None)
        assert list(rows) == [
            "weights",
            "audio_encoder",
            "token_embedding",
            "text_decoder",
            *steps[:2],
            "load",
            *steps[2:],
        ]
        assert all(float(row["ms"]) > 0 for name, row in rows.items() if name != "weights")
        assert all(0 < float(rows[name]["floor"]) < 1 for name in steps)
        gib[kind] = float(rows["weights"]["gib"])
    assert gib["int4 g128"] < gib["bf16"]
