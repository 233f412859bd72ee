"""What a checkpoint's configuration says of its quantised modules, checked as it is looked up."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jax_int4mm.checkpoints.errors import CheckpointError
from jax_int4mm.checkpoints.safetensors_files import SafetensorsFiles

Settings = Mapping[str, Any]


def object_in(files: SafetensorsFiles, settings: Settings, key: str) -> Settings:
    """The object under a key of a configuration, an empty one where it is missing or null."""
    found = settings.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{files.folder} has a configuration whose {key} is {found!r:.60} and not an object")
    return found


def matches(pattern: str, module: str, find: Callable[[str, str], object] = re.search) -> bool:
    """Whether a regular expression of a configuration, which need not be a valid one, is found in a module's name."""
    try:
        return find(pattern, module) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def check_bits(files: SafetensorsFiles, module: str, settings: Settings) -> None:
    """Raises unless a module is quantised to 4 bits."""
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise CheckpointError(
            f"{files.folder} has module {module!r} in {bits} bits; only 4 are read: load the bf16 model and quantise "
            "it with jax_int4mm.quantize"
        )


def group_size_of(files: SafetensorsFiles, module: str, settings: Settings, k: int, groups: int) -> int:
    """The group size of a module, as its configuration says and its number of groups confirms.

    Raises:
      CheckpointError: the two do not agree, or there is neither configuration nor an even division.
    """
    said = settings.get("group_size", settings.get("q_group_size"))
    if said is None:
        if groups < 1 or k % groups:
            raise CheckpointError(
                f"{files.folder} has module {module!r} with {groups} groups over k = {k} and no configuration that "
                "says their size: give the directory with its config.json"
            )
        return k // groups
    size = k if said == -1 else said
    if not isinstance(size, int) or size < 1 or -(-k // size) != groups:
        raise CheckpointError(
            f"{files.folder} has module {module!r} with scales for {groups} groups over k = {k}, and its configuration "
            f"says group_size {said}; they are not of one checkpoint"
        )
    return size
