"""The compiled modules as files, and the build's search for nvcc, which needs CMake but no compiler."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from jax_int4mm.ops import _ffi

ROOT = Path(__file__).parents[1]
TOOLKIT = ROOT / "ffi" / "cuda" / "toolkit.cmake"
CMAKE = shutil.which("cmake")
READELF = shutil.which("readelf")

needs_cmake = pytest.mark.skipif(CMAKE is None, reason="no cmake on PATH")
needs_readelf = pytest.mark.skipif(READELF is None, reason="no readelf on PATH")


def module_file(name: str) -> Path:
    spec = importlib.util.find_spec(f"jax_int4mm.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"this build has no {name}")
    return Path(spec.origin)


def readelf(*arguments: object) -> str:
    return subprocess.run(
        [str(READELF), "--wide", *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


@needs_readelf
@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_module_needs_no_library_that_a_machine_may_lack(name: str) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("--dynamic", module_file(name)))
    assert "libc.so.6" in needed
    assert not [library for library in needed if re.match(r"lib(cuda|cudart|nvidia|python|jax)", library)]


@needs_readelf
@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_module_exports_its_init_function_alone(name: str) -> None:
    """A weak symbol is an inline function of the C++ library; a strong one would be ours."""
    exported = re.findall(r"GLOBAL\s+DEFAULT\s+(?!UND)\S+\s+(\S+)$", readelf("--dyn-syms", module_file(name)), re.M)
    assert exported == [f"PyInit_{name}"]


def test_cuda_module_is_there_where_the_build_says_so() -> None:
    module: ModuleType | None = _ffi._cuda
    assert (module is not None) == _ffi._cpu.built_with_cuda


def test_headers_are_those_of_the_oldest_jax() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (headers,) = (r for r in project["build-system"]["requires"] if r.startswith("jaxlib"))
    (oldest,) = (re.match(r"jax>=([\d.]+),", r) for r in project["project"]["dependencies"] if r.startswith("jax"))
    assert oldest is not None
    assert headers == f"jaxlib=={oldest[1]}.*"


class Machine:
    """A folder that stands for a machine: compilers that answer as nvcc does, and the build's choice among them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"PATH": str(root / "path")}
        self.defines: dict[str, object] = {"INT4MM_NVCC_OF_THE_SYSTEM": root / "none"}

    def nvcc(self, path: str, version: str = "13.0.88", *, compiles: bool = True, knows: tuple[int, ...] = ()) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        architectures = "\n".join(f"compute_{a}" for a in knows)
        file.write_text(
            "#!/bin/sh\n"
            'case "$1" in\n'
            f"  --version) echo 'Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}' ;;\n"
            f"  --list-gpu-arch) echo '{architectures}' ;;\n"
            f"  *) echo 'the host compiler is not supported'; exit {0 if compiles else 1} ;;\n"
            "esac\n"
        )
        file.chmod(0o755)
        return file

    def cmake(self, *commands: str) -> subprocess.CompletedProcess[str]:
        script = self.root / "script.cmake"
        defines = [f'set({name} "{value}")' for name, value in self.defines.items()]
        script.write_text("\n".join([f'include("{TOOLKIT}")', *defines, *commands]))
        return subprocess.run(
            [str(CMAKE), "-P", str(script)], cwd=self.root, env=self.environment, capture_output=True, text=True
        )

    def resolve(self, mode: str) -> subprocess.CompletedProcess[str]:
        return self.cmake(
            f"int4mm_resolve_cuda({mode})", 'message(STATUS "CHOSEN=${INT4MM_NVCC} ENABLED=${INT4MM_CUDA_ENABLED}")'
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def words(text: str) -> str:
    """CMake breaks its messages into lines."""
    return " ".join(text.split())


@needs_cmake
def test_nvcc_is_taken_from_the_most_explicit_place(machine: Machine) -> None:
    wheel = machine.nvcc("site/nvidia/cu13/bin/nvcc")
    machine.environment["PYTHONPATH"] = str(machine.root / "site")
    machine.defines["Python_EXECUTABLE"] = sys.executable
    chosen = [(wheel, "the nvidia-cuda-nvcc wheel")]

    machine.defines["INT4MM_NVCC_OF_THE_SYSTEM"] = machine.nvcc("system/nvcc")
    chosen.insert(0, (machine.root / "system/nvcc", "/usr/local/cuda"))
    chosen.insert(0, (machine.nvcc("path/nvcc"), "PATH"))
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        chosen.insert(0, (machine.nvcc(f"{variable}/bin/nvcc"), variable))
        machine.environment[variable] = str(machine.root / variable)
    machine.environment["CUDACXX"] = str(machine.nvcc("CUDACXX/nvcc-13"))
    chosen.insert(0, (machine.root / "CUDACXX/nvcc-13", "CUDACXX"))

    for nvcc, origin in chosen:
        result = machine.resolve("AUTO")
        assert result.returncode == 0, result.stderr
        assert f"CHOSEN={nvcc} ENABLED=ON" in result.stdout
        assert f"on, with nvcc 13.0.88, {nvcc} (from {origin})" in result.stdout
        nvcc.unlink()
    assert "CHOSEN= ENABLED=OFF" in machine.resolve("AUTO").stdout


@needs_cmake
@pytest.mark.parametrize(
    ("version", "compiles", "reason"),
    [
        ("12.3.107", True, "is nvcc 12.3.107, older than 12.4"),
        ("13.0.88", False, "cannot compile an empty kernel here: the host compiler is not supported"),
    ],
)
def test_nvcc_that_will_not_do_is_passed_over(machine: Machine, version: str, compiles: bool, reason: str) -> None:
    bad = machine.nvcc("bad/nvcc", version, compiles=compiles)
    machine.environment["CUDACXX"] = str(bad)
    result = machine.resolve("ON")
    assert result.returncode != 0
    assert f"{bad} (from CUDACXX)" in words(result.stderr)
    assert reason in words(result.stderr)
    good = machine.nvcc("path/nvcc", "12.4.99")
    assert f"CHOSEN={good} ENABLED=ON" in machine.resolve("ON").stdout


@needs_cmake
def test_auto_without_nvcc_says_how_to_get_it(machine: Machine) -> None:
    result = machine.resolve("AUTO")
    assert result.returncode == 0, result.stderr
    assert "CHOSEN= ENABLED=OFF" in result.stdout
    assert "JAX_INT4MM_CUDA=ON pip install ." in words(result.stdout)


@needs_cmake
def test_on_without_nvcc_fails_with_the_remedy(machine: Machine) -> None:
    result = machine.resolve("ON")
    assert result.returncode != 0
    assert "set CUDACXX to its nvcc" in words(result.stderr)
    assert "JAX_INT4MM_CUDA=OFF" in words(result.stderr)


@needs_cmake
def test_off_does_not_look(machine: Machine) -> None:
    machine.nvcc("path/nvcc")
    assert "CHOSEN= ENABLED=OFF" in machine.resolve("OFF").stdout


@needs_cmake
def test_another_mode_is_an_error(machine: Machine) -> None:
    result = machine.resolve("yes")
    assert result.returncode != 0
    assert 'JAX_INT4MM_CUDA is "yes"; it must be ON, OFF or AUTO' in words(result.stderr)


@needs_cmake
@pytest.mark.parametrize(
    ("knows", "expected"),
    [
        ((50, 80, 86, 87, 89, 90), "80-real;86-real;89-real;90a-real;90-virtual"),
        (
            (75, 80, 86, 89, 90, 100, 103, 110, 120, 121),
            "80-real;86-real;89-real;90a-real;100-real;120-real;120-virtual",
        ),
    ],
)
def test_architectures_are_those_that_nvcc_knows(machine: Machine, knows: tuple[int, ...], expected: str) -> None:
    machine.defines["INT4MM_NVCC"] = machine.nvcc("nvcc", knows=knows)
    result = machine.cmake("int4mm_cuda_architectures(list)", 'message(STATUS "LIST=${list}.")')
    assert f"LIST={expected}." in result.stdout, result.stderr
