"""The Hopper plan's table is what its script makes of the committed measurements."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest

import fit_hopper_plan
from fit_hopper_plan import SHARED, Model, Timed

ROOT = pathlib.Path(__file__).parents[2]
SWEEP = ROOT / "benchmarks" / "results" / "h200" / "hopper_tiles.csv"
PLAN = ROOT / "ffi" / "cuda" / "hopper_plan.cc"


@pytest.fixture(scope="module")
def timed() -> list[Timed]:
    return fit_hopper_plan.read_timed(SWEEP)


def test_the_plan_has_the_fitted_numbers(timed: list[Timed]) -> None:
    model = Model(timed)
    p = model.fit()
    source = PLAN.read_text()
    table = {
        (int(rows), int(tokens)): (float(one), float(more))
        for one, more, rows, tokens in re.findall(r"\{([\d.]+), ([\d.]+)\},\s+// (\d+) x (\d+)", source)
    }
    assert sorted(table) == model.names
    for i, name in enumerate(model.names):
        np.testing.assert_allclose(table[name], p[len(SHARED) + 2 * i :][:2], rtol=0.02, err_msg=f"{name}")
    for name, fitted in zip(SHARED[1:], p[1:], strict=False):
        (written,) = re.findall(rf"double {name} = ([-\d.]+);", source)
        assert float(written) == pytest.approx(fitted, rel=0.05, abs=0.01), name


def test_it_chooses_nearly_the_fastest_tile(timed: list[Timed]) -> None:
    model = Model(timed)
    regrets = fit_hopper_plan.regrets(timed, model.estimate(model.fit()))
    assert len(regrets) == 128
    assert np.mean(regrets) < 1.005
    assert max(regrets) < 1.1


def test_other_lines_clusters_without_room_and_long_products_are_left_out(tmp_path: pathlib.Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text(
        "n,k,group_size,m,implementation,split_k,us\n"
        "4096,4096,128,64,cuBLAS,,12\n"
        "4096,4096,128,64,hopper/128x64,2,11\n"
        "4096,4096,128,64,hopper/128x64,4,19\n"  # 32 tiles by 4 are 128 CTAs.
        "4096,4096,128,2048,hopper/128x256,1,94\n"  # Long enough for the chip to slow down.
    )
    assert fit_hopper_plan.read_timed(table) == [Timed((4096, 4096, 128, 64), (128, 64), 2, 11.0)]
