"""What is read of a checkpoint, and when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jax_int4mm import checkpoints
from jax_int4mm.checkpoints.safetensors_files import SafetensorsFiles

DATA = Path(__file__).parent.parent / "data" / "checkpoints"
FIXTURES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
K_PROJ = "model.layers.0.self_attn.k_proj"

# Shapes and settings that the formats store as tensors.
READ_BY_LOAD = {
    "compressed": {"weight_shape"},
    "hqq": {"shape", "axis", "nbits", "packing"},
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that have been read."""
    names: list[str] = []
    read = SafetensorsFiles.__getitem__

    def recorded(files: SafetensorsFiles, name: str) -> np.ndarray:
        names.append(name)
        return read(files, name)

    monkeypatch.setattr(SafetensorsFiles, "__getitem__", recorded)
    return names


@pytest.mark.parametrize("fixture", FIXTURES)
def test_tensors_are_read_with_the_parameter_that_they_are_part_of(fixture: str, reads: list[str]):
    checkpoint = checkpoints.load(DATA / fixture)
    assert {name.rpartition(".")[2] for name in reads} == READ_BY_LOAD.get(fixture.split("_")[0], set())
    reads.clear()
    for entry in checkpoint.entries.values():
        assert entry.shape
        assert entry.nbytes
    assert f"{K_PROJ}.weight" in checkpoint
    assert reads == []
    checkpoint[f"{K_PROJ}.weight"]
    assert reads
    assert all(name.startswith(f"{K_PROJ}.") for name in reads)
    assert len(reads) == len(set(reads))


@pytest.mark.parametrize("fixture", FIXTURES)
def test_the_parts_of_a_parameter_are_counted_in_its_bytes(fixture: str, reads: list[str]):
    checkpoint = checkpoints.load(DATA / fixture)
    reads.clear()
    checkpoint[f"{K_PROJ}.weight"]
    parts = list(reads)
    files = SafetensorsFiles(DATA / fixture / "model.safetensors")
    assert checkpoint.entries[f"{K_PROJ}.weight"].nbytes == sum(files[name].nbytes for name in parts)
