"""Which kernel a product takes, and why: the same plan that lowering asks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jax_int4mm.layout import unpacked_shape
from jax_int4mm.ops import _ffi
from jax_int4mm.ops._primitive import DEQUANTIZE, REFERENCE
from jax_int4mm.ops.int4pack_mm import resolve_implementation
from jax_int4mm.weight import Int4Weight


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What ``x @ w4`` runs.

    Attributes:
      implementation: the kernel's name, as ``implementation=`` takes it.
      tile: the kernel's tile, in its own terms; "" for "reference" and "dequantize".
      weights: "rounded" if the kernel multiplies by what ``dequantize`` returns, "exact" if it applies scale and zero
        in f32; on a CPU "at the call" where that depends on an m that is not known.
      workspace_bytes: device memory that the call needs beside its operands and its result.
      reason: one sentence.
    """

    implementation: str
    tile: str
    weights: str
    workspace_bytes: int
    reason: str


def explain(
    x_shape: Sequence[int],
    w4: Int4Weight,
    device: jax.Device | str | None = None,
    implementation: str | None = None,
) -> Explanation:
    """Say which kernel and tile ``x @ w4`` takes, and why, without running it.

    Args:
      x_shape: shape of x, [..., k].
      w4: the weight; arrays or ``jax.ShapeDtypeStruct`` leaves.
      device: a jax device, a platform ("cpu", "cuda"; without a GPU an H200's description stands for "cuda"), or None
        for jax's default device.
      implementation: as in :func:`jax_int4mm.int4pack_mm`.

    Returns:
      An :class:`Explanation`.

    Raises:
      ValueError: x_shape does not fit, or no kernel (or not the named one) serves the product.
    """
    shape = tuple(x_shape)
    if not shape or shape[-1] != w4.k:
        raise ValueError(f"explain: x_shape is {list(shape)}; against {list(w4.shape)} it must be [..., {w4.k}].")
    if device is None:
        config: Any = jax.config  # Not every jax annotates its flags.
        device = config.jax_default_device or jax.devices()[0]
    gpu = None
    if isinstance(device, str):
        platform = {"gpu": "cuda", "CUDA": "cuda"}.get(device, device)
    else:
        platform = {"gpu": "cuda"}.get(device.platform, device.platform)
        if platform == "cuda":
            gpu = _ffi.describe_gpu(device)
    implementation = resolve_implementation(implementation)
    n, k, inner_k_tiles = unpacked_shape(w4.packed.shape[-4:])
    if implementation == DEQUANTIZE:
        dense_bytes = n * k * w4.dtype.itemsize
        return Explanation(DEQUANTIZE, "", "rounded", dense_bytes, "a dense weight for the call, and XLA's own product")
    if implementation == REFERENCE or platform not in ("cpu", "cuda"):
        if implementation not in (None, REFERENCE):
            raise ValueError(f'explain: implementation "{implementation}" has no kernel on platform "{platform}".')
        asked = "asked for" if implementation else f'platform "{platform}" has no kernel of ours'
        return Explanation(REFERENCE, "", "rounded", 0, f"plain jnp, dequantise and dot: {asked}")
    problem = _ffi.Problem(math.prod(shape[:-1]), n, k, w4.group_size, inner_k_tiles, str(w4.dtype))
    return Explanation(**_ffi.plan(platform, problem, implementation, gpu))
