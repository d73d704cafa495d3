"""Readers: chunks of texts, JSON lines and tables, also compressed, to documents.

    chunks = divide(Source("corpus.jsonl", "jsonl"), chunk_bytes=1 << 23)
    for positions, texts in read(chunks[0][0]): ...

A chunk is a range of one file and holds whole documents. All chunks of a file, one after another,
give the documents of the file, wherever the file is divided. A running text is read as several
texts, whose token ids, one after another, are the token ids of the running text (boundaries.py).
"""

import functools
import itertools
import json
import mmap
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedIOBase

from corpus.boundaries import RECORD_END, next_boundary, record_ends
from corpus.fast_json import plain_texts
from corpus.opening import (
    BYTE_ORDER_MARK,
    DamagedFile,
    UnreadableFile,
    open_text,
    shell_input,
)
from corpus.sources import BLOCK, InvalidDocument, InvalidText, Source, text_of_row
from corpus.tables import divide_table, place_of_row, read_table

BLANK_LINES = re.compile(rb"(?:[ \t\r\f\v]*\n)*")
ASCII_SPACE = " \t\r\f\v\n"
CONTROL = re.compile(rb"[\0-\x06\x0e-\x19]")  # no text in latin1 or a similar encoding has them
JSON_SPACE = b" \t\r\n"
LONGEST_FIRST_LINE = 1 << 24  # bytes of a .json file that are read to find out what it holds
PRINT_ROWS = (
    "import json, sys; [print(json.dumps(row)) for row in json.loads(sys.stdin.buffer.read())]"
)
_SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # not documented


def divide(source: Source, chunk_bytes: int) -> list[tuple[Source, int]]:
    """Divide a source into chunks that can be read independently.

    Args:
        source: A file, or a range of a file. A compressed text is never divided.
        chunk_bytes: Least size of a chunk, except for the last one. A chunk ends at the next place
            at which the source may be divided.

    Returns:
        Pairs (chunk, size of the chunk in bytes), in order; none for an empty file.

    Raises:
        OSError: The file cannot be read.
        UnreadableFile: A table is damaged, or the first bytes are not those of a text.
        ValueError: The package that reads tables or the compression format is missing.
    """
    if source.is_table:
        return divide_table(source, chunk_bytes)
    open_text(source.path).close()
    file_bytes = os.path.getsize(source.path)
    if source.compressed:
        return [(source, file_bytes)]
    if file_bytes <= source.start:
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
    """Return the first place from `start` on at which `source` may be divided, or `stop`."""
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
    """Yield the documents of a chunk in lists.

    Args:
        chunk: A source, or a chunk of a source.

    Yields:
        Pairs (positions, texts) of two equally long sequences. A position is the first byte of the
        document in the uncompressed file, or the row of the document in a table. It depends on
        nothing but the file. A text is a str, or an InvalidDocument. A file that cannot be read
        gives one InvalidDocument, and so does the rest of a damaged file; rows that are lost in a
        damaged parquet table give one each.

    Raises:
        OSError: The file cannot be read.
        ValueError: A package is missing.
    """
    lines = _LineCounter(chunk)
    try:
        if chunk.is_table:
            yield from read_table(chunk)
            return
        with open_text(chunk.path) as file:
            file.seek(chunk.start)
            parse = _parse_json_lines if chunk.format == "jsonl" else _parse_records
            for records in _read_records(file, chunk):
                positions, texts = parse(records, chunk, lines)
                lines.finish(records)
                if texts:
                    yield positions, texts
    except DamagedFile as error:
        yield [lines.position], [InvalidDocument(error.reason, lines.place())]
    except UnreadableFile as error:
        yield [chunk.start], [InvalidDocument(error.reason, error.path)]


@dataclass
class _Records:
    """Some whole records of a file, one after another.

    Attributes:
        position: Position of the first record in the uncompressed file, in bytes.
        data: Bytes of all records.
        ends: End of each record in `data`; of JSON lines only the end of the last one.
    """

    position: int
    data: bytes
    ends: list[int]


