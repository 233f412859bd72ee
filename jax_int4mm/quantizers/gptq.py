"""GPTQ (Frantar et al., 2022): each row of w is rounded, and the rows after it make up for its error.

What counts is the error of ``x @ w`` over the inputs x of the calibration. GPTQ needs the Hessian x.T @ x of them only,
and a factor of it, such as the 2 / samples of the paper, changes nothing. A group takes its scale and zero, those of
round to nearest, when its first row is reached, from its values as they are by then. Differences from the paper's
implementation:

- Its lazy updates come once a group, with all errors before it, so that a group of any size begins with values that
  are up to date.
- The factor of the inverse Hessian comes from one Cholesky decomposition and one triangular inverse. The inverse
  itself, with its squared condition, is never formed.
- An input that is always 0 in the calibration keeps its weights, rounded to nearest, instead of zeros: other text may
  need them. Damping alone makes its place in the diagonal, and no error flows from it or to it.
- Where the damped Hessian has no Cholesky factor the damping grows, up to ``RETRIES`` times by ``DAMPING_GROWTH``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_int4mm.layout import as_array
from jax_int4mm.quantizers.rtn import errors, scale_and_zero

DAMPING = 0.01
DAMPING_GROWTH = 10.0
RETRIES = 4


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Hessian:
    """What GPTQ knows of the inputs of a layer: x.T @ x, summed over all inputs x so far. A pytree.

    Layers with the same inputs share one. Sums of Hessians are Hessians: ``jax.lax.psum`` adds those of devices.

    Attributes:
      matrix: [*stacked, k, k] float32.
    """

    matrix: jax.Array

    @classmethod
    def zeros(cls, k: int, stacked: tuple[int, ...] = ()) -> Hessian:
        """That of no inputs yet, for a weight [*stacked, k, n]."""
        return cls(jnp.zeros((*stacked, k, k), jnp.float32))

    def add(self, x: ArrayLike) -> Hessian:
        """This Hessian and that of x [*stacked, ..., k] floats.

        Raises:
          TypeError: x is no float array.
          ValueError: x is empty or of another shape.
        """
        x = as_array("Hessian.add", "x", x)
        *stacked, k, _ = self.matrix.shape
        _check_inputs("Hessian.add: x", x, tuple(stacked), k)
        return Hessian(_add(self.matrix, x))


def _check_inputs(what: str, x: jax.Array | np.ndarray, stacked: tuple[int, ...], k: int) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{what} has dtype {x.dtype}; it must be floats, what the weight will multiply.")
    leading = len(stacked)
    if x.ndim <= leading or x.shape[:leading] != stacked or x.shape[-1] != k or 0 in x.shape:
        form = ", ".join([*map(str, stacked), "...", str(k)])
        raise ValueError(
            f"{what} has shape {list(x.shape)}; it must be [{form}] with at least one sample: what the weight will "
            f"multiply, k = {k} values each."
        )


@jax.jit
def _add(matrix: jax.Array, x: jax.Array) -> jax.Array:
    *stacked, k, _ = matrix.shape
    samples = x.reshape(*stacked, -1, k).astype(jnp.float32)
    return matrix + jnp.einsum("...mi,...mj->...ij", samples, samples, precision=jax.lax.Precision.HIGHEST)


def hessian_of(calibration: ArrayLike | Iterable[ArrayLike] | Hessian, shape: tuple[int, ...]) -> jax.Array:
    """The matrix of the Hessian of what ``quantize`` was given as calibration for a weight of this shape."""
    *leading, k, _ = shape
    stacked = tuple(leading)
    if isinstance(calibration, Hessian):
        if calibration.matrix.shape != (*stacked, k, k):
            raise ValueError(
                f"quantize: calibration is a Hessian of shape {list(calibration.matrix.shape)}; for w {list(shape)} it "
                f"must be {[*stacked, k, k]}, of the activations that w will multiply."
            )
        hessian = calibration
    else:
        batches: Any = [calibration] if isinstance(calibration, (jax.Array, np.ndarray)) else calibration
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"quantize: calibration is a {type(calibration).__name__}; it must be a float array [..., k], an "
                "iterable of them, or a Hessian."
            )
        hessian = Hessian.zeros(k, stacked)
        samples = 0
        for batch in batches:
            x = as_array("quantize", "calibration", batch)
            _check_inputs("quantize: calibration", x, stacked, k)
            hessian = Hessian(_add(hessian.matrix, x))
            samples += math.prod(x.shape[len(stacked) : -1])
        if samples == 0:
            raise ValueError(
                "quantize: calibration has no batches; give at least one array [..., k]. An iterator that was read "
                "once is empty: give a list, or a Hessian."
            )
    matrix = jnp.asarray(hessian.matrix, jnp.float32)
    if not isinstance(matrix, jax.core.Tracer):
        if not bool(jnp.isfinite(matrix).all()):
            raise ValueError(
                "quantize: calibration holds values that are not finite, or whose squares float32 does not hold. "
                "Remove them from the activations."
            )
        if not bool(matrix.any()):
            raise ValueError(
                "quantize: calibration is 0 throughout, or its squares are in float32, and says nothing of the inputs. "
                'Give the activations that w will multiply, or take method="rtn".'
            )
    return matrix


def by_importance(hessian: jax.Array) -> jax.Array:
    """The order of k, int32, in which the inputs' mean squares decrease."""
    return jnp.argsort(jnp.diagonal(hessian), stable=True, descending=True).astype(jnp.int32)


