from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from format_writers import Tensors, mlx
from jax_int4mm import checkpoints
from oracle import BFLOAT16, FLOAT16
from stored_layers import MODULE, WEIGHT, Layer, check, random_layer, save

AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}


def write(directory: Path, tensors: Tensors, settings: object) -> None:
    save(directory, tensors, metadata={"format": "mlx"})
    # mlx-lm says it twice.
    (directory / "config.json").write_text(json.dumps({"quantization": settings, "quantization_config": settings}))


def with_biases(rng: np.random.Generator, layer: Layer) -> tuple[Layer, np.ndarray]:
    """w = q * scale + bias."""
    biases = rng.normal(0, 0.05, layer.scale.shape).astype(layer.scale.dtype)
    zero = biases.astype(np.float64) + 8 * layer.scale.astype(np.float64)
    return Layer(layer.q, layer.scale, zero, layer.group), biases


@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16, np.dtype(np.float32)], ids=str)
def test_dtypes(tmp_path: Path, rng: np.random.Generator, stored: np.dtype, dtype: np.dtype | None):
    layer, biases = with_biases(rng, random_layer(rng, 24, 256, 64, stored))
    write(tmp_path, mlx(layer, biases), AFFINE)
    checkpoint = checkpoints.load(tmp_path, dtype=dtype)
    assert checkpoint.format == "mlx"
    assert list(checkpoint) == [WEIGHT]
    check(checkpoint[WEIGHT], layer, dtype)


@pytest.mark.parametrize(("n", "k", "group_size"), [(24, 384, 128), (20, 128, 32), (13, 256, 64)])
def test_group_sizes(tmp_path: Path, rng: np.random.Generator, n: int, k: int, group_size: int):
    layer, biases = with_biases(rng, random_layer(rng, n, k, group_size, BFLOAT16))
    write(tmp_path, mlx(layer, biases), {**AFFINE, "group_size": group_size})
    check(checkpoints.load(tmp_path)[WEIGHT], layer)


def test_a_modules_own_settings(tmp_path: Path, rng: np.random.Generator):
    embedding = "model.embed_tokens"
    layer, biases = with_biases(rng, random_layer(rng, 24, 256, 64, BFLOAT16))
    wide, wide_biases = with_biases(rng, random_layer(rng, 24, 256, 32, BFLOAT16))
    dense = rng.normal(size=(24, 256)).astype(BFLOAT16)
    tensors = mlx(layer, biases) | mlx(wide, wide_biases, embedding) | {"lm_head.weight": dense}
    write(tmp_path, tensors, {**AFFINE, embedding: {"group_size": 32, "bits": 4}, "lm_head": False})
    checkpoint = checkpoints.load(tmp_path)
    check(checkpoint[WEIGHT], layer)
    check(checkpoint[f"{embedding}.weight"], wide)
    np.testing.assert_array_equal(checkpoint["lm_head.weight"], dense)


@pytest.mark.parametrize("of", ["file", "directory"])
def test_without_settings_it_is_known_by_its_tensors(tmp_path: Path, rng: np.random.Generator, of: str):
    layer, biases = with_biases(rng, random_layer(rng, 24, 256, 64, BFLOAT16))
    bias = rng.normal(size=24).astype(BFLOAT16)
    save(tmp_path, mlx(layer, biases) | {f"{MODULE}.bias": bias})
    checkpoint = checkpoints.load(tmp_path / "model.safetensors" if of == "file" else tmp_path)
    assert checkpoint.format == "mlx"
    check(checkpoint[WEIGHT], layer)
    np.testing.assert_array_equal(checkpoint[f"{MODULE}.bias"], bias)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"bits": 8}, "in 8 bits; only 4 are read"),
        ({MODULE: {"bits": 6}}, "in 6 bits; only 4 are read"),
        ({"mode": "mxfp4"}, "in mode 'mxfp4'; 'affine' is read"),
        ({MODULE: {"mode": "nvfp4"}}, "in mode 'nvfp4'; 'affine' is read"),
        ({"group_size": 128}, "scales for 4 groups over k = 256, and its configuration says group_size 128"),
        ({MODULE: {"group_size": 32}}, "scales for 4 groups over k = 256, and its configuration says group_size 32"),
    ],
)
def test_what_is_refused(tmp_path: Path, rng: np.random.Generator, changed: dict[str, object], sentence: str):
    layer, biases = with_biases(rng, random_layer(rng, 24, 256, 64, BFLOAT16))
    write(tmp_path, mlx(layer, biases), {**AFFINE, **changed})
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path)
