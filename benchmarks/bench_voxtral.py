"""Times Voxtral Mini 3B in bf16 and in int4: the table that ExecuTorch published of it, and decoding.

    python benchmarks/bench_voxtral.py --output benchmarks/results/h200/voxtral.csv
    python benchmarks/bench_voxtral.py --layers 0.1 --repeats 2 --output small.csv      # a tenth of the layers

Random weights of the model's shapes in the examples' code: every linear layer of encoder and decoder and the output
projection in int4, embeddings and projector in bf16. Rows:

- weights: bytes of all parameters, as a file of them has.
- audio_encoder: features [3, 128, 3000] to embeddings, 4500 rows.
- token_embedding: 1138 tokens.
- text_decoder: 1138 embeddings through the decoder into a cache, with scores of every one of them.
- step batch B context C: one token for each of B rows behind C others, of a loop on the device.
- peak: the most device memory in use by then, of all rows above it; a process for each kind of weights.
- peak batch 16: the same, the step of 16 rows and their cache included.
- load: from files in the system's cache to every parameter on the device, by `jax_int4mm.checkpoints`.
- apart step batch B: the same step with q, k, v, gate and up as matrices of their own.
- llama3_8b step batch B: the step of Llama 3 8B's shapes behind 1024 tokens.

`ms` is wall time of calls that are queued one behind the other, the median of the repeats. `matmul_ms`, `attention_ms`
and `rest_ms` divide the device's time by the names of its kernels, in one profile; they are empty without a GPU.
`floor` is what the row's bytes would take at the rate of `--bandwidth` over `ms`: of steps, weights and cache.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import decoder
import jax_int4mm as i4
import voxtral
from decoder_config import Config, Rope
from jax_int4mm import checkpoints
from result_table import read_csv, write_csv

KINDS = {"bf16": None, "int4 g128": 128, "int4 g32": 32}
TOKENS, CHUNKS, CONTEXT = 1138, 3, 1138
LOOP = 32  # Steps of a loop on the device.
VOXTRAL = Config(
    vocab_size=131072,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=30,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=Rope(1e8),
)
LLAMA3_8B = Config(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope=Rope(5e5),
)
ATTENTION, MATMUL = r"cudnn|sdpa|flash|attend_", r"int4mm|nvjet|gemm|cutlass|splitK|xmma"


# --- random models -----------------------------------------------------------------------------------------------


class RandomWeights:
    """Makes matrices of random values, dense or int4, without more memory than they take."""

    def __init__(self, group_size: int | None):
        self._group_size = group_size
        self._values = jax.random.normal(jax.random.key(0), (1_000_003,), jnp.bfloat16) * 0.02

    def dense(self, *shape: int) -> jax.Array:
        """bf16 of the shape; rows differ, since the number of values is prime."""
        return jnp.resize(self._values, shape)

    def linear(self, k: int, n: int) -> Any:
        """A matrix [k, n] as linear layers have it."""
        if self._group_size is None:
            return self.dense(k, n)
        words = jax.lax.bitcast_convert_type(self._values[: 2 * (len(self._values) // 2)].reshape(-1, 2), jnp.int32)
        return i4.Int4Weight(
            jnp.resize(words * jnp.int32(-1640531535), (n // 8, k // 128, 32, 4)),
            self.dense(k // self._group_size, n, 2) / 8,
            group_size=self._group_size,
            k=k,
            n=n,
        )


def text_params(config: Config, weights: RandomWeights, fused: bool = True) -> decoder.Params:
    """A decoder, with the linear layers of the same input as one matrix or apart."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    # First, while there is little else: making a large array takes it twice.
    large = {
        "embedding": weights.dense(config.vocab_size, hidden),
        "lm_head": weights.linear(hidden, config.vocab_size),
    }
    key_values = config.num_key_value_heads * config.head_dim
    sizes = {"q": heads, "k": key_values, "v": key_values}
    sizes |= dict.fromkeys(("gate", "up"), config.intermediate_size)
    if fused:
        sizes = {whole: sum(sizes[part] for part in parts) for whole, parts in decoder.FUSED_NAMES.items()}
    layers = [
        {
            **{name: weights.linear(hidden, size) for name, size in sizes.items()},
            "o": weights.linear(heads, hidden),
            "down": weights.linear(config.intermediate_size, hidden),
            "attention_norm": jnp.ones(hidden, jnp.bfloat16),
            "mlp_norm": jnp.ones(hidden, jnp.bfloat16),
        }
        for _ in range(config.num_hidden_layers)
    ]
    return large | {"layers": layers, "norm": jnp.ones(hidden, jnp.bfloat16)}


