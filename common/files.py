"""Files that are written completely or not at all, JSON files, and locks."""

import contextlib
import errno
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
ABANDONED_SECONDS = 24 * 60 * 60  # a temporary file that is unchanged for so long has no writer

_writer_numbers = itertools.count()


def folder_name(name: str, flag: str) -> str:
    """Return `name`, after the check that it can be the name of a folder inside another folder.

    Args:
        name: Name to check.
        flag: Flag that gave the name, for the error message.

    Returns:
        The unchanged name.

    Raises:
        ValueError: The name is empty or leads out of the folder.
    """
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} cannot be the name of a folder: choose another {flag} NAME")
    return name


@contextlib.contextmanager
def atomic_write(path: Path, clean: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing; `path` changes once the whole file is on the disk, or not at all.

    Any number of writers may write the same path at once: each writes a temporary file of its own,
    and the last writer to finish wins. Ray, for example, repeats a task if it takes a living node
    for dead.

    Args:
        path: File to write or replace.
        clean: Whether to remove temporary files that killed writers of `path` left. The search
            lists the folder, which is slow in a folder of many files.

    Yields:
        A binary file.

    Raises:
        OSError: The file cannot be written.
    """
    if clean:
        _remove_leftovers(path)
    temporary = path.with_name(f"{path.name}.{_writer_name()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a process of an earlier boot had the same id
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a failed write does not name its file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _writer_name() -> str:
    """Return a name that no other writer has: HOST-PROCESS-NUMBER."""
    return f"{platform.node()}-{os.getpid()}-{next(_writer_numbers)}"


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left."""
    pattern = re.compile(rf"{re.escape(path.name)}(\.(?P<host>.+)-(?P<pid>\d+)-\d+)?\.tmp")
    with contextlib.suppress(OSError):  # the folder does not exist or cannot be listed
        for name in os.listdir(path.parent):
            match = pattern.fullmatch(name)
            if match and _is_abandoned(path.with_name(name), match["host"], match["pid"]):
                path.with_name(name).unlink(missing_ok=True)


def _is_abandoned(temporary: Path, host: str | None, pid: str | None) -> bool:
    """Return whether the writer of a temporary file is dead."""
    if host is None or pid is None:  # from an older version, which gave one name to all writers
        return True
    if time.time() - temporary.lstat().st_mtime > ABANDONED_SECONDS:
        return True
    if host != platform.node() or os.name == "nt":  # Windows has no signal that only asks
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # the process belongs to another user
        return False
    return False


def read_json(path: Path) -> Any:
    """Return the value that a JSON file holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is damaged, or `path` is not a file.
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
    """Hold a lock among processes until the block ends, or the process, even by SIGKILL.

    The lock file is removed at the end. On a file system without locks the block runs unlocked,
    after one warning.

    Args:
        path: Lock file, in a folder that exists.
        message: Error message for the case that another process holds the lock.
        wait: Whether to wait until the other process releases the lock.

    Raises:
        BlockingIOError: Another process holds the lock, and `wait` is false; or the lock file
            belongs to another user, so that waiting is impossible.
        OSError: The lock file cannot be written.
    """
    lock = filelock.FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(message) from None
    except PermissionError as error:
        if not path.is_file():
            error.filename = str(path)
            raise
        message = message or f"{path} is held by another process: wait for it, and run this again"
        raise BlockingIOError(f"{message} (the lock file belongs to another user)") from None
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
            path.unlink()  # before the release, so that waiting processes notice
        lock.release()
