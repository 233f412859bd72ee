from __future__ import annotations

import corpus


def test_parts_are_disjoint_and_complete():
    found = {f"document {i}": f"text {i}".encode() for i in range(2000)}
    training, validation, heldout = corpus.split(found)
    assert sorted([*training, *validation, *heldout]) == sorted(found.values())
    assert 30 <= len(heldout) <= 100
    assert 30 <= len(validation) <= 100
    more = corpus.split(found | {"another": b"another"})
    assert [text for text in more[2] if text != b"another"] == heldout


def test_corpus_is_the_standard_library():
    found = corpus.documents()
    assert "textwrap.py" in found
    assert "topic assert" in found
    assert b"Return the absolute value" in found["docstrings of builtins"]
    assert not [name for name in found if "site-packages" in name or name.startswith("test/")]
