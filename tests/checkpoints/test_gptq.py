from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jax_int4mm as i4
from format_writers import gptq
from jax_int4mm import checkpoints
from oracle import BFLOAT16, FLOAT16
from stored_layers import MODULE, WEIGHT, Layer, check, random_layer, random_zero_points, read_off, save

V1 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": "gptq"}
V2 = {**V1, "checkpoint_format": "gptq_v2"}


def in_another_order(rng: np.random.Generator, layer: Layer) -> Layer:
    """The same values of q and scale with the groups' members all over k, as an order by activations leaves them."""
    return dataclasses.replace(layer, group=rng.permutation(layer.group))


def assert_requantized_near(w4: object, exact: np.ndarray) -> None:
    """Whether rounding to nearest again moved each value by no more than half a step of the new scale."""
    assert isinstance(w4, i4.Int4Weight)
    half_a_step = 0.5 * np.abs(read_off(w4).scale.astype(np.float64))
    error = np.abs(np.asarray(w4.dequantize(), np.float64).T - exact)
    # Beside the step itself scale and zero are rounded, and up to 8 steps taken.
    assert np.all(error <= half_a_step * (1 + 32 * float(jnp.finfo(w4.dtype).eps)))
    assert error.max() > 0


@pytest.mark.parametrize("settings", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize(
    ("k", "group_size"), [(384, 128), (128, 32), (384, 96), (256, 256), (1024, 512), (200, 64), (136, 128)]
)
def test_every_zero_point_and_group_size(
    tmp_path: Path, rng: np.random.Generator, settings: dict[str, object], k: int, group_size: int
):
    layer = random_layer(rng, 24, k, group_size)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, gptq(layer, zero_point, less_one=settings is V1), {**settings, "group_size": group_size})
    checkpoint = checkpoints.load(tmp_path)
    assert list(checkpoint) == [WEIGHT]
    assert checkpoint.entries[WEIGHT].group_size == group_size
    check(checkpoint[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16, np.dtype(np.float32)], ids=str)
def test_dtypes(tmp_path: Path, rng: np.random.Generator, stored: np.dtype, dtype: np.dtype | None):
    layer = random_layer(rng, 24, 128, 64, stored)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, gptq(layer, zero_point), {**V1, "group_size": 64})
    check(checkpoints.load(tmp_path, dtype=dtype)[WEIGHT], layer.with_zero_point(zero_point), dtype)


def test_without_checkpoint_format_zero_points_are_stored_less_one(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, gptq(layer, zero_point), {"quant_method": "gptq", "bits": 4, "group_size": 128})
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize(("k", "size"), [(256, 256), (200, 128), (96, 32)])
def test_a_group_size_of_minus_one_is_a_scale_a_channel(tmp_path: Path, rng: np.random.Generator, k: int, size: int):
    layer = random_layer(rng, 24, k, k)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, gptq(layer, zero_point), {**V1, "group_size": -1})
    w4 = checkpoints.load(tmp_path)[WEIGHT]
    check(w4, layer.with_zero_point(zero_point))
    assert w4.group_size == size


def test_n_that_is_no_multiple_of_8(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 20, 128, 64)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, gptq(layer, zero_point), {**V1, "group_size": 64})
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize("ordered", [True, False], ids=["in order", "by activations"])
def test_groups_of_16_are_quantised_anew(tmp_path: Path, rng: np.random.Generator, ordered: bool):
    layer = random_layer(rng, 24, 128, 16)
    zero_point = random_zero_points(rng, layer)
    layer = layer if ordered else in_another_order(rng, layer)
    save(tmp_path, gptq(layer, zero_point), {**V1, "group_size": 16})
    with pytest.warns(checkpoints.RequantizedWarning, match=r"1 of 1 parameters.*groups of 16 do not split into"):
        checkpoint = checkpoints.load(tmp_path)
    assert "groups of 16" in str(checkpoint.entries[WEIGHT].requantized)
    w4 = checkpoint[WEIGHT]
    assert w4.group_size == 32
    assert (w4.perm is None) == ordered
    assert_requantized_near(w4, layer.with_zero_point(zero_point).exact)


@pytest.mark.parametrize(("k", "group_size"), [(256, 32), (200, 64), (384, 96), (128, 128)])
def test_order_by_activations(tmp_path: Path, rng: np.random.Generator, k: int, group_size: int):
    layer = random_layer(rng, 24, k, group_size)
    zero_point = random_zero_points(rng, layer)
    layer = in_another_order(rng, layer)
    save(tmp_path, gptq(layer, zero_point), {**V1, "group_size": group_size, "desc_act": True})
    w4 = checkpoints.load(tmp_path)[WEIGHT]
    check(w4, layer.with_zero_point(zero_point))
    assert (w4.perm is None) == (k == group_size)
    x = cases.random_x(rng, (3, k), w4.dtype)
    dense = np.asarray(w4.dequantize(), np.float64)
    error = np.abs(np.asarray(jnp.asarray(x) @ w4, np.float64) - x.astype(np.float64) @ dense)
    assert np.all(error <= 2.0**-10 * (np.abs(x.astype(np.float64)) @ np.abs(dense)))


