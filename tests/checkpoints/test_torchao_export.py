"""What is saved for torchao, read by torchao."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

import acceptance
import jax_int4mm as i4
from jax_int4mm import checkpoints

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao", reason="torchao is not installed: pip install '.[torch]'")
    from safetensors.torch import load_file
    from torchao.core.config import config_from_dict
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict


def save(folder: Path, rng: np.random.Generator) -> dict[str, object]:
    parameters = {
        "model.layers.0.up.weight": i4.quantize(rng.normal(0, 1, (1024, 64)).astype(ml_dtypes.bfloat16), 128),
        "model.layers.0.down.weight": i4.quantize(rng.normal(0, 1, (160, 13)).astype(np.float16), 32, "hqq"),
        "model.norm.weight": rng.normal(0, 1, 64).astype(np.float32),
    }
    checkpoints.save(folder, parameters, format="torchao", config={"model_type": "llama"})
    return parameters


def test_its_reader_gives_back_the_same_tensors_and_metadata(tmp_path: Path, rng: np.random.Generator) -> None:
    parameters = save(tmp_path / "made", rng)
    stored = load_file(tmp_path / "made" / "model.safetensors")
    with safetensors.safe_open(tmp_path / "made" / "model.safetensors", "numpy") as file:
        metadata = file.metadata()
    read, left = unflatten_tensor_state_dict(stored, metadata)
    assert left == {}
    assert set(read) == set(parameters)
    up, down = read["model.layers.0.up.weight"], read["model.layers.0.down.weight"]
    assert type(up).__name__ == type(down).__name__ == "Int4TilePackedTo4dTensor"
    assert tuple(up.shape) == (64, 1024)
    assert tuple(down.shape) == (13, 160)
    assert list(down.block_size) == [1, 32]
    packed = np.asarray(parameters["model.layers.0.up.weight"].packed)
    np.testing.assert_array_equal(up.qdata.numpy(), packed)
    pairs = np.asarray(parameters["model.layers.0.up.weight"].scales_and_zeros)
    np.testing.assert_array_equal(up.scale_and_zero.view(torch.uint16).numpy(), pairs.view(np.uint16))

    again, described = flatten_tensor_state_dict(read)
    assert set(again) == set(stored)
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    assert json.loads(described.pop("tensor_names")) == json.loads(metadata["tensor_names"])
    assert {name: json.loads(text) for name, text in described.items()} == {
        name: json.loads(metadata[name]) for name in parameters
    }


def test_its_configuration_is_understood(tmp_path: Path, rng: np.random.Generator) -> None:
    save(tmp_path / "made", rng)
    written = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "torchao"
    config = config_from_dict(written["quant_type"]["default"])
    assert type(config).__name__ == "Int4WeightOnlyConfig"
    assert config.group_size in (32, 128)
    assert config.int4_packing_format.name == "TILE_PACKED_TO_4D"


def test_what_torchao_writes_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    parameters = save(tmp_path / "made", rng)
    path = tmp_path / "made" / "model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        read, _ = unflatten_tensor_state_dict(load_file(path), file.metadata())
    tensors, metadata = flatten_tensor_state_dict(read)
    (tmp_path / "theirs").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata)
    found = checkpoints.load(tmp_path / "theirs")
    for name in ("model.layers.0.up.weight", "model.layers.0.down.weight"):
        expected = parameters[name].astype(jnp.bfloat16)
        np.testing.assert_array_equal(found[name].dequantize(), expected.dequantize())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no CUDA here: its packed format is CUDA's alone")
@pytest.mark.parametrize("m", [1, 33])
def test_its_product_is_ours(tmp_path: Path, m: int, rng: np.random.Generator) -> None:
    save(tmp_path / "made", rng)
    path = tmp_path / "made" / "model.safetensors"
    with safetensors.safe_open(path, "numpy") as file:
        read, _ = unflatten_tensor_state_dict(load_file(path, device="cuda"), file.metadata())
    ours = checkpoints.load(tmp_path / "made")
    for name in ("model.layers.0.up.weight", "model.layers.0.down.weight"):
        weight = np.asarray(ours[name].dequantize().T)
        x = rng.normal(0, 1, (m, weight.shape[1])).astype(ml_dtypes.bfloat16)
        x_torch = torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16).cuda()
        y = torch.nn.functional.linear(x_torch, read[name]).cpu()
        theirs = y.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        cpu = jax.devices("cpu")[0]
        acceptance.check([theirs], [x], weight, cpu)
        acceptance.check([np.asarray(i4.matmul(x, ours[name], implementation="ampere"))], [x], weight, cpu)
