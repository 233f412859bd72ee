from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jax_int4mm import checkpoints


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "model.embed_tokens.weight": rng.standard_normal((32, 16)).astype(ml_dtypes.bfloat16),
        "model.norm.weight": rng.standard_normal(16).astype(np.float16),
        "lm_head.weight": rng.standard_normal((32, 16)).astype(np.float32),
        "model.rotary.positions": np.arange(5, dtype=np.int64),
    }


def write_shards(directory: Path, tensors: Mapping[str, np.ndarray], index: Mapping[str, object] | None = None) -> None:
    """One shard a tensor, and their index, to which entries of `index` are added."""
    weight_map: dict[str, object] = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        shard = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        safetensors.numpy.save_file({name: tensor}, directory / shard)
        weight_map[name] = shard
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | dict(index or {})}))


def assert_same(checkpoint: checkpoints.Checkpoint, tensors: Mapping[str, np.ndarray]) -> None:
    assert set(checkpoint) == set(tensors)
    assert len(checkpoint) == len(tensors)
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint[name].dtype == tensor.dtype
        np.testing.assert_array_equal(checkpoint[name], tensor)


def test_directory_with_one_file(tmp_path: Path):
    tensors = random_tensors()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = checkpoints.load(tmp_path)
    assert_same(checkpoint, tensors)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.path == tmp_path


def test_one_file_given_as_text(tmp_path: Path):
    tensors = random_tensors()
    safetensors.numpy.save_file(tensors, tmp_path / "adapter.safetensors")
    checkpoint = checkpoints.load(str(tmp_path / "adapter.safetensors"))
    assert_same(checkpoint, tensors)
    assert checkpoint.config is None


def test_shards(tmp_path: Path):
    tensors = random_tensors()
    write_shards(tmp_path, tensors)
    assert_same(checkpoints.load(tmp_path), tensors)


def test_shards_that_are_links_elsewhere_as_in_a_download_cache(tmp_path: Path):
    tensors = random_tensors()
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    write_shards(snapshot, tensors)
    for number, shard in enumerate(sorted(snapshot.glob("*.safetensors"))):
        shard.rename(blobs / str(number))
        shard.symlink_to(blobs / str(number))
    assert_same(checkpoints.load(snapshot), tensors)


