from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jax_int4mm as i4
from jax_int4mm import checkpoints

FORMATS = pytest.mark.parametrize("format", ["native", "torchao"])


def random_weight(rng: np.random.Generator, *shape: int, **options: Any) -> i4.Int4Weight:
    return i4.quantize(rng.normal(0, 0.02, shape).astype(np.float32), **{"dtype": jnp.bfloat16, **options})


def random_parameters(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "model.embed_tokens.weight": rng.standard_normal((32, 16)).astype(ml_dtypes.bfloat16),
        "model.layers.0.up.weight": random_weight(rng, 384, 40),
        "model.layers.0.up.bias": rng.standard_normal(40).astype(np.float32),
        "model.layers.2.down.weight": random_weight(rng, 1024, 64, group_size=32),
        "model.layers.10.ragged.weight": random_weight(rng, 200, 13, group_size=256),
        "step": np.array(7, np.int64),
    }


def assert_same_weight(found: i4.Int4Weight, expected: i4.Int4Weight) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))


def assert_same(checkpoint: checkpoints.Checkpoint, parameters: dict[str, Any]) -> None:
    assert set(checkpoint) == set(parameters)
    for name, expected in parameters.items():
        found = checkpoint[name]
        if isinstance(expected, i4.Int4Weight):
            assert_same_weight(found, expected)
        else:
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


@FORMATS
def test_what_is_saved_is_loaded(tmp_path: Path, format: str, rng: np.random.Generator) -> None:
    parameters = random_parameters(rng)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}, "hidden_size": 16}
    checkpoints.save(tmp_path / "made", parameters, format=format, config=config)
    checkpoint = checkpoints.load(tmp_path / "made")
    assert checkpoint.format == {"native": "jax_int4mm", "torchao": "torchao"}[format]
    assert checkpoint.config["hidden_size"] == 16
    assert checkpoint.config["quantization_config"]["quant_method"] == checkpoint.format
    assert_same(checkpoint, parameters)
    assert list(checkpoint)[1:4] == ["model.layers.0.up.bias", "model.layers.0.up.weight", "model.layers.2.down.weight"]


@FORMATS
def test_shards(tmp_path: Path, format: str, rng: np.random.Generator) -> None:
    parameters = random_parameters(rng)
    checkpoints.save(tmp_path / "made", parameters.items(), format=format, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "made").glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert_same(checkpoints.load(tmp_path / "made"), parameters)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": jnp.float16},
        {"inner_k_tiles": 2},
        {"inner_k_tiles": 4, "group_size": 32, "symmetric": True},
    ],
    ids=str,
)
def test_native_holds_every_weight(tmp_path: Path, options: dict[str, Any], rng: np.random.Generator) -> None:
    weight = random_weight(rng, 300, 24, **options)
    stacked = random_weight(rng, 2, 3, 128, 16, **options)
    perm = jnp.asarray(rng.permutation(300), jnp.int32)
    permuted = i4.Int4Weight(weight.packed, weight.scales_and_zeros, perm, group_size=weight.group_size, k=300, n=24)
    parameters = {"weight": weight, "layers/stacked": stacked, "permuted": permuted}
    checkpoints.save(tmp_path / "made", parameters)
    checkpoint = checkpoints.load(tmp_path / "made")
    assert_same(checkpoint, parameters)
    assert checkpoint.config is None
    assert checkpoint.entries["layers/stacked"].shape == (2, 3, 16, 128)


def test_native_without_its_config_is_known_by_its_metadata(tmp_path: Path, rng: np.random.Generator) -> None:
    parameters = random_parameters(rng)
    checkpoints.save(tmp_path / "made", parameters)
    assert_same(checkpoints.load(tmp_path / "made" / "model.safetensors"), parameters)


