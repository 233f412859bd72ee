from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import decoder
import generate
import jax_int4mm as i4
from decoder_config import Config
from decoding import NOTHING, Generator
from jax_int4mm import checkpoints
from printed_table import figures, numbers

DATA = Path(__file__).parents[1] / "data"
REFERENCES = ["llama_base", "llama_llama3_rope"]
BYTE_MODEL = generate.BYTE_MODEL


def load(directory: Path, dtype: str) -> tuple[decoder.Params, Config]:
    checkpoint = checkpoints.load(directory)
    config = Config.from_huggingface(checkpoint.config)
    return decoder.params_from_huggingface(checkpoint, config, dtype), config


def logits(params: decoder.Params, config: Config, tokens: np.ndarray) -> np.ndarray:
    hidden, _ = decoder.forward(params, jnp.asarray(tokens), config)
    return np.asarray(decoder.logits(params, hidden, config))


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 2.5e-2), ("float16", 5e-3)])
def test_logits_match_transformers(name: str, dtype: str, bound: float):
    """Against transformers in f32; its rotary frequencies for llama_base had been rounded to bf16, which costs 8e-4."""
    reference = np.load(DATA / name / "reference.npz")
    params, config = load(DATA / name, dtype)
    with jax.default_matmul_precision("highest"):
        found = logits(params, config, reference["input_ids"])
    assert found.dtype == np.float32
    assert np.abs(found - reference["logits"]).max() <= bound * np.abs(reference["logits"]).max()


def test_llama3_rope_scaling_matches_transformers_closely():
    reference = np.load(DATA / "llama_llama3_rope" / "reference.npz")
    params, config = load(DATA / "llama_llama3_rope", "float32")
    with jax.default_matmul_precision("highest"):
        found = logits(params, config, reference["input_ids"])
    np.testing.assert_allclose(found, reference["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_decoding_with_a_cache_equals_the_whole_forward(weights: str):
    """Prompt of 5, then one token at a time, in a cache that is longer than the text."""
    params, config = load(DATA / "llama_base", "float32" if weights == "float32" else "bfloat16")
    if weights == "int4":
        params = generate.quantize_linears(params, 64, lm_head=True)
    tokens = jnp.asarray(np.load(DATA / "llama_base" / "reference.npz")["input_ids"])
    cache = decoder.init_cache(config, len(tokens), 24, params["embedding"].dtype)
    with jax.default_matmul_precision("highest"):
        expected = logits(params, config, tokens)
        pieces = []
        start = 0
        for stop in (5, *range(6, tokens.shape[1] + 1)):
            hidden, cache = decoder.forward(params, tokens[:, start:stop], config, cache, start)
            pieces.append(np.asarray(decoder.logits(params, hidden, config)))
            start = stop
    bound = 1e-5 if weights == "float32" else 2e-2
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=0, atol=bound * np.abs(expected).max())


def test_int4_layers_compute_what_their_dequantised_weights_do():
    params, config = load(DATA / "llama_base", "bfloat16")
    quantized = generate.quantize_linears(params, 64, lm_head=False)
    dequantized = jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, i4.Int4Weight) else w,
        quantized,
        is_leaf=lambda w: isinstance(w, i4.Int4Weight),
    )
    tokens = np.load(DATA / "llama_base" / "reference.npz")["input_ids"]
    expected = logits(dequantized, config, tokens)
    found = logits(quantized, config, tokens)
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
    assert np.abs(found - logits(params, config, tokens)).max() > 0.02 * np.abs(expected).max()


def test_shards_give_the_same_model(tmp_path: Path):
    source = checkpoints.load(DATA / "llama_base")
    names = list(source)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:])):
        shard = f"model-{number}.safetensors"
        safetensors.numpy.save_file({name: source[name] for name in part}, tmp_path / shard)
        weight_map |= dict.fromkeys(part, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(DATA / "llama_base" / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, "bfloat16")[0], load(DATA / "llama_base", "bfloat16")[0])


# --- the configuration -------------------------------------------------------------------------------------------


def config_fields(**changes: Any) -> dict[str, Any]:
    return json.loads((DATA / "llama_llama3_rope" / "config.json").read_text()) | changes


