"""`bench`: the scripts in `benchmarks/` of a source checkout, by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

import jax_int4mm

_PREFIX = "bench_"


def run_benchmark(arguments: list[str], console: Console) -> int:
    """Runs the benchmark that the first argument names with the others, or lists them; the exit status.

    Raises:
      FileNotFoundError: the package is not installed from a source checkout.
      ValueError: there is no such benchmark.
    """
    folder = Path(jax_int4mm.__file__).parent.parent / "benchmarks"
    scripts = {path.stem.removeprefix(_PREFIX): path for path in sorted(folder.glob(f"{_PREFIX}*.py"))}
    if not scripts:
        raise FileNotFoundError(
            "the benchmarks are part of the source and not of an installed package; clone the repository, install it "
            "with `pip install -e .` and run `jax-int4mm bench` again"
        )
    if not arguments or arguments[0] in ("--help", "-h"):
        for name, path in scripts.items():
            console.print(f"{name.replace('_', '-'):20} {_summary(path)}", soft_wrap=True, highlight=False)
        return 0
    name, *rest = arguments
    script = scripts.get(name.replace("-", "_"))
    if script is None:
        known = ", ".join(other.replace("_", "-") for other in scripts)
        raise ValueError(f"there is no benchmark {name!r}; there are {known}")
    return subprocess.run([sys.executable, str(script), *rest], check=False).returncode


def _summary(path: Path) -> str:
    """The first line of a script's docstring."""
    return path.read_text(encoding="utf-8").removeprefix('"""').splitlines()[0]
