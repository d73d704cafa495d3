"""Files to documents: .txt, .jsonl and .parquet files, also as .gz or .zst, read in chunks.

    chunks = divide(Source("corpus.jsonl", "jsonl"), chunk_bytes=1 << 23)
    for positions, texts in read(chunks[0][0]): ...

A chunk is part of one file and holds whole documents: the chunks of a file, one after another, give
the documents of the file, wherever it is divided. A running text comes in parts whose token ids,
one after another, are the token ids of the whole text (boundaries.py).
"""

import functools
import itertools
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedIOBase

from corpus.boundaries import RECORD_END, next_boundary, record_ends
from corpus.sources import (
    BLOCK,
    InvalidDocument,
    InvalidText,
    Source,
    damage,
    open_file,
    text_of_row,
)
from corpus.tables import divide_table, read_table

BLANK_LINES = re.compile(rb"(?:[ \t\r\f\v]*\n)*")
JSON_SPACE = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # not documented


def divide(source: Source, chunk_bytes: int) -> list[tuple[Source, int]]:
    """Divide a source into chunks that can be read independently.

    Args:
        source: a file, or a range of one. A compressed text is never divided.
        chunk_bytes: least size of a chunk but the last; a chunk ends at the next place where the
            source may be divided.

    Returns:
        (chunk, size of the chunk in bytes) in order; none for an empty file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a table is damaged, or the package that reads it is missing.
    """
    if source.is_table:
        return divide_table(source, chunk_bytes)
    file_bytes = os.path.getsize(source.path)
    if source.compressed:
        return [(source, file_bytes)]
    if file_bytes == 0:
        return []
    stop = file_bytes if source.stop is None else source.stop
    if source.division == "file" and source.format == "text":
        return [(source, stop - source.start)]
    chunks = []
    start = source.start
    with open(source.path, "rb") as file:
        while start < stop:
            end = _next_end(file, source, start + chunk_bytes, stop)
            chunks.append((replace(source, start=start, stop=end), end - start))
            start = end
    if len(chunks) == 1:
        return [(source, chunks[0][1])]
    return chunks


def _next_end(file, source: Source, start: int, stop: int) -> int:
    """Return the first byte at or after `start` where `source` may be divided, at most `stop`."""
    if start >= stop:
        return stop
    division = _record_division(source)
    if division == "":
        return next_boundary(file, start, stop)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        match = RECORD_END[division].search(data, start, stop)
        return match.end() if match else stop


def _record_division(source: Source) -> str:
    """Return how the bytes of a source are divided into records, one of DIVISIONS."""
    return "line" if source.format == "jsonl" else source.division


def read(chunk: Source) -> Iterator[tuple[Sequence[int], list[str | InvalidDocument]]]:
    """Yield the documents of a chunk, a list of some of them at a time.

    Args:
        chunk: a source, or a chunk of one.

    Yields:
        (positions, texts), two sequences of one length. A position is the document's first byte in
        the uncompressed file, or its row, so it depends on nothing but the file. A text is a str,
        or an InvalidDocument.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a table is damaged, or a package is missing.
    """
    if chunk.is_table:
        yield from read_table(chunk)
        return
    lines = _LineCounter(chunk)
    try:
        with open_file(chunk.path) as file:
            file.seek(chunk.start)
            for block in _blocks(file, chunk):
                positions, texts = _documents(block, chunk, lines)
                lines.finish(block)
                if texts:
                    yield positions, texts
    except damage(chunk.path) as error:
        reason = f"the compressed file is damaged from here on ({error})"
        yield [lines.position], [InvalidDocument(reason, lines.place())]


@dataclass
class _Block:
    """Whole records of a file, which end at `ends`; the first begins at byte `position`."""

    position: int
    data: bytes
    ends: list[int]


def _blocks(file: BufferedIOBase, chunk: Source) -> Iterator[_Block]:
    """Yield the records of a chunk in blocks of about BLOCK bytes, or of one longer record.

    Memory is bounded by twice the longest record. A damaged file gives the records before the
    damage, then its error.
    """
    division = _record_division(chunk)
    position = chunk.start
    left = chunk.length
    data = bytearray()
    wanted = BLOCK
    error = None
    while left > 0 and error is None:
        try:
            part = file.read1(int(min(wanted, left)))
        except damage(chunk.path) as damaged:
            error = damaged
            part = b""
        left = left - len(part) if part else 0
        data += part
        wanted -= len(part)
        if wanted > 0 and left > 0:
            continue
        ends = record_ends(bytes(data), division)
        if left == 0 and error is None and len(data) > (ends[-1] if ends else 0):
            ends.append(len(data))
        if ends:
            yield _Block(position, bytes(data[: ends[-1]]), ends)
            position += ends[-1]
            del data[: ends[-1]]
        wanted = max(BLOCK, len(data))
    if error is not None:
        raise error


