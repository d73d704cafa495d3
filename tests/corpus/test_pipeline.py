"""Several calls of prepare for one corpus do not disturb each other."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from corpus import pipeline, verify
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.metadata import read_metadata
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source that prepare() divides into three tasks."""
    monkeypatch.setattr(pipeline, "TASK_BYTES", (2000, 2000))
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i:010}"}) + "\n" for i in range(150)))
    return Source(str(path), "jsonl")


def prepare(folder, *sources, **settings):
    corpus = Corpus("my", {}, list(sources))
    with open_engine("processes", workers=1) as run_tasks:
        return pipeline.prepare(corpus, get_tokenizer("bytes"), folder, run_tasks, **settings)


def test_a_part_whose_tasks_were_removed_is_an_error(tmp_path, source, monkeypatch):
    """A run with other settings may remove the tasks while the part waits for the lock."""
    folder = tmp_path / "c"
    lock = pipeline._Preparation.lock

    @contextlib.contextmanager
    def lock_after_others(self, wait):
        with lock(self, wait):
            shutil.rmtree(self.tasks_dir)
            yield

    monkeypatch.setattr(pipeline._Preparation, "lock", lock_after_others)
    with pytest.raises(OSError, match=r"tasks were removed.*run this again"):
        prepare(folder, source, part="0/1")
    assert not (folder / "metadata.json").exists()
    monkeypatch.undo()
    assert prepare(folder, source, part="0/1")


def test_parts_remove_finished_tasks_of_other_settings(tmp_path, source, capsys):
    folder = tmp_path / "c"
    prepare(folder, source, part="0/2", seed=1)
    assert list(folder.glob(".work/*/*.json"))
    prepare(folder, source, part="0/1")
    assert "finished tasks of other files or flags are thrown away" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"train.bin", "val.bin", "metadata.json"}


def test_a_test_split_of_empty_documents_is_refused(tmp_path, source):
    """Readers refuse a split without text, so prepare() must not write one."""
    empty = tmp_path / "test.jsonl"
    empty.write_text('{"text": ""}\n')
    folder = tmp_path / "c"
    with pytest.raises(ValueError, match=r"nothing is left for test"):
        prepare(folder, source, Source(str(empty), "jsonl", split="test", number=1))
    assert not (folder / "metadata.json").exists()


def test_a_corpus_can_be_prepared_again_as_verify_says(tmp_path, source, monkeypatch):
    """verify() names the file to remove, and preparing again then repairs the corpus."""
    folder = tmp_path / "c"
    prepare(folder, source)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    metadata = read_metadata(folder)
    del metadata["sha256"]
    metadata["splits"]["val"]["documents"] += 1
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="end-of-text tokens for") as error:
        verify.verify(folder)
    remedy = str(error.value).split("remove ")[1].split(" and run")[0]
    (tmp_path / remedy).unlink()
    prepare(folder, source)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


@pytest.mark.parametrize("field", ["seed", "source", "train_split_ratio", "corpus"])
def test_verify_refuses_metadata_without_a_field(tmp_path, source, field):
    folder = tmp_path / "c"
    prepare(folder, source)
    metadata = read_metadata(folder)
    del metadata["sha256"]
    del metadata[field]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"metadata\.json is damaged"):
        verify.verify(folder)


def test_a_part_may_run_beside_a_run_without_parts(tmp_path, source, monkeypatch):
    """A run without parts may finish and clean up between two tasks of a part."""
    prepare(tmp_path / "expected", source)
    folder = tmp_path / "c"
    tokenize = pipeline._Preparation.tokenize

    def tokenize_after_plain_run(self, numbers):
        monkeypatch.setattr(pipeline._Preparation, "tokenize", tokenize)
        prepare(folder, source)
        tokenize(self, numbers)

    monkeypatch.setattr(pipeline._Preparation, "tokenize", tokenize_after_plain_run)
    assert prepare(folder, source, part="0/2") == read_metadata(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()
    }


@contextlib.contextmanager
def before_tokenizing(monkeypatch, function):
    """Call `function` once, when a part or a run is about to do its tasks."""
    tokenize = pipeline._Preparation.tokenize_tasks

    def function_then_tokenize(self, numbers):
        patch.undo()
        function()
        tokenize(self, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Preparation, "tokenize_tasks", function_then_tokenize)
        yield


