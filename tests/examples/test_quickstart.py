from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_quickstart_runs_and_its_figures_hold(capsys: pytest.CaptureFixture[str]):
    names = runpy.run_path(str(QUICKSTART))
    printed = capsys.readouterr().out
    dense, packed = (int(figure.replace(",", "")) for figure in re.findall(r"([\d,]+) as (?:bf16|int4)", printed))
    assert dense == 2 * 1024 * 512
    assert packed == names["w4"].nbytes == 1024 * 512 // 2 + 1024 // 64 * 512 * 4
    relative_error = float(re.search(r"relative error ([\d.]+)", printed)[1])
    # Uniform rounding of 64 normal values to 16 levels: step range / 15 = 4.7 / 15 sigma, error step / sqrt(12).
    assert relative_error == pytest.approx(4.7 / 15 / 12**0.5, rel=0.05)
