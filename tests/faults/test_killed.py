"""A process that is killed before any call that changes the disk, and restarted, loses nothing.

bench/faults.py kills processes at random moments, hundreds of times, and also with Ray.
"""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback

import pytest
import torch
from conftest import TINY, losses, read_files, tiny_checkpoint
from tqdm import tqdm

from common.files import atomic_write, exclusive_lock
from corpus import pipeline
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.metadata import newest_corpus, read_metadata
from corpus.sources import Source
from corpus.token_files import open_tokens
from corpus.tokenizer import get_tokenizer
from training.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint
from training.metrics import plot_losses

WRITES = {"write", "writelines", "flush", "fsync", "replace", "link", "unlink", "mkdir", "rmdir"}


def fork() -> int:
    """Fork this process; the child gets a new lock for tqdm.

    All processes share tqdm's default lock. A child that is killed while it holds the default lock
    would never release it.
    """
    pid = os.fork()
    if pid == 0:
        tqdm.set_lock(threading.RLock())
    return pid


def run_and_kill(function, before: int, worker=False) -> bool:
    """Run function() in a child process that kills itself at a chosen point.

    Args:
        function: Function to run.
        before: Number of the call that the kill precedes, counted from 0 over all calls that
            change the disk.
        worker: Whether to count the calls of the child's workers and to kill a worker instead;
            function() must then handle the loss of the worker.

    Returns:
        Whether the kill happened; False if function() ended earlier.
    """
    pid = fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "function() failed"
        return os.WIFSIGNALED(status)
    child = os.getpid()
    calls = itertools.count()

    def changes_disk(event, function):
        if event != "c_call" or function.__name__ not in WRITES:
            return False
        return not isinstance(function.__self__, str)  # str.replace is not os.replace

    def profile(frame, event, function):
        is_worker = os.getpid() != child
        if changes_disk(event, function) and worker == is_worker and next(calls) == before:
            os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.setprofile(profile)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture
def tmp_path(memory_folder):
    return memory_folder


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """A function prepare(folder, workers, seed) that prepares the corpus folder/c in two tasks."""
    monkeypatch.setattr(pipeline, "TASK_BYTES", (3_000, 3_000))
    lines = [json.dumps({"text": f"document {i} " * (i % 30)}) + "\n" for i in range(30)]
    (tmp_path / "c.jsonl").write_text("".join(lines))

    def prepare(folder, workers=1, seed=1):
        corpus = Corpus("c", {"made": "by a test"}, [Source(str(tmp_path / "c.jsonl"), "jsonl")])
        with open_engine("processes", workers) as run_tasks:
            pipeline.prepare(corpus, get_tokenizer("bytes"), folder / "c", run_tasks, seed=seed)

    return prepare


def assert_no_corpus(folder) -> None:
    """Assert that no reader accepts folder/c as a corpus."""
    with pytest.raises(FileNotFoundError):
        newest_corpus(folder)
    with pytest.raises(FileNotFoundError):
        read_metadata(folder / "c")
    with pytest.raises(FileNotFoundError):
        open_tokens(folder / "c" / "train")


@pytest.mark.slow
def test_a_kill_leaves_the_old_corpus_or_none_or_the_new_one(tmp_path, prepare):
    """A reader never sees parts of both corpora."""
    prepare(tmp_path / "old", seed=0)
    prepare(tmp_path / "new")
    old = read_files(tmp_path / "old" / "c")
    new = read_files(tmp_path / "new" / "c")
    states = []
    for before in itertools.count():
        folder = tmp_path / f"killed-{before}"
        shutil.copytree(tmp_path / "old", folder)
        killed = run_and_kill(functools.partial(prepare, folder), before)
        found = read_files(folder / "c")
        if "metadata.json" not in found:
            states.append("none")
            assert_no_corpus(folder)
        elif found["metadata.json"] == new["metadata.json"]:
            states.append("new")
            assert new.items() <= found.items(), before
        else:
            states.append("old")
            assert old.items() <= found.items(), before
        prepare(folder)
        assert read_files(folder / "c") == new, before
        if not killed:
            break
    assert [state for state, _ in itertools.groupby(states)] == ["old", "none", "new"]
    assert len(states) > 50


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 5])
def test_a_killed_worker_stops_the_run_with_an_error(tmp_path, prepare, before, monkeypatch):
    """The next run writes the same bytes as a run without a kill."""
    # another test may have imported pyarrow: the engine would then spawn its workers, and a
    # spawned worker has no profile function that kills it
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)

    def expect_error():
        with pytest.raises(OSError, match="a worker process was killed"):
            prepare(tmp_path / "killed", workers=2)

    assert not run_and_kill(expect_error, before, worker=True)
    assert_no_corpus(tmp_path / "killed")
    for name in ("killed", "whole"):
        prepare(tmp_path / name)
    assert read_files(tmp_path / "killed" / "c") == read_files(tmp_path / "whole" / "c")