@pytest.mark.parametrize("part", ["", "0/1"])
def test_a_running_part_is_left_alone_by_other_flags(tmp_path, source, monkeypatch, part):
    """Its tasks would be thrown away by a run, or by the part that joins."""
    folder = tmp_path / "c"

    def other():
        with pytest.raises(BlockingIOError, match=r"--part with other files or flags: wait for it"):
            prepare(folder, source, part=part, seed=1)

    with before_tokenizing(monkeypatch, other):
        assert prepare(folder, source, part="0/2") is None
    assert prepare(folder, source, part="1/2")["seed"] == 0
    assert prepare(folder, source, part=part, seed=1)["seed"] == 1  # now nobody is in its way
    assert {path.name for path in folder.iterdir()} == {"train.bin", "val.bin", "metadata.json"}


def test_a_killed_part_is_in_nobodys_way(tmp_path, source):
    folder = tmp_path / "c"
    prepare(folder, source, part="0/2")
    (tasks_dir,) = folder.glob(".work/*")
    (tasks_dir / f"left{pipeline.RUNNING}").touch()
    assert prepare(folder, source, seed=1)


def test_a_part_whose_tasks_are_removed_fails(tmp_path, source, monkeypatch):
    """Even if that happens after its last task, as on a file system without locks."""
    folder = tmp_path / "c"
    tokenize_part = pipeline._Preparation.tokenize_part

    def tokenize_and_lose(self, numbers):
        tokenize_part(self, numbers)
        shutil.rmtree(self.tasks_dir)

    monkeypatch.setattr(pipeline._Preparation, "tokenize_part", tokenize_and_lose)
    with pytest.raises(OSError, match=r"tasks were removed.*run this again"):
        prepare(folder, source, part="0/2")


@pytest.mark.parametrize("flag", ["seed", "on_error"])
def test_parts_with_different_flags_are_warned(tmp_path, source, capsys, flag):
    """Each would be done, and nobody would ever join them."""
    folder = tmp_path / "c"
    path = Path(source.path)
    if flag == "on_error":
        path.write_text("no JSON\n" + path.read_text())
    prepare(folder, source, part="0/2", on_error="skip")
    assert "warning" not in capsys.readouterr().err
    other = {"seed": 1} if flag == "seed" else {"on_error": "stop"}
    assert prepare(folder, source, part="1/2", **other) is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "finished tasks of other files or flags" in error and "same files and flags" in error


@pytest.mark.parametrize("end", ["whole", "invalid", "Ctrl-C"])
@pytest.mark.parametrize("part", ["", "0/2", "0/1"])
def test_tasks_of_a_text_that_changed_meanwhile_are_removed(
    tmp_path, source, monkeypatch, part, end
):
    """The text may get its former size and date again, and then they would be joined."""
    folder = tmp_path / "c"
    path = Path(source.path)
    text = path.read_text()
    state = path.stat()
    tokenize_task = pipeline.tokenize_task

    def tokenize_changed(job, number, chunks):
        if number == 2 and end == "Ctrl-C":
            raise KeyboardInterrupt
        path.write_text(text.replace("document", "DOCUMENT"))
        if number == 2 and end == "invalid":
            path.write_text(text.replace('{"text', "broken"))
        os.utime(path, ns=(0, 0))
        return tokenize_task(job, number, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "tokenize_task", tokenize_changed)
        expected = KeyboardInterrupt if end == "Ctrl-C" else ValueError
        with pytest.raises(
            expected, match=None if end == "Ctrl-C" else "changed while it was read"
        ):
            prepare(folder, source, part=part)
    assert not list(folder.glob(".work/*/*.json"))
    path.write_text(text)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    prepare(folder, source)
    assert b"DOCUMENT" not in np.fromfile(folder / "train.bin", "<u2").astype(np.uint8).tobytes()


