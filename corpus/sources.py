"""Sources: an input file or a chunk of it, how it is opened, and what makes a document invalid."""

import gzip
import math
import sys
import zlib
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, FileIO
from types import ModuleType
from typing import Any

from common.packages import optional

BLOCK = 1 << 20  # bytes read at once
LONGEST_WINDOW = 31  # log2 of the bytes that a .zst file may refer back to (zstd --long=31)


@dataclass(frozen=True)
class Source:
    """One input file, or a chunk of it: the part from `start` to `stop`.

    Attributes:
        path: path of the file.
        format: "text", "jsonl", "parquet", or "arrow" (a file of the `datasets` library).
        documents: how a text is divided into documents: "line", "blank-line", "file", "article"
            (WikiText), or "" for a running text, which is not divided.
        field: name of the field or column that holds the text, in the other formats.
        split: "train", "val" or "test", or "" to assign each document by a hash.
        number: number of the file in its corpus, from 0.
        start: first byte of the uncompressed text, or first row of the table.
        stop: end of the byte or row range; None means the end of the file.
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
        """Number of bytes or rows, or math.inf if `stop` is None."""
        return math.inf if self.stop is None else self.stop - self.start

    @property
    def is_table(self) -> bool:
        """Whether the file has rows and columns."""
        return self.format in ("parquet", "arrow")

    @property
    def compressed(self) -> bool:
        """Whether the file is uncompressed while it is read."""
        return self.path.endswith((".gz", ".zst"))


@dataclass(frozen=True)
class InvalidDocument:
    """What a reader yields in place of a text that it cannot read.

    Attributes:
        reason: what is wrong with the document.
        place: file and line, or file and row.
    """

    reason: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class InvalidText(Exception):
    """Raised while one document is read.

    Attributes:
        offset: number of bytes from the start of the document to the fault.
    """

    def __init__(self, reason: str, offset: int = 0):
        super().__init__(reason)
        self.offset = offset


def open_file(path: str) -> BufferedIOBase:
    """Open a file for reading its uncompressed bytes.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the package that reads its format is missing.
    """
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        module = zstd(path)
        options = {module.DecompressionParameter.window_log_max: LONGEST_WINDOW}
        return module.open(path, "rb", options=options)
    return BufferedReader(FileIO(path), BLOCK)


def damage(path: str) -> tuple[type[Exception], ...]:
    """Return the exceptions that reading a damaged compressed file raises."""
    errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    if path.endswith(".zst"):
        errors += (zstd(path).ZstdError,)
    return errors


def zstd(path: str) -> ModuleType:
    """Return the module that reads .zst files, which Python itself has since 3.14.

    Raises:
        ValueError: if the package for an older Python is missing.
    """
    if sys.version_info >= (3, 14):
        return optional("compression.zstd", path)
    return optional("backports.zstd", path, "backports.zstd")


def text_of_row(row: Any, field: str) -> str:
    """Return the text that a row holds in `field`.

    Raises:
        InvalidText: if the row is not an object, or its field is missing or not text.
    """
    if isinstance(row, dict) and field in row:
        return checked_text(row[field], field)
    fields = f"; it has {', '.join(list(row)[:9])}" if isinstance(row, dict) else ""
    raise InvalidText(f"no field {field!r}{fields}: choose one with --text_field")


def checked_text(value: Any, field: str) -> str:
    """Return `value` if it is a string.

    Raises:
        InvalidText: if it is not.
    """
    if isinstance(value, str):
        return value
    raise InvalidText(f"the field {field!r} is not text, but {type(value).__name__}")
