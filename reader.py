"""Files to documents: .txt, .jsonl, .parquet, each also .gz or .zst, cut into spans.

    spans = cut(Source("corpus.jsonl", "jsonl"), piece_bytes=1 << 23)
    for positions, texts in read(spans[0]): ...

A span is part of one file and holds whole documents: what the spans of a file yield, one after
another, is what the file yields, wherever it was cut. A running text (documents="") comes in parts
that a tokenizer may take one by one, with the ids that the whole text would give.
"""

import contextlib
import functools
import gzip
import itertools
import json
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
import zlib
from dataclasses import dataclass, replace

from common import optional

BLOCK = 1 << 20  # bytes read at once
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


@dataclass(frozen=True)
class Source:
    """One input file, or part of it.

    format: text, jsonl, parquet, or arrow (of the `datasets` library). documents: how a text is
    cut: "" (it is one running text), line, blank-line, file, or article (WikiText's). field: that
    holds the text, in the other formats. split: train, val, test, or "" where the documents are
    shared out. number: of the file among the corpus's. start, stop: bytes of the text (its end:
    None), rows of a table.
    """

    path: str
    format: str = "text"
    documents: str = ""
    field: str = "text"
    split: str = ""
    number: int = 0
    start: int = 0
    stop: int | None = None

    @property
    def length(self) -> float:
        """Bytes or rows, as far as is known; math.inf: to the end."""
        return math.inf if self.stop is None else self.stop - self.start

    @property
    def compressed(self) -> bool:
        return self.path.endswith((".gz", ".zst"))


class Bad(str):
    """Why something is no document, and how many bytes behind its start."""

    offset = 0


def open_file(path: str):
    """A binary file to read, unpacked on the way. Raises OSError, or ValueError where the package
    for it is missing."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return _zstd(path).open(path, "rb")
    return open(path, "rb", buffering=BLOCK)


def damage(path: str) -> tuple:
    """The exceptions by which a compressed file shows that it is damaged."""
    zstd = (_zstd(path).ZstdError,) if path.endswith(".zst") else ()
    return (EOFError, gzip.BadGzipFile, zlib.error, *zstd)


def _zstd(path):
    return (
        optional("compression.zstd", path)
        if sys.version_info >= (3, 14)
        else optional("backports.zstd", path, "backports.zstd")
    )


def cut(source: Source, piece_bytes: int) -> list[tuple[Source, int]]:
    """(part, its size in bytes) of a source, about `piece_bytes` each where it can be cut; a
    compressed text can't. Raises OSError and ValueError for a file that can't be read."""
    if source.format in ("parquet", "arrow"):
        return _cut_table(source, piece_bytes)
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


def _cut_table(source, piece_bytes):
    with _table(source) as table:
        if source.format == "arrow":
            rows = max(1, piece_bytes * len(table) // max(1, os.path.getsize(source.path)))
            groups = [rows] * (len(table) // rows) + [len(table) % rows]
            sizes = [os.path.getsize(source.path) * n // max(1, len(table)) for n in groups]
        else:
            metadata = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            groups, sizes = [m.num_rows for m in metadata], [m.total_byte_size for m in metadata]
    parts, start, rows, size = [], 0, 0, 0
    for i, (n, more) in enumerate(zip(groups, sizes)):
        rows, size = rows + n, size + more
        if size >= piece_bytes or i == len(groups) - 1:
            if rows:
                parts.append((replace(source, start=start, stop=start + rows), size))
            start, rows, size = start + rows, 0, 0
    return parts


@contextlib.contextmanager
def _table(source):
    """A pyarrow.parquet.ParquetFile or a datasets.Dataset. Raises ValueError for a damaged file."""
    pyarrow = optional("pyarrow", source.path)
    try:
        if source.format == "arrow":
            yield optional("datasets", source.path).Dataset.from_file(source.path)
            return
        with contextlib.ExitStack() as stack:
            file = source.path
            if source.compressed:  # a table is read from its end: unpack it first
                file = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stack.enter_context(open_file(source.path)), file, BLOCK)
            parquet = optional("pyarrow.parquet", source.path)
            yield stack.enter_context(parquet.ParquetFile(file))
    except (pyarrow.ArrowException, UnicodeDecodeError, *damage(source.path)) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source.path}: a damaged .{source.format} file ({reason})") from None
    except OSError as error:  # pyarrow's own, without a number
        if error.errno:
            raise
        raise ValueError(f"{source.path}: {error}") from None


def read(source: Source):
    """Yields (positions, texts), lists of some documents each; a Bad where a text is none.

    position: the document's first byte in the (unpacked) file, or its row; it depends on nothing
    but the file. Raises OSError, and ValueError for a table that can't be read.
    """
    if source.format in ("parquet", "arrow"):
        yield from _read_table(source)
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
        return text if isinstance(text, Bad) else _field(json.loads(text), field)
    except (ValueError, RecursionError) as error:
        return Bad(f"no JSON ({error})")


def _field(row, text_field):
    if not isinstance(row, dict) or text_field not in row:
        there = f"; there are {', '.join(list(row)[:9])}" if isinstance(row, dict) else ""
        return Bad(f"no field {text_field!r}{there}: name it by --text_field")
    return _text_or_bad(row[text_field], text_field)


def _text_or_bad(text, text_field):
    if not isinstance(text, str):
        return Bad(f"the field {text_field!r} is no text, but {type(text).__name__}")
    return text


def _read_table(source):
    field = source.field
    with _table(source) as table:
        names = table.column_names if source.format == "arrow" else table.schema_arrow.names
        if field not in names:
            yield [source.start], [_field(dict.fromkeys(names), field)]
            return
        position = source.start
        for column in _columns(table, source):
            try:
                values = column.to_pylist()
            except (ValueError, OverflowError):  # in one of them
                values = [_value(value) for value in column]
            yield range(position, position + len(values)), [_text_or_bad(v, field) for v in values]
            position += len(values)


def _value(value):
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:  # not UTF-8, or a date that Python hasn't got
        return Bad(f"a {value.type} that can't be read ({error})")


def _columns(table, source):
    """Columns of up to 1,024 texts, of the rows from source.start to source.stop."""
    if source.format == "arrow":
        length = None if source.stop is None else source.length
        column = table.data.column(source.field).slice(source.start, length)
        for row in range(0, len(column), 1024):
            yield column.slice(row, 1024)
        return
    rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    starts = [0, *itertools.accumulate(rows)]
    groups = [i for i in range(len(rows)) if 0 <= starts[i] - source.start < source.length]
    for batch in table.iter_batches(1024, row_groups=groups, columns=[source.field]):
        yield batch.column(0)


def where(source: Source, position: int) -> str:
    """A place in a file, for people: its line, or its row."""
    if source.format in ("parquet", "arrow"):
        return f"{source.path}, row {position}"
    line = 1
    with contextlib.suppress(*damage(source.path)), open_file(source.path) as f:
        while position > 0 and (block := f.read(min(BLOCK, position))):
            line, position = line + block.count(b"\n"), position - len(block)
    return f"{source.path}, line {line}"
