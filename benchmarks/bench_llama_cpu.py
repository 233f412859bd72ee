"""Times a decoder of Llama 3.2 1B's shapes on this CPU: int4, bf16 and f32 in the examples' code, and llama.cpp.

    python benchmarks/bench_llama_cpu.py --output benchmarks/results/<device>/llama.csv

Random weights, every linear layer and the output projection in int4, bf16 or f32; activations are bf16, or f32 with
f32 weights. `prefill` is tokens a second of a prompt, `decode` of one row, each token behind those before it.
llama.cpp runs the same shapes in its format Q4_0, groups of 32 with a scale each, which it multiplies by activations
rounded to 8 bits; it is left out where llama-cpp-python or gguf is not installed. Everything runs on as many threads
as there are CPUs for this process: `taskset -c 0` gives one.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import decoder
from bench_voxtral import RandomWeights, next_tokens, shortened, text_params
from decoder_config import Config, Rope
from result_table import write_csv

LLAMA_1B = Config(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=Rope(5e5),
)
WEIGHTS = {"int4 g128": 128, "int4 g32": 32, "bf16": None, "f32": None}
LLAMA_CPP = "llama.cpp Q4_0"
Rates = dict[str, float]


def rates(prefill: Callable[[], object], decode: Callable[[], object], args: argparse.Namespace) -> Rates:
    """Tokens a second, by medians."""

    def seconds(call: Callable[[], object]) -> float:
        call()
        samples = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        return statistics.median(samples)

    return {"prefill": args.prompt / seconds(prefill), "decode": args.steps / seconds(decode)}


def ours(weights: str, config: Config, args: argparse.Namespace) -> Rates:
    """Of the examples' decoder."""
    params = text_params(config, RandomWeights(WEIGHTS[weights]))
    dtype = jnp.dtype("float32" if weights == "f32" else "bfloat16")
    if weights == "f32":
        params = jax.tree.map(lambda a: a.astype(dtype), params)
    tokens = jnp.arange(args.prompt, dtype=jnp.int32)[None] * 97 % config.vocab_size
    empty = decoder.init_cache(config, 1, args.prompt + args.steps, dtype)

    @jax.jit
    def prefill(params: decoder.Params, cache: decoder.Cache) -> Any:
        return next_tokens(params, tokens, config, cache, 0)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(params: decoder.Params, cache: decoder.Cache, token: jax.Array) -> Any:
        def step(i: jax.Array, carry: Any) -> Any:
            token, cache = carry
            return next_tokens(params, token[:, None], config, cache, args.prompt + i)

        return jax.lax.fori_loop(0, args.steps, step, (token, cache))

    token, cache = prefill(params, empty)

    def decode() -> None:
        nonlocal cache
        _, cache = jax.block_until_ready(loop(params, cache, token))

    return rates(lambda: jax.block_until_ready(prefill(params, empty)), decode, args)


def write_gguf(path: pathlib.Path, config: Config) -> None:
    """Random weights of the shapes in llama.cpp's format, without a vocabulary."""
    import gguf

    rng = np.random.default_rng(0)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    group_size, group_bytes = gguf.GGML_QUANT_SIZES[q4_0]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, n: int, k: int) -> None:
        groups = rng.integers(256, size=(n, k // group_size, group_bytes), dtype=np.uint8)
        groups[..., :2] = np.array([0.01], np.float16).view(np.uint8)  # The scale, before the nibbles.
        writer.add_tensor(f"{name}.weight", groups.reshape(n, -1), raw_dtype=q4_0)

    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    key_values = config.num_key_value_heads * config.head_dim
    matrix("token_embd", config.vocab_size, hidden)
    matrix("output", config.vocab_size, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config.num_hidden_layers):
        for name, n, k in (
            ("attn_q", heads, hidden),
            ("attn_k", key_values, hidden),
            ("attn_v", key_values, hidden),
            ("attn_output", hidden, heads),
            ("ffn_gate", config.intermediate_size, hidden),
            ("ffn_up", config.intermediate_size, hidden),
            ("ffn_down", hidden, config.intermediate_size),
        ):
            matrix(f"blk.{layer}.{name}", n, k)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(config: Config, args: argparse.Namespace) -> Rates:
    """Of llama.cpp, through its C functions."""
    import llama_cpp as cpp

    @cpp.llama_log_callback
    def silent(level: int, text: bytes, data: object) -> None:
        del level, text, data

    cpp.llama_log_set(silent, None)
    cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.gguf"
        write_gguf(path, config)
        model_params = cpp.llama_model_default_params()
        model_params.use_mmap = False
        model = cpp.llama_model_load_from_file(str(path).encode(), model_params)
    context_params = cpp.llama_context_default_params()
    context_params.n_ctx = args.prompt + args.steps
    context_params.n_batch = context_params.n_ubatch = args.prompt
    context_params.n_threads = context_params.n_threads_batch = len(os.sched_getaffinity(0))
    context = cpp.llama_init_from_model(model, context_params)
    memory = cpp.llama_get_memory(context)

    def evaluate(tokens: list[int]) -> None:
        array = (cpp.llama_token * len(tokens))(*tokens)  # Of which a batch is a view.
        if cpp.llama_decode(context, cpp.llama_batch_get_one(array, len(array))):
            raise RuntimeError("llama.cpp could not evaluate the tokens")
        cpp.llama_synchronize(context)

    def prefill() -> None:
        cpp.llama_memory_clear(memory, True)
        evaluate([97 * i % config.vocab_size for i in range(args.prompt)])

    def decode() -> None:
        cpp.llama_memory_seq_rm(memory, 0, args.prompt, -1)
        for i in range(args.steps):
            evaluate([97 * i % config.vocab_size])

    found = rates(prefill, decode, args)
    cpp.llama_free(context)
    cpp.llama_model_free(model)
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure each and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, help="the CSV to write")
    parser.add_argument("--weights", nargs="+", choices=[*WEIGHTS, LLAMA_CPP], default=[*WEIGHTS, LLAMA_CPP])
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers (default 1)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default 128)")
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded behind it (default 32)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    config = shortened(LLAMA_1B, args.layers)
    rows: list[dict[str, object]] = []
    for weights in args.weights:
        if weights == LLAMA_CPP and not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
            print(f"{LLAMA_CPP} is left out, since llama-cpp-python or gguf is not installed.")
            continue
        found = llama_cpp(config, args) if weights == LLAMA_CPP else ours(weights, config, args)
        run = {"weights": weights, "cpus": len(os.sched_getaffinity(0)), "prompt": args.prompt, "steps": args.steps}
        rows.append(run | {f"{name}_tokens_per_s": f"{rate:.2f}" for name, rate in found.items()})
        print(*(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if args.output:
        write_csv(args.output, rows)


if __name__ == "__main__":
    main()