@pytest.mark.slow
def test_a_run_resumes_after_a_kill_of_all_its_processes(tmp_path, prepare, monkeypatch):
    prepare(tmp_path / "whole")
    monkeypatch.setattr(pipeline, "TASK_BYTES", (200, 200))
    rng = random.Random(0)
    for number in range(5):
        pid = fork()
        if pid == 0:
            prepare(tmp_path / f"{number}", workers=2)
            os._exit(0)
        os.setpgid(pid, pid)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        lock = tmp_path / f"{number}" / "c" / ".lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(lock, wait=True):
            pass  # a worker that dies between fork and exec holds the lock, too
        prepare(tmp_path / f"{number}", workers=2)
        assert read_files(tmp_path / f"{number}" / "c") == read_files(tmp_path / "whole" / "c")


def test_two_processes_may_write_the_same_file_at_once(tmp_path):
    """A worker may outlive its parent, and a node that Ray considers dead may still write."""
    path = tmp_path / "000000.train.bin"
    with atomic_write(path) as first:
        first.write(b"the same")
        with atomic_write(path) as second:
            second.write(b"the same bytes")
        assert path.read_bytes() == b"the same bytes"
        first.write(b" bytes")
    assert read_files(tmp_path) == {path.name: b"the same bytes"}


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path, damaged):
    """A run has two whole checkpoints at any time.

    If the newest checkpoint is damaged, the older one stays until a new checkpoint is complete.
    """
    run = tmp_path / "run"
    steps = []
    for before in itertools.count():
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for step in (1, 2):
            save_checkpoint(run / "last.pt", tiny_checkpoint(step))
        if damaged:
            (run / "last.pt").write_bytes(b"")
        save = functools.partial(save_checkpoint, run / "last.pt", tiny_checkpoint(3))
        killed = run_and_kill(save, before)
        steps.append(last_checkpoint(run)["step"])
        if not damaged:
            (run / "last.pt").write_bytes(b"")
            assert last_checkpoint(run)["step"] in (1, 2)
        save()
        assert load_checkpoint(run / "last.pt")["step"] == 3
        assert sorted(path.name for path in run.iterdir()) == ["last.pt", "previous.pt"]
        if not killed:
            break
    old = 1 if damaged else 2
    assert steps[0] == old
    assert steps[-1] == 3
    assert set(steps) == {old, 3}
    assert len(steps) > 5


@pytest.mark.slow
def test_a_run_that_is_killed_many_times_ends_like_a_whole_run(train, tmp_path, monkeypatch):
    """Each restart makes 15 more writes than the one before until the next kill."""
    monkeypatch.setattr("training.metrics.plot_losses", plot_losses)  # a plot writes to the disk
    flags = TINY | {"max_steps": 4, "eval_every": 2, "checkpoint_minutes": 0, "resume": "auto"}
    whole = train(**flags, run_name="whole")
    resume = functools.partial(train, **flags, run_name="killed")
    restarts = next(i for i in itertools.count() if not run_and_kill(resume, before=15 * i))
    assert restarts > 4
    (tmp_path / "out" / "killed" / "previous.pt.tmp").touch()  # left by a kill in the last save
    resume()
    run = tmp_path / "out" / "killed"
    for name in ("train_loss", "learning_rate", "val_loss", "val_bpb"):
        assert losses(run, name) == losses(whole, name)
    for name in ("last.pt", "best.pt"):
        found = load_checkpoint(run / name)
        expected = load_checkpoint(whole / name)
        assert found["step"] == expected["step"]
        assert found["best"] == expected["best"]
        for key, weight in found["model"].items():
            assert torch.equal(weight, expected["model"][key]), key
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