def test_old_and_new_spelling_of_rope_parameters():
    new = Config.from_huggingface(config_fields())
    fields = config_fields()
    scaling = fields.pop("rope_parameters")
    theta = scaling.pop("rope_theta")
    assert Config.from_huggingface(fields | {"rope_theta": theta, "rope_scaling": scaling}) == new
    older = {("type" if name == "rope_type" else name): value for name, value in scaling.items()}
    assert Config.from_huggingface(fields | {"rope_theta": theta, "rope_scaling": older}) == new
    plain = Config.from_huggingface(fields | {"rope_theta": theta, "rope_scaling": None})
    assert plain.rope.low_freq_factor is None
    assert plain.rope.theta == theta


def test_fields_that_a_config_may_leave_out():
    fields = config_fields(eos_token_id=[2, 7])
    for name in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "attention_bias"):
        del fields[name]
    config = Config.from_huggingface(fields)
    assert (config.head_dim, config.num_key_value_heads) == (64, 4)
    assert not config.tie_word_embeddings
    assert config.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mamba"),
        ("hidden_act", "relu"),
        ("use_bidirectional_attention", True),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_what_is_not_implemented_is_refused(field: str, value: object):
    with pytest.raises(ValueError, match=r"^config\.json .*; implemented (is|are) "):
        Config.from_huggingface(config_fields(**{field: value}))


def test_unknown_rope_type_is_refused():
    with pytest.raises(ValueError, match=r"rope type 'yarn'; implemented are default, linear and llama3"):
        Config.from_huggingface(config_fields(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}))


def test_config_survives_huggingface_spelling():
    config = Config.from_huggingface(json.loads((DATA / "llama_base" / "config.json").read_text()))
    assert Config.from_huggingface(json.loads(json.dumps(config.to_huggingface()))) == config


# --- generating --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> tuple[decoder.Params, Config]:
    params, config = load(DATA / "llama_base", "bfloat16")
    return generate.quantize_linears(params, 64, lm_head=False), config


# --- the command line --------------------------------------------------------------------------------------------


def test_command_line_with_token_numbers(base: tuple[decoder.Params, Config], capsys: pytest.CaptureFixture[str]):
    arguments = ["--token-ids", "--prompt", "3 5 7", "--max-new-tokens", "6", "--temperature", "0"]
    generate.main(["--model", str(DATA / "llama_base"), *arguments])
    printed = capsys.readouterr().out
    expected = np.concatenate(list(Generator(*base).generate([[3, 5, 7]], 6)), axis=1)[0]
    expected = [3, 5, 7, *(token for token in expected if token != NOTHING)]
    assert printed.split("--- int4 g64\n")[1].split("\n")[0].split() == [str(token) for token in expected]
    dense, int4 = numbers(printed, "linear layers, bytes")
    assert dense > int4
    for name in ("prefill, tokens/s", "first token, ms", "device memory, MB"):
        assert numbers(printed, name)[-1] > 0


def test_command_line_with_a_tokenizer_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(sys.modules, "rich.console", None)  # As where it is not installed.
    generate.main(["--model", str(DATA / "llama_base"), "--prompt", "the model", "--max-new-tokens", "5", "--dense"])
    assert "--- bfloat16\nthe model" in (printed := capsys.readouterr().out)
    assert len(figures(printed)["decode, tokens/s"]) == 1


def test_prompts_in_a_batch(capsys: pytest.CaptureFixture[str]):
    arguments = ["--temperature", "0", "--max-new-tokens", "12", "--perplexity-windows", "0"]
    prompts = ["import os\n", "class Queue:\n    def "]
    alone = []
    for prompt in prompts:
        generate.main([*arguments, "--prompt", prompt])
        alone.append(capsys.readouterr().out.split(f"--- int4 g64\n{prompt}")[1].split("\n\n┏")[0].split("\n\n  ")[0])
    generate.main([*arguments, "--prompt", prompts[0], "--prompt", prompts[1]])
    printed = capsys.readouterr().out
    for prompt, text in zip(prompts, alone, strict=True):
        assert f"> {prompt}\n{text.rstrip()}" in printed


