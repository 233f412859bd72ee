"""Decoders in plain JAX: the model behind `generate.py`, `transcribe.py` and `train_byte_model.py`.

Llama, Mistral, Qwen 2 and 3 and Gemma 2 and 3 as Hugging Face's transformers computes them. Parameters are a pytree of
arrays; a linear layer is a matrix `w` of shape [in, out] and is applied as `x @ w`. An `Int4Weight` in its place needs
no change here: that is the whole integration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import decode_kernels
import jax_int4mm as i4
from decoder_config import Config
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
# Linear layers with the same input, which `fuse` makes one matrix.
FUSED_NAMES = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
NORM_NAMES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# Of models that normalise what attention and MLP give, too.
OUTPUT_NORM_NAMES = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
QK_NORM_NAMES = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
# Where a multimodal checkpoint keeps its text model.
TEXT_PREFIXES = ("", "language_model.", "model.language_model.")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

Params = dict[str, Any]
Cache = list[dict[str, jax.Array]]


# --- parameters --------------------------------------------------------------------------------------------------


def params_from_huggingface(
    tensors: Mapping[str, np.ndarray | Int4Weight],
    config: Config,
    dtype: jax.typing.DTypeLike,
    linear: Callable[[jax.Array], Any] = lambda w: w,
    lm_head: Callable[[jax.Array], Any] | None = None,
) -> Params:
    """Builds the parameter pytree from Hugging Face names, one tensor at a time.

    `linear` turns each linear layer of the decoder, [in, out] in `dtype`, into what is kept (for example an
    `Int4Weight`); `lm_head` does the same for the output projection, [hidden, vocabulary]. Those that are
    `Int4Weight`s already stay as they are, an embedding too. The output projection of a model that ties it to its
    embeddings is `None`, unless `lm_head` is given.
    """
    prefix = text_prefix(tensors)

    def tensor(name: str) -> jax.Array:
        value = tensors[f"{prefix}{name}"]
        return (value.dequantize().T if isinstance(value, Int4Weight) else jnp.asarray(value)).astype(dtype)

    def matrix(name: str, make: Callable[[jax.Array], Any]) -> Any:
        value = tensors[f"{prefix}{name}"]
        return value if isinstance(value, Int4Weight) else make(tensor(name).T)

    biased = {"q": config.qkv_bias, "k": config.qkv_bias, "v": config.qkv_bias, "o": config.output_bias}
    norms = OUTPUT_NORM_NAMES if config.output_norms else NORM_NAMES
    if config.qk_norm:
        norms = norms | QK_NORM_NAMES
    layers = []
    for index in range(config.num_hidden_layers):
        of_layer = f"model.layers.{index}."
        layer: Params = {name: matrix(f"{of_layer}{hf}.weight", linear) for name, hf in LINEAR_NAMES.items()}
        layer |= {name: tensor(f"{of_layer}{hf}.weight") for name, hf in norms.items()}
        layer |= {
            f"{name}_bias": tensor(f"{of_layer}{hf}.bias")
            for name, hf in LINEAR_NAMES.items()
            if biased.get(name, config.mlp_bias)
        }
        layers.append(layer)
    embedding = tensors[f"{prefix}model.embed_tokens.weight"]
    if not isinstance(embedding, Int4Weight):
        embedding = tensor("model.embed_tokens.weight")
    head = None
    if not config.tie_word_embeddings:
        head = matrix("lm_head.weight", lm_head or (lambda w: w))
    elif lm_head is not None and not isinstance(embedding, Int4Weight):
        head = lm_head(embedding.T)
    return {"embedding": embedding, "layers": layers, "norm": tensor("model.norm.weight"), "lm_head": head}


def text_prefix(tensors: Mapping[str, Any]) -> str:
    """What a checkpoint's names of the text model begin with, before "model."."""
    for prefix in TEXT_PREFIXES:
        if f"{prefix}model.embed_tokens.weight" in tensors:
            return prefix
    raise ValueError("the checkpoint has no model.embed_tokens.weight: it is of no decoder in Hugging Face's names")


