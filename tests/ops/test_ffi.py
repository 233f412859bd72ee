"""A broken or missing extension is an ImportError that says what to run; never taken for a machine without GPU."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

import jax_int4mm

# Python's own finders alone, so that the copy is imported and not an editable installation.
IMPORT = """
import importlib.machinery, sys
sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__module__", "").startswith(("_frozen", "importlib"))]
sys.path.insert(0, sys.argv[1])
import jax_int4mm
"""

STUB_OF_A_CUDA_BUILD = """
built_with_cuda = True
"""


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the package as Python sources, without extensions."""
    package = pathlib.Path(jax_int4mm.__file__).parent
    shutil.copytree(package, tmp_path / "jax_int4mm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def import_error(folder: pathlib.Path) -> str:
    """The last line of what importing jax_int4mm from ``folder`` says."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, folder], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_source_tree_that_is_not_built(source: pathlib.Path) -> None:
    (source / "pyproject.toml").touch()
    message = import_error(source)
    assert message.startswith("ImportError: jax_int4mm: the compiled extension _cpu cannot be imported")
    assert str(source) in message
    assert 'pip install -e "."' in message


def test_an_installation_without_its_extension(source: pathlib.Path) -> None:
    message = import_error(source)
    assert "the compiled extension _cpu cannot be imported" in message
    assert "pip install --force-reinstall" in message


def test_a_broken_extension(source: pathlib.Path) -> None:
    (source / "jax_int4mm" / "_cpu.abi3.so").write_bytes(b"not a shared library")
    message = import_error(source)
    assert "the compiled extension _cpu cannot be imported" in message
    assert "_cpu.abi3.so" in message
    assert "pip install --force-reinstall" in message


def test_a_cuda_build_without_its_cuda_extension(source: pathlib.Path) -> None:
    (source / "jax_int4mm" / "_cpu.py").write_text(STUB_OF_A_CUDA_BUILD)
    message = import_error(source)
    assert "the compiled extension _cuda cannot be imported" in message
    assert "pip install --force-reinstall" in message