def test_compared_models_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "text.txt"
    text.write_bytes((BYTE_MODEL / "heldout.txt").read_bytes()[:3000])
    options = ["--max-new-tokens", "20", "--perplexity", str(text), "--temperature", "0", "--stop", "\n"]
    generate.main(["--compare", *options, "--prompt", "import sys\nimport "])
    printed = capsys.readouterr().out
    for name in ("decode, tokens/s", "first token, ms", "device memory, MB"):
        assert len(figures(printed)[name]) == 2
    dense, int4 = numbers(printed, "perplexity")
    assert dense != int4 == pytest.approx(dense, rel=0.05)
    for name in ("bfloat16", "int4 g64"):
        following = printed.split(f"--- {name}\nimport sys\nimport ")[1]
        assert following.split("\n")[0].isidentifier()
        assert following.split("\n")[1] == ""
    with pytest.raises(SystemExit, match=r"there is no file .* to measure perplexity on"):
        generate.main(["--perplexity", str(tmp_path / "none.txt")])


def test_a_chat_model_is_prompted_by_its_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("jinja2")
    shutil.copytree(BYTE_MODEL, tmp_path / "chat")
    template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}def "
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    options = ["--temperature", "0", "--max-new-tokens", "8", "--perplexity-windows", "0"]
    generate.main([*options, "--prompt", "# system: Be brief.\n# user: Hello\ndef "])
    plain = capsys.readouterr().out.split("Hello\ndef ")[1].split("\n")[0]
    chat = ["--chat", "--system", "Be brief.", "--prompt", "Hello"]
    generate.main(["--model", str(tmp_path / "chat"), *options, *chat])
    assert capsys.readouterr().out.split("--- int4 g64\n")[1].split("\n")[0] == plain
    with pytest.raises(SystemExit, match="has no chat template; leave out --chat"):
        generate.main([*options, "--chat"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nowhere"], "there is no file or directory nowhere"),
        (["--model", str(DATA / "llama_llama3_rope")], "has no tokenizer.json; give the prompt as numbers"),
        (["--model", str(DATA / "llama_base" / "model.safetensors")], "has no config.json; give the directory"),
    ],
)
def test_mistakes_end_with_a_sentence(arguments: list[str], sentence: str):
    with pytest.raises(SystemExit, match=rf"^generate\.py: .*{sentence}"):
        generate.main(arguments)


def test_f32_is_for_dense_weights_only(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        generate.main(["--dtype", "float32"])
    assert "with --dtype float32 add --dense" in capsys.readouterr().err


# --- the shipped model -------------------------------------------------------------------------------------------


def test_shipped_model_is_small():
    assert (BYTE_MODEL / "model.safetensors").stat().st_size <= 8_000_000


def test_shipped_model_predicts_heldout_text_in_int4_as_in_bf16(capsys: pytest.CaptureFixture[str]):
    """The README's command, with fewer tokens: figures within the bounds, and text that can be read."""
    generate.main(["--max-new-tokens", "160"])
    printed = capsys.readouterr().out
    perplexities, bits = (numbers(printed, name) for name in ("perplexity", "bits per token"))
    assert len(perplexities) == 2
    assert max(bits) <= 2.2
    np.testing.assert_allclose(np.log2(perplexities), bits, atol=1e-3)
    assert perplexities[1] <= 1.03 * perplexities[0]
    dense, int4 = numbers(printed, "linear layers, bytes")
    assert int4 == dense * 9 // 32

    text = printed.split(generate.DEFAULT_PROMPT)[1].rsplit("linear layers", 1)[0]
    words = re.findall("[A-Za-z]{3,}", text)
    known = set(re.findall("[A-Za-z]{3,}", (BYTE_MODEL / "heldout.txt").read_text(encoding="utf-8")))
    assert len(words) >= 5
    assert sum(word in known for word in words) >= len(words) / 2


def test_shipped_model_decodes_with_a_quantized_output_projection(capsys: pytest.CaptureFixture[str]):
    generate.main(["--quantize-lm-head", "--group-size", "128", "--max-new-tokens", "8", "--perplexity-windows", "4"])
    perplexities = numbers(capsys.readouterr().out, "perplexity")
    assert len(perplexities) == 2
    assert perplexities[1] <= 1.1 * perplexities[0]
