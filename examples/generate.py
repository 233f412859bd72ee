"""Generates text with a decoder whose linear layers are int4 weights.

    python examples/generate.py                                        # the byte-level model in byte_model/
    python examples/generate.py --prompt "class Queue:" --temperature 0.8 --seed 1
    python examples/generate.py --model ~/models/Llama-3.2-1B --prompt "The capital of France is"
    python examples/generate.py --model ~/models/Llama-3.2-1B-GPTQ   # any int4 checkpoint that jax_int4mm reads
    python examples/generate.py --group-size 128 --method gptq --act-order

Where the model's folder holds a `heldout.txt`, its perplexity with dense and with int4 weights is printed first.
"""

from __future__ import annotations

import argparse
import codecs
import functools
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_int4mm as i4
from calibrate import quantize_linears_gptq, spread_windows
from corpus import documents, joined, split
from decoder import (
    LINEAR_NAMES,
    Cache,
    Params,
    forward,
    fuse,
    init_cache,
    logits,
    negative_log_likelihood,
    output_projection,
    params_from_huggingface,
)
from decoder_config import Config
from jax_int4mm import checkpoints
from jax_int4mm.quantizers import METHODS

BYTE_MODEL = pathlib.Path(__file__).parent / "byte_model"
CALIBRATION_LENGTH = 2048  # tokens of a window, where the model has as many positions
DEFAULT_PROMPT = 'def copy_file(source, target):\n    """'


# --- text and tokens ---------------------------------------------------------------------------------------------


class ByteTokenizer:
    """Token i is byte i of UTF-8."""

    def encode(self, text: str) -> list[int]:
        """The tokens of text."""
        return list(text.encode())

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of tokens, a piece for each, "" while a character is incomplete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            yield decoder.decode(bytes([token]))


class FileTokenizer:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: pathlib.Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(f"{path} needs tokenizers: pip install tokenizers, or use --token-ids") from error
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._decode_stream = tokenizers.decoders.DecodeStream

    def encode(self, text: str) -> list[int]:
        """The tokens of text, special ones as the file says."""
        return self._tokenizer.encode(text).ids

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of tokens, a piece for each, "" while a character is incomplete."""
        stream = self._decode_stream(skip_special_tokens=True)
        for token in tokens:
            yield stream.step(self._tokenizer, token) or ""


class NumberTokenizer:
    """Tokens written as numbers, for a model that comes without a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The numbers in text, separated by spaces or commas."""
        return [int(number) for number in text.replace(",", " ").split()]

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        """Each token's number."""
        for token in tokens:
            yield f" {token}"


Tokenizer = ByteTokenizer | FileTokenizer | NumberTokenizer


def tokenizer_for(model: pathlib.Path, config: Config, token_ids: bool) -> Tokenizer:
    """The tokenizer of a model's folder; bytes where it has none and a vocabulary of 256."""
    if token_ids:
        return NumberTokenizer()
    if (model / "tokenizer.json").is_file():
        return FileTokenizer(model / "tokenizer.json")
    if config.vocab_size == 256:
        return ByteTokenizer()
    raise ValueError(f"{model} has no tokenizer.json; give the prompt as numbers: --token-ids --prompt '1 2 3'")


# --- weights -----------------------------------------------------------------------------------------------------


def quantize_linears(params: Params, group_size: int, lm_head: bool, method: str = "rtn") -> Params:
    """The same model with each linear layer of the decoder, and `lm_head` where asked, as an `Int4Weight`.

    The method is any that needs the weights alone.
    """
    quantize = functools.partial(i4.quantize, group_size=group_size, method=method)
    layers = [layer | {name: quantize(layer[name]) for name in LINEAR_NAMES} for layer in params["layers"]]
    return params | {"layers": layers} | ({"lm_head": quantize(output_projection(params))} if lm_head else {})


def calibration_windows(args: argparse.Namespace, tokenizer: Tokenizer, config: Config) -> np.ndarray:
    """The tokens that GPTQ is to be calibrated with, int32 [windows, length]: of no text that is measured."""
    if args.calibration is None:
        if not isinstance(tokenizer, ByteTokenizer):
            raise ValueError("--method gptq needs text of the kind that the model is for: --calibration FILE")
        training, _, _ = split(documents())
        tokens = joined(training)
    else:
        if not args.calibration.is_file():
            raise FileNotFoundError(f"there is no file {args.calibration} to calibrate with")
        tokens = np.asarray(tokenizer.encode(args.calibration.read_text(encoding="utf-8")))
    windows = spread_windows(tokens, min(config.max_position_embeddings, CALIBRATION_LENGTH), args.calibration_windows)
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise ValueError(f"{args.calibration} has tokens outside the model's vocabulary, 0 to {config.vocab_size - 1}")
    return windows