class _LineCounter:
    """Gives places in a chunk their line numbers, which ascend: each byte is counted once."""

    def __init__(self, chunk: Source):
        self.chunk = chunk
        self.position = chunk.start  # of the bytes counted
        self.line_feeds = 0  # of the chunk before `position`
        self.line_feeds_before: int | None = (
            None  # the chunk, counted if the chunk has an invalid document
        )

    def finish(self, block: _Block) -> None:
        """Count the rest of a block."""
        self._count(block, len(block.data))

    def place_in(self, block: _Block, offset: int) -> str:
        """Return file and line of a byte of the block at hand."""
        self._count(block, offset)
        return self.place()

    def place(self) -> str:
        """Return file and line of the first byte that is not counted."""
        if self.line_feeds_before is None:
            self.line_feeds_before = _count_line_feeds(self.chunk.path, self.chunk.start)
        line = 1 + self.line_feeds_before + self.line_feeds
        return f"{self.chunk.path}, line {line}"

    def _count(self, block, offset):
        start = self.position - block.position
        self.line_feeds += block.data.count(b"\n", start, offset)
        self.position = block.position + offset


def place_of(source: Source, position: int) -> str:
    """Return file and line, or file and row, of a document; reads the file up to there."""
    if source.is_table:
        return f"{source.path}, row {position}"
    return f"{source.path}, line {1 + _count_line_feeds(source.path, position)}"


def _count_line_feeds(path: str, stop: int) -> int:
    """Return how many line feeds the first `stop` bytes of a file hold."""
    count = 0
    left = stop
    with open_file(path) as file:
        while left > 0 and (block := file.read1(min(BLOCK, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _documents(block: _Block, chunk: Source, lines: _LineCounter) -> tuple[list, list]:
    """Return (positions, texts) of the documents of a block."""
    parse = _PARSERS[chunk.division]
    if chunk.format == "jsonl":
        parse = functools.partial(_json_text, field=chunk.field)
    division = _record_division(chunk)
    skip_blank = division in RECORD_END
    skip_blank_lines = division in ("blank-line", "article")
    positions: list[int] = []
    texts: list[str | InvalidDocument] = []
    for start, end in itertools.pairwise([0, *block.ends]):
        record = block.data[start:end]
        if skip_blank and record.isspace():
            continue
        if skip_blank_lines:
            start = _skip_blank_lines(block.data, start, end)
            record = block.data[start:end]
        try:
            texts.append(parse(record))
        except InvalidText as error:
            place = lines.place_in(block, start + error.offset)
            texts.append(InvalidDocument(str(error), place))
        positions.append(block.position + start)
    return positions, texts


def _skip_blank_lines(data: bytes, start: int, end: int) -> int:
    match = BLANK_LINES.match(data, start, end)
    return match.end() if match else start


def _decode(record: bytes) -> str:
    """Return the text of a record."""
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        encoding = "utf-16" if record[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        reason = (
            f"not UTF-8 (byte {record[error.start]:#04x}); convert the file first, for example "
            f"with iconv -f {encoding} -t utf-8"
        )
        raise InvalidText(reason, error.start) from None


def _decode_stripped(record: bytes) -> str:
    return _decode(record).strip()


_PARSERS = {
    "": _decode,
    "file": _decode,
    "line": _decode_stripped,
    "blank-line": _decode_stripped,
    "article": _decode_stripped,
}


def _json_text(record: bytes, field: str) -> str:
    """Return the text that a line of a .jsonl file holds."""
    try:
        text = record.strip(JSON_SPACE).decode()
        row, end = _SCAN(text, 0)  # half the time of json.loads
        if end == len(text) and type(row[field]) is str:
            return row[field]
    except (StopIteration, ValueError, LookupError, TypeError, RecursionError):
        pass  # the slow way finds out what is wrong
    text = _decode(record.removesuffix(b"\n").removeprefix(BYTE_ORDER_MARK))
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidText(f"not JSON ({error})") from None
    return text_of_row(row, field)
