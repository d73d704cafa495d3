"""Where documents lie: a file or a part of one, what opens it, and what is no document there."""

import gzip
import math
import sys
import zlib
from dataclasses import dataclass

from common.packages import optional

BLOCK = 1 << 20  # bytes read at once


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
    def table(self) -> bool:
        return self.format in ("parquet", "arrow")

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
        return zstd(path).open(path, "rb")
    return open(path, "rb", buffering=BLOCK)


def damage(path: str) -> tuple:
    """The exceptions by which a compressed file shows that it is damaged."""
    of_zstd = (zstd(path).ZstdError,) if path.endswith(".zst") else ()
    return (EOFError, gzip.BadGzipFile, zlib.error, *of_zstd)


def zstd(path: str):
    """The module that reads .zst files, in Python since 3.14."""
    if sys.version_info >= (3, 14):
        return optional("compression.zstd", path)
    return optional("backports.zstd", path, "backports.zstd")


def field_of(row, field: str) -> str:
    """The text that a row holds, or a Bad."""
    if not isinstance(row, dict) or field not in row:
        there = f"; there are {', '.join(list(row)[:9])}" if isinstance(row, dict) else ""
        return Bad(f"no field {field!r}{there}: name it by --text_field")
    return text_or_bad(row[field], field)


def text_or_bad(value, field: str) -> str:
    if not isinstance(value, str):
        return Bad(f"the field {field!r} is no text, but {type(value).__name__}")
    return value
