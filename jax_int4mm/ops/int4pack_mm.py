"""The public op on raw arrays: validate, flatten, bind."""

from __future__ import annotations

import functools
import os

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jax_int4mm.layout import as_array
from jax_int4mm.ops import _gradient as _gradient  # Derivatives, registered by the import.
from jax_int4mm.ops import validation
from jax_int4mm.ops._primitive import local_product
from jax_int4mm.ops._sharding import (
    PACKED,
    SCALES_AND_ZEROS,
    UNDIVIDED,
    divided_by_types,
    explicit_mesh,
    leading,
    weight_units,
)

# Names the implementation that None stands for; read at each call, so that it also serves tests and benchmarks.
IMPLEMENTATION_VARIABLE = "JAX_INT4MM_IMPLEMENTATION"


def int4pack_mm(
    x: ArrayLike,
    packed: ArrayLike,
    scales_and_zeros: ArrayLike,
    group_size: int = 128,
    implementation: str | None = None,
    *,
    preferred_element_type: DTypeLike | None = None,
    accum_dtype: DTypeLike = jnp.float32,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> jax.Array:
    """Multiply activations by int4 weights: y = x @ w^T with w = (q - 8) * scale + zero for each group of k.

    PyTorch's ``torch.ops.aten._weight_int4pack_mm`` on the same packed bytes, as a JAX primitive. The weight is rounded
    once to x's dtype, as ``dequantize`` returns it, or not at all: ``explain(...).weights`` is "rounded" or "exact".
    Products are summed in f32, and the sum is rounded once. An exact kernel applies scale and zero to sums over a
    group, so rows of x with an infinity, or in bfloat16 with numbers beyond 2**118, can give NaN instead of infinity.
    On CUDA a bfloat16 scale of 2**126 or more counts as infinite.

    Differentiable in x and in scales_and_zeros, the weight's rounding aside, any number of times; the packed integers
    have a float0 tangent. The backward product with x takes a dense weight that lives for it alone. Under
    ``jax.checkpoint`` the result's name is "int4pack_mm", as in ``save_only_these_names("int4pack_mm")``.

    Divided over a mesh as its arguments are (docs/sharding.md): x along m and the weight along n without
    communication, both along k with one all-reduce of the result; the weight itself is never gathered.

    Args:
      x: [..., k] bfloat16 or float16 activations; leading dimensions are flattened into m. m = 0 is legal.
      packed: int32 ``[n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]`` from :func:`jax_int4mm.pack_int4`.
      scales_and_zeros: [k/group_size, n, 2] in x's dtype: (scale, zero), both floats, zero added.
      group_size: 32, 64, 128 or 256 values of k that share a scale and a zero.
      implementation: None to choose, "reference" (plain ``jnp``), "dequantize" (a dense weight for the call, and XLA's
        own 16-bit product), or a kernel's name: "decode" (inner_k_tiles = 8), "hopper" (sm_90) or "ampere" on CUDA;
        "amx" and "avx512_bf16" (no float16), "avx512", "avx2", "neon", "scalar" on the CPU. The environment variable
        JAX_INT4MM_IMPLEMENTATION names a default.
      preferred_element_type: of y: x's dtype, the default, or float32, the sum not rounded.
      accum_dtype: where k is divided among devices, of the parts that they add up: float32, or x's dtype, which halves
        what they send and rounds each part.
      out_sharding: of y, where the types of the arguments name mesh axes (``AxisType.Explicit``); None for the
        division that costs least. Divided over the mesh axes of k too, y takes a reduce-scatter.

    Returns:
      y [..., n] in x's dtype, or in float32.

    Raises:
      TypeError: an argument is no array or has a wrong dtype.
      ValueError: shapes, group_size or out_sharding break a rule above, or the named implementation cannot serve the
        call.
    """
    return _int4pack_mm(
        as_array("int4pack_mm", "x", x),
        as_array("int4pack_mm", "packed", packed),
        as_array("int4pack_mm", "scales_and_zeros", scales_and_zeros),
        group_size=validation.check_group_size("int4pack_mm", group_size),
        implementation=resolve_implementation(implementation),
        preferred_element_type=preferred_element_type,
        accum_dtype=accum_dtype,
        out_sharding=out_sharding,
    )


def resolve_implementation(implementation: str | None) -> str | None:
    """``implementation``, or the environment's default where it is None."""
    return implementation or os.environ.get(IMPLEMENTATION_VARIABLE) or None


@functools.partial(
    jax.jit,
    static_argnames=("group_size", "implementation", "preferred_element_type", "accum_dtype", "out_sharding"),
)
def _int4pack_mm(
    x: jax.Array,
    packed: jax.Array,
    scales_and_zeros: jax.Array,
    *,
    group_size: int,
    implementation: str | None,
    preferred_element_type: DTypeLike | None,
    accum_dtype: DTypeLike,
    out_sharding: NamedSharding | PartitionSpec | None,
) -> jax.Array:
    validation.check_weight("int4pack_mm", packed, scales_and_zeros, group_size)
    validation.check_activations("int4pack_mm", x, packed, scales_and_zeros)
    rows = leading(x.ndim - 1)
    y_dimensions = (*rows, "n")
    local = functools.partial(
        local_product,
        dimensions=y_dimensions,
        group_size=group_size,
        implementation=implementation,
        dtype=validation.check_result_dtype("preferred_element_type", preferred_element_type or x.dtype, x.dtype),
        accum_dtype=validation.check_result_dtype("accum_dtype", accum_dtype, x.dtype),
    )
    mesh = explicit_mesh(x, packed, scales_and_zeros)
    out_spec = validation.check_out_sharding(out_sharding, mesh, len(y_dimensions))
    if mesh is None:
        y = local(UNDIVIDED)(x, packed, scales_and_zeros)
    else:
        y = divided_by_types(
            local,
            {(*rows, "k"): x, PACKED: packed, SCALES_AND_ZEROS: scales_and_zeros},
            y_dimensions,
            {**weight_units(packed.shape, group_size), **dict(zip(rows, x.shape, strict=False))},
            out_spec,
        )
    return checkpoint_name(y, "int4pack_mm")
