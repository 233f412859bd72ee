from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from format_writers import awq, gptq
from jax_int4mm import checkpoints
from stored_layers import MODULE, WEIGHT, check, random_layer, random_zero_points, save

SETTINGS = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": False, "data_type": "int"}


@pytest.mark.parametrize(
    "said",
    [
        {"packing_format": "auto_round:auto_gptq"},
        {"packing_format": "auto_round:auto_gptq", "quant_method": "intel/auto-round", "backend": "auto"},
        {},
        {"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"},
    ],
    ids=str,
)
def test_gptqs_packing_with_zero_points_stored_less_one(
    tmp_path: Path, rng: np.random.Generator, said: dict[str, object]
):
    layer = random_layer(rng, 24, 256, 128)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, gptq(layer, zero_point, g_idx=False), {**SETTINGS, **said})
    checkpoint = checkpoints.load(tmp_path)
    assert checkpoint.format == "auto-round"
    check(checkpoint[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel"])
def test_gptqs_packing_with_zero_points_stored_as_they_are(tmp_path: Path, rng: np.random.Generator, packing: str):
    layer = random_layer(rng, 24, 256, 128)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, gptq(layer, zero_point, less_one=False, g_idx=False), {**SETTINGS, "packing_format": packing})
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


def test_awqs_packing(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, awq(layer, zero_point), {**SETTINGS, "packing_format": "auto_round:auto_awq"})
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize(
    "said",
    [{"packing_format": "auto_round:fp8"}, {"packing_format": ["auto_round"]}, {"backend": "auto_round:exllamav2"}],
    ids=str,
)
def test_other_packings_are_refused(tmp_path: Path, rng: np.random.Generator, said: dict[str, object]):
    layer = random_layer(rng, 24, 256, 128)
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)), {**SETTINGS, **said})
    with pytest.raises(checkpoints.CheckpointError, match=r"AutoRound checkpoint with packing_format .* are read"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("name", [MODULE, r".*layers\.\d+\.mlp.*", "up_proj"])
def test_extra_config_overrides_a_modules_settings(tmp_path: Path, rng: np.random.Generator, name: str):
    layer = random_layer(rng, 24, 200, 64)
    zero_point = random_zero_points(rng, layer)
    extra = {"[not a regular expression": {"bits": 8}, "lm_head": {"bits": 16}, name: {"group_size": 64}}
    save(tmp_path, gptq(layer, zero_point, g_idx=False), {**SETTINGS, "extra_config": extra})
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


def test_extra_config_of_other_bits(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128)
    settings = {**SETTINGS, "extra_config": {MODULE: {"bits": 8}}}
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)), settings)
    with pytest.raises(checkpoints.CheckpointError, match="in 8 bits; only 4 are read"):
        checkpoints.load(tmp_path)
