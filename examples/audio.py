"""Sound to the log-mel spectrogram of Whisper's encoder, as transformers' WhisperFeatureExtractor computes it."""

from __future__ import annotations

import math
import pathlib

import numpy as np

SAMPLE_RATE = 16000  # Samples a second,
HOP = 160  # of which a frame begins every so many,
WINDOW = 400  # and has so many.
FLOOR = 1e-10  # Power below which all is silence.
RANGE = 8.0  # Powers of ten below the loudest that are told apart.
FRAMES_AT_A_TIME = 3000


def read_audio(path: pathlib.Path) -> np.ndarray:
    """The sound of a file, f32 [samples] in -1..1 at SAMPLE_RATE, channels averaged.

    soundfile reads it, wav, flac, ogg and mp3, or where that is not installed scipy, wav.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: neither package is installed.
      ValueError: it is no sound file that is read, or it is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        import soundfile
    except ImportError:
        rate, samples = _read_wav(path)
    else:
        try:
            samples, rate = soundfile.read(path, dtype="float32")
        except soundfile.SoundFileError as error:
            raise ValueError(f"{path} is not a sound file that can be read ({error})") from error
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if samples.size == 0 or rate <= 0:
        raise ValueError(f"{path} holds no sound: {samples.size} samples at {rate} a second")
    return resampled(samples.astype(np.float32), rate)


def _read_wav(path: pathlib.Path) -> tuple[int, np.ndarray]:
    try:
        import scipy.io.wavfile
    except ImportError as error:
        raise ImportError(f"reading {path} needs soundfile, or for wav files scipy: pip install soundfile") from error
    try:
        rate, samples = scipy.io.wavfile.read(path)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path} is not a wav file that can be read ({error}); for others pip install soundfile"
        ) from error
    if samples.dtype == np.uint8:
        return rate, (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.integer):
        return rate, samples / np.float32(np.iinfo(samples.dtype).max + 1)
    return rate, samples


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples [n] at `rate` a second at SAMPLE_RATE, by a polyphase filter."""
    if rate == SAMPLE_RATE:
        return samples
    try:
        import scipy.signal
    except ImportError as error:
        raise ImportError(f"sound at {rate} samples a second needs scipy to resample it: pip install scipy") from error
    common = math.gcd(rate, SAMPLE_RATE)
    return scipy.signal.resample_poly(samples, SAMPLE_RATE // common, rate // common).astype(np.float32)


def mel_filters(bins: int) -> np.ndarray:
    """Weights of each frequency of the spectrum in each bin, f64 [bins, WINDOW / 2 + 1]: Slaney's triangles.

    Their corners are evenly spaced in mel from 0 to half the sample rate: 200/3 Hz a mel up to 1000 Hz, and above that
    27 mel for each factor of 6.4. Each has the area 1.
    """
    most = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000) / math.log(6.4)
    mel = np.linspace(0, most, bins + 2)
    corners = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))
    frequencies = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    triangles = np.minimum((frequencies - left) / (middle - left), (right - frequencies) / (right - middle))
    return np.maximum(triangles, 0) * 2 / (right - left)


def log_mel(samples: np.ndarray, bins: int) -> np.ndarray:
    """The log-mel spectrogram of samples [n], f32 [bins, n // HOP]: 0.25 for a power of ten, none below the range."""
    padded = np.pad(samples.astype(np.float64), WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    frames = frames[: len(samples) // HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    filters = mel_filters(bins)
    found = np.empty((bins, len(frames)))
    for first in range(0, len(frames), FRAMES_AT_A_TIME):
        some = slice(first, first + FRAMES_AT_A_TIME)
        found[:, some] = filters @ (np.abs(np.fft.rfft(frames[some] * window)) ** 2).T
    levels = np.log10(np.maximum(found, FLOOR))
    return ((np.maximum(levels, levels.max() - RANGE) + 4) / 4).astype(np.float32)


def features(samples: np.ndarray, bins: int, frames_per_chunk: int) -> np.ndarray:
    """The spectrogram of samples [n] in chunks, f32 [chunks, bins, frames_per_chunk], silence behind the end.

    As Voxtral's processor does, the range is that of the whole and not of each chunk.
    """
    missing = -len(samples) % (frames_per_chunk * HOP)
    spectrogram = log_mel(np.pad(samples, (0, missing)), bins)
    return spectrogram.reshape(bins, -1, frames_per_chunk).swapaxes(0, 1)
