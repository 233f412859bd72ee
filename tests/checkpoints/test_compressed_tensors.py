from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from format_writers import compressed_tensors
from jax_int4mm import checkpoints
from oracle import BFLOAT16, FLOAT16
from stored_layers import MODULE, WEIGHT, check, random_layer, random_zero_points, save


def scheme(**weights: object) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, **weights}
    return {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}


def settings(*schemes: dict[str, object], **more: object) -> dict[str, object]:
    groups = {f"group_{number}": each for number, each in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **more}


CHANNEL = {"strategy": "channel", "group_size": None}


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(24, 256, 128), (20, 384, 96), (24, 200, 64), (20, 204, 204), (13, 37, 32), (24, 300, 300)],
)
def test_group_sizes_and_sizes_that_are_no_multiples_of_8(
    tmp_path: Path, rng: np.random.Generator, symmetric: bool, n: int, k: int, group_size: int
):
    layer = random_layer(rng, n, k, group_size, BFLOAT16)
    zero_point = None if symmetric else random_zero_points(rng, layer)
    said = CHANNEL if group_size == k else {"group_size": group_size}
    save(tmp_path, compressed_tensors(layer, zero_point), settings(scheme(symmetric=symmetric, **said)))
    checkpoint = checkpoints.load(tmp_path)
    assert list(checkpoint) == [WEIGHT]
    assert checkpoint.entries[WEIGHT].group_size == group_size
    check(checkpoint[WEIGHT], layer if zero_point is None else layer.with_zero_point(zero_point))


@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16, np.dtype(np.float32)], ids=str)
def test_dtypes(tmp_path: Path, rng: np.random.Generator, stored: np.dtype, dtype: np.dtype | None):
    layer = random_layer(rng, 24, 256, 128, stored)
    zero_point = random_zero_points(rng, layer)
    save(tmp_path, compressed_tensors(layer, zero_point), settings(scheme(symmetric=False)))
    check(checkpoints.load(tmp_path, dtype=dtype)[WEIGHT], layer.with_zero_point(zero_point), dtype)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("zero_point", [None, 3])
def test_one_scale_for_all(tmp_path: Path, rng: np.random.Generator, shape: tuple[int, ...], zero_point: int | None):
    layer = random_layer(rng, 24, 256, 256, BFLOAT16)
    layer = dataclasses.replace(layer, scale=np.full((24, 1), layer.scale[0]))
    tensors = compressed_tensors(layer) | {f"{MODULE}.weight_scale": layer.scale[0].reshape(shape)}
    if zero_point is not None:
        # One zero point for all is not packed.
        layer = layer.with_zero_point(np.full((24, 1), zero_point))
        tensors[f"{MODULE}.weight_zero_point"] = np.full(shape, zero_point - 8, np.int8)
    tensor = scheme(strategy="tensor", group_size=None, symmetric=zero_point is None)
    save(tmp_path, tensors, settings(tensor))
    check(checkpoints.load(tmp_path)[WEIGHT], layer)


def test_zero_points_that_are_not_packed(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 128, BFLOAT16)
    zero_point = random_zero_points(rng, layer)
    unpacked = {f"{MODULE}.weight_zero_point": zero_point.astype(np.int8) - np.int8(8)}
    save(tmp_path, compressed_tensors(layer) | unpacked, settings(scheme(symmetric=False)))
    check(checkpoints.load(tmp_path)[WEIGHT], layer.with_zero_point(zero_point))


@pytest.mark.parametrize("ordered", [True, False], ids=["not ordered", "by activations"])
def test_order_by_activations(tmp_path: Path, rng: np.random.Generator, ordered: bool):
    layer = random_layer(rng, 24, 200, 64, BFLOAT16)
    if not ordered:
        layer = dataclasses.replace(layer, group=rng.permutation(layer.group))
    g_idx = {f"{MODULE}.weight_g_idx": np.full(200, -1, np.int32) if ordered else layer.group.astype(np.int32)}
    save(tmp_path, compressed_tensors(layer) | g_idx, settings(scheme(group_size=64, actorder="group")))
    checkpoint = checkpoints.load(tmp_path)
    assert list(checkpoint) == [WEIGHT]
    w4 = checkpoint[WEIGHT]
    assert (w4.perm is None) == ordered
    check(w4, layer)


@pytest.mark.parametrize(("k", "sizes"), [(256, (32, 128)), (256, (128, None)), (192, (96, 128))], ids=str)
def test_several_schemes(tmp_path: Path, rng: np.random.Generator, k: int, sizes: tuple[int | None, ...]):
    layers, tensors = {}, {}
    for number, size in enumerate(sizes):
        module = f"model.layers.{number}.mlp.up_proj"
        group_size = size or k
        layers[module] = random_layer(rng, 24, k - k % group_size, group_size, BFLOAT16)
        tensors |= compressed_tensors(layers[module], module=module)
    save(
        tmp_path, tensors, settings(*(scheme(**(CHANNEL if size is None else {"group_size": size})) for size in sizes))
    )
    checkpoint = checkpoints.load(tmp_path)
    for module, layer in layers.items():
        check(checkpoint[f"{module}.weight"], layer)


