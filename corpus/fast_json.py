"""Fast JSON: the texts of plain lines of a .jsonl file, by the package msgspec.

    plain_texts([b'{"id": 1, "text": "To be"}', b'{"text": NaN}'], "text")    # ["To be", None]

Python's json defines which lines are valid and what their texts are. msgspec passes over the other
fields without making Python objects of them, in a third of the time. It parses only lines for which
the two cannot differ. The reader gives every other line to json, which also names the faults.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

VERSION = "0.22.0"  # the version that tests/corpus/test_fast_json.py compared with json
SHALLOW = 500  # brackets in a line; json allows about twice as many levels of nesting


def plain_texts(lines: Sequence[bytes], field: str) -> list[str | None]:
    """Return the texts of lines that msgspec can parse.

    Args:
        lines: Lines of a .jsonl file.
        field: Name of the field that holds the text.

    Returns:
        A text for each line, or None for a line that json must parse: a line that is invalid, blank
        or deeply nested, or has something that only json accepts, such as NaN. If msgspec is not
        installed in the version that was compared with json, this is every line.
    """
    decode = _decoder(field)
    if decode is None:
        return [None] * len(lines)
    texts: list[str | None] = []
    for line in lines:
        if len(line) > SHALLOW and _may_be_deep(line):
            texts.append(None)
            continue
        try:
            if not line.isascii():
                line.decode()  # msgspec does not check the fields that it passes over
            texts.append(decode(line).text)
        except Exception:  # json decides whether the line is invalid, and why
            texts.append(None)
    return texts


def _may_be_deep(line: bytes) -> bool:
    """Return whether a line has so many brackets that one of the parsers may find it too deep."""
    return line.count(b"[") + line.count(b"{") > SHALLOW


@functools.lru_cache
def _decoder(field: str) -> Callable[[bytes], Any] | None:
    """Return a function from a line to an object with the attribute `text`.

    The result is None if msgspec is not installed in the right version, or does not accept the name
    of the field.
    """
    try:
        import msgspec
    except ImportError:
        return None
    if msgspec.__version__ != VERSION:
        return None
    try:
        text = ("text", str, msgspec.field(name=field))
        row = msgspec.defstruct("Row", [text], gc=False)  # no cycles: the text is its only field
        return msgspec.json.Decoder(row).decode
    except ValueError:  # a name with a quotation mark, a backslash or a control character
        return None
