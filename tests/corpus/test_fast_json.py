"""Fast JSON: msgspec parses plain lines, and documents and errors are those of json."""

import json
import sys

import pytest
from conftest import read_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import fast_json
from corpus.fast_json import SHALLOW, VERSION, plain_texts
from corpus.sources import Source

needs_msgspec = pytest.mark.skipif(
    fast_json._decoder("text") is None, reason=f"needs msgspec {VERSION} (requirements-dev.txt)"
)
PLAIN = {  # line -> text: the cases in which two parsers of JSON could differ
    b'{"text": "a\\n\\u00e9\\ud83d\\ude00\\/"}': "a\né😀/",
    '{"id": [1, -0.5e-7, {}], "text": "漢字"}'.encode(): "漢字",
    b' {"text" : "a"}\t\r': "a",
    b'{"te\\u0078t": "a"}': "a",
    b'{"text": "first", "text": "last"}': "last",
    b'{"text": 1, "text": "last"}': None,
    b'{"x": {"text": 1}, "text": "a"}': "a",
    b'{"n": ' + b"9" * 40 + b', "text": "a"}': "a",
    b'{"text": "' + b"[" * (SHALLOW - 1) + b'"}': "[" * (SHALLOW - 1),
}
NOT_PLAIN = [  # lines that are left to json, valid or not
    b"", b" \t", b"[]", b"null", b'"text"', b'{"text": null}', b'{"body": "a"}', b'{"text": "a"',
    b'{"text": "a"} x', b'{"text": "a"}{"text": "b"}', b'{"text": "a",}',
    b'\xef\xbb\xbf{"text": "a"}', b'{"text": "\\ud83d"}', b'{"x": NaN, "text": "a"}',
    b'{"x": -Infinity, "text": "a"}',
    b'{"text": "\xe9"}', b'{"x": "\xe9", "text": "a"}', b'{"\xe9": 1, "text": "a"}',
    b'{"text": "a\tb"}', b'{"x": "\x00", "text": "a"}', b'{"x": 01, "text": "a"}',
    b'{"x": 1., "text": "a"}', b'{"x": "\\x", "text": "a"}', b'{"x": tru, "text": "a"}',
    b'{"x": ' + b"[" * (SHALLOW + 1) + b"]" * (SHALLOW + 1) + b', "text": "a"}',
]  # fmt: skip
FRAGMENTS = [
    *PLAIN, *NOT_PLAIN, *b'{ } [ ] : , " \\ a "text" "x" "a" 0 1 - . 1e5 1e999 NaN null'.split(),
    b'"text": "b"', b"Infinity", b'"x": ', b"\\u", b"\\ud83d", b"\\ude00", b"\\n", b"\\x",
    b"\n", b"\r", b"\t", b" ", b"\v", b"\f", b"\x00", b"\x1f", b"\x7f", b"\x80", b"\xff",
    b"\xc3\xa9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"9" * 5000, b"[" * 1200,
]  # fmt: skip


@needs_msgspec
def test_plain_lines_are_parsed_by_msgspec_and_all_others_are_left_to_json():
    assert dict(zip(PLAIN, plain_texts(list(PLAIN), "text"))) == PLAIN
    assert plain_texts(NOT_PLAIN, "text") == [None] * len(NOT_PLAIN)


@st.composite
def lines_of_json(draw):
    """Return lines most of which are JSON with a small fault, or nearly so."""
    parts = [b'{"text": "', b"a", b'", "x": ', b"1", b"}"]
    for _ in range(draw(st.integers(0, 4))):
        position = draw(st.integers(0, len(parts)))
        fragment = draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=4))
        parts[position : position + draw(st.integers(0, 1))] = [fragment]
    return b"".join(parts)


@needs_msgspec
@settings(max_examples=400, deadline=None)
@given(st.lists(lines_of_json(), max_size=4), st.sampled_from(["text", "x", "", "a b", 'a"', "é"]))
def test_documents_and_errors_are_the_same_without_msgspec(tmp_path_factory, lines, field):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = Source(str(path), "jsonl", field=field)
    found = read_documents(source)
    with pytest.MonkeyPatch.context() as without_msgspec:
        without_msgspec.setattr(fast_json, "_decoder", lambda field: None)
        assert found == read_documents(source)


@needs_msgspec
def test_most_lines_of_a_file_never_reach_json(tmp_path, monkeypatch):
    texts = [f"To be, or not to be: {i} é\n" for i in range(1000)]
    rows = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.setattr("corpus.reader._json_text", None)  # a call would fail
    assert [text for _, text in read_documents(Source(str(tmp_path / "a.jsonl"), "jsonl"))] == texts


@pytest.mark.parametrize("module", ["missing", "of another version"])
def test_without_msgspec_in_the_compared_version_json_does_the_work(monkeypatch, module):
    other = type(sys)("msgspec")
    other.__version__ = "0.0.1"
    monkeypatch.setitem(sys.modules, "msgspec", None if module == "missing" else other)
    fast_json._decoder.cache_clear()
    try:
        assert plain_texts([b'{"text": "a"}'], "text") == [None]
    finally:
        fast_json._decoder.cache_clear()
