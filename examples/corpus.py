"""Text that every Python installation has: what the byte-level model is trained on, and calibrated with.

The corpus is the sources (with their docstrings) of the standard library, the help topics of `pydoc` and the
docstrings of the compiled builtin modules; one document is one file, one topic or one module. Documents are dealt by a
hash of their name, so that one is held out in every version of Python or in none.
"""

from __future__ import annotations

import hashlib
import importlib
import pathlib
import sys
import sysconfig
import warnings
from typing import Any

import numpy as np

SEPARATOR = 0  # between documents, and the end of a generated text
SPLITS = 32

# Tests hold escaped binary data, encodings are tables, the others belong to the machine and not to Python.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
EXCLUDED_FILES = ("_sysconfigdata", "entities.py", "sitecustomize.py")


def documents() -> dict[str, bytes]:
    """Every document of the corpus by name, the same for one Python version on every machine."""
    found = {}
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if EXCLUDED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith(EXCLUDED_FILES):
            found[relative.as_posix()] = path.read_bytes()
    for topic, text in importlib.import_module("pydoc_data.topics").topics.items():
        found[f"topic {topic}"] = text.encode()
    for name in sorted(sys.builtin_module_names):
        with warnings.catch_warnings():
            # Importing one that a later Python leaves out warns.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module(name)
        found[f"docstrings of {name}"] = "\n\n\n".join(_docstrings(module)).encode()
    return {name: text for name, text in found.items() if len(text) >= 256}


def _docstrings(module: Any) -> list[str]:
    owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    texts = []
    for owner in owners:
        for name, value in sorted(vars(owner).items()):
            text = getattr(value, "__doc__", None)
            if callable(value) and isinstance(text, str) and not name.startswith("_"):
                texts.append(f"{name}: {text}")
    # Classes inherit docstrings word for word.
    return list(dict.fromkeys(texts))


def split(found: dict[str, bytes]) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """Training, validation and held-out documents, dealt and ordered by a hash of the name."""
    training: list[bytes] = []
    validation: list[bytes] = []
    heldout: list[bytes] = []
    digests = {name: hashlib.sha256(name.encode()).digest() for name in found}
    for name in sorted(found, key=digests.__getitem__):
        part = {0: heldout, 1: validation}.get(digests[name][-1] % SPLITS, training)
        part.append(found[name])
    return training, validation, heldout


def joined(texts: list[bytes]) -> np.ndarray:
    """All texts in one uint8 array, a separator before each."""
    return np.frombuffer(bytes([SEPARATOR]).join([b"", *texts]), np.uint8)
