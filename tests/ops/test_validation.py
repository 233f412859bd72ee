"""Every wrong argument is a sentence when the call is traced: the op, what was given, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_int4mm as i4
from jax_int4mm.ops import _ffi

# n = 16, k = 256, group_size = 64.
RIGHT: dict[str, Any] = {
    "x": np.zeros((3, 256), jnp.bfloat16),
    "packed": np.zeros((2, 2, 32, 4), np.int32),
    "scales_and_zeros": np.zeros((4, 16, 2), jnp.bfloat16),
    "group_size": 64,
}


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> np.ndarray:
    return np.zeros(shape, dtype)


WRONG_X = {
    "no array": ({"x": [[0.0] * 256]}, TypeError, ["x is a list", "must be a jax or numpy array"]),
    "no dimensions": ({"x": shaped()}, ValueError, ["x has shape []", "k = 256", "x must be [..., k]"]),
    "another k": ({"x": shaped(3, 128)}, ValueError, ["x has shape [3, 128]", "k = 256", "x @ w4"]),
    "float32": ({"x": shaped(3, 256, dtype=np.float32)}, TypeError, ["x has dtype float32", "x.astype(bfloat16)"]),
    "integers": ({"x": shaped(3, 256, dtype=np.int8)}, TypeError, ["x has dtype int8", "x.astype(bfloat16)"]),
    "another dtype than the scales": (
        {"x": shaped(3, 256, dtype=np.float16)},
        TypeError,
        ["x has dtype float16", "scales_and_zeros bfloat16", "x.astype(bfloat16) or scales_and_zeros.astype(float16)"],
    ),
    "an unknown implementation": (
        {"implementation": "nonesuch"},
        ValueError,
        ['implementation "nonesuch"', '"scalar"', "implementation=None"],
    ),
    "another platform's implementation": (
        {"implementation": "ampere"},
        ValueError,
        ['implementation "ampere"', "this CPU", "implementation=None"],
    ),
}
WRONG_WEIGHT = {
    "packed no array": ({"packed": "0"}, TypeError, ["packed is a str", "must be a jax or numpy array"]),
    "packed bytes": (
        {"packed": shaped(16, 128, dtype=np.uint8)},
        TypeError,
        ["packed has dtype uint8", "pack_int4(q)", "pack_int4_bytes(b)"],
    ),
    "packed of rank 2": (
        {"packed": shaped(16, 32, dtype=np.int32)},
        ValueError,
        ["packed has shape [16, 32]", "[n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]", "pack_int4(q)"],
    ),
    "packed with 16 lanes": (
        {"packed": shaped(2, 2, 16, 4, dtype=np.int32)},
        ValueError,
        ["packed has shape [2, 2, 16, 4]", "pack_int4(q)"],
    ),
    "packed with inner_k_tiles 6": (
        {"packed": shaped(2, 2, 32, 3, dtype=np.int32)},
        ValueError,
        ["packed has shape [2, 2, 32, 3]", "inner_k_tiles 2, 4 or 8"],
    ),
    "packed empty": (
        {"packed": shaped(0, 2, 32, 4, dtype=np.int32)},
        ValueError,
        ["packed has shape [0, 2, 32, 4]", "pack_int4(q)"],
    ),
    "packed stacked": (
        {"packed": shaped(5, 2, 2, 32, 4, dtype=np.int32)},
        ValueError,
        ["packed has shape [5, 2, 2, 32, 4]", "[n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]"],
    ),
    "group_size no int": ({"group_size": 64.0}, TypeError, ["group_size is a float", "must be a Python int"]),
    "group_size 16": ({"group_size": 16}, ValueError, ["group_size is 16", "32, 64, 128 or 256", "requantise"]),
    "group_size 512": ({"group_size": 512}, ValueError, ["group_size is 512", "Repeat the scales"]),
    "group_size that does not divide k": (
        {"group_size": 256, "packed": shaped(2, 3, 32, 4, dtype=np.int32), "x": shaped(3, 384)},
        ValueError,
        ["group_size 256 does not divide k = 384", "quantize(w) pads k"],
    ),
    "scales no array": ({"scales_and_zeros": 1.0}, TypeError, ["scales_and_zeros is a float", "jax or numpy array"]),
    "scales in float32": (
        {"scales_and_zeros": shaped(4, 16, 2, dtype=np.float32)},
        TypeError,
        ["scales_and_zeros has dtype float32", "scales_and_zeros.astype(x.dtype)"],
    ),
    "scales of another group size": (
        {"scales_and_zeros": shaped(2, 16, 2)},
        ValueError,
        ["scales_and_zeros has shape [2, 16, 2]", "with group_size 64 it must be [k/group_size, n, 2] = [4, 16, 2]"],
    ),
    "scales with groups last": (
        {"scales_and_zeros": shaped(16, 4, 2)},
        ValueError,
        ["scales_and_zeros has shape [16, 4, 2]", "[k/group_size, n, 2] = [4, 16, 2]"],
    ),
    "scales without zeros": (
        {"scales_and_zeros": shaped(4, 16)},
        ValueError,
        ["scales_and_zeros has shape [4, 16]", "[k/group_size, n, 2] = [4, 16, 2]"],
    ),
}


def assert_refused(f: Callable[[], Any], error: type[Exception], op: str, parts: list[str]) -> None:
    with pytest.raises(error) as raised:
        f()
    message = str(raised.value)
    assert message.startswith(f"{op}: ")
    assert message.endswith(".")
    for part in parts:
        assert part in message


def parametrize(table: dict[str, tuple[dict[str, Any], type[Exception], list[str]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("wrong", "error", "parts"), table.values(), ids=table)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
@parametrize(WRONG_X | WRONG_WEIGHT)
def test_int4pack_mm_refuses(wrong: dict[str, Any], error: type[Exception], parts: list[str], traced: bool) -> None:
    arguments = RIGHT | wrong

    def trace() -> None:
        arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
        static = {name: value for name, value in arguments.items() if name not in arrays}
        jax.jit(lambda arrays: i4.int4pack_mm(**arrays, **static)).trace(arrays).lower(lowering_platforms=("cpu",))

    def call() -> None:
        with jax.default_device(jax.devices("cpu")[0]):
            i4.int4pack_mm(**arguments)

    assert_refused(trace if traced else call, error, "int4pack_mm", parts)


@parametrize(WRONG_WEIGHT)
def test_dequantize_refuses(wrong: dict[str, Any], error: type[Exception], parts: list[str]) -> None:
    arguments = {name: value for name, value in (RIGHT | wrong).items() if name != "x"}
    assert_refused(lambda: i4.dequantize(**arguments), error, "dequantize", parts)


def test_a_group_size_under_a_trace_is_named() -> None:
    def f(group_size: jax.Array) -> jax.Array:
        return i4.int4pack_mm(**(RIGHT | {"group_size": group_size}))

    parts = ["group_size is a", "a Python int, known when traced"]
    assert_refused(lambda: jax.jit(f)(64), TypeError, "int4pack_mm", parts)


def test_what_is_refused_is_wrong_by_itself() -> None:
    assert i4.int4pack_mm(**RIGHT).shape == (3, 16)
    assert i4.int4pack_mm(**(RIGHT | {"group_size": np.int64(64)})).shape == (3, 16)


@pytest.mark.parametrize("compute_capability", [70, 75])
def test_a_gpu_older_than_ampere_is_named(compute_capability: int) -> None:
    with pytest.raises(ValueError, match=rf'sm_{compute_capability};.*sm_80.*implementation="reference"'):
        _ffi.plan("cuda", _ffi.Problem(1, 8, 128, 128, 8, "bfloat16"), None, (compute_capability, 80))
