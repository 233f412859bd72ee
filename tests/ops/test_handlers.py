"""The handlers' own checks: a custom call that the package did not make gets an error, and no memory is touched."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_int4mm.ops import _ffi
from kernels import Kernel

# m = 3, n = 16, k = 256, group_size = 64. Results: y and the workspace.
RIGHT: dict[str, Any] = {
    "x": ((3, 256), jnp.bfloat16),
    "packed": ((2, 2, 32, 4), jnp.int32),
    "scales_and_zeros": ((4, 16, 2), jnp.bfloat16),
    "y": ((3, 16), jnp.bfloat16),
    "workspace": ((0,), jnp.uint8),
    "attributes": {"group_size": np.int64(64), "implementation": ""},
}


def call(buffers: dict[str, Any]) -> jax.Array:
    operands = [jnp.zeros(*buffers[name]) for name in ("x", "packed", "scales_and_zeros")]
    results = [jax.ShapeDtypeStruct(*buffers[name]) for name in ("y", "workspace")]
    y, _ = jax.ffi.ffi_call(_ffi.TARGET, results)(*operands, **buffers["attributes"])
    return y.block_until_ready()


def test_right_buffers_are_accepted(chosen: Kernel) -> None:
    np.testing.assert_array_equal(np.asarray(call(RIGHT), np.float32), np.zeros((3, 16)))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"x": ((3, 256), jnp.float32)}, "x must be bfloat16 or float16"),
        ({"x": ((3, 256), jnp.float16)}, "must have the same dtype"),
        ({"scales_and_zeros": ((4, 16, 2), jnp.float16)}, "must have the same dtype"),
        ({"y": ((3, 16), jnp.float16)}, "y must be float32 or have the same dtype as x"),
        ({"packed": ((2, 2, 32, 4), jnp.uint8)}, "packed must be int32"),
        ({"workspace": ((0,), jnp.float32)}, "workspace uint8"),
        ({"x": ((256,), jnp.bfloat16)}, r"x is \[256\].*\[m, k\]"),
        ({"x": ((3, 1, 256), jnp.bfloat16)}, r"x is \[3, 1, 256\].*\[m, k\]"),
        ({"x": ((3, 128), jnp.bfloat16)}, r"x is \[3, 128\].*k = 256"),
        ({"packed": ((16, 32), jnp.int32)}, r"packed \[16, 32\]"),
        ({"packed": ((2, 2, 16, 4), jnp.int32)}, r"packed \[2, 2, 16, 4\]"),
        ({"packed": ((2, 2, 32, 3), jnp.int32)}, "inner_k_tiles is 6"),
        ({"packed": ((0, 2, 32, 4), jnp.int32)}, "n and k must be positive"),
        ({"packed": ((2, 4, 32, 4), jnp.int32)}, r"x is \[3, 256\].*k = 512"),
        ({"packed": ((4, 2, 32, 4), jnp.int32)}, r"scales_and_zeros is \[4, 16, 2\].*\[4, 32, 2\]"),
        ({"scales_and_zeros": ((2, 16, 2), jnp.bfloat16)}, r"scales_and_zeros is \[2, 16, 2\].*\[4, 16, 2\]"),
        ({"scales_and_zeros": ((4, 16), jnp.bfloat16)}, r"scales_and_zeros is \[4, 16\].*\[4, 16, 2\]"),
        ({"y": ((4, 16), jnp.bfloat16)}, r"y is \[4, 16\].*\[3, 16\]"),
        ({"y": ((3, 8), jnp.bfloat16)}, r"y is \[3, 8\].*\[3, 16\]"),
        ({"attributes": {"group_size": np.int64(0), "implementation": ""}}, "group_size is 0.*32, 64, 128 or 256"),
        ({"attributes": {"group_size": np.int64(-64), "implementation": ""}}, "group_size is -64"),
        ({"attributes": {"group_size": np.int64(64), "implementation": "nonesuch"}}, '"nonesuch".*None to choose'),
        # XLA's own decoding refuses what the handler never sees.
        ({"attributes": {"group_size": "64", "implementation": ""}}, "Failed to decode"),
        ({"attributes": {"group_size": np.int64(64)}}, "Wrong number of attributes"),
    ],
    ids=str,
)
def test_wrong_buffers_are_an_error(chosen: Kernel, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s){sentence}"):
        call(RIGHT | wrong)


BATCH = RIGHT | {
    "x": ((5, 3, 256), jnp.bfloat16),
    "packed": ((5, 2, 2, 32, 4), jnp.int32),
    "scales_and_zeros": ((5, 4, 16, 2), jnp.bfloat16),
    "y": ((5, 3, 16), jnp.bfloat16),
}


@pytest.mark.parametrize("x", [(5, 3, 256), (3, 256)], ids=["own x", "shared x"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_a_batch_is_accepted(chosen: Kernel, x: tuple[int, ...], dtype: Any) -> None:
    y = call(BATCH | {"x": (x, jnp.bfloat16), "y": ((5, 3, 16), dtype)})
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.zeros((5, 3, 16)))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"x": ((4, 3, 256), jnp.bfloat16)}, r"x is \[4, 3, 256\].*a batch of 5.*\[m, k\] or \[batch, m, k\]"),
        ({"x": ((5, 3, 128), jnp.bfloat16)}, r"x is \[5, 3, 128\].*k = 256"),
        ({"scales_and_zeros": ((4, 16, 2), jnp.bfloat16)}, r"scales_and_zeros is \[4, 16, 2\].*\[5, 4, 16, 2\]"),
        ({"scales_and_zeros": ((4, 4, 16, 2), jnp.bfloat16)}, r"\[4, 4, 16, 2\].*must be \[5, 4, 16, 2\]"),
        ({"y": ((3, 16), jnp.bfloat16)}, r"y is \[3, 16\].*\[5, 3, 16\]"),
        ({"y": ((4, 3, 16), jnp.bfloat16)}, r"y is \[4, 3, 16\].*\[5, 3, 16\]"),
        ({"packed": ((5, 2, 2, 16, 4), jnp.int32)}, r"packed \[5, 2, 2, 16, 4\].*for a batch"),
        ({"packed": ((1, 5, 2, 2, 32, 4), jnp.int32)}, r"packed \[1, 5, 2, 2, 32, 4\]"),
    ],
    ids=str,
)
def test_wrong_buffers_of_a_batch_are_an_error(chosen: Kernel, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s){sentence}"):
        call(BATCH | wrong)


def test_a_group_size_that_does_not_divide_k_is_an_error(chosen: Kernel) -> None:
    wrong = {
        "x": ((3, 384), jnp.bfloat16),
        "packed": ((2, 3, 32, 4), jnp.int32),
        "scales_and_zeros": ((1, 16, 2), jnp.bfloat16),
        "attributes": {"group_size": np.int64(256), "implementation": ""},
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match="group_size 256 does not divide k, which is 384"):
        call(RIGHT | wrong)


def test_the_process_survives_an_error(chosen: Kernel) -> None:
    for _ in range(3):
        with pytest.raises(jax.errors.JaxRuntimeError):
            call(RIGHT | {"y": ((4, 16), jnp.bfloat16)})
        call(RIGHT)


# n = 16, k = 256, group_size = 64, which dequantize takes on CUDA alone.
RIGHT_TO_DEQUANTIZE: dict[str, Any] = {
    "packed": ((2, 2, 32, 4), jnp.int32),
    "scales_and_zeros": ((4, 16, 2), jnp.bfloat16),
    "w": ((16, 256), jnp.bfloat16),
    "attributes": {"group_size": np.int64(64)},
}


def call_dequantize(buffers: dict[str, Any]) -> jax.Array:
    with jax.default_device(jax.devices("cuda")[0]):
        operands = [jnp.zeros(*buffers[name]) for name in ("packed", "scales_and_zeros")]
        result = jax.ShapeDtypeStruct(*buffers["w"])
        w = jax.ffi.ffi_call(_ffi.DEQUANTIZE_TARGET, result)(*operands, **buffers["attributes"])
        return w.block_until_ready()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "right",
    [
        {},
        {
            "packed": ((3, 2, 2, 32, 4), jnp.int32),
            "scales_and_zeros": ((3, 4, 16, 2), jnp.bfloat16),
            "w": ((3, 16, 256), jnp.bfloat16),
        },
        {
            "packed": ((0, 2, 2, 32, 4), jnp.int32),
            "scales_and_zeros": ((0, 4, 16, 2), jnp.bfloat16),
            "w": ((0, 16, 256), jnp.bfloat16),
        },
    ],
    ids=["one weight", "a batch", "an empty batch"],
)
def test_right_buffers_to_dequantize_are_accepted(right: dict[str, Any]) -> None:
    assert not np.asarray(call_dequantize(RIGHT_TO_DEQUANTIZE | right), np.float32).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"scales_and_zeros": ((4, 16, 2), jnp.float32)}, "scales_and_zeros must be bfloat16 or float16"),
        ({"scales_and_zeros": ((4, 16, 2), jnp.float16)}, "must have the same dtype"),
        ({"w": ((16, 256), jnp.float32)}, "must have the same dtype"),
        ({"packed": ((2, 2, 32, 4), jnp.uint8)}, "packed must be int32"),
        ({"packed": ((16, 32), jnp.int32)}, r"packed is \[16, 32\].*\[n/8, k/\(16\*inner_k_tiles\)"),
        ({"packed": ((1, 1, 2, 2, 32, 4), jnp.int32)}, r"packed is \[1, 1, 2, 2, 32, 4\]"),
        ({"packed": ((2, 2, 16, 4), jnp.int32)}, r"packed is \[2, 2, 16, 4\]"),
        ({"packed": ((3, 2, 2, 16, 4), jnp.int32)}, r"packed is \[3, 2, 2, 16, 4\]"),
        ({"packed": ((2, 2, 32, 3), jnp.int32)}, "inner_k_tiles is 6"),
        ({"packed": ((0, 2, 32, 4), jnp.int32)}, "n and k must be positive"),
        ({"packed": ((4, 2, 32, 4), jnp.int32)}, r"scales_and_zeros is \[4, 16, 2\].*\[4, 32, 2\]"),
        ({"packed": ((3, 2, 2, 32, 4), jnp.int32)}, r"scales_and_zeros is \[4, 16, 2\].*\[3, 4, 16, 2\]"),
        ({"scales_and_zeros": ((2, 16, 2), jnp.bfloat16)}, r"scales_and_zeros is \[2, 16, 2\].*\[4, 16, 2\]"),
        ({"scales_and_zeros": ((1, 4, 16, 2), jnp.bfloat16)}, r"scales_and_zeros is \[1, 4, 16, 2\].*\[4, 16, 2\]"),
        ({"w": ((256, 16), jnp.bfloat16)}, r"w is \[256, 16\].*\[16, 256\]"),
        ({"w": ((1, 16, 256), jnp.bfloat16)}, r"w is \[1, 16, 256\].*\[16, 256\]"),
        ({"attributes": {"group_size": np.int64(48)}}, "group_size is 48.*32, 64, 128 or 256"),
        # XLA's own decoding refuses what the handler never sees.
        ({"attributes": {"group_size": "64"}}, "Failed to decode"),
        ({"attributes": {}}, "Wrong number of attributes"),
    ],
    ids=str,
)
def test_wrong_buffers_to_dequantize_are_an_error(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"(?s){sentence}"):
        call_dequantize(RIGHT_TO_DEQUANTIZE | wrong)
    call_dequantize(RIGHT_TO_DEQUANTIZE)
