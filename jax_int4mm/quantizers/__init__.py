"""Quantisers: float matrices to :class:`jax_int4mm.Int4Weight`."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_int4mm.layout import as_array, check_inner_k_tiles, pack_int4
from jax_int4mm.ops.validation import ACTIVATION_DTYPES, check_group_size
from jax_int4mm.quantizers.gptq import DAMPING, Hessian, by_importance, hessian_of, quantize_gptq
from jax_int4mm.quantizers.hqq import quantize_hqq
from jax_int4mm.quantizers.mse import quantize_mse
from jax_int4mm.quantizers.report import QuantizedLayer, Report
from jax_int4mm.quantizers.rtn import nearest, quantize_rtn
from jax_int4mm.quantizers.rules import Recipe, Rules, is_array, path_name
from jax_int4mm.tensor import Int4Tensor, as_matrices
from jax_int4mm.weight import Int4Weight, padded_size

METHODS = ("rtn", "mse", "hqq", "gptq")

__all__ = [
    "METHODS",
    "Hessian",
    "QuantizedLayer",
    "Recipe",
    "Report",
    "Rules",
    "quantize",
    "quantize_tensor",
    "quantize_tree",
]


def quantize(
    w: ArrayLike,
    group_size: int = 128,
    method: str = "rtn",
    symmetric: bool = False,
    dtype: DTypeLike | None = None,
    inner_k_tiles: int = 8,
    *,
    calibration: ArrayLike | Iterable[ArrayLike] | Hessian | None = None,
    act_order: bool = False,
    damping: float = DAMPING,
) -> Int4Weight:
    """Quantise a matrix to int4 in groups of ``group_size`` along k.

    Args:
      w: [*stacked, k, n] floats: the matrix you would write ``x @ w`` with. k and n are free; padding to the packed
        format's multiples is made here, once.
      group_size: 32, 64, 128 or 256 values of k that share a scale and a zero.
      method: "rtn", round to nearest between each group's minimum and maximum (:mod:`jax_int4mm.quantizers.rtn`);
        "mse", the same with the range clipped to the least squared error (:mod:`jax_int4mm.quantizers.mse`); "hqq",
        zeros chosen so that few errors are large (:mod:`jax_int4mm.quantizers.hqq`); "gptq", rounded one value of k
        after the other so that ``x @ w`` of the calibration's x changes little (:mod:`jax_int4mm.quantizers.gptq`).
      symmetric: no zeros: the range is symmetric around 0. Not with "hqq", which is a choice of zeros.
      dtype: bfloat16 or float16, of scales, zeros and the activations that the weight will multiply; None for w's
        dtype if it is one of these, else bfloat16.
      inner_k_tiles: 2, 4 or 8, the packed format's parameter. 8 is what torchao's checkpoints have.
      calibration: with "gptq": the activations x that w will multiply, [*stacked, ..., k] floats; or an iterable of
        such arrays, read one at a time; or the :class:`~jax_int4mm.quantizers.gptq.Hessian` of them, which layers with
        the same inputs share.
      act_order: with "gptq": the values of k with the largest inputs are rounded first, and grouped together; the
        result has a ``perm``.
      damping: with "gptq": the part of the mean of the Hessian's diagonal that is added to it, greater than 0.

    Returns:
      An :class:`Int4Weight` of logical shape [*stacked, k, n].

    Raises:
      TypeError: w is no float array, dtype is neither bfloat16 nor float16, or calibration or damping is not as above.
      ValueError: w has fewer than two dimensions or an empty one, holds (where it is concrete) a value that is not
        finite or too large for dtype, or group_size, method or inner_k_tiles is not one of the above, or "hqq" is to be
        symmetric. "gptq" has no calibration, or it is empty or of another shape, or (where it is concrete) not finite,
        0 throughout or without a Cholesky factor; or another method was given what is for "gptq".
    """
    w = as_array("quantize", "w", w)
    group_size = check_group_size("quantize", group_size)
    check_inner_k_tiles("quantize", inner_k_tiles)
    if method not in METHODS:
        raise ValueError(f"quantize: method is {method!r}; it must be one of {', '.join(map(repr, METHODS))}.")
    if symmetric and method == "hqq":
        raise ValueError(
            'quantize: method is "hqq" and symmetric True; HQQ is a choice of zeros, which a symmetric weight does not '
            'have. Take method="mse" for a symmetric weight with a searched range, or symmetric=False.'
        )
    _check_gptq_options(method, calibration, act_order, damping)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"quantize: w has dtype {w.dtype}; it must be a float matrix. Pack integers with pack_int4(q).")
    if dtype is None:
        dtype = w.dtype if w.dtype in ACTIVATION_DTYPES else jnp.bfloat16
    dtype = jnp.dtype(dtype)
    if dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"quantize: dtype is {dtype}; it must be bfloat16 or float16, that of the activations.")
    if w.ndim < 2 or 0 in w.shape:
        raise ValueError(f"quantize: w has shape {list(w.shape)}; it must be [k, n], or stacked [..., k, n].")
    if not isinstance(w, jax.core.Tracer):
        w = jnp.asarray(w)
        _check_range(w, dtype)
    packed, scales_and_zeros, perm, solved = _quantize_stack(
        w,
        None if calibration is None else hessian_of(calibration, w.shape),
        jnp.float32(damping),
        group_size=group_size,
        method=method,
        symmetric=bool(symmetric),
        dtype=dtype,
        inner_k_tiles=inner_k_tiles,
        act_order=bool(act_order),
    )
    if solved is not None and not isinstance(solved, jax.core.Tracer) and not solved.all():
        raise ValueError(
            f"quantize: the Hessian of calibration has no Cholesky factor with damping {damping:g}, nor with a greater "
            f"one that was tried. Take a greater damping; {DAMPING} is usual."
        )
    k, n = w.shape[-2:]
    return Int4Weight(packed, scales_and_zeros, perm, group_size=group_size, k=k, n=n)


def _check_gptq_options(method: str, calibration: object, act_order: bool, damping: float) -> None:
    if method == "gptq":
        if calibration is None:
            raise ValueError(
                'quantize: method is "gptq" and there is no calibration; it must be the activations that w will '
                'multiply, [..., k]. Without any take method="mse".'
            )
        if isinstance(damping, bool) or not isinstance(damping, (int, float, np.number)):
            raise TypeError(f"quantize: damping is a {type(damping).__name__}; it must be a Python float.")
        if not 0 < damping < math.inf:
            raise ValueError(f"quantize: damping is {damping:g}; it must be greater than 0, as {DAMPING} is.")
        return
    given = {"calibration": calibration is not None, "act_order": bool(act_order), "damping": damping != DAMPING}
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f'quantize: {name} is given and method is "{method}", which does not use it. Take method="gptq", or '
                f"leave {name} out."
            )


def _check_range(w: jax.Array, dtype: np.dtype) -> None:
    # NaNs are looked for apart: on a CPU a maximum may pass over them.
    largest = math.nan if jnp.isnan(w).any() else float(jnp.abs(w).max())
    limit = float(jnp.finfo(dtype).max) / 2  # Half of it, so that no group's range overflows.
    if not largest <= limit:
        raise ValueError(
            f"quantize: the largest |w| is {largest:.4g}; it must be a number of at most {limit:.4g} for scales in "
            f"{dtype}. Remove what is not finite from w; bfloat16 scales (dtype=jnp.bfloat16) represent what float16 "
            "does not."
        )


Leaves = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
OPTIONS = ("group_size", "method", "symmetric", "dtype", "inner_k_tiles", "act_order")


@functools.partial(jax.jit, static_argnames=OPTIONS)
def _quantize_stack(w: jax.Array, hessian: jax.Array | None, damping: jax.Array, **options: Any) -> Leaves:
    """The leaves of a matrix, or of a stack, one matrix after the other: what is needed meanwhile is that of one."""

    def one(matrices: tuple[jax.Array, jax.Array | None]) -> Leaves:
        return _quantize_one(*matrices, damping, **options)

    stacked = w.shape[:-2]
    if not stacked:
        return one((w, hessian))
    leaves = jax.lax.map(one, jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), (w, hessian)))
    return jax.tree.map(lambda a: a.reshape(*stacked, *a.shape[1:]), leaves)


def _quantize_one(
    w: jax.Array,
    hessian: jax.Array | None,
    damping: jax.Array,
    *,
    group_size: int,
    method: str,
    symmetric: bool,
    dtype: np.dtype,
    inner_k_tiles: int,
    act_order: bool,
) -> Leaves:
    """packed, scales_and_zeros, perm and, of GPTQ, whether its Hessian could be used."""
    perm = solved = None
    if hessian is not None and act_order:
        perm = by_importance(hessian)
        w, hessian = w[perm], hessian[perm][:, perm]
    k, n = w.shape
    padded_n, padded_k = padded_size(n, k, group_size, inner_k_tiles)
    whole_k = -(-k // group_size) * group_size
    # A last group that is not full takes its range from what it has: repeating the last value adds nothing to it.
    rows = jnp.pad(w.T.astype(jnp.float32), [(0, 0), (0, whole_k - k)], mode="edge")
    groups = rows.reshape(n, whole_k // group_size, group_size)
    counted = (jnp.arange(whole_k) < k).astype(jnp.float32).reshape(groups.shape[1:])
    if hessian is not None:
        q, scale, zero, solved = quantize_gptq(groups, counted, hessian, damping, symmetric=symmetric, dtype=dtype)
    else:
        if method == "hqq":
            scale, zero = quantize_hqq(groups, counted, dtype=dtype)
        elif method == "mse":
            scale, zero = quantize_mse(groups, counted, symmetric=symmetric, dtype=dtype)
        else:
            scale, zero = quantize_rtn(groups, symmetric=symmetric, dtype=dtype)
        q = nearest(groups, scale, zero)
    q = q.astype(jnp.uint8).reshape(rows.shape)
    scales_and_zeros = jnp.stack([scale, zero], axis=-1).transpose(1, 0, 2).astype(dtype)
    q = jnp.pad(q[:, :k], [(0, padded_n - n), (0, padded_k - k)], constant_values=8)
    scales_and_zeros = jnp.pad(
        scales_and_zeros, [(0, (padded_k - whole_k) // group_size), (0, padded_n - n), (0, 0)], constant_values=0
    )
    return pack_int4(q, inner_k_tiles), scales_and_zeros, perm, solved


def quantize_tensor(
    w: ArrayLike,
    contracted: int | Sequence[int],
    batch: int | Sequence[int] = (),
    group_size: int = 128,
    method: str = "rtn",
    **options: Any,
) -> Int4Tensor:
    """Quantise a kernel of any number of dimensions, for :func:`~jax_int4mm.int4_einsum` and ``int4_dot_general``.

    Args:
      w: floats of any shape of two dimensions or more.
      contracted: its axes that products sum over; groups run along them, the last one fastest.
      batch: its axes that x has too, so that each index of them is a matrix of its own. For an einsum
        :func:`~jax_int4mm.tensor.einsum_axes` gives both.
      group_size: as in :func:`quantize`, and so are the others.
      method: see there; "gptq" is not for tensors.
      **options: ``symmetric``, ``dtype`` and ``inner_k_tiles`` of :func:`quantize`.

    Raises:
      TypeError: as quantize does.
      ValueError: as quantize does; or an axis is out of range, twice there, or none is contracted; or none is kept and
        the kernel multiplies to a scalar.
    """
    w = as_array("quantize_tensor", "w", w)
    axes = []
    for name, given in (("contracted", contracted), ("batch", batch)):
        given = (given,) if isinstance(given, int) else tuple(given)
        if any(not -w.ndim <= axis < w.ndim for axis in given):
            raise ValueError(f"quantize_tensor: {name} is {list(given)}; w has axes 0 to {w.ndim - 1}.")
        axes.append(tuple(sorted(axis % w.ndim for axis in given)))
    together = (*axes[0], *axes[1])
    if len(set(together)) < len(together) or not axes[0]:
        raise ValueError(
            f"quantize_tensor: contracted is {list(axes[0])} and batch {list(axes[1])}; at least one axis is "
            "contracted, and none is named twice."
        )
    if method == "gptq":
        raise ValueError(
            'quantize_tensor: method is "gptq", which needs the inputs of a matrix; reshape the kernel to [k, n] and '
            "call quantize, or take another method."
        )
    matrices = as_matrices(jnp.asarray(w), *axes)
    weight = quantize(matrices, group_size, method, **options)
    return Int4Tensor(weight, logical_shape=w.shape, contracted=axes[0], batch=axes[1])


def quantize_tree(
    params: Any, rules: Rules | None = None, *, dtype: DTypeLike | None = None, inner_k_tiles: int = 8
) -> tuple[Any, Report]:
    """A model's parameters with the matrices that the rules choose as :class:`Int4Weight`.

    Args:
      params: a pytree of arrays; matrices are [*stacked, k, n], what you would write ``x @ w`` with. Int4Weights and
        Int4Tensors in it stay as they are.
      rules: which leaves, and how, by their path with slashes ("layers/0/up/kernel"); None for Rules().
      dtype: as in quantize.
      inner_k_tiles: as in quantize.

    Returns:
      The same tree, one matrix after the other quantised; and what was done.

    Raises:
      TypeError: as quantize does.
      ValueError: as quantize does, with the leaf's path before it.
    """
    rules = Rules() if rules is None else rules
    layers = []

    def convert(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        recipe = rules.recipe(name, leaf.shape, leaf.dtype) if is_array(leaf) else None
        if recipe is None:
            return leaf
        weight = quantize_by(recipe, leaf, name, dtype=dtype, inner_k_tiles=inner_k_tiles)
        layers.append(QuantizedLayer(name, leaf.shape, recipe, leaf.nbytes, weight.nbytes))
        return weight

    before = tree_bytes(params)
    quantized = jax.tree.map_with_path(convert, params, is_leaf=lambda leaf: isinstance(leaf, (Int4Weight, Int4Tensor)))
    return quantized, Report(tuple(layers), before, tree_bytes(quantized))


def quantize_by(recipe: Recipe, w: ArrayLike, name: str, **options: Any) -> Int4Weight:
    """``quantize`` by a recipe; a ValueError begins with the name of the weight."""
    try:
        return quantize(w, recipe.group_size, recipe.method, recipe.symmetric, **options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def tree_bytes(tree: Any) -> int:
    """Bytes of every array of a pytree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if is_array(leaf))
