"""The example's audio encoder, projector and decoder against transformers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoder
import jax_int4mm as i4
import voxtral
from decoder_config import Config
from jax_int4mm import checkpoints

DATA = Path(__file__).parents[1] / "data" / "voxtral"
CHECKPOINT = checkpoints.load(DATA)
REFERENCE = np.load(DATA / "reference.npz")
AUDIO_CONFIG = voxtral.AudioConfig.from_huggingface(CHECKPOINT.config)
CONFIG = Config.from_huggingface(CHECKPOINT.config)

quantize = functools.partial(i4.quantize, group_size=32)


def largest_error(found: Any, reference: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float32) - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 0.025)])
def test_audio_and_text_are_those_of_transformers(fused: bool, dtype: str, bound: float):
    audio_params = voxtral.params_from_huggingface(CHECKPOINT, AUDIO_CONFIG, dtype)
    params = decoder.params_from_huggingface(CHECKPOINT, CONFIG, dtype)
    if fused:
        audio_params, params = voxtral.fuse(audio_params), decoder.fuse(params)
        assert "qkv" in audio_params["layers"][0]
    tokens = jnp.asarray(REFERENCE["input_ids"])
    with jax.default_matmul_precision("highest"):
        audio = jax.jit(voxtral.encode_audio, static_argnums=2)(audio_params, REFERENCE["input_features"], AUDIO_CONFIG)
        assert audio.dtype == dtype
        assert largest_error(audio, REFERENCE["audio_embeds"]) < bound
        x = voxtral.merge_audio(decoder.embed(params, tokens, CONFIG), tokens, audio, AUDIO_CONFIG)
        hidden, _ = decoder.forward_embedded(params, x, CONFIG)
        scores = decoder.logits(params, hidden, CONFIG)
    assert largest_error(scores, REFERENCE["logits"]) < bound


def test_int4_layers_compute_what_their_dequantised_ones_do():
    def is_int4(leaf: Any) -> bool:
        return isinstance(leaf, i4.Int4Weight)

    int4 = voxtral.params_from_huggingface(CHECKPOINT, AUDIO_CONFIG, "bfloat16", quantize)
    dense = jax.tree.map(lambda leaf: leaf.dequantize() if is_int4(leaf) else leaf, int4, is_leaf=is_int4)
    assert sum(map(is_int4, jax.tree.leaves(int4, is_leaf=is_int4))) == 6 * AUDIO_CONFIG.num_hidden_layers
    features = REFERENCE["input_features"]
    expected = np.asarray(voxtral.encode_audio(dense, features, AUDIO_CONFIG), np.float32)
    for params in (int4, voxtral.fuse(int4)):
        assert largest_error(voxtral.encode_audio(params, features, AUDIO_CONFIG), expected) < 0.02
    assert largest_error(expected, REFERENCE["audio_embeds"]) > 0.02


def test_random_parameters_have_the_shapes_of_fused_ones():
    def of_shape(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.bfloat16)

    random = voxtral.random_params(AUDIO_CONFIG, of_shape, of_shape)
    read = voxtral.fuse(voxtral.params_from_huggingface(CHECKPOINT, AUDIO_CONFIG, "bfloat16"))
    assert jax.tree.map(jnp.shape, random) == jax.tree.map(jnp.shape, read)


def test_audio_stands_where_its_tokens_do():
    embeddings = jnp.zeros((1, 5, 2))
    tokens = jnp.array([[24, 7, 24, 24, 8]])
    merged = voxtral.merge_audio(embeddings, tokens, jnp.array([[1.0, 1], [2, 2], [3, 3]]), AUDIO_CONFIG)
    assert merged[0, :, 0].tolist() == [1, 0, 2, 3, 0]


def test_the_default_is_voxtral_mini():
    config = voxtral.AudioConfig()
    assert config.frames_per_chunk == 3000
    assert config.frames_per_embedding == 4


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "whisper"}, "model_type"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"audio_config": {**CHECKPOINT.config["audio_config"], "activation_function": "relu"}}, "activation_function"),
        ({"audio_config": {**CHECKPOINT.config["audio_config"], "scale_embedding": True}}, "scale_embedding"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], field: str):
    with pytest.raises(ValueError, match=rf"config\.json has {field} = .*; implemented is "):
        voxtral.AudioConfig.from_huggingface(CHECKPOINT.config | changes)
