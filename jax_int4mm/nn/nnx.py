"""int4 layers for Flax NNX, and the quantisation of NNX models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_int4mm.quantizers import QuantizedLayer, Recipe, Report, Rules, quantize_by, tree_bytes
from jax_int4mm.tensor import Int4Tensor, as_matrices, einsum_axes, int4_dot_general, int4_einsum, kept_axes
from jax_int4mm.weight import Int4Weight, matmul

__all__ = [
    "Int4Einsum",
    "Int4Embed",
    "Int4Linear",
    "Int4LinearGeneral",
    "Int4LoRALinear",
    "Int4Param",
    "quantize_model",
]

# Flax's name for the mesh axes of a variable's dimensions.
_SHARDING = "out_sharding"
_LEAVES = ("packed", "scales_and_zeros", "perm")


class Int4Param(nnx.Variable[jax.Array]):
    """A leaf of an int4 weight: packed values, scales and zeros, or the order of k.

    No ``nnx.Param``, so ``nnx.grad`` and ``nnx.Optimizer(..., wrt=nnx.Param)`` pass over it.
    """


class _Int4Module(nnx.Module):
    """What every layer here has: an int4 kernel, its leaves in variables and its sizes beside them."""

    packed: Int4Param
    scales_and_zeros: Int4Param
    perm: Int4Param | None
    dtype: DTypeLike | None
    param_dtype: DTypeLike

    @classmethod
    def _empty(cls) -> Self:
        """A layer without a kernel yet. Flax prepares modules in the metaclass, which runs ``__init__`` too."""
        layer = _Int4Module()
        object.__setattr__(layer, "__class__", cls)
        return cast(Self, layer)

    @classmethod
    def _from_dense(
        cls,
        dense: nnx.Module,
        *,
        group_size: int = 128,
        method: str = "rtn",
        symmetric: bool = False,
        dtype: DTypeLike | None = None,
        inner_k_tiles: int = 8,
    ) -> Self:
        layer = cls._empty()
        layer._take(dense, Recipe(method, group_size, symmetric), dtype=dtype, inner_k_tiles=inner_k_tiles)
        return layer

    def _take(self, dense: Any, recipe: Recipe, name: str = "kernel", **options: Any) -> None:
        """Becomes the int4 layer of a dense one; what is wrong is said of `name`."""
        raise NotImplementedError

    def _hold(
        self,
        weight: Int4Weight,
        kernel_shape: Sequence[int],
        contracted: Sequence[int],
        batch: Sequence[int] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes the weight of a kernel; metadata are of the dense kernel's variable, with its mesh axes."""
        self.kernel_shape, self.contracted, self.batch = tuple(kernel_shape), tuple(contracted), tuple(batch)
        self.group_size, self.k, self.n = weight.group_size, weight.k, weight.n
        metadata = dict(metadata or {})
        axes = metadata.pop(_SHARDING, None)
        specs = None if axes is None else weight.partition_specs(self._matrix_spec(axes))
        for name in _LEAVES:
            leaf = getattr(weight, name)
            of_leaf: dict[str, Any] = {} if specs is None or leaf is None else {_SHARDING: tuple(getattr(specs, name))}
            setattr(self, name, nnx.data(None) if leaf is None else Int4Param(leaf, **metadata, **of_leaf))

    def _matrix_spec(self, axes: Sequence[Any]) -> PartitionSpec:
        """The mesh axes of the weight [*stacked, *batch, k, n] by those of the kernel's dimensions."""
        stacked, axes = axes[: len(axes) - len(self.kernel_shape)], axes[len(axes) - len(self.kernel_shape) :]
        # Of several dimensions that make one of k or n only the first can be divided: the others lie within it.
        sides = (self.contracted, kept_axes(len(self.kernel_shape), self.contracted, self.batch))
        return PartitionSpec(*stacked, *(axes[axis] for axis in self.batch), *(axes[side[0]] for side in sides))

    @property
    def weight(self) -> Int4Weight:
        """The weight, of the variables as they are."""
        perm = None if self.perm is None else self.perm[...]
        return Int4Weight(
            self.packed[...], self.scales_and_zeros[...], perm, group_size=self.group_size, k=self.k, n=self.n
        )

    @property
    def kernel(self) -> Int4Tensor:
        """The kernel, with the dense one's dimensions."""
        return Int4Tensor(self.weight, logical_shape=self.kernel_shape, contracted=self.contracted, batch=self.batch)

    def _cast(self, inputs: ArrayLike, bias: jax.Array | None = None) -> tuple[jax.Array, jnp.dtype]:
        """The inputs in the weight's dtype, and the dtype that the dense layer would give the result."""
        inputs = jnp.asarray(inputs)
        found = [inputs.dtype, self.param_dtype] + ([] if bias is None else [bias.dtype])
        result = jnp.result_type(*found) if self.dtype is None else self.dtype
        return inputs.astype(self.scales_and_zeros.dtype), jnp.dtype(result)


