"""CORPUS/.work: finished pieces, to go on from; of one process, or of several that do parts."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from common.files import atomic_write, lock


@contextlib.contextmanager
def working_folder(work: Path, key: str, count: int, shared: bool):
    """Makes and locks `work`, so that no two processes prepare one corpus unless each does a part
    (shared). Pieces of another plan (key) are thrown away. Yields alone(), which is true once no
    other part is at work. On leaving, the folder goes, unless there are pieces left to do, of
    `count`, and an error or another part stands in the way."""
    if work.is_symlink():  # in a stranger's folder; it is emptied at the end
        raise ValueError(f"{work} is a link: remove it")
    with _locked(work, shared) as file:
        told = work / "key"
        if not told.exists() or told.read_text() != key:
            if not lock(file):
                raise OSError(f"{work.parent} is being prepared by others, with other flags")
            if told.exists() and (done := _done(work)):
                print(f"{done:,} finished pieces are of other files or flags: they are thrown away")
            for path in work.iterdir():
                if path.name != "lock":
                    path.unlink()
            with atomic_write(told) as f:
                f.write(key.encode())
        if shared:
            lock(file, shared=True)  # whoever came first lets the others in
        stopped = False
        try:
            yield lambda: lock(file)
        except BaseException as error:  # but not one in what a piece holds, or in the whole
            stopped = not isinstance(error, ValueError)
            raise
        finally:
            done = _done(work)
            if (done == 0 or (done == count and not stopped)) and lock(file):
                told.unlink(missing_ok=True)  # first: without it, what a kill leaves isn't trusted
                shutil.rmtree(work, ignore_errors=True)  # another part may have been quicker
                with contextlib.suppress(OSError):  # not empty: it stays
                    work.parent.rmdir()
                    work.parent.parent.rmdir()


@contextlib.contextmanager
def _locked(work: Path, shared: bool):
    """Makes `work` and takes its lock. Raises BlockingIOError (OSError) where another has it."""
    path = work / "lock"
    with contextlib.ExitStack() as stack:
        while True:
            work.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "ab"))  # "w" would empty what a link leads to
            if not lock(file) and not (shared and lock(file, shared=True)):
                raise BlockingIOError(
                    f"{work.parent} is being prepared by another process: wait for it, or choose "
                    f"another --corpus NAME"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break  # else whoever had it has removed it since
        yield file


def _done(work) -> int:
    return len(list(work.glob("*.json")))


def read_accounts(work: Path, count: int, on_error: str) -> dict[int, dict]:
    """The accounts of finished pieces, by number; of pieces with skips only where that is asked."""
    accounts = {}
    for i in range(count):
        with contextlib.suppress(FileNotFoundError):
            account = json.loads((work / f"{i:06}.json").read_bytes())
            if on_error == "skip" or not account["skipped"]:
                accounts[i] = account
    return accounts
