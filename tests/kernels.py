"""The implementations there are, and running one of them, by name, on outputs that hold NaN before."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

import cases
import jax_int4mm as i4

CPU_IMPLEMENTATIONS = ("avx512", "avx2", "neon", "scalar")
CUDA_IMPLEMENTATIONS = (
    "ampere",
    "ampere/16x8",
    "ampere/16x16",
    "ampere/32x32",
    "ampere/32x64",
    "ampere/128x64",
    "ampere/128x128",
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation on one platform ("cpu" or "cuda"); None for the one that is chosen."""

    platform: str
    implementation: str | None

    def __str__(self) -> str:
        return f"{self.platform}-{self.implementation or 'chosen'}"

    @property
    def device(self) -> jax.Device:
        return jax.devices(self.platform)[0]

    def weights(self, m: int, weight: cases.Weight) -> str:
        """What explain says that this kernel multiplies by: "rounded" or "exact"."""
        shape = (m, weight.k)
        return i4.explain(shape, int4_weight(weight), self.device, self.implementation).weights

    def multiply(self, xs: Sequence[np.ndarray], weight: cases.Weight) -> list[np.ndarray]:
        """x @ w^T for each x, all in one program."""

        def program(xs: Sequence[jax.Array], packed: jax.Array, scales_and_zeros: jax.Array) -> list[jax.Array]:
            op = functools.partial(
                i4.int4pack_mm,
                packed=packed,
                scales_and_zeros=scales_and_zeros,
                group_size=weight.group_size,
                implementation=self.implementation,
            )
            return [op(x) for x in xs]

        return run_on_poison(program, list(xs), weight.packed, weight.scales_and_zeros, device=self.device)


def int4_weight(weight: cases.Weight) -> i4.Int4Weight:
    """The package's form of a weight that needs no padding."""
    return i4.Int4Weight(
        weight.packed, weight.scales_and_zeros, group_size=weight.group_size, k=weight.k, n=weight.n
    )


def run_on_poison(f: Callable[..., Any], *operands: Any, device: jax.Device) -> Any:
    """``f(*operands)`` compiled for ``device``, as numpy arrays, with results that start as NaN.

    Buffers full of NaN are donated for the results, so XLA computes these in place: an element that a kernel does not
    write, or adds to, comes back NaN.
    """

    def program(poison: Any, operands: Any) -> Any:
        del poison
        return f(*operands)

    poison = jax.tree.map(_poison, jax.eval_shape(f, *operands))
    arguments = jax.device_put((poison, operands), device)
    return jax.tree.map(np.asarray, jax.jit(program, donate_argnums=0, keep_unused=True)(*arguments))


def _poison(result: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.full(result.shape, ml_dtypes.finfo(result.dtype).dtype.type(np.nan))