def _quantized(
    kernel: Any, name: str, contracted: Sequence[int], batch: Sequence[int], ndim: int, recipe: Recipe, **options: Any
) -> Int4Weight:
    """A dense kernel, or a stack of them, in int4."""
    kernel = jnp.asarray(kernel)
    matrices = functools.partial(as_matrices, contracted=contracted, batch=batch)
    for _ in range(kernel.ndim - ndim):
        matrices = jax.vmap(matrices)
    return quantize_by(recipe, matrices(kernel), name, **options)


class Int4Linear(_Int4Module):
    """``nnx.Linear`` with an int4 kernel.

    The result has the dtype that ``nnx.Linear`` would give it: ``dtype``, or else what inputs, ``param_dtype`` and bias
    promote to. Inputs are rounded to the weight's dtype, bfloat16 or float16, and multiplied with f32 sums, which are
    rounded once to the result's dtype.

    Attributes:
      packed, scales_and_zeros, perm: ``Int4Param``; ``weight`` puts them together.
      bias: ``nnx.Param`` [out_features], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        group_size: int = 128,
        method: str = "rtn",
        symmetric: bool = False,
        inner_k_tiles: int = 8,
        rngs: nnx.Rngs,
        **linear_options: Any,
    ):
        """Makes a random ``nnx.Linear`` and quantises it; see :func:`jax_int4mm.quantize`.

        Under ``nnx.eval_shape`` nothing is computed: for a checkpoint to fill.

        Args:
          in_features: k.
          out_features: n.
          use_bias: whether there is one.
          dtype: of the result; None for that which inputs and parameters promote to.
          param_dtype: of the bias, and of the kernel that is quantised.
          group_size: 32, 64, 128 or 256.
          method: "rtn", "mse" or "hqq".
          symmetric: without zeros.
          inner_k_tiles: of the packed format.
          rngs: for the initialisers.
          **linear_options: kernel_init, bias_init, kernel_metadata and bias_metadata of ``nnx.Linear``.
        """
        dense = nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **linear_options,
        )
        self._take(dense, Recipe(method, group_size, symmetric), inner_k_tiles=inner_k_tiles)

    def _take(self, dense: nnx.Linear, recipe: Recipe, name: str = "kernel", **options: Any) -> None:
        weight = _quantized(dense.kernel[...], name, (0,), (), 2, recipe, **options)
        self._set(weight, dense.bias, dense.dtype, dense.param_dtype, dense.kernel.get_metadata())

    def _set(
        self,
        weight: Int4Weight,
        bias: nnx.Param[jax.Array] | None,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.in_features, self.out_features = weight.k, weight.n
        self._hold(weight, (weight.k, weight.n), (0,), metadata=metadata)
        self.bias = nnx.data(bias)
        self.use_bias = bias is not None
        self.dtype, self.param_dtype = dtype, param_dtype

    @classmethod
    def from_linear(cls, linear: nnx.Linear, **options: Any) -> Self:
        """A dense layer in int4, with its very bias; a stack of layers, as ``nnx.vmap`` makes it, stays one.

        Args:
          linear: the layer, which is not changed.
          **options: group_size (128 by default), method ("rtn"), symmetric, inner_k_tiles, and dtype, that of scales,
            zeros and multiplied inputs: as in :func:`jax_int4mm.quantize`.

        Raises:
          ValueError: as quantize does.
        """
        return cls._from_dense(linear, **options)

    @classmethod
    def from_weight(
        cls,
        weight: Int4Weight,
        bias: ArrayLike | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
    ) -> Int4Linear:
        """A layer of an int4 weight, from a checkpoint for example.

        Args:
          weight: (*stacked, k, n).
          bias: [*stacked, n], or None.
          dtype: of the result; None for what inputs, param_dtype and bias promote to.
          param_dtype: None for the weight's dtype.
        """
        layer = cls._empty()
        param = None if bias is None else nnx.Param(jnp.asarray(bias))
        layer._set(weight, param, dtype, weight.dtype if param_dtype is None else param_dtype)
        return layer

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """``inputs @ kernel + bias`` of inputs [..., in_features]: [..., out_features]."""
        bias = None if self.bias is None else self.bias[...]
        x, dtype = self._cast(inputs, bias)
        y = matmul(x, self.weight, preferred_element_type=_product_dtype(x, dtype), out_sharding=out_sharding)
        y = y.astype(dtype)
        return y if bias is None else y + bias.astype(dtype)


def _product_dtype(x: jax.Array, dtype: jnp.dtype) -> DTypeLike | None:
    """Of a product whose result is wanted in dtype: f32 where that is another than x's."""
    return None if dtype == x.dtype else jnp.float32


