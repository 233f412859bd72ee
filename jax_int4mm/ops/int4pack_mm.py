"""The public op on raw arrays: validate, flatten, bind."""

from __future__ import annotations

import functools
import math
import os

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jax_int4mm.layout import as_array, unpacked_shape
from jax_int4mm.ops import _gradient as _gradient  # Derivatives, registered by the import.
from jax_int4mm.ops import validation
from jax_int4mm.ops._primitive import int4pack_mm_p
from jax_int4mm.ops._sharding import varying_alike

# Names the implementation that None stands for; read at each call, so that it also serves tests and benchmarks.
IMPLEMENTATION_VARIABLE = "JAX_INT4MM_IMPLEMENTATION"


def int4pack_mm(
    x: ArrayLike,
    packed: ArrayLike,
    scales_and_zeros: ArrayLike,
    group_size: int = 128,
    implementation: str | None = None,
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

    Args:
      x: [..., k] bfloat16 or float16 activations; leading dimensions are flattened into m. m = 0 is legal.
      packed: int32 ``[n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]`` from :func:`jax_int4mm.pack_int4`.
      scales_and_zeros: [k/group_size, n, 2] in x's dtype: (scale, zero), both floats, zero added.
      group_size: 32, 64, 128 or 256 values of k that share a scale and a zero.
      implementation: None to choose, "reference" (plain ``jnp``), "dequantize" (a dense weight for the call, and XLA's
        own 16-bit product), or a kernel's name: "decode" (inner_k_tiles = 8), "hopper" (sm_90) or "ampere" on CUDA;
        "avx512", "avx2", "neon", "scalar" on the CPU. The environment variable JAX_INT4MM_IMPLEMENTATION names a
        default.

    Returns:
      y [..., n] in x's dtype.

    Raises:
      TypeError: an argument is no array or has a wrong dtype.
      ValueError: shapes or group_size break a rule above, or the named implementation cannot serve the call.
    """
    return _int4pack_mm(
        as_array("int4pack_mm", "x", x),
        as_array("int4pack_mm", "packed", packed),
        as_array("int4pack_mm", "scales_and_zeros", scales_and_zeros),
        group_size=validation.check_group_size("int4pack_mm", group_size),
        implementation=resolve_implementation(implementation),
    )


def resolve_implementation(implementation: str | None) -> str | None:
    """``implementation``, or the environment's default where it is None."""
    return implementation or os.environ.get(IMPLEMENTATION_VARIABLE) or None


@functools.partial(jax.jit, static_argnames=("group_size", "implementation"))
def _int4pack_mm(
    x: jax.Array, packed: jax.Array, scales_and_zeros: jax.Array, *, group_size: int, implementation: str | None
) -> jax.Array:
    validation.check_weight("int4pack_mm", packed, scales_and_zeros, group_size)
    validation.check_activations("int4pack_mm", x, packed, scales_and_zeros)
    x, packed, scales_and_zeros = varying_alike(x, packed, scales_and_zeros)
    n, k, _ = unpacked_shape(packed.shape)
    leading = x.shape[:-1]
    y = int4pack_mm_p.bind(
        x.reshape(math.prod(leading), k),
        packed,
        scales_and_zeros,
        group_size=group_size,
        implementation=implementation,
    )
    return checkpoint_name(y.reshape(*leading, n), "int4pack_mm")