@pytest.mark.parametrize("other", ["3/8", "0/8"])
def test_a_part_without_finished_tasks_keeps_the_tasks_of_others(
    tmp_path, monkeypatch, source, other
):
    """A job array may have more parts than tasks (3/8), and a part may fail at once (0/8)."""
    folder = tmp_path / "c"
    tokenize = pipeline._Preparation.tokenize

    def tokenize_after_other_part(self, numbers):
        monkeypatch.setattr(pipeline._Preparation, "tokenize", tokenize)
        with monkeypatch.context() as patch:
            if other == "0/8":
                patch.setattr(pipeline, "tokenize_task", fail)
            with contextlib.suppress(ValueError):
                prepare(folder, source, part=other)
        tokenize(self, numbers)

    monkeypatch.setattr(pipeline._Preparation, "tokenize", tokenize_after_other_part)
    assert prepare(folder, source, part="1/8") is None
    assert [path.name for path in folder.glob(".work/*/*.json")] == ["000001.json"]


def fail(*task):
    raise ValueError("an invalid document")


def test_a_part_that_starts_late_leaves_no_work_folder(tmp_path, source, monkeypatch):
    """Another part may finish the corpus between the first check of a part and its start."""
    folder = tmp_path / "c"
    prepare(folder, source, part="0/2")
    make_tasks_dir = pipeline._Preparation.make_tasks_dir

    def after_the_other_part(self):
        monkeypatch.setattr(pipeline._Preparation, "make_tasks_dir", make_tasks_dir)
        prepare(folder, source, part="1/2")
        make_tasks_dir(self)

    monkeypatch.setattr(pipeline._Preparation, "make_tasks_dir", after_the_other_part)
    assert prepare(folder, source, part="0/2") == read_metadata(folder)
    assert {path.name for path in folder.iterdir()} == {"train.bin", "val.bin", "metadata.json"}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path, source):
    mine = tmp_path / "mine"
    mine.write_text("keep")
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / ".lock").symlink_to(mine)
    with pytest.raises(OSError) as error:
        prepare(folder, source)
    assert error.value.filename == str(folder / ".lock")
    assert mine.read_text() == "keep"


def test_an_up_to_date_corpus_of_another_user_is_not_prepared_again(tmp_path, monkeypatch, capsys):
    """A user cannot set the modification time of another user's file."""
    (tmp_path / "c.txt").write_text("some text " * 50)
    corpus = Corpus("c", {}, [Source(str(tmp_path / "c.txt"))])

    def utime(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    with open_engine("processes", workers=1) as run_tasks:
        pipeline.prepare(corpus, get_tokenizer("bytes"), tmp_path / "c", run_tasks)
        capsys.readouterr()
        monkeypatch.setattr(os, "utime", utime)
        pipeline.prepare(corpus, get_tokenizer("bytes"), tmp_path / "c", run_tasks)
    assert "is prepared already" in capsys.readouterr().out


def test_shards_of_a_killed_publish_are_ours(tmp_path, source, monkeypatch):
    """While a corpus is replaced, only .work says whose shards lie beside no metadata.json.

    So .work stays while there are such shards, even if other settings fail at once in between.
    """
    folder = tmp_path / "c"
    prepare(folder, source)

    replace = os.replace

    def replace_and_stop(path, target):
        replace(path, target)
        if target == folder / "train.bin":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, source, seed=1)
    assert not (folder / "metadata.json").exists()
    assert (folder / "train.bin").exists()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "tokenize_task", fail)
        with pytest.raises(ValueError, match="an invalid document"):
            prepare(folder, source, seed=2)
    assert not list(folder.glob(".work/*/*.json"))
    prepare(folder, source, seed=3)
    assert {path.name for path in folder.iterdir()} == {"train.bin", "val.bin", "metadata.json"}
    assert read_metadata(folder)["seed"] == 3


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (["splits", "train", "files", 0], "sha256"),
        (["splits", "val"], "documents"),
        ([], "max_length"),
        (["source", "files", 0], "number"),
        ([], "eot_token"),
    ],
)
@pytest.mark.parametrize("has_fingerprint", [True, False])
def test_verify_names_the_missing_field(tmp_path, source, path, name, has_fingerprint):
    """Metadata without their checksum, as other programs or older versions may write them."""
    folder = tmp_path / "c"
    prepare(folder, source)
    metadata = read_metadata(folder)
    del metadata["sha256"]
    if not has_fingerprint:
        del metadata["fingerprint"]
    entry = metadata
    for key in path:
        entry = entry[key]
    del entry[name]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError) as error:
        verify.verify(folder)
    message = str(error.value)
    assert str(folder / "metadata.json") in message
    assert f"no {name}" in message
    assert "run python prepare_data.py again" in message
    assert "\n" not in message
