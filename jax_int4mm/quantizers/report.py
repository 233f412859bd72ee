"""What quantising a model has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax_int4mm.quantizers.rules import Recipe


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """A matrix that was quantised.

    Attributes:
      name: its path, as the rules see it.
      shape: of the dense array.
      recipe: how.
      bytes_before: of the dense array.
      bytes_after: packed values, scales and zeros.
    """

    name: str
    shape: tuple[int, ...]
    recipe: Recipe
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, its share of scales, zeros and padding included."""
        weights = 1
        for size in self.shape:
            weights *= size
        return 8 * self.bytes_after / weights


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``quantize_tree`` and ``quantize_model`` did; ``print`` it for a table.

    Attributes:
      layers: those quantised, in the order of the model.
      bytes_before: of every array of the model as it was.
      bytes_after: as it is.
    """

    layers: Sequence[QuantizedLayer]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                " x ".join(map(str, layer.shape)),
                f"{layer.recipe.method} g{layer.recipe.group_size}{' symmetric' if layer.recipe.symmetric else ''}",
                f"{layer.bits_per_weight:.2f}",
            )
            for layer in self.layers
        ]
        table = [("layer", "shape", "quantised", "bits"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        total = f"{len(rows)} layers; {self.bytes_before:,} bytes before, {self.bytes_after:,} after ({share:.0%})"
        return "\n".join([*lines, total])
