"""What shapes a decoder's computation, read from the `config.json` of a Hugging Face checkpoint.

Llama 2 and 3, Mistral, Qwen 2 (and 2.5), Qwen 3, and the text models Gemma 2 and Gemma 3.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

# What a family computes where its config.json has no say.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"qk_norm": True},
    "gemma2": {"unit_offset_norms": True, "output_norms": True, "scaled_embeddings": True},
    "gemma3_text": {"unit_offset_norms": True, "output_norms": True, "scaled_embeddings": True, "qk_norm": True},
}
FAMILIES = tuple(_FAMILIES)
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, and how frequencies are scaled for contexts longer than those of the training.

    `factor` stretches every wavelength ("linear"), or with `low_freq_factor` only the long ones (Llama 3.1).
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position turns each pair of a head's channels by: f32 [head_dim / 2]."""
        inverse = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.low_freq_factor is None or self.high_freq_factor is None:
            return (inverse / self.factor).astype(np.float32)
        turns = (self.original_max_position_embeddings or 0) * inverse / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return (keep * inverse + (1 - keep) * inverse / self.factor).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face `config.json` that shape the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    model_type: str = "llama"
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    rope: Rope = Rope()
    # Of layers with a window, which is None where they are like the others.
    local_rope: Rope | None = None
    # Positions that each layer attends to, its own included; None for all.
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def qk_norm(self) -> bool:
        """Whether each head's queries and keys are normalised before they are rotated."""
        return _FAMILIES[self.model_type].get("qk_norm", False)

    @property
    def unit_offset_norms(self) -> bool:
        """Whether a norm multiplies by 1 + weight."""
        return _FAMILIES[self.model_type].get("unit_offset_norms", False)

    @property
    def output_norms(self) -> bool:
        """Whether the outputs of attention and MLP are normalised too."""
        return _FAMILIES[self.model_type].get("output_norms", False)

    @property
    def scaled_embeddings(self) -> bool:
        """Whether embeddings are multiplied by sqrt(hidden_size)."""
        return _FAMILIES[self.model_type].get("scaled_embeddings", False)

    def window(self, layer: int) -> int | None:
        """Positions that a layer attends to, its own included; None for all."""
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> Rope:
        """The rotary embedding of a layer."""
        return self.local_rope if self.local_rope is not None and self.window(layer) is not None else self.rope

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> Config:
        """Reads a parsed `config.json`; a ValueError says which field asks for what is not implemented here."""
        if "text_config" in fields and fields.get("model_type") in ("gemma3", "voxtral"):
            fields = {"eos_token_id": fields.get("eos_token_id"), **fields["text_config"]}
        family = fields.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"config.json has model_type = {family!r}; implemented are {', '.join(FAMILIES)}")
        activation = fields.get("hidden_activation") or fields.get("hidden_act") or "silu"
        if activation not in ACTIVATIONS:
            raise ValueError(f"config.json asks for the activation {activation!r}; implemented are {ACTIVATIONS}")
        if fields.get("use_bidirectional_attention"):
            raise ValueError("config.json asks for bidirectional attention; implemented is causal attention only")
        heads, hidden, layers = (
            fields["num_attention_heads"],
            fields["hidden_size"],
            fields["num_hidden_layers"],
        )
        eos = fields.get("eos_token_id")
        rope, local_rope = _ropes(fields, family)
        query_scalar = fields.get("query_pre_attn_scalar") if family in ("gemma2", "gemma3_text") else None
        bias = bool(fields.get("attention_bias", False))
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=hidden,
            intermediate_size=fields["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or hidden // heads,
            max_position_embeddings=fields["max_position_embeddings"],
            rms_norm_eps=fields["rms_norm_eps"],
            tie_word_embeddings=fields.get("tie_word_embeddings", family.startswith("gemma")),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            model_type=family,
            activation=activation,
            qkv_bias=bias or family == "qwen2",
            output_bias=bias,
            mlp_bias=bool(fields.get("mlp_bias", False)),
            rope=rope,
            local_rope=local_rope,
            windows=_windows(fields, family, layers),
            attention_scale=None if query_scalar is None else query_scalar**-0.5,
            attention_softcap=fields.get("attn_logit_softcapping"),
            logit_softcap=fields.get("final_logit_softcapping"),
        )

    def to_huggingface(self) -> dict[str, Any]:
        """The `config.json` of a Llama model without rope scaling, in the spelling that every transformers reads."""
        plain = dataclasses.replace(
            self,
            model_type="llama",
            activation="silu",
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            rope=Rope(self.rope.theta),
            local_rope=None,
            windows=(),
            attention_scale=None,
            attention_softcap=None,
            logit_softcap=None,
        )
        if plain != self:
            raise ValueError("to_huggingface writes configurations of Llama models without rope scaling only")
        eos = self.eos_token_ids
        same = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": eos[0] if eos else None,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            "rope_theta": self.rope.theta,
            **{name: getattr(self, name) for name in same},
        }


def _ropes(fields: Mapping[str, Any], family: str) -> tuple[Rope, Rope | None]:
    # transformers 5 keeps theta and the scaling in `rope_parameters`, of Gemma 3 for each kind of layer; older releases
    # in `rope_theta` and `rope_scaling`.
    parameters = fields.get("rope_parameters")
    if parameters is not None and "full_attention" in parameters:
        return _rope(parameters["full_attention"], fields), _rope(parameters["sliding_attention"], fields)
    rope = _rope(parameters or fields.get("rope_scaling") or {}, fields)
    if family != "gemma3_text":
        return rope, None
    return rope, Rope(fields.get("rope_local_base_freq", 10000.0))


def _rope(parameters: Mapping[str, Any], fields: Mapping[str, Any]) -> Rope:
    default = 1e6 if fields.get("model_type") == "gemma3_text" else 10000.0
    theta = parameters.get("rope_theta", fields.get("rope_theta", default))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json asks for a partial rotary embedding; implemented is that of whole heads")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, parameters["factor"])
    if kind == "llama3":
        scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return Rope(theta, **{name: parameters[name] for name in scaling})
    raise ValueError(f"config.json asks for the rope type {kind!r}; implemented are default, linear and llama3")


def _windows(fields: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    window = fields.get("sliding_window")
    if window is None or family == "llama" or (family.startswith("qwen") and not fields.get("use_sliding_window")):
        return ()
    kinds = fields.get("layer_types")
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if family == "gemma2":
        sliding = [layer % 2 == 0 for layer in range(layers)]
    elif family == "gemma3_text":
        period = fields.get("sliding_window_pattern") or 6
        sliding = [bool((layer + 1) % period) for layer in range(layers)]
    elif family.startswith("qwen"):
        sliding = [layer >= fields["max_window_layers"] for layer in range(layers)]
    else:
        sliding = [True] * layers
    return tuple(window if slides else None for slides in sliding)
