"""The README shows code that runs: its first Python block is examples/quickstart.py."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_the_first_python_block_is_the_quick_start() -> None:
    readme = ROOT / "README.md"
    assert readme.is_file(), f"{readme} is missing"
    block = re.search(r"^```python\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)
    assert block, f"{readme} has no ```python block"
    assert block[1] == (ROOT / "examples" / "quickstart.py").read_text(), "copy examples/quickstart.py into README.md"
