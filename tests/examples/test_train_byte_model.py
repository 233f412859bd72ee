from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoder
import generate
import jax_int4mm as i4
from decoder_config import Config
from jax_int4mm import checkpoints

pytest.importorskip("optax", reason="the training script needs optax")

import train_byte_model

CONFIG = Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    eos_token_ids=(0,),
)


@pytest.fixture(scope="module")
def params() -> decoder.Params:
    return train_byte_model.init_params(jax.random.key(0), CONFIG)


def test_simulated_rounding_is_that_of_the_library(params: decoder.Params):
    low = train_byte_model.cast(params, jnp.bfloat16)
    rounded = train_byte_model.rounded_to_int4(low)["layers"][1]["gate"]
    expected = i4.quantize(low["layers"][1]["gate"], group_size=train_byte_model.GROUP_SIZE).dequantize()
    np.testing.assert_array_equal(np.asarray(rounded), np.asarray(expected))


def test_rounding_noise_spans_one_step_of_each_group(params: decoder.Params):
    w = params["layers"][0]["down"]
    noisy = train_byte_model.with_rounding_noise(jax.random.key(1), params)["layers"][0]["down"]
    groups = np.asarray(train_byte_model.grouped(w))
    noise = np.asarray(train_byte_model.grouped(noisy - w)) / (np.ptp(groups, axis=1, keepdims=True) / 15)
    assert np.abs(noise).max() <= 0.5 + 1e-4
    assert noise.std() == pytest.approx(1 / 12**0.5, rel=0.02)


def test_written_model_is_the_trained_one(params: decoder.Params, tmp_path: Path):
    output = tmp_path / "models" / "tiny"
    train_byte_model.write_model(output, params, CONFIG, "held out\n", {"steps": 1})
    assert {file.name for file in output.iterdir()} == {
        "config.json",
        "heldout.txt",
        "model.safetensors",
        "training.json",
    }
    assert list(output.parent.iterdir()) == [output]
    checkpoint = checkpoints.load(output)
    assert Config.from_huggingface(checkpoint.config) == CONFIG
    read = decoder.params_from_huggingface(checkpoint, CONFIG, jnp.bfloat16)
    expected = train_byte_model.tied(train_byte_model.cast(params, jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, read, expected)


def test_training_learns_and_reports_what_generate_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = "--hidden 64 --intermediate 64 --layers 1 --heads 2 --kv-heads 1 --context 64 --batch 8 --dropout 0"
    train_byte_model.main(
        [*arguments.split(), "--steps", "120", "--evaluate-every", "60", "--output", str(tmp_path / "m")]
    )
    report = json.loads((tmp_path / "m" / "training.json").read_text())
    # Uniform bytes cost 8 bits; their frequencies alone bring English and Python to under 5.
    assert report["heldout_bits_per_byte"]["bf16"] < 4.9
    checkpoint = checkpoints.load(tmp_path / "m")
    config = Config.from_huggingface(checkpoint.config)
    params = decoder.params_from_huggingface(checkpoint, config, jnp.bfloat16)
    text = np.frombuffer((tmp_path / "m" / "heldout.txt").read_bytes(), np.uint8)
    bits = generate.mean_nats(params, config, text, windows=10**6) / np.log(2)
    assert bits == pytest.approx(report["heldout_sample_bits_per_byte"]["bf16"], abs=0.02)


def test_training_ends_by_the_clock(tmp_path: Path):
    arguments = "--hidden 64 --intermediate 64 --layers 1 --heads 2 --kv-heads 1 --context 64 --batch 2 --minutes 0.001"
    train_byte_model.main([*arguments.split(), "--evaluate-every", "2", "--output", str(tmp_path / "m")])
    assert json.loads((tmp_path / "m" / "training.json").read_text())["steps"] == 2
