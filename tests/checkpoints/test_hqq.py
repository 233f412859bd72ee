from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jax_int4mm as i4
from format_writers import hqq, hqq_of_layer
from jax_int4mm import checkpoints
from oracle import BFLOAT16, FLOAT16
from stored_layers import MODULE, WEIGHT, Layer, check, random_layer, read_off, save

FLOAT32 = np.dtype(np.float32)


def random_zeros(rng: np.random.Generator, layer: Layer) -> np.ndarray:
    """Floats around the range of q, in the dtype of the scales; some beyond it."""
    return rng.uniform(-2, 17, layer.scale.shape).astype(layer.scale.dtype)


@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_dtypes(tmp_path: Path, rng: np.random.Generator, stored: np.dtype, dtype: np.dtype | None):
    layer = random_layer(rng, 24, 256, 64, stored)
    zero = random_zeros(rng, layer)
    save(tmp_path, hqq_of_layer(layer, zero))
    checkpoint = checkpoints.load(tmp_path, dtype=dtype)
    assert checkpoint.format == "hqq"
    assert list(checkpoint) == [WEIGHT]
    check(checkpoint[WEIGHT], layer.with_zero_point(zero), dtype)


@pytest.mark.parametrize(("n", "k", "group_size"), [(24, 384, 128), (20, 128, 32), (24, 200, 200), (13, 192, 96)])
def test_group_sizes(tmp_path: Path, rng: np.random.Generator, n: int, k: int, group_size: int):
    layer = random_layer(rng, n, k, group_size, BFLOAT16)
    zero = random_zeros(rng, layer)
    save(tmp_path, hqq_of_layer(layer, zero))
    checkpoint = checkpoints.load(tmp_path / "model.safetensors")
    assert checkpoint.entries[WEIGHT].group_size == group_size
    check(checkpoint[WEIGHT], layer.with_zero_point(zero))


@pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16, FLOAT32], ids=str)
def test_bytes_viewed_as_floats(tmp_path: Path, rng: np.random.Generator, stored: np.dtype):
    layer = random_layer(rng, 24, 256, 64, stored)
    zero = random_zeros(rng, layer)
    tensors = hqq_of_layer(layer, zero)
    viewed = {f"{MODULE}.W_q": tensors[f"{MODULE}.W_q"].view(stored), f"{MODULE}.view_as_float": np.array(1, np.uint8)}
    save(tmp_path, tensors | viewed)
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero))


def test_the_configuration_of_transformers(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 64, FLOAT16)
    zero = random_zeros(rng, layer)
    tensors = hqq_of_layer(layer, zero)
    parameters = {"axis": 1, "nbits": 4, "group_size": 64, "channel_wise": True, "view_as_float": False}
    save(tmp_path, tensors, {"quant_method": "hqq", "quant_config": {"weight_quant_params": parameters}})
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero))
    # What is said in the configuration need not be said again beside the weight.
    del tensors[f"{MODULE}.axis"], tensors[f"{MODULE}.nbits"]
    save(tmp_path, tensors, {"quant_method": "hqq", "quant_config": {"weight_quant_params": parameters}})
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero))


