from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "tensor_parallel.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: the number of CPU devices is fixed when JAX first looks for them.
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("parts", "communication"), [(2, "{'all-reduce': 12}"), (1, "none")])
def test_it_runs_on_eight_devices_of_the_cpu(parts: int, communication: str) -> None:
    done = run("--parts", str(parts), "--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert f"8 devices, {{'prompts': {8 // parts}, 'part': {parts}}}" in done.stdout
    assert f"communication of 6 layers: {communication}" in done.stdout
    (difference,) = re.findall(r"largest difference ([\d.]+)", done.stdout)
    assert float(difference) < 0.02
    assert done.stdout.count("---\n") == 4


def test_parts_that_do_not_divide_the_devices_are_refused() -> None:
    done = run("--parts", "3")
    assert done.returncode == 1
    assert done.stderr == "tensor_parallel.py: 8 devices do not make whole groups of 3; choose another --parts\n"
