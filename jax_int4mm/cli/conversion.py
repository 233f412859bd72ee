"""`quantize` and `convert`: from one checkpoint to another, one parameter after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_int4mm import Int4Weight, quantize
from jax_int4mm.checkpoints import Checkpoint, load, save
from jax_int4mm.ops.validation import ACTIVATION_DTYPES
from jax_int4mm.quantizers import Recipe, Rules

Value = np.ndarray | Int4Weight


def quantize_checkpoint(
    source: str,
    destination: Path,
    *,
    rules: Rules,
    requantize: bool,
    format: str,
    dtype: str | None,
    shard_bytes: int,
    quiet: bool,
) -> dict[str, Any]:
    """Quantises what the rules choose of a checkpoint; a report of what was done."""

    def convert(name: str, value: Value) -> Value:
        if isinstance(value, Int4Weight):
            if not requantize:
                return value
            value = np.asarray(value.dequantize().T)
        # Hugging Face's own matrices are linear layers and embeddings; more dimensions are convolutions' and experts'.
        recipe = rules.recipe(name, value.shape, value.dtype) if value.ndim == 2 else None
        return value if recipe is None else _quantized(name, value, recipe, dtype)

    return _write(load(source, dtype=dtype), destination, convert, format, shard_bytes, quiet)


def convert_checkpoint(
    source: str, destination: Path, *, format: str, dtype: str | None, shard_bytes: int, quiet: bool
) -> dict[str, Any]:
    """Writes an int4 checkpoint in another format; a report of what was done.

    Raises:
      ValueError: the checkpoint has no int4 weight.
    """
    checkpoint = load(source, dtype=dtype)
    if not any(entry.element_type == "int4" for entry in checkpoint.entries.values()):
        raise ValueError(f"{source} holds no int4 weight to convert; `jax-int4mm quantize` makes int4 weights of it")
    return _write(checkpoint, destination, lambda name, value: value, format, shard_bytes, quiet)


def _quantized(name: str, value: np.ndarray, recipe: Recipe, dtype: str | None) -> Int4Weight:
    to = dtype if dtype is not None else value.dtype if value.dtype in ACTIVATION_DTYPES else jnp.bfloat16
    try:
        return quantize(jnp.asarray(value).T, recipe.group_size, recipe.method, recipe.symmetric, dtype=to)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _write(
    checkpoint: Checkpoint,
    destination: Path,
    convert: Callable[[str, Value], Value],
    format: str,
    shard_bytes: int,
    quiet: bool,
) -> dict[str, Any]:
    begin = time.perf_counter()
    source_bytes = sum(entry.nbytes for entry in checkpoint.entries.values())
    report: dict[str, Any] = {
        "source": str(checkpoint.path),
        "source_format": checkpoint.format,
        "source_bytes": source_bytes,
        "destination": str(destination),
        "format": format,
        "parameters": len(checkpoint),
        "int4_parameters": 0,
        "quantized_parameters": 0,
    }
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        DownloadColumn(binary_units=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=source_bytes)

        def parameters() -> Iterator[tuple[str, Value]]:
            for name, entry in checkpoint.entries.items():
                progress.update(task, description=name)
                value = convert(name, checkpoint[name])
                if isinstance(value, Int4Weight):
                    report["int4_parameters"] += 1
                    report["quantized_parameters"] += entry.element_type != "int4" or entry.requantized is not None
                yield name, value
                progress.advance(task, entry.nbytes)

        directory = checkpoint.path if checkpoint.path.is_dir() else None
        save(
            destination,
            parameters(),
            format=format,
            config=checkpoint.config,
            companions=directory,
            shard_bytes=shard_bytes,
        )
    report["bytes"] = sum(entry.nbytes for entry in load(destination).entries.values())
    report["seconds"] = time.perf_counter() - begin
    return report
