"""Times quantising a model of Voxtral Mini 3B's shapes, and loading it from disk in bf16 and in int4.

    python benchmarks/bench_checkpoints.py --folder /tmp/voxtral --output benchmarks/results/h200/checkpoints.csv

4.7 G random weights: 32 layers of an audio encoder, the projector, 30 decoder layers, embeddings and an untied output
projection. Rows of the table, each the median of its repeats with the number of bytes that it is about:

- quantize METHOD: every linear layer of encoder and decoder from bf16 on the device, one after the other, compilation
  left out (`first_s` has it); bytes are those of the bf16 weights.
- save FORMAT: from the device to `--folder`.
- read FORMAT: the files of one format read into a buffer and dropped, as fast as one thread does it; where the system
  lets them be dropped from its cache before ("cold"), and where they are in it ("warm").
- load FORMAT: `checkpoints.load` and every parameter on the device, ready; cold and warm. On a CPU parameters are the
  mapped files themselves, of which that reads next to nothing.
- command METHOD: `jax-int4mm quantize` from the bf16 files to the native format, a process of its own from start to
  end; `peak_gb` is the most memory that it held on the host, files that it had mapped included. Left out without
  typer and rich.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import jax_int4mm as i4
from jax_int4mm import checkpoints
from result_table import write_csv

GROUP_SIZE = 32  # As in the model that ExecuTorch published times of.
METHODS = ("rtn", "mse", "hqq")
COMMAND_METHODS = ("rtn", "hqq")
Params = dict[str, jax.Array | i4.Int4Weight]


def voxtral_shapes(layers: float = 1.0) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape as Hugging Face stores it, and whether it is quantised; `layers` is the share that is kept."""
    audio = {"q_proj": (1280, 1280), "k_proj": (1280, 1280), "v_proj": (1280, 1280), "out_proj": (1280, 1280)}
    for i in range(max(1, int(32 * layers))):
        prefix = f"audio_tower.layers.{i}"
        yield from ((f"{prefix}.self_attn.{name}.weight", shape, True) for name, shape in audio.items())
        yield f"{prefix}.fc1.weight", (5120, 1280), True
        yield f"{prefix}.fc2.weight", (1280, 5120), True
    yield "multi_modal_projector.linear_1.weight", (3072, 5120), False
    yield "multi_modal_projector.linear_2.weight", (3072, 3072), False
    attention = {"q_proj": (4096, 3072), "k_proj": (1024, 3072), "v_proj": (1024, 3072), "o_proj": (3072, 4096)}
    mlp = {"gate_proj": (8192, 3072), "up_proj": (8192, 3072), "down_proj": (3072, 8192)}
    for i in range(max(1, int(30 * layers))):
        prefix = f"language_model.model.layers.{i}"
        yield from ((f"{prefix}.self_attn.{name}.weight", shape, True) for name, shape in attention.items())
        yield from ((f"{prefix}.mlp.{name}.weight", shape, True) for name, shape in mlp.items())
        yield f"{prefix}.input_layernorm.weight", (3072,), False
        yield f"{prefix}.post_attention_layernorm.weight", (3072,), False
    yield "language_model.model.embed_tokens.weight", (131072, 3072), False
    yield "language_model.lm_head.weight", (131072, 3072), True


def random_model(layers: float) -> Params:
    """The model in bf16 on the default device."""
    key = jax.random.key(0)
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16) * 0.02
        for i, (name, shape, _) in enumerate(voxtral_shapes(layers))
    }


def quantized(params: Params, names: set[str], method: str) -> Params:
    """The model with the named weights in int4."""
    return {
        name: i4.quantize(value.T, GROUP_SIZE, method) if name in names else value for name, value in params.items()
    }


def seconds(run: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None) -> list[float]:
    """What each of several runs takes until its arrays are ready; `before` is not counted."""
    taken = []
    for _ in range(repeats):
        before()
        begin = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - begin)
    return taken


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def drop_from_cache(folder: pathlib.Path) -> None:
    """Asks the system to forget what it holds of a checkpoint's files, of which it keeps what is still mapped."""
    gc.collect()
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(folder: pathlib.Path) -> None:
    """Reads a checkpoint's files and drops what was read."""
    buffer = bytearray(16 << 20)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load_all(folder: pathlib.Path) -> list[object]:
    """Every parameter of a checkpoint, on the default device."""
    return [jax.device_put(value) for value in checkpoints.load(folder).values()]


def run_command(source: pathlib.Path, destination: pathlib.Path, method: str) -> float:
    """Runs `jax-int4mm quantize`, the output projection included; the most memory that it held, in GB."""
    # What the system has as a child's maximum includes the parent's at its start; VmHWM begins anew.
    script = (
        "import sys\n"
        "from jax_int4mm.cli.app import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
    )
    options = ["--method", method, "--group-size", str(GROUP_SIZE), "--lm-head"]
    command = [sys.executable, "-c", script, "quantize", source, destination, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e9


def row(
    step: str, what: str, size: int, taken: list[float], first: float | None = None, peak_gb: float | None = None
) -> dict[str, object]:
    """A row of the table, printed as it is made."""
    median = statistics.median(taken)
    made = {
        "step": step,
        "what": what,
        "bytes": size,
        "median_s": round(median, 4),
        "least_s": round(min(taken), 4),
        "most_s": round(max(taken), 4),
        "first_s": "" if first is None else round(first, 4),
        "gb_per_s": round(size / median / 1e9, 3),
        "peak_gb": "" if peak_gb is None else round(peak_gb, 3),
    }
    print(*made.values(), sep="\t", flush=True)
    return made


def main() -> None:
    """Runs every step and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="made for the files, removed at the end")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers, for a machine with less memory")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, group size {GROUP_SIZE}")
    rows = []
    try:
        params = random_model(args.layers)
        names = {name for name, _, chosen in voxtral_shapes(args.layers) if chosen}
        dense_bytes = sum(params[name].nbytes for name in names)
        models = {"bf16": params}
        for method in METHODS:
            (first,) = seconds(lambda method=method: quantized(params, names, method), 1)
            taken = seconds(lambda method=method: quantized(params, names, method), args.repeats)
            rows.append(row("quantize", method, dense_bytes, taken, first))
        models["int4"] = quantized(params, names, "rtn")
        sizes = {kind: sum(value.nbytes for value in model.values()) for kind, model in models.items()}
        for kind, model in models.items():
            taken = seconds(lambda kind=kind, model=model: checkpoints.save(args.folder / kind, model), 1)
            rows.append(row("save", kind, sizes[kind], taken))
        models.clear()
        params.clear()
        for state in ("cold", "warm"):
            for kind, size in sizes.items():
                folder = args.folder / kind
                before = (lambda folder=folder: drop_from_cache(folder)) if state == "cold" else lambda: None
                for step, run in (("read", read_files), ("load", load_all)):
                    taken = seconds(lambda run=run, folder=folder: run(folder), args.repeats, before)
                    rows.append(row(f"{step} {state}", kind, size, taken))
        if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
            for method in COMMAND_METHODS:
                begin = time.perf_counter()
                peak_gb = run_command(args.folder / "bf16", args.folder / f"made-{method}", method)
                rows.append(row("command", method, sizes["bf16"], [time.perf_counter() - begin], peak_gb=peak_gb))
        write_csv(args.output, rows)
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
