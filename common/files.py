"""Files that are written whole or not at all, JSON, locks."""

import contextlib
import json
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, two at once aren't kept apart
    fcntl = None


def folder_name(name: str, flag: str) -> str:
    """`name`, where it can be that of a folder inside another. Raises ValueError elsewhere."""
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{name!r} can't be the name of a folder: choose another {flag} NAME")
    return name


@contextlib.contextmanager
def atomic_write(path: Path, by: str = ""):
    """A binary file to write to; `path` changes once all of it is on the disk, or not at all.

    by: tells apart those who may write it at the same time. What a killed one leaves behind,
    path + by + ".tmp", only the same one writes over.
    """
    temporary = path.with_name(path.name + by + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # in a stranger's folder, it may lead out of it
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a failed write doesn't know it
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path):
    """What a JSON file holds. Raises OSError, or ValueError that says what is wrong with it."""
    if path.exists() and not path.is_file():  # a pipe, say, would keep us waiting
        raise ValueError(f"{path} is no file")
    data = path.read_bytes()
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def lock(file, shared=False) -> bool:
    """Takes an open file for this process alone, until it closes it or ends, in whatever way.
    False where another process has it. shared: with others that take it so, once nobody has it
    alone."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
