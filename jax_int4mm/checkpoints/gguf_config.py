"""The Hugging Face configuration that a GGUF file's metadata stand for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.gguf_files import GgufFiles

# Tensors that hold no parameter, but what the rotary embedding divides its frequencies by.
ROPE_FACTORS = "rope_freqs.weight"
ROPE_LONG_FACTORS, ROPE_SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

# The context that the converter takes a Llama 3 model to have been trained on first.
_LLAMA3_CONTEXT = 8192

# Of Gemma 2 and 3 the layers that attend to all tokens: each second and each sixth.
_FULL_ATTENTION_EVERY = {"gemma2": 2, "gemma3": 6}
# Of Gemma 2 and 3 the models, known by their number of layers, whose queries are not scaled by their head_dim.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}

_YARN_OPTIONS = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}

_NONE = object()


class GgufMetadata:
    """The metadata of a model's architecture, checked as they are looked up."""

    def __init__(self, files: GgufFiles):
        """Takes the model.

        Raises:
          CheckpointError: it does not say its architecture.
        """
        self.files = files
        architecture = files.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(
                f"{files.path} has no general.architecture in its metadata, so it holds no model; give the path of the "
                "model's own file"
            )
        self.architecture = architecture

    def number(self, key: str, default: Any = _NONE) -> Any:
        """A number above 0 of the architecture, by the rest of its key.

        Raises:
          CheckpointError: it is missing and there is no default, or it is something else.
        """
        return self._checked(key, default, int | float, "a finite number")

    def size(self, key: str, default: Any = _NONE) -> Any:
        """As number, of what is counted: an int."""
        return self._checked(key, default, int, "an integer")

    def _checked(self, key: str, default: Any, kind: Any, what: str) -> Any:
        key = f"{self.architecture}.{key}"
        found = self.files.metadata.get(key, _NONE)
        if found is _NONE:
            if default is not _NONE:
                return default
            raise CheckpointError(
                f"{self.files.path} has no {key} in its metadata, without which the model cannot be computed; convert "
                "the model anew"
            )
        if isinstance(found, bool) or not isinstance(found, kind) or not 0 < found < math.inf:
            raise CheckpointError(
                f"{self.files.path} has {key} = {found!r} in its metadata; it has to be {what} above 0"
            )
        return found

    def of_layers(self, key: str) -> list[int]:
        """A size of each layer, of which the file has one for all or a list."""
        layers = self.size("block_count")
        found = self.files.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(found, np.ndarray):
            return [self.size(key)] * layers
        if found.dtype.kind not in "iu" or found.shape != (layers,) or not (found > 0).all():
            raise CheckpointError(
                f"{self.files.path} has {self.architecture}.{key} = {found.tolist()} in its metadata; it has to be one "
                f"number above 0, or one for each of {layers} layers"
            )
        return [int(size) for size in found]


