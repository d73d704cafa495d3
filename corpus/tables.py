"""Tables to documents: the rows of .parquet files, and of the `datasets` library's .arrow files."""

import contextlib
import itertools
import math
import shutil
import tempfile
from dataclasses import replace

from common.packages import optional
from corpus.sources import BLOCK, Bad, Source, damage, field_of, open_file, text_or_bad

ROWS = 1024  # texts at once


def cut_table(source: Source, piece_bytes: int) -> list[tuple[Source, int]]:
    """As reader.cut, between the groups of rows that the file was written in."""
    with _open(source) as table:
        if source.format == "arrow":
            groups = [(batch.num_rows, batch.nbytes) for batch in table.to_batches()]
        else:
            metadata = map(table.metadata.row_group, range(table.num_row_groups))
            groups = [(group.num_rows, group.total_byte_size) for group in metadata]
    parts, start, rows, size = [], 0, 0, 0
    for i, (n, more) in enumerate(groups):
        rows, size = rows + n, size + more
        if size >= piece_bytes or i == len(groups) - 1:
            if rows:
                parts.append((replace(source, start=start, stop=start + rows), size))
            start, rows, size = start + rows, 0, 0
    return parts


def read_table(source: Source):
    """As reader.read; a document's position is its row."""
    with _open(source) as table:
        names = (table.schema if source.format == "arrow" else table.schema_arrow).names
        if source.field not in names:
            yield [source.start], [field_of(dict.fromkeys(names), source.field)]
            return
        for row, column in _columns(table, source):
            try:
                values = column.to_pylist()
            except (ValueError, OverflowError):  # in one of them
                values = [_value(value) for value in column]
            yield range(row, row + len(values)), [text_or_bad(v, source.field) for v in values]


@contextlib.contextmanager
def _open(source):
    """A pyarrow.parquet.ParquetFile or a pyarrow.Table, mapped. Raises ValueError for a damaged
    file."""
    pyarrow = optional("pyarrow", source.path)
    damaged = (pyarrow.ArrowException, UnicodeDecodeError, *damage(source.path))
    try:
        if source.format == "arrow":
            yield pyarrow.ipc.open_stream(pyarrow.memory_map(source.path)).read_all()
            return
        with contextlib.ExitStack() as stack:
            file = source.path
            if source.compressed:  # a table is read from its end: unpack it first
                file = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stack.enter_context(open_file(source.path)), file, BLOCK)
            parquet = optional("pyarrow.parquet", source.path)
            yield stack.enter_context(parquet.ParquetFile(file))
    except damaged as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source.path}: a damaged .{source.format} file ({reason})") from None
    except OSError as error:  # pyarrow's own, without a number
        if error.errno:
            raise
        raise ValueError(f"{source.path}: {error}") from None


def _columns(table, source):
    """(the first one's row, up to ROWS texts), from source.start to source.stop."""
    stop = math.inf if source.stop is None else source.stop
    if source.format == "arrow":
        row, batches = 0, table.select([source.field]).to_batches(ROWS)
    else:
        counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        starts = [0, *itertools.accumulate(counts)]
        groups = [
            i for i, n in enumerate(counts) if starts[i] < stop and starts[i] + n > source.start
        ]
        row = starts[groups[0]] if groups else 0
        batches = table.iter_batches(ROWS, row_groups=groups, columns=[source.field])
    for batch in batches:
        first, last = max(row, source.start), min(row + len(batch), stop)
        if first < last:
            yield first, batch.column(0).slice(first - row, last - first)
        row += len(batch)


def _value(value):
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:  # not UTF-8, or a date that Python hasn't got
        return Bad(f"a {value.type} that can't be read ({error})")
