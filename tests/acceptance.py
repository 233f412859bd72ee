"""When is a product right? The bounds that every implementation is held to, against a float64 product."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import oracle

# Up to this k a sum in f32, whatever its order, is near enough to the exact one for bounds in absolute terms.
SHORT_SUM = 1024


@dataclasses.dataclass(frozen=True)
class Plain:
    """How far off a plain ``jnp`` dot of the same operands, with an f32 sum, is on the device under test.

    Attributes:
      error: its largest error before the last rounding, for each unit of ``Product.magnitude``.
      differ: the share of its results that round to another number than the float64 product.
    """

    error: float
    differ: float


@dataclasses.dataclass(frozen=True)
class Product:
    """What y = x @ w^T has to be: each [m, n].

    Attributes:
      exact: the float64 product.
      magnitude: sum over k of |w x|, which the rounding errors of any order of summation scale with.
      nearest: ``exact`` rounded once to x's dtype.
      k: length of the sums.
      plain: None to hold y to absolute bounds alone.
    """

    exact: np.ndarray
    magnitude: np.ndarray
    nearest: np.ndarray
    k: int
    plain: Plain | None

    def rows(self, m: int) -> Product:
        """The product of the first m rows of x."""
        return dataclasses.replace(self, exact=self.exact[:m], magnitude=self.magnitude[:m], nearest=self.nearest[:m])


def product(x: np.ndarray, w: np.ndarray, device: jax.Device | None = None) -> Product:
    """What x [m, k] in y's dtype times w [n, k] has to be.

    Args:
      x: activations.
      w: the weight, in x's dtype, or float64 if it is not rounded.
      device: where a plain dot is run to compare with. None is for bfloat16 sums of up to SHORT_SUM, without heavy
        cancellation of large terms.
    """
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    exact, magnitude = x64 @ w64.T, np.abs(x64) @ np.abs(w64).T
    nearest = oracle.round_once(exact, x.dtype)
    plain = None
    if device is not None:
        y = plain_dot(x, w, device)
        relative = np.abs(y - exact) / np.where(magnitude > 0, magnitude, 1)
        plain = Plain(relative.max(initial=0.0), np.count_nonzero(y.astype(x.dtype) != nearest) / max(y.size, 1))
    return Product(exact, magnitude, nearest, x.shape[1], plain)


def plain_dot(x: np.ndarray, w: np.ndarray, device: jax.Device) -> np.ndarray:
    """The f32 sums, [m, n], that JAX gives for the dense weight."""
    operands = jax.device_put((x, w.astype(np.float32) if w.dtype == np.float64 else w), device)
    # Without tuning: one of several matrix products of a GPU's library is as plain as another.
    dot = jax.jit(_plain_dot, compiler_options={"xla_gpu_autotune_level": 0})
    return np.asarray(dot(*operands))


def _plain_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(
        x.astype(w.dtype), w.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def check(outputs: Sequence[np.ndarray], products: Sequence[Product]) -> None:
    """Raise AssertionError unless each output is right for its product.

    Each number is held to a bound of its own. How many may round to another number than the float64 product does is
    counted over all outputs: that is what tells a wrong dequantisation, which moves most results by less than the
    bound, from another order of summation, which moves few.
    """
    for y, expected in zip(outputs, products, strict=True):
        assert y.shape == expected.exact.shape, f"y has shape {y.shape}, not {expected.exact.shape}"
        assert y.dtype == expected.nearest.dtype, f"y has dtype {y.dtype}, not {expected.nearest.dtype}"
        _check_each(y, expected)
    size = sum(y.size for y in outputs)
    differ = sum(np.count_nonzero(y != p.nearest) for y, p in zip(outputs, products, strict=True))
    allowed = _allowed_to_differ([(p.exact.size, _share_that_may_differ(p)) for p in products])
    assert differ <= allowed, (
        f"{differ} of {size} outputs ({differ / size:.2%}) are not the float64 product rounded once; "
        f"{allowed} may differ by the order of summation: the weight is not the one that dequantize returns"
    )


def _check_each(y: np.ndarray, expected: Product) -> None:
    error = np.abs(y.astype(np.float64) - expected.exact)
    bound = np.zeros_like(error)
    if expected.k <= SHORT_SUM:
        if y.dtype == oracle.BFLOAT16:
            bound = oracle.ulp(np.maximum(np.abs(expected.exact), 2.0**-16 * expected.magnitude), y.dtype)
        else:
            bound = oracle.ulp(expected.exact, y.dtype) + 2.0**-20 * expected.magnitude
    if expected.plain is not None:
        # Where large terms cancel, and in long sums: three times a plain dot's error, then one rounding.
        error_of_sum = 3 * expected.plain.error * expected.magnitude
        bound = np.maximum(bound, error_of_sum + oracle.ulp(np.abs(expected.exact) + error_of_sum, y.dtype) / 2)
    wrong = ~(error <= bound)  # NaN is wrong too.
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {y.size} outputs are out of bounds, the first y[{row}, {column}] = "
            f"{y[row, column]}: it must be {expected.exact[row, column]} within {bound[row, column]}"
        )


def _share_that_may_differ(expected: Product) -> float:
    # float16's numbers are eight times as dense as bfloat16's and sums of f32 round differently more often.
    if expected.k <= SHORT_SUM and expected.nearest.dtype == oracle.BFLOAT16:
        return 0.005
    assert expected.plain is not None, "sums this long, or of float16, are compared with a plain dot: give its device"
    return 3 * expected.plain.differ


def _allowed_to_differ(sizes_and_shares: Sequence[tuple[int, float]]) -> int:
    """The share of many outputs; of few, the count that a right kernel exceeds once in a million runs.

    A share of few outputs says little: of 16, one is 6 % already. Right kernels were measured below a third of the
    share, and below 0.1 % for sums of bfloat16; a wrong dequantisation changes 40 % and stays caught.
    """
    size = sum(size for size, _ in sizes_and_shares)
    if size == 0:
        return 0
    share = sum(size * share for size, share in sizes_and_shares) / size
    exceeded = scipy.special.bdtrc(np.arange(size), size, max(share / 3, 0.001))
    return max(int(share * size), int(np.argmax(exceeded < 1e-6)))
