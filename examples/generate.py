"""Generates text with a decoder whose linear layers are int4 weights.

    python examples/generate.py                                        # the byte-level model in byte_model/
    python examples/generate.py --prompt "class Queue:" --temperature 0.8 --seed 1
    python examples/generate.py --model ~/models/Llama-3.2-1B --prompt "The capital of France is"
    python examples/generate.py --model ~/models/Llama-3.2-1B-GPTQ   # any int4 checkpoint that jax_int4mm reads
    python examples/generate.py --model ~/models/Qwen3-0.6B --chat --prompt "Who was Ada Lovelace?" --compare
    python examples/generate.py --group-size 128 --method gptq --act-order

`--compare` runs the dense model beside the int4 one. Perplexity is of the file that `--perplexity` names, or of the
`heldout.txt` of the model's folder. Rates are without compilation; "first token" is from the prompt to it.
"""

from __future__ import annotations

import argparse
import functools
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

import jax_int4mm as i4
from calibrate import quantize_linears_gptq, spread_windows
from corpus import documents, joined, split
from decoder import (
    LINEAR_NAMES,
    Params,
    fuse,
    negative_log_likelihood,
    output_projection,
    params_from_huggingface,
)
from decoder_config import Config
from decoding import NOTHING, Generator, Sampling, Timings
from jax_int4mm import checkpoints
from jax_int4mm.quantizers import METHODS
from tokenization import ByteTokenizer, ChatTemplate, TextUntil, Tokenizer, pieces, stop_tokens_of, tokenizer_for

BYTE_MODEL = pathlib.Path(__file__).parent / "byte_model"
CALIBRATION_LENGTH = 2048  # tokens of a window, where the model has as many positions
DEFAULT_PROMPT = 'def copy_file(source, target):\n    """'


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


# --- generation --------------------------------------------------------------------------------------------------


def row_tokens(blocks: Iterator[np.ndarray], row: int) -> Iterator[int]:
    """The tokens of one row, as blocks of all rows come."""
    for block in blocks:
        for token in block[row]:
            if token == NOTHING:
                return
            yield int(token)


