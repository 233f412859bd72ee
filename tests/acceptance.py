"""When is a product right? The bounds that every implementation is held to, against a float64 product."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import oracle

# Up to this k a sum in f32, whatever its order, is near enough to the exact one for bounds in absolute terms.
SHORT_SUM = 1024


@dataclasses.dataclass(frozen=True)
class PlainDot:
    """How far off ``jnp.dot`` of the same operands, with an f32 sum, is on the device under test.

    Attributes:
      error: its largest error before the last rounding, for each unit of sum|w x|.
      differ: the share of its results that round to another number than the float64 product.
    """

    error: float
    differ: float


def check(outputs: Sequence[np.ndarray], xs: Sequence[np.ndarray], w: np.ndarray, device: jax.Device | None) -> None:
    """Raise AssertionError unless each output is x @ w^T for its x.

    Each number is held to a bound of its own. How many round to another number than the float64 product does is counted
    over all outputs: that is what tells a wrong dequantisation, which moves most results by less than the bound, from
    another order of summation, which moves few.

    Args:
      outputs: y [m, n] in x's dtype for each x.
      xs: activations [m, k], bfloat16 or float16.
      w: the weight [n, k] in x's dtype, or float64 if the kernel does not round it.
      device: where a plain dot is run to compare with, for long sums, float16, and large terms that cancel. None, for
        short sums of bfloat16, holds every output to the absolute bound.
    """
    for y, x in zip(outputs, xs, strict=True):
        assert y.shape == (len(x), len(w)), f"y has shape {y.shape}, not {(len(x), len(w))}"
        assert y.dtype == x.dtype, f"y has dtype {y.dtype}, not {x.dtype}"
    x, y = np.concatenate(xs), np.concatenate(outputs)
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    exact, magnitude = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
    plain = None if device is None else _measure_plain_dot(x, w, exact, magnitude, device)
    _check_each(y, exact, _bound(exact, magnitude, x.shape[1], x.dtype, plain))
    _check_how_many_differ(y, exact, x.shape[1], plain)


def _bound(exact: np.ndarray, magnitude: np.ndarray, k: int, dtype: np.dtype, plain: PlainDot | None) -> np.ndarray:
    bound = np.zeros_like(exact)
    if k <= SHORT_SUM and dtype == oracle.BFLOAT16:
        bound = oracle.ulp(np.maximum(np.abs(exact), 2.0**-16 * magnitude), dtype)
    elif k <= SHORT_SUM:
        bound = oracle.ulp(exact, dtype) + 2.0**-20 * magnitude
    if plain is not None:
        # Three times a plain dot's error, and then one rounding.
        error_of_sum = 3 * plain.error * magnitude
        bound = np.maximum(bound, error_of_sum + oracle.ulp(np.abs(exact) + error_of_sum, dtype) / 2)
    return bound


def _check_each(y: np.ndarray, exact: np.ndarray, bound: np.ndarray) -> None:
    wrong = ~(np.abs(y.astype(np.float64) - exact) <= bound)  # NaN is wrong too.
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {y.size} outputs are out of bounds, the first in row {row} of all and "
            f"column {column}: it is {y[row, column]} and must be {exact[row, column]} within {bound[row, column]}"
        )


def _check_how_many_differ(y: np.ndarray, exact: np.ndarray, k: int, plain: PlainDot | None) -> None:
    if k <= SHORT_SUM and y.dtype == oracle.BFLOAT16:
        share, rate = 0.005, 0.001
    else:
        # float16's numbers are eight times as dense as bfloat16's, and longer sums have larger errors.
        assert plain is not None, "long sums and float16 are compared with a plain dot: give a device"
        share, rate = 3 * plain.differ, 0.01
    differ = np.count_nonzero(y != oracle.round_once(exact, y.dtype))
    allowed = max(int(share * y.size), _rarely_exceeded(y.size, rate))
    assert differ <= allowed, (
        f"{differ} of {y.size} outputs ({differ / y.size:.2%}) are not the float64 product rounded once, and another "
        f"order of summation explains {allowed}: the weight is not the one that the kernel states"
    )


def _rarely_exceeded(size: int, rate: float) -> int:
    """The count that ``size`` events of this rate exceed once in a million runs.

    A share of few outputs says little: of 16, one is 6 % already. Right kernels were measured below the rates given
    here, so they pass at any size; a wrong dequantisation changes 40 % and stays caught.
    """
    return int(np.argmax(scipy.special.bdtrc(np.arange(size), size, rate) < 1e-6)) if size else 0


def _measure_plain_dot(
    x: np.ndarray, w: np.ndarray, exact: np.ndarray, magnitude: np.ndarray, device: jax.Device
) -> PlainDot:
    operands = jax.device_put((x, w.astype(np.float32) if w.dtype == np.float64 else w), device)
    y = np.asarray(_plain_dot(*operands))
    relative = np.abs(y - exact) / np.where(magnitude > 0, magnitude, 1)
    differ = np.count_nonzero(y.astype(x.dtype) != oracle.round_once(exact, x.dtype))
    return PlainDot(relative.max(initial=0.0), differ / max(y.size, 1))


# Without tuning: one of several matrix products of a GPU's library is as plain as another.
@functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
def _plain_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x.astype(w.dtype), w.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
