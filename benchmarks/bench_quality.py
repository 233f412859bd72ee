"""Measures what int4 costs the shipped byte-level model: perplexity by method and group size.

    python benchmarks/bench_quality.py --output benchmarks/results/cpu-2-cores/quality.csv

and draws docs/figures/quality.svg where matplotlib is installed. Each row is a whole model: `method` and `group_size`
of its linear layers, the bits that one of their weights takes, their bytes, and the perplexity of a byte of
`heldout.txt`, all of it. GPTQ is calibrated with text that the model was trained on and keeps the order of k; in
`gptq act_order` inputs with large values come first.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import generate
from calibrate import quantize_linears_gptq, spread_windows
from corpus import documents, joined, split
from decoder import LINEAR_NAMES, Params, params_from_huggingface
from decoder_config import Config
from jax_int4mm import checkpoints
from plot_results import FIGURES
from result_table import write_csv

GROUP_SIZES = (32, 64, 128, 256)
METHODS = ("rtn", "mse", "hqq", "gptq", "gptq act_order")


def row(
    method: str, group_size: int | None, params: Params, weights: int, config: Config, text: np.ndarray, windows: int
) -> dict[str, object]:
    """A model's row, printed as it is made."""
    size = generate.linear_bytes(params)
    found = {
        "method": method,
        "group_size": group_size or "",
        "bits_per_weight": round(8 * size / weights, 4),
        "linear_bytes": size,
        "perplexity": round(math.exp(generate.mean_nats(params, config, text, windows)), 4),
    }
    print(*found.values(), sep="\t", flush=True)
    return found


def draw(rows: Sequence[dict[str, object]], path: pathlib.Path) -> None:
    """Perplexity against group size, a line a method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "jax_int4mm", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        for method in METHODS:
            points = [(row["group_size"], row["perplexity"]) for row in rows if row["method"] == method]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=method)
        dense = next(row["perplexity"] for row in rows if row["method"] == "bf16")
        axes.axhline(float(str(dense)), color="grey", linestyle="--", label="bf16")
        axes.set_xscale("log", base=2)
        axes.set_xticks(GROUP_SIZES, list(map(str, GROUP_SIZES)))
        axes.set_xlabel("group size")
        axes.set_ylabel("perplexity per byte")
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Quantises the model in every way, writes the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--figure", type=pathlib.Path, default=FIGURES / "quality.svg")
    parser.add_argument("--windows", type=int, default=10**6, help="of the held-out text (default: all of it)")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=GROUP_SIZES)
    args = parser.parse_args(argv)
    checkpoint = checkpoints.load(generate.BYTE_MODEL)
    assert checkpoint.config is not None
    config = Config.from_huggingface(checkpoint.config)
    dense = params_from_huggingface(checkpoint, config, "bfloat16")
    weights = sum(layer[name].size for layer in dense["layers"] for name in LINEAR_NAMES)
    text = np.frombuffer((generate.BYTE_MODEL / "heldout.txt").read_bytes(), np.uint8)
    training, _, _ = split(documents())
    calibration = spread_windows(joined(training), config.max_position_embeddings, args.calibration_windows)
    rows = [row("bf16", None, dense, weights, config, text, args.windows)]
    for group_size in args.group_sizes:
        for method in METHODS:
            name, _, act_order = method.partition(" ")
            if name == "gptq":
                params = quantize_linears_gptq(dense, config, calibration, group_size, False, bool(act_order))
            else:
                params = generate.quantize_linears(dense, group_size, False, method)
            rows.append(row(method, group_size, params, weights, config, text, args.windows))
    write_csv(args.output, rows)
    if importlib.util.find_spec("matplotlib"):
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
