"""Files: written whole or not at all, read as JSON, locked."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def folder_name(name: str, flag: str) -> str:
    """Return `name`.

    Raises:
        ValueError: It cannot be the name of a folder inside another; the message names the flag.
    """
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} cannot be the name of a folder: choose another {flag} NAME")
    return name


@contextlib.contextmanager
def atomic_write(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """Open a file for writing; `path` changes once all of it is on the disk, or not at all.

    Args:
        path: The file to write or replace.
        writer: Distinguishes processes that may write it at the same time. The temporary file is
            named path + writer + ".tmp"; one that a killed process left is overwritten.

    Yields:
        A binary file.

    Raises:
        OSError: It cannot be written.
    """
    temporary = path.with_name(path.name + writer + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # it may be a link that leads elsewhere
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a failed write does not know it
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged.
    """
    if path.exists() and not path.is_file():  # a pipe, for example, would block
        raise ValueError(f"{path} is not a file")
    data = path.read_bytes()
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


@contextlib.contextmanager
def exclusive_lock(path: Path, message: str = "", wait: bool = False) -> Iterator[None]:
    """Hold a lock among processes, until the block or the process ends in whatever way.

    The lock file is removed at the end. On a file system without locks the block runs unlocked,
    after one warning.

    Args:
        path: The lock file; its folder exists.
        message: Of the error, if another process holds the lock.
        wait: Wait for the other process instead.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file cannot be written.
    """
    lock = filelock.FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(message) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            error.filename = str(path)
            raise
        print(
            f"warning: the file system of {path.parent} has no locks, so nothing stops two "
            f"processes from writing there at once",
            file=sys.stderr,
        )
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps open files
            path.unlink()  # while it is held: others who wait for it notice
        lock.release()