def _read_records(file: BufferedIOBase, chunk: Source) -> Iterator[_Records]:
    """Yield the records of a chunk: as many as fit into about BLOCK bytes, or one longer record.

    Memory is bounded by twice the longest record. A damaged compressed file gives the records
    before the damage, then raises DamagedFile.
    """
    position = chunk.start
    left = chunk.length
    data = bytearray()
    wanted = BLOCK
    error = None
    while left > 0 and error is None:
        try:
            new_bytes = file.read1(int(min(wanted, left)))
        except DamagedFile as damaged:
            error = damaged
            new_bytes = b""
        left = left - len(new_bytes) if new_bytes else 0
        data += new_bytes
        wanted -= len(new_bytes)
        if wanted > 0 and left > 0:
            continue
        ends = _ends(data, chunk)
        if left == 0 and error is None and len(data) > (ends[-1] if ends else 0):
            ends.append(len(data))
        if ends:
            with memoryview(data) as view:  # a slice of a bytearray would be one more copy
                whole = bytes(view[: ends[-1]])
            yield _Records(position, whole, ends)
            position += ends[-1]
            del data[: ends[-1]]
        wanted = max(BLOCK, len(data))
    if error is not None:
        raise error


def _ends(data: bytearray, chunk: Source) -> list[int]:
    """Return the ends of the complete records in `data`; of JSON lines only the last end."""
    if chunk.format != "jsonl":
        return record_ends(bytes(data), chunk.division)
    end = data.rfind(b"\n") + 1
    return [end] if end else []


class _LineCounter:
    """The line numbers of ascending positions in a chunk; each byte is counted once.

    Attributes:
        chunk: Chunk that is read.
        position: End of the bytes that have been counted, in the uncompressed file.
        line_feeds: Number of line feeds in the chunk before `position`.
        line_feeds_before: Number of line feeds before the chunk; None until a place is asked for.
    """

    def __init__(self, chunk: Source):
        self.chunk = chunk
        self.position = chunk.start
        self.line_feeds = 0
        self.line_feeds_before: int | None = None

    def finish(self, records: _Records) -> None:
        """Count the line feeds in the rest of the records."""
        self._count(records, len(records.data))

    def place_in(self, records: _Records, offset: int) -> str:
        """Return file and line of the byte at `offset` in the data of the records."""
        self._count(records, offset)
        return self.place()

    def place(self) -> str:
        """Return file and line of the byte at `self.position`."""
        if self.line_feeds_before is None:
            self.line_feeds_before = _count_line_feeds(self.chunk.path, self.chunk.start)
        line = 1 + self.line_feeds_before + self.line_feeds
        return f"{self.chunk.path}, line {line}"

    def _count(self, records, offset):
        """Count the line feeds up to `offset` in the data of the records."""
        start = self.position - records.position
        self.line_feeds += records.data.count(b"\n", start, offset)
        self.position = records.position + offset


def place_of(source: Source, position: int) -> str:
    """Return file and line, or file and row, of a document.

    A text file is read up to the document, to count its lines.

    Args:
        source: Source of the document, or a chunk of it.
        position: Position of the document, as `read` yields it.

    Raises:
        OSError: The file cannot be read.
    """
    if source.is_table:
        return place_of_row(source, position)
    return f"{source.path}, line {1 + _count_line_feeds(source.path, position)}"


