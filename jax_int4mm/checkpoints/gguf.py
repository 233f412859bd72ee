"""GGUF files of llama.cpp and its kin, as one file or split; versions 2 and 3, little-endian.

A matrix [n, k] is stored row by row in blocks along k. Q4_0: w = (q - 8) * d for each 32 values. Q4_1: w = q * d + m.
Q4_K: 256 values in 8 groups of 32, w = q * d * sc - dmin * mn with two floats for all and two 6-bit integers for each.
These become Int4Weights of groups of 32, embeddings and output projection included. F32, F16 and BF16 are read as they
are stored; other types, as files that call themselves 4-bit hold some, are dequantised by the gguf package and rounded
once, to the dtype asked for or bfloat16.

Parameters get back the names and values that Hugging Face has: the rows of q_proj and k_proj, which the converter of
Llama models reorders, their order, and the norms of Gemma models, to which it adds 1, that 1 subtracted. The factors of
rotary frequencies are no parameters: the configuration says them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.checkpoints import gguf_files
from jax_int4mm.checkpoints.affine import AffineGroups, to_int4_weight, zero_from_bias
from jax_int4mm.checkpoints.entry import Entry
from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.gguf_config import (
    ROPE_FACTORS,
    ROPE_LONG_FACTORS,
    ROPE_SHORT_FACTORS,
    GgufMetadata,
    heads_of_layer,
    huggingface_config,
)
from jax_int4mm.checkpoints.gguf_files import GgufTensor
from jax_int4mm.weight import Int4Weight

GROUP_SIZE = 32

_REMEDY = "load the bf16, f16 or f32 model that it was made from and quantise that with jax_int4mm.quantize"

_TYPES_AS_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}

# Dequantised at once, so that the float32 values of a large embedding are never all there.
_DEQUANTISED_BYTES = 1 << 24

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_FUSED_NAMES = {name: _LAYER_NAMES[name] for name in ("attn_norm", "attn_output", "ffn_norm", "ffn_down")} | {
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_up": "mlp.gate_up_proj",
}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How the converter treats a kind of model.

    Attributes:
      model_type: As Hugging Face calls it.
      class_name: In transformers.
      layer_names: Of the parts of a layer in the file, and in Hugging Face's.
      reordered: Whether the rows of q_proj and k_proj are.
      norms_plus_one: Whether 1 is added to the norms.
    """

    model_type: str
    class_name: str
    layer_names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LAYER_NAMES)
    reordered: bool = False
    norms_plus_one: bool = False


_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", reordered=True),
    "mistral3": _Architecture("mistral", "MistralForCausalLM", reordered=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", _LAYER_NAMES | _QK_NORMS),
    "gemma": _Architecture("gemma", "GemmaForCausalLM", norms_plus_one=True),
    "gemma2": _Architecture("gemma2", "Gemma2ForCausalLM", _LAYER_NAMES | _FOUR_NORMS, norms_plus_one=True),
    "gemma3": _Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _LAYER_NAMES | _QK_NORMS | _FOUR_NORMS, norms_plus_one=True
    ),
    "phi3": _Architecture("phi3", "Phi3ForCausalLM", _FUSED_NAMES),
}


