"""Text to tokens and back: bytes, `tokenizer.json`, or plain numbers; chat templates; where a text is to stop."""

from __future__ import annotations

import codecs
import datetime
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from decoder_config import Config


class Tokenizer(Protocol):
    """What `generate.py` asks of a tokenizer."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of text, with those that begin a text unless special is False."""

    def decoder(self) -> Callable[[int], str]:
        """A function that takes tokens one by one and gives the text of each, "" while a character is incomplete."""


class ByteTokenizer:
    """Token i is byte i of UTF-8."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The bytes of text."""
        return list(text.encode())

    def decoder(self) -> Callable[[int], str]:
        """See Tokenizer."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([token]))


class FileTokenizer:
    """A Hugging Face `tokenizer.json`."""

    def __init__(self, path: pathlib.Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(f"{path} needs tokenizers: pip install tokenizers, or use --token-ids") from error
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._decode_stream = tokenizers.decoders.DecodeStream

    def encode(self, text: str, special: bool = True) -> list[int]:
        """See Tokenizer; the file says which tokens begin a text."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decoder(self) -> Callable[[int], str]:
        """See Tokenizer; special tokens have no text."""
        stream = self._decode_stream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""


class NumberTokenizer:
    """Tokens written as numbers, for a model that comes without a tokenizer."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The numbers in text, separated by spaces or commas."""
        return [int(number) for number in text.replace(",", " ").split()]

    def decoder(self) -> Callable[[int], str]:
        """See Tokenizer."""
        return lambda token: f" {token}"


def tokenizer_for(model: pathlib.Path, config: Config, token_ids: bool) -> Tokenizer:
    """The tokenizer of a model's folder; bytes where it has none and a vocabulary of 256."""
    if token_ids:
        return NumberTokenizer()
    if (model / "tokenizer.json").is_file():
        return FileTokenizer(model / "tokenizer.json")
    if config.vocab_size == 256:
        return ByteTokenizer()
    raise ValueError(f"{model} has no tokenizer.json; give the prompt as numbers: --token-ids --prompt '1 2 3'")


# --- chat --------------------------------------------------------------------------------------------------------


class ChatTemplate:
    """The template that writes a conversation as a model was trained on it, in jinja2 as transformers renders it.

    It is a program of the checkpoint's, so it runs in jinja2's sandbox.
    """

    def __init__(self, source: str, tokens: Mapping[str, Any] = {}):
        """Takes the template and the special tokens that it may name, bos_token for example."""
        try:
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError("a chat template needs jinja2: pip install jinja2") from error
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._template = environment.from_string(source)
        # A special token is text, or an object that holds it.
        self._tokens = {
            name: token["content"] if isinstance(token, Mapping) else token
            for name, token in tokens.items()
            if name.endswith("_token") and token is not None
        }

    @classmethod
    def of_model(cls, model: pathlib.Path) -> ChatTemplate:
        """The template of a model's folder: `chat_template.jinja`, or in `tokenizer_config.json`.

        Raises:
          ValueError: there is none.
        """
        path = model / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        source = settings.get("chat_template")
        if isinstance(source, list):  # Several, by name.
            source = {template["name"]: template["template"] for template in source}.get("default")
        if (model / "chat_template.jinja").is_file():
            source = (model / "chat_template.jinja").read_text(encoding="utf-8")
        if not source:
            raise ValueError(
                f"{model} has no chat template; leave out --chat, or give --prompt as the model expects it"
            )
        return cls(source, settings)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, of messages with "role" and "content", up to where the model is to answer.

        Raises:
          ValueError: the template refuses it, or is malformed.
        """
        import jinja2

        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, **self._tokens)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from error


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


# --- where a text stops ------------------------------------------------------------------------------------------


def stop_tokens_of(model: pathlib.Path, config: Config) -> tuple[int, ...]:
    """The tokens that end a text: of `config.json` and of `generation_config.json`, which chat models add to."""
    stops = set(config.eos_token_ids)
    path = model / "generation_config.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        stops |= set() if found is None else set(found) if isinstance(found, list) else {found}
    return tuple(sorted(stops))


class TextUntil:
    """Text piece by piece, up to the first of some strings, which is left out.

    Attributes:
      ended: whether one was found.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.ended = False

    def add(self, piece: str) -> str:
        """What of the text may be shown after one more piece: all but what could be the beginning of a stop."""
        if self.ended:
            return ""
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.ended = True
            return self._take(min(found))
        doubtful = max(
            (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
            default=0,
        )
        return self._take(len(self._held) - doubtful)

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        return "" if self.ended else self._take(len(self._held))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken


def pieces(decode: Callable[[int], str], tokens: Iterator[int], until: TextUntil) -> Iterator[str]:
    """The text of tokens as it comes, up to where it stops."""
    for token in tokens:
        yield until.add(decode(token))
        if until.ended:
            return
    yield until.rest()
