"""`inspect`: what a checkpoint holds, and how far its int4 weights are from those of another."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jax_int4mm import Int4Weight
from jax_int4mm.checkpoints import Checkpoint, load


def inspect_checkpoint(source: str, reference: str | None) -> dict[str, Any]:
    """A report of the checkpoint; with a reference each int4 weight is read and compared with the one there.

    Raises:
      ValueError: the reference lacks a weight, or has it in another shape.
    """
    checkpoint = load(source)
    original = None if reference is None else load(reference)
    rows = []
    for name, entry in checkpoint.entries.items():
        weights = math.prod(entry.shape)
        row: dict[str, Any] = {
            "name": name,
            "shape": list(entry.shape),
            "stored_as": entry.element_type,
            "group_size": entry.group_size,
            "bytes": entry.nbytes,
            "bits_per_weight": 8 * entry.nbytes / weights if weights else None,
            "requantized": entry.requantized,
        }
        if original is not None and entry.element_type == "int4":
            row |= _errors(name, checkpoint, original)
        rows.append(row)
    int4_rows = [row for row in rows if row["stored_as"] == "int4"]
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "reference": reference,
        "parameters": len(rows),
        "int4_parameters": len(int4_rows),
        "weights": sum(math.prod(row["shape"]) for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "bits_per_weight": _bits_per_weight(rows),
        "int4_bits_per_weight": _bits_per_weight(int4_rows),
        "tensors": rows,
    }


def print_inspection(report: dict[str, Any], console: Console) -> None:
    """The report as a table."""
    console.print(
        f"{report['path']}: format {report['format']}, {report['parameters']} parameters, "
        f"{report['weights']:,} weights in {report['bytes']:,} bytes, "
        f"{_bits(report['bits_per_weight'])} bits per weight",
        soft_wrap=True,
        highlight=False,
    )
    if report["int4_parameters"]:
        console.print(
            f"{report['int4_parameters']} in int4, {_bits(report['int4_bits_per_weight'])} bits per weight",
            highlight=False,
        )
    table = Table(box=None, header_style="bold")
    for column in ("name", "shape", "stored as"):
        table.add_column(column, no_wrap=True)
    columns = ["group", "bits/weight", "bytes"] + (
        ["mean |error|", "relative", "largest"] if report["reference"] else []
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["tensors"]:
        figures = [f"{row[key]:.3g}" if key in row else "" for key in ("mean_error", "relative_error", "largest_error")]
        table.add_row(
            row["name"],
            " x ".join(map(str, row["shape"])),
            row["stored_as"] + (" (anew)" if row["requantized"] else ""),
            str(row["group_size"] or ""),
            _bits(row["bits_per_weight"]),
            f"{row['bytes']:,}",
            *(figures if report["reference"] else []),
        )
    console.print(table)


def _bits(bits: float | None) -> str:
    return "" if bits is None else f"{bits:.2f}"


def _bits_per_weight(rows: list[dict[str, Any]]) -> float | None:
    weights = sum(math.prod(row["shape"]) for row in rows)
    return 8 * sum(row["bytes"] for row in rows) / weights if weights else None


def _errors(name: str, checkpoint: Checkpoint, original: Checkpoint) -> dict[str, float]:
    if name not in original:
        raise ValueError(f"{original.path} has no parameter {name!r} to compare with that of {checkpoint.path}")
    dense = [_dense(values[name]) for values in (checkpoint, original)]
    if dense[0].shape != dense[1].shape:
        raise ValueError(
            f"{name!r} is {list(dense[0].shape)} in {checkpoint.path} and {list(dense[1].shape)} in {original.path}"
        )
    return {key: float(value) for key, value in _error_figures(*dense).items()}


def _dense(value: np.ndarray | Int4Weight) -> jax.Array:
    return value.dequantize().T if isinstance(value, Int4Weight) else jnp.asarray(value)


@jax.jit
def _error_figures(found: jax.Array, expected: jax.Array) -> dict[str, jax.Array]:
    expected = expected.astype(jnp.float32)
    error = jnp.abs(found.astype(jnp.float32) - expected)
    return {
        "mean_error": error.mean(),
        "relative_error": jnp.sqrt((error**2).sum() / jnp.maximum((expected**2).sum(), jnp.finfo(jnp.float32).tiny)),
        "largest_error": error.max(),
    }
