"""Who may import whom: the layers of the Python package and of the C++ sources."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jax_int4mm"
SOURCES = ROOT / "ffi"

# A module imports from lower layers and from its own folder, and a name that is not here has no place yet.
LAYERS = {
    "layout": 0,
    "ops": 1,
    "weight": 2,
    "tensor": 3,
    "explain": 4,
    "quantizers": 4,
    "nn": 5,
    "checkpoints": 5,
    "cli": 6,
}
# The package itself: `import jax_int4mm` needs jax and numpy alone.
PUBLIC_LAYER = 5

CORE_DEPENDENCIES = {"jax", "numpy"}
# What each of these brings is optional, and imported by nothing else.
MORE_DEPENDENCIES = {
    "nn": {"flax", "qwix"},
    "checkpoints": {"gguf", "huggingface_hub", "ml_dtypes", "safetensors"},
    "cli": {"rich", "typer"},
}
EXTENSIONS = {"_cpu", "_cuda"}
EXTENSIONS_OWNER = "ops._ffi"

# Includes that each part of ffi/ may have, by the first pattern that matches its path. System headers are free, but for
# those of XLA, nanobind and Python.
INCLUDES = [
    (r"core/", r"core/"),
    (r"handler/", r"core/|handler/|xla/"),
    (r"cpu/handlers\.cc", r"core/|cpu/|handler/|xla/|nanobind/|cuda/plan\.h$"),
    (r"cpu/kernels/", r"core/|cpu/kernels/|cpu/isa\.h$"),
    (r"cpu/", r"core/|cpu/"),
    (r"cuda/handlers\.cc", r"core/|cuda/|handler/|xla/|nanobind/"),
    (r"cuda/(\w+_)?plan\.|cuda/device\.h", r"core/|cuda/(\w+_)?plan\.h$|cuda/device\.h$|cuda/kernels/\w+/config\.h$"),
    (r"cuda/launch\.h", r"core/|cuda/plan\.h$|cuda/kernels/\w+/launch\.h$"),
    (r"cuda/kernels/\w+/launch\.", r"core/|cuda/kernels/|cuda/plan\.h$"),
    (r"cuda/kernels/", r"core/|cuda/kernels/"),
    (r"tests/", r"core/|cpu/|cuda/|tests/"),
]
FOREIGN = r"xla/|nanobind/|Python\.h"


def python_violations(module: str, source: str) -> list[str]:
    """What a module of the package, by its dotted name below jax_int4mm ("" for itself), imports and may not."""
    part = module.split(".")[0]
    layer = LAYERS.get(part, PUBLIC_LAYER) if module else PUBLIC_LAYER
    violations = [] if part in LAYERS or not module else [f"{module} has no layer: give it one"]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from jax_int4mm.ops import _ffi` imports a module, `from jax_int4mm.layout import tile_k` a name of one.
            names = [f"{'.' * node.level}{node.module or ''}"]
            if names == ["jax_int4mm"]:
                names = [f"jax_int4mm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and node.value in EXTENSIONS and module != EXTENSIONS_OWNER:
            violations.append(f"{module} names the extension {node.value}: only {EXTENSIONS_OWNER} does")
            continue
        else:
            continue
        violations += [message for name in names for message in _violations_of(module, part, layer, name)]
    return violations


def _violations_of(module: str, part: str, layer: int, name: str) -> list[str]:
    top, _, rest = name.partition(".")
    if top == "":
        return [f"{module} imports {name}: write imports from jax_int4mm"]
    if top != "jax_int4mm":
        allowed = CORE_DEPENDENCIES | MORE_DEPENDENCIES.get(part, set()) | sys.stdlib_module_names
        return [] if top in allowed else [f"{module} imports {top}, which is not for it"]
    imported = rest.split(".")[0]
    if imported in EXTENSIONS and module != EXTENSIONS_OWNER:
        return [f"{module} imports the extension {imported}: only {EXTENSIONS_OWNER} does"]
    if imported == part or LAYERS.get(imported, PUBLIC_LAYER) < layer:
        return []
    return [f"{module} imports {name}, which is not of a lower layer"]


def include_violations(path: str, source: str) -> list[str]:
    """What a file, by its path below ffi/, includes and may not."""
    allowed = next((allowed for pattern, allowed in INCLUDES if re.match(pattern, path)), None)
    if allowed is None:
        return [f"{path} is in no part of ffi/ that has an include rule: give it one"]
    violations = []
    for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', source, re.MULTILINE):
        governed = quote == '"' or re.match(FOREIGN, name)
        if governed and not re.match(allowed, name):
            violations.append(f"{path} includes {name}")
    return violations


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_python_imports_go_down(path: pathlib.Path) -> None:
    assert python_violations(module_name(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layout", "from jax_int4mm.ops import _ffi"),
        ("ops.reference", "import jax_int4mm.weight"),
        ("weight", "def f():\n  from jax_int4mm.quantizers import quantize"),
        ("explain", "from jax_int4mm import quantizers"),
        ("quantizers.rtn", "from jax_int4mm import explain"),
        ("checkpoints", "from jax_int4mm.nn import convert"),
        ("", "from jax_int4mm.checkpoints import load"),
        ("layout", "from . import weight"),
        ("weight", "import flax.nnx"),
        ("quantizers.rtn", "import safetensors"),
        ("layout", "import scipy"),
        ("weight", "from jax_int4mm import _cpu"),
        ("ops.dequantize", "import importlib\nimportlib.import_module(f'jax_int4mm.{x}', '_cuda')"),
        ("newcomer", "import jax"),
    ],
)
def test_a_python_import_that_goes_up_is_seen(module: str, source: str) -> None:
    assert len(python_violations(module, source)) == 1


def source_files() -> list[str]:
    suffixes = (".h", ".cc", ".cu", ".cuh")
    return sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*") if path.suffix in suffixes)


@pytest.mark.parametrize("path", source_files())
def test_includes_go_down(path: str) -> None:
    assert include_violations(path, (SOURCES / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/problem.cc", '#include "cpu/plan.h"'),
        ("core/layout.h", "#include <nanobind/nanobind.h>"),
        ("cpu/plan.cc", '#include "xla/ffi/api/ffi.h"'),
        ("cpu/launch.cc", '  #  include "cuda/plan.h"'),
        ("cpu/kernels/avx2.cc", '#include "cpu/plan.h"'),
        ("cpu/handlers.cc", '#include "cuda/kernels/ampere/launch.h"'),
        ("cuda/plan.cc", '#include "cuda/kernels/ampere/launch.h"'),
        ("cuda/plan.h", '#include "cpu/isa.h"'),
        ("cuda/kernels/ampere/kernel.cuh", '#include "cuda/plan.h"'),
        ("cuda/kernels/ampere/launch.cu", "#include <xla/ffi/api/ffi.h>"),
        ("cuda/kernels/decode/launch.cu", "#include <xla/ffi/api/ffi.h>"),
        ("cuda/decode_plan.cc", '#include "cuda/kernels/decode/launch.h"'),
        ("handler/call.h", '#include "cpu/plan.h"'),
        ("tests/cpu_plan_test.cc", '#include "xla/ffi/api/ffi.h"'),
        ("newcomer/file.h", "#include <vector>"),
    ],
)
def test_an_include_that_goes_up_is_seen(path: str, source: str) -> None:
    assert len(include_violations(path, source)) == 1


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_needs_jax_and_numpy_alone() -> None:
    code = """
import importlib.metadata, sys
needed = {"jax_int4mm", "numpy", "jax", "jaxlib", "ml_dtypes", "opt_einsum", "scipy"}  # The last three are jax's own.
others = set(importlib.metadata.packages_distributions()) - needed

class NoOthers:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in others:
            raise ImportError(f"{name} is not to be needed")

sys.meta_path.insert(0, NoOthers())
import jax_int4mm
"""
    run_python(code)


def test_importing_the_package_starts_no_backend() -> None:
    # JAX refuses this update once a backend is there.
    code = """
import jax, jax_int4mm
jax.config.update("jax_num_cpu_devices", 2)
print(len(jax.devices("cpu")))
"""
    assert run_python(code).strip() == "2"
