"""Tokenizers, chat templates, and texts that end at a string."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decoder_config import Config
from tokenization import (
    ByteTokenizer,
    ChatTemplate,
    FileTokenizer,
    NumberTokenizer,
    TextUntil,
    pieces,
    stop_tokens_of,
    tokenizer_for,
)

DATA = Path(__file__).parents[1] / "data"
CONFIG = Config(256, 8, 8, 1, 1, 1, 8, 8, eos_token_ids=(2,))

# Written for this test, with what templates of chat models use.
TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = 'none' %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}<sys>{{ system | trim }}</sys>
{%- for message in rest %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {%- if loop.index0 > 3 %}{% break %}{% endif %}
<{{ message['role'] }}>{{ message['content'] | tojson }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
<assistant>
{%- endif %}
"""
TOKENS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "pad_token": None,
    "model_max_length": 8,
}
MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": 'Say "é" <b>'}]


def test_bytes_of_one_character_come_out_together():
    tokenizer = ByteTokenizer()
    decode = tokenizer.decoder()
    assert [decode(token) for token in tokenizer.encode("aé→")] == ["a", "", "é", "", "", "→"]


def test_two_rows_are_decoded_apart():
    first, second = ByteTokenizer().decoder(), ByteTokenizer().decoder()
    euro = list("€".encode())
    assert [first(euro[0]), second(ord("b")), first(euro[1]), first(euro[2])] == ["", "b", "", "€"]


def test_a_tokenizer_file():
    pytest.importorskip("tokenizers")
    tokenizer = FileTokenizer(DATA / "llama_base" / "tokenizer.json")
    tokens = tokenizer.encode("the model", special=False)
    assert tokenizer.encode("the model")[-len(tokens) :] == tokens
    assert "".join(map(tokenizer.decoder(), tokens)).strip() == "the model"


def test_numbers():
    tokenizer = NumberTokenizer()
    assert tokenizer.encode("3, 5 7") == [3, 5, 7]
    assert tokenizer.decoder()(12) == " 12"


def test_which_tokenizer_a_model_has(tmp_path: Path):
    assert isinstance(tokenizer_for(tmp_path, CONFIG, token_ids=True), NumberTokenizer)
    assert isinstance(tokenizer_for(tmp_path, CONFIG, token_ids=False), ByteTokenizer)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; give the prompt as numbers"):
        tokenizer_for(tmp_path, Config(300, 8, 8, 1, 1, 1, 8, 8), token_ids=False)


def test_a_template_writes_the_conversation():
    pytest.importorskip("jinja2")
    text = ChatTemplate(TEMPLATE, TOKENS).render(MESSAGES)
    assert text == '<s><sys>Be brief.</sys><user>"Say \\"é\\" <b>"</s><assistant>'
    with pytest.raises(ValueError, match="refuses the conversation: no role tool"):
        ChatTemplate(TEMPLATE, TOKENS).render([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="refuses the conversation"):
        ChatTemplate("{{ messages.append(1) }}").render(MESSAGES)  # Out of the sandbox.
    assert len(ChatTemplate("{{ strftime_now('%Y') }}").render(MESSAGES)) == 4


def test_a_template_writes_what_transformers_writes(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    source = DATA / "llama_base" / "tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source), bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(TEMPLATE, TOKENS).render(MESSAGES) == expected


@pytest.mark.parametrize("where", ["text", "list", "file"])
def test_where_a_model_has_its_template(where: str, tmp_path: Path):
    pytest.importorskip("jinja2")
    settings: dict[str, Any] = dict(TOKENS)
    if where == "text":
        settings["chat_template"] = "{{ bos_token }}A"
    elif where == "list":
        named = [{"name": "tools", "template": "B"}, {"name": "default", "template": "{{ bos_token }}A"}]
        settings["chat_template"] = named
    else:
        settings["chat_template"] = "overridden"
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}A")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.of_model(tmp_path).render(MESSAGES) == "<s>A"


def test_a_model_without_a_template(tmp_path: Path):
    with pytest.raises(ValueError, match="has no chat template; leave out --chat"):
        ChatTemplate.of_model(tmp_path)


def test_stop_tokens_of_both_files(tmp_path: Path):
    assert stop_tokens_of(tmp_path, CONFIG) == (2,)
    for value, expected in ((7, (2, 7)), ([9, 2, 5], (2, 5, 9)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert stop_tokens_of(tmp_path, CONFIG) == expected


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "abc", "abc"),
        ([""], "abc", "abc"),
        (["bc"], "abcd", "a"),
        (["c", "bc"], "abcd", "a"),
        (["</s>", "zz"], "a < b </ c </s", "a < b </ c </s"),
        (["END"], "the EN END of", "the EN "),
        (["aab"], "aaab", "a"),
    ],
)
def test_a_text_ends_at_a_string_however_it_comes(stops: list[str], text: str, expected: str):
    tokens = list(text.encode())
    until = TextUntil(stops)
    shown = list(pieces(ByteTokenizer().decoder(), iter(tokens), until))
    assert "".join(shown) == expected
    assert until.ended == (expected != text)
    whole = TextUntil(stops)
    assert whole.add(text) + whole.rest() == expected
