"""Files to documents: .txt, .jsonl, .parquet, each also .gz or .zst, cut into spans.

    spans = cut(Source("corpus.jsonl", "jsonl"), piece_bytes=1 << 23)
    for positions, texts in read(spans[0]): ...

A span is part of one file and holds whole documents: what the spans of a file yield, one after
another, is what the file yields, wherever it was cut. A running text (documents="") comes in parts
that a tokenizer may take one by one, with the ids that the whole text would give.
"""

import contextlib
import functools
import itertools
import json
import mmap
import os
import re
from dataclasses import replace

from corpus.sources import BLOCK, Bad, Source, damage, field_of, open_file
from corpus.tables import cut_table, read_table

# Cutting a text just before a lone space, or just after a lone line feed, changes no token: neither
# GPT-2's pattern nor any other of tiktoken's reaches over such a place from both sides. In UTF-8,
# leaving out every character that starts or ends like a space that isn't ASCII:
_CHARACTER = (
    rb"(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xef][\x80-\xbf]{2}|\xe3\x80[\x81-\xbf]"
    rb"|\xe3[\x81-\xbf][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{3})"
)
_NEXT = rb"(?:[!-.0-~\xc3-\xdf\xe0\xe4-\xef\xf0-\xf4]|\xe3[\x81-\xbf])"
BOUNDARY = {  # where a file may be cut: behind each match
    "": re.compile(_CHARACTER + rb"(?:(?= " + _NEXT + rb")|\n(?=" + _NEXT + rb"))"),
    "line": re.compile(rb"\n"),
    "blank-line": re.compile(rb"\n[ \t\r\f\v]*\n"),
    "article": re.compile(rb"\n[ \t\r\f\v]*\n(?= = [^=\s][^\n]* = \r?\n)"),  # WikiText's title
}
BLANK_LINES = re.compile(rb"(?:[ \t\r\f\v]*\n)*")
_SCAN = json.JSONDecoder().scan_once


def cut(source: Source, piece_bytes: int) -> list[tuple[Source, int]]:
    """(part, its size in bytes) of a source, about `piece_bytes` each where it can be cut; a
    compressed text can't. Raises OSError and ValueError for a file that can't be read."""
    if source.table:
        return cut_table(source, piece_bytes)
    size = os.path.getsize(source.path)
    stop = size if source.stop is None else source.stop
    pattern = BOUNDARY.get("line" if source.format == "jsonl" else source.documents)
    if source.compressed:
        return [(source, size)]
    if pattern is None or stop - source.start <= piece_bytes:
        return [(source, stop - source.start)] if size else []
    parts, start = [], source.start
    with open(source.path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while start < stop:
            match = pattern.search(text, start + piece_bytes, stop)
            end = match.end() if match else stop
            parts.append((replace(source, start=start, stop=end), end - start))
            start = end
    return parts


def read(source: Source):
    """Yields (positions, texts), lists of some documents each; a Bad where a text is none.

    position: the document's first byte in the (unpacked) file, or its row; it depends on nothing
    but the file. Raises OSError, and ValueError for a table that can't be read.
    """
    if source.table:
        yield from read_table(source)
        return
    position = source.start
    try:
        with open_file(source.path) as f:
            f.seek(source.start)
            if source.format == "jsonl":
                make = functools.partial(_json_text, field=source.field)
                groups = _lines(f, source)
            else:
                make = _text if source.documents in ("", "file") else _stripped
                groups = _GROUPS[source.documents](f, source)
            for positions, data in groups:
                position = positions[-1]
                yield positions, list(map(make, data))
    except damage(source.path) as error:
        yield [position], [Bad(f"the compressed file is damaged from here on ({error})")]


def _blocks(f, source, last):
    """(position, bytes) of about a block: last(bytes) tells where it may end, 0 where nowhere."""
    position, rest, left = source.start, b"", source.length
    while left > 0:
        block = f.read1(min(max(BLOCK, len(rest)), left))  # more, where a document is longer
        left = left - len(block) if block else 0
        rest += block
        if end := last(rest) if left else len(rest):
            yield position, rest[:end]
            position, rest = position + end, rest[end:]


def _lines(f, source):
    """Without their ends; blank ones are left out."""
    for position, block in _blocks(f, source, lambda data: data.rfind(b"\n") + 1):
        lines = block.split(b"\n")
        starts = itertools.accumulate((len(line) + 1 for line in lines), initial=position)
        kept = list(map(bytes.strip, lines))
        if any(kept):
            yield list(itertools.compress(starts, kept)), list(itertools.compress(lines, kept))


def _paragraphs(f, source):
    """What lies between blank lines, or from one article's title to the next."""

    def ends(data):
        return [match.end() for match in BOUNDARY[source.documents].finditer(data)]

    for position, block in _blocks(f, source, lambda data: max(ends(data), default=0)):
        positions, texts = [], []
        for start, end in itertools.pairwise([0, *ends(block), len(block)]):
            start = BLANK_LINES.match(block, start, end).end()
            if block[start:end].strip():
                positions.append(position + start)
                texts.append(block[start:end])
        if texts:
            yield positions, texts


def _stream(f, source):
    """A running text in parts, cut where no token is."""

    def last(data):
        for start in (max(0, len(data) - (1 << 14)), 0):  # there is one near the end, as a rule
            if ends := [match.end() for match in BOUNDARY[""].finditer(data, start)]:
                return ends[-1]
        return 0

    for position, block in _blocks(f, source, last):
        yield [position], [block]


def _whole(f, source):
    for position, block in _blocks(f, source, lambda data: 0):
        yield [position], [block]


_GROUPS = {
    "": _stream, "line": _lines, "blank-line": _paragraphs, "article": _paragraphs, "file": _whole,
}  # fmt: skip


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        likely = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        bad = Bad(
            f"not UTF-8 (byte {data[error.start]:#04x}); convert it first, say with "
            f"iconv -f {likely} -t utf-8"
        )
        bad.offset = error.start
        return bad


def _stripped(data: bytes) -> str:
    text = _text(data)
    return text if isinstance(text, Bad) else text.strip()


def _json_text(data: bytes, field: str) -> str:
    try:
        text = data.decode()
        row, end = _SCAN(text, 0)  # half the time of json.loads
        if end == len(text) and type(row[field]) is str:
            return row[field]
    except (StopIteration, ValueError, LookupError, TypeError, RecursionError):
        pass  # slowly, to say what is wrong
    text = _text(data.removeprefix(b"\xef\xbb\xbf"))
    try:
        return text if isinstance(text, Bad) else field_of(json.loads(text), field)
    except (ValueError, RecursionError) as error:
        return Bad(f"no JSON ({error})")


def where(source: Source, position: int) -> str:
    """A place in a file, for people: its line, or its row."""
    if source.table:
        return f"{source.path}, row {position}"
    line = 1
    with contextlib.suppress(*damage(source.path)), open_file(source.path) as f:
        while position > 0 and (block := f.read(min(BLOCK, position))):
            line, position = line + block.count(b"\n"), position - len(block)
    return f"{source.path}, line {line}"
