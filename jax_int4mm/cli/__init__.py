"""The command `jax-int4mm`."""

from __future__ import annotations

import sys

# What the command ends with; docs/cli.md has the list.
EXIT_MISTAKE = 2
EXIT_NO_PACKAGE = 5


def main() -> None:
    """Runs the command line."""
    try:
        from jax_int4mm.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f'jax-int4mm needs {error.name}: pip install "jax_int4mm[cli]"', file=sys.stderr)
        sys.exit(EXIT_NO_PACKAGE)
    app()
