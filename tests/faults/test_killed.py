"""Killed before any one of the calls that change the disk, and started again: as if nothing was.

bench/faults.py does the same at random moments, hundreds of times, and with Ray.
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

from common.files import atomic_write
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
    """os.fork. The child has a lock of its own for tqdm, whose usual one all processes share: a
    child that is killed while it has that one keeps it for ever."""
    if not (pid := os.fork()):
        tqdm.set_lock(threading.RLock())
    return pid


def killed(function, before: int, worker=False) -> bool:
    """Runs function() in a process that SIGKILLs itself before its call number `before` of those
    that change the disk, the first being 0; tells whether it came to that. worker: the process's
    own workers count and die instead, and function() has to bear it."""
    if pid := fork():
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "function() failed"
        return os.WIFSIGNALED(status)
    parent, calls = os.getpid(), itertools.count()

    def watch(frame, event, function):
        counts = event == "c_call" and function.__name__ in WRITES
        counts = counts and not isinstance(function.__self__, str)  # "".replace
        if counts and worker == (os.getpid() != parent) and next(calls) == before:
            os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.setprofile(watch)
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
    """prepare(FOLDER) makes FOLDER/c of tmp_path/c.jsonl, in two pieces; seed: of the split."""
    monkeypatch.setattr(pipeline, "TASK_BYTES", (3_000, 3_000))
    lines = [json.dumps({"text": f"document {i} " * (i % 30)}) + "\n" for i in range(30)]
    (tmp_path / "c.jsonl").write_text("".join(lines))

    def prepare(folder, workers=1, seed=1):
        corpus = Corpus("c", {"made": "by a test"}, [Source(str(tmp_path / "c.jsonl"), "jsonl")])
        with open_engine("processes", workers) as run_tasks:
            pipeline.prepare(corpus, get_tokenizer("bytes"), folder / "c", run_tasks, seed=seed)

    return prepare


def unreadable(folder) -> None:
    """Nothing takes FOLDER/c for a corpus."""
    for refuse in (
        lambda: newest_corpus(folder),
        lambda: read_metadata(folder / "c"),
        lambda: open_tokens(folder / "c" / "train"),
    ):
        with pytest.raises(FileNotFoundError):
            refuse()


@pytest.mark.slow
def test_preparing_in_place_of_another_corpus(tmp_path, prepare):
    """At any time there is the old corpus, or none, or the new one; never parts of both."""
    prepare(tmp_path / "old", seed=0)
    prepare(tmp_path / "new")
    old, new = (read_files(tmp_path / name / "c") for name in ("old", "new"))
    states = []
    for before in itertools.count():
        folder = tmp_path / f"killed-{before}"
        shutil.copytree(tmp_path / "old", folder)
        ended = not killed(functools.partial(prepare, folder), before)
        there = read_files(folder / "c")
        if "metadata.json" in there:
            states.append("new" if there["metadata.json"] == new["metadata.json"] else "old")
            assert {"old": old, "new": new}[states[-1]].items() <= there.items(), before
        else:
            states.append("none")
            unreadable(folder)
        prepare(folder)
        assert read_files(folder / "c") == new, before
        if ended:
            break
    assert [state for state, _ in itertools.groupby(states)] == ["old", "none", "new"]
    assert len(states) > 50


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 5])
def test_one_worker_alone(tmp_path, prepare, before, monkeypatch):
    """The rest of them stops with an error; finished tasks are kept, and resumed from."""
    # another test may have imported it: workers would be spawned, without what kills them
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)

    def bear():
        with pytest.raises(OSError, match="a worker process was killed"):
            prepare(tmp_path / "killed", workers=2)

    assert not killed(bear, before, worker=True)
    unreadable(tmp_path / "killed")
    for name in ("killed", "whole"):
        prepare(tmp_path / name)
    assert read_files(tmp_path / "killed" / "c") == read_files(tmp_path / "whole" / "c")


@pytest.mark.slow
def test_all_processes_at_any_moment(tmp_path, prepare, monkeypatch):
    prepare(tmp_path / "whole")
    monkeypatch.setattr(pipeline, "TASK_BYTES", (200, 200))
    choose = random.Random(0)
    for number in range(5):
        if not (pid := fork()):
            prepare(tmp_path / f"{number}", workers=2)
            os._exit(0)
        os.setpgid(pid, pid)
        time.sleep(choose.uniform(0, 0.1))
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        prepare(tmp_path / f"{number}", workers=2)
        assert read_files(tmp_path / f"{number}" / "c") == read_files(tmp_path / "whole" / "c")


def test_two_that_do_one_piece_at_the_same_time(tmp_path):
    """As a worker does that outlives its parent, or a node that Ray takes for dead."""
    path = tmp_path / "000000.train.bin"
    with atomic_write(path) as one:
        one.write(b"the same")
        with atomic_write(path) as other:
            other.write(b"the same bytes")
        assert path.read_bytes() == b"the same bytes"
        one.write(b" bytes")
    assert read_files(tmp_path) == {path.name: b"the same bytes"}


@pytest.mark.parametrize("damaged", [False, True])
def test_saving_a_checkpoint(tmp_path, damaged):
    """At any time there are two, whole; where the newest is damaged, the one before is kept until
    there is a new one."""
    run, steps = tmp_path / "run", []
    for before in itertools.count():
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        for step in (1, 2):
            save_checkpoint(run / "last.pt", tiny_checkpoint(step))
        if damaged:
            (run / "last.pt").write_bytes(b"")
        save = functools.partial(save_checkpoint, run / "last.pt", tiny_checkpoint(3))
        ended = not killed(save, before)
        steps.append(last_checkpoint(run)["step"])
        if not damaged:
            (run / "last.pt").write_bytes(b"")
            assert last_checkpoint(run)["step"] in (1, 2)
        save()
        assert load_checkpoint(run / "last.pt")["step"] == 3
        assert sorted(path.name for path in run.iterdir()) == ["last.pt", "previous.pt"]
        if ended:
            break
    old = 1 if damaged else 2
    assert steps[0] == old and steps[-1] == 3 and set(steps) == {old, 3} and len(steps) > 5


@pytest.mark.slow
def test_training_again_and_again(train, tmp_path, monkeypatch):
    """Killed before its first call, after a restart before its 16th, and so on to its end: it ends
    as if it had never been killed."""
    monkeypatch.setattr("training.metrics.plot_losses", plot_losses)  # which writes, too
    flags = TINY | {"max_steps": 4, "eval_every": 2, "checkpoint_minutes": 0, "resume": "auto"}
    whole = train(**flags, run_name="whole")
    go_on = functools.partial(train, **flags, run_name="killed")
    restarts = next(i for i in itertools.count() if not killed(go_on, before=15 * i))
    assert restarts > 4
    (tmp_path / "out" / "killed" / "previous.pt.tmp").touch()  # by a kill in the very last save
    go_on()
    run = tmp_path / "out" / "killed"
    for name in ("train_loss", "learning_rate", "val_loss", "val_bpb"):
        assert losses(run, name) == losses(whole, name)
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(folder / name) for folder in (run, whole))
        assert one["step"] == other["step"] and one["best"] == other["best"]
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