def test_dtype_rounds_once(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = random_weight(rng, 256, 8, dtype=jnp.float16)
    checkpoints.save(tmp_path / "made", {"w": weight})
    assert_same_weight(checkpoints.load(tmp_path / "made", dtype=jnp.bfloat16)["w"], weight.astype(jnp.bfloat16))


def test_packed_words_are_taken_from_the_file_as_they_are(tmp_path: Path, rng: np.random.Generator) -> None:
    """Data begins at a multiple of 64 bytes and packed words come first, so a CPU computes on the file's own memory."""
    parameters = {"a": np.ones(3, np.float32), "w": random_weight(rng, 1024, 256)}
    checkpoints.save(tmp_path / "made", dict(reversed(parameters.items())))
    path = tmp_path / "made" / "model.safetensors"
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0
    with jax.default_device(jax.devices("cpu")[0]):
        weight = checkpoints.load(tmp_path / "made")["w"]
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        address = weight.packed.unsafe_buffer_pointer()
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
        assert any(begin <= address < end for begin, end in ranges)
        donated = jax.jit(lambda packed: packed + 1, donate_argnums=0)(weight.packed)
    np.testing.assert_array_equal(donated, np.asarray(parameters["w"].packed) + 1)
    assert_same(checkpoints.load(tmp_path / "made"), parameters)


def test_native_files_are_safetensors_files(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = random_weight(rng, 256, 16)
    checkpoints.save(tmp_path / "made", {"w": weight, "b": np.zeros((0, 4), np.float32)})
    tensors = safetensors.numpy.load_file(tmp_path / "made" / "model.safetensors")
    assert set(tensors) == {"w.packed", "w.scales_and_zeros", "b"}
    np.testing.assert_array_equal(tensors["w.packed"], weight.packed)
    with safetensors.safe_open(tmp_path / "made" / "model.safetensors", "numpy") as file:
        described = json.loads(file.metadata()["w"])
    assert described == {
        "type": "Int4Weight",
        **{"k": 256, "n": 16, "group_size": 128, "inner_k_tiles": 8, "stacked": []},
    }


def test_torchao_has_k_padded_to_1024_and_bfloat16(tmp_path: Path, rng: np.random.Generator) -> None:
    parameters = {
        "up.weight": random_weight(rng, 200, 13, group_size=32, inner_k_tiles=2, dtype=jnp.float16),
        "norm.weight": np.ones(4, np.float16),
    }
    checkpoints.save(tmp_path / "made", parameters, format="torchao")
    tensors = safetensors.numpy.load_file(tmp_path / "made" / "model.safetensors")
    assert tensors["up._weight_qdata"].shape == (2, 8, 32, 4)
    assert tensors["up._weight_scale_and_zero"].shape == (32, 16, 2)
    assert tensors["up._weight_scale_and_zero"].dtype == ml_dtypes.bfloat16
    found = checkpoints.load(tmp_path / "made")["up.weight"]
    expected = parameters["up.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(found.dequantize(), expected.dequantize())
    packed = i4.unpack_int4(tensors["up._weight_qdata"])
    assert np.all(packed[:, 200:] == 8)
    assert np.all(packed[13:] == 8)
    assert not tensors["up._weight_scale_and_zero"][200 // 32 + 1 :].any()


@pytest.mark.parametrize("kind", ["stacked", "permuted", "no module"])
def test_what_torchao_cannot_hold(tmp_path: Path, kind: str, rng: np.random.Generator) -> None:
    weight = random_weight(rng, 2, 128, 8) if kind == "stacked" else random_weight(rng, 128, 8)
    if kind == "permuted":
        perm = jnp.arange(128, dtype=jnp.int32)[::-1]
        weight = i4.Int4Weight(weight.packed, weight.scales_and_zeros, perm, group_size=128, k=128, n=8)
    name = "weight" if kind == "no module" else "up.weight"
    with pytest.raises(
        ValueError, match=rf"Int4Weight '{name}' has no form in torchao: .* Save it in the native format"
    ):
        checkpoints.save(tmp_path / "made", {name: weight}, format="torchao")
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_leaves_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    def pairs() -> Iterator[tuple[str, Any]]:
        yield "first", random_weight(rng, 1024, 64)
        yield "second", random_weight(rng, 1024, 64)
        assert len(list(next(tmp_path.iterdir()).glob("*.safetensors"))) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path / "made", pairs(), shard_bytes=40_000)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match=r"there is something at .* already; name a directory"):
            checkpoints.save(path, {"a": np.zeros(2)})
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("parameters", "error", "sentence"),
    [
        ({"a": [1.0]}, TypeError, r"parameter 'a' is a list; it must be an array or an Int4Weight"),
        ([("a", np.zeros(2)), ("a", np.zeros(2))], ValueError, r"tensor 'a' is there twice"),
        ({"a": np.zeros(2, np.complex64)}, ValueError, r"tensor 'a' has dtype complex64, which safetensors does not"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, parameters: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        checkpoints.save(tmp_path / "made", parameters)
    assert list(tmp_path.iterdir()) == []


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format is 'gguf'; it must be one of 'native', 'torchao'"):
        checkpoints.save(tmp_path / "made", {}, format="gguf")


def test_companions_go_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "vocab.txt"):
        (source / name).write_text(name)
    for name in ("model.safetensors.index.json", "quantize_config.json", "config.json", "model.bin", "code.py"):
        (source / name).write_text("{}")
    (source / "subfolder.json").mkdir()
    checkpoints.save(tmp_path / "made", {"a": np.zeros(2)}, companions=source)
    expected = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "vocab.txt", "model.safetensors"}
    assert {path.name for path in (tmp_path / "made").iterdir()} == expected


def test_saving_holds_one_shard_in_memory(tmp_path: Path) -> None:
    script = (
        "import resource, sys, numpy as np\n"
        "from jax_int4mm import checkpoints\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "checkpoints.save(sys.argv[1] + '0', {'a': np.ones(8)})\n"
        "before = peak()\n"
        "pairs = ((f'p{i}', np.ones(1 << 21, np.float32)) for i in range(64))\n"
        "checkpoints.save(sys.argv[1], pairs, shard_bytes=32 << 20)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) << 10 < 64 << 20  # of 512 MiB written in 16 shards


def edit_header(path: Path, change: Any) -> None:
    """Rewrites a file's header; the data stay as they are."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": "2"}, r"is of version 2 of the native format; this release reads version 1: install"),
        ({"w": "{"}, r"metadata of 'w' that does not describe an Int4Weight"),
        ({"w": '["Int4Weight"]'}, r"metadata of 'w' that does not describe an Int4Weight"),
        ({"k": 0}, r"describes 'w' as .*; k, n and stacked have to be positive sizes"),
        ({"k": "512"}, r"describes 'w' as .*; k, n and stacked have to be positive sizes"),
        ({"stacked": 3}, r"describes 'w' as .*; k, n and stacked have to be positive sizes"),
        ({"group_size": 48}, r"describes 'w' as .*group_size one of 32, 64, 128, 256"),
        ({"inner_k_tiles": [8]}, r"describes 'w' as .*inner_k_tiles one of 2, 4, 8"),
        (
            {"k": 1 << 50},
            r"tensor 'w\.packed' .* the native format stores \[1125899906842624, 16\] in groups of 128 as",
        ),
        ({"n": 17}, r"tensor 'w\.packed' in .* is I32 \[2, 4, 32, 4\]; .* \[3, 4, 32, 4\]"),
        ({"group_size": 64}, r"tensor 'w\.scales_and_zeros' in .* is BF16 \[4, 16, 2\]; .* \[8, 16, 2\]"),
        ({"gone": {"type": "Int4Weight"}}, r"describes 'gone' as"),
    ],
    ids=str,
)
def test_metadata_that_lies(tmp_path: Path, change: dict[str, Any], sentence: str, rng: np.random.Generator) -> None:
    checkpoints.save(tmp_path / "made", {"w": random_weight(rng, 512, 16)})

    def apply(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"]
        described = json.loads(metadata["w"])
        for key, value in change.items():
            if key in described:
                metadata["w"] = json.dumps(described | {key: value})
            else:
                metadata[key] = value if isinstance(value, str) else json.dumps(value)

    edit_header(tmp_path / "made" / "model.safetensors", apply)
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path / "made")


@pytest.mark.parametrize("lost", ["w.packed", "w.scales_and_zeros"])
def test_a_leaf_that_is_missing(tmp_path: Path, lost: str, rng: np.random.Generator) -> None:
    checkpoints.save(tmp_path / "made", {"w": random_weight(rng, 512, 16)})
    edit_header(tmp_path / "made" / "model.safetensors", lambda header: header.update({"x": header.pop(lost)}))
    with pytest.raises(
        checkpoints.CheckpointError, match=rf"holds no tensor '{lost}': .*; the checkpoint is incomplete"
    ):
        checkpoints.load(tmp_path / "made")


def test_a_perm_that_is_none(tmp_path: Path, rng: np.random.Generator) -> None:
    weight = random_weight(rng, 128, 8)
    perm = np.zeros(128, np.int32)
    broken = i4.Int4Weight(weight.packed, weight.scales_and_zeros, jnp.asarray(perm), group_size=128, k=128, n=8)
    checkpoints.save(tmp_path / "made", {"w": broken})
    checkpoint = checkpoints.load(tmp_path / "made")
    with pytest.raises(
        checkpoints.CheckpointError, match=r"'w\.perm' in .* is no permutation of k; the file is damaged"
    ):
        checkpoint["w"]


@pytest.mark.parametrize("key", ["k", "n", "group_size", "inner_k_tiles", "stacked"])
def test_metadata_that_lack_a_part(tmp_path: Path, key: str, rng: np.random.Generator) -> None:
    checkpoints.save(tmp_path / "made", {"w": random_weight(rng, 512, 16)})

    def apply(header: dict[str, Any]) -> None:
        described = json.loads(header["__metadata__"]["w"])
        del described[key]
        header["__metadata__"]["w"] = json.dumps(described)

    edit_header(tmp_path / "made" / "model.safetensors", apply)
    with pytest.raises(checkpoints.CheckpointError, match=r"describes 'w' as .*; k, n and stacked have to be positive"):
        checkpoints.load(tmp_path / "made")
