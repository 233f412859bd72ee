"""Repositories of the Hugging Face hub, out of a local cache and without a network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy

from jax_int4mm import checkpoints
from jax_int4mm.checkpoints import hub

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds org/tiny at one revision, laid out as huggingface_hub does."""
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    safetensors.numpy.save_file({"w": np.arange(4, dtype=np.float32)}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("source", ["hf://org/tiny", "hf://org/tiny@main", f"hf://org/tiny@{REVISION}"])
def test_a_cached_repository(cached: Path, source: str) -> None:
    checkpoint = checkpoints.load(source)
    assert checkpoint.path == cached
    assert checkpoint.config == {"model_type": "llama"}
    np.testing.assert_array_equal(checkpoint["w"], [0, 1, 2, 3])


def test_one_file_of_a_cached_repository(cached: Path) -> None:
    assert checkpoints.load("hf://org/tiny/model.safetensors").path == cached / "model.safetensors"


@pytest.mark.parametrize("source", ["hf://org/unknown", "hf://org/tiny@other", "hf://org/tiny/lost.gguf"])
def test_what_is_neither_in_the_cache_nor_reachable(cached: Path, source: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"{re.escape(source)} cannot be had from the Hugging Face hub \(.*\);"
    ):
        checkpoints.load(source)


@pytest.mark.parametrize("source", ["hf://", "hf://org", "hf://org/", "hf:///name", "hf://org/name@"])
def test_malformed_sources(source: str) -> None:
    with pytest.raises(ValueError, match=r"is not hf://org/name, hf://org/name@revision or hf://org/name/file\.gguf"):
        checkpoints.load(source)


def test_pickles_are_not_downloaded() -> None:
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".pkl", "*")) for pattern in hub._WANTED)


def test_without_huggingface_hub_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'pip install "jax_int4mm\[hub\]"'):
        checkpoints.load("hf://org/tiny")
