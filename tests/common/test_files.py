"""Locks among processes, with the real filelock above a fake system call."""

import errno
import fcntl
import multiprocessing
import os
import signal

import pytest

from common.files import exclusive_lock


def hold(path, ready):
    with exclusive_lock(path):
        ready.set()
        signal.pause()


def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(path, ready))
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
def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys, number):
    """Some network and cluster file systems have none (Lustre, NFS, FUSE)."""

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive_lock(tmp_path / ".lock"):
        pass
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"warning: the file system of {tmp_path} has no locks" in warning


def test_other_errors_name_the_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error, exclusive_lock(tmp_path / "file" / ".lock"):
        pass
    assert error.value.filename == str(tmp_path / "file" / ".lock")
