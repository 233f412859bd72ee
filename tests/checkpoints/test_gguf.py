from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jax_int4mm as i4
from jax_int4mm import checkpoints

DATA = Path(__file__).parents[1] / "data"
TYPES = gguf.GGMLQuantizationType
INT4_TYPES = [TYPES.Q4_0, TYPES.Q4_1, TYPES.Q4_K]

HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 40, 4, 2, 16
MODEL_SHAPES = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
LAYER_SHAPES = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
QK_NORMS = {"self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,)}
FOUR_NORMS = {"pre_feedforward_layernorm": (HIDDEN,), "post_feedforward_layernorm": (HIDDEN,)}
FUSED_SHAPES = {
    **{name: LAYER_SHAPES[name] for name in ("input_layernorm", "post_attention_layernorm")},
    **{name: LAYER_SHAPES[name] for name in ("self_attn.o_proj", "mlp.down_proj")},
    "self_attn.qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "mlp.gate_up_proj": (2 * INNER, HIDDEN),
}
# Of each architecture that is read: the shapes of a layer, and the biases that it has.
ARCHITECTURES: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...]]] = {
    "llama": (LAYER_SHAPES, ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")),
    "mistral3": (LAYER_SHAPES, ()),
    "qwen2": (LAYER_SHAPES, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "qwen3": (LAYER_SHAPES | QK_NORMS, ()),
    "gemma": (LAYER_SHAPES, ()),
    "gemma2": (LAYER_SHAPES | FOUR_NORMS, ()),
    "gemma3": (LAYER_SHAPES | FOUR_NORMS | QK_NORMS, ()),
    "phi3": (FUSED_SHAPES, ()),
}


def write(
    path: Path,
    architecture: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any] | None = None,
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    alignment: int = 32,
    **options: Any,
) -> Path:
    """A file of tensors by their GGUF names; `types` says of which the array is bytes, `metadata` None leaves out."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    values = {
        "block_count": max(1, len(layers)),
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
    }
    values = {f"{architecture}.{name}": value for name, value in values.items()} | dict(metadata or {})
    writer = gguf.GGUFWriter(path, architecture, **options)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for name, value in values.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_float32(name, value)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "</s>", "a"])
    writer.add_array("tokenizer.ggml.scores", [0.0, 0.5, 1.0])
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_matrix(path: Path, octets: np.ndarray, element_type: gguf.GGMLQuantizationType) -> Path:
    """A file with an embedding of any type."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[element_type]
    k = octets.shape[1] // block_bytes * block
    return write(
        path,
        "qwen2",
        {"token_embd.weight": octets, "blk.0.attn_norm.weight": np.zeros(k, np.float32)},
        {"qwen2.embedding_length": k},
        {"token_embd.weight": element_type},
    )


def random_model(rng: np.random.Generator, architecture: str, layers: int = 2) -> dict[str, np.ndarray]:
    """Parameters under their Hugging Face names."""
    shapes, biases = ARCHITECTURES[architecture]
    model = {f"{name}.weight": shape for name, shape in MODEL_SHAPES.items()}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        model |= {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}
        model |= {f"{prefix}{name}.bias": shapes[name][:1] for name in biases}
    if architecture == "gemma":
        del model["lm_head.weight"]
    # Multiples of 1/64 below 4, to which 1 is added without rounding.
    return {name: (rng.integers(-255, 256, shape) / 64).astype(np.float32) for name, shape in model.items()}


def gguf_names(model: Mapping[str, np.ndarray], architecture: str) -> dict[str, str]:
    """The name in the file of each parameter, by the package's own table."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, 8)
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in model}
    # llama.cpp's Gemma 2 has none, and its reader takes one all the same.
    return {name: theirs or "output.weight" for name, theirs in names.items()}


def reordered(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj as the converter of Llama models writes them."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)


def converted(model: Mapping[str, np.ndarray], architecture: str) -> dict[str, np.ndarray]:
    """Parameters as the converter writes them."""
    tensors = {}
    for name, theirs in gguf_names(model, architecture).items():
        tensor = model[name]
        if architecture in ("llama", "mistral3") and ("q_proj" in name or "k_proj" in name):
            tensor = reordered(tensor, HEADS if "q_proj" in name else KV_HEADS)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        tensors[theirs] = tensor
    return tensors


def random_blocks(
    rng: np.random.Generator, element_type: gguf.GGMLQuantizationType, floats: int, scale: Any
) -> np.ndarray:
    """Random bytes [24, 3 blocks or more] whose first `floats` f16 of each block are what `scale(shape)` gives."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[element_type]
    octets = rng.integers(0, 256, (24, 768 // block, block_bytes), np.uint8)
    octets[..., : 2 * floats] = scale((*octets.shape[:2], floats)).astype(np.float16).view(np.uint8)
    return octets.reshape(24, -1)


def values_and_rounding(weight: i4.Int4Weight) -> tuple[np.ndarray, np.ndarray]:
    """The values [n, k] of a weight in float32, and how far one rounding of scale and zero moves them at most."""
    q = np.asarray(i4.unpack_int4(weight.packed))[: weight.n, : weight.k].astype(np.float32) - 8
    pairs = np.asarray(weight.scales_and_zeros).astype(np.float32)[np.arange(weight.k) // weight.group_size, : weight.n]
    scale, zero = np.moveaxis(pairs, -1, 0)
    unit = ml_dtypes.finfo(weight.dtype).eps / 2
    rounding = float(unit) * (np.abs(q * scale.T) + np.abs(zero.T)) * 1.01
    return q * scale.T + zero.T, rounding


# --- files of llama.cpp ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-Q4_0", "tiny-Q4_K_M"])
def test_weights_of_llama_cpp(name: str):
    checkpoint = checkpoints.load(DATA / "gguf" / f"{name}.gguf")
    assert checkpoint.format == "gguf"
    model = safetensors.numpy.load_file(DATA / "llama_base" / "model.safetensors")
    with np.load(DATA / "gguf" / f"{name}.npz") as reference:
        assert len(reference) == 2
        for parameter, columns in reference.items():
            weight = checkpoint[parameter]
            assert (weight.shape, weight.group_size) == ((256, len(columns)), 32)
            assert weight.dtype == ml_dtypes.bfloat16
            values, rounding = values_and_rounding(weight)
            assert (np.abs(values[:, :64] - columns) <= rounding[:, :64]).all()
    for parameter in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        values, _ = values_and_rounding(checkpoint[parameter])
        original = model[parameter].astype(np.float32)
        assert np.linalg.norm(values - original) < 0.15 * np.linalg.norm(original)


def test_q4_0_of_llama_cpp_in_float16_is_exact():
    checkpoint = checkpoints.load(DATA / "gguf" / "tiny-Q4_0.gguf", dtype="float16")
    with np.load(DATA / "gguf" / "tiny-Q4_0.npz") as reference:
        for parameter, columns in reference.items():
            weight = checkpoint[parameter]
            assert not np.asarray(weight.scales_and_zeros)[..., 1].any()
            np.testing.assert_array_equal(values_and_rounding(weight)[0][:, :64], columns)


def test_q6_k_of_llama_cpp():
    checkpoint = checkpoints.load(DATA / "gguf" / "tiny-Q4_K_M.gguf")
    v_proj = checkpoint["model.layers.1.self_attn.v_proj.weight"]
    assert (v_proj.shape, v_proj.dtype) == ((128, 256), ml_dtypes.bfloat16)
    with safetensors.safe_open(DATA / "llama_base" / "model.safetensors", "numpy") as file:
        original = file.get_tensor("model.layers.1.self_attn.v_proj.weight").astype(np.float32)
    assert np.linalg.norm(v_proj.astype(np.float32) - original) < 0.03 * np.linalg.norm(original)


def test_config_of_llama_cpp():
    assert checkpoints.load(DATA / "gguf" / "tiny-Q4_0.gguf").config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


# --- element types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element_type", INT4_TYPES, ids=lambda t: t.name)
def test_what_float16_represents_is_exact(tmp_path: Path, rng: np.random.Generator, element_type):
    # 1/64 for scales of either sign and for minimums, so that every scale and zero is a multiple of 1/64 below 16.
    signs = rng.choice([-1.0, 1.0], 1 << 12)
    floats = 1 if element_type == TYPES.Q4_0 else 2
    if element_type == TYPES.Q4_K:
        signs = np.abs(signs)
    octets = random_blocks(rng, element_type, floats, lambda shape: np.resize(signs, shape) / 64)
    weight = checkpoints.load(write_matrix(tmp_path / "m.gguf", octets, element_type), dtype="float16")[
        "model.embed_tokens.weight"
    ]
    assert weight.dtype == np.float16
    np.testing.assert_array_equal(values_and_rounding(weight)[0], gguf.quants.dequantize(octets, element_type))


@pytest.mark.parametrize("element_type", INT4_TYPES, ids=lambda t: t.name)
def test_scale_and_zero_are_rounded_once(tmp_path: Path, rng: np.random.Generator, element_type):
    floats = 1 if element_type == TYPES.Q4_0 else 2
    octets = random_blocks(rng, element_type, floats, lambda shape: rng.standard_normal(shape))
    checkpoint = checkpoints.load(write_matrix(tmp_path / "m.gguf", octets, element_type))
    weight = checkpoint["model.embed_tokens.weight"]
    entry = checkpoint.entries["model.embed_tokens.weight"]
    assert (entry.shape, entry.element_type, entry.nbytes) == (weight.shape[::-1], "int4", octets.size)
    assert (entry.group_size, entry.requantized) == (32, None)
    values, rounding = values_and_rounding(weight)
    error = np.abs(values - gguf.quants.dequantize(octets, element_type))
    assert (error <= rounding).all()
    assert error.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "element_type",
    [TYPES.Q5_0, TYPES.Q5_1, TYPES.Q8_0, TYPES.Q2_K, TYPES.Q3_K, TYPES.Q5_K, TYPES.Q6_K, TYPES.IQ4_XS],
    ids=lambda t: t.name,
)
def test_other_types_are_dequantised_and_rounded_once(tmp_path: Path, rng: np.random.Generator, element_type, dtype):
    block, block_bytes = gguf.GGML_QUANT_SIZES[element_type]
    # Every two bytes are a small float16, whichever of them is a scale.
    octets = rng.integers(0, 256, (24, 768 // block * block_bytes), np.uint8) & 0x3F
    checkpoint = checkpoints.load(write_matrix(tmp_path / "m.gguf", octets, element_type), dtype=dtype)
    values = checkpoint["model.embed_tokens.weight"]
    assert (values.shape, values.dtype) == ((24, 768), np.dtype(dtype))
    np.testing.assert_array_equal(values, gguf.quants.dequantize(octets, element_type).astype(dtype))
    assert checkpoint.entries["model.embed_tokens.weight"].element_type == element_type.name


def test_a_large_matrix_is_dequantised_in_parts(tmp_path: Path, rng: np.random.Generator, monkeypatch):
    monkeypatch.setattr("jax_int4mm.checkpoints.gguf._DEQUANTISED_BYTES", 4 * 256 * 5)
    octets = gguf.quants.quantize(rng.standard_normal((24, 256)).astype(np.float32), TYPES.Q8_0)
    values = checkpoints.load(write_matrix(tmp_path / "m.gguf", octets, TYPES.Q8_0))["model.embed_tokens.weight"]
    np.testing.assert_array_equal(values, gguf.quants.dequantize(octets, TYPES.Q8_0).astype(ml_dtypes.bfloat16))


def test_float_tensors_are_read_as_they_are_stored(tmp_path: Path, rng: np.random.Generator):
    values = rng.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    half = values.astype(np.float16)
    short = values.astype(ml_dtypes.bfloat16)
    tensors = {"token_embd.weight": values, "output.weight": half, "blk.0.attn_q.weight": short[:HIDDEN].view(np.uint8)}
    tensors["blk.0.attn_q.weight"] = np.resize(short, (HIDDEN, HIDDEN)).view(np.uint8)
    path = write(tmp_path / "m.gguf", "qwen2", tensors, types={"blk.0.attn_q.weight": TYPES.BF16})
    checkpoint = checkpoints.load(path, dtype="float16")
    assert checkpoint["model.embed_tokens.weight"].dtype == np.float32
    np.testing.assert_array_equal(checkpoint["model.embed_tokens.weight"], values)
    assert checkpoint["lm_head.weight"].dtype == np.float16
    np.testing.assert_array_equal(checkpoint["lm_head.weight"], half)
    q_proj = checkpoint["model.layers.0.self_attn.q_proj.weight"]
    assert q_proj.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(q_proj, np.resize(short, (HIDDEN, HIDDEN)))
    assert {entry.element_type for entry in checkpoint.entries.values()} == {"F32", "F16", "BF16"}


@pytest.mark.parametrize("element_type", [TYPES.Q4_0, TYPES.Q4_K, TYPES.Q8_0], ids=lambda t: t.name)
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_found_when_it_is_read(
    tmp_path: Path, rng: np.random.Generator, element_type, scale
):
    floats = 2 if element_type == TYPES.Q4_K else 1
    octets = random_blocks(rng, element_type, floats, lambda shape: np.full(shape, scale))
    checkpoint = checkpoints.load(write_matrix(tmp_path / "m.gguf", octets, element_type))
    with pytest.raises(checkpoints.CheckpointError, match=r"'token_embd\.weight' in .*m\.gguf has .* not .*finite"):
        checkpoint["model.embed_tokens.weight"]


@pytest.mark.parametrize("element_type", [TYPES.Q4_1, TYPES.Q8_0], ids=lambda t: t.name)
def test_values_too_large_for_float16(tmp_path: Path, rng: np.random.Generator, element_type):
    floats = 2 if element_type == TYPES.Q4_1 else 1
    octets = random_blocks(rng, element_type, floats, lambda shape: np.full(shape, 60000.0))
    path = write_matrix(tmp_path / "m.gguf", octets, element_type)
    with pytest.raises(checkpoints.CheckpointError, match=r"too large for float16; load it with dtype=jnp\.bfloat16"):
        checkpoints.load(path, dtype="float16")["model.embed_tokens.weight"]
    checkpoints.load(path)["model.embed_tokens.weight"]


@pytest.mark.parametrize("element_type", [TYPES.I8, TYPES.F64], ids=lambda t: t.name)
def test_types_that_are_not_read(tmp_path: Path, element_type):
    octets = np.zeros((8, 256), np.int8 if element_type == TYPES.I8 else np.float64)
    path = write(
        tmp_path / "m.gguf",
        "qwen2",
        {"token_embd.weight": octets, "blk.0.attn_norm.weight": np.zeros(256, np.float32)},
        {"qwen2.embedding_length": 256},
    )
    with pytest.raises(checkpoints.CheckpointError, match=rf"'token_embd\.weight' in .* of type {element_type.name}, "):
        checkpoints.load(path)


# --- names, order and values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_of_each_architecture(tmp_path: Path, rng: np.random.Generator, architecture: str):
    model = random_model(rng, architecture)
    checkpoint = checkpoints.load(write(tmp_path / "m.gguf", architecture, converted(model, architecture)))
    assert set(checkpoint) == set(model)
    for name, values in model.items():
        assert checkpoint.entries[name].shape == values.shape
        assert checkpoint[name].dtype == np.float32
        np.testing.assert_array_equal(checkpoint[name], values, err_msg=name)
    assert checkpoint.config["tie_word_embeddings"] == (architecture == "gemma")


@pytest.mark.parametrize("alignment", [8, 4096])
def test_other_alignments(tmp_path: Path, rng: np.random.Generator, alignment: int):
    model = random_model(rng, "qwen2", 1)
    checkpoint = checkpoints.load(write(tmp_path / "m.gguf", "qwen2", converted(model, "qwen2"), alignment=alignment))
    for name, values in model.items():
        np.testing.assert_array_equal(checkpoint[name], values)


@pytest.mark.parametrize("element_type", [TYPES.Q4_0, TYPES.Q4_1, TYPES.Q8_0], ids=lambda t: t.name)
def test_rows_of_quantised_q_and_k_are_put_in_order(tmp_path: Path, rng: np.random.Generator, element_type):
    q_proj = rng.standard_normal((HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    k_proj = rng.standard_normal((KV_HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    tensors = {
        "token_embd.weight": np.zeros((VOCABULARY, HIDDEN), np.float32),
        "blk.0.attn_q.weight": gguf.quants.quantize(reordered(q_proj, HEADS), element_type),
        "blk.0.attn_k.weight": gguf.quants.quantize(reordered(k_proj, KV_HEADS), element_type),
    }
    types = dict.fromkeys(["blk.0.attn_q.weight", "blk.0.attn_k.weight"], element_type)
    checkpoint = checkpoints.load(write(tmp_path / "m.gguf", "llama", tensors, types=types))
    for name, original in (("q_proj", q_proj), ("k_proj", k_proj)):
        weight = checkpoint[f"model.layers.0.self_attn.{name}.weight"]
        dense = np.asarray(weight.dequantize()).T if isinstance(weight, i4.Int4Weight) else weight
        assert np.linalg.norm(dense.astype(np.float32) - original) < 0.15 * np.linalg.norm(original)


def test_layers_with_different_numbers_of_heads(tmp_path: Path, rng: np.random.Generator):
    model = random_model(rng, "llama")
    model["model.layers.1.self_attn.k_proj.weight"] = rng.standard_normal((HEAD_DIM, HIDDEN)).astype(np.float32)
    del model["model.layers.1.self_attn.k_proj.bias"], model["model.layers.1.self_attn.v_proj.weight"]
    tensors = converted(model, "llama")
    tensors["blk.1.attn_k.weight"] = reordered(model["model.layers.1.self_attn.k_proj.weight"], 1)
    path = write(tmp_path / "m.gguf", "llama", tensors, {"llama.attention.head_count_kv": [KV_HEADS, 1]})
    checkpoint = checkpoints.load(path)
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        np.testing.assert_array_equal(checkpoint[name], model[name])
    assert checkpoint.config["num_key_value_heads"] == [KV_HEADS, 1]


@pytest.mark.parametrize("given", [0, 1, 2])
def test_split_model(tmp_path: Path, rng: np.random.Generator, given: int):
    model = random_model(rng, "qwen3")
    parts = write_split(tmp_path, model)
    assert len(parts) == 3
    for path in (parts[given], tmp_path):
        checkpoint = checkpoints.load(path)
        assert set(checkpoint) == set(model)
        for name, values in model.items():
            np.testing.assert_array_equal(checkpoint[name], values)
        assert checkpoint.config["num_hidden_layers"] == 2


def write_split(directory: Path, model: Mapping[str, np.ndarray]) -> list[Path]:
    write(directory / "m.gguf", "qwen3", converted(model, "qwen3"), split_max_tensors=10)
    return sorted(directory.glob("m-*.gguf"))


def test_split_model_without_a_part(tmp_path: Path, rng: np.random.Generator):
    first, second, third = write_split(tmp_path, random_model(rng, "qwen3"))
    second.rename(tmp_path / "elsewhere.bin")
    for path in (first, third, tmp_path):
        with pytest.raises(
            checkpoints.CheckpointError, match=r"lacks m-00002-of-00003\.gguf of a model split over 3 files"
        ):
            checkpoints.load(path)


def test_split_model_of_mixed_parts(tmp_path: Path, rng: np.random.Generator):
    first, second, _ = write_split(tmp_path, random_model(rng, "qwen3"))
    shutil.copy(first, second)
    with pytest.raises(checkpoints.CheckpointError, match=r"m-00002-of-00003\.gguf says that it is part 0 of 3"):
        checkpoints.load(first)


def test_split_model_whose_parts_have_changed_names(tmp_path: Path, rng: np.random.Generator):
    first, second, third = write_split(tmp_path, random_model(rng, "qwen3"))
    second.rename(tmp_path / "second")
    third.rename(second)
    (tmp_path / "second").rename(third)
    with pytest.raises(checkpoints.CheckpointError, match=r"m-00002-of-00003\.gguf says that it is part 2 of 3"):
        checkpoints.load(first)


def test_split_model_of_another_number_of_tensors(tmp_path: Path, rng: np.random.Generator):
    first = write_split(tmp_path, random_model(rng, "qwen3"))[0]
    content = first.read_bytes()
    count = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    first.write_bytes(content[:count] + b"\x7f" + content[count + 1 :])
    with pytest.raises(
        checkpoints.CheckpointError, match=r"says that the model has 127 tensors, and its parts hold 25"
    ):
        checkpoints.load(first)


def test_part_of_a_split_model_under_another_name(tmp_path: Path, rng: np.random.Generator):
    first = write_split(tmp_path, random_model(rng, "qwen3"))[0].rename(tmp_path / "model.gguf")
    with pytest.raises(checkpoints.CheckpointError, match=r"split over 3 files; .* end with -00001-of-00003\.gguf"):
        checkpoints.load(first)


def test_directory(tmp_path: Path, rng: np.random.Generator):
    write(tmp_path / "a.gguf", "gemma", converted(random_model(rng, "gemma"), "gemma"))
    assert checkpoints.load(tmp_path).config["model_type"] == "gemma"
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    with pytest.raises(checkpoints.CheckpointError, match=r"2 GGUF models \(a\.gguf, b\.gguf\); give the path of one"):
        checkpoints.load(tmp_path)
    safetensors.numpy.save_file({"w": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert checkpoints.load(tmp_path).format == "safetensors"


def test_nothing_at_the_path(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or directory .*nowhere\.gguf"):
        checkpoints.load(tmp_path / "nowhere.gguf")


# --- configurations ----------------------------------------------------------------------------------------------


def config_of(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray] = {}):
    embedding = {"token_embd.weight": np.zeros((VOCABULARY, HIDDEN), np.float32)}
    norm = {"blk.0.attn_norm.weight": np.zeros(HIDDEN, np.float32)}
    return checkpoints.load(write(path / "m.gguf", architecture, embedding | norm | dict(tensors), metadata)).config


@pytest.mark.parametrize(
    ("architecture", "metadata", "expected"),
    [
        ("qwen2", {}, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False}),
        ("qwen3", {}, {"model_type": "qwen3", "head_dim": HEAD_DIM, "attention_bias": False}),
        ("mistral3", {}, {"model_type": "mistral", "sliding_window": None}),
        ("gemma", {}, {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}),
        (
            "gemma2",
            {
                "gemma2.attention.sliding_window": 32,
                "gemma2.attn_logit_softcapping": 40.0,
                "gemma2.final_logit_softcapping": 20.0,
            },
            {
                "model_type": "gemma2",
                "sliding_window": 32,
                "attn_logit_softcapping": 40.0,
                "final_logit_softcapping": 20.0,
                "query_pre_attn_scalar": HEAD_DIM,
                "layer_types": ["sliding_attention"],
                "hidden_activation": "gelu_pytorch_tanh",
            },
        ),
        (
            "gemma3",
            {
                "gemma3.attention.sliding_window": 32,
                "gemma3.rope.freq_base": 1e6,
                "gemma3.rope.scaling.type": "linear",
                "gemma3.rope.scaling.factor": 8.0,
            },
            {
                "model_type": "gemma3_text",
                "rope_theta": 1e6,
                "rope_local_base_freq": 10000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "final_logit_softcapping": None,
            },
        ),
        ("phi3", {"phi3.attention.sliding_window": 0}, {"sliding_window": None, "partial_rotary_factor": 1.0}),
        ("phi3", {"phi3.rope.dimension_count": 12}, {"partial_rotary_factor": 0.75}),
        (
            "qwen2",
            {
                "qwen2.rope.scaling.type": "yarn",
                "qwen2.rope.scaling.factor": 4.0,
                "qwen2.rope.scaling.original_context_length": 32,
            },
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        ),
        (
            "llama",
            {"llama.attention.head_count_kv": None, "llama.attention.key_length": None},
            {"num_key_value_heads": HEADS, "head_dim": HIDDEN // HEADS, "tie_word_embeddings": True},
        ),
        (
            "llama",
            {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 3},
            {"bos_token_id": 1, "eos_token_id": [2, 3]},
        ),
        ("llama", {}, {"eos_token_id": None, "rms_norm_eps": 1e-6, "max_position_embeddings": 128}),
    ],
)
def test_configuration(tmp_path: Path, architecture: str, metadata: dict[str, Any], expected: dict[str, Any]):
    config = config_of(tmp_path, architecture, metadata)
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("architecture", "every", "layers_of_27b"), [("gemma2", 2, 46), ("gemma3", 6, 62)], ids=["gemma2", "gemma3"]
)
def test_layers_of_gemma(tmp_path: Path, architecture: str, every: int, layers_of_27b: int):
    for layers in (12, layers_of_27b):
        norms = {f"blk.{layer}.attn_norm.weight": np.zeros(HIDDEN, np.float32) for layer in range(layers)}
        metadata = {f"{architecture}.attention.sliding_window": 32, f"{architecture}.attention.head_count": 2}
        config = config_of(tmp_path, architecture, metadata, norms)
        full = [layer for layer, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
        assert full == list(range(every - 1, layers, every))
        assert config["query_pre_attn_scalar"] == (HIDDEN // 2 if layers == layers_of_27b else HEAD_DIM)


def llama3_factors(factor: float, low: float, high: float, theta: float) -> np.ndarray:
    """What the converter writes of a model first trained on 8192 tokens, a branch for each kind of frequency."""
    factors = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * theta ** (2 * pair / HEAD_DIM)
        if wavelength < 8192 / high:
            factors.append(1.0)
        elif wavelength > 8192 / low:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "theta"), [(8, 1, 4, 5e5), (32, 1, 4, 5e5), (16, 1, 32, 5e5), (8, 2, 64, 1e4)]
)
def test_rope_of_llama3_is_found_in_its_factors(tmp_path: Path, factor: float, low: float, high: float, theta: float):
    factors = llama3_factors(factor, low, high, theta)
    config = config_of(tmp_path, "llama", {"llama.rope.freq_base": theta}, {"rope_freqs.weight": factors})
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }


def test_rope_factors_of_1_scale_nothing(tmp_path: Path):
    assert "rope_scaling" not in config_of(tmp_path, "llama", {}, {"rope_freqs.weight": np.ones(8, np.float32)})


@pytest.mark.parametrize("factors", [np.linspace(1, 2, 8), np.full(8, 3.0), np.full(8, np.nan), np.zeros(8)])
def test_other_rope_factors_are_refused(tmp_path: Path, factors: np.ndarray):
    with pytest.raises(checkpoints.CheckpointError, match=r"m\.gguf divides its rotary frequencies by factors that"):
        config_of(tmp_path, "llama", {}, {"rope_freqs.weight": factors.astype(np.float32)})
    with pytest.raises(
        checkpoints.CheckpointError, match=r"'rope_freqs\.weight' in .* one F32 for each of the 8 pairs"
    ):
        config_of(tmp_path, "llama", {}, {"rope_freqs.weight": np.ones(4, np.float32)})


def test_long_rope_of_phi3(tmp_path: Path):
    long, short = np.arange(1, 9, dtype=np.float32), np.ones(8, np.float32)
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    config = config_of(tmp_path, "phi3", {"phi3.rope.scaling.original_context_length": 32}, tensors)
    assert config["rope_scaling"] == {
        "rope_type": "longrope",
        "long_factor": list(range(1, 9)),
        "short_factor": [1] * 8,
    }
    assert config["original_max_position_embeddings"] == 32


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"llama.embedding_length": None}, r"has no llama\.embedding_length in its metadata"),
        ({"llama.embedding_length": "64"}, r"has llama\.embedding_length = '64' .* an integer above 0"),
        ({"llama.embedding_length": 64.0}, r"has llama\.embedding_length = 64\.0 .* an integer above 0"),
        ({"llama.attention.head_count": 0}, r"has llama\.attention\.head_count = 0 .* above 0"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv = \[2, 2\] .* one for each of 1 layers"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, r"a finite number above 0"),
        ({"llama.rope.freq_base": float("inf")}, r"a finite number above 0"),
        ({"llama.block_count": 3}, r"says that the model has 3 layers, and it holds tensors of 1"),
        ({"llama.block_count": 1 << 31}, r"says that the model has 2147483648 layers"),
        ({"llama.attention.value_length": 8}, r"values of another length than keys \(16\)"),
        ({"llama.rope.dimension_count": 8}, r"rotates 8 of a head's 16 channels, which no LlamaForCausalLM"),
        ({"llama.rope.scaling.type": "longrope"}, r"in a way that is not read .*= 'longrope'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 1.0}, r"in a way that is not"),
        ({"llama.attention.temperature_scale": 0.1}, r"scales attention by the position"),
        ({"general.alignment": 24}, r"its general\.alignment is 24, and it has to be a power of 2"),
    ],
)
def test_metadata_that_are_refused(tmp_path: Path, metadata: dict[str, Any], sentence: str):
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        config_of(tmp_path, "llama", metadata)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blk.0.ffn_gate_exps.weight", "so it is a mixture of experts, which is not read"),
        ("blk.0.ffn_gate_inp.weight", "so it is a mixture of experts"),
        ("blk.0.attn_q_norm.weight", "which no LlamaForCausalLM has"),
        ("blk.0.attn_norm.bias", "which no LlamaForCausalLM has"),
        ("blk.00.attn_q.weight", "which no LlamaForCausalLM has"),
        ("blk.0.attn_q.weight.lora_a", "which no LlamaForCausalLM has"),
        ("mm.0.weight", "which no LlamaForCausalLM has"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, name: str, sentence: str):
    with pytest.raises(checkpoints.CheckpointError, match=rf"holds tensor '{name}', {sentence}"):
        config_of(tmp_path, "llama", {}, {name: np.zeros((HIDDEN, HIDDEN), np.float32)})


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (32, 64), r"\[64, 64\]"),
        ("blk.0.attn_v.weight", (64, 64), r"\[32, 64\]"),
        ("blk.0.ffn_down.weight", (96, 64), r"\[64, 96\]"),
        ("blk.0.ffn_up.weight", (96, 64, 1), r"\[96, 64\]"),
        ("blk.0.attn_k.bias", (64,), r"\[32\]"),
        ("output_norm.weight", (32,), r"\[64\]"),
        ("output.weight", (39, 64), r"\[40, 64\]"),
    ],
)
def test_shapes_that_the_metadata_do_not_say(tmp_path: Path, name: str, shape: tuple[int, ...], expected: str):
    with pytest.raises(checkpoints.CheckpointError, match=rf"'{name}' in .* it has to be {expected}"):
        config_of(tmp_path, "llama", {}, {name: np.zeros(shape, np.float32)})


def test_heads_of_an_odd_number_of_channels(tmp_path: Path):
    metadata = {"llama.attention.key_length": 15, "llama.attention.value_length": 15}
    with pytest.raises(checkpoints.CheckpointError, match=r"60 rows, which are not 4 heads of an even number"):
        config_of(tmp_path, "llama", metadata, {"blk.0.attn_q.weight": np.zeros((60, HIDDEN), np.float32)})


def test_a_quantised_norm_is_refused(tmp_path: Path):
    path = write(
        tmp_path / "m.gguf",
        "llama",
        {
            "token_embd.weight": np.zeros((VOCABULARY, HIDDEN), np.float32),
            "blk.0.attn_norm.weight": np.zeros(HIDDEN // 32 * 34, np.uint8),
        },
        types={"blk.0.attn_norm.weight": TYPES.Q8_0},
    )
    with pytest.raises(checkpoints.CheckpointError, match=r"is Q8_0 \[64\]; norms and biases are F32, F16 or BF16"):
        checkpoints.load(path)


def test_other_architectures_are_refused(tmp_path: Path):
    with pytest.raises(checkpoints.CheckpointError, match=r"of architecture 'falcon'; llama, .*phi3 are read: load"):
        config_of(tmp_path, "falcon", {})


# --- damaged files -----------------------------------------------------------------------------------------------


def small_file(path: Path, rng: np.random.Generator) -> bytes:
    return write(path / "m.gguf", "llama", converted(random_model(rng, "llama", 1), "llama")).read_bytes()


def read_all(path: Path) -> None:
    checkpoint = checkpoints.load(path)
    for name in checkpoint:
        checkpoint[name]


def test_truncated_file(tmp_path: Path, rng: np.random.Generator):
    path, content = tmp_path / "m.gguf", small_file(tmp_path, rng)
    for kept in [*range(0, 64), *rng.integers(64, len(content), 100), len(content) - 32]:
        path.write_bytes(content[:kept])
        with pytest.raises(checkpoints.CheckpointError, match=r"m\.gguf is truncated or not a GGUF file \(.+\); copy"):
            checkpoints.load(path)


def test_damaged_headers_never_raise_anything_else(tmp_path: Path, rng: np.random.Generator):
    path, content = tmp_path / "m.gguf", small_file(tmp_path, rng)
    header = content.index(b"blk.0.ffn_down.bias") + 64
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(4, header, rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
        path.write_bytes(damaged)
        with contextlib.suppress(checkpoints.CheckpointError):
            read_all(path)


@pytest.mark.parametrize(
    ("offset", "content", "sentence"),
    [
        (0, b"GGML", "it does not begin with GGUF"),
        (4, struct.pack("<I", 1), "of version 1; versions 2 and 3 are read"),
        (4, struct.pack(">I", 3), "is a big-endian GGUF file; little-endian ones are read"),
        (8, struct.pack("<Q", 1 << 60), "it says that it holds 1152921504606846976 tensors"),
        (16, struct.pack("<Q", (1 << 64) - 1), "it says that it holds .* and 18446744073709551615 metadata"),
        (24, struct.pack("<Q", 1 << 62), "its header asks for 4611686018427387904 bytes at 32"),
        (32, b"\xff", "its header has a text that is not UTF-8"),
    ],
)
def test_headers_that_lie(tmp_path: Path, rng: np.random.Generator, offset: int, content: bytes, sentence: str):
    damaged = bytearray(small_file(tmp_path, rng))
    damaged[offset : offset + len(content)] = content
    (tmp_path / "m.gguf").write_bytes(damaged)
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path / "m.gguf")


def described(shape: tuple[int, ...], element_type: int = 0, offset: int = 0, name: bytes = b"token_embd.weight"):
    """How a header describes a tensor."""
    dimensions = b"".join(struct.pack("<Q", size) for size in shape)
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack("<I", len(shape))
        + dimensions
        + struct.pack("<IQ", element_type, offset)
    )


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("tensors", "pairs", "sentence"),
    [
        ([described((48, 2), 12)], [], r"'token_embd\.weight' has shape \[2, 48\], and Q4_K has blocks of 256"),
        ([described((1 << 40, 1 << 40))], [], r"would end at byte \d{25} of"),
        ([described((8, 8), offset=1 << 63)], [], r"would end at byte 9223372036854776\d+ of"),
        ([described((8, 0))], [], r"has shape \[0, 8\], and no dimension is 0"),
        ([described((1,) * 5)], [], r"has 5 dimensions, and there are 1 to 4"),
        ([described(())], [], r"has 0 dimensions"),
        ([described((8,), 77)], [], r"elements of type 77, which the gguf package does not know"),
        ([described((8,)), described((8,))], [], r"it has tensor 'token_embd\.weight' twice"),
        ([], [pair(b"a", 0, b"1"), pair(b"a", 0, b"1")], "it has the key 'a' twice"),
        ([], [pair(b"a", 13, b"1")], "a value of type 13, which there is not"),
        ([], [pair(b"a", 9, struct.pack("<IQ", 9, 1))], "a value of type 9, which there is not"),
        ([], [pair(b"a", 9, struct.pack("<IQ", 0, 1 << 61))], "asks for 2305843009213693952 bytes"),
        ([], [pair(b"a", 9, struct.pack("<IQ", 8, 1 << 61))], "asks for 8 bytes"),
        ([], [], r"has no general\.architecture in its metadata"),
        ([], [pair(b"general.architecture", 0, b"1")], r"has no general\.architecture in its metadata"),
        (
            [],
            [pair(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")],
            "holds no tensor 'token_embd.weight'",
        ),
    ],
)
def test_headers_made_by_hand(tmp_path: Path, tensors: list[bytes], pairs: list[bytes], sentence: str):
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    (tmp_path / "m.gguf").write_bytes(header + bytes(-len(header) % 32 + 32))
    with pytest.raises(checkpoints.CheckpointError, match=sentence):
        checkpoints.load(tmp_path / "m.gguf")


def test_without_gguf_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'needs gguf: pip install "jax_int4mm\[gguf\]"'):
        checkpoints.load(DATA / "gguf" / "tiny-Q4_0.gguf")


def test_importing_the_package_does_not_import_gguf():
    script = "import sys, jax_int4mm.checkpoints; sys.exit('gguf' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