# --- timing ------------------------------------------------------------------------------------------------------


def median_ms(call: Callable[[], Any], repeats: int, queued: int) -> float:
    """Milliseconds of a call, of which `queued` stand in line at a time."""
    jax.block_until_ready(call())
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(queued):
            result = call()  # The ones before are let go, as a program would do: they count in the peak.
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - start) / queued)
    return 1e3 * statistics.median(samples)


def split_ms(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the device in products, in attention, and in the rest of one call."""
    if jax.default_backend() != "gpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (trace,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
    sums = {"matmul_ms": 0.0, "attention_ms": 0.0, "rest_ms": 0.0}
    for plane in profile.planes:
        for line in plane.lines:
            if not plane.name.startswith("/device:GPU") or not line.name.startswith("Stream"):
                continue
            for event in line.events:
                is_attention, is_matmul = re.search(ATTENTION, event.name), re.search(MATMUL, event.name)
                part = "attention_ms" if is_attention else "matmul_ms" if is_matmul else "rest_ms"
                sums[part] += event.duration_ns / 1e6
    return sums


class Measurements:
    """The rows of one kind of weights."""

    def __init__(self, kind: str, args: argparse.Namespace):
        self.kind, self.args = kind, args
        self.rows: list[dict[str, object]] = []

    def add(self, row: str, call: Callable[[], Any], queued: int = 4, steps: int = 1, nbytes: int = 0) -> None:
        """Times a call of `steps` steps that read `nbytes` each."""
        ms = median_ms(call, self.args.repeats, queued) / steps
        split = {name: f"{value / steps:.4f}" for name, value in split_ms(call).items()}
        floor = nbytes / (self.args.bandwidth * 1e9)  # ms
        self.record(row, ms=f"{ms:.4f}", floor=f"{floor / ms:.3g}" if nbytes else "", **split)

    def record(self, row: str, **figures: object) -> None:
        """Keeps a row and prints it."""
        names = ("ms", "matmul_ms", "attention_ms", "rest_ms", "floor", "gib")
        self.rows.append({"row": row, "weights": self.kind} | {name: figures.get(name, "") for name in names})
        print(*(f"{name} {value}" for name, value in self.rows[-1].items() if value != ""), flush=True)


# --- the rows ----------------------------------------------------------------------------------------------------


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def shortened(config: Any, share: float) -> Any:
    """The configuration with a share of its layers, at least one."""
    return type(config)(**vars(config) | {"num_hidden_layers": max(1, int(config.num_hidden_layers * share))})


def measure_encoder(found: Measurements, config: voxtral.AudioConfig, params: Any) -> None:
    """The row audio_encoder."""
    shape = (CHUNKS, config.num_mel_bins, 2 * config.max_source_positions)
    features = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
    encode = jax.jit(voxtral.encode_audio, static_argnums=2)
    found.add("audio_encoder", lambda: encode(params, features, config), queued=6)


def measure_prefill(found: Measurements, config: Config, params: decoder.Params) -> None:
    """The rows token_embedding and text_decoder."""
    tokens = jnp.arange(TOKENS, dtype=jnp.int32)[None] * 97 % config.vocab_size
    embed = jax.jit(decoder.embed, static_argnums=2)
    table = {"embedding": params["embedding"]}
    found.add("token_embedding", lambda: embed(table, tokens, config), queued=50)

    @jax.jit
    def prefill(params: decoder.Params, x: jax.Array) -> Any:
        cache = decoder.init_cache(config, 1, TOKENS, jnp.bfloat16)
        hidden, cache = decoder.forward_embedded(params, x, config, cache, 0)
        # In bf16, as the published program returns them.
        return hidden @ decoder.output_projection(params), cache

    x = embed(params, tokens, config)
    found.add("text_decoder", lambda: prefill(params, x), queued=2)


def next_tokens(
    params: decoder.Params, tokens: jax.Array, config: Config, cache: decoder.Cache, start: jax.typing.ArrayLike
) -> tuple[jax.Array, decoder.Cache]:
    """The likeliest token [batch] behind tokens [batch, t] that stand at `start`, and the cache with them."""
    hidden, cache = decoder.forward(params, tokens, config, cache, start)
    return jnp.argmax(decoder.logits(params, hidden[:, -1], config), axis=-1).astype(jnp.int32), cache


def measure_steps(
    found: Measurements, name: str, config: Config, params: decoder.Params, batch: int, context: int
) -> None:
    """A row of decoding steps, each of the token that the one before it gave."""
    cache = decoder.init_cache(config, batch, -(-(context + LOOP) // 64) * 64, jnp.bfloat16)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(params: decoder.Params, cache: decoder.Cache, tokens: jax.Array, start: jax.Array) -> Any:
        def step(i: jax.Array, carry: Any) -> Any:
            tokens, cache = carry
            return next_tokens(params, tokens[:, None], config, cache, start + i)

        return jax.lax.fori_loop(0, LOOP, step, (tokens, cache))

    def call() -> jax.Array:
        nonlocal cache
        tokens, cache = loop(params, cache, jnp.zeros(batch, jnp.int32), jnp.int32(context))
        return tokens

    # Of the embeddings only some rows.
    read = nbytes(params) - nbytes(params["embedding"]) + nbytes(cache) * context // cache[0]["k"].shape[1]
    found.add(f"{name}step batch {batch} context {context}", call, queued=2, steps=LOOP, nbytes=read)


def measure_load(found: Measurements, params: Any) -> None:
    """The row load."""
    leaves, _ = jax.tree.flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, i4.Int4Weight))
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(pathlib.Path(folder, "model"), named)

        def load() -> Any:
            loaded = checkpoints.load(pathlib.Path(folder, "model"))
            return [jax.device_put(loaded[name]) for name in loaded]

        found.record("load", ms=f"{median_ms(load, found.args.repeats, queued=1):.4f}")


def measure(kind: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """All rows of one kind of weights."""
    found = Measurements(kind, args)
    weights = RandomWeights(KINDS[kind])
    audio_config = shortened(voxtral.AudioConfig(), args.layers)
    config = shortened(VOXTRAL, args.layers)
    text = text_params(config, weights)
    audio = voxtral.random_params(audio_config, weights.linear, weights.dense)
    found.record("weights", gib=f"{nbytes((audio, text)) / 2**30:.3f}")
    measure_encoder(found, audio_config, audio)
    measure_prefill(found, config, text)
    for batch, row in ((1, "peak"), (16, "peak batch 16")):
        measure_steps(found, "", config, text, batch, CONTEXT)
        statistics_of_device = jax.devices()[0].memory_stats()
        if statistics_of_device:
            found.record(row, gib=f"{statistics_of_device['peak_bytes_in_use'] / 2**30:.3f}")
    measure_load(found, {"audio": audio, "text": text})
    del audio, text
    text = text_params(config, weights, fused=False)
    for batch in (1, 16):
        measure_steps(found, "apart ", config, text, batch, CONTEXT)
    del text
    config = shortened(LLAMA3_8B, args.layers)
    text = text_params(config, weights)
    for batch in (1, 4, 16):
        measure_steps(found, "llama3_8b ", config, text, batch, 1024)
    return found.rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--weights", choices=KINDS, help="one kind, in this process (default: all in turn)")
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers (default 1)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bandwidth", type=float, default=4.6, help="GB/ms of a pure read (default 4.6, an H200)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures one kind of weights, or each in a process of its own, and writes the table."""
    args = parse_args(argv)
    if args.weights is not None:
        write_csv(args.output, measure(args.weights, args))
        return
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            part = pathlib.Path(folder, "part.csv")
            options = ["--layers", str(args.layers), "--repeats", str(args.repeats), "--bandwidth", str(args.bandwidth)]
            command = [sys.executable, __file__, "--weights", kind, "--output", str(part), *options]
            subprocess.run(command, check=True)
            rows += read_csv(part)
    write_csv(args.output, rows)


if __name__ == "__main__":
    main()