def quantize_gptq(
    groups: jax.Array,
    counted: jax.Array,
    hessian: jax.Array,
    damping: jax.Array,
    *,
    symmetric: bool,
    dtype: np.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q of each weight, the scale and the zero of each group, and whether the Hessian could be used.

    Args:
      groups: [n, k/group_size, group_size] float32.
      counted: [k/group_size, group_size], 1 for weights and 0 for padding.
      hessian: [k, k] float32, k without padding, in the order of the groups.
      damping: part of the mean of the Hessian's diagonal that is added to it.
      symmetric: zero is 0.
      dtype: of scale and zero: bfloat16 or float16.

    Returns:
      q, f32 of the shape of groups; scale and zero, f32 [n, k/group_size] of values that dtype has; a bool. Where it is
      False, the result is that of round to nearest.
    """
    n, number, group_size = groups.shape
    factor, solved = _inverse_factor(hessian, damping, number * group_size)
    # A column of the factor is how much the errors of the rows before change a row.
    columns = factor.reshape(-1, number, group_size).transpose(1, 0, 2)

    def row(values: jax.Array, inputs: tuple[jax.Array, ...], scale: jax.Array, zero: jax.Array) -> Any:
        i, weights = inputs
        q, error = errors(values[i][:, None], scale, zero)
        error = error[:, 0] / weights[i]
        return values - weights[:, None] * error[None], (q[:, 0], error)

    def group(all_errors: jax.Array, inputs: tuple[jax.Array, ...]) -> Any:
        index, values, column, real = inputs
        before = all_errors.reshape(-1, n)
        values = values - jnp.einsum("kg,kn->gn", column, before, precision=jax.lax.Precision.HIGHEST)
        # The first row of a group is never padding.
        ranged = jnp.where(real[:, None] > 0, values, values[:1])
        scale, zero = scale_and_zero(ranged.min(axis=0), ranged.max(axis=0), symmetric=symmetric, dtype=dtype)
        own = column.reshape(number, group_size, group_size)[index]
        step = functools.partial(row, scale=scale, zero=zero)
        _, (q, found) = jax.lax.scan(step, values, (jnp.arange(group_size), own))
        return all_errors.at[index].set(found), (q, scale, zero)

    values = groups.transpose(1, 2, 0)
    inputs = (jnp.arange(number), values, columns, counted)
    _, (q, scale, zero) = jax.lax.scan(group, jnp.zeros_like(values), inputs)
    return q.transpose(2, 0, 1), scale.T, zero.T, solved


def _inverse_factor(hessian: jax.Array, damping: jax.Array, padded_k: int) -> tuple[jax.Array, jax.Array]:
    """The upper triangular U, [padded_k, padded_k], with U.T @ U the inverse of the damped Hessian; if there is one.

    Padding is as an input that is always 0.
    """
    k = hessian.shape[0]
    mean = jnp.trace(hessian) / k
    identity = jnp.eye(padded_k, dtype=jnp.float32)
    # In units of the mean of its diagonal. All zeros are damped to a multiple of the identity: round to nearest.
    scaled = jnp.pad(hessian / jnp.where(mean > 0, mean, 1), (0, padded_k - k))

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        tries, damping, _ = state
        damped = scaled + damping * identity
        # Rows and columns reversed, and reversed back: H = R @ R.T with R upper triangular, and U is its inverse.
        return tries + 1, damping * DAMPING_GROWTH, jnp.linalg.cholesky(damped[::-1, ::-1])

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tries, _, lower = state
        return (tries <= RETRIES) & ~jnp.isfinite(lower).all()

    start = jnp.int32(0), damping, jnp.full_like(identity, jnp.nan)
    _, _, lower = jax.lax.while_loop(failed, attempt, start)
    solved = jnp.isfinite(lower).all()
    lower = jnp.where(solved, lower, identity)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1], solved