def fuse(params: Params) -> Params:
    """The same model with linear layers of the same input as one matrix, so that each product reads x once.

    Columns stand side by side and none changes. Layers stay apart where their `Int4Weight`s are not alike.
    """
    return params | {"layers": [fuse_layer(layer, FUSED_NAMES) for layer in params["layers"]]}


def fuse_layer(layer: Params, fused_names: Mapping[str, Sequence[str]]) -> Params:
    """A layer with each group of its linear layers, and their biases, as one: the new name -> names of the parts."""
    for whole, parts in fused_names.items():
        weight = _side_by_side([layer[name] for name in parts])
        if weight is None:
            continue
        biases = [layer[f"{name}_bias"] for name in parts if f"{name}_bias" in layer]
        dropped = {*parts, *(f"{name}_bias" for name in parts)}
        layer = {name: value for name, value in layer.items() if name not in dropped} | {whole: weight}
        if biases:
            layer[f"{whole}_bias"] = jnp.concatenate(biases)
    return layer


def _side_by_side(weights: Sequence[Any]) -> Any:
    if not any(isinstance(weight, Int4Weight) for weight in weights):
        return jnp.concatenate(weights, axis=1)
    try:
        return i4.concatenate(weights) if all(isinstance(weight, Int4Weight) for weight in weights) else None
    except ValueError:
        return None


