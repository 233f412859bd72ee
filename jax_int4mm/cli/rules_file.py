"""A file of rules: which weights are quantised, and how, by regular expressions on their names."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_int4mm.quantizers import Recipe, Rules

_RECIPE_KEYS = {field.name for field in dataclasses.fields(Recipe)}
_SWITCHES = ("lm_head", "embeddings", "routers")


class RulesFileError(ValueError):
    """A rules file is missing, malformed or says something that is no rule."""


def read_rules(path: Path | None, default: Recipe, **switches: bool) -> Rules:
    """The rules of a TOML or JSON file, over what the command line says; of the command line alone without a file.

    Args:
      path: the file; see docs/cli.md.
      default: the recipe that rules change.
      **switches: whether lm_head, embeddings and routers are quantised, where the file does not say.

    Raises:
      RulesFileError: see there.
    """
    if path is None:
        return _rules(default, (), switches)
    content = _parse(path)
    unknown = set(content) - {"default", "rules", *_SWITCHES}
    if unknown:
        raise RulesFileError(
            f"{path} has {', '.join(map(repr, sorted(unknown)))}; a rules file has 'default', 'rules', "
            f"{', '.join(map(repr, _SWITCHES))}"
        )
    for name in _SWITCHES:
        if not isinstance(content.get(name, False), bool):
            raise RulesFileError(f"{path} has {name} = {content[name]!r}; it must be true or false")
    default = _recipe(path, "default", content.get("default", {}), default)
    listed = content.get("rules", [])
    if not isinstance(listed, list):
        raise RulesFileError(f"{path} has rules that are not a list")
    rules = [_rule(path, f"rule {number}", rule, default) for number, rule in enumerate(listed, 1)]
    try:
        return _rules(default, rules, {name: content.get(name, given) for name, given in switches.items()})
    except ValueError as error:
        raise RulesFileError(f"{path}: {error}") from error


def _rules(default: Recipe, rules: Sequence[tuple[str, Recipe | None]], switches: Mapping[str, bool]) -> Rules:
    lm_head, embeddings, routers = (switches.get(name, False) for name in _SWITCHES)
    return Rules(default, rules, lm_head=lm_head, embeddings=embeddings, routers=routers)


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise RulesFileError(f"the rules file {path} cannot be read ({error.strerror})") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise RulesFileError(f"{path} is neither TOML nor, as *.json, JSON ({error})") from error
    if not isinstance(content, dict):
        raise RulesFileError(f"{path} has to hold an object with 'default' and 'rules'")
    return content


def _rule(path: Path, where: str, rule: Any, default: Recipe) -> tuple[str, Recipe | None]:
    if not isinstance(rule, dict) or not isinstance(rule.get("match"), str):
        raise RulesFileError(f"{path}, {where}: it needs 'match', a regular expression on names")
    rest = {key: value for key, value in rule.items() if key != "match"}
    if "keep" in rest:
        if rest != {"keep": True}:
            raise RulesFileError(f"{path}, {where}: 'keep = true' leaves a weight as it is and stands alone")
        return rule["match"], None
    return rule["match"], _recipe(path, where, rest, default)


def _recipe(path: Path, where: str, changes: Any, default: Recipe) -> Recipe:
    if not isinstance(changes, dict) or set(changes) - _RECIPE_KEYS:
        raise RulesFileError(f"{path}, {where}: a recipe has {', '.join(map(repr, sorted(_RECIPE_KEYS)))}, no more")
    try:
        return dataclasses.replace(default, **changes)
    except ValueError as error:
        raise RulesFileError(f"{path}, {where}: {error}") from error
