"""What the figures show of a table."""

from __future__ import annotations

import pathlib

import pytest

import plot_results

TABLE = """n,k,m,group_size,implementation,kernel,us,device
64,128,,128,read floor,4 CTAs/SM,3,a GPU
64,128,1,128,auto,a,6,a GPU
64,128,1,32,auto,a,60,a GPU
64,128,1,128,other,a,600,a GPU
64,128,1,,bf16,jax.jit,15,a GPU
64,128,1,,bf16,cuBLAS,12,a GPU
64,128,64,128,auto,a,12,a GPU
64,128,64,,bf16,jax.jit,9,a GPU
64,256,1,128,auto,a,4,a GPU
64,256,1,128,read floor,XLA xor,3,a GPU
"""


@pytest.fixture
def table(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "matmul.csv"
    path.write_text(TABLE)
    return path


def test_the_op_is_held_against_the_faster_bf16_product(table: pathlib.Path) -> None:
    times = plot_results.read_times([table], "auto", 128)
    assert times.speedup_over_bf16() == {(64, 128): {1: 2.0, 64: 0.75}, (64, 256): {}}


def test_the_read_floor_is_that_of_the_same_m_or_of_all(table: pathlib.Path) -> None:
    times = plot_results.read_times([table], "auto", 128)
    assert times.fraction_of_read_floor() == {(64, 128): {1: 0.5}, (64, 256): {1: 0.75}}


def test_the_same_table_gives_the_same_bytes(
    table: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[benchmarks]'")
    drawn = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setattr("sys.argv", ["plot_results.py", str(table), "--folder", str(folder)])
        plot_results.main()
        drawn.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert drawn[0] == drawn[1]
    assert sorted(drawn[0]) == ["fraction_of_read_floor.svg", "speedup_over_bf16.svg"]
