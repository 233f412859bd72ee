"""The implementations there are, and running one of them, by name, on outputs that hold NaN before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import acceptance
import cases
import jax_int4mm as i4

CPU_IMPLEMENTATIONS = ("amx", "avx512_bf16", "avx512_bf16/panel-8x3", "avx512", "avx2", "neon", "scalar")
CUDA_IMPLEMENTATIONS = (
    "decode",
    "decode/32x8",
    "decode/64x8",
    "decode/32x16",
    "decode/112x16",
    "hopper",
    "hopper/128x16",
    "hopper/128x32",
    "hopper/256x32",
    "hopper/128x48",
    "hopper/128x64",
    "hopper/192x64",
    "hopper/256x64",
    "hopper/128x80",
    "hopper/128x96",
    "hopper/192x96",
    "hopper/128x112",
    "hopper/192x112",
    "hopper/128x128",
    "hopper/192x128",
    "hopper/128x144",
    "hopper/128x160",
    "hopper/192x144",
    "hopper/192x160",
    "hopper/128x176",
    "hopper/192x176",
    "hopper/128x192",
    "hopper/192x192",
    "hopper/128x208",
    "hopper/128x224",
    "hopper/128x240",
    "hopper/128x256",
    "ampere",
    "ampere/16x8",
    "ampere/32x8",
    "ampere/16x16",
    "ampere/32x32",
    "ampere/64x32",
    "ampere/128x32",
    "ampere/64x64",
    "ampere/128x64",
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

    def takes(self, weight: cases.Weight) -> bool:
        """Whether it is documented to take this layout and dtype."""
        if (self.implementation or "").startswith(("amx", "avx512_bf16")):
            return weight.dtype == "bfloat16"
        return weight.inner_k_tiles == 8 or not (self.implementation or "").startswith("decode")

    def weights(self, weight: cases.Weight, m: int) -> str:
        """What explain says that this kernel multiplies m tokens by: "rounded" or "exact"."""
        return i4.explain((m, weight.k), int4_weight(weight), self.device, self.implementation).weights

    def check(
        self, ys: Sequence[np.ndarray], xs: Sequence[np.ndarray], weight: cases.Weight, device: jax.Device | None
    ) -> None:
        """``acceptance.check`` of y = x @ w^T for each x, by the weights that this kernel states for its m."""
        stated = [self.weights(weight, len(x)) for x in xs]
        for weights in set(stated):
            of_these = [i for i, one in enumerate(stated) if one == weights]
            acceptance.check([ys[i] for i in of_these], [xs[i] for i in of_these], weight.dense(weights), device)

    def multiply(self, xs: Sequence[np.ndarray], weight: cases.Weight) -> list[np.ndarray]:
        """x @ w^T for each x, all in one program, run as :func:`run_twice_on_poison` does."""

        def program(xs: Sequence[jax.Array], packed: jax.Array, scales_and_zeros: jax.Array) -> list[jax.Array]:
            return [i4.int4pack_mm(x, packed, scales_and_zeros, weight.group_size, self.implementation) for x in xs]

        return run_twice_on_poison(program, list(xs), weight.packed, weight.scales_and_zeros, device=self.device)


def int4_weight(weight: cases.Weight) -> i4.Int4Weight:
    """The package's form of a weight that needs no padding."""
    return i4.Int4Weight(weight.packed, weight.scales_and_zeros, group_size=weight.group_size, k=weight.k, n=weight.n)


def run_twice_on_poison(f: Callable[..., Any], *operands: Any, device: jax.Device) -> Any:
    """``f(*operands)`` compiled for ``device``, as numpy arrays, with results that start as NaN.

    Buffers full of NaN are donated for the results, so XLA computes these in place: an element that a kernel does not
    write, or adds to, comes back NaN. The second run has to give the same bits.
    """

    def program(poison: Any, operands: Any) -> Any:
        del poison
        return f(*operands)

    poison = jax.tree.map(lambda y: np.full(y.shape, np.nan, y.dtype), jax.eval_shape(f, *operands))
    operands = jax.device_put(operands, device)
    compiled = jax.jit(program, donate_argnums=0, keep_unused=True)
    first, second = (jax.tree.map(np.asarray, compiled(jax.device_put(poison, device), operands)) for _ in range(2))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert one.tobytes() == other.tobytes(), "two runs on the same inputs gave different bits"
    return first
