"""Mistral's `tekken.json`: byte pairs by rank, behind a block of special tokens."""

from __future__ import annotations

import base64
import codecs
import json
import pathlib
from collections.abc import Callable

# Where files do not list their special tokens.
DEFAULT_SPECIAL = {
    "<s>": 1,
    "</s>": 2,
    "[INST]": 3,
    "[/INST]": 4,
    "[AUDIO]": 24,
    "[BEGIN_AUDIO]": 25,
    "[TRANSCRIBE]": 34,
}


class TekkenTokenizer:
    """The tokens of a `tekken.json`. Text is encoded by tiktoken; decoding needs the file alone.

    Raises:
      ValueError: the file is not such a one.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the file."""
        try:
            parsed = json.loads(path.read_text(encoding="utf-8"))
            settings = parsed["config"]
            self._first = int(settings["default_num_special_tokens"])
            count = int(settings["default_vocab_size"]) - self._first
            self._bytes = [base64.b64decode(entry["token_bytes"]) for entry in parsed["vocab"][:count]]
            self._pattern = settings["pattern"]
            special = {entry["token_str"]: int(entry["rank"]) for entry in parsed.get("special_tokens") or []}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a tekken.json ({error!r}); copy or download it again") from error
        self._path = path
        self.special = DEFAULT_SPECIAL | special

    def encode(self, text: str) -> list[int]:
        """The tokens of text, without any that begin or end it.

        Raises:
          ImportError: tiktoken is not installed.
        """
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(f"encoding text with {self._path} needs tiktoken: pip install tiktoken") from error
        ranks = {value: rank for rank, value in enumerate(self._bytes)}
        encoding = tiktoken.Encoding("tekken", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})
        return [self._first + rank for rank in encoding.encode_ordinary(text)]

    def decoder(self) -> Callable[[int], str]:
        """A function that takes tokens one by one and gives the text of each, "" while a character is incomplete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def decode(token: int) -> str:
            at = token - self._first
            return decoder.decode(self._bytes[at]) if 0 <= at < len(self._bytes) else ""

        return decode
