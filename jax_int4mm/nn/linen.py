"""int4 layers for Flax Linen, and the conversion of its variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.core import meta
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_int4mm.quantizers import QuantizedLayer, Recipe, Report, Rules, quantize_by, tree_bytes
from jax_int4mm.weight import Int4Weight, matmul

__all__ = ["COLLECTION", "Int4Dense", "quantize_variables"]

# Of int4 kernels, so that gradients and optimisers of "params" see real parameters only.
COLLECTION = "int4"


class Int4Dense(nn.Module):
    """``nn.Dense`` with an int4 kernel, which is in the collection "int4" and its bias in "params".

    The result has the dtype that ``nn.Dense`` would give it: ``dtype``, or else what inputs, ``param_dtype`` and bias
    promote to. Inputs are rounded to the weight's dtype, bfloat16 or float16, and multiplied with f32 sums, which are
    rounded once to the result's dtype.

    Attributes:
      features: n.
      use_bias: whether there is one.
      dtype: of the result; None for that which inputs and parameters promote to.
      param_dtype: of the bias, and of the kernel that ``init`` quantises.
      kernel_init: of that kernel.
      bias_init: of the bias.
      group_size: of what ``init`` makes; ``apply`` takes the kernel as it is. So do the others.
      method: "rtn", "mse" or "hqq".
      symmetric: without zeros.
    """

    features: int
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Callable[..., Any] = nn.linear.default_kernel_init
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    group_size: int = 128
    method: str = "rtn"
    symmetric: bool = False

    @nn.compact
    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """``inputs @ kernel + bias`` of inputs [..., k]: [..., features]."""
        x = jnp.asarray(inputs)

        def init() -> Any:
            dense = self.kernel_init(self.make_rng("params"), (x.shape[-1], self.features), self.param_dtype)
            return _quantized(dense, Recipe(self.method, self.group_size, self.symmetric), "Int4Dense")

        weight: Int4Weight = meta.unbox(self.variable(COLLECTION, "kernel", init).value)
        if weight.shape != (x.shape[-1], self.features):
            raise ValueError(
                f"Int4Dense: inputs have shape {list(x.shape)} and features is {self.features}; the kernel must be "
                f"[{x.shape[-1]}, {self.features}] and is {list(weight.shape)}."
            )
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        found = [x.dtype, self.param_dtype] + ([] if bias is None else [bias.dtype])
        dtype = jnp.dtype(jnp.result_type(*found) if self.dtype is None else self.dtype)
        product_dtype = None if dtype == weight.dtype else jnp.float32
        y = matmul(x.astype(weight.dtype), weight, preferred_element_type=product_dtype).astype(dtype)
        return y if bias is None else y + bias.astype(dtype)


def quantize_variables(
    variables: Mapping[str, Any],
    rules: Rules | None = None,
    *,
    dtype: DTypeLike | None = None,
    inner_k_tiles: int = 8,
) -> tuple[dict[str, Any], Report]:
    """The variables of a Linen model for the same model with ``Int4Dense`` in the place of ``nn.Dense``.

    Args:
      variables: as ``init`` gives them; of "params" the matrices named "kernel" that the rules choose move to "int4".
        Stacked ones, of ``nn.scan`` for example, stay stacked. Mesh axes of ``nn.Partitioned`` become the leaves'.
      rules: which, and how, by their path with slashes ("layers_0/up/kernel"); None for Rules(). Nothing but the rules
        tells kernels of ``nn.Dense`` from those of other layers.
      dtype: as in :func:`jax_int4mm.quantize`.
      inner_k_tiles: as there.

    Returns:
      The variables, and what was done.

    Raises:
      ValueError: as quantize does, with the kernel's path before it.
    """
    rules = Rules() if rules is None else rules
    flat = traverse_util.flatten_dict(variables["params"], is_leaf=lambda _, leaf: not isinstance(leaf, Mapping))
    params, int4, layers = {}, {}, []
    for path, leaf in flat.items():
        name, array = "/".join(path), meta.unbox(leaf)
        recipe = rules.recipe(name, array.shape, array.dtype) if path[-1] == "kernel" else None
        if recipe is None:
            params[path] = leaf
            continue
        int4[path] = _quantized(leaf, recipe, name, dtype=dtype, inner_k_tiles=inner_k_tiles)
        layers.append(QuantizedLayer(name, array.shape, recipe, array.nbytes, meta.unbox(int4[path]).nbytes))
    quantized = {**variables, "params": traverse_util.unflatten_dict(params)}
    if int4:
        found = traverse_util.flatten_dict(dict(variables.get(COLLECTION, {}))) | int4
        quantized[COLLECTION] = traverse_util.unflatten_dict(found)
    return quantized, Report(tuple(layers), _bytes(variables), _bytes(quantized))


def _bytes(variables: Mapping[str, Any]) -> int:
    return tree_bytes(meta.unbox(variables))


def _quantized(dense: Any, recipe: Recipe, name: str, **options: Any) -> Any:
    """A dense kernel in int4, its leaves boxed with mesh axes where it was."""
    weight = quantize_by(recipe, meta.unbox(dense), name, **options)
    if not isinstance(dense, nn.Partitioned):
        return weight
    specs = weight.partition_specs(PartitionSpec(*dense.names))
    return jax.tree.map(
        lambda spec, leaf: dense.replace(value=leaf, names=tuple(spec)),
        specs,
        weight,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