class Int4LoRALinear(Int4Linear):
    """An int4 layer that does not change, plus a low-rank one that is trained: ``nnx.LoRALinear`` in int4.

    Attributes:
      lora: an ``nnx.LoRA``; its ``nnx.LoRAParam``s are all that ``nnx.grad(..., wrt=nnx.LoRAParam)`` sees.
    """

    def __init__(self, in_features: int, out_features: int, *, lora_rank: int, rngs: nnx.Rngs, **options: Any):
        """Args are those of :class:`Int4Linear`, and lora_rank."""
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.lora = nnx.LoRA(in_features, lora_rank, out_features, rngs=rngs)

    def _take(self, dense: nnx.Linear, recipe: Recipe, name: str = "kernel", **options: Any) -> None:
        super()._take(dense, recipe, name, **options)
        if isinstance(dense, nnx.LoRALinear):
            self.lora = dense.lora

    def add_lora(self, rank: int, *, rngs: nnx.Rngs, **lora_options: Any) -> Int4LoRALinear:
        """Gives the layer a new low-rank part, which is 0 at first, and returns the layer."""
        self.lora = nnx.LoRA(self.in_features, rank, self.out_features, rngs=rngs, **lora_options)
        return self

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """The int4 layer's result plus ``inputs @ lora_a @ lora_b``: [..., out_features]."""
        return super().__call__(inputs, out_sharding) + self.lora(jnp.asarray(inputs))


class Int4LinearGeneral(_Int4Module):
    """``nnx.LinearGeneral`` with an int4 kernel, as in ``nnx.MultiHeadAttention``; made by ``from_linear_general``.

    Dtypes are as in :class:`Int4Linear`.
    """

    @classmethod
    def from_linear_general(cls, linear: nnx.LinearGeneral, **options: Any) -> Self:
        """A dense layer in int4; options as in :meth:`Int4Linear.from_linear`."""
        return cls._from_dense(linear, **options)

    def _take(self, dense: nnx.LinearGeneral, recipe: Recipe, name: str = "kernel", **options: Any) -> None:
        batch = tuple(range(len(dense.batch_axis)))
        contracted = tuple(range(len(batch), len(batch) + len(dense.in_features)))
        shape = (*dense.batch_axis.values(), *dense.in_features, *dense.out_features)
        weight = _quantized(dense.kernel[...], name, contracted, batch, len(shape), recipe, **options)
        self._hold(weight, shape, contracted, batch, dense.kernel.get_metadata())
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.axis, self.batch_axis = dense.axis, dense.batch_axis
        self.bias = nnx.data(dense.bias)
        self.use_bias, self.dtype, self.param_dtype = dense.use_bias, dense.dtype, dense.param_dtype

    def __call__(self, inputs: ArrayLike, out_sharding: Any = None) -> jax.Array:
        """The product over ``axis`` of inputs: batch dimensions, those of inputs that are left, out_features."""
        bias = None if self.bias is None else self.bias[...]
        x, dtype = self._cast(inputs, bias)
        axes = tuple(sorted(axis % x.ndim for axis in self.axis))
        batch_axes = tuple(sorted(axis % x.ndim for axis in self.batch_axis))
        y = int4_dot_general(
            x,
            self.kernel,
            ((axes, self.contracted), (batch_axes, self.batch)),
            preferred_element_type=_product_dtype(x, dtype),
            out_sharding=out_sharding,
        ).astype(dtype)
        if bias is None:
            return y
        sizes = [x.shape[axis] if axis in batch_axes else 1 for axis in range(x.ndim) if axis not in axes]
        return y + bias.astype(dtype).reshape(*sizes, *self.out_features)