# --- the forward pass --------------------------------------------------------------------------------------------


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, unit_offset: bool = False) -> jax.Array:
    """Scales x by 1 / rms(x) over the last axis, in f32, and by weight, or by 1 + weight in f32."""
    wide = x.astype(jnp.float32)
    normalised = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if unit_offset:
        return (normalised * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * normalised.astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotary position embedding of x [batch, t, heads, head_dim] at positions [t] or [batch, t].

    Channel i pairs with channel i + head_dim / 2.
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def init_cache(config: Config, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Keys and values of `length` positions for every layer, [batch, length, kv_heads, head_dim], all zero."""
    shape = (batch, length, config.num_key_value_heads, config.head_dim)
    return [{"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(config.num_hidden_layers)]


def has_fused_attention(q: jax.Array) -> bool:
    """Whether cuDNN computes attention of queries of this dtype and head size, on the default device."""
    return jax.default_backend() == "gpu" and q.dtype.itemsize == 2 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def attend(q: jax.Array, k: jax.Array, v: jax.Array, config: Config, window: int | None) -> jax.Array:
    """Causal attention of q [batch, t, heads, head_dim] to k, v [batch, t, kv_heads, head_dim], their own positions."""
    if config.attention_softcap is not None:
        return _attend_masked(q, k, v, jnp.arange(q.shape[1]), config, window)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        scale=config.attention_scale,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if has_fused_attention(q) else "xla",
    )


def attend_cached(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, config: Config, window: int | None
) -> jax.Array:
    """Attention of q [batch, t, heads, head_dim] at positions [t] or [batch, t] to k, v [batch, s, kv_heads, head_dim].

    A position sees those up to its own.
    """
    if q.shape[1] != 1 or window is not None or config.attention_softcap is not None or not has_fused_attention(q):
        return _attend_masked(q, k, v, positions, config, window)
    lengths = jnp.broadcast_to(positions[..., 0] + 1, q.shape[:1])
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=config.attention_scale,
        query_seq_lengths=jnp.ones_like(lengths),
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def _attend_masked(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, config: Config, window: int | None
) -> jax.Array:
    batch, t, heads, head_dim = q.shape
    length, kv_heads = k.shape[1:3]
    scale = config.attention_scale or head_dim**-0.5
    grouped = q.reshape(batch, t, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btngh,bsnh->bngts", grouped, k, preferred_element_type=jnp.float32) * scale
    if config.attention_softcap is not None:
        scores = config.attention_softcap * jnp.tanh(scores / config.attention_softcap)
    distance = positions[..., :, None] - jnp.arange(length)
    visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    visible = visible.reshape(-1, 1, 1, t, length)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(q.dtype)
    return jnp.einsum("bngts,bsnh->btngh", weights, v).reshape(batch, t, heads, head_dim)


def _linear(layer: Params, name: str, x: jax.Array) -> jax.Array:
    y = x @ layer[name]
    bias = layer.get(f"{name}_bias")
    return y if bias is None else y + bias


def _linears(layer: Params, whole: str, x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """The results of the linear layers that FUSED_NAMES lists under `whole`, fused or not, of the sizes given."""
    if whole not in layer:
        return [_linear(layer, name, x) for name in FUSED_NAMES[whole]]
    return jnp.split(_linear(layer, whole, x), np.cumsum(sizes)[:-1], axis=-1)


def _updated(cached: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """The cache [batch, s, kv_heads, head_dim] with new [batch, t, kv_heads, head_dim] at start, [] or [batch]."""
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice(cached, new, (0, start, 0, 0))
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at, 0, 0)))(cached, new, start)


def layer_forward(
    layer: Params,
    x: jax.Array,
    config: Config,
    index: int = 0,
    cached: dict[str, jax.Array] | None = None,
    start: jax.typing.ArrayLike = 0,
    dropout: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Layer number `index` of `forward` on hidden states x [batch, t, hidden], and its cache with the new positions."""
    batch, t, _ = x.shape
    norm = functools.partial(rms_norm, eps=config.rms_norm_eps, unit_offset=config.unit_offset_norms)
    begin = jnp.asarray(start, jnp.int32)
    positions = begin[..., None] + jnp.arange(t)
    frequencies = config.rope_of(index).frequencies(config.head_dim)
    window = config.window(index)

    h = norm(x, layer["attention_norm"])
    widths = [config.num_attention_heads * config.head_dim] + 2 * [config.num_key_value_heads * config.head_dim]
    q, k, v = (y.reshape(batch, t, -1, config.head_dim) for y in _linears(layer, "qkv", h, widths))
    if config.qk_norm:
        q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
    q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
    new_cache = cached
    if cached is not None:
        new_cache = {"k": _updated(cached["k"], k, begin), "v": _updated(cached["v"], v, begin)}
    # What begins at the first position attends to itself alone, whatever the cache has room for.
    if new_cache is None or (isinstance(start, int) and start == 0):
        attended = attend(q, k, v, config, window)
    else:
        attended = attend_cached(q, new_cache["k"], new_cache["v"], positions, config, window)
    y = _linear(layer, "o", attended.reshape(batch, t, -1))
    if config.output_norms:
        y = norm(y, layer["attention_output_norm"])
    x = x + dropout(y)

    h = norm(x, layer["mlp_norm"])
    gate, up = _linears(layer, "gate_up", h, [config.intermediate_size] * 2)
    y = _linear(layer, "down", ACTIVATIONS[config.activation](gate) * up)
    if config.output_norms:
        y = norm(y, layer["mlp_output_norm"])
    return x + dropout(y), new_cache


def embed(params: Params, tokens: jax.Array, config: Config) -> jax.Array:
    """Embeddings [batch, t, hidden] of int32 tokens [batch, t]."""
    table = params["embedding"]
    x = table.columns(tokens) if isinstance(table, Int4Weight) else table[tokens]
    return x * jnp.asarray(config.hidden_size**0.5, x.dtype) if config.scaled_embeddings else x


def forward_embedded(
    params: Params,
    x: jax.Array,
    config: Config,
    cache: Cache | None = None,
    start: jax.typing.ArrayLike = 0,
    dropout: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> tuple[jax.Array, Cache]:
    """`forward` of embeddings x [batch, t, hidden]."""
    is_step = cache is not None and x.shape[1] == 1 and not isinstance(start, int)
    if is_step and decode_kernels.serve(x.dtype, config.head_dim):
        return _forward_step(params, x, config, cache, start)
    new_cache: Cache = []
    for index, layer in enumerate(params["layers"]):
        x, cached = layer_forward(layer, x, config, index, None if cache is None else cache[index], start, dropout)
        if cached is not None:
            new_cache.append(cached)
    return rms_norm(x, params["norm"], config.rms_norm_eps, config.unit_offset_norms), new_cache


def forward(
    params: Params,
    tokens: jax.Array,
    config: Config,
    cache: Cache | None = None,
    start: jax.typing.ArrayLike = 0,
    dropout: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> tuple[jax.Array, Cache]:
    """Hidden states after the last norm, [batch, t, hidden], of int32 tokens [batch, t] from position `start` on.

    With a cache the new keys and values are written at `start`, one position for all rows or an int32 [batch], every
    cached position up to a token's own is attended to, and the updated cache is returned. Where `start` is the Python
    integer 0 the cache is written and not read. Without a cache the tokens are the whole sequence, and the one returned
    is empty. `dropout` is applied to the embeddings and to the output of every residual branch (training only).
    """
    return forward_embedded(params, dropout(embed(params, tokens, config)), config, cache, start, dropout)


def _forward_step(
    params: Params, x: jax.Array, config: Config, cache: Cache, start: jax.typing.ArrayLike
) -> tuple[jax.Array, Cache]:
    """`forward_embedded` of embeddings x [batch, 1, hidden] on the kernels of `decode_kernels.py`."""
    batch = x.shape[0]
    position = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))
    norms = {"eps": config.rms_norm_eps, "unit_offset": config.unit_offset_norms}
    # Alike in all layers of the same rotary embedding.
    angles = {
        rope: position[:, None].astype(jnp.float32) * rope.frequencies(config.head_dim)
        for rope in {config.rope_of(index) for index in range(config.num_hidden_layers)}
    }
    cos_sin = {rope: jnp.stack([jnp.cos(angle), jnp.sin(angle)]) for rope, angle in angles.items()}

    x = x[:, 0]
    h = rms_norm(x, params["layers"][0]["attention_norm"], config.rms_norm_eps, config.unit_offset_norms)
    new_cache: Cache = []
    for index, layer in enumerate(params["layers"]):
        qkv = _linear(layer, "qkv", h) if "qkv" in layer else jnp.concatenate(_linears(layer, "qkv", h, ()), axis=-1)
        attended, k, v = decode_kernels.attend_step(
            qkv,
            cache[index]["k"],
            cache[index]["v"],
            position,
            cos_sin[config.rope_of(index)],
            (layer["q_norm"], layer["k_norm"]) if config.qk_norm else None,
            heads=config.num_attention_heads,
            scale=config.attention_scale,
            window=config.window(index),
            softcap=config.attention_softcap,
            **norms,
        )
        new_cache.append({"k": k, "v": v})
        y = _linear(layer, "o", attended)
        x, h = decode_kernels.add_norm(x, y, layer["mlp_norm"], layer.get("attention_output_norm"), **norms)
        gate, up = _linears(layer, "gate_up", h, [config.intermediate_size] * 2)
        y = _linear(layer, "down", ACTIVATIONS[config.activation](gate) * up)
        is_last = index + 1 == len(params["layers"])
        following = params["norm"] if is_last else params["layers"][index + 1]["attention_norm"]
        x, h = decode_kernels.add_norm(x, y, following, layer.get("mlp_output_norm"), **norms)
    return h[:, None], new_cache


def output_projection(params: Params) -> Any:
    """The matrix [hidden, vocabulary] that scores are computed with: of a tied model its embeddings."""
    if params["lm_head"] is not None:
        return params["lm_head"]
    table = params["embedding"]
    return table if isinstance(table, Int4Weight) else table.T


def logits(params: Params, hidden: jax.Array, config: Config) -> jax.Array:
    """f32 scores [..., vocabulary] of the next token from hidden states [..., hidden]."""
    scores = (hidden @ output_projection(params)).astype(jnp.float32)
    cap = config.logit_softcap
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def negative_log_likelihood(params: Params, tokens: jax.Array, config: Config) -> jax.Array:
    """Nats of each token after the first, f32 [batch, t - 1], given those before it in its row of tokens [batch, t]."""
    hidden, _ = forward(params, tokens[:, :-1], config)
    scores = jax.nn.log_softmax(logits(params, hidden, config))
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