@pytest.mark.parametrize(
    ("n", "k", "axis", "group_size", "why"),
    [
        (24, 128, 0, 64, "along axis 0 hold values of several output features"),
        (24, 160, 1, 64, "of 64 that do not divide k hold values of several output features"),
        (24, 32, 1, 64, "of 64 that do not divide k hold values of several output features"),
    ],
)
def test_groups_over_several_rows_are_quantised_anew(
    tmp_path: Path, rng: np.random.Generator, n: int, k: int, axis: int, group_size: int, why: str
):
    groups = n * k // group_size
    rows = rng.integers(0, 16, (groups, group_size) if axis == 1 else (group_size, groups), np.uint8)
    column = (groups, 1) if axis == 1 else (1, groups)
    scale = rng.uniform(0.001, 0.01, column).astype(BFLOAT16)
    zero = rng.uniform(0, 15, column).astype(BFLOAT16)
    save(tmp_path, hqq(rows, scale, zero, (n, k), axis))
    with pytest.warns(checkpoints.RequantizedWarning, match=f"HQQ groups {why}"):
        checkpoint = checkpoints.load(tmp_path)
    exact = ((rows - zero.astype(np.float64)) * scale.astype(np.float64)).reshape(n, k)
    w4 = checkpoint[WEIGHT]
    assert isinstance(w4, i4.Int4Weight)
    assert w4.group_size == group_size
    half_a_step = 0.5 * np.abs(read_off(w4).scale.astype(np.float64))
    error = np.abs(np.asarray(w4.dequantize(), np.float64).T - exact)
    assert np.all(error <= half_a_step * (1 + 32 * float(jnp.finfo(w4.dtype).eps)))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"nbits": np.array(8, np.int32)}, "in 8 bits, packed as '4bit_u8'"),
        ({"packing": np.frombuffer(b"3bit_32", np.uint8)}, "in 4 bits, packed as '3bit_32'"),
        ({"axis": np.array(2, np.int32)}, r"tensor '.*scale' .* is BF16 \[96, 1\]"),
        ({"axis": np.array(0, np.int32)}, r"tensor '.*scale' .* is BF16 \[96, 1\]"),
        ({"shape": np.array([0, 256])}, "which do not divide it"),
        ({"shape": np.array([-24, 256])}, "which do not divide it"),
        ({"shape": np.array([24, 0])}, "which do not divide it"),
        ({"shape": np.array([23, 257])}, "which do not divide it"),
        ({"shape": np.array([24 * 2**40, 256])}, "HQQ packs 96 rows of .* values in half as many bytes"),
        ({"shape": np.array([24, 256, 1])}, "settings of a weight as integer tensors"),
        ({"shape": np.array([24.0, 256.0], np.float32)}, "settings of a weight as integer tensors"),
        ({"scale": np.zeros((0, 1), BFLOAT16), "zero": np.zeros((0, 1), BFLOAT16)}, "which do not divide it"),
        ({"scale": np.zeros((95, 1), BFLOAT16), "zero": np.zeros((95, 1), BFLOAT16)}, "which do not divide it"),
        ({"scale": np.zeros((), BFLOAT16)}, "one number for each group"),
        ({"W_q": np.zeros((48, 32), BFLOAT16)[:, :31]}, "HQQ packs 96 rows of 64 values"),
    ],
    ids=lambda value: (
        None
        if isinstance(value, str)
        else ",".join(f"{k} {v.tolist() if v.size < 4 else v.shape}" for k, v in value.items())
    ),
)
def test_what_is_refused(tmp_path: Path, rng: np.random.Generator, changed: dict[str, np.ndarray], sentence: str):
    layer = random_layer(rng, 24, 256, 64, BFLOAT16)
    tensors = hqq_of_layer(layer, random_zeros(rng, layer))
    save(tmp_path, tensors | {f"{MODULE}.{name}": tensor for name, tensor in changed.items()})
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path)


def test_a_bias_is_read_as_it_is(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 128, 64, BFLOAT16)
    bias = rng.normal(size=24).astype(BFLOAT16)
    save(tmp_path, hqq_of_layer(layer, random_zeros(rng, layer)) | {f"{MODULE}.bias": bias})
    checkpoint = checkpoints.load(tmp_path)
    assert set(checkpoint) == {WEIGHT, f"{MODULE}.bias"}
    np.testing.assert_array_equal(checkpoint[f"{MODULE}.bias"], bias)


@pytest.mark.parametrize("axis", [[1], "1", None, {"a": 1}, 1.5], ids=json.dumps)
def test_an_axis_of_another_type_in_the_configuration(tmp_path: Path, rng: np.random.Generator, axis: object):
    layer = random_layer(rng, 24, 256, 64, BFLOAT16)
    tensors = hqq_of_layer(layer, random_zeros(rng, layer))
    del tensors[f"{MODULE}.axis"]
    save(tmp_path, tensors, {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"axis": axis}}})
    with pytest.raises(checkpoints.CheckpointError):
        checkpoints.load(tmp_path)
