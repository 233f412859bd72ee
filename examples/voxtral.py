"""Voxtral in plain JAX: Whisper's audio encoder, a projector, and the Llama decoder of `decoder.py`.

As Hugging Face's transformers computes it. A linear layer is a matrix `w` of shape [in, out], or an `Int4Weight`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoder import fuse_layer, has_fused_attention
from jax_int4mm import Int4Weight

# Name here -> name in a Hugging Face checkpoint. Hugging Face stores linear weights [out, in]; here they are [in, out].
LINEAR_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "fc1": "fc1",
    "fc2": "fc2",
}
NORM_NAMES = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
LAYER_NORM_EPS = 1e-5
CONVOLUTION_STRIDES = (1, 2)

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """The fields of Voxtral's `config.json` that shape what is computed of audio."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 20
    num_mel_bins: int = 128
    max_source_positions: int = 1500  # After the convolutions, of a chunk.
    text_hidden_size: int = 3072
    audio_token_id: int = 24

    @property
    def frames_per_embedding(self) -> int:
        """Frames that the projector takes together."""
        return self.intermediate_size // self.hidden_size

    @property
    def frames_per_chunk(self) -> int:
        """Columns of the mel spectrogram that the encoder takes at a time."""
        return self.max_source_positions * CONVOLUTION_STRIDES[0] * CONVOLUTION_STRIDES[1]

    @classmethod
    def from_huggingface(cls, fields: Mapping[str, Any]) -> AudioConfig:
        """Reads a parsed `config.json`; a ValueError says which field asks for what is not implemented here."""
        if fields.get("model_type") != "voxtral":
            raise ValueError(f"config.json has model_type = {fields.get('model_type')!r}; implemented is voxtral")
        audio = fields["audio_config"]
        for name, found in (
            ("activation_function", audio.get("activation_function", "gelu")),
            ("projector_hidden_act", fields.get("projector_hidden_act", "gelu")),
        ):
            if found != "gelu":
                raise ValueError(f"config.json has {name} = {found!r}; implemented is gelu")
        if audio.get("scale_embedding"):
            raise ValueError("config.json has scale_embedding = true; implemented is false")
        names = [field.name for field in dataclasses.fields(cls) if field.name in audio]
        return cls(
            **{name: audio[name] for name in names},
            text_hidden_size=fields["text_config"]["hidden_size"],
            audio_token_id=fields.get("audio_token_id", cls.audio_token_id),
        )


def params_from_huggingface(
    tensors: Mapping[str, np.ndarray | Int4Weight],
    config: AudioConfig,
    dtype: jax.typing.DTypeLike,
    linear: Callable[[jax.Array], Any] = lambda w: w,
) -> Params:
    """Builds the encoder's and the projector's parameters from Hugging Face names, one tensor at a time.

    `linear` turns each linear layer of the encoder, [in, out] in `dtype`, into what is kept (for example an
    `Int4Weight`). Those that are `Int4Weight`s already stay as they are.
    """

    def tensor(name: str) -> jax.Array:
        return jnp.asarray(tensors[name]).astype(dtype)

    def matrix(name: str, make: Callable[[jax.Array], Any] = lambda w: w) -> Any:
        value = tensors[f"{name}.weight"]
        return value if isinstance(value, Int4Weight) else make(tensor(f"{name}.weight").T)

    def with_bias(name: str) -> tuple[jax.Array, jax.Array]:
        return tensor(f"{name}.weight"), tensor(f"{name}.bias")

    layers = []
    for index in range(config.num_hidden_layers):
        prefix = f"audio_tower.layers.{index}."
        layer: Params = {name: matrix(f"{prefix}{hf}", linear) for name, hf in LINEAR_NAMES.items()}
        for name, hf in LINEAR_NAMES.items():
            # The key projection has none: it would move the scores of a query all alike.
            bias = jnp.zeros(config.hidden_size, dtype) if name == "k" else tensor(f"{prefix}{hf}.bias")
            layer[f"{name}_bias"] = bias
        layer |= {name: with_bias(f"{prefix}{hf}") for name, hf in NORM_NAMES.items()}
        layers.append(layer)
    return {
        "convolutions": [with_bias(f"audio_tower.conv{number}") for number in (1, 2)],
        "positions": tensor("audio_tower.embed_positions.weight"),
        "layers": layers,
        "norm": with_bias("audio_tower.layer_norm"),
        "projector": [matrix(f"multi_modal_projector.linear_{number}") for number in (1, 2)],
    }