class Int4Einsum(_Int4Module):
    """``nnx.Einsum`` with an int4 kernel.

    Dtypes are as in :class:`Int4Linear`. The equation is fixed: it decides along which axes the kernel is quantised.
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        group_size: int = 128,
        method: str = "rtn",
        symmetric: bool = False,
        inner_k_tiles: int = 8,
        rngs: nnx.Rngs,
        **einsum_options: Any,
    ):
        """Makes a random ``nnx.Einsum`` and quantises it; arguments as there and in :class:`Int4Linear`."""
        dense = nnx.Einsum(
            einsum_str,
            tuple(kernel_shape),
            None if bias_shape is None else tuple(bias_shape),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **einsum_options,
        )
        self._take(dense, Recipe(method, group_size, symmetric), inner_k_tiles=inner_k_tiles)

    @classmethod
    def from_einsum(cls, einsum: nnx.Einsum, **options: Any) -> Self:
        """A dense layer in int4; options as in :meth:`Int4Linear.from_linear`."""
        return cls._from_dense(einsum, **options)

    def _take(self, dense: nnx.Einsum, recipe: Recipe, name: str = "kernel", **options: Any) -> None:
        shape = tuple(dense.kernel_shape)
        contracted, batch = (tuple(sorted(axes)) for axes in einsum_axes(dense.einsum_str, len(shape)))
        weight = _quantized(dense.kernel[...], name, contracted, batch, len(shape), recipe, **options)
        self._hold(weight, shape, contracted, batch, dense.kernel.get_metadata())
        self.einsum_str, self.bias_shape = dense.einsum_str, dense.bias_shape
        self.bias = nnx.data(dense.bias)
        self.dtype, self.param_dtype = dense.dtype, dense.param_dtype

    def __call__(self, inputs: ArrayLike, einsum_str: str | None = None, out_sharding: Any = None) -> jax.Array:
        """The einsum of inputs and the kernel, plus the bias.

        Args:
          inputs: the first operand.
          einsum_str: None, or the layer's own equation.
          out_sharding: of the result.

        Raises:
          ValueError: einsum_str is another equation than the layer's.
        """
        if einsum_str is not None and einsum_str.replace(" ", "") != self.einsum_str:
            raise ValueError(
                f"Int4Einsum: called with {einsum_str!r}; its kernel is quantised for {self.einsum_str!r}. "
                "Make a layer of its own for each equation."
            )
        bias = None if self.bias is None else self.bias[...]
        x, dtype = self._cast(inputs, bias)
        y = int4_einsum(self.einsum_str, x, self.kernel, preferred_element_type=_product_dtype(x, dtype)).astype(dtype)
        if out_sharding is not None:
            y = jax.lax.with_sharding_constraint(y, out_sharding)
        return y if bias is None else y + bias.astype(dtype).reshape(self._bias_sizes(y.ndim))

    def _bias_sizes(self, ndim: int) -> list[int]:
        """The bias's dimensions among those of the result: the kernel's that it has, and 1 elsewhere."""
        operands, _, result = self.einsum_str.partition("->")
        labels = operands.split(",")[1]
        before, dots, after = result.partition("...")
        missing = ndim - len(before) - len(after)
        labelled = [*before, *[""] * (missing if dots else 0), *after]
        return [self.kernel_shape[labels.index(label)] if label and label in labels else 1 for label in labelled]


class Int4Embed(_Int4Module):
    """``nnx.Embed`` with an int4 table, of which a look-up reads what it asks for.

    The result has ``dtype``, or the dense table's where that is None.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        group_size: int = 128,
        method: str = "rtn",
        symmetric: bool = False,
        inner_k_tiles: int = 8,
        rngs: nnx.Rngs,
        **embed_options: Any,
    ):
        """Makes a random ``nnx.Embed`` and quantises it; arguments as there and in :class:`Int4Linear`."""
        dense = nnx.Embed(num_embeddings, features, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **embed_options)
        self._take(dense, Recipe(method, group_size, symmetric), inner_k_tiles=inner_k_tiles)

    @classmethod
    def from_embed(cls, embed: nnx.Embed, **options: Any) -> Self:
        """A dense table in int4; options as in :meth:`Int4Linear.from_linear`."""
        return cls._from_dense(embed, **options)

    def _take(self, dense: nnx.Embed, recipe: Recipe, name: str = "kernel", **options: Any) -> None:
        shape = (dense.num_embeddings, dense.features)
        # Groups run along the features: attend sums over them.
        weight = _quantized(dense.embedding[...], name, (1,), (), 2, recipe, **options)
        self._hold(weight, shape, (1,), metadata=dense.embedding.get_metadata())
        self.num_embeddings, self.features = shape
        self.dtype, self.param_dtype = dense.dtype, dense.param_dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Rows of the table for integers inputs [...]: [..., features]. Out of range is the nearest in range.

        Raises:
          TypeError: inputs are no integers.
        """
        return self.weight.columns(inputs).astype(self.dtype)

    def attend(self, query: ArrayLike) -> jax.Array:
        """Scores of query [..., features] against every embedding: [..., num_embeddings]."""
        x, _ = self._cast(query)
        dtype = jnp.dtype(self.dtype)
        return matmul(x, self.weight, preferred_element_type=_product_dtype(x, dtype)).astype(dtype)


# Layers of these very types are quantised; a subclass may compute something else.
_REPLACEMENTS: dict[type, tuple[str, Callable[[], Any]]] = {
    nnx.Linear: ("kernel", Int4Linear._empty),
    nnx.LoRALinear: ("kernel", Int4LoRALinear._empty),
    nnx.LinearGeneral: ("kernel", Int4LinearGeneral._empty),
    nnx.Einsum: ("kernel", Int4Einsum._empty),
    nnx.Embed: ("embedding", Int4Embed._empty),
}


def _is_product(einsum: nnx.Einsum) -> bool:
    """Whether an einsum has an equation of its own, and one that int4_einsum computes."""
    if einsum.einsum_str is None:
        return False
    try:
        einsum_axes(einsum.einsum_str, len(einsum.kernel_shape))
    except ValueError:
        return False
    return True


def quantize_model(
    model: nnx.Module, rules: Rules | None = None, *, dtype: DTypeLike | None = None, inner_k_tiles: int = 8
) -> tuple[Any, Report]:
    """Replaces an NNX model's dense layers by int4 ones, in place, one after the other.

    ``nnx.Linear``, ``LoRALinear``, ``LinearGeneral`` (so ``MultiHeadAttention``), ``Einsum`` with an equation of its
    own that :func:`int4_einsum` computes, and ``Embed`` are replaced, in lists and dictionaries of modules and stacked
    by ``nnx.vmap`` too; a module that is in the model twice remains one. Subclasses of them stay: they may compute
    something else.

    Args:
      model: any ``nnx.Module``.
      rules: which, and how, by the path of the kernel with slashes ("layers/0/up/kernel", "embed/embedding"); None for
        Rules().
      dtype: as in :func:`jax_int4mm.quantize`.
      inner_k_tiles: as there.

    Returns:
      The model, another object only if it is itself such a layer; and what was done.

    Raises:
      ValueError: as quantize does, with the layer's path before it. Layers before it have been replaced.
    """
    rules = Rules() if rules is None else rules
    layers: list[QuantizedLayer] = []
    visited: dict[int, tuple[nnx.Module, nnx.Module]] = {}  # The module itself keeps its id from being used again.

    def visit(module: nnx.Module, path: tuple[str, ...]) -> nnx.Module:
        if id(module) not in visited:
            visited[id(module)] = (module, module)
            visited[id(module)] = (module, replaced(module, path))
        return visited[id(module)][1]

    def replaced(module: nnx.Module, path: tuple[str, ...]) -> nnx.Module:
        if type(module) in _REPLACEMENTS:
            attribute, make = _REPLACEMENTS[type(module)]
            name = "/".join((*path, attribute))
            array = getattr(module, attribute)[...]
            recipe = rules.recipe(name, array.shape, array.dtype)
            if recipe is None or (isinstance(module, nnx.Einsum) and not _is_product(module)):
                return module
            layer = make()
            layer._take(module, recipe, name, dtype=dtype, inner_k_tiles=inner_k_tiles)
            layers.append(QuantizedLayer(name, array.shape, recipe, array.nbytes, layer.weight.nbytes))
            return layer
        for name, value in list(vars(module).items()):
            if not isinstance(value, nnx.Module):
                continue
            changed = visit(value, (*path, name))
            if changed is value:
                continue
            if isinstance(module, nnx.List):
                module[int(name)] = changed
            else:
                setattr(module, name, changed)
        return module

    before = tree_bytes(nnx.state(model))
    model = visit(model, ())
    return model, Report(tuple(layers), before, tree_bytes(nnx.state(model)))
