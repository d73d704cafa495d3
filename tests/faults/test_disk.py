"""A disk that is full, read-only or damaged: an error that names the file and what to do, and
nothing half-written. See also test_killed.py, for what a failed write leaves.

--verify finds what changed in a shard: tests/corpus/test_inputs.py, test_verify_finds_what_changed.
"""

import concurrent.futures.process
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, losses, make_corpus, read_files, tiny_checkpoint

import train_gpt2
from batches.tokens import Tokens
from common.script import _message as sentence
from corpus import pipeline, shards
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.metadata import read_metadata
from corpus.sources import Source
from corpus.token_files import blocks
from corpus.tokenizer import get_tokenizer
from dataset import TextDataset
from training.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture
def tmp_path(memory_folder):
    return memory_folder


@pytest.fixture
def disk(tmp_path):
    """resize(kilobytes) makes disk.folder a file system of that size."""

    def resize(kilobytes):
        how = "remount," if folder.is_mount() else ""
        options = f"{how}size={kilobytes}k"
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        result = subprocess.run(mount, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no file system can be mounted here: {result.stderr.strip()}")

    folder = tmp_path / "out"
    folder.mkdir()
    resize.folder = folder
    yield resize
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def prepare(folder, path, **options):
    corpus = Corpus("c", {"made": "by a test"}, [Source(str(path), "jsonl")])
    with open_engine("processes", workers=1) as run_tasks:
        pipeline.prepare(corpus, get_tokenizer("bytes"), folder, run_tasks, **options)


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Sixty documents, in several pieces."""
    monkeypatch.setattr(pipeline, "TASK_BYTES", (5_000, 5_000))
    lines = [json.dumps({"text": f"document {i} " * (i % 40)}) + "\n" for i in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    return tmp_path / "c.jsonl"


def test_preparing_on_a_disk_that_fills_up(disk, lines, tmp_path, monkeypatch):
    """By others, say: at the start there was room enough. With some made, it goes on."""
    prepare(tmp_path / "whole" / "c", lines)
    enough = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: enough)
    folder, full = disk.folder / "c", set()
    for kilobytes in range(4, 1000, 4):  # a page more each time
        disk(kilobytes)
        try:
            prepare(folder, lines)
            break
        except OSError as error:
            path, _, remedy = sentence(error).partition(": No space left on device; ")
            assert folder in (Path(path).parent, *Path(path).parents) and "make room" in remedy
            full.add(Path(path).name)
        assert not (folder / "metadata.json").exists()
        disk(1000)
        prepare(folder, lines)
        assert read_files(folder) == read_files(tmp_path / "whole" / "c")
        shutil.rmtree(folder)
    assert {"000000.train.bin", "000002.json", "train.bin", "val.bin", "metadata.json"} <= full


def test_pieces_that_are_done_need_no_room_again(disk, lines, monkeypatch):
    """Where there was just enough, there is just enough after a stop."""
    monkeypatch.setattr(pipeline, "TASK_BYTES", (200_000, 200_000))
    lines.write_bytes(lines.read_bytes() * 20)
    needed = 2 * 2 * lines.stat().st_size  # a token a byte, of two bytes, in pieces and in shards
    folder, some = disk.folder / "c", 100_000
    disk(2000)
    (disk.folder / "others").write_bytes(bytes(2000 * 1024 - needed - some))
    prepare(folder, lines, part="0/2")
    assert shutil.disk_usage(folder).free < needed - 2 * some
    prepare(folder, lines)
    assert read_metadata(folder)


def test_training_on_a_disk_that_fills_up(disk, train, tmp_path):
    """It ends with the file's name, and the last checkpoint as it was; with some room, it goes on
    as if it had never ended."""
    flags = dict(max_steps=4, eval_every=2, checkpoint_minutes=0)
    disk(4000)
    whole = train(**flags, run_name="whole")
    folder, full = train(**flags, run_name="mine", stop_at=1), []
    shutil.copytree(folder, "kept")
    for kilobytes in (0, 20, 40, 100):
        shutil.rmtree(folder)
        shutil.copytree("kept", folder)
        disk(shutil.disk_usage(disk.folder).used // 1024 + kilobytes)
        with pytest.raises(OSError) as error:
            train(resume=folder)
        disk(4000)
        path, _, remedy = sentence(error.value).partition(": No space left on device; ")
        full.append(Path(path).name)
        assert Path(path).parent == folder and "make room" in remedy
        assert last_checkpoint(folder)["step"] in (1, 2)
        assert not list(folder.glob("*.tmp"))
    assert full[0] == "config.json" and full[-1] == "last.pt"
    train(resume=folder, stop_at=99)
    assert losses(folder) == losses(whole)
    assert losses(folder, "val_loss") == losses(whole, "val_loss")


def test_metrics_that_find_no_room(disk, train):
    disk(4000)
    folder = train(max_steps=200, eval_every=200, stop_at=1)
    disk(shutil.disk_usage(disk.folder).used // 1024 + 4)
    with pytest.raises(OSError) as error:
        train(resume=folder, stop_at=200)
    assert sentence(error.value).startswith(
        f"{folder}/metrics.jsonl: No space left on device; make"
    )
    assert last_checkpoint(folder)["step"] == 1


@pytest.fixture
def home():
    """A folder that every user can enter (tmp_path is its owner's alone)."""
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        yield Path(home)


@contextlib.contextmanager
def read_only(folder):
    """Nobody can write to the folder inside the `with` block. Permissions do not bind root, so root
    becomes the user `nobody` until the end of the block."""
    folder = folder.absolute()
    is_root = os.geteuid() == 0
    importlib.import_module("torch._dynamo")  # a module that only root may read, on some machines
    concurrent.futures.process._check_system_limits()  # imports modules, too
    folder.chmod(0o555)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_preparing_into_a_folder_that_is_read_only(home, lines):
    path = Path(shutil.copy(lines, home))
    with read_only(home), pytest.raises(OSError) as error:
        prepare(home / "data" / "c", path)
    message = sentence(error.value)
    assert message.startswith(f"{home}/data: Permission denied; change the permissions")


@pytest.mark.parametrize("given", ["", "out/mine"])
def test_training_into_a_folder_that_is_read_only(home, train, monkeypatch, given):
    shutil.copytree("data", home / "data")
    monkeypatch.chdir(home)
    if given:
        train(max_steps=3, stop_at=1, run_name="mine")
    with read_only(Path(given)), pytest.raises(OSError) as error:
        train(resume=given, **{} if given else TINY)
    path, _, remedy = sentence(error.value).partition(": Permission denied; ")
    assert path == (f"{given}/.lock" if given else "out")
    assert "change the permissions" in remedy


# ---- damage


def flips(data: bytes, places):
    """`data` with one bit flipped, at each of the places in turn."""
    for place in places:
        yield data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def test_a_bit_of_metadata_json(tmp_path):
    """It is found, or of no consequence."""
    make_corpus(tmp_path / "c", [f"document {i}" for i in range(99)], documents=True)
    path, good = tmp_path / "c" / "metadata.json", read_metadata(tmp_path / "c")
    content, harmless = path.read_bytes(), 0
    for damaged in flips(content, range(len(content))):
        path.write_bytes(damaged)
        try:
            found = read_metadata(tmp_path / "c")
            harmless += 1
            assert all(found.get(name) == good[name] for name in good if name != "sha256"), damaged
        except ValueError as error:
            assert str(path) in str(error) and "run python prepare_data.py again" in str(error)
    assert harmless < 8  # a bit of the name of the sha256 itself


def test_a_damaged_metadata_json_is_mended_by_preparing_again(tmp_path, lines):
    prepare(tmp_path / "c", lines)
    good, path = read_metadata(tmp_path / "c"), tmp_path / "c" / "metadata.json"
    size = good["splits"]["val"]["bytes"]  # which nothing else would tell
    path.write_text(path.read_text().replace(f'"bytes": {size}', f'"bytes": {size + 1}'))
    with pytest.raises(ValueError, match=r"metadata\.json is damaged"):
        read_metadata(tmp_path / "c")
    prepare(tmp_path / "c", lines)
    assert read_metadata(tmp_path / "c") == good


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_bit_of_a_checkpoint(tmp_path, name):
    """Of any of its parts, and of what holds them together."""
    save_checkpoint(tmp_path / "last.pt", tiny_checkpoint(1))
    path = (tmp_path / "last.pt").rename(tmp_path / name)
    (tmp_path / "last.pt").touch()
    good, content, harmless = load_checkpoint(path), path.read_bytes(), 0
    remedy = "remove it to use last.pt" if name == "best.pt" else "name another, or start a new run"
    for damaged in flips(content, range(0, len(content), 13)):
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
            model = found.pop("model")
            assert all(torch.equal(model[key], weight) for key, weight in good["model"].items())
            assert found.items() <= good.items()
            harmless += 1  # in the padding between parts, or a date
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a readable checkpoint (")
            assert str(error).endswith(remedy)
    assert harmless < 0.6 * len(content) / 13, harmless


def test_the_one_before_is_gone_on_with(train, capsys):
    """A run whose newest checkpoint is damaged ends as if it weren't."""
    flags = dict(max_steps=4, checkpoint_minutes=0)
    whole = train(**flags, run_name="whole")
    folder = train(**flags, run_name="mine", stop_at=3)
    content = bytearray((folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pt").write_bytes(content)
    capsys.readouterr()
    train(resume=folder, stop_at=99)
    out = capsys.readouterr().out
    assert f"{folder}/last.pt is not a readable checkpoint" in out
    assert f"continuing from the checkpoint before it: {folder}/previous.pt" in out
    assert losses(folder) == losses(whole)
    assert read_files(folder).keys() == read_files(whole).keys()
    one, other = (load_checkpoint(run / "last.pt")["model"] for run in (folder, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


# ---- files that go or are cut while they are in use


@pytest.mark.parametrize("several", [False, True])
def test_a_shard_that_is_cut_while_it_is_mapped(tmp_path, monkeypatch, several):
    """To read behind the end would be SIGBUS."""
    if several:
        monkeypatch.setattr(pipeline, "TASK_BYTES", (20_000, 20_000))
        monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    make_corpus(tmp_path / "c", ["some text, " * 20_000])
    tokens = Tokens(tmp_path / "c" / "train")
    path = sorted((tmp_path / "c").glob("train*.bin"))[-1]
    assert len(tokens.shards) == (5 if several else 1)
    os.truncate(path, 5000)
    reads = {
        "a batch": lambda: tokens.read([0, len(tokens) - 65], 65),
        "all": lambda: list(blocks(tokens.shards)),
        "an item": lambda: TextDataset(tokens, 64)[len(tokens) - 65],
    }
    for read in reads.values():
        with pytest.raises(ValueError, match=rf"{path.name} was cut from .* to 5,000 while it was"):
            read()
    path.unlink()


def test_a_shard_that_vanishes_is_there_until_it_is_closed(train, rhyme):
    tokens, ids = Tokens(rhyme / "train"), np.fromfile(rhyme / "train.bin", np.uint16)
    (rhyme / "train.bin").unlink()
    assert np.array_equal(tokens.read([0], len(ids))[0], ids)
    with pytest.raises(FileNotFoundError, match=r"train.bin is missing: run python prepare_data"):
        train(max_steps=3)


def test_training_on_what_is_cut_meanwhile(train, rhyme, monkeypatch):
    compute_loss = train_gpt2.compute_loss

    def cut(*args):
        os.truncate(rhyme / "train.bin", 100)
        return compute_loss(*args)

    monkeypatch.setattr(train_gpt2, "compute_loss", cut)
    with pytest.raises(ValueError, match=r"train.bin was cut from .* to 100 while it was in use"):
        train(max_steps=3)


def test_a_crash_in_c_tells_where(tmp_path):
    """What is cut in the moment between the look at its length and the read."""
    (tmp_path / "cut.py").write_text(
        "import mmap, os\n"
        "from common.script import run_script\n"
        "def main():\n"
        "    with open('file', 'w+b') as f:\n"
        "        f.truncate(100_000)\n"
        "        memory = mmap.mmap(f.fileno(), 0)\n"
        "        f.truncate(0)\n"
        "        memory[50_000]\n"
        "run_script(main)\n"
    )
    result = subprocess.run(
        [sys.executable, "cut.py"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == -signal.SIGBUS
    assert "Bus error" in result.stderr and "in main" in result.stderr


def test_a_source_that_changes_while_it_is_read(tmp_path, lines):
    """Nothing is made of the half that was there."""
    corpus = Corpus("c", {"made": "by a test"}, [Source(str(lines), "jsonl")])

    def run_tasks(function, calls):
        for i, call in enumerate(calls):
            yield i, function(*call)
            lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-9]))

    with pytest.raises(ValueError, match="the text of c has changed while it was read"):
        pipeline.prepare(corpus, get_tokenizer("bytes"), tmp_path / "c", run_tasks)
    assert not (tmp_path / "c").exists()
    prepare(tmp_path / "c", lines)


def test_a_source_that_vanishes_while_it_is_read(tmp_path, lines):
    corpus = Corpus("c", {"made": "by a test"}, [Source(str(lines), "jsonl")])

    def run_tasks(function, calls):
        for i, call in enumerate(calls):
            lines.unlink(missing_ok=True)
            yield i, function(*call)

    with pytest.raises(OSError) as error:
        pipeline.prepare(corpus, get_tokenizer("bytes"), tmp_path / "c", run_tasks)
    assert sentence(error.value) == f"{lines}: No such file or directory"
