"""Which weights of a model are quantised, and how: rules on their names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_int4mm.layout import GROUP_SIZES

# The methods that need nothing but the weight.
DATA_FREE_METHODS = ("rtn", "mse", "hqq")

# Parts of a model that 4 bits cost more than they save, by words in their names; each has its switch in Rules.
LM_HEAD = r"(^|[./])(lm_head|output_projection)([./]|$)"
EMBEDDINGS = r"(embed|(^|[./])(wte|wpe)([./]|$)|position)"
ROUTERS = r"(router|(^|[./])gate([./](weight|kernel))?$)"
# Vectors, which are matrices where layers are stacked.
_VECTORS = r"(norm|bias|(^|[./])scales?$)"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a weight is quantised: the arguments of :func:`jax_int4mm.quantize`.

    Raises:
      ValueError: an argument is not one that quantize takes, or the method needs calibration inputs.
    """

    method: str = "rtn"
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.method not in DATA_FREE_METHODS:
            raise ValueError(
                f"Recipe: method is {self.method!r}; it must be one of {', '.join(map(repr, DATA_FREE_METHODS))}. "
                'GPTQ needs inputs of each weight: call quantize(w, method="gptq", calibration=...) for it.'
            )
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"Recipe: group_size is {self.group_size!r}; it must be one of {', '.join(map(str, GROUP_SIZES))}."
            )
        if self.symmetric and self.method == "hqq":
            raise ValueError('Recipe: "hqq" chooses zeros, which a symmetric weight does not have; take "mse".')


Match = str | re.Pattern[str] | Callable[[str], bool]


class Rules:
    """A recipe, or none, for each weight by its name.

    The first rule that matches decides; where none does, the output projection, embeddings and routers stay as they are
    and every other matrix is quantised by the default. Names are paths with dots (`model.layers.0.mlp.up_proj.weight`)
    or slashes (`layers/0/up/kernel`).

    Args:
      default: the recipe of matrices that no rule matches; None leaves them alone.
      rules: pairs of what matches, a regular expression that is searched for in the name or a predicate of the name,
        and the recipe, or None to leave the weight alone.
      lm_head: the output projection is a matrix as others are.
      embeddings: embeddings are, too.
      routers: the routers of mixtures of experts are, too.

    Raises:
      ValueError: a regular expression is malformed.
    """

    def __init__(
        self,
        default: Recipe | None = Recipe(),
        rules: Sequence[tuple[Match, Recipe | None]] = (),
        *,
        lm_head: bool = False,
        embeddings: bool = False,
        routers: bool = False,
    ):
        kept = [(LM_HEAD, lm_head), (EMBEDDINGS, embeddings), (ROUTERS, routers)]
        patterns = [(pattern, None) for pattern, quantised in kept if not quantised]
        self._rules = [(_predicate(match), recipe) for match, recipe in [*rules, *patterns]]
        self._default = default

    def recipe(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> Recipe | None:
        """The recipe of a weight; None for what is to stay as it is, and for what is no float matrix."""
        if len(shape) < 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.floating) or re.search(_VECTORS, name):
            return None
        for matches, recipe in self._rules:
            if matches(name):
                return recipe
        return self._default


def _predicate(match: Match) -> Callable[[str], bool]:
    if isinstance(match, str):
        try:
            match = re.compile(match)
        except re.error as error:
            raise ValueError(f"Rules: {match!r} is not a regular expression ({error}).") from error
    if isinstance(match, re.Pattern):
        pattern = match
        return lambda name: pattern.search(name) is not None
    return match


def path_name(path: Sequence[Any]) -> str:
    """The name of a leaf by its path in a pytree, with slashes."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def is_array(leaf: object) -> bool:
    """Whether a leaf of a model is an array that could be quantised."""
    return isinstance(leaf, (jax.Array, np.ndarray))