def test_a_tensor_is_read_only_when_asked_for(tmp_path: Path):
    """A gigabyte of zeros, mostly a hole in the file, is opened in little memory and one tensor is read."""
    small = np.arange(6, dtype=np.float32)
    safetensors.numpy.save_file({"small": small}, tmp_path / "small.safetensors")
    big_bytes = 1 << 30
    header = json.dumps(
        {
            "small": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},
            "big": {"dtype": "U8", "shape": [big_bytes], "data_offsets": [24, 24 + big_bytes]},
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + small.tobytes())
        file.truncate(8 + len(header) + 24 + big_bytes)
    # In a process of its own, whose peak memory is not that of the tests before it.
    script = (
        "import resource, sys\n"
        "from jax_int4mm import checkpoints\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert checkpoints.load(sys.argv[1])['small'].tolist() == [0, 1, 2, 3, 4, 5]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < big_bytes / 8


def test_missing_tensor(tmp_path: Path):
    safetensors.numpy.save_file(random_tensors(), tmp_path / "model.safetensors")
    checkpoint = checkpoints.load(tmp_path)
    with pytest.raises(KeyError) as caught:
        checkpoint["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(caught.value, checkpoints.CheckpointError)
    assert (
        str(caught.value) == f"{tmp_path} holds no parameter 'model.layers.0.mlp.up_proj.weight' among its 4 parameters"
    )
    assert "model.layers.0.mlp.up_proj.weight" not in checkpoint
    assert checkpoint.get("model.layers.0.mlp.up_proj.weight") is None


def test_nothing_at_the_path(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or directory .*nowhere; give the path of a local"):
        checkpoints.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_only_safetensors_files_are_read(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(checkpoints.CheckpointError, match=rf"{name} is not a safetensors file"):
        checkpoints.load(tmp_path / name)
    with pytest.raises(checkpoints.CheckpointError, match=r"neither model\.safetensors nor .*pickled .* never are"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1], ids=lambda kept: f"{kept} bytes")
def test_truncated_file(tmp_path: Path, kept: int):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(random_tensors(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(checkpoints.CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        checkpoints.load(tmp_path)


def test_header_that_claims_an_absurd_size(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(checkpoints.CheckpointError, match=r"model\.safetensors is truncated or not a safetensors file"):
        checkpoints.load(tmp_path)


def test_truncated_shard_is_found_before_anything_is_read(tmp_path: Path):
    write_shards(tmp_path, random_tensors())
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(checkpoints.CheckpointError, match=rf"{last.name} is truncated or not a safetensors file"):
        checkpoints.load(tmp_path)


def test_index_that_names_a_missing_shard(tmp_path: Path):
    write_shards(tmp_path, random_tensors(), {"lost.weight": "model-00009-of-00009.safetensors"})
    with pytest.raises(
        checkpoints.CheckpointError,
        match=r"places tensor 'lost\.weight' in model-00009-of-00009\.safetensors, and there is no such file",
    ):
        checkpoints.load(tmp_path)


def test_index_that_names_a_tensor_its_shard_lacks(tmp_path: Path):
    write_shards(tmp_path, random_tensors(), {"lost.weight": "model-00001-of-00004.safetensors"})
    with pytest.raises(
        checkpoints.CheckpointError, match=r"model-00001-of-00004\.safetensors does not hold tensor 'lost\.weight'"
    ):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/outside.safetensors", "..", "", "a/../../outside.safetensors", "a\\b", "c:b", 7],
)
def test_shards_cannot_leave_the_directory(tmp_path: Path, shard: object):
    directory = tmp_path / "model"
    directory.mkdir()
    safetensors.numpy.save_file(random_tensors(), tmp_path / "outside.safetensors")
    write_shards(directory, random_tensors(), {"lm_head.weight": shard})
    with pytest.raises(checkpoints.CheckpointError, match=r"'lm_head\.weight' in .*; a shard has to be a plain file"):
        checkpoints.load(directory)


def test_pickled_shards_are_refused(tmp_path: Path):
    write_shards(tmp_path, random_tensors(), {"lm_head.weight": "pytorch_model-00001.bin"})
    (tmp_path / "pytorch_model-00001.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(checkpoints.CheckpointError, match=r"only \.safetensors shards are read"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_without_a_weight_map(tmp_path: Path, index: str):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(checkpoints.CheckpointError, match=r"index\.json has no 'weight_map' object"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b'{"a": ', "is not valid JSON"), (b"\xff\xfe", "is not valid JSON"), (b"[1]", "holds a list")],
)
def test_malformed_json(tmp_path: Path, file: str, content: bytes, sentence: str):
    write_shards(tmp_path, random_tensors())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(checkpoints.CheckpointError, match=rf"{file} .*{sentence}"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes, whose 4-bit"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4, 4-bit floats"),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.0}}, "ExLlamaV2, of several bit widths"),
        ({"quantization_config": {"quant_method": "exl3"}}, "ExLlamaV3"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "8-bit floats"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "NVIDIA Model Optimizer"),
        ({"quantization_config": {"quant_method": "something_new"}}, "method 'something-new'"),
    ],
)
def test_refused_by_its_config(tmp_path: Path, config: dict[str, object], what: str):
    safetensors.numpy.save_file(random_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        checkpoints.CheckpointError, match=rf"is quantised \({what}.*\), which is not read; load the bf16, f16 or f32"
    ):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("settings", ['{"quantization_config": {}}', '{"quantization_config": [4]}'])
def test_quantised_in_an_unknown_way(tmp_path: Path, settings: str):
    safetensors.numpy.save_file(random_tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(settings)
    with pytest.raises(checkpoints.CheckpointError, match=r"without a quant_method|that is not an object"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_map", "bitsandbytes"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "MXFP4"),
        ("model.layers.0.mlp.up_proj.q_weight", "ExLlamaV2"),
        ("model.layers.0.mlp.up_proj.trellis", "ExLlamaV3"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "8-bit floats"),
    ],
)
def test_refused_by_its_names(tmp_path: Path, name: str, what: str):
    safetensors.numpy.save_file({name: np.zeros((2, 2), np.int32)}, tmp_path / "file.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=rf"'{name}', so it is quantised \({what}.*\), which is not"):
        checkpoints.load(tmp_path / "file.safetensors")


def test_element_type_that_is_not_read(tmp_path: Path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    checkpoint = checkpoints.load(tmp_path)
    with pytest.raises(checkpoints.CheckpointError, match=r"'w' in .* has elements of type F8_E4M3, which is not read"):
        checkpoint["w"]


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    safetensors.numpy.save_file(random_tensors(), tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "jax_int4mm\[checkpoints\]"'):
        checkpoints.load(tmp_path)


def test_importing_the_package_does_not_import_safetensors():
    script = "import sys, jax_int4mm.checkpoints; sys.exit('safetensors' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "pytorch_lora.safetensors"])
def test_a_directory_with_one_file_of_another_name(tmp_path: Path, name: str):
    tensors = random_tensors()
    safetensors.numpy.save_file(tensors, tmp_path / name)
    assert_same(checkpoints.load(tmp_path), tensors)


def test_a_directory_with_one_index_of_another_name(tmp_path: Path):
    tensors = random_tensors()
    write_shards(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "gptq_model.safetensors.index.json")
    assert_same(checkpoints.load(tmp_path), tensors)


def test_a_directory_with_several_files_and_no_index(tmp_path: Path):
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.numpy.save_file(random_tensors(), tmp_path / name)
    with pytest.raises(checkpoints.CheckpointError, match=r"neither model\.safetensors nor"):
        checkpoints.load(tmp_path)


def test_a_tensor_cannot_be_written_to(tmp_path: Path):
    safetensors.numpy.save_file(random_tensors(), tmp_path / "model.safetensors")
    tensor = checkpoints.load(tmp_path)["lm_head.weight"]
    with pytest.raises(ValueError, match="read-only"):
        tensor[0, 0] = 1


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(random_tensors(), path)
    checkpoint = checkpoints.load(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        checkpoints.CheckpointError, match=r"model\.safetensors has changed since it was opened; load the"
    ):
        checkpoint["lm_head.weight"]