def nbytes(tree: Any) -> int:
    """Bytes of every array in a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def linear_bytes(params: Params) -> int:
    """Bytes of the decoder's linear layers."""
    return nbytes([[layer[name] for name in LINEAR_NAMES] for layer in params["layers"]])


# --- perplexity --------------------------------------------------------------------------------------------------


def mean_nats(params: Params, config: Config, text: np.ndarray, windows: int, batch: int = 8) -> float:
    """Mean negative log likelihood of a token of text, over its first `windows` windows of the model's context."""
    length = min(config.max_position_embeddings, len(text) - 1)
    starts = np.arange(min(windows, (len(text) - 1) // length)) * length
    rows = text[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    evaluate = jax.jit(negative_log_likelihood, static_argnames="config")
    sums = [evaluate(params, rows[i : i + batch], config).sum() for i in range(0, len(rows), batch)]
    return float(sum(sums)) / (len(rows) * length)


# --- decoding ----------------------------------------------------------------------------------------------------


def sample(scores: jax.Array, key: jax.Array, temperature: float, top_k: int) -> jax.Array:
    """One token for each row of scores [batch, vocabulary]: the best at temperature 0, else drawn from the top_k."""
    if temperature == 0:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    best, tokens = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))
    drawn = jax.random.categorical(key, best / temperature)
    return jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=("config", "temperature", "top_k"), donate_argnames="cache")
def step(
    params: Params,
    cache: Cache,
    tokens: jax.Array,
    position: jax.Array,
    key: jax.Array,
    *,
    config: Config,
    temperature: float,
    top_k: int,
) -> tuple[jax.Array, Cache]:
    """Feeds tokens [batch, t] that begin at `position` and draws the one that follows: the whole prompt, or t = 1."""
    hidden, cache = forward(params, tokens, config, cache, position)
    key = jax.random.fold_in(key, position)
    return sample(logits(params, hidden[:, -1], config), key, temperature, top_k), cache


def generate(
    params: Params,
    config: Config,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 40,
    seed: int = 0,
) -> Iterator[int]:
    """Yields the tokens that follow the prompt, up to `max_new_tokens` or an end-of-text token."""
    limit = config.max_position_embeddings
    if not prompt or max_new_tokens < 1 or len(prompt) + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones were asked for; there has to be at least "
            f"one of each, and both together have to fit the model's {limit} positions"
        )
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise ValueError(f"the prompt has tokens outside the model's vocabulary, 0 to {config.vocab_size - 1}")
    advance = functools.partial(step, config=config, temperature=temperature, top_k=top_k)
    key = jax.random.key(seed)
    cache = init_cache(config, 1, len(prompt) + max_new_tokens, params["embedding"].dtype)
    following, cache = advance(params, cache, jnp.asarray([prompt], jnp.int32), jnp.int32(0), key)
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        token = following
        if position + 1 < len(prompt) + max_new_tokens:
            # Dispatched before the host looks at `token`, so that the device does not wait for the printing.
            following, cache = advance(params, cache, token[:, None], jnp.int32(position), key)
        value = int(token[0])
        if value in config.eos_token_ids:
            return
        yield value


class Stopwatch:
    """Counts the items of an iterator and the seconds between its first and its last one."""

    def __init__(self, items: Iterator[int]):
        self._items = items
        self.count = 0
        self.first = self.last = 0.0

    def __iter__(self) -> Iterator[int]:
        for item in self._items:
            self.last = time.perf_counter()
            self.first = self.first or self.last
            self.count += 1
            yield item

    @property
    def rate(self) -> float:
        """Items per second after the first, which waits for compilation; NaN for fewer than two."""
        return (self.count - 1) / (self.last - self.first) if self.count > 1 else math.nan


