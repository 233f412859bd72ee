"""The command, run in this process but where memory or a broken installation matters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import typer.testing

import jax_int4mm as i4
from jax_int4mm import checkpoints
from jax_int4mm.cli.app import app


def run(*arguments: object, code: int = 0) -> typer.testing.Result:
    result = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def run_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json", code=code).stdout)


def random_model(rng: np.random.Generator, dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    def matrix(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.02, shape).astype(dtype)

    return {
        "model.embed_tokens.weight": matrix(96, 128),
        "model.layers.0.mlp.up_proj.weight": matrix(256, 128),
        "model.layers.0.mlp.up_proj.bias": matrix(256),
        "model.layers.0.mlp.down_proj.weight": matrix(128, 256),
        "model.layers.0.mlp.gate.weight": matrix(4, 128),
        "model.norm.weight": np.ones(128, np.float32),
        "conv.weight": matrix(8, 8, 3),
        "lm_head.weight": matrix(96, 128),
    }


@pytest.fixture
def model(tmp_path: Path, rng: np.random.Generator) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    safetensors.numpy.save_file(random_model(rng), directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    return directory


def int4_names(path: Path) -> set[str]:
    entries = checkpoints.load(path).entries
    return {name for name, entry in entries.items() if entry.element_type == "int4"}


LINEAR = {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"}


def test_quantize(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    report = run_json("quantize", model, out, "--method", "mse", "--group-size", 64)
    assert report["parameters"] == 8
    assert report["int4_parameters"] == report["quantized_parameters"] == 2
    assert report["source_format"] == "safetensors"
    assert report["bytes"] < report["source_bytes"]
    assert int4_names(out) == LINEAR
    assert (out / "tokenizer.json").is_file()
    source, made = checkpoints.load(model), checkpoints.load(out)
    assert made.config == {
        "model_type": "llama",
        "quantization_config": {"quant_method": "jax_int4mm", "format_version": 1},
    }
    for name in source:
        found = made[name]
        if name in LINEAR:
            expected = i4.quantize(jnp.asarray(source[name]).T, 64, "mse")
            assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
        else:
            assert found.dtype == source[name].dtype
            np.testing.assert_array_equal(found, source[name])


def test_quantize_says_what_it_did(tmp_path: Path, model: Path) -> None:
    result = run("quantize", model, tmp_path / "out")
    assert "2 of 8 parameters in int4, 2 of them quantised here" in result.stdout


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--lm-head", {"lm_head.weight"}),
        ("--embeddings", {"model.embed_tokens.weight"}),
        ("--routers", {"model.layers.0.mlp.gate.weight"}),
    ],
)
def test_switches(tmp_path: Path, model: Path, option: str, names: set[str]) -> None:
    run("quantize", model, tmp_path / "out", option)
    assert int4_names(tmp_path / "out") == LINEAR | names


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_rules(tmp_path: Path, model: Path, suffix: str) -> None:
    rules = tmp_path / f"rules{suffix}"
    content = {
        "lm_head": True,
        "default": {"method": "rtn", "symmetric": True},
        "rules": [{"match": r"up_proj\.", "group_size": 32}, {"match": "down", "keep": True}],
    }
    toml = (
        "lm_head = true\n[default]\nmethod = 'rtn'\nsymmetric = true\n"
        "[[rules]]\nmatch = 'up_proj\\.'\ngroup_size = 32\n[[rules]]\nmatch = 'down'\nkeep = true\n"
    )
    rules.write_text(toml if suffix == ".toml" else json.dumps(content))
    run("quantize", model, tmp_path / "out", "--rules", rules)
    assert int4_names(tmp_path / "out") == {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    made = checkpoints.load(tmp_path / "out")
    up, head = made["model.layers.0.mlp.up_proj.weight"], made["lm_head.weight"]
    assert (up.group_size, head.group_size) == (32, 128)
    assert not np.asarray(up.scales_and_zeros[..., 1]).any()
    assert not np.asarray(head.scales_and_zeros[..., 1]).any()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("rules = 3", "rules that are not a list"),
        ("[[rules]]\nkeep = true", "rule 1: it needs 'match'"),
        ("[[rules]]\nmatch = '('\nkeep = true", "'(' is not a regular expression"),
        ("[[rules]]\nmatch = 'a'\nkeep = true\ngroup_size = 32", "rule 1: 'keep = true' leaves a weight as it is"),
        ("[[rules]]\nmatch = 'a'\nbits = 8", "rule 1: a recipe has 'group_size', 'method', 'symmetric', no more"),
        ("[default]\nmethod = 'awq'", "default: Recipe: method is 'awq'"),
        ("lm_head = 1", "has lm_head = 1; it must be true or false"),
        ("other = 1", "has 'other'; a rules file has 'default', 'rules'"),
        ("[", "is neither TOML nor, as *.json, JSON"),
    ],
)
def test_rules_files_that_are_none(tmp_path: Path, model: Path, content: str, sentence: str) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(content)
    result = run("quantize", model, tmp_path / "out", "--rules", rules, code=2)
    assert sentence in result.stderr
    assert str(rules) in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_rules_file_that_is_missing(tmp_path: Path, model: Path) -> None:
    result = run("quantize", model, tmp_path / "out", "--rules", tmp_path / "lost.toml", code=2)
    assert "lost.toml cannot be read" in result.stderr


def test_int4_weights_stay_unless_asked_for(tmp_path: Path, model: Path) -> None:
    run("quantize", model, tmp_path / "first", "--method", "rtn", "--group-size", 32)
    kept = run_json("quantize", tmp_path / "first", tmp_path / "second", "--group-size", 128)
    anew = run_json("quantize", tmp_path / "first", tmp_path / "third", "--group-size", 128, "--requantize")
    assert (kept["int4_parameters"], kept["quantized_parameters"]) == (2, 0)
    assert anew["int4_parameters"] == 2
    name = "model.layers.0.mlp.up_proj.weight"
    groups = [checkpoints.load(tmp_path / folder)[name].group_size for folder in ("first", "second", "third")]
    assert groups == [32, 32, 128]


def test_dtype_of_scales(tmp_path: Path, model: Path) -> None:
    run("quantize", model, tmp_path / "out", "--dtype", "float16")
    assert checkpoints.load(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].dtype == jnp.float16


@pytest.mark.parametrize("to", ["native", "torchao"])
def test_convert(tmp_path: Path, model: Path, to: str) -> None:
    run("quantize", model, tmp_path / "int4")
    report = run_json("convert", tmp_path / "int4", tmp_path / "out", "--to", to, "--shard-gb", 0.00005)
    assert (report["int4_parameters"], report["quantized_parameters"]) == (2, 0)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found, expected = checkpoints.load(tmp_path / "out"), checkpoints.load(tmp_path / "int4")
    for name in expected:
        assert all(map(np.array_equal, jax.tree.leaves(found[name]), jax.tree.leaves(expected[name])))


def test_converting_a_dense_model(tmp_path: Path, model: Path) -> None:
    result = run("convert", model, tmp_path / "out", code=2)
    assert "holds no int4 weight to convert; `jax-int4mm quantize` makes int4 weights of it" in result.stderr


def test_inspect(tmp_path: Path, model: Path) -> None:
    run("quantize", model, tmp_path / "out", "--method", "rtn")
    report = run_json("inspect", tmp_path / "out", "--reference", model)
    assert report["format"] == "jax_int4mm"
    assert report["int4_parameters"] == 2
    assert report["int4_bits_per_weight"] == 4.25
    assert report["weights"] == sum(int(np.prod(row["shape"])) for row in report["tensors"])
    rows = {row["name"]: row for row in report["tensors"]}
    name = "model.layers.0.mlp.up_proj.weight"
    original = checkpoints.load(model)[name].astype(np.float64)
    error = np.abs(np.asarray(checkpoints.load(tmp_path / "out")[name].dequantize().T, np.float64) - original)
    assert rows[name]["shape"] == [256, 128]
    assert rows[name]["stored_as"] == "int4"
    assert rows[name]["group_size"] == 128
    assert rows[name]["bytes"] == 256 * 128 * 4.25 / 8
    np.testing.assert_allclose(rows[name]["mean_error"], error.mean(), rtol=1e-4)
    np.testing.assert_allclose(rows[name]["largest_error"], error.max(), rtol=1e-4)
    np.testing.assert_allclose(
        rows[name]["relative_error"], np.linalg.norm(error) / np.linalg.norm(original), rtol=1e-4
    )
    assert "mean_error" not in rows["lm_head.weight"]
    assert rows["lm_head.weight"]["bits_per_weight"] == 16
    text = run("inspect", tmp_path / "out", "--reference", model).stdout
    assert "2 in int4, 4.25 bits per weight" in text
    assert all(name in text for name in rows)


def test_inspecting_against_another_model(tmp_path: Path, model: Path, rng: np.random.Generator) -> None:
    run("quantize", model, tmp_path / "out")
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"model.layers.0.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}, other)
    result = run("inspect", tmp_path / "out", "--reference", other, code=2)
    assert "has no parameter 'model.layers.0.mlp.down_proj.weight' to compare with" in result.stderr


def test_env() -> None:
    report = run_json("env")
    assert report["jax_int4mm"] == i4.__version__
    assert report["packages"]["jax"] == jax.__version__
    assert report["cpu_kernels"][-1] == "scalar"
    assert [row["tokens"] for row in report["chosen"]] == [1, 16, 64, 512, 4096]
    assert all(row["implementation"] for row in report["chosen"])
    assert "CPU kernels" in run("env").stdout


def test_version() -> None:
    assert run("--version").stdout.strip() == i4.__version__


def test_bench_lists_and_runs_the_suite() -> None:
    listed = run("bench").stdout
    assert "matmul" in listed
    assert "tensor-parallel" in listed
    assert "there is no benchmark 'lost'; there are backward," in run("bench", "lost", code=2).stderr


def test_bench_hands_arguments_on(capfd: pytest.CaptureFixture[str]) -> None:
    run("bench", "tensor-parallel", "--help")
    assert "usage: bench_tensor_parallel.py" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["quantize", "convert"])
def test_destinations_that_exist(tmp_path: Path, model: Path, command: str) -> None:
    run("quantize", model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    result = run(command, tmp_path / "out", tmp_path / "out", code=4)
    assert "there is something at" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_exit_codes_and_json_of_mistakes(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"12")
    assert "truncated" in run_json("inspect", broken, code=3)["error"]
    assert run_json("inspect", tmp_path / "nowhere", code=4)["exit_code"] == 4
    assert run_json("quantize", model, tmp_path / "out", "--group-size", 48, code=2)["exit_code"] == 2
    run("quantize", model, tmp_path / "out", "--method", "awq", code=2)
    run("unknown", code=2)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite(tmp_path: Path, model: Path, rng: np.random.Generator) -> None:
    tensors = random_model(rng)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    result = run("quantize", model, tmp_path / "out", code=2)
    assert "model.layers.0.mlp.up_proj.weight: quantize: the largest |w| is nan" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_memory_is_bounded_by_the_shard(tmp_path: Path) -> None:
    """A model in one shard is quantised with a peak below three times that shard."""
    rng = np.random.default_rng(0)
    shape = (2048, 4096)
    tensors = {f"layers.{i}.up.weight": rng.random(shape, np.float32).astype(ml_dtypes.bfloat16) for i in range(8)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    shard = (tmp_path / "model.safetensors").stat().st_size
    script = (
        "import resource, sys\n"
        "import jax, jax.numpy as jnp, typer, rich.progress, safetensors\n"
        "from jax_int4mm.cli.app import app\n"
        "jnp.zeros(1).block_until_ready()\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "app(['quantize', *sys.argv[1:], '--method', 'rtn'], standalone_mode=False)\n"
        "print((peak() - before) * 1024)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model.safetensors"), str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 3 * shard


def test_without_typer_the_command_says_what_to_install() -> None:
    script = "import sys; sys.modules['typer'] = None; from jax_int4mm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr == 'jax-int4mm needs typer: pip install "jax_int4mm[cli]"\n'
