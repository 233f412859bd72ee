"""int4pack_mm inside control flow, compiled ahead of time, under JAX's strict modes, and in another process."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jax_int4mm as i4
from jax_int4mm.ops import _ffi
from kernels import Kernel, int4_weight

GROUP_SIZE = 64

# Runs the exported program of a folder on the arrays there, saved as integers, and saves the bits of its result.
RUN_EXPORTED = """
import pathlib, sys
import jax, jax.numpy as jnp, numpy as np
import jax_int4mm
folder = pathlib.Path(sys.argv[1])
x, packed, scales_and_zeros = (np.load(folder / f"{name}.npy") for name in ("x", "packed", "scales_and_zeros"))
program = jax.export.deserialize(bytearray((folder / "program").read_bytes()))
y = program.call(x.view(jnp.bfloat16), packed, scales_and_zeros.view(jnp.bfloat16))
np.save(folder / "y.npy", np.asarray(y).view(np.uint16))
"""

# Compiles one product and prints how many programs came from the cache in the folder named first.
COUNT_CACHE_HITS = """
import sys
import jax, jax.numpy as jnp
import jax_int4mm as i4
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
w4 = i4.quantize(jnp.ones((256, 40), jnp.float32), group_size=64)
x = jnp.ones((3, 256), jnp.bfloat16)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
y = jax.jit(lambda x, w4: x @ w4)(x, w4)
assert (y == 256).all()
print(len(hits))
"""


@pytest.fixture
def square(rng: np.random.Generator) -> cases.Weight:
    return cases.random_weight(rng, 256, 256, GROUP_SIZE, 4)


def product(x: jax.Array, weight: cases.Weight) -> jax.Array:
    return i4.int4pack_mm(x, weight.packed, weight.scales_and_zeros, GROUP_SIZE)


def test_control_flow(chosen: Kernel, square: cases.Weight, rng: np.random.Generator) -> None:
    x = cases.random_x(rng, (5, 256))

    def layer(x: jax.Array) -> jax.Array:
        return jnp.tanh(product(x, square))

    one = jax.jit(layer)
    expected = one(one(one(x)))

    def counted(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda state: state[0] < 3, lambda state: (state[0] + 1, layer(state[1])), (0, x))[1]

    def chosen_branch(x: jax.Array, times: int) -> jax.Array:
        return jax.lax.switch(times, [lambda x: x, layer, lambda x: layer(layer(x)), counted], x)

    np.testing.assert_array_equal(jax.jit(counted)(x), expected)
    np.testing.assert_array_equal(jax.lax.fori_loop(0, 3, lambda _, x: layer(x), x), expected)
    np.testing.assert_array_equal(jax.jit(chosen_branch)(x, 3), expected)
    np.testing.assert_array_equal(jax.jit(chosen_branch)(x, 1), one(x))
    np.testing.assert_array_equal(jax.lax.cond(True, layer, lambda x: x, x), one(x))


def test_it_is_compiled_ahead_of_time(chosen: Kernel, square: cases.Weight, rng: np.random.Generator) -> None:
    operands = cases.random_x(rng, (5, 256)), square.packed, square.scales_and_zeros
    shapes = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in operands]
    compiled = jax.jit(lambda *operands: i4.int4pack_mm(*operands, GROUP_SIZE)).lower(*shapes).compile()
    np.testing.assert_array_equal(compiled(*operands), product(operands[0], square))


def test_debug_nans_finds_a_nan_of_x_and_no_other(
    chosen: Kernel, square: cases.Weight, rng: np.random.Generator
) -> None:
    x = cases.random_x(rng, (5, 256))
    with jax.debug_nans(True):
        product(x, square)
        x[2, 7] = np.nan
        with pytest.raises(FloatingPointError, match=r"nan.*int4pack_mm"):
            product(x, square)
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match=r"inf.*int4pack_mm"):
        i4.int4pack_mm(np.full((1, 256), 3e38, x.dtype), square.packed, square.scales_and_zeros * 100, GROUP_SIZE)


def test_strict_promotion(chosen: Kernel, square: cases.Weight, rng: np.random.Generator) -> None:
    x = cases.random_x(rng, (5, 256))
    expected = product(x, square)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        w4 = i4.Int4Weight(square.packed, square.scales_and_zeros, group_size=GROUP_SIZE, k=256, n=256)
        np.testing.assert_array_equal(jax.jit(lambda x, w4: x @ w4)(x, w4), expected)
        gradient = jax.grad(lambda x, w4: (x @ w4).astype(jnp.float32).sum(), (0, 1), allow_int=True)(x, w4)
        assert gradient[0].shape == x.shape
        w4.dequantize()
        i4.quantize(np.ones((256, 40), np.float32))


def test_an_exported_program_runs_in_another_process(
    square: cases.Weight, rng: np.random.Generator, tmp_path: pathlib.Path
) -> None:
    x = cases.random_x(rng, (5, 256))
    exported = jax.export.export(
        jax.jit(lambda *operands: i4.int4pack_mm(*operands, GROUP_SIZE)),
        platforms=["cpu", "cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(_ffi.TARGET)],
    )(x, square.packed, square.scales_and_zeros)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", x.view(np.uint16))
    np.save(tmp_path / "packed.npy", square.packed)
    np.save(tmp_path / "scales_and_zeros.npy", square.scales_and_zeros.view(np.uint16))
    subprocess.run([sys.executable, "-c", RUN_EXPORTED, tmp_path], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.asarray(product(x, square)).view(np.uint16))


def test_an_exported_program_takes_and_returns_int4_weights(square: cases.Weight, rng: np.random.Generator) -> None:
    x, w4 = cases.random_x(rng, (5, 256)), int4_weight(square)

    def f(x: jax.Array, layer: dict[str, i4.Int4Weight]) -> tuple[jax.Array, i4.Int4Weight]:
        w4 = layer["w"]
        return x @ w4, dataclasses.replace(w4, scales_and_zeros=w4.scales_and_zeros * 2)

    checks = [jax.export.DisabledSafetyCheck.custom_call(_ffi.TARGET)]
    program = jax.export.deserialize(jax.export.export(jax.jit(f), disabled_checks=checks)(x, {"w": w4}).serialize())
    y, doubled = program.call(x, {"w": w4})
    np.testing.assert_array_equal(y, x @ w4)
    assert isinstance(doubled, i4.Int4Weight)
    assert (doubled.group_size, doubled.shape) == (w4.group_size, w4.shape)
    np.testing.assert_array_equal(x @ doubled, 2 * y)


def test_the_compilation_cache_serves_another_process(tmp_path: pathlib.Path) -> None:
    def hits() -> int:
        command = [sys.executable, "-c", COUNT_CACHE_HITS, tmp_path]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert hits() == 0
    assert hits() > 0