def random_params(
    config: AudioConfig, linear: Callable[[int, int], Any], dense: Callable[..., jax.Array], dtype: Any = jnp.bfloat16
) -> Params:
    """Fused parameters of the model's shapes: `linear(k, n)` makes a linear layer, `dense(*shape)` any other array."""
    hidden, inner = config.hidden_size, config.intermediate_size

    def norm() -> tuple[jax.Array, jax.Array]:
        return jnp.ones(hidden, dtype), jnp.zeros(hidden, dtype)

    shapes = {"qkv": (hidden, 3 * hidden), "o": (hidden, hidden), "fc1": (hidden, inner), "fc2": (inner, hidden)}
    layers = [
        {name: linear(*shape) for name, shape in shapes.items()}
        | {f"{name}_bias": jnp.zeros(n, dtype) for name, (_, n) in shapes.items()}
        | {name: norm() for name in NORM_NAMES}
        for _ in range(config.num_hidden_layers)
    ]
    return {
        "convolutions": [
            (dense(hidden, config.num_mel_bins, 3), jnp.zeros(hidden, dtype)),
            (dense(hidden, hidden, 3), jnp.zeros(hidden, dtype)),
        ],
        "positions": dense(config.max_source_positions, hidden),
        "layers": layers,
        "norm": norm(),
        "projector": [dense(inner, config.text_hidden_size), dense(config.text_hidden_size, config.text_hidden_size)],
    }


def fuse(params: Params) -> Params:
    """The same encoder with the projections of attention as one matrix; see `decoder.fuse`."""
    return params | {"layers": [fuse_layer(layer, {"qkv": ("q", "k", "v")}) for layer in params["layers"]]}


_gelu = functools.partial(jax.nn.gelu, approximate=False)


def _layer_norm(x: jax.Array, weight_and_bias: tuple[jax.Array, jax.Array]) -> jax.Array:
    weight, bias = (p.astype(jnp.float32) for p in weight_and_bias)
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normalised = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)
    return (normalised * weight + bias).astype(x.dtype)


def _layer_forward(layer: Params, x: jax.Array, heads: int) -> jax.Array:
    """One layer of the encoder on x [chunks, t, hidden]."""
    h = _layer_norm(x, layer["attention_norm"])
    if "qkv" in layer:
        projected = jnp.split(h @ layer["qkv"] + layer["qkv_bias"], 3, axis=-1)
    else:
        projected = [h @ layer[name] + layer[f"{name}_bias"] for name in "qkv"]
    q, k, v = (y.reshape(*y.shape[:2], heads, -1) for y in projected)
    attended = jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if has_fused_attention(q) else "xla")
    x = x + (attended.reshape(x.shape) @ layer["o"] + layer["o_bias"])
    h = _layer_norm(x, layer["mlp_norm"])
    return x + (_gelu(h @ layer["fc1"] + layer["fc1_bias"]) @ layer["fc2"] + layer["fc2_bias"])


def encode_audio(params: Params, features: jax.Array, config: AudioConfig) -> jax.Array:
    """Embeddings for the decoder, [chunks * t, text_hidden_size], of log-mel features [chunks, num_mel_bins, frames].

    t is max_source_positions / frames_per_embedding, and frames are `config.frames_per_chunk`.
    """
    x = features.astype(params["positions"].dtype)
    for (kernel, bias), stride in zip(params["convolutions"], CONVOLUTION_STRIDES, strict=True):
        y = jax.lax.conv_general_dilated(x, kernel, (stride,), [(1, 1)], dimension_numbers=("NCH", "OIH", "NCH"))
        x = _gelu(y + bias[:, None])
    x = x.swapaxes(1, 2) + params["positions"]
    for layer in params["layers"]:
        x = _layer_forward(layer, x, config.num_attention_heads)
    x = _layer_norm(x, params["norm"]).reshape(-1, config.intermediate_size)
    first, second = params["projector"]
    return _gelu(x @ first) @ second


def merge_audio(embeddings: jax.Array, tokens: jax.Array, audio: jax.Array, config: AudioConfig) -> jax.Array:
    """Embeddings [1, t, hidden] of tokens [1, t] with those of audio [n, hidden] where the token stands for audio.

    There are n such tokens.
    """
    is_audio = tokens[0] == config.audio_token_id
    number = jnp.clip(jnp.cumsum(is_audio) - 1, 0)
    return jnp.where(is_audio[:, None], audio[number].astype(embeddings.dtype), embeddings[0])[None]
