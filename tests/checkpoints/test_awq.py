from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from format_writers import awq
from jax_int4mm import checkpoints
from oracle import BFLOAT16, FLOAT16
from stored_layers import MODULE, WEIGHT, check, random_layer, random_zero_points, save

GEMM = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16, np.dtype(np.float32)], ids=str)
def test_dtypes(tmp_path: Path, rng: np.random.Generator, stored: np.dtype, dtype: np.dtype | None):
    layer = random_layer(rng, 24, 256, 128, stored)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, awq(layer, zero_point), GEMM)
    checkpoint = checkpoints.load(tmp_path, dtype=dtype)
    assert list(checkpoint) == [WEIGHT]
    check(checkpoint[WEIGHT], layer.with_zero_point(zero_point), dtype)


@pytest.mark.parametrize(
    ("k", "group_size", "said"), [(384, 128, 128), (128, 32, 32), (384, 96, 96), (200, 64, 64), (256, 256, -1)]
)
def test_group_sizes(tmp_path: Path, rng: np.random.Generator, k: int, group_size: int, said: int):
    layer = random_layer(rng, 24, k, group_size)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, awq(layer, zero_point), {**GEMM, "group_size": said})
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


def test_without_zero_points_q_is_centred_on_8(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128)
    save(tmp_path, awq(layer, None), {**GEMM, "zero_point": False})
    check(checkpoints.load(tmp_path)[WEIGHT], layer)


def test_zero_points_that_are_missing(tmp_path: Path, rng: np.random.Generator):
    save(tmp_path, awq(random_layer(rng, 24, 256, 128), None), GEMM)
    with pytest.raises(checkpoints.CheckpointError, match=rf"holds no tensor '{MODULE}.qzeros'.*is incomplete"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("of", ["file", "directory"])
def test_a_file_without_settings_is_known_by_its_shapes(tmp_path: Path, rng: np.random.Generator, of: str):
    layer = random_layer(rng, 64, 256, 64)
    zero_point = random_zero_points(rng, layer)
    bias = rng.normal(size=64).astype(np.float16)
    save(tmp_path, {**awq(layer, zero_point), f"{MODULE}.bias": bias})
    checkpoint = checkpoints.load(tmp_path / "model.safetensors" if of == "file" else tmp_path)
    assert checkpoint.format == "awq"
    assert checkpoint.entries[WEIGHT].group_size == 64
    check(checkpoint[WEIGHT], layer.with_zero_point(zero_point))
    np.testing.assert_array_equal(checkpoint[f"{MODULE}.bias"], bias)


def test_settings_in_quant_config_json(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 200, 64)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, awq(layer, zero_point))
    settings = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(settings))
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "llm-awq", "exllama", None, 1])
def test_other_versions_are_refused(tmp_path: Path, rng: np.random.Generator, version: object):
    layer = random_layer(rng, 24, 256, 128)
    save(tmp_path, awq(layer, random_zero_points(rng, layer)), {**GEMM, "version": version})
    with pytest.raises(checkpoints.CheckpointError, match="laid out for another kernel; version 'gemm' is read"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("said", [{"bits": 8}, {"bits": None}, {"w_bit": 3, "bits": 3}])
def test_other_bits_are_refused(tmp_path: Path, rng: np.random.Generator, said: dict[str, object]):
    layer = random_layer(rng, 24, 256, 128)
    save(tmp_path, awq(layer, random_zero_points(rng, layer)), {**GEMM, **said})
    with pytest.raises(checkpoints.CheckpointError, match=rf"module '{MODULE}' in .* bits; only 4 are read"):
        checkpoints.load(tmp_path)
