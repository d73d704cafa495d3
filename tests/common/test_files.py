"""Files that several processes write at once, and locks between processes."""

import errno
import fcntl
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.files import ABANDONED_SECONDS, atomic_write, exclusive_lock


def hold_lock(path, ready):
    with exclusive_lock(path):
        ready.set()
        signal.pause()


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold_lock, args=(path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(BlockingIOError, match="wait for it"), exclusive_lock(path, "wait for it"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with exclusive_lock(path):
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys, number):
    """Some network file systems (Lustre, NFS, FUSE) have no locks."""

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_lock(tmp_path / ".lock"):
        pass
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"warning: the file system of {tmp_path} has no locks" in warning


@pytest.mark.parametrize("message", ["c is being prepared: wait for it", ""])
def test_the_lock_of_another_user_is_a_lock(message):
    """Its permissions are no fault, and it is not for us to remove."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is its owner's alone
        os.chmod(folder, 0o777)
        path = Path(folder) / ".lock"
        path.touch(mode=0o600 if is_root else 0)
        if is_root:
            os.seteuid(65534)
        try:
            with (
                pytest.raises(BlockingIOError) as error,
                exclusive_lock(path, message, wait=not message),
            ):
                pass
        finally:
            if is_root:
                os.seteuid(0)
        assert path.exists()
    assert "wait for it" in str(error.value)
    assert "another user" in str(error.value)
    assert not any(word in str(error.value) for word in ("remove", "Permission", "permission"))


def test_another_error_of_a_lock_names_its_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error, exclusive_lock(tmp_path / "file" / ".lock"):
        pass
    assert error.value.filename == str(tmp_path / "file" / ".lock")


def test_two_interleaved_writers(tmp_path):
    """Each writer has its own temporary file, and the last writer to finish wins."""
    path = tmp_path / "vocabulary"
    with atomic_write(path) as first:
        first.write(b"first, ")
        with atomic_write(path) as second:
            second.write(b"second")
            first.write(b"whole")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first, whole"
    assert os.listdir(tmp_path) == ["vocabulary"]


def write_slowly(path, value, writing, go_on):
    with atomic_write(path) as f:
        f.write(value)
        f.flush()
        writing.set()
        assert go_on.wait(60)
        f.write(value)


def test_two_processes_write_one_file(tmp_path):
    path = tmp_path / "vocabulary"
    context = multiprocessing.get_context("spawn")
    go_on = context.Event()
    processes = []
    for value in (b"a", b"b"):
        writing = context.Event()
        process = context.Process(target=write_slowly, args=(path, value, writing, go_on))
        process.start()
        processes.append(process)
        assert writing.wait(60)
    assert len(os.listdir(tmp_path)) == 2
    go_on.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert path.read_bytes() in (b"aa", b"bb")
    assert os.listdir(tmp_path) == ["vocabulary"]


KILLED_WRITER = """
import os, signal
from pathlib import Path
from common.files import atomic_write
with atomic_write(Path("{path}")) as f:
    f.write(b"half")
    f.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path):
    path = tmp_path / "a[1].json"  # the name is not a pattern
    script = KILLED_WRITER.format(path=path)
    subprocess.run([sys.executable, "-c", script], check=False)
    (leftover,) = os.listdir(tmp_path)
    assert leftover.startswith("a[1].json.")
    assert leftover.endswith(".tmp")
    (tmp_path / "other.json.tmp").touch()
    with atomic_write(path) as f:
        f.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == ["a[1].json", "other.json.tmp"]


def test_leftovers_of_another_machine_go_after_a_day(tmp_path):
    """A machine cannot know whether a writer on another machine is alive."""
    path = tmp_path / "a.json"
    leftover = tmp_path / f"a.json.not-{platform.node()}-1-0.tmp"
    leftover.touch()
    with atomic_write(path):
        pass
    assert leftover.exists()
    past = leftover.stat().st_mtime - ABANDONED_SECONDS - 60
    os.utime(leftover, (past, past))
    with atomic_write(path):
        pass
    assert os.listdir(tmp_path) == ["a.json"]
