"""Sources: input files, chunks of them, and invalid documents."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

FORMATS = ("text", "jsonl", "parquet", "arrow")  # of a Source
DIVISIONS = ("", "line", "blank-line", "file", "article")  # of a Source
KEEPING_WHITE_SPACE = ("line", "blank-line")  # older corpora lack the space around such documents
BLOCK = 1 << 20  # bytes read at once
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # suffixes of compressed files, in any case


@dataclass(frozen=True)
class Source:
    """One input file, or a chunk of it: the bytes or rows from `start` to `stop`.

    Attributes:
        path: Path of the file.
        format: One of FORMATS. "arrow" is a file of the `datasets` library.
        division: How a text is divided into documents, one of DIVISIONS. "article" is WikiText's
            division, and "" means a running text, which is not divided.
        field: Name of the field or column that holds the text, in the other formats.
        split: "train", "val" or "test", or "" to assign each document by a hash.
        number: Number of the file in its corpus, from 0.
        start: First byte of the uncompressed text, or first row of the table.
        stop: End of the byte or row range; None means the end of the file.
        name: Name of the file in its input, from which the hash assigns documents to splits: the
            path relative to the input, with slashes, or CONFIG/SPLIT of a data set. If it is "",
            as in a corpus whose list of files never changes, the hash takes `number`.
    """

    path: str
    format: str = "text"
    division: str = ""
    field: str = "text"
    split: str = ""
    number: int = 0
    start: int = 0
    stop: int | None = None
    name: str = ""

    def metadata_fields(self) -> dict:
        """Return the fields under their names in metadata.json, which calls `division` documents.

        `name` is only listed if a hash takes it. Corpora from the time when white space around
        documents was dropped lack `white_space`.

        Example: Source("a.txt", division="line") gives {"path": "a.txt", "documents": "line",
        "white_space": "kept", ...}.
        """
        fields = {
            "documents" if name == "division" else name: value
            for name, value in asdict(self).items()
            if name != "name" or self.is_hashed_by_name
        }
        if self.division in KEEPING_WHITE_SPACE:
            fields["white_space"] = "kept"
        return fields

    @property
    def is_running_text(self) -> bool:
        """Whether the file is a running text, or a part of one."""
        return self.format == "text" and not self.division

    @property
    def is_hashed_by_name(self) -> bool:
        """Whether a hash of `name` assigns each document to a split."""
        return bool(self.name) and not self.split and not self.is_running_text

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
        return bool(compression_of(self.path))


@dataclass(frozen=True)
class InvalidDocument:
    """The item that a reader yields in place of a text that it cannot read.

    Attributes:
        reason: Fault of the document.
        place: File and line, or file and row.
    """

    reason: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class InvalidText(Exception):
    """The text of one document cannot be read.

    Attributes:
        offset: Number of bytes from the start of the document to the fault.
    """

    def __init__(self, reason: str, offset: int = 0):
        super().__init__(reason)
        self.offset = offset


def compression_of(path: str) -> str:
    """Return the suffix of a compressed file in lower case, one of COMPRESSED; else ""."""
    return next((suffix for suffix in COMPRESSED if path.lower().endswith(suffix)), "")


def text_of_row(row: Any, field: str) -> str:
    """Return the text that a row holds in `field`.

    Raises:
        InvalidText: The row is not an object, or the field is missing or not text.
    """
    if isinstance(row, dict) and field in row:
        return checked_text(row[field], field)
    raise InvalidText(no_field(field, row if isinstance(row, dict) else ()))


def no_field(field: str, others: Iterable[str]) -> str:
    """Return the reason why a row or a table without `field` has no text, with its first fields."""
    names = list(itertools.islice(others, 9))
    outer = field.partition(".")[0]
    if outer != field and outer in names:
        return (
            f"no field {field!r}: --text_field takes a field of the row itself, not one inside "
            f"{outer!r}; write that text as a field of its own"
        )
    fields = f"; it has {', '.join(names)}" if names else ""
    return f"no field {field!r}{fields}: choose one with --text_field"


def checked_text(value: Any, field: str) -> str:
    """Return `value` if it is a string.

    Raises:
        InvalidText: The value is not a string.
    """
    if isinstance(value, str):
        return value
    raise InvalidText(f"the field {field!r} is not text, but {type(value).__name__}")