@pytest.mark.parametrize("target", [MODULE, r"re:.*up_proj$"])
def test_the_scheme_of_a_module_is_the_one_that_names_it(tmp_path: Path, rng: np.random.Generator, target: str):
    """Of two group sizes that both fit, and as to whether zero points have to be there."""
    layer = random_layer(rng, 24, 200, 128, BFLOAT16)
    others = scheme(group_size=160)
    save(tmp_path, compressed_tensors(layer), settings(others, scheme(group_size=128) | {"targets": [target]}))
    check(checkpoints.load(tmp_path)[WEIGHT], layer)

    named = scheme(group_size=128, symmetric=False) | {"targets": ["lm_head", target]}
    save(tmp_path, compressed_tensors(layer), settings(others, named))
    with pytest.raises(checkpoints.CheckpointError, match=rf"no tensor '{MODULE}\.weight_zero_point'"):
        checkpoints.load(tmp_path)


def test_a_group_size_that_two_schemes_leave_open(tmp_path: Path, rng: np.random.Generator):
    save(
        tmp_path,
        compressed_tensors(random_layer(rng, 24, 200, 128, BFLOAT16)),
        settings(scheme(group_size=128), scheme(group_size=160)),
    )
    with pytest.raises(checkpoints.CheckpointError, match=r"2 groups over k = 200.* says group_size 128, 160"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("said", [{"group_size": 64}, {"group_size": 0}, {"group_size": "128"}, {"group_size": [128]}])
def test_a_group_size_that_contradicts_the_scales(tmp_path: Path, rng: np.random.Generator, said: dict[str, object]):
    for k in (256, 128):
        save(tmp_path, compressed_tensors(random_layer(rng, 24, k, 128, BFLOAT16)), settings(scheme(**said)))
        with pytest.raises(checkpoints.CheckpointError, match=rf"groups over k = {k}.*are not of one checkpoint"):
            checkpoints.load(tmp_path)


def test_without_settings_the_groups_have_to_divide_k(tmp_path: Path, rng: np.random.Generator):
    layer = random_layer(rng, 24, 256, 64, BFLOAT16)
    save(tmp_path, compressed_tensors(layer))
    checkpoint = checkpoints.load(tmp_path / "model.safetensors")
    assert checkpoint.format == "compressed-tensors"
    check(checkpoint[WEIGHT], layer)
    save(tmp_path, compressed_tensors(random_layer(rng, 24, 200, 67, BFLOAT16)))
    with pytest.raises(checkpoints.CheckpointError, match=r"3 groups over k = 200.*says group_size nowhere"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (settings(scheme(), format="nvfp4-pack-quantized"), "of format 'nvfp4-pack-quantized'"),
        (settings({**scheme(), "format": "int-quantized"}), "of format 'int-quantized'"),
        (settings(scheme(num_bits=8)), "weights of 8 bits"),
        (settings(scheme(), scheme(num_bits=3)), "weights of 3 bits"),
        (settings(scheme(), sparsity_config={"format": "sparse-24-bitmask"}), "sparse format 'sparse-24-bitmask'"),
        (settings(scheme(), transform_config={"config_groups": {"u": {}}}), "expect transformed activations"),
        (settings(scheme(symmetric=False)), "holds no tensor '.*weight_zero_point'"),
    ],
)
def test_what_is_refused(tmp_path: Path, rng: np.random.Generator, said: dict[str, object], sentence: str):
    save(tmp_path, compressed_tensors(random_layer(rng, 24, 256, 128, BFLOAT16)), said)
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("shape", [(24, 2**62), (2**62, 256), (-24, 256), (24, 0), (0, 0), (256, 24)], ids=str)
def test_an_absurd_weight_shape(tmp_path: Path, rng: np.random.Generator, shape: tuple[int, int]):
    tensors = compressed_tensors(random_layer(rng, 24, 256, 128, BFLOAT16))
    save(tmp_path, tensors | {f"{MODULE}.weight_shape": np.array(shape, np.int64)}, settings(scheme()))
    with pytest.raises(checkpoints.CheckpointError):
        checkpoints.load(tmp_path)


def test_a_bias_is_read_as_it_is(tmp_path: Path, rng: np.random.Generator):
    bias = rng.normal(size=24).astype(BFLOAT16)
    tensors = compressed_tensors(random_layer(rng, 24, 128, 128, BFLOAT16))
    save(tmp_path, tensors | {f"{MODULE}.bias": bias}, settings(scheme()))
    checkpoint = checkpoints.load(tmp_path)
    assert set(checkpoint) == {WEIGHT, f"{MODULE}.bias"}
    np.testing.assert_array_equal(checkpoint[f"{MODULE}.bias"], bias)
