"""int4 kernels of more than two dimensions, and the products that take them: einsum and dot_general."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_int4mm.layout import as_array
from jax_int4mm.weight import Int4Weight, matmul


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight"],
    meta_fields=["logical_shape", "contracted", "batch"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Int4Tensor:
    """A kernel of any number of dimensions in int4, for :func:`int4_einsum` and :func:`int4_dot_general`.

    Its axes are of three kinds, fixed when it is quantised: `contracted` ones, which products sum over and along which
    values share a scale; `batch` ones, which x has too; and the others, which the result has from it. Make one with
    :func:`jax_int4mm.quantize_tensor`.

    Invariants:
      weight: an Int4Weight (*batch sizes, k, n): k runs over the contracted axes and n over the others, each kind in
        the order in which the tensor has them. Further leading dimensions stack tensors, for a scan over layers.
      logical_shape: of one tensor, without those.
      contracted, batch: axes of `logical_shape`, ascending.
    """

    weight: Int4Weight
    logical_shape: tuple[int, ...] = dataclasses.field(kw_only=True)
    contracted: tuple[int, ...] = dataclasses.field(kw_only=True)
    batch: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, after those of further stacking."""
        return (*self.weight.shape[: self.weight.ndim - 2 - len(self.batch)], *self.logical_shape)

    @property
    def ndim(self) -> int:
        """Number of logical dimensions."""
        return self.weight.ndim - 2 - len(self.batch) + len(self.logical_shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the scales, the zeros and the activations that this kernel multiplies."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return self.weight.nbytes

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that are neither contracted nor batch, which a product has from this kernel."""
        return kept_axes(len(self.logical_shape), self.contracted, self.batch)

    def astype(self, dtype: DTypeLike) -> Int4Tensor:
        """This kernel with scales and zeros in ``dtype``, as :meth:`Int4Weight.astype`."""
        return dataclasses.replace(self, weight=self.weight.astype(dtype))

    def dequantize(self) -> jax.Array:
        """The dense kernel of shape :attr:`shape` that this one stands for."""
        dense = self.weight.dequantize()
        stacked = dense.shape[: dense.ndim - 2 - len(self.batch)]
        order = (*self.batch, *self.contracted, *self.kept)
        dense = dense.reshape(*stacked, *(self.logical_shape[axis] for axis in order))
        first = len(stacked)
        return dense.transpose(*range(first), *(first + position for position in np.argsort(order)))

    def __repr__(self) -> str:
        return (
            f"Int4Tensor({list(self.logical_shape)}, contracted={list(self.contracted)}, batch={list(self.batch)}, "
            f"{self.weight!r})"
        )


jax.export.register_pytree_node_serialization(
    Int4Tensor,
    serialized_name="jax_int4mm.Int4Tensor",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda static: tuple(map(tuple, json.loads(static))),
    from_children=lambda static, children: Int4Tensor(
        *children, logical_shape=static[0], contracted=static[1], batch=static[2]
    ),
)

Kernel = Int4Weight | Int4Tensor


def kept_axes(ndim: int, contracted: Sequence[int], batch: Sequence[int]) -> tuple[int, ...]:
    """The axes of a kernel that are neither contracted nor batch."""
    return tuple(axis for axis in range(ndim) if axis not in contracted and axis not in batch)


def as_matrices(w: jax.Array, contracted: Sequence[int], batch: Sequence[int]) -> jax.Array:
    """A dense kernel as the matrices that it is quantised as, [*batch, k, n]."""
    w = w.transpose(*batch, *contracted, *kept_axes(w.ndim, contracted, batch))
    k = math.prod(w.shape[len(batch) : len(batch) + len(contracted)])
    return w.reshape(*w.shape[: len(batch)], k, -1)


def einsum_axes(equation: str, kernel_ndim: int, operand: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The contracted and the batch axes of an einsum's kernel: what :func:`jax_int4mm.quantize_tensor` asks for.

    Args:
      equation: of two operands, as for :func:`int4_einsum`.
      kernel_ndim: dimensions of the kernel.
      operand: the kernel's place, 0 or 1.

    Raises:
      ValueError: the equation is none of two operands, or not one of a kernel; see :func:`int4_einsum`.
    """
    terms = _Terms(equation, operand)
    if len(terms.kernel) != kernel_ndim:
        raise ValueError(
            f"int4_einsum: {equation!r} gives the kernel {len(terms.kernel)} dimensions, and it has {kernel_ndim}."
        )
    return terms.axes(terms.contracted), terms.axes(terms.batch)


class _Terms:
    """The labels of an einsum of x and a kernel, "." standing for x's ellipsis."""

    def __init__(self, equation: str, operand: int):
        inputs, arrow, result = equation.replace(" ", "").replace("...", ".").partition("->")
        operands = inputs.split(",")
        if len(operands) != 2:
            raise ValueError(
                f"int4_einsum: the equation {equation!r} has {len(operands)} operands; it must have two, "
                'as in "BTD,NDH->BTNH".'
            )
        self.kernel, self.x = operands[operand], operands[1 - operand]
        if not arrow:
            labels = inputs.replace(",", "")
            result = "." * ("." in labels) + "".join(sorted(a for a in set(labels) - {"."} if labels.count(a) == 1))
        self.result = result
        for term in (self.kernel, self.x, self.result):
            if len(set(term)) < len(term) or not all(label.isalpha() or label == "." for label in term):
                raise ValueError(
                    f"int4_einsum: {equation!r} repeats an index within {term!r}, or has one that is no letter; "
                    "dequantize() the kernel and take jnp.einsum."
                )
        if "." in self.kernel:
            raise ValueError(f"int4_einsum: the kernel has an ellipsis in {equation!r}; name each of its dimensions.")
        if "." in self.x and "." not in self.result:
            raise ValueError(f"int4_einsum: {equation!r} sums over an ellipsis; sum x before, and name its dimensions.")
        if not set(self.result) <= set(self.x) | set(self.kernel):
            raise ValueError(f"int4_einsum: the result of {equation!r} has an index that no operand has.")
        self.contracted = [a for a in self.kernel if a not in self.result]
        self.batch = [a for a in self.kernel if a in self.result and a in self.x]
        self.kept = [a for a in self.kernel if a in self.result and a not in self.x]
        if not set(self.contracted) <= set(self.x):
            raise ValueError(
                f"int4_einsum: {equation!r} sums the kernel over an index that x does not have; "
                "dequantize() it and take jnp.einsum."
            )
        if not self.contracted:
            raise ValueError(f"int4_einsum: {equation!r} sums over no index of the kernel; it is no product.")

    def axes(self, labels: Sequence[str]) -> tuple[int, ...]:
        """The kernel's axes of labels."""
        return tuple(self.kernel.index(label) for label in labels)


def int4_einsum(
    equation: str,
    first: ArrayLike | Kernel,
    second: ArrayLike | Kernel,
    *,
    implementation: str | None = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """``jnp.einsum`` of two operands, of which one may be int4: "BTD,NDH->BTNH", "BTNH,NHD->BTD", "BSD,2KDH->...".

    Args:
      equation: of two operands. x may have an ellipsis; an index that only x has and the result does not is summed.
      first: x in the kernel's dtype, and second the kernel, or the other way round. A kernel is an Int4Tensor whose
        contracted and batch axes are those that the equation sums over and shares with x, or an Int4Weight
        [*batch, k, n]. Where neither is int4 this is ``jnp.einsum``.
      second: see first.
      implementation: as in :func:`jax_int4mm.int4pack_mm`.
      preferred_element_type: of the result; None for x's dtype.

    Returns:
      What ``jnp.einsum`` gives with the dequantised kernel, as exactly as the kernel of the product does.

    Raises:
      TypeError: both are int4, or x is of another dtype than the kernel.
      ValueError: the equation has other than two operands, repeats an index in one, sums over indices of the kernel
        alone, or sums over other axes of the kernel than it is quantised along; or shapes do not fit it.
    """
    if isinstance(first, Kernel):
        if isinstance(second, Kernel):
            raise TypeError("int4_einsum: both operands are int4; one is activations. dequantize() the other.")
        operand, kernel, x = 0, first, jnp.asarray(as_array("int4_einsum", "x", second))
    elif isinstance(second, Kernel):
        operand, kernel, x = 1, second, jnp.asarray(as_array("int4_einsum", "x", first))
    else:
        return jnp.einsum(equation, first, second, preferred_element_type=preferred_element_type)
    terms = _Terms(equation, operand)
    x_labels = list(terms.x)
    if "." in x_labels:
        at = x_labels.index(".")
        more = x.ndim - len(x_labels) + 1
        if more < 0:
            raise ValueError(
                f"int4_einsum: x has shape {list(x.shape)}, with fewer dimensions than {equation!r} names."
            )
        x_labels[at : at + 1] = [f".{i}" for i in range(more)]
    if len(x_labels) != x.ndim:
        raise ValueError(f"int4_einsum: x has shape {list(x.shape)}; {equation!r} gives it {len(x_labels)} dimensions.")
    ellipsis = [label for label in x_labels if label[0] == "."]
    result: list[str] = []
    for label in terms.result:
        result += ellipsis if label == "." else [label]
    summed = [i for i, label in enumerate(x_labels) if label not in result and label not in terms.kernel]
    if summed:
        x, x_labels = x.sum(summed), [label for i, label in enumerate(x_labels) if i not in summed]

    x_axes = {label: axis for axis, label in enumerate(x_labels)}
    y = _contract(
        "int4_einsum",
        x,
        kernel,
        [(x_axes[label], axis) for label, axis in zip(terms.contracted, terms.axes(terms.contracted), strict=True)],
        [(x_axes[label], axis) for label, axis in zip(terms.batch, terms.axes(terms.batch), strict=True)],
        implementation,
        preferred_element_type,
    )
    free = [label for label in x_labels if label not in terms.contracted and label not in terms.batch]
    found = [*terms.batch, *free, *terms.kept]
    return y.transpose([found.index(label) for label in result])


def int4_dot_general(
    lhs: ArrayLike | Kernel,
    rhs: ArrayLike | Kernel,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """``jax.lax.dot_general`` of two operands, of which one may be int4; for ``dot_general=`` of layers, for example.

    Args:
      lhs: x in the kernel's dtype, and rhs the kernel, or the other way round: an Int4Tensor whose contracted and batch
        axes are those that dimension_numbers name, or an Int4Weight [*batch, k, n]. Where neither is int4 this is
        ``jax.lax.dot_general``.
      rhs: see lhs.
      dimension_numbers: ((lhs contracted, rhs contracted), (lhs batch, rhs batch)).
      precision: for dense operands; an int4 product always sums in f32.
      preferred_element_type: of the result; None for x's dtype.
      out_sharding: of the result.

    Returns:
      Of dimensions batch, those of lhs that are left, those of rhs that are left.

    Raises:
      TypeError: both are int4, or x is of another dtype than the kernel.
      ValueError: the kernel is quantised along other axes, or shapes do not fit.
    """
    if not isinstance(lhs, Kernel) and not isinstance(rhs, Kernel):
        return jax.lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    contracted = list(zip(lhs_contracted, rhs_contracted, strict=True))
    batch = list(zip(lhs_batch, rhs_batch, strict=True))
    if not isinstance(lhs, Kernel):
        x = jnp.asarray(as_array("int4_dot_general", "lhs", lhs))
        y = _contract("int4_dot_general", x, rhs, contracted, batch, None, preferred_element_type)
    elif isinstance(rhs, Kernel):
        raise TypeError("int4_dot_general: both operands are int4; one is activations. dequantize() the other.")
    else:
        x = jnp.asarray(as_array("int4_dot_general", "rhs", rhs))
        contracted, batch = ([(b, a) for a, b in pairs] for pairs in (contracted, batch))
        y = _contract("int4_dot_general", x, lhs, contracted, batch, None, preferred_element_type)
        # What is left of the kernel comes before what is left of x.
        of_x = range(len(batch), x.ndim - len(contracted))
        y = y.transpose(*range(len(batch)), *range(x.ndim - len(contracted), y.ndim), *of_x)
    return y if out_sharding is None else jax.lax.with_sharding_constraint(y, out_sharding)


def _contract(
    op: str,
    x: jax.Array,
    kernel: Any,
    contracted: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    implementation: str | None,
    preferred_element_type: DTypeLike | None,
) -> jax.Array:
    """The product [*batch, *rest of x, *rest of kernel]; pairs are of an axis of x and one of the kernel."""
    if isinstance(kernel, Int4Weight):
        # The leading dimensions stack matrices.
        kernel = Int4Tensor(
            kernel,
            logical_shape=kernel.shape,
            contracted=(kernel.ndim - 2,),
            batch=tuple(range(kernel.ndim - 2)),
        )
    if kernel.ndim != len(kernel.logical_shape):
        raise ValueError(f"{op}: the kernel is stacked, {list(kernel.shape)}; scan or vmap over its first dimensions.")
    asked = tuple(sorted(axis for _, axis in contracted)), tuple(sorted(axis for _, axis in batch))
    if asked != (kernel.contracted, kernel.batch):
        raise ValueError(
            f"{op}: the product sums over axes {list(asked[0])} of the kernel {list(kernel.shape)} and shares "
            f"{list(asked[1])} with x, and the kernel is quantised for sums over {list(kernel.contracted)} and shared "
            f"axes {list(kernel.batch)}; quantise it for this product: quantize_tensor(w, contracted={asked[0]}, "
            f"batch={asked[1]})."
        )
    for x_axis, axis in (*contracted, *batch):
        if x.shape[x_axis] != kernel.logical_shape[axis]:
            raise ValueError(
                f"{op}: axis {x_axis} of x {list(x.shape)} meets axis {axis} of the kernel {list(kernel.shape)}; they "
                "must be of the same size."
            )
    # In the order of the kernel's axes, which is that of its k and of its stacked dimensions.
    batch_axes = [x_axis for x_axis, axis in sorted(batch, key=lambda pair: pair[1])]
    contracted_axes = [x_axis for x_axis, axis in sorted(contracted, key=lambda pair: pair[1])]
    free = [axis for axis in range(x.ndim) if axis not in batch_axes and axis not in contracted_axes]
    free_sizes = [x.shape[axis] for axis in free]
    sizes = [x.shape[axis] for axis in batch_axes]
    x = x.transpose(*batch_axes, *free, *contracted_axes).reshape(*sizes, *free_sizes, kernel.weight.shape[-2])
    product = functools.partial(matmul, implementation=implementation, preferred_element_type=preferred_element_type)
    for _ in batch_axes:
        product = jax.vmap(product)
    y = product(x, kernel.weight)
    y = y.reshape(*sizes, *free_sizes, *(kernel.logical_shape[axis] for axis in kernel.kept))
    order = [axis for _, axis in batch]  # As asked for: of dot_general in the order of dimension_numbers.
    places = [sorted(order).index(axis) for axis in order]
    return y.transpose(*places, *range(len(batch), y.ndim))
