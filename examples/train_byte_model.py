"""Trains the byte-level Llama that `generate.py` runs by default, on text that every Python installation has.

    python examples/train_byte_model.py --output examples/byte_model --minutes 4.5

Of the corpus (`corpus.py`) 1 document in 32 is held out and touched once, at the end; 1 in 32 chooses the parameters
that are kept.

The model has to survive rounding to 4 bits. During training every decoder weight therefore carries fresh uniform noise
of one quantisation step (the range of its group of 64 inputs / 15). That is the error of any 4-bit rounding and not the
grid of one of them, so the model favours no quantiser.

Writes, atomically, a Hugging Face Llama directory: `config.json`, `model.safetensors` (bf16), `heldout.txt` (a sample
of the held-out documents, so that figures do not depend on the reader's Python) and `training.json` (what was run and
the held-out bits per byte of f32, bf16 and simulated int4 weights). Needs jax, optax, safetensors and ml_dtypes.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import platform
import shutil
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from corpus import SEPARATOR, documents, joined, split
from decoder import LINEAR_NAMES, NORM_NAMES, Params, forward, logits, negative_log_likelihood
from decoder_config import Config

GROUP_SIZE = 64  # of the 4-bit rounding that the model is made to survive
HELDOUT_SAMPLE_BYTES = 96 * 1024
SAMPLE_PIECE_BYTES = 12 * 1024


# --- held-out text -----------------------------------------------------------------------------------------------


def heldout_sample(texts: list[bytes]) -> str:
    """A piece from the middle of every held-out document in turn, whole lines, until the sample is full."""
    sample = ""
    for text in texts:
        begin = max(0, (len(text) - SAMPLE_PIECE_BYTES) // 2)
        piece = text[begin : begin + SAMPLE_PIECE_BYTES].decode(errors="ignore")
        sample += piece[piece.find("\n") + 1 : piece.rfind("\n") + 1]
        if len(sample.encode()) >= HELDOUT_SAMPLE_BYTES:
            break
    return sample


# --- parameters --------------------------------------------------------------------------------------------------


def init_params(key: jax.Array, config: Config) -> Params:
    """f32 parameters with tied embeddings: normal weights, the outputs of residual branches scaled down by depth."""
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    shapes = {
        "q": (hidden, config.num_attention_heads * d),
        "k": (hidden, config.num_key_value_heads * d),
        "v": (hidden, config.num_key_value_heads * d),
        "o": (config.num_attention_heads * d, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "down": (inner, hidden),
    }
    residual_gain = dict.fromkeys(("o", "down"), 1 / math.sqrt(2 * config.num_hidden_layers))
    key, embedding_key = jax.random.split(key)
    layers = []
    for layer_key in jax.random.split(key, config.num_hidden_layers):
        layer: Params = {
            name: jax.random.normal(weight_key, shape) * (residual_gain.get(name, 1.0) / math.sqrt(shape[0]))
            for weight_key, (name, shape) in zip(jax.random.split(layer_key, len(shapes)), shapes.items(), strict=True)
        }
        layers.append(layer | {name: jnp.ones(hidden) for name in NORM_NAMES})
    embedding = jax.random.normal(embedding_key, (config.vocab_size, hidden)) / math.sqrt(hidden)
    return {"embedding": embedding, "layers": layers, "norm": jnp.ones(hidden)}


def tied(params: Params) -> Params:
    """The parameters that `forward` and `logits` take: the embeddings are the output projection too."""
    return params | {"lm_head": None}


def cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    """Every parameter in dtype."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def map_linears(function: Any, params: Params) -> Params:
    """Applies `function(weight, index)` to each linear layer of the decoder."""
    layers = []
    for number, layer in enumerate(params["layers"]):
        changed = {name: function(layer[name], number * len(LINEAR_NAMES) + i) for i, name in enumerate(LINEAR_NAMES)}
        layers.append(layer | changed)
    return params | {"layers": layers}


