"""The log-mel spectrogram against transformers', and the reading of sound files."""

from __future__ import annotations

import struct
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

import audio

STORED = np.load(Path(__file__).parents[1] / "data" / "mel" / "whisper.npz")


def write_wav(path: Path, samples: np.ndarray, rate: int = audio.SAMPLE_RATE) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def test_the_spectrogram_is_whispers():
    samples = STORED["samples"].astype(np.float32) / 32768
    # transformers computes in float32.
    np.testing.assert_allclose(audio.log_mel(samples, 128), STORED["features"], atol=2e-4)


def test_chunks_are_those_of_voxtrals_processor(rng: np.random.Generator):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    for bins in (80, 128):
        samples = rng.normal(0, 0.1, int(rng.integers(20_000, 40_000))).astype(np.float32)
        extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
        options = {"padding": True, "truncation": False, "pad_to_multiple_of": 16000, "return_tensors": "np"}
        expected = extractor(samples, sampling_rate=16000, **options)["input_features"][0]
        expected = expected.reshape(bins, -1, 100).swapaxes(0, 1)
        found = audio.features(samples, bins, 100)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_tone_is_loudest_in_its_bin():
    filters = audio.mel_filters(128)
    assert filters.shape == (128, 201)
    # Slaney's triangles have the area 1, as far as a spectrum of 40 Hz a line can tell.
    np.testing.assert_allclose(filters[60:].sum(axis=1) * 40, 1, atol=0.1)
    for hertz in (200, 1000, 3000, 7000):
        samples = np.sin(2 * np.pi * hertz * np.arange(16000) / 16000)
        found = audio.log_mel(samples, 128)
        assert found.shape == (128, 100)
        assert found[:, 50].argmax() == filters[:, hertz // 40].argmax()
        assert found.max() - found.min() <= 2.0 + 1e-6


def test_silence_behind_the_end_and_a_range_of_the_whole():
    samples = np.concatenate([np.sin(np.arange(16000)), np.zeros(500)]).astype(np.float32)
    found = audio.features(samples, 40, 100)
    assert found.shape == (2, 40, 100)
    np.testing.assert_array_equal(found[1][:, 50:], found.min())


@pytest.mark.parametrize("reader", ["soundfile", "scipy"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files(
    reader: str,
    dtype: type,
    channels: int,
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
):
    pytest.importorskip(reader)
    if reader == "scipy":
        monkeypatch.setitem(sys.modules, "soundfile", None)
    sound = rng.uniform(-0.9, 0.9, (4000, channels))
    levels = np.iinfo(dtype).max + 1.0
    stored = sound * 128 + 128 if dtype == np.uint8 else sound * levels
    path = write_wav(tmp_path / "sound.wav", np.squeeze(stored.astype(dtype)))
    found = audio.read_audio(path)
    assert (found.shape, found.dtype) == ((4000,), np.float32)
    np.testing.assert_allclose(found, sound.mean(axis=1), atol=0.01)


def test_other_rates_are_resampled(tmp_path: Path):
    pytest.importorskip("scipy")
    pytest.importorskip("soundfile")
    for rate in (8000, 44100, 48000):
        tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        found = audio.read_audio(write_wav(tmp_path / f"{rate}.wav", (tone * 20000).astype(np.int16), rate))
        assert len(found) == 16000
        expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) * 20000 / 32768
        np.testing.assert_allclose(found[500:-500], expected[500:-500], atol=0.01)


@pytest.mark.parametrize("reader", ["soundfile", "scipy"])
def test_what_is_no_sound_is_refused(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip(reader)
    if reader == "scipy":
        monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.wav"):
        audio.read_audio(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no sound at all")
    with pytest.raises(ValueError, match="that can be read"):
        audio.read_audio(tmp_path / "text.wav")
    (tmp_path / "cut.wav").write_bytes(b"RIFF" + struct.pack("<I", 36) + b"WAVE")
    with pytest.raises(ValueError, match=r"that can be read|holds no sound"):
        audio.read_audio(tmp_path / "cut.wav")
    with pytest.raises(ValueError, match="holds no sound"):
        audio.read_audio(write_wav(tmp_path / "empty.wav", np.zeros(0, np.int16)))


def test_readers_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_wav(tmp_path / "sound.wav", np.zeros(100, np.int16))
    for name in ("soundfile", "scipy", "scipy.io", "scipy.io.wavfile", "scipy.signal"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs soundfile, or for wav files scipy"):
        audio.read_audio(path)
    with pytest.raises(ImportError, match="sound at 8000 samples a second needs scipy"):
        audio.resampled(np.zeros(10, np.float32), 8000)
