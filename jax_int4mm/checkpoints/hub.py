"""Checkpoints on the Hugging Face hub, through huggingface_hub and its local cache."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

SCHEME = "hf://"

# Weights that are read, configurations and tokenizers; no pickles.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def fetch(source: str) -> Path:
    """The local directory of `hf://org/name` or `hf://org/name@revision`, downloaded where the cache has it not.

    `hf://org/name/file.gguf` is the path of one file.

    Raises:
      FileNotFoundError: there is no such repository, revision or file, or it can be reached neither in the cache nor
        over the network.
      ImportError: huggingface_hub is not installed.
      ValueError: the source is not spelled so.
    """
    repository, revision, file = _parse(source)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(f'{source} needs huggingface_hub: pip install "jax_int4mm[hub]"') from error

    def download(cached: bool) -> Path:
        options: dict[str, Any] = {"revision": revision, "local_files_only": cached}
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file, **options))
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_WANTED), **options))

    expected = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError)
    try:
        return download(cached=False)
    except expected as error:
        # Not every release falls back to what the cache has of a revision.
        with contextlib.suppress(*expected):
            return download(cached=True)
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{source} cannot be had from the Hugging Face hub ({reason}); check the name, the network and, for a "
            "gated model, that you are logged in, or give a local path"
        ) from error


def _parse(source: str) -> tuple[str, str | None, str | None]:
    body, _, revision = source.removeprefix(SCHEME).partition("@")
    parts = body.split("/", 2)
    if len(parts) < 2 or not all(parts) or ("@" in source and not revision):
        raise ValueError(f"{source!r} is not hf://org/name, hf://org/name@revision or hf://org/name/file.gguf")
    return "/".join(parts[:2]), revision or None, parts[2] if len(parts) == 3 else None
