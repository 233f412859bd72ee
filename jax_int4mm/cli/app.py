"""The commands and their options."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

import jax_int4mm as i4
from jax_int4mm.checkpoints import CheckpointError, RequantizedWarning
from jax_int4mm.cli import EXIT_MISTAKE, EXIT_NO_PACKAGE
from jax_int4mm.cli.benchmarks import run_benchmark
from jax_int4mm.cli.conversion import convert_checkpoint, quantize_checkpoint
from jax_int4mm.cli.environment import environment, print_environment
from jax_int4mm.cli.inspection import inspect_checkpoint, print_inspection
from jax_int4mm.cli.rules_file import RulesFileError, read_rules
from jax_int4mm.quantizers import Recipe

EXIT_UNREADABLE = 3
EXIT_FILES = 4

_PIPE_WIDTH = 240

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="int4 checkpoints for jax_int4mm: quantise, convert and look into them.",
)

Method = Literal["rtn", "mse", "hqq"]
Dtype = Literal["bfloat16", "float16"]
Target = Literal["native", "torchao"]

Source = Annotated[
    str, typer.Argument(help="A Hugging Face directory, a safetensors or GGUF file, or hf://org/name.", metavar="SRC")
]
Destination = Annotated[Path, typer.Argument(help="The directory to make; it must not exist.", metavar="DST")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of scales and zeros; default: that of the file, or bfloat16.")
]
ShardSize = Annotated[float, typer.Option("--shard-gb", help="Gigabytes in one file at most.", min=1e-6)]


@app.command()
def quantize(
    source: Source,
    destination: Destination,
    method: Annotated[Method, typer.Option(help="How scales and zeros are chosen.")] = "hqq",
    group_size: Annotated[int, typer.Option(help="32, 64, 128 or 256 values of k with one scale.")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="No zeros; not with hqq.")] = False,
    rules: Annotated[Path | None, typer.Option(help="A TOML or JSON file of rules by name; docs/cli.md.")] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="The output projection, too.")] = False,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Embeddings, too.")] = False,
    routers: Annotated[bool, typer.Option("--routers", help="Routers of mixtures of experts, too.")] = False,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Weights that are int4 already, too; else they stay as they are.")
    ] = False,
    to: Annotated[Target, typer.Option(help="The format to write.")] = "native",
    dtype: DtypeOption = None,
    shard_gb: ShardSize = 4.0,
    as_json: Json = False,
) -> None:
    """Quantise a checkpoint of any format that is read, one parameter after the other."""
    with _sentences(as_json):
        recipe = Recipe(method, group_size, symmetric)
        chosen = read_rules(rules, recipe, lm_head=lm_head, embeddings=embeddings, routers=routers)
        report = quantize_checkpoint(
            source,
            destination,
            rules=chosen,
            requantize=requantize,
            format=to,
            dtype=dtype,
            shard_bytes=int(shard_gb * 1e9),
            quiet=as_json,
        )
        _print_conversion(report, as_json)


@app.command()
def convert(
    source: Source,
    destination: Destination,
    to: Annotated[Target, typer.Option(help="The format to write.")] = "native",
    dtype: DtypeOption = None,
    shard_gb: ShardSize = 4.0,
    as_json: Json = False,
) -> None:
    """Write an int4 checkpoint in another format, without quantising anything that need not be."""
    with _sentences(as_json):
        report = convert_checkpoint(
            source,
            destination,
            format=to,
            dtype=dtype,
            shard_bytes=int(shard_gb * 1e9),
            quiet=as_json,
        )
        _print_conversion(report, as_json)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint of any format that is read.")],
    reference: Annotated[
        str | None, typer.Option(help="The unquantised checkpoint: adds the errors of every int4 weight.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint's format and its parameters, their sizes and bits per weight."""
    with _sentences(as_json):
        report = inspect_checkpoint(source, reference)
        _print(report, as_json, print_inspection)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Run a benchmark of a source checkout: `jax-int4mm bench matmul --help`; without a name, list them."""
    with _sentences(False):
        raise typer.Exit(run_benchmark(context.args, _console()))


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions, devices, which kernels were built, and which would be chosen."""
    with _sentences(as_json):
        report = environment()
        _print(report, as_json, print_environment)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(i4.__version__)
        raise typer.Exit


@contextlib.contextmanager
def _sentences(as_json: bool) -> Iterator[None]:
    """Turns what a user can mend into one sentence and an exit code, and warnings into lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", RequantizedWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"jax-int4mm: warning: {message}", file=sys.stderr)
        try:
            yield
        except RulesFileError as error:
            _fail(error, EXIT_MISTAKE, as_json)
        except CheckpointError as error:
            _fail(error, EXIT_UNREADABLE, as_json)
        except ImportError as error:
            _fail(error, EXIT_NO_PACKAGE, as_json)
        except OSError as error:
            _fail(error, EXIT_FILES, as_json)
        except (TypeError, ValueError) as error:
            _fail(error, EXIT_MISTAKE, as_json)


def _fail(error: Exception, code: int, as_json: bool) -> None:
    if as_json:
        _print_json({"error": str(error), "exit_code": code})
    print(f"jax-int4mm: {error}", file=sys.stderr)
    raise typer.Exit(code)


def _print(report: dict[str, Any], as_json: bool, as_text: Callable[[dict[str, Any], Console], None]) -> None:
    if as_json:
        _print_json(report)
    else:
        as_text(report, _console())


def _console() -> Console:
    # A pipe has no width: nothing is to be cut there.
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2))


def _print_conversion(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(report)
        return
    print(
        f"{report['destination']}: {report['int4_parameters']} of {report['parameters']} parameters in int4, "
        f"{report['quantized_parameters']} of them quantised here\n"
        f"{report['source_bytes']:,} bytes became {report['bytes']:,} in {report['seconds']:.1f} s"
    )