# --- command line ------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        default=BYTE_MODEL,
        help="a Hugging Face directory of a Llama, Mistral, Qwen or Gemma model",
    )
    parser.add_argument("--prompt", help="text to continue (default: the beginning of a Python function)")
    parser.add_argument("--token-ids", action="store_true", help="prompt and output are token numbers")
    parser.add_argument("--max-new-tokens", type=int, help="default: 256, or as many as the model has positions for")
    parser.add_argument("--temperature", type=float, default=0.5, help="default 0.5; 0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=40, help="draw from the k likeliest tokens (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="generate with the weights as they are in the file")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128, 256), default=64)
    parser.add_argument("--method", choices=METHODS, default="rtn", help="how weights are quantised (default rtn)")
    parser.add_argument("--act-order", action="store_true", help="gptq: inputs with large values first")
    parser.add_argument("--calibration", type=pathlib.Path, help="gptq: a text file (default: what byte_model saw)")
    parser.add_argument("--calibration-windows", type=int, default=128, help="gptq: windows of that text (default 128)")
    parser.add_argument("--quantize-lm-head", action="store_true", help="the output projection in int4 too")
    parser.add_argument("--perplexity-windows", type=int, default=32, help="windows of heldout.txt; 0 for none")
    args = parser.parse_args(argv)
    if args.dtype == "float32" and not args.dense:
        parser.error("int4 weights multiply bfloat16 or float16 activations; with --dtype float32 add --dense")
    if args.method != "gptq" and (args.act_order or args.calibration is not None):
        parser.error("--act-order and --calibration are for --method gptq")
    if args.calibration_windows < 1:
        parser.error("--calibration-windows is at least 1")
    return args


def run(args: argparse.Namespace) -> None:
    """Loads, quantises, evaluates and generates as the arguments say."""
    checkpoint = checkpoints.load(args.model, dtype=None if args.dtype == "float32" else args.dtype)
    is_int4 = any(entry.element_type == "int4" for entry in checkpoint.entries.values())
    if is_int4 and (args.dense or args.method != "rtn"):
        raise ValueError(f"{args.model} is int4 already ({checkpoint.format}); leave out --dense and --method")
    if checkpoint.config is None:
        raise ValueError(f"{args.model} has no config.json; give the directory of a Hugging Face model")
    config = Config.from_huggingface(checkpoint.config)
    tokenizer = tokenizer_for(args.model, config, args.token_ids)
    prompt = args.prompt
    if prompt is None:
        prompt = "1" if args.token_ids else DEFAULT_PROMPT

    dense = params_from_huggingface(checkpoint, config, args.dtype)
    models = {f"int4 ({checkpoint.format})" if is_int4 else args.dtype: dense}
    if not args.dense and not is_int4 and args.method == "gptq":
        windows = calibration_windows(args, tokenizer, config)
        models[f"int4 g{args.group_size}"] = quantize_linears_gptq(
            dense, config, windows, args.group_size, args.quantize_lm_head, args.act_order
        )
    elif not args.dense and not is_int4:
        models[f"int4 g{args.group_size}"] = quantize_linears(
            dense, args.group_size, args.quantize_lm_head, args.method
        )
    print(f"{args.model} on {jax.devices()[0].device_kind}")
    for name, params in models.items():
        linear, whole = linear_bytes(params), nbytes(params)
        print(f"  {name:>8}: linear layers {linear:,} bytes, the whole model {whole:,}")

    heldout = args.model / "heldout.txt"
    if heldout.is_file() and isinstance(tokenizer, ByteTokenizer) and args.perplexity_windows > 0:
        text = np.frombuffer(heldout.read_bytes(), np.uint8)
        for name, params in models.items():
            nats = mean_nats(params, config, text, args.perplexity_windows)
            figures = f"perplexity {math.exp(nats):.4f} per byte, {nats / math.log(2):.4f} bits per byte"
            print(f"  {name:>8}: held-out {figures}", flush=True)

    name, params = list(models.items())[-1]
    params = fuse(params)
    prompt_tokens = tokenizer.encode(prompt)
    room = config.max_position_embeddings - len(prompt_tokens)
    tokens = generate(
        params,
        config,
        prompt_tokens,
        min(256, room) if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
    )
    watch = Stopwatch(tokens)
    print(f"\n{prompt}", end="", flush=True)
    for piece in tokenizer.stream(iter(watch)):
        print(piece, end="", flush=True)
    print(f"\n\n{watch.count} tokens with {name} weights, {watch.rate:.1f} tokens/s after the first")


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends the program with a sentence."""
    args = parse_args(argv)
    try:
        run(args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"generate.py: {error}")


if __name__ == "__main__":
    main()
