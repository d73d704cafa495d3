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

from source import BLOCK, Bad, Source, damage, field_of, open_file
from tables import cut_table, read_table

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
    "article": re.compile(rb"\n[ \t\r]*\n(?= = [^=\s][^\n]* = \r?\n)"),
}
_SCAN = json.JSONDecoder().scan_once
TITLE = re.compile(rb" = [^=\s].* = \r?\n")  # of an article in WikiText


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


def _lines(f, source):
    """Lines of about a block, without their ends; blank ones are left out."""
    position, rest, left = source.start, b"", source.length
    while left > 0:
        block = f.read1(min(max(BLOCK, len(rest)), left))  # more, where a line is longer
        left = left - len(block) if block else 0
        rest += block
        end = rest.rfind(b"\n") + 1 if left else len(rest)
        lines, rest = rest[:end].split(b"\n"), rest[end:]
        starts = itertools.accumulate((len(line) + 1 for line in lines), initial=position)
        kept = list(map(bytes.strip, lines))
        position += end
        if any(kept):
            yield list(itertools.compress(starts, kept)), list(itertools.compress(lines, kept))


def _grouped(f, source):
    """Lines that belong together: between blank lines, or from one article's title to the next."""
    lines, start, blank, left = [], source.start, True, source.length
    position = start
    while position - source.start < left and (line := f.readline()):
        begins = blank and (source.documents == "blank-line" or TITLE.fullmatch(line))
        blank = line.isspace()
        if lines and begins and not blank:
            yield [start], [b"".join(lines)]
            lines = []
        if not lines:
            start = position
        if lines or not blank:
            lines.append(line)
        position += len(line)
    if lines:
        yield [start], [b"".join(lines)]


def _whole(f, source):
    if data := f.read(-1 if source.stop is None else source.length):  # an empty .gz is empty, too
        yield [source.start], [data]


def _stream(f, source):
    """A running text in parts of about a block, cut where no token is."""
    start, rest, left = source.start, b"", source.length
    while block := f.read(min(BLOCK, left)):
        left -= len(block)
        searched = max(0, len(rest) - 8)  # no boundary lies further back: it was looked for
        rest += block
        ends = [m.end() for m in BOUNDARY[""].finditer(rest, max(searched, len(rest) - (1 << 14)))]
        ends = ends or [m.end() for m in BOUNDARY[""].finditer(rest, searched)]
        if ends:
            yield [start], [rest[: ends[-1]]]
            start, rest = start + ends[-1], rest[ends[-1] :]
    if rest:
        yield [start], [rest]


_GROUPS = {
    "": _stream, "line": _lines, "blank-line": _grouped, "article": _grouped, "file": _whole,
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
