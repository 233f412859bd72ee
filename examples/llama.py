"""A Llama decoder in plain JAX: the model behind `generate.py` and `train_byte_model.py`.

Parameters are a pytree of arrays; a linear layer is a matrix `w` of shape [in, out] and is applied as `x @ w`.
An `Int4Weight` in its place needs no change here: that is the whole integration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_int4mm import Int4Weight

# Name here -> name in a Hugging Face checkpoint. Hugging Face stores linear weights [out, in]; here they are [in, out].
LINEAR_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORM_NAMES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

Params = dict[str, Any]
Cache = list[dict[str, jax.Array]]


# --- configuration -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Frequency scaling of Llama 3.1: long wavelengths are stretched by `factor`, short ones are kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a Hugging Face Llama `config.json` that shape the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> Config:
        """Reads a parsed `config.json`; a ValueError says which field asks for what is not implemented here."""
        implemented = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for name, value in implemented.items():
            found = fields.get(name, value)
            if found != value:
                raise ValueError(f"config.json has {name} = {found!r}; this Llama decoder implements {value!r} only")
        theta, scaling = _rope_from_huggingface(fields)
        heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
        eos = fields.get("eos_token_id")
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=hidden,
            intermediate_size=fields["intermediate_size"],
            num_hidden_layers=fields["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or hidden // heads,
            max_position_embeddings=fields["max_position_embeddings"],
            rms_norm_eps=fields["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    def to_huggingface(self) -> dict[str, Any]:
        """The `config.json` of this model, in the spelling that every release of transformers reads."""
        if self.rope_scaling is not None:
            raise ValueError("to_huggingface writes configurations without rope scaling only; clear rope_scaling")
        shared = dataclasses.asdict(self)
        del shared["rope_scaling"]
        eos = shared.pop("eos_token_ids")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": eos[0] if eos else None,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
            **shared,
        }


def _rope_from_huggingface(fields: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    # transformers 5 keeps theta and the scaling in `rope_parameters`; older releases in `rope_theta`, `rope_scaling`.
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json asks for rope type {kind!r}; this Llama decoder implements default and llama3")
    return theta, Llama3Rope(**{field.name: rope[field.name] for field in dataclasses.fields(Llama3Rope)})


# --- parameters --------------------------------------------------------------------------------------------------


def params_from_huggingface(
    tensors: Mapping[str, np.ndarray | Int4Weight],
    config: Config,
    dtype: jax.typing.DTypeLike,
    linear: Callable[[jax.Array], Any] = lambda w: w,
    lm_head: Callable[[jax.Array], Any] = lambda w: w,
) -> Params:
    """Builds the parameter pytree from Hugging Face names, one tensor at a time.

    `linear` turns each linear layer of the decoder, [in, out] in `dtype`, into what is kept (for example an
    `Int4Weight`); `lm_head` does the same for the output projection, [hidden, vocabulary]. Those that are
    `Int4Weight`s already stay as they are.
    """

    def tensor(name: str) -> jax.Array:
        value = tensors[name]
        return (value.dequantize().T if isinstance(value, Int4Weight) else jnp.asarray(value)).astype(dtype)

    def matrix(name: str, make: Callable[[jax.Array], Any]) -> Any:
        value = tensors[name]
        return value if isinstance(value, Int4Weight) else make(tensor(name).T)

    layers = []
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer: Params = {name: matrix(f"{prefix}{hf}.weight", linear) for name, hf in LINEAR_NAMES.items()}
        layer |= {name: tensor(f"{prefix}{hf}.weight") for name, hf in NORM_NAMES.items()}
        layers.append(layer)
    embedding = tensor("model.embed_tokens.weight")
    return {
        "embedding": embedding,
        "layers": layers,
        "norm": tensor("model.norm.weight"),
        "lm_head": matrix("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight", lm_head),
    }


# --- the forward pass --------------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Scales x by 1 / rms(x) over the last axis, in f32, and by weight."""
    wide = x.astype(jnp.float32)
    normalised = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * normalised.astype(x.dtype)


def rope_frequencies(config: Config) -> np.ndarray:
    """Radians a position turns each pair of a head's channels by: f32 [head_dim / 2]."""
    inverse = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * inverse / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
        inverse = keep * inverse + (1 - keep) * inverse / scaling.factor
    return inverse.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotary position embedding of x [batch, t, heads, head_dim]; channel i pairs with channel i + head_dim / 2."""
    angles = positions[:, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def init_cache(config: Config, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Keys and values of `length` positions for every layer, [batch, length, kv_heads, head_dim], all zero."""
    shape = (batch, length, config.num_key_value_heads, config.head_dim)
    return [{"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(config.num_hidden_layers)]


def layer_forward(
    layer: Params,
    x: jax.Array,
    config: Config,
    cached: dict[str, jax.Array] | None = None,
    start: jax.typing.ArrayLike = 0,
    dropout: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer of `forward` on hidden states x [batch, t, hidden], and the keys and values that it attended to."""
    batch, t, _ = x.shape
    frequencies = rope_frequencies(config)
    positions = jnp.arange(t) + start
    h = rms_norm(x, layer["attention_norm"], config.rms_norm_eps)
    q = rotate((h @ layer["q"]).reshape(batch, t, -1, config.head_dim), positions, frequencies)
    k = rotate((h @ layer["k"]).reshape(batch, t, -1, config.head_dim), positions, frequencies)
    v = (h @ layer["v"]).reshape(batch, t, -1, config.head_dim)
    if cached is None:
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    else:
        k = jax.lax.dynamic_update_slice(cached["k"], k, (0, start, 0, 0))
        v = jax.lax.dynamic_update_slice(cached["v"], v, (0, start, 0, 0))
        visible = jnp.arange(k.shape[1]) <= positions[:, None]
        attended = jax.nn.dot_product_attention(q, k, v, mask=visible[None, None])
    x = x + dropout(attended.reshape(batch, t, -1) @ layer["o"])
    h = rms_norm(x, layer["mlp_norm"], config.rms_norm_eps)
    x = x + dropout((jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"])
    return x, {"k": k, "v": v}


def forward(
    params: Params,
    tokens: jax.Array,
    config: Config,
    cache: Cache | None = None,
    start: jax.typing.ArrayLike = 0,
    dropout: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> tuple[jax.Array, Cache]:
    """Hidden states after the last norm, [batch, t, hidden], of int32 tokens [batch, t] from position `start` on.

    With a cache the new keys and values are written at `start`, every cached position up to a token's own is attended
    to, and the updated cache is returned. Without one the tokens are the whole sequence, and the cache is empty.
    `dropout` is applied to the embeddings and to the output of every residual branch (training only).
    """
    x = dropout(params["embedding"][tokens])
    new_cache: Cache = []
    for index, layer in enumerate(params["layers"]):
        x, attended = layer_forward(layer, x, config, None if cache is None else cache[index], start, dropout)
        if cache is not None:
            new_cache.append(attended)
    return rms_norm(x, params["norm"], config.rms_norm_eps), new_cache


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """f32 scores [..., vocabulary] of the next token from hidden states [..., hidden]."""
    return (hidden @ params["lm_head"]).astype(jnp.float32)


def negative_log_likelihood(params: Params, tokens: jax.Array, config: Config) -> jax.Array:
    """Nats of each token after the first, f32 [batch, t - 1], given those before it in its row of tokens [batch, t]."""
    hidden, _ = forward(params, tokens[:, :-1], config)
    scores = jax.nn.log_softmax(logits(params, hidden))
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
