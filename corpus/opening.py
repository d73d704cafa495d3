"""Opening: the uncompressed bytes of an input file, and the files that cannot be read as text.

    with open_text("reviews.jsonl.xz") as file: ...

Names decide how a file is read. First bytes decide whether that is possible: an archive, a PDF or a
compressed file with a wrong name is refused with the command that makes it readable.
"""

import bz2
import contextlib
import gzip
import lzma
import re
import shlex
import sys
import zlib
from dataclasses import dataclass
from io import BufferedReader, FileIO, RawIOBase
from types import ModuleType
from typing import Any

from common.packages import optional
from corpus.sources import BLOCK, compression_of

LONGEST_WINDOW = 31  # log2 of the bytes that a .zst file may refer back to (zstd --long=31)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows editors write it before a UTF-8 text
HEAD = 512  # bytes that decide what a file is: a tar archive has its mark in the first 512


class UnreadableFile(ValueError):
    """A file cannot be read.

    Attributes:
        path: Path of the file.
        reason: Fault of the file, and the remedy if there is one.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.path, self.reason)


class DamagedFile(UnreadableFile):
    """A compressed file cannot be uncompressed from some place on."""


@dataclass(frozen=True)
class Compression:
    """A compression format.

    Attributes:
        name: Name of the format and of its command, which takes -d and -c.
        magic: Pattern of the first bytes.
    """

    name: str
    magic: re.Pattern[bytes]


@dataclass(frozen=True)
class BinaryKind:
    """A kind of file that is not text.

    Attributes:
        name: Name of the kind, with its article.
        magic: Pattern of the first bytes. It contains bytes that no text begins with.
        remedy: What to do, in which {} stands for the path.
    """

    name: str
    magic: re.Pattern[bytes]
    remedy: str


def _magic(pattern: bytes) -> re.Pattern[bytes]:
    """Return the pattern of some first bytes."""
    return re.compile(pattern, re.DOTALL)


COMPRESSIONS = {  # suffix -> compression format
    ".gz": Compression("gzip", _magic(rb"\x1f\x8b")),
    ".bz2": Compression("bzip2", _magic(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")),
    ".xz": Compression("xz", _magic(rb"\xfd7zXZ\x00")),
    ".zst": Compression("zstd", _magic(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
}
BINARY_KINDS = (
    BinaryKind("a tar archive", _magic(rb".{257}ustar[\x00 ]"), "unpack it with: tar -xf {}"),
    BinaryKind("a zip archive", _magic(rb"PK(?:\x03\x04|\x05\x06)"), "unpack it with: unzip {}"),
    BinaryKind("a 7z archive", _magic(rb"7z\xbc\xaf\x27\x1c"), "unpack it with: 7z x {}"),
    BinaryKind("a rar archive", _magic(rb"Rar!\x1a\x07"), "unpack it with: unrar x {}"),
    BinaryKind("an lz4 file", _magic(rb"\x04\x22\x4d\x18"), "uncompress it with: lz4 -d {}"),
    BinaryKind("a compressed .Z file", _magic(rb"\x1f\x9d"), "uncompress it with: uncompress {}"),
    BinaryKind("an .lzma file", _magic(rb"\x5d\x00\x00.{2}"), "uncompress it with: unlzma {}"),
    BinaryKind("a PDF file", _magic(rb"%PDF-\d"), "extract its text with: pdftotext {}"),
    BinaryKind("an SQLite database", _magic(rb"SQLite format 3\x00"), "write its text as .jsonl"),
    BinaryKind("a NumPy array", _magic(rb"\x93NUMPY"), "write its text as .txt or .jsonl"),
    BinaryKind("an HDF5 file", _magic(rb"\x89HDF\r\n"), "write its text as .txt or .jsonl"),
    BinaryKind("a pickle", _magic(rb"\x80[\x02-\x05]."), "write its text as .txt or .jsonl"),
    BinaryKind("a parquet table", _magic(rb"PAR1[\x00-\x1f]"), "rename it: mv {0} {0}.parquet"),
    BinaryKind("an Arrow table", _magic(rb"ARROW1\x00\x00"), "rename it: mv {0} {0}.arrow"),
    BinaryKind("an Arrow table", _magic(rb"\xff{4}..\x00\x00"), "rename it: mv {0} {0}.arrow"),
    BinaryKind("an image", _magic(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a"), "leave it out"),
    BinaryKind("a program", _magic(rb"\x7fELF"), "leave it out"),
)  # fmt: skip


def open_file(path: str) -> BufferedReader:
    """Open a file for reading its uncompressed bytes.

    Reading raises DamagedFile where the file cannot be uncompressed.

    Raises:
        OSError: The file cannot be opened.
        UnreadableFile: The file is not compressed in the way that its name says.
        ValueError: The package that reads the compression format is missing.
    """
    suffix = compression_of(path)
    if not suffix:
        return BufferedReader(FileIO(path), BLOCK)
    file = _open_compressed(path, suffix)
    with FileIO(path) as compressed_file:
        head = compressed_file.read(HEAD)
    if not head:
        file.close()
        raise UnreadableFile(path, "the file has 0 bytes: download it again, or remove it")
    if not COMPRESSIONS[suffix].magic.match(head):
        file.close()
        raise UnreadableFile(path, _reason_for_wrong_suffix(path, suffix, head))
    return BufferedReader(_UncompressedFile(file, path), BLOCK)


def open_text(path: str) -> BufferedReader:
    """Open a text for reading its uncompressed bytes, as open_file does.

    Raises:
        OSError: The file cannot be opened.
        UnreadableFile: The first bytes are not those of a text.
        ValueError: The package that reads the compression format is missing.
    """
    with open_file(path) as file:
        head = _read_head(file.raw)
    reason = _reason_for_head(path, head)
    if reason:
        raise UnreadableFile(path, reason)
    # opened anew, because a file that is damaged in `head` would seem to end there after a seek
    return open_file(path)


def start_of_text(path: str) -> int:
    """Return the first byte of a text after a byte order mark, which is not part of the text.

    Example: 3 for a file with the bytes EF BB BF 61, and 0 for a file with the byte 61. A file that
    cannot be read gives 0, because its reader names the fault.
    """
    with contextlib.suppress(OSError, UnreadableFile), open_text(path) as file:
        if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            return len(BYTE_ORDER_MARK)
    return 0


def zstd(path: str) -> ModuleType:
    """Return the module that reads .zst files, which is part of Python since 3.14.

    Raises:
        ValueError: Python is older, and the package `backports.zstd` is missing.
    """
    if sys.version_info >= (3, 14):
        return optional("compression.zstd", path)
    return optional("backports.zstd", path, "backports.zstd")


def shell_input(path: str, command: str) -> str:
    """Return the shell command that gives the uncompressed text of a file to `command`.

    Example: shell_input("a.json.gz", "jq -c .") gives gzip -dc a.json.gz | jq -c .
    """
    suffix = compression_of(path)
    if not suffix:
        return f"{command} < {shlex.quote(path)}"
    return f"{COMPRESSIONS[suffix].name} -dc {shlex.quote(path)} | {command}"


class _UncompressedFile(RawIOBase):
    """The uncompressed bytes of a compressed file, with one exception for all kinds of damage."""

    def __init__(self, file: Any, path: str):
        self._file = file
        self._path = path
        self._errors: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, OSError)
        if compression_of(path) == ".zst":
            self._errors += (zstd(path).ZstdError,)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with self._damage_named():
            data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._damage_named():
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    @contextlib.contextmanager
    def _damage_named(self):
        """Raise DamagedFile for an error of the compressed bytes."""
        try:
            yield
        except self._errors as error:
            if isinstance(error, OSError) and error.errno:
                raise  # an error of the disk
            reason = f"the compressed file is damaged from here on ({error})"
            raise DamagedFile(self._path, reason) from None


def _open_compressed(path: str, suffix: str) -> Any:
    """Open a compressed file with the module for its suffix."""
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".bz2":
        return bz2.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    module = zstd(path)
    options = {module.DecompressionParameter.window_log_max: LONGEST_WINDOW}
    return module.open(path, "rb", options=options)


def _read_head(raw_file) -> bytes:
    """Return the first bytes of a file, or fewer if the file is damaged in them."""
    head = b""
    with contextlib.suppress(DamagedFile):
        while len(head) < HEAD and (data := raw_file.read(HEAD - len(head))):
            head += data
    return head


def _reason_for_head(path: str, head: bytes) -> str:
    """Return why a file with these first uncompressed bytes is not text; "" if it may be text."""
    for kind in BINARY_KINDS:
        if kind.magic.match(head):
            return f"this is {kind.name}, not text: {_remedy(path, kind)}"
    for suffix, compression in COMPRESSIONS.items():
        if compression.magic.match(head):
            return _reason_for_hidden_compression(path, suffix)
    return ""


def _remedy(path: str, kind: BinaryKind) -> str:
    """Return what to do with a file of a kind, which is uncompressed first if necessary."""
    suffix = compression_of(path)
    if not suffix or kind.name == "a tar archive":  # tar uncompresses the file itself
        return kind.remedy.format(shlex.quote(path))
    command = f"{COMPRESSIONS[suffix].name} -d {shlex.quote(path)}"
    remedy = kind.remedy.format(shlex.quote(path[: -len(suffix)]))
    return f"uncompress it with: {command}; then {remedy}"


def _reason_for_hidden_compression(path: str, suffix: str) -> str:
    """Return why a file that is compressed, but not according to its name, is not text."""
    compression = COMPRESSIONS[suffix]
    outer = compression_of(path)
    quoted = shlex.quote(path)
    if outer:
        command = f"{COMPRESSIONS[outer].name} -d {quoted}"
        return f"this is compressed twice: uncompress it with: {command}"
    with contextlib.suppress(OSError, ValueError), _open_compressed(path, suffix) as file:
        inner = _read_head(_UncompressedFile(file, path))
        tar = next(kind for kind in BINARY_KINDS if kind.name == "a tar archive")
        if tar.magic.match(inner):
            return f"this is {tar.name}, not text: {tar.remedy.format(quoted)}"
    return (
        f"this is compressed with {compression.name}, but its name does not end in {suffix}: "
        f"rename it: mv {quoted} {shlex.quote(path + suffix)}"
    )


def _reason_for_wrong_suffix(path: str, suffix: str, head: bytes) -> str:
    """Return why a file with these first bytes is not compressed in the way that its name says."""
    renamed = path[: -len(suffix)]
    name = COMPRESSIONS[suffix].name
    for other, compression in COMPRESSIONS.items():
        if compression.magic.match(head):
            return (
                f"this is compressed with {compression.name}, not with {name}: rename it with: "
                f"mv {shlex.quote(path)} {shlex.quote(renamed + other)}"
            )
    for kind in BINARY_KINDS:
        if kind.magic.match(head):
            return f"this is {kind.name}, not text: {kind.remedy.format(shlex.quote(path))}"
    return (
        f"this is not compressed with {name}, though its name ends in {suffix}: download it again, "
        f"or if it is text, rename it: mv {shlex.quote(path)} {shlex.quote(renamed)}"
    )
