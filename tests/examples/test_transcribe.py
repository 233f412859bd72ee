"""Transcription with a tiny Voxtral, from a sound file to text."""

from __future__ import annotations

import base64
import json
import shutil
import wave
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import audio
import decoder
import transcribe
import voxtral
from decoder_config import Config
from jax_int4mm import checkpoints
from tekken import TekkenTokenizer

DATA = Path(__file__).parents[1] / "data" / "voxtral"
SPECIAL = 40


def write_tekken(path: Path, **changes: Any) -> None:
    """Bytes, pairs of them up to "lang", and a text of its own for every other token that the model may say."""
    tokens = [bytes([value]) for value in range(256)] + [b"la", b"lan", b"lang"]
    tokens += [b"<%d>" % rank for rank in range(len(tokens), 600)]
    config = {"pattern": r"\s*\S+", "default_vocab_size": SPECIAL + len(tokens), "default_num_special_tokens": SPECIAL}
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(value).decode()} for rank, value in enumerate(tokens)]
    path.write_text(json.dumps({"config": config, "vocab": vocab} | changes))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(DATA, tmp_path / "model")
    write_tekken(tmp_path / "model" / "tekken.json")
    return tmp_path / "model"


@pytest.fixture
def sound(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A little more than two chunks of this tiny model."""
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, audio.SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((rng.normal(0, 3000, 2 * 16 * audio.HOP + 100)).astype(np.int16).tobytes())
    return path


def test_text_of_tokens_and_back(tmp_path: Path):
    write_tekken(tmp_path / "tekken.json")
    tokenizer = TekkenTokenizer(tmp_path / "tekken.json")
    decode = tokenizer.decoder()
    assert [decode(SPECIAL + value) for value in "é".encode()] == ["", "é"]
    assert (decode(3), decode(10**6), decode(SPECIAL + 258)) == ("", "", "lang")
    pytest.importorskip("tiktoken")
    assert tokenizer.encode("lang:en") == [SPECIAL + rank for rank in (258, *b":en")]


def test_tokens_are_those_of_mistral_common():
    mistral_common = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    pytest.importorskip("tiktoken")
    path = Path(mistral_common.__file__).parents[2] / "data" / "tekken_240911.json"
    expected, tokenizer = mistral_common.Tekkenizer.from_file(path), TekkenTokenizer(path)
    for text in ("lang:en", "Hello, wörld! 123  \n\n  Füße 日本語 🙂 don't"):
        assert tokenizer.encode(text) == expected.encode(text, bos=False, eos=False)
        assert "".join(map(tokenizer.decoder(), tokenizer.encode(text))) == text


def test_a_file_may_list_its_special_tokens(tmp_path: Path):
    write_tekken(tmp_path / "tekken.json", special_tokens=[{"rank": 30, "token_str": "[AUDIO]", "is_control": True}])
    special = TekkenTokenizer(tmp_path / "tekken.json").special
    assert (special["[AUDIO]"], special["<s>"], special["[TRANSCRIBE]"]) == (30, 1, 34)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tekken\.json"):
        TekkenTokenizer(tmp_path / "tekken.json")


def test_what_the_model_reads(tmp_path: Path):
    pytest.importorskip("tiktoken")
    write_tekken(tmp_path / "tekken.json")
    tokenizer = TekkenTokenizer(tmp_path / "tekken.json")
    lang = [SPECIAL + rank for rank in (258, *b":en")]
    assert transcribe.prompt_tokens(tokenizer, 2) == [1, 3, 25, 24, 24, 4, 34]
    assert transcribe.prompt_tokens(tokenizer, 2, language="en") == [1, 3, 25, 24, 24, 4, *lang, 34]
    assert transcribe.prompt_tokens(tokenizer, 1, "lang:en") == [1, 3, 25, 24, *lang, 4]


@pytest.mark.parametrize("arguments", [["--dense"], ["--group-size", "32"]])
def test_a_sound_file_is_written_down(
    arguments: list[str], model: Path, sound: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("soundfile")
    common = ["--model", str(model), "--audio", str(sound), "--max-new-tokens", "9"]
    transcribe.main([*common, *arguments])
    printed = capsys.readouterr().out
    assert "0.3 s in 3 chunks of 0.16 s" in printed
    assert "9 tokens, " in printed
    if arguments != ["--dense"]:
        return
    # The plain way: everything anew for each token.
    checkpoint = checkpoints.load(model)
    audio_config, config = (kind.from_huggingface(checkpoint.config) for kind in (voxtral.AudioConfig, Config))
    audio_params = voxtral.params_from_huggingface(checkpoint, audio_config, "bfloat16")
    params = decoder.params_from_huggingface(checkpoint, config, "bfloat16")
    chunks = audio.features(audio.read_audio(sound), audio_config.num_mel_bins, audio_config.frames_per_chunk)
    embedded = jnp.concatenate([voxtral.encode_audio(audio_params, chunk[None], audio_config) for chunk in chunks])
    tokenizer = TekkenTokenizer(model / "tekken.json")
    tokens = transcribe.prompt_tokens(tokenizer, len(embedded))
    first = len(tokens)
    for _ in range(9):
        ids = jnp.asarray([tokens])
        x = voxtral.merge_audio(decoder.embed(params, ids, config), ids, embedded, audio_config)
        hidden, _ = decoder.forward_embedded(params, x, config)
        tokens.append(int(decoder.logits(params, hidden[:, -1], config).argmax()))
    text = "".join(map(tokenizer.decoder(), tokens[first:]))
    assert text
    assert printed.split("0.16 s\n", 1)[1].rsplit("\n\n9 tokens", 1)[0] == text


def test_mistakes_end_with_a_sentence(model: Path, sound: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("soundfile")

    def sentence(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            transcribe.main(list(arguments))
        return str(caught.value)

    there = ["--model", str(model), "--audio", str(sound)]
    assert "there is no file nowhere.wav" in sentence("--model", str(model), "--audio", "nowhere.wav")
    assert "there is no file or directory nowhere" in sentence("--model", "nowhere", "--audio", str(sound))
    (model / "tekken.json").rename(model / "other.json")
    assert "has no tekken.json" in sentence(*there)
    llama = DATA.parent / "llama_base"
    assert "implemented is voxtral" in sentence("--model", str(llama), "--audio", str(sound))
    assert "has no config.json" in sentence("--model", str(model / "model.safetensors"), "--audio", str(sound))
    sentence(*there, "--language", "en", "--prompt", "What?")
    assert "--language is for writing down" in capsys.readouterr().err