def test_g_idx_without_elements_is_none(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, {**gptq(layer, zero_point), f"{MODULE}.g_idx": np.zeros(0, np.int32)}, V1)
    checkpoint = checkpoints.load(tmp_path)
    assert list(checkpoint) == [WEIGHT]
    check(checkpoint[WEIGHT], layer.with_zero_point(zero_point))


def test_g_idx_with_groups_of_other_sizes(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128)
    layer.group[7] = 1
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)), V1)
    checkpoint = checkpoints.load(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match="to groups of other sizes than group_size 128"):
        checkpoint[WEIGHT]


def two_layers(rng: np.random.Generator, group_sizes: tuple[int, int]) -> dict[str, tuple[Layer, np.ndarray]]:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    layers = {}
    for name, group_size in zip(names, group_sizes, strict=True):
        layer = random_layer(rng, 24, 256, group_size)
        layers[name] = (layer, random_zero_points(rng, layer))
    return layers


def test_dynamic_overrides_a_modules_settings(tmp_path: Path, rng: np.random.Generator):
    layers = two_layers(rng, (128, 32))
    dynamic = {"-:.*lm_head": {}, r"+:model\.layers\.\d+\.mlp\..*": {"group_size": 32}, "layers": {"bits": 8}}
    tensors = {}
    for module, (layer, zero_point) in layers.items():
        tensors |= gptq(layer, zero_point, module=module)
    save(tmp_path, tensors, {**V1, "dynamic": dynamic})
    checkpoint = checkpoints.load(tmp_path)
    for module, (layer, zero_point) in layers.items():
        check(checkpoint[f"{module}.weight"], layer.with_zero_point(zero_point))


def test_dynamic_bits_other_than_4(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128)
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)), {**V1, "dynamic": {".*up_proj": {"bits": 8}}})
    with pytest.raises(checkpoints.CheckpointError, match=rf"module '{MODULE}' in 8 bits; only 4 are read"):
        checkpoints.load(tmp_path)


def test_settings_in_quantize_config_json(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 64)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, gptq(layer, zero_point))
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = checkpoints.load(tmp_path)
    assert checkpoint.format == "gptq"
    assert checkpoint.config == {"model_type": "llama"}
    check(checkpoint[WEIGHT], layer.with_zero_point(zero_point))


def test_a_bias_is_read_as_it_is(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 128, 128)
    bias = rng.normal(size=24).astype(np.float16)
    save(tmp_path, {**gptq(layer, random_zero_points(rng, layer)), f"{MODULE}.bias": bias}, V1)
    checkpoint = checkpoints.load(tmp_path)
    assert set(checkpoint) == {WEIGHT, f"{MODULE}.bias"}
    np.testing.assert_array_equal(checkpoint[f"{MODULE}.bias"], bias)


def test_a_file_without_settings_is_refused(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 128, 128)
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)))
    with pytest.raises(
        checkpoints.CheckpointError, match=r"GPTQ weights without a configuration.*give the directory with its config"
    ):
        checkpoints.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("layout", [{"checkpoint_format": "marlin"}, {"is_marlin_format": True}, {"format": "bitblas"}])
def test_layouts_for_one_kernel_are_refused(tmp_path: Path, rng: np.random.Generator, layout: dict[str, object]):
    layer = random_layer(rng, 24, 128, 128)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128, **layout}
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)), settings)
    with pytest.raises(checkpoints.CheckpointError, match="laid out for one kernel"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("group_size", [64, 0, -2, 256, "128", 1.5, [128]], ids=str)
def test_a_group_size_that_contradicts_the_scales(tmp_path: Path, rng: np.random.Generator, group_size: object):
    layer = random_layer(rng, 24, 200, 128)
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)), {**V1, "group_size": group_size})
    with pytest.raises(checkpoints.CheckpointError, match=r"2 groups over k = 200.*they are not of one checkpoint"):
        checkpoints.load(tmp_path)


def test_without_a_group_size_the_groups_have_to_divide_k(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 200, 67)
    save(tmp_path, gptq(layer, random_zero_points(rng, layer)), {"quant_method": "gptq"})
    with pytest.raises(checkpoints.CheckpointError, match=r"3 groups over k = 200 and no configuration"):
        checkpoints.load(tmp_path)
