"""Tables to documents: the rows of .parquet files, and of the `datasets` library's .arrow files."""

import contextlib
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace

from common.packages import optional
from corpus.sources import (
    BLOCK,
    InvalidDocument,
    InvalidText,
    Source,
    checked_text,
    damage,
    open_file,
    text_of_row,
)

ROWS = 1024  # most rows read at once; fewer if they are long


def divide_table(source: Source, chunk_bytes: int) -> list[tuple[Source, int]]:
    """Divide a table as reader.divide does, between the row groups that it was written in.

    Only the column that holds the text counts for the size of a chunk.
    """
    with _open(source) as table:
        groups = _row_groups(table, source)
    chunks = []
    start = rows = size = 0
    for i, (group_rows, group_bytes) in enumerate(groups):
        rows += group_rows
        size += group_bytes
        if size >= chunk_bytes or i == len(groups) - 1:
            if rows:
                chunks.append((replace(source, start=start, stop=start + rows), size))
            start += rows
            rows = size = 0
    return chunks


def read_table(
    chunk: Source,
) -> Iterator[tuple[Sequence[int], list[str | InvalidDocument]]]:
    """Yield documents as reader.read does; the position of a document is its row."""
    with _open(chunk) as table:
        schema = table.schema if chunk.format == "arrow" else table.schema_arrow
        if chunk.field not in schema.names:
            yield from _rows_without_text(table, chunk, schema.names)
            return
        for first, column in _columns(table, chunk):
            values = _values(column)
            positions = range(first, first + len(values))
            places = zip(positions, values)
            yield positions, [_text(value, row, chunk) for row, value in places]


@contextlib.contextmanager
def _open(source):
    """A pyarrow.parquet.ParquetFile or a memory-mapped pyarrow.Table.

    Raises ValueError for a damaged file.
    """
    pyarrow = optional("pyarrow", source.path)
    damaged = (pyarrow.ArrowException, UnicodeDecodeError, *damage(source.path))
    try:
        if source.format == "arrow":
            yield pyarrow.ipc.open_stream(pyarrow.memory_map(source.path)).read_all()
            return
        with contextlib.ExitStack() as stack:
            file = source.path
            if source.compressed:  # a table is read from its end, so it is uncompressed first
                file = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stack.enter_context(open_file(source.path)), file, BLOCK)
            parquet = optional("pyarrow.parquet", source.path)
            yield stack.enter_context(parquet.ParquetFile(file))
    except damaged as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source.path}: a damaged .{source.format} file ({reason})") from None
    except OSError as error:
        if error.errno:
            raise
        raise ValueError(f"{source.path}: {error}") from None  # pyarrow's errors have no number


def _row_groups(table, source) -> list[tuple[int, int]]:
    """(rows, bytes of their text) of each row group, or each record batch of an .arrow file."""
    if source.format == "arrow":
        batches = table.to_batches()
        if source.field not in table.schema.names:
            return [(batch.num_rows, 0) for batch in batches]
        return [(batch.num_rows, batch.column(source.field).nbytes) for batch in batches]
    groups = map(table.metadata.row_group, range(table.num_row_groups))
    return [(group.num_rows, _text_bytes(group, source.field)) for group in groups]


def _text_bytes(group, field) -> int:
    """Uncompressed size of a row group's columns whose name is `field`, or begins with it."""
    columns = map(group.column, range(group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema == field or column.path_in_schema.startswith(f"{field}.")
    )


def _columns(table, chunk):
    """Yield (row of the first text, a column of texts) of the rows from chunk.start to chunk.stop.

    A column has at most ROWS texts and, unless one is longer, about BLOCK bytes.
    """
    stop = math.inf if chunk.stop is None else chunk.stop
    groups = _row_groups(table, chunk)
    starts = itertools.accumulate((rows for rows, _ in groups), initial=0)
    batches = table.to_batches() if chunk.format == "arrow" else None
    for i, (start, (rows, size)) in enumerate(zip(starts, groups)):
        if start + rows <= chunk.start or start >= stop:
            continue
        step = min(ROWS, max(1, BLOCK * rows // max(size, 1)))
        if batches is not None:
            whole = batches[i].column(chunk.field)
            columns = (whole.slice(row, step) for row in range(0, rows, step))
        else:
            # group by group: pyarrow keeps what it has read of all row groups it is asked for
            iterator = table.iter_batches(step, row_groups=[i], columns=[chunk.field])
            columns = (batch.column(0) for batch in iterator)
        row = start
        for column in columns:
            first = max(row, chunk.start)
            last = min(row + len(column), stop)
            if first < last:
                yield first, column.slice(first - row, last - first)
            row += len(column)


def _rows_without_text(table, chunk, names):
    """Yield every row of a table that lacks the column, as an InvalidDocument."""
    try:
        text_of_row(dict.fromkeys(names), chunk.field)
    except InvalidText as error:
        reason = str(error)
    num_rows = sum(rows for rows, _ in _row_groups(table, chunk))
    stop = num_rows if chunk.stop is None else chunk.stop
    for start in range(chunk.start, stop, ROWS):
        rows = range(start, min(start + ROWS, stop))
        yield rows, [InvalidDocument(reason, _place(chunk, row)) for row in rows]


def _values(column) -> list:
    """Return the values of a column; one that Python cannot hold is an InvalidText."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # one of the values
        return [_value(value) for value in column]


def _value(value):
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:  # not UTF-8, or a date that Python does not have
        return InvalidText(f"a {value.type} that cannot be read ({error})")


def _text(value, row, chunk):
    """Return a text, or an InvalidDocument."""
    try:
        if isinstance(value, InvalidText):
            raise value
        return checked_text(value, chunk.field)
    except InvalidText as error:
        return InvalidDocument(str(error), _place(chunk, row))


def _place(chunk, row) -> str:
    return f"{chunk.path}, row {row}"
