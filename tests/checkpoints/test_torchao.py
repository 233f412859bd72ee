from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from format_writers import int4_tensor, tile_packed, torchao_metadata, unpacked_int8
from jax_int4mm import checkpoints
from oracle import BFLOAT16, FLOAT16
from stored_layers import MODULE, WEIGHT, Layer, check, random_layer, random_zero_points, save


def with_zeros(rng: np.random.Generator, layer: Layer) -> Layer:
    zero = rng.normal(0, 0.02, layer.scale.shape).astype(layer.scale.dtype)
    return Layer(layer.q, layer.scale, zero.astype(np.float64), layer.group)


@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [
        (24, 256, 128),
        (24, 1000, 128),
        (24, 1000, 64),
        (16, 1024, 64),
        (16, 2048, 256),
        (20, 256, 128),
        (20, 1024, 32),
        (24, 128, 256),
    ],
)
def test_tile_packed_weights_without_their_padding(
    tmp_path: Path, rng: np.random.Generator, n: int, k: int, group_size: int
):
    layer = with_zeros(rng, random_layer(rng, n, k, group_size, BFLOAT16))
    tensors, metadata = tile_packed(rng, layer, group_size)
    save(tmp_path, tensors, metadata=metadata)
    checkpoint = checkpoints.load(tmp_path)
    assert checkpoint.format == "torchao"
    assert list(checkpoint) == [WEIGHT]
    assert checkpoint.entries[WEIGHT].shape == (n, k)
    w4 = checkpoint[WEIGHT]
    assert w4.group_size == min(group_size, k)
    check(w4, layer)


@pytest.mark.parametrize("multiple", [(16, 128), (64, 1024)], ids=str)
def test_other_padding_of_tile_packed_weights(tmp_path: Path, rng: np.random.Generator, multiple: tuple[int, int]):
    layer = with_zeros(rng, random_layer(rng, 24, 256, 128, BFLOAT16))
    tensors, metadata = tile_packed(rng, layer, 128, multiple)
    save(tmp_path, tensors, metadata=metadata)
    check(checkpoints.load(tmp_path)[WEIGHT], layer)


@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("k", [256, 200], ids=["whole tiles", "part of a tile"])
def test_dtypes_of_tile_packed_weights(tmp_path: Path, rng: np.random.Generator, k: int, dtype: np.dtype | None):
    layer = with_zeros(rng, random_layer(rng, 24, k, 64, BFLOAT16))
    tensors, metadata = tile_packed(rng, layer, 64)
    save(tmp_path, tensors, {"quant_method": "torchao", "quant_type": {"default": {}}}, metadata=metadata)
    check(checkpoints.load(tmp_path, dtype=dtype)[WEIGHT], layer, dtype)


@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("group_size", [32, 128, 256])
def test_int4_tensor(tmp_path: Path, rng: np.random.Generator, group_size: int, dtype: np.dtype | None):
    layer = with_zeros(rng, random_layer(rng, 20, 256, group_size, BFLOAT16))
    tensors, metadata = int4_tensor(layer, layer.zero.astype(BFLOAT16))
    save(tmp_path, tensors, metadata=metadata)
    check(checkpoints.load(tmp_path, dtype=dtype)[WEIGHT], layer, dtype)


def test_int4_tensor_without_zeros(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128, BFLOAT16)
    tensors, metadata = int4_tensor(layer, layer.zero.astype(BFLOAT16))
    save(tmp_path, tensors, metadata=metadata)
    check(checkpoints.load(tmp_path)[WEIGHT], layer)