def complete(
    generator: Generator, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> list[str]:
    """What follows each prompt; printed as it comes if there is one prompt, and in the end if there are more."""
    room = generator.room(prompts)
    wanted = min(256, room) if args.max_new_tokens is None else args.max_new_tokens
    blocks = generator.generate(prompts, wanted, args.seed)
    if len(prompts) > 1:
        blocks = list(blocks)
    texts = []
    for row in range(len(prompts)):
        text = ""
        for piece in pieces(tokenizer.decoder(), row_tokens(iter(blocks), row), TextUntil(args.stop)):
            text += piece
            if len(prompts) == 1:
                print(piece, end="", flush=True)
        texts.append(text)
    return texts


def describe(timings: Timings) -> dict[str, str]:
    """The figures of a generation, by what they are."""
    return {
        "prefill, tokens/s": f"{timings.prefill_rate:,.1f}",
        "decode, tokens/s": f"{timings.decode_rate:,.1f}",
        "first token, ms": f"{1e3 * timings.first_token_seconds:,.1f}",
        "device memory, MB": f"{timings.device_bytes / 1e6:,.1f}",
        "compilation, s": f"{timings.compile_seconds:,.1f}",
    }


def print_table(columns: dict[str, dict[str, str]]) -> None:
    """Prints figures by name, a column for each model."""
    names = max(columns.values(), key=len)
    rows = [[name, *(figures.get(name, "") for figures in columns.values())] for name in names]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in [["", *columns], *rows]:
            print("  ".join(cell.rjust(20) for cell in row))
        return
    table = Table()
    for name in ("", *columns):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


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
    parser.add_argument(
        "--prompt", action="append", help="text to continue; several make a batch (default: a Python function's head)"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, in the model's chat template")
    parser.add_argument("--system", help="with --chat: the system message")
    parser.add_argument("--token-ids", action="store_true", help="prompt and output are token numbers")
    parser.add_argument("--max-new-tokens", type=int, help="default: 256, or as many as the model has positions for")
    parser.add_argument("--stop", action="append", default=[], help="text that ends the output; may be given again")
    parser.add_argument("--temperature", type=float, default=0.5, help="default 0.5; 0 takes the likeliest token")
    parser.add_argument(
        "--top-k", type=int, default=40, help="draw from the k likeliest tokens (default 40); 0 for all"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that make up p (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense", action="store_true", help="generate with the weights as they are in the file")
    parser.add_argument("--compare", action="store_true", help="generate with dense and with int4 weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128, 256), default=64)
    parser.add_argument("--method", choices=METHODS, default="rtn", help="how weights are quantised (default rtn)")
    parser.add_argument("--act-order", action="store_true", help="gptq: inputs with large values first")
    parser.add_argument("--calibration", type=pathlib.Path, help="gptq: a text file (default: what byte_model saw)")
    parser.add_argument("--calibration-windows", type=int, default=128, help="gptq: windows of that text (default 128)")
    parser.add_argument("--quantize-lm-head", action="store_true", help="the output projection in int4 too")
    parser.add_argument("--perplexity", type=pathlib.Path, help="a text file (default: the model's heldout.txt)")
    parser.add_argument("--perplexity-windows", type=int, default=32, help="windows of that text; 0 for none")
    args = parser.parse_args(argv)
    if args.dtype == "float32" and not args.dense:
        parser.error("int4 weights multiply bfloat16 or float16 activations; with --dtype float32 add --dense")
    if args.dense and args.compare:
        parser.error("--compare is of dense and int4 weights; leave out --dense")
    if args.method != "gptq" and (args.act_order or args.calibration is not None):
        parser.error("--act-order and --calibration are for --method gptq")
    if args.calibration_windows < 1:
        parser.error("--calibration-windows is at least 1")
    if args.system is not None and not args.chat:
        parser.error("--system is for --chat")
    if args.chat and args.token_ids:
        parser.error("--chat is of text; leave out --token-ids")
    return args


def prompts_of(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list[str], list[list[int]]]:
    """The prompts as they are shown, and their tokens."""
    texts = args.prompt or ["1" if args.token_ids else DEFAULT_PROMPT]
    if not args.chat:
        return texts, [tokenizer.encode(text) for text in texts]
    template = ChatTemplate.of_model(args.model)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    rendered = [template.render([*system, {"role": "user", "content": text}]) for text in texts]
    # The template has written the tokens that begin a text.
    return texts, [tokenizer.encode(text, special=False) for text in rendered]


def text_to_measure(args: argparse.Namespace, tokenizer: Tokenizer) -> np.ndarray | None:
    """The tokens of the text that perplexity is of, if any."""
    if args.perplexity_windows < 1:
        return None
    if args.perplexity is not None:
        if not args.perplexity.is_file():
            raise FileNotFoundError(f"there is no file {args.perplexity} to measure perplexity on")
        return np.asarray(tokenizer.encode(args.perplexity.read_text(encoding="utf-8")))
    heldout = args.model / "heldout.txt"
    if heldout.is_file() and isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(heldout.read_bytes(), np.uint8)
    return None


def quantized(args: argparse.Namespace, dense: Params, config: Config, tokenizer: Tokenizer) -> Params:
    """The model in int4 as the arguments ask for."""
    if args.method != "gptq":
        return quantize_linears(dense, args.group_size, args.quantize_lm_head, args.method)
    windows = calibration_windows(args, tokenizer, config)
    return quantize_linears_gptq(dense, config, windows, args.group_size, args.quantize_lm_head, args.act_order)


def run(args: argparse.Namespace) -> None:
    """Loads, quantises, evaluates and generates as the arguments say."""
    checkpoint = checkpoints.load(args.model, dtype=None if args.dtype == "float32" else args.dtype)
    is_int4 = any(entry.element_type == "int4" for entry in checkpoint.entries.values())
    if is_int4 and (args.dense or args.compare or args.method != "rtn"):
        raise ValueError(
            f"{args.model} is int4 already ({checkpoint.format}); leave out --dense, --compare and --method"
        )
    if checkpoint.config is None:
        raise ValueError(f"{args.model} has no config.json; give the directory of a Hugging Face model")
    config = Config.from_huggingface(checkpoint.config)
    tokenizer = tokenizer_for(args.model, config, args.token_ids)
    texts, prompts = prompts_of(args, tokenizer)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    stop_tokens = stop_tokens_of(args.model, config)
    measured = text_to_measure(args, tokenizer)

    dense = params_from_huggingface(checkpoint, config, args.dtype)
    models = {f"int4 ({checkpoint.format})" if is_int4 else args.dtype: dense}
    if not args.dense and not is_int4:
        models[f"int4 g{args.group_size}"] = quantized(args, dense, config, tokenizer)
    del dense
    print(f"{args.model} on {jax.devices()[0].device_kind}")
    columns: dict[str, dict[str, str]] = {}
    for name, params in models.items():
        columns[name] = {"linear layers, bytes": f"{linear_bytes(params):,}", "model, bytes": f"{nbytes(params):,}"}
        if measured is not None:
            nats = mean_nats(params, config, measured, args.perplexity_windows)
            columns[name] |= {"perplexity": f"{math.exp(nats):.4f}", "bits per token": f"{nats / math.log(2):.4f}"}

    generated = list(models) if args.compare else list(models)[-1:]
    for name in generated:
        generator = Generator(fuse(models.pop(name)), config, sampling, stop_tokens)
        print(f"\n--- {name}\n{texts[0] if len(texts) == 1 and not args.chat else ''}", end="", flush=True)
        completions = complete(generator, tokenizer, prompts, args)
        for text, completion in zip(texts, completions, strict=True):
            if len(texts) > 1:
                print(f"\n> {text}\n{completion}")
        columns[name] |= describe(generator.timings)
        print()
    print()
    print_table(columns)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends the program with a sentence."""
    args = parse_args(argv)
    try:
        run(args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"generate.py: {error}")


if __name__ == "__main__":
    main()