def read_gguf(path: Path, dtype: DTypeLike | None) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The configuration and the parameters of the model whose file, or a part of which, is at `path`.

    Args:
      path: the file.
      dtype: of weights that are stored quantised; None for bfloat16.
    """
    files = gguf_files.open_files(path)
    metadata = GgufMetadata(files)
    architecture = _ARCHITECTURES.get(metadata.architecture)
    if architecture is None:
        raise CheckpointError(
            f"{path} is a model of architecture {metadata.architecture!r}; {', '.join(_ARCHITECTURES)} are read: "
            f"{_REMEDY}"
        )
    names = {
        name: _huggingface_name(name, architecture, tensor)
        for name, tensor in files.tensors.items()
        if name not in (ROPE_FACTORS, ROPE_LONG_FACTORS, ROPE_SHORT_FACTORS)
    }
    config = huggingface_config(metadata, architecture.model_type, architecture.class_name)
    entries = {}
    for name, theirs in names.items():
        tensor = files.tensors[name]
        layer = int(theirs.split(".")[2]) if theirs.startswith("model.layers.") else 0
        heads = heads_of_layer(metadata, layer)
        _check(name, tensor, _expected_shape(theirs, config, heads, metadata.of_layers("feed_forward_length")[layer]))
        rows = None
        if architecture.reordered and ("q_proj" in theirs or "k_proj" in theirs):
            rows = _rows_in_order(name, tensor, heads["q_proj" not in theirs])
        minus = 1 if architecture.norms_plus_one and theirs.endswith("norm.weight") else 0
        entries[theirs] = _entry(name, tensor, rows, minus, dtype)
    return config, entries


def _huggingface_name(name: str, architecture: _Architecture, tensor: GgufTensor) -> str:
    if "_exps" in name or "_shexp" in name or "ffn_gate_inp" in name:
        raise CheckpointError(
            f"{tensor.path} holds tensor {name!r}, so it is a mixture of experts, which is not read; {_REMEDY}"
        )
    match = re.fullmatch(r"(?:blk\.(?P<layer>0|[1-9]\d{0,5})\.)?(?P<part>\w+)\.(?P<kind>weight|bias)", name)
    if match is not None:
        part = (_MODEL_NAMES if match["layer"] is None else architecture.layer_names).get(match["part"])
        if part is not None and (match["kind"] == "weight" or part.endswith("_proj")):
            prefix = "" if match["layer"] is None else f"model.layers.{match['layer']}."
            return f"{prefix}{part}.{match['kind']}"
    raise CheckpointError(
        f"{tensor.path} holds tensor {name!r}, which no {architecture.class_name} has, so that the model is of a kind "
        f"that is not read; {_REMEDY}"
    )


def _check(name: str, tensor: GgufTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {name!r} in {tensor.path} is {tensor.type} {list(tensor.shape)}, in Hugging Face's order; by the "
            f"file's metadata it has to be {list(shape)}"
        )
    if tensor.type in _TYPES_AS_STORED:
        return
    if len(shape) == 1:
        raise CheckpointError(
            f"tensor {name!r} in {tensor.path} is {tensor.type} {list(shape)}; norms and biases are F32, F16 or BF16"
        )
    try:
        _dequantize(np.zeros((1, tensor.row_bytes), np.uint8), tensor.type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"tensor {name!r} in {tensor.path} has elements of type {tensor.type}, which is not read; {_REMEDY}"
        ) from error


def _expected_shape(theirs: str, config: Mapping[str, Any], heads: tuple[int, int], inner: int) -> tuple[int, ...]:
    """The shape of a parameter by the configuration and, of its layer, heads (of queries, of keys) and inner size."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    part, kind = theirs.split(".")[-2:]
    queries, keys = (head_dim * count for count in heads)
    if part in ("q_norm", "k_norm"):
        return (head_dim,)
    if part.endswith("norm"):
        return (hidden,)
    matrix = {
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "qkv_proj": (queries + 2 * keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
    }[part]
    return matrix if kind == "weight" else matrix[:1]


def _rows_in_order(name: str, tensor: GgufTensor, heads: int) -> np.ndarray:
    """Where each row of q_proj or k_proj is in the file.

    In the file the two channels of a head that are rotated together are neighbours; Hugging Face has the first of each
    pair in the first half of the head.
    """
    n = tensor.shape[0]
    if n % (2 * heads):
        raise CheckpointError(
            f"tensor {name!r} in {tensor.path} has {n} rows, which are not {heads} heads of an even number of channels"
        )
    return np.arange(n).reshape(heads, n // heads // 2, 2).swapaxes(1, 2).ravel()


def _entry(name: str, tensor: GgufTensor, rows: np.ndarray | None, minus: int, dtype: DTypeLike | None) -> Entry:
    source = f"{name!r} in {tensor.path}"
    if (groups := _INT4_GROUPS.get(tensor.type)) is not None:

        def read_int4() -> Int4Weight:
            octets = tensor.read()
            with np.errstate(invalid="ignore"):
                weight = groups(octets if rows is None else octets[rows])
            return to_int4_weight(weight, dtype, source)

        return Entry(tensor.shape, "int4", tensor.nbytes, read_int4, GROUP_SIZE)

    def read() -> np.ndarray:
        stored = _TYPES_AS_STORED.get(tensor.type)
        if stored is None:
            values = _rounded_rows(tensor, np.dtype(ml_dtypes.bfloat16 if dtype is None else dtype), source)
        else:
            values = tensor.read().view(stored).copy()
        if minus:
            values = values.astype(np.float32) - minus
        return values if rows is None else values[rows]

    return Entry(tensor.shape, tensor.type, tensor.nbytes, read)


def _rounded_rows(tensor: GgufTensor, dtype: np.dtype, source: str) -> np.ndarray:
    octets = tensor.read()
    rounded = np.empty(tensor.shape, dtype)
    step = max(1, _DEQUANTISED_BYTES // (4 * tensor.shape[-1]))
    for begin in range(0, len(octets), step):
        with np.errstate(invalid="ignore", over="ignore"):
            rounded[begin : begin + step] = _dequantize(octets[begin : begin + step], tensor.type)
    if not np.isfinite(rounded).all():
        raise CheckpointError(
            f"{source} has values that are not finite, or too large for {dtype}; load it with dtype=jnp.bfloat16, or "
            "copy or download the file again"
        )
    return rounded


def _dequantize(octets: np.ndarray, element_type: str) -> np.ndarray:
    import gguf

    values: np.ndarray = gguf.quants.dequantize(octets, gguf.GGMLQuantizationType[element_type])
    return values


def _q4_0(octets: np.ndarray) -> AffineGroups:
    d, q = _fields(octets, 18, 2)
    return AffineGroups(_halves(q), _floats(d)[..., 0], None, GROUP_SIZE)


def _q4_1(octets: np.ndarray) -> AffineGroups:
    d_m, q = _fields(octets, 20, 4)
    d, m = np.moveaxis(_floats(d_m), -1, 0)
    return AffineGroups(_halves(q), d, zero_from_bias(m, d), GROUP_SIZE)


def _q4_k(octets: np.ndarray) -> AffineGroups:
    d_dmin, packed, q = _fields(octets, 144, 4, 16)
    d, dmin = np.moveaxis(_floats(d_dmin)[..., None], -2, 0)
    # Six bits of each of the first four groups in a byte, whose highest two are those of the last four groups.
    first_scales, first_mins, last = np.split(packed, 3, axis=-1)
    scales = np.concatenate([first_scales & 63, last & 15 | first_scales >> 6 << 4], axis=-1)
    mins = np.concatenate([first_mins & 63, last >> 4 | first_mins >> 6 << 4], axis=-1)
    scale = (d * scales).reshape(len(octets), -1)
    return AffineGroups(_halves(q), scale, zero_from_bias(-(dmin * mins).reshape(scale.shape), scale), GROUP_SIZE)


_INT4_GROUPS: dict[str, Callable[[np.ndarray], AffineGroups]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def _fields(octets: np.ndarray, block_bytes: int, *ends: int) -> list[np.ndarray]:
    """The fields of each block of rows of bytes: uint8 [n, blocks, size of the field] of each."""
    blocks = octets.reshape(len(octets), -1, block_bytes)
    return np.split(blocks, ends, axis=-1)


def _floats(octets: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(octets).view("<f2").astype(np.float32)


def _halves(packed: np.ndarray) -> np.ndarray:
    """Values of 4 bits, of which the first half of a run are the low ones of its bytes: [n, blocks, b] to [n, k].

    A run is 16 bytes where that is the block, and else 32.
    """
    runs = packed.reshape(len(packed), -1, min(packed.shape[-1], 32))
    return np.concatenate([runs & 15, runs >> 4], axis=-1).reshape(len(packed), -1)