def huggingface_config(metadata: GgufMetadata, model_type: str, class_name: str) -> dict[str, Any]:
    """The config.json of a model, in the spelling that every release of transformers reads.

    A size that differs between layers is a list, which the classes of transformers do not take.

    Args:
      metadata: of the model.
      model_type: as Hugging Face calls its architecture.
      class_name: of the model in transformers.

    Raises:
      CheckpointError: the metadata lack something, or say what no such configuration does.
    """
    files = metadata.files
    embedding = files.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{files.path} holds no tensor 'token_embd.weight'; the model is incomplete")
    _check_layers(metadata)
    heads = metadata.of_layers("attention.head_count")
    hidden = metadata.size("embedding_length")
    head_dim = metadata.size("attention.key_length", max(1, hidden // heads[0]))
    if metadata.size("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{files.path} has values of another length than keys ({head_dim}), which no {class_name} has"
        )
    token_ids = {name: files.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
    eos = [token for name, token in token_ids.items() if name != "bos" and token is not None]
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _one_or_list(metadata.of_layers("feed_forward_length")),
        "num_hidden_layers": metadata.size("block_count"),
        "num_attention_heads": _one_or_list(heads),
        "num_key_value_heads": _one_or_list(_head_counts_kv(metadata)),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.size("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in files.tensors,
        "bos_token_id": token_ids["bos"],
        "eos_token_id": eos[0] if len(set(eos)) == 1 else eos or None,
        "hidden_act": "silu",
    }
    scaling = _rope_scaling(metadata, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config | _particulars(metadata, model_type, config)


def heads_of_layer(metadata: GgufMetadata, layer: int) -> tuple[int, int]:
    """The numbers of heads of queries, and of keys and values, of one layer."""
    return metadata.of_layers("attention.head_count")[layer], _head_counts_kv(metadata)[layer]


def _head_counts_kv(metadata: GgufMetadata) -> list[int]:
    if f"{metadata.architecture}.attention.head_count_kv" in metadata.files.metadata:
        return metadata.of_layers("attention.head_count_kv")
    return metadata.of_layers("attention.head_count")


def _check_layers(metadata: GgufMetadata) -> None:
    held = {int(match[1]) for name in metadata.files.tensors if (match := re.match(r"blk\.(0|[1-9]\d{0,5})\.", name))}
    said = metadata.size("block_count")
    if said != len(held) or held != set(range(len(held))):
        raise CheckpointError(
            f"{metadata.files.path} says that the model has {said} layers, and it holds tensors of {len(held)}; the "
            "model is incomplete, or cut from another"
        )


def _one_or_list(sizes: list[int]) -> int | list[int]:
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _particulars(metadata: GgufMetadata, model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of one kind of model has beyond that of others."""
    held, number, size = metadata.files.tensors, metadata.number, metadata.size
    if model_type in ("llama", "qwen3"):
        biases = {name: f"blk.0.{name}.bias" in held for name in ("attn_q", "ffn_up")}
        return {"attention_bias": biases["attn_q"]} | ({"mlp_bias": biases["ffn_up"]} if model_type == "llama" else {})
    if model_type == "mistral":
        return {"sliding_window": size("attention.sliding_window", None)}
    if model_type == "qwen2":
        return {"use_sliding_window": False}
    if model_type == "phi3":
        return {
            # 0 where there is none.
            "sliding_window": metadata.files.metadata.get("phi3.attention.sliding_window") or None,
            "original_max_position_embeddings": size(
                "rope.scaling.original_context_length", config["max_position_embeddings"]
            ),
            "partial_rotary_factor": size("rope.dimension_count", config["head_dim"]) / config["head_dim"],
        }
    activation = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    if model_type == "gemma":
        return activation
    window, layers = size("attention.sliding_window", None), config["num_hidden_layers"]
    every = _FULL_ATTENTION_EVERY[metadata.architecture] if window else 1
    of_27b = layers == _LAYERS_OF_27B[metadata.architecture]
    particulars = {
        **activation,
        "sliding_window": window,
        "layer_types": [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)
        ],
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if of_27b else config["head_dim"]
        ),
    }
    if metadata.architecture == "gemma2":
        return particulars | {
            "attn_logit_softcapping": number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": number("final_logit_softcapping", 30.0),
        }
    return particulars | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": number("final_logit_softcapping", None),
        "rope_local_base_freq": number("rope.freq_base_swa", 10000.0),
    }


def _rope_scaling(metadata: GgufMetadata, config: Mapping[str, Any]) -> dict[str, Any] | None:
    files, held = metadata.files, metadata.files.tensors
    prefix = f"{metadata.architecture}.rope.scaling."
    kind = files.metadata.get(f"{prefix}type", "none")
    rotated = metadata.size("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"] and metadata.architecture != "phi3":
        raise CheckpointError(
            f"{files.path} rotates {rotated} of a head's {config['head_dim']} channels, which no "
            f"{config['architectures'][0]} does"
        )
    if f"{metadata.architecture}.attention.temperature_scale" in files.metadata:
        raise CheckpointError(
            f"{files.path} scales attention by the position (attention.temperature_scale), which is not read; load the "
            "bf16 model and quantise it with jax_int4mm.quantize"
        )
    if ROPE_FACTORS in held and kind == "none":
        return _llama3_scaling(_factors(files, ROPE_FACTORS, rotated), config["rope_theta"], f"{files.path}")
    if ROPE_LONG_FACTORS in held and ROPE_SHORT_FACTORS in held and kind in ("none", "longrope"):
        return {
            "rope_type": "longrope",
            "long_factor": _factors(files, ROPE_LONG_FACTORS, rotated).tolist(),
            "short_factor": _factors(files, ROPE_SHORT_FACTORS, rotated).tolist(),
        }
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    if kind == "yarn" and f"{prefix}yarn_log_multiplier" not in files.metadata:
        options = {theirs: metadata.number(f"rope.scaling.{ours}", None) for ours, theirs in _YARN_OPTIONS.items()}
        return {
            "rope_type": "yarn",
            "factor": metadata.number("rope.scaling.factor"),
            "original_max_position_embeddings": metadata.size("rope.scaling.original_context_length"),
            **{name: value for name, value in options.items() if value is not None},
        }
    raise CheckpointError(
        f"{files.path} scales its rotary embedding in a way that is not read ({prefix}type = {kind!r}); load the bf16 "
        "model and quantise it with jax_int4mm.quantize"
    )


def _factors(files: GgufFiles, name: str, rotated: int) -> np.ndarray:
    tensor = files.tensors[name]
    if tensor.type != "F32" or tensor.shape != (rotated // 2,):
        raise CheckpointError(
            f"tensor {name!r} in {tensor.path} is {tensor.type} {list(tensor.shape)}; it has to be one F32 for each of "
            f"the {rotated // 2} pairs of channels that are rotated"
        )
    return tensor.read().view("<f4")


def _llama3_scaling(factors: np.ndarray, theta: float, source: str) -> dict[str, Any] | None:
    """What makes the factors that are all that the file has of it; None where they are all 1.

    Between the frequencies that are kept and those that are divided by the largest factor, the part that is kept grows
    with the turns within the first context from low_freq_factor to high_freq_factor: a line, whose ends are fitted.
    """
    factor = float(factors.max())
    turns = _LLAMA3_CONTEXT * theta ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    between = (factors > 1) & (factors < factor)
    low, high = 1.0, 4.0
    if between.sum() > 1:
        kept = (1 / factors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(turns[between], kept, 1)
        low, high = (round(float((end - start) / slope), 3) for end in (0, 1))
    with np.errstate(all="ignore"):
        kept = np.clip((turns - low) / (high - low), 0, 1)
        fits = np.allclose(factors, 1 / (kept + (1 - kept) / factor), rtol=1e-4, atol=0)
    if not fits:
        raise CheckpointError(
            f"{source} divides its rotary frequencies by factors that are not those of Llama 3 ({ROPE_FACTORS}), which "
            "no configuration says; load the bf16 model and quantise it with jax_int4mm.quantize"
        )
    if factor == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
