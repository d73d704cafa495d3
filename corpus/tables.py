"""Tables: rows of .parquet files, and of .arrow files (`datasets`), to documents."""

import contextlib
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace

from common.packages import optional
from corpus.opening import DamagedFile, UnreadableFile, open_file
from corpus.sources import (
    BLOCK,
    InvalidDocument,
    InvalidText,
    Source,
    checked_text,
    no_field,
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
        UnreadableFile: The table is damaged.
        ValueError: The package `pyarrow` is missing.
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
        Pairs (positions, texts); the position of a document is its row in the table. Each row that
        is lost in a damaged row group gives an InvalidDocument.

    Raises:
        OSError: The file cannot be read.
        UnreadableFile: The table is damaged.
        ValueError: The package `pyarrow` is missing.
    """
    with _open(chunk) as table:
        names = table.schema_arrow.names
        if chunk.field not in names:
            yield from _rows_without_text(table, chunk, names)
            return
        for positions, column in _columns(table, chunk):
            if isinstance(column, InvalidText):
                yield from _invalid_rows(chunk, positions, str(column))
                continue
            for part in _bounded(column):
                rows = positions[: len(part)]
                positions = positions[len(part) :]
                values = _values(part)
                if set(map(type, values)) == {str}:  # nearly always
                    yield rows, values
                else:
                    yield rows, [_text(value, row, chunk) for row, value in zip(rows, values)]


class _ArrowFile:
    """An .arrow file, which `datasets` writes as a stream and save_to_disk may write as a file.

    Record batches are read from a memory map, one at a time.

    Attributes:
        schema_arrow: Schema of the table, under the name that a ParquetFile gives it.
    """

    def __init__(self, path: str):
        self._ipc = optional("pyarrow", path).ipc
        self._map = optional("pyarrow", path).memory_map(path)
        self._is_stream = self._map.read(6) != b"ARROW1"
        self.schema_arrow = self._open().schema

    def batches(self):
        """Yield the record batches."""
        reader = self._open()
        if self._is_stream:
            yield from reader
            return
        yield from map(reader.get_batch, range(reader.num_record_batches))

    def _open(self):
        """Return a reader of the record batches from the first one on."""
        self._map.seek(0)
        open_reader = self._ipc.open_stream if self._is_stream else self._ipc.open_file
        return open_reader(self._map)


@contextlib.contextmanager
def _open(source):
    """Yield a pyarrow.parquet.ParquetFile or an _ArrowFile.

    Raises:
        OSError: The file cannot be read.
        UnreadableFile: The table is damaged.
        ValueError: The package `pyarrow` is missing.
    """
    pyarrow = optional("pyarrow", source.path)
    try:
        with contextlib.ExitStack() as stack:
            file = None
            if source.compressed:  # pyarrow reads the end of a table first, so uncompress it all
                file = stack.enter_context(tempfile.NamedTemporaryFile())
                shutil.copyfileobj(stack.enter_context(open_file(source.path)), file, BLOCK)
                file.flush()
            if source.format == "arrow":
                yield _ArrowFile(file.name if file else source.path)
                return
            parquet = optional("pyarrow.parquet", source.path)
            # read page by page: else a whole row group is in memory
            yield stack.enter_context(
                parquet.ParquetFile(file or source.path, buffer_size=BLOCK, pre_buffer=False)
            )
    except (pyarrow.ArrowException, UnicodeDecodeError, DamagedFile, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # pyarrow's own errors have no number
        raise UnreadableFile(source.path, _damage(source, error)) from None


def _damage(source, error) -> str:
    """Return why a table is damaged, from the exception of its reader."""
    reason = error.reason if isinstance(error, DamagedFile) else str(error)
    first_line = (reason.splitlines() or [type(error).__name__])[0]
    return f"a damaged .{source.format} file ({first_line})"


def _row_groups(table, source) -> list[tuple[int, int]]:
    """Return (number of rows, bytes of their text) of each row group.

    The record batches of an .arrow file count as row groups.
    """
    if source.format == "arrow":
        has_text = source.field in table.schema_arrow.names
        return [
            (batch.num_rows, batch.column(source.field).nbytes if has_text else 0)
            for batch in table.batches()
        ]
    row_groups = map(table.metadata.row_group, range(table.num_row_groups))
    return [(row_group.num_rows, _text_bytes(row_group, source.field)) for row_group in row_groups]


def _text_bytes(row_group, field) -> int:
    """Return the uncompressed size of the column `field` of a row group, with its subcolumns."""
    columns = map(row_group.column, range(row_group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema == field or column.path_in_schema.startswith(f"{field}.")
    )


def _columns(table, chunk):
    """Yield pairs (range of rows, their column of texts) for the rows of a chunk.

    A column has at most ROWS texts of together about BLOCK bytes, or one longer text. For the rows
    that are lost in a damaged row group there is an InvalidText in place of the column.
    """
    stop = math.inf if chunk.stop is None else chunk.stop
    row_groups = _row_groups(table, chunk)
    starts = itertools.accumulate((rows for rows, _ in row_groups), initial=0)
    batches = table.batches() if chunk.format == "arrow" else None
    for i, (start, (num_rows, size)) in enumerate(zip(starts, row_groups)):
        batch = next(batches) if batches else None
        if start + num_rows <= chunk.start or start >= stop:
            continue
        step = min(ROWS, max(1, BLOCK * num_rows // max(size, 1)))
        row = start
        for column in _columns_of_row_group(table, chunk, i, batch, step):
            if isinstance(column, InvalidText):
                rows = range(row, start + num_rows)
            else:
                rows = range(row, row + len(column))
            first = max(row, chunk.start)
            last = min(rows.stop, stop)
            if first < last:
                lost = isinstance(column, InvalidText)
                texts = column if lost else column.slice(first - row, last - first)
                yield range(first, last), texts
            row = rows.stop


def _columns_of_row_group(table, chunk, i, batch, step):
    """Yield the texts of row group `i`, `step` at a time; an InvalidText for the rest if damaged.

    Args:
        table: A ParquetFile or an _ArrowFile.
        chunk: Chunk that is read.
        i: Number of the row group.
        batch: Record batch of an .arrow file; None for a parquet file.
        step: Number of rows of a column.
    """
    if batch is not None:
        whole = batch.column(chunk.field)
        yield from (whole.slice(row, step) for row in range(0, len(whole), step))
        return
    pyarrow = optional("pyarrow", chunk.path)
    try:
        # one row group per call, because pyarrow keeps in memory all row groups of a call
        for batch in table.iter_batches(step, row_groups=[i], columns=[chunk.field]):
            yield batch.column(0)
            if step < ROWS:  # else the memory that pyarrow reserves for each batch would add up
                pyarrow.default_memory_pool().release_unused()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        yield InvalidText(_damage(chunk, error))


def _bounded(column):
    """Yield a column in slices of at most twice BLOCK bytes, or of one longer text.

    The size of a row group does not tell how long its rows are: a text that repeats counts once.
    """
    if len(column) < 2 or column.nbytes <= 2 * BLOCK:
        yield column
        return
    middle = len(column) // 2
    yield from _bounded(column.slice(0, middle))
    yield from _bounded(column.slice(middle))


def _rows_without_text(table, chunk, names):
    """Yield an InvalidDocument for every row of a table that lacks the column of the text."""
    reason = no_field(chunk.field, names)
    num_rows = sum(rows for rows, _ in _row_groups(table, chunk))
    stop = num_rows if chunk.stop is None else chunk.stop
    yield from _invalid_rows(chunk, range(chunk.start, stop), reason)


def _invalid_rows(chunk, positions, reason):
    """Yield an InvalidDocument for each of some rows, in lists."""
    for start in range(positions.start, positions.stop, ROWS):
        rows = range(start, min(start + ROWS, positions.stop))
        yield rows, [InvalidDocument(reason, place_of_row(chunk, row)) for row in rows]


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
    if isinstance(value, InvalidText):
        return InvalidDocument(str(value), place_of_row(chunk, row))
    try:
        return checked_text(value, chunk.field)
    except InvalidText as error:
        return InvalidDocument(str(error), place_of_row(chunk, row))


def place_of_row(chunk: Source, row: int) -> str:
    """Return file and row of a document."""
    return f"{chunk.path}, row {row}"
