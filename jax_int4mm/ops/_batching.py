"""Operands that vmap maps over."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def batch_first(operands: Sequence[jax.Array], axes: Sequence[int | None]) -> list[jax.Array]:
    """The operands, each batched along its axis or, where that is None, not at all, all batched along the first one."""
    size = next(o.shape[a] for o, a in zip(operands, axes, strict=True) if a is not None)
    return [
        jnp.broadcast_to(o, (size, *o.shape)) if a is None else jnp.moveaxis(o, a, 0)
        for o, a in zip(operands, axes, strict=True)
    ]
