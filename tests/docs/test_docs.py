"""Every Python block of the documentation runs as it stands, on its own."""

from __future__ import annotations

import re
import sys
import types
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ANY_PYTHON_FENCE = re.compile(r"^[ \t>]*[`~]{3,}[ \t]*py", re.IGNORECASE | re.MULTILINE)
OPTIONAL_IMPORT = re.compile(r"^(?:import|from) (torch|flax|equinox|qwix)\b", re.MULTILINE)


def _name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def _blocks() -> list[tuple[Path, int, str]]:
    """Page, line of the page that the source starts at, and source."""
    blocks = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks += [(page, text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in BLOCK.finditer(text)]
    return blocks


BLOCKS = _blocks()


@pytest.mark.parametrize(("page", "line", "source"), BLOCKS, ids=[f"{_name(page)}:{line}" for page, line, _ in BLOCKS])
def test_block_runs(page: Path, line: int, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONAL_IMPORT.findall(source):
        pytest.importorskip(name, reason=f"docs/{_name(page)}:{line} needs {name}")
    # Blank lines before the source make a traceback name the line of the page.
    code = compile("\n" * (line - 1) + source, str(page), "exec")
    program = types.ModuleType("__docs__")
    monkeypatch.setitem(sys.modules, program.__name__, program)  # Where dataclasses look for their module.
    with warnings.catch_warnings():
        if "qwix" in OPTIONAL_IMPORT.findall(source):
            warnings.simplefilter("ignore", DeprecationWarning)  # Of names of Flax that Qwix takes.
        exec(code, program.__dict__)


def test_no_python_block_is_missed() -> None:
    assert {"format.md", "from_pytorch.md"} <= {_name(page) for page in PAGES}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(BLOCK.findall(text)) == len(ANY_PYTHON_FENCE.findall(text)), page
