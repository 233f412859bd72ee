"""A GGUF file of a model gives the same logits as the checkpoint that it was converted from."""

from __future__ import annotations

from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import decoder
from decoder_config import Config
from jax_int4mm import checkpoints

BASE = Path(__file__).parents[1] / "data" / "llama_base"


def logits(checkpoint: checkpoints.Checkpoint, config: Config, tokens: np.ndarray) -> np.ndarray:
    params = decoder.params_from_huggingface(checkpoint, config, jnp.float32)
    hidden, _ = decoder.forward(params, jnp.asarray(tokens), config)
    return np.asarray(decoder.logits(params, hidden, config))


def convert(original: checkpoints.Checkpoint, config: Config, path: Path) -> None:
    """Writes a Llama model as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(config.eos_token_ids[0])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in original.items():
        if "q_proj" in name or "k_proj" in name:
            pairs = tensor.reshape(-1, 2, config.head_dim // 2, tensor.shape[1])
            tensor = np.swapaxes(pairs, 1, 2).reshape(tensor.shape)
        theirs = table.get_name(name, try_suffixes=(".weight",))
        if tensor.dtype == ml_dtypes.bfloat16 and tensor.ndim == 2:
            writer.add_tensor(theirs, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(theirs, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_model_computes_the_same(tmp_path: Path):
    original = checkpoints.load(BASE)
    config = Config.from_huggingface(original.config)
    convert(original, config, tmp_path / "model.gguf")
    converted = checkpoints.load(tmp_path)
    assert set(converted) == set(original)
    assert Config.from_huggingface(converted.config) == config
    with np.load(BASE / "reference.npz") as reference, jax.default_matmul_precision("highest"):
        tokens = reference["input_ids"]
        ours = logits(converted, config, tokens)
        np.testing.assert_array_equal(ours, logits(original, config, tokens))
        np.testing.assert_allclose(ours, reference["logits"], atol=0.1)