def grouped(w: jax.Array) -> jax.Array:
    """A weight [in, out] as [groups, GROUP_SIZE, out]."""
    return w.reshape(w.shape[0] // GROUP_SIZE, GROUP_SIZE, w.shape[1])


def with_rounding_noise(key: jax.Array, params: Params) -> Params:
    """Adds to each decoder weight uniform noise of one 4-bit quantisation step of its group."""

    def noisy(w: jax.Array, index: int) -> jax.Array:
        step = jax.lax.stop_gradient(jnp.ptp(grouped(w), axis=1, keepdims=True)) / 15
        noise = jax.random.uniform(jax.random.fold_in(key, index), w.shape, minval=-0.5, maxval=0.5)
        return w + (grouped(noise) * step).reshape(w.shape)

    return map_linears(noisy, params)


def rounded_to_int4(params: Params) -> Params:
    """Each decoder weight rounded to 4 bits per group, scale and zero in bf16, as `quantize(method="rtn")` does."""

    def stored(a: jax.Array) -> jax.Array:
        return a.astype(jnp.bfloat16).astype(jnp.float32)

    def rounded(w: jax.Array, _: int) -> jax.Array:
        groups = grouped(w.astype(jnp.float32))
        low = jnp.min(groups, axis=1, keepdims=True)
        scale = stored(jnp.maximum((jnp.max(groups, axis=1, keepdims=True) - low) / 15, 1e-6))
        zero = stored(low + 8 * scale)
        q = jnp.clip(jnp.round((groups - zero) / scale), -8, 7)
        return (q * scale + zero).reshape(w.shape).astype(w.dtype)

    return map_linears(rounded, params)


# --- training ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config",))
def _mean_nats(params: Params, rows: jax.Array, config: Config) -> jax.Array:
    return jnp.mean(negative_log_likelihood(params, rows, config))


def bits_per_byte(params: Params, text: np.ndarray, config: Config, batch: int = 32) -> float:
    """Bits per byte of text in consecutive windows of the model's context; the last, incomplete batch is left out."""
    window = min(config.max_position_embeddings, (len(text) - 1) // batch)
    starts = np.arange((len(text) - 1) // window)[: (len(text) - 1) // window // batch * batch] * window
    rows = text[starts[:, None] + np.arange(window + 1)].astype(np.int32)
    nats = [_mean_nats(params, rows[i : i + batch], config) for i in range(0, len(rows), batch)]
    return float(np.mean([float(n) for n in nats])) / math.log(2)


def learning_rate(progress: np.ndarray, peak: float) -> np.ndarray:
    """Linear warm-up over the first 3 % of the run, then a cosine to zero."""
    return peak * np.minimum(progress / 0.03, 0.5 + 0.5 * np.cos(math.pi * np.clip(progress, 0, 1)))


def train(
    args: argparse.Namespace, config: Config, text: np.ndarray, validation: np.ndarray
) -> tuple[Params, dict[str, Any]]:
    """Trains for `args.steps`, or until `args.minutes` have passed; returns the parameters best on `validation`."""
    key, init_key = jax.random.split(jax.random.key(args.seed, impl="rbg"))
    params = init_params(init_key, config)
    decayed = jax.tree.map(lambda p: p.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(args.weight_decay, mask=decayed),
    )
    corpus = jnp.asarray(text)
    row = config.max_position_embeddings + 1

    def loss(params: Params, key: jax.Array) -> jax.Array:
        crop_key, noise_key, dropout_key = jax.random.split(key, 3)
        starts = jax.random.randint(crop_key, (args.batch,), 0, len(text) - row)
        tokens = jax.vmap(lambda start: jax.lax.dynamic_slice(corpus, (start,), (row,)))(starts).astype(jnp.int32)
        drawn = 0

        def dropout(y: jax.Array) -> jax.Array:
            nonlocal drawn
            drawn += 1
            keep = jax.random.bernoulli(jax.random.fold_in(dropout_key, drawn), 1 - args.dropout, y.shape)
            return jnp.where(keep, y / (1 - args.dropout), 0)

        used = tied(cast(with_rounding_noise(noise_key, params) if args.noise else params, jnp.bfloat16))
        hidden, _ = forward(used, tokens[:, :-1], config, dropout=dropout)
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits(used, hidden, config), tokens[:, 1:]
        ).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run_steps(params: Params, state: Any, key: jax.Array, rates: jax.Array) -> tuple[Params, Any, jax.Array]:
        def step(carry: Any, inputs: Any) -> Any:
            params, state = carry
            rate, key = inputs
            value, gradient = jax.value_and_grad(loss)(params, key)
            update, state = optimizer.update(gradient, state, params)
            return (jax.tree.map(lambda p, u: p - rate * u, params, update), state), value

        keys = jax.random.split(key, len(rates))
        (params, state), values = jax.lax.scan(step, (params, state), (rates, keys))
        return params, state, jnp.mean(values)

    state = optimizer.init(params)
    best, best_bits = params, math.inf
    done, total, chunk = 0, args.steps, args.evaluate_every
    begin = compiled = time.perf_counter()
    elapsed = 0.0
    while done < total and elapsed < 60 * args.minutes:
        rates = learning_rate((done + 0.5 + np.arange(chunk)) / total, args.learning_rate)
        params, state, value = run_steps(params, state, jax.random.fold_in(key, done), rates.astype(np.float32))
        train_bits = float(value) / math.log(2)
        bits = bits_per_byte(cast(tied(params), jnp.bfloat16), validation, config)
        done += chunk
        now = time.perf_counter()
        elapsed = now - begin
        if done == chunk:
            compiled = now
        else:
            # The schedule ends with the steps asked for or with the time, whichever comes first.
            pace = (now - compiled) / (done - chunk)
            total = min(args.steps, done + int((60 * args.minutes - elapsed) / pace))
        if bits < best_bits:
            best, best_bits = jax.tree.map(jnp.copy, params), bits
        figures = f"bits/byte: training {train_bits:.3f}, validation {bits:.3f}"
        print(f"step {done:6d} of {total}  {elapsed:6.1f} s  {figures}", flush=True)
    return best, {"steps": done, "seconds": round(elapsed, 1), "validation_bits_per_byte": round(best_bits, 4)}


# --- output ------------------------------------------------------------------------------------------------------


def huggingface_tensors(params: Params) -> dict[str, np.ndarray]:
    """bf16 tensors under their Hugging Face names, linear weights [out, in]."""
    host = jax.tree.map(lambda p: np.asarray(p.astype(jnp.bfloat16)), params)
    tensors = {"model.embed_tokens.weight": host["embedding"], "model.norm.weight": host["norm"]}
    for number, layer in enumerate(host["layers"]):
        prefix = f"model.layers.{number}."
        tensors |= {f"{prefix}{hf}.weight": np.ascontiguousarray(layer[name].T) for name, hf in LINEAR_NAMES.items()}
        tensors |= {f"{prefix}{hf}.weight": layer[name] for name, hf in NORM_NAMES.items()}
    return tensors


def write_model(output: pathlib.Path, params: Params, config: Config, sample: str, report: dict[str, Any]) -> None:
    """Writes the model's files beside `output` and moves each into place, so that none is ever half there."""
    output.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        save_file(huggingface_tensors(params), staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(config.to_huggingface(), indent=2) + "\n")
        (staging / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        (staging / "heldout.txt").write_bytes(sample.encode())
        for file in sorted(staging.iterdir()):
            file.chmod(0o644)
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(staging)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults made the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=4.5, help="training ends by then (default 4.5)")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--evaluate-every", type=int, default=250, help="steps between validations")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.15)
    parser.add_argument("--noise", action=argparse.BooleanOptionalAction, default=True, help="4-bit rounding noise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains, evaluates and writes the model."""
    args = parse_args(argv)
    config = Config(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        eos_token_ids=(SEPARATOR,),
    )
    training, validation, heldout = split(documents())
    text = joined(training)
    print(
        f"{len(text) / 1e6:.2f} MB to train on, {len(joined(validation)) / 1e3:.0f} KB to validate, "
        f"{len(joined(heldout)) / 1e3:.0f} KB held out; {jax.devices()[0].device_kind}, jax {jax.__version__}",
        flush=True,
    )
    params, report = train(args, config, text, joined(validation))

    low = cast(params, jnp.bfloat16)
    sample = heldout_sample(heldout)
    forms = {"f32": params, "bf16": low, f"int4_g{GROUP_SIZE}": rounded_to_int4(low)}
    for part, part_text in {
        "heldout": joined(heldout),
        "heldout_sample": np.frombuffer(sample.encode(), np.uint8),
    }.items():
        report[f"{part}_bits_per_byte"] = {
            name: round(bits_per_byte(tied(form), part_text, config), 4) for name, form in forms.items()
        }
        print(part, report[f"{part}_bits_per_byte"], flush=True)
    report |= {
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
    }
    write_model(args.output, params, config, sample, report)
    size = (args.output / "model.safetensors").stat().st_size
    print(f"wrote {args.output}: {report['parameters']:,} parameters, model.safetensors {size:,} bytes")


if __name__ == "__main__":
    main()