def test_int4_tensor_as_executorch_stores_it(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128, BFLOAT16)
    zero_point = random_zero_points(rng, layer)
    tensors, metadata = int4_tensor(layer, zero_point.astype(BFLOAT16), signed=False)
    save(tmp_path, tensors, metadata=metadata)
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize("zeros", [np.int8, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    ("stored", "group_size"), [(BFLOAT16, 32), (FLOAT16, 64), (np.dtype(np.float32), 256)], ids=str
)
def test_int4_unpacked_to_int8(
    tmp_path: Path, rng: np.random.Generator, stored: np.dtype, group_size: int, zeros: np.dtype
):
    layer = random_layer(rng, 20, 256, group_size, stored)
    zero_point = random_zero_points(rng, layer)
    tensors, metadata = unpacked_int8(layer.q.astype(int) - 8, layer.scale, (zero_point.astype(int) - 8).astype(zeros))
    save(tmp_path, tensors, metadata=metadata)
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize("stored", [BFLOAT16, FLOAT16, np.dtype(np.float32)], ids=str)
def test_int8_is_read_as_a_dense_array(tmp_path: Path, rng: np.random.Generator, stored: np.dtype):
    q = rng.integers(-128, 128, (20, 256))
    scale = rng.uniform(0.001, 0.01, (20, 8)).astype(stored)
    zero_point = rng.integers(-128, 128, (20, 8)).astype(np.int8)
    tensors, metadata = unpacked_int8(q, scale, zero_point, "int8")
    save(tmp_path, tensors, metadata=metadata)
    checkpoint = checkpoints.load(tmp_path)
    assert checkpoint.entries[WEIGHT].element_type == "int8"
    exact = (q - zero_point.astype(float).repeat(32, axis=1)) * scale.astype(float).repeat(32, axis=1)
    dtype = stored if stored in (BFLOAT16, FLOAT16) else BFLOAT16
    np.testing.assert_array_equal(checkpoint[WEIGHT], exact.astype(np.float32).astype(dtype))
    assert checkpoint[WEIGHT].dtype == dtype


def test_int8_that_overflows_float16(tmp_path: Path, rng: np.random.Generator):
    q = rng.integers(100, 128, (20, 256))
    tensors, metadata = unpacked_int8(q, np.full((20, 8), 1e4, BFLOAT16), np.zeros((20, 8), np.int8), "int8")
    save(tmp_path, tensors, metadata=metadata)
    with pytest.raises(checkpoints.CheckpointError, match=r"too large for float16; load it with dtype=jnp\.bfloat16"):
        checkpoints.load(tmp_path, dtype=FLOAT16)[WEIGHT]
    assert np.isfinite(checkpoints.load(tmp_path)[WEIGHT].astype(np.float32)).all()


def test_int4_with_values_that_are_not(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 128, 32, BFLOAT16)
    q = layer.q.astype(int) - 8
    q[5, 70] = 8
    tensors, metadata = unpacked_int8(q, layer.scale, np.zeros(layer.scale.shape, np.int8))
    save(tmp_path, tensors, metadata=metadata)
    checkpoint = checkpoints.load(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match=r"has values outside -8\.\.7"):
        checkpoint[WEIGHT]


def test_a_factor_of_the_activations_is_refused(tmp_path: Path, rng: np.random.Generator):
    layer = with_zeros(rng, random_layer(rng, 24, 256, 128, BFLOAT16))
    tensors, _ = int4_tensor(layer, layer.zero.astype(BFLOAT16))
    data: dict[str, object] = {"block_size": [1, 128], "shape": [24, 256]}
    metadata = torchao_metadata("Int4Tensor", data, ("act_pre_scale", "qdata", "scale", "zero_point"))
    save(tmp_path, tensors | {f"{MODULE}._weight_act_pre_scale": np.ones(256, BFLOAT16)}, metadata=metadata)
    with pytest.raises(checkpoints.CheckpointError, match="with an act_pre_scale, by which activations would have to"):
        checkpoints.load(tmp_path)


PARTS = ("qdata", "scale", "zero_point")
GOOD: dict[str, object] = {"block_size": [1, 128], "shape": [24, 256]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"_type": "Int4Tensor"', "that is not valid JSON"),
        ("{" * 100_000, "that is not valid JSON"),
        ('{"_type": "Int4Tensor", "_data": {"shape": ' + "9" * 5000 + "}}", "that is not valid JSON"),
        ('{"_type": "Int4Tensor", "_data": ' + "[" * 100_000, "that is not valid JSON"),
        (json.dumps({"_type": "NVFP4Tensor", "_data": GOOD, "_tensor_data_names": PARTS}), "as torchao's NVFP4Tensor"),
        (json.dumps({"_type": ["Int4Tensor"], "_data": GOOD, "_tensor_data_names": PARTS}), "which is not read"),
        (json.dumps({"_type": "Int4Tensor", "_data": [1], "_tensor_data_names": PARTS}), "which is not read"),
        (json.dumps({"_type": "Int4Tensor", "_data": GOOD, "_tensor_data_names": None}), "which is not read"),
        (json.dumps({"_type": "Int4Tensor", "_data": GOOD, "_tensor_data_names": [["qdata"]]}), "without qdata"),
        (json.dumps({"_type": "Int4Tensor", "_data": GOOD, "_tensor_data_names": ["qdata"]}), "without scale"),
        *(
            (json.dumps({"_type": "Int4Tensor", "_data": GOOD | changed, "_tensor_data_names": PARTS}), sentence)
            for changed, sentence in [
                ({"block_size": [1, 0]}, "has block_size"),
                ({"block_size": [1, -128]}, "has block_size"),
                ({"block_size": [2, 128]}, "has block_size"),
                ({"block_size": 128}, "has block_size"),
                ({"block_size": [1, 128.0]}, "has block_size"),
                ({"block_size": [1, 64]}, r"is BF16 \[2, 24\]"),
                ({"shape": [24]}, "must be two sizes"),
                ({"shape": None}, "must be two sizes"),
                ({"shape": [2, 24, 256]}, "must be two sizes"),
                ({"shape": [24, 257]}, "odd k"),
                ({"shape": [24, 2**60]}, r"is I8 \[24, 128\]"),
            ]
        ),
    ],
    ids=lambda value: value[:70],
)
def test_metadata_that_is_refused(tmp_path: Path, rng: np.random.Generator, text: str, sentence: str):
    layer = random_layer(rng, 24, 256, 128, BFLOAT16)
    tensors, metadata = int4_tensor(layer, layer.zero.astype(BFLOAT16))
    save(tmp_path, tensors, metadata=metadata | {WEIGHT: text})
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("shape", [(25, 256), (24, 2048), (24, 0), (2**40, 256)], ids=str)
def test_a_shape_that_tile_packed_tensors_cannot_hold(tmp_path: Path, rng: np.random.Generator, shape: list[int]):
    layer = with_zeros(rng, random_layer(rng, 24, 256, 128, BFLOAT16))
    tensors, _ = tile_packed(rng, layer, 128)
    data: dict[str, object] = {"block_size": [1, 128], "shape": list(shape)}
    metadata = torchao_metadata("Int4TilePackedTo4dTensor", data, ("qdata", "scale_and_zero"))
    save(tmp_path, tensors, metadata=metadata)
    with pytest.raises(checkpoints.CheckpointError, match=r"they are not of one checkpoint|must be two sizes"):
        checkpoints.load(tmp_path)


def test_weights_beside_quantised_ones(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128, BFLOAT16)
    tensors, metadata = int4_tensor(layer, layer.zero.astype(BFLOAT16))
    others = {f"{MODULE}.bias": rng.normal(size=24).astype(BFLOAT16), "model.norm.weight": np.ones(8, BFLOAT16)}
    said = {name: json.dumps({"_type": "Tensor"}) for name in others} | {"format": "pt"}
    save(tmp_path, tensors | others, metadata=metadata | said)
    checkpoint = checkpoints.load(tmp_path)
    assert set(checkpoint) == {WEIGHT, *others}
    for name, tensor in others.items():
        np.testing.assert_array_equal(checkpoint[name], tensor)
