"""A mesh over two processes gives the numbers of one process."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

PROCESSES = 2
DEVICES_OF_EACH = {"cpu": 2, "cuda": 1}

# A tensor-parallel MLP over all devices of all processes; each process saves the part of the result that it has.
RUN_MLP = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import jax_int4mm as i4
platform, address, processes, process, devices, folder, seed = sys.argv[1:]
jax.config.update("jax_platforms", platform)
if platform == "cpu":
    jax.config.update("jax_num_cpu_devices", int(devices))
if int(processes) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(processes), int(process))
assert jax.device_count() == int(processes) * int(devices)
rng = np.random.default_rng(int(seed))
x = rng.standard_normal((6, 256), np.float32).astype(jnp.bfloat16)
matrices = [rng.standard_normal(shape, np.float32) for shape in ((256, 512), (512, 256))]
host = jax.tree.map(np.asarray, [i4.quantize(w, group_size=64, dtype=jnp.bfloat16) for w in matrices])

def mlp(x, up, down):
    return jnp.tanh(x @ up) @ down

for axis_type in (AxisType.Auto, AxisType.Explicit):
    mesh = Mesh(np.array(jax.devices()), ("part",), axis_types=(axis_type,))
    def place(leaf, sharding):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
    placed = [
        jax.tree.map(place, w, w.shardings(NamedSharding(mesh, spec)))
        for w, spec in zip(host, (P(None, "part"), P("part")))
    ]
    everywhere = NamedSharding(mesh, P())
    program = jax.jit(mlp).lower(place(x, everywhere), *placed).compile()
    text = program.as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1, text
    y = program(place(x, everywhere), *placed)
    np.save(f"{folder}/{axis_type.name}-{process}.npy", np.asarray(y.addressable_shards[0].data, np.float32))
"""


def free_address() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def run(folder: pathlib.Path, platform: str, processes: int, devices: int, seed: int) -> dict[str, np.ndarray]:
    folder.mkdir()
    address = free_address()
    started = []
    for i in range(processes):
        arguments = platform, address, str(processes), str(i), str(devices), str(folder), str(seed)
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": ",".join(str(i * devices + j) for j in range(devices)),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # This process may hold most of a GPU's memory.
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", RUN_MLP, *arguments], stderr=subprocess.PIPE, text=True, env=environment
            )
        )
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    return {path.stem: np.load(path) for path in folder.glob("*.npy")}


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def test_a_tensor_parallel_mlp_over_two_processes(
    platform: str, rng: np.random.Generator, tmp_path: pathlib.Path
) -> None:
    seed = int(rng.integers(2**31))
    devices = DEVICES_OF_EACH[platform]
    several = run(tmp_path / "several", platform, PROCESSES, devices, seed)
    one = run(tmp_path / "one", platform, 1, PROCESSES * devices, seed)
    assert sorted(several) == ["Auto-0", "Auto-1", "Explicit-0", "Explicit-1"]
    for name, y in several.items():
        np.testing.assert_allclose(y, one[f"{name.split('-')[0]}-0"], rtol=2**-7, atol=1e-2, err_msg=name)
        assert np.abs(y).max() > 0
