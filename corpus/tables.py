"""Tables: rows of .parquet files, and of the `datasets` library's .arrow files, to documents."""

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

ROWS = 1024  # most rows read at once; fewer if their texts are long


def divide_table(source: Source, chunk_bytes: int) -> list[tuple[Source, int]]:
    """Divide a table between row groups, as reader.divide does.

    Only the column that holds the text counts for the size of a chunk.

    Args:
        source: A table.
        chunk_bytes: Least size of a chunk, except for the last one.

    Returns:
        Pairs (chunk, size of the chunk in bytes), in order; none for an empty table.

    Raises:
        OSError: The file cannot be read.
        ValueError: The table is damaged, or the package `pyarrow` is missing.
    """
    with _open(source) as table:
        row_groups = _row_groups(table, source)
    chunks = []
    start = 0
    num_rows = 0
    num_bytes = 0
    for i, (group_rows, group_bytes) in enumerate(row_groups):
        num_rows += group_rows
        num_bytes += group_bytes
        if num_bytes >= chunk_bytes or i == len(row_groups) - 1:
            stop = start + num_rows
            if num_rows:
                chunks.append((replace(source, start=start, stop=stop), num_bytes))
            start = stop
            num_rows = 0
            num_bytes = 0
    return chunks


def read_table(
    chunk: Source,
) -> Iterator[tuple[Sequence[int], list[str | InvalidDocument]]]:
    """Yield the documents of a table, as reader.read does.

    Args:
        chunk: A table, or a chunk of a table.

    Yields:
        Pairs (positions, texts); the position of a document is its row in the table.

    Raises:
        OSError: The file cannot be read.
        ValueError: The table is damaged, or the package `pyarrow` is missing.
    """
    with _open(chunk) as table:
        schema = table.schema if chunk.format == "arrow" else table.schema_arrow
        if chunk.field not in schema.names:
            yield from _rows_without_text(table, chunk, schema.names)
            return
        for first, column in _columns(table, chunk):
            values = _values(column)
            positions = range(first, first + len(values))
            rows = zip(positions, values)
            yield positions, [_text(value, row, chunk) for row, value in rows]


@contextlib.contextmanager
def _open(source):
    """Yield a pyarrow.parquet.ParquetFile, or a memory-mapped pyarrow.Table for an .arrow file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The table is damaged, or the package `pyarrow` is missing.
    """
    pyarrow = optional("pyarrow", source.path)
    damaged = (pyarrow.ArrowException, UnicodeDecodeError, *damage(source.path))
    try:
        if source.format == "arrow":
            yield pyarrow.ipc.open_stream(pyarrow.memory_map(source.path)).read_all()
            return
        with contextlib.ExitStack() as stack:
            path_or_file = source.path
            if source.compressed:  # pyarrow reads the end of a table first, so uncompress it all
                path_or_file = stack.enter_context(tempfile.TemporaryFile())
                compressed_file = stack.enter_context(open_file(source.path))
                shutil.copyfileobj(compressed_file, path_or_file, BLOCK)
            parquet = optional("pyarrow.parquet", source.path)
            yield stack.enter_context(parquet.ParquetFile(path_or_file))
    except damaged as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source.path}: a damaged .{source.format} file ({reason})") from None
    except OSError as error:
        if error.errno:
            raise
        raise ValueError(f"{source.path}: {error}") from None  # pyarrow's errors have no number


def _row_groups(table, source) -> list[tuple[int, int]]:
    """Return (number of rows, bytes of their text) of each row group.

    The record batches of an .arrow file count as row groups.
    """
    if source.format == "arrow":
        batches = table.to_batches()
        if source.field not in table.schema.names:
            return [(batch.num_rows, 0) for batch in batches]
        return [(batch.num_rows, batch.column(source.field).nbytes) for batch in batches]
    row_groups = map(table.metadata.row_group, range(table.num_row_groups))
    return [(group.num_rows, _text_bytes(group, source.field)) for group in row_groups]


def _text_bytes(row_group, field) -> int:
    """Return the uncompressed size of the column `field` of a row group, with its subcolumns."""
    columns = map(row_group.column, range(row_group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema == field or column.path_in_schema.startswith(f"{field}.")
    )


def _columns(table, chunk):
    """Yield pairs (row of the first text, column of texts) for the rows of a chunk.

    A column has at most ROWS texts of together about BLOCK bytes, or one longer text.
    """
    stop = math.inf if chunk.stop is None else chunk.stop
    row_groups = _row_groups(table, chunk)
    starts = itertools.accumulate((rows for rows, _ in row_groups), initial=0)
    batches = table.to_batches() if chunk.format == "arrow" else None
    for i, (start, (rows, size)) in enumerate(zip(starts, row_groups)):
        if start + rows <= chunk.start or start >= stop:
            continue
        step = min(ROWS, max(1, BLOCK * rows // max(size, 1)))
        if batches is not None:
            whole = batches[i].column(chunk.field)
            columns = (whole.slice(row, step) for row in range(0, rows, step))
        else:
            # one row group per call, because pyarrow keeps in memory all row groups of a call
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
    """Yield an InvalidDocument for every row of a table that lacks the column of the text."""
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
    """Return the values of a column, with an InvalidText for a value that Python cannot hold."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # of one of the values
        return [_value(value) for value in column]


def _value(value):
    """Return the Python value of a pyarrow value, or an InvalidText."""
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:  # not UTF-8, or a date outside Python's range
        return InvalidText(f"a {value.type} that cannot be read ({error})")


def _text(value, row, chunk):
    """Return the text in a row, or an InvalidDocument."""
    try:
        if isinstance(value, InvalidText):
            raise value
        return checked_text(value, chunk.field)
    except InvalidText as error:
        return InvalidDocument(str(error), _place(chunk, row))


def _place(chunk, row) -> str:
    """Return file and row."""
    return f"{chunk.path}, row {row}"
