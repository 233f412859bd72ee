"""The example decoder against transformers, of every family, with and without a cache, in one piece and in several."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decode_kernels
import decoder
import jax_int4mm as i4
from decoder_config import Config, Rope
from jax_int4mm import checkpoints
from transformers_models import FAMILIES, random_model

DATA = Path(__file__).parents[1] / "data" / "families"


@functools.cache
def stored(name: str) -> tuple[checkpoints.Checkpoint, Config, np.ndarray, np.ndarray]:
    checkpoint = checkpoints.load(DATA / name)
    reference = np.load(DATA / name / "reference.npz")
    return checkpoint, Config.from_huggingface(checkpoint.config), reference["input_ids"], reference["logits"]


def params_of(name: str, dtype: str, fused: bool = False) -> decoder.Params:
    checkpoint, config, _, _ = stored(name)
    params = decoder.params_from_huggingface(checkpoint, config, dtype)
    return decoder.fuse(params) if fused else params


@jax.default_matmul_precision("highest")
def whole(params: decoder.Params, config: Config, tokens: Any) -> np.ndarray:
    hidden, _ = decoder.forward(params, jnp.asarray(tokens), config)
    return np.asarray(decoder.logits(params, hidden, config))


@jax.default_matmul_precision("highest")
def in_pieces(params: decoder.Params, config: Config, tokens: Any, per_row: bool) -> np.ndarray:
    """The scores by a cache that is written from the first position, then by several tokens, then one by one."""
    tokens = jnp.asarray(tokens)
    batch, length = tokens.shape
    cache = decoder.init_cache(config, batch, length + 5, params["norm"].dtype)
    cache = jax.tree.map(lambda a: a + 100, cache)  # What has not been written must not be seen.
    pieces, begin = [], 0
    for size in (9, 6, *[1] * (length - 15)):
        start = begin if begin == 0 else jnp.full(batch, begin) if per_row else jnp.int32(begin)
        hidden, cache = decoder.forward(params, tokens[:, begin : begin + size], config, cache, start)
        pieces.append(np.asarray(decoder.logits(params, hidden, config)))
        begin += size
    return np.concatenate(pieces, axis=1)


def largest_error(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.abs(found - reference).max() / np.abs(reference).max())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_scores_are_those_of_transformers(name: str, fused: bool):
    _, config, tokens, reference = stored(name)
    params = params_of(name, "float32", fused)
    assert largest_error(whole(params, config, tokens), reference) < 1e-5
    assert largest_error(in_pieces(params, config, tokens, per_row=False), reference) < 1e-5
    assert largest_error(in_pieces(params, config, tokens, per_row=True), reference) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_steps_on_the_kernels_score_alike(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch):
    if jax.default_backend() == "gpu":
        pytest.skip("on a GPU the kernels take 16 bits and larger heads; test_decode_kernels.py runs them there")
    monkeypatch.setattr(decode_kernels, "serve", lambda *_: True)
    steps = []
    add_norm = decode_kernels.add_norm
    monkeypatch.setattr(
        decode_kernels, "add_norm", lambda *args, **options: steps.append(1) or add_norm(*args, **options)
    )
    _, config, tokens, reference = stored(name)
    params = params_of(name, "float32", fused)
    assert largest_error(in_pieces(params, config, tokens, per_row=False), reference) < 1e-5
    assert len(steps) == 2 * config.num_hidden_layers * (tokens.shape[1] - 15)
    assert largest_error(in_pieces(params, config, tokens, per_row=True), reference) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_steps_on_the_kernels_in_16_bits(
    family: str, group_size: int | None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    config = Config(64, 128, 256, 2, 4, 2, 64, 64, model_type=family, windows=(5, None))
    weight = functools.partial(jnp.asarray, dtype=jnp.bfloat16)

    def linear(k: int, n: int) -> Any:
        w = weight(rng.normal(size=(k, n)) * 0.05)
        return w if group_size is None else i4.quantize(w, group_size=group_size)

    norms = ["attention_norm", "mlp_norm"]
    norms += ["attention_output_norm", "mlp_output_norm"] if config.output_norms else []
    layers = [
        {"qkv": linear(128, 512), "o": linear(256, 128), "gate_up": linear(128, 512), "down": linear(256, 128)}
        | {name: weight(rng.normal(size=128)) for name in norms}
        | ({name: weight(rng.normal(size=64)) for name in ("q_norm", "k_norm")} if config.qk_norm else {})
        for _ in range(2)
    ]
    embedding, norm = weight(rng.normal(size=(64, 128))), weight(rng.normal(size=128))
    params = {"embedding": embedding, "layers": layers, "norm": norm, "lm_head": linear(128, 64)}
    tokens = rng.integers(0, 64, (3, 20))
    expected = whole(params, config, tokens)
    monkeypatch.setattr(decode_kernels, "serve", lambda *_: True)
    assert largest_error(in_pieces(params, config, tokens, per_row=True), expected) < 0.03


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_in_16_bits_choose_the_same_tokens(name: str):
    _, config, tokens, reference = stored(name)
    found = whole(params_of(name, "bfloat16"), config, tokens)
    bound = 0.025 * np.abs(reference).max()
    assert np.abs(found - reference).max() < bound
    second, best = np.sort(reference, axis=-1)[..., -2:].transpose(2, 0, 1)
    clear = best - second > 2 * bound
    assert clear.any()
    np.testing.assert_array_equal(found.argmax(-1)[clear], reference.argmax(-1)[clear])


@pytest.mark.parametrize("name", FAMILIES)
def test_int4_layers_compute_what_their_dequantised_ones_do(name: str):
    checkpoint, config, tokens, reference = stored(name)
    quantize = functools.partial(i4.quantize, group_size=32)
    int4 = decoder.params_from_huggingface(checkpoint, config, "bfloat16", quantize, quantize)
    assert isinstance(int4["lm_head"], i4.Int4Weight)
    dense = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, i4.Int4Weight) else leaf,
        int4,
        is_leaf=lambda leaf: isinstance(leaf, i4.Int4Weight),
    )
    fused = decoder.fuse(int4)
    assert {"qkv", "gate_up"} <= set(fused["layers"][0])
    expected = whole(dense, config, tokens)
    for params in (int4, fused):
        assert largest_error(whole(params, config, tokens), expected) < 0.02
    assert largest_error(expected, reference) > 0.02


def test_layers_that_are_not_alike_stay_apart():
    _, config, tokens, _ = stored("qwen3")
    params = params_of("qwen3", "bfloat16")
    layers = [
        layer
        | {"q": i4.quantize(layer["q"], group_size=32), "k": i4.quantize(layer["k"], group_size=64)}
        | {"v": i4.quantize(layer["v"], group_size=32)}
        for layer in params["layers"]
    ]
    mixed = params | {"layers": layers}
    fused = decoder.fuse(mixed)
    assert "q" in fused["layers"][0]
    assert "qkv" not in fused["layers"][0]
    assert "gate_up" in fused["layers"][0]
    assert largest_error(whole(fused, config, tokens), whole(mixed, config, tokens)) < 0.02


def test_embeddings_may_be_int4():
    checkpoint, config, tokens, _ = stored("gemma2")
    name = "model.embed_tokens.weight"
    table = i4.quantize(jnp.asarray(checkpoint[name]).T, group_size=32)
    tensors = {**{key: checkpoint[key] for key in checkpoint}, name: table}
    params = decoder.params_from_huggingface(tensors, config, "bfloat16")
    assert params["lm_head"] is None
    dense = params | {"embedding": table.dequantize().T}
    assert largest_error(whole(params, config, tokens), whole(dense, config, tokens)) < 0.02


def test_a_checkpoint_of_no_decoder_is_refused():
    _, config, _, _ = stored("qwen3")
    with pytest.raises(ValueError, match=r"no model\.embed_tokens\.weight"):
        decoder.params_from_huggingface({"bert.embeddings": np.zeros(3)}, config, "float32")


# --- the configuration -------------------------------------------------------------------------------------------


def fields_of(name: str, **changes: Any) -> dict[str, Any]:
    return json.loads((DATA / name / "config.json").read_text()) | changes


def test_windows_of_configurations_without_layer_types():
    windows = {}
    for name in ("gemma2", "gemma3", "mistral_window", "qwen2_window", "llama3_tied"):
        fields = fields_of(name, num_hidden_layers=7, sliding_window=4)
        fields.pop("layer_types", None)
        windows[name] = [window is not None for window in Config.from_huggingface(fields).windows]
    assert windows == {
        "gemma2": [True, False] * 3 + [True],
        "gemma3": [True] * 5 + [False, True],
        "mistral_window": [True] * 7,
        "qwen2_window": [False] + [True] * 6,
        "llama3_tied": [],
    }
    assert Config.from_huggingface(fields_of("qwen2_window", use_sliding_window=False)).windows == ()


def test_gemma_3_has_a_rope_for_each_kind_of_layer():
    older = fields_of("gemma3", rope_theta=1e6, rope_local_base_freq=5e3)
    older["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    del older["rope_parameters"]
    config = Config.from_huggingface(older)
    assert config.rope_of(0) == Rope(5e3)
    assert config.rope_of(1) == Rope(1e6, factor=8.0)
    of_text = Config.from_huggingface({"model_type": "gemma3", "text_config": older, "eos_token_id": [1, 106]})
    assert of_text == config


# --- random models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_random_models_compute_what_transformers_does(name: str, rng: np.random.Generator):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.manual_seed(int(rng.integers(2**31)))
    kv_heads = int(rng.choice([1, 2, 4]))
    changes = {
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "hidden_size": int(rng.choice([24, 64])),
        "head_dim": int(rng.choice([8, 32])),
        "intermediate_size": int(rng.choice([40, 96])),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-3])),
    }
    model = random_model(name, changes)
    config = Config.from_huggingface(model.config.to_dict())
    tensors = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    tokens = rng.integers(0, config.vocab_size, (2, 20)).astype(np.int32)
    with torch.no_grad():
        reference = model(torch.from_numpy(tokens).long()).logits.numpy()
    params = decoder.fuse(decoder.params_from_huggingface(tensors, config, "float32"))
    assert largest_error(whole(params, config, tokens), reference) < 1e-4