def _count_line_feeds(path: str, stop: int) -> int:
    """Return the number of line feeds in the first `stop` bytes of a file."""
    count = 0
    left = stop
    with open_text(path) as file:
        while left > 0 and (block := file.read1(min(BLOCK, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _parse_records(
    records: _Records, chunk: Source, lines: _LineCounter
) -> tuple[list[int], list[str | InvalidDocument]]:
    """Return (positions, texts) of the documents in some records."""
    parse = _PARSERS[chunk.division]
    skip_blank = chunk.division in RECORD_END
    skip_blank_lines = chunk.division in ("blank-line", "article")
    positions: list[int] = []
    texts: list[str | InvalidDocument] = []
    for start, end in itertools.pairwise([0, *records.ends]):
        record = records.data[start:end]
        if skip_blank and record.isspace():
            continue
        if skip_blank_lines:
            start = _skip_blank_lines(records.data, start, end)
            record = records.data[start:end]
        try:
            texts.append(parse(record))
        except InvalidText as error:
            place = lines.place_in(records, start + error.offset)
            texts.append(InvalidDocument(str(error), place))
        positions.append(records.position + start)
    return positions, texts


def _parse_json_lines(
    records: _Records, chunk: Source, lines: _LineCounter
) -> tuple[list[int], list[str | InvalidDocument]]:
    """Return (positions, texts) of the documents in some lines of JSON."""
    data_lines = records.data.removesuffix(b"\n").split(b"\n")
    sizes = (len(line) + 1 for line in data_lines)
    starts = list(itertools.accumulate(sizes, initial=records.position))[:-1]
    found = plain_texts(data_lines, chunk.field)
    if None not in found:
        return starts, found  # type: ignore[return-value]  # mypy does not see that all are str
    positions: list[int] = []
    texts: list[str | InvalidDocument] = []
    for start, line, plain_text in zip(starts, data_lines, found):
        if not line or line.isspace():
            continue
        positions.append(start)
        if plain_text is not None:
            texts.append(plain_text)
            continue
        try:
            texts.append(_json_text(line, chunk.field))
        except InvalidText as error:
            place = lines.place_in(records, start - records.position + error.offset)
            texts.append(InvalidDocument(str(error), place))
    return positions, texts


def _skip_blank_lines(data: bytes, start: int, end: int) -> int:
    """Return the offset of the first line from `start` on that is not blank, at most `end`."""
    match = BLANK_LINES.match(data, start, end)
    return match.end() if match else start


def _decode(record: bytes) -> str:
    """Return the text of a record.

    Raises:
        InvalidText: The record is not UTF-8.
    """
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (byte {record[error.start]:#04x}); "
        if record[:2] in (b"\xff\xfe", b"\xfe\xff"):
            reason += "convert the file first, for example with iconv -f utf-16 -t utf-8"
        elif CONTROL.search(record, max(0, error.start - BLOCK), error.start + BLOCK):
            reason += "these are binary data, not text: leave the file out"
        else:
            reason += "convert the file first, for example with iconv -f latin1 -t utf-8"
        raise InvalidText(reason, error.start) from None


def _decode_without_line_end(record: bytes) -> str:
    """Return the text of a record without the line end and the blank lines after it."""
    text = _decode(record)
    line_end = text.find("\n", len(text.rstrip(ASCII_SPACE)))
    return text if line_end < 0 else text[:line_end].removesuffix("\r")


def _decode_stripped(record: bytes) -> str:
    """Return the text of a record without white space at both ends."""
    return _decode(record).strip()


_PARSERS = {
    "": _decode,
    "file": _decode,
    "line": _decode_without_line_end,
    "blank-line": _decode_without_line_end,
    "article": _decode_stripped,
}


def _json_text(record: bytes, field: str) -> str:
    """Return the text in a line of a .jsonl file.

    Raises:
        InvalidText: The line is not UTF-8, not JSON, or has no text in `field`.
    """
    try:
        text = record.strip(JSON_SPACE).decode()
        row, end = _SCAN(text, 0)  # in half the time of json.loads
        if end == len(text) and type(row[field]) is str:
            return row[field]
    except (StopIteration, ValueError, LookupError, TypeError, RecursionError):
        pass  # the slow way below finds the fault
    text = _decode(record.removesuffix(b"\n").removeprefix(BYTE_ORDER_MARK))
    try:
        row = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise InvalidText(f"not JSON ({error})") from None
    return text_of_row(row, field)


def _integer(digits: str) -> int:
    """Return an integer of a row, or 0 if it has more digits than Python converts."""
    try:
        return int(digits)
    except ValueError:
        return 0


def why_not_json_lines(path: str) -> str:
    """Return why a .json file does not hold JSON lines, by its first line; "" if it may hold them.

    The result is "", too, if the file is not text or is damaged, because `read` names that fault.

    Raises:
        OSError: The file cannot be read.
    """
    try:
        with open_text(path) as file:
            lines = iter(functools.partial(file.readline, LONGEST_FIRST_LINE), b"")
            first_line = next((line for line in lines if line.strip(JSON_SPACE)), b"")
    except UnreadableFile:
        return ""
    first_line = first_line.removeprefix(BYTE_ORDER_MARK).strip(JSON_SPACE)
    target = shlex.quote(re.sub(r"\.json(\.\w+)?$", ".jsonl", path, flags=re.IGNORECASE))
    if first_line.startswith(b"["):
        command = shell_input(path, f"python -c '{PRINT_ROWS}'")
        return (
            f"{path} is one JSON array, not one object per line: convert it with: "
            f"{command} > {target}"
        )
    if first_line.startswith(b"{") and len(first_line) < LONGEST_FIRST_LINE - 1:
        try:
            json.loads(first_line, parse_int=_integer)
        except (ValueError, RecursionError):
            return (
                f"{path} does not have one JSON object per line: convert it with: "
                f"{shell_input(path, 'jq -c .')} > {target}"
            )
    return ""
