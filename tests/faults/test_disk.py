"""A full, read-only or damaged disk gives an error that names the file and the remedy.

No test leaves a half-written corpus or checkpoint. test_killed.py tests interrupted writes, and
test_verify_finds_what_changed in tests/corpus/test_inputs.py tests damaged shards.
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
    """A function disk(kilobytes) that mounts or resizes the file system at disk.folder."""

    def resize(kilobytes):
        action = "remount," if folder.is_mount() else ""
        options = f"{action}size={kilobytes}k"
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        result = subprocess.run(mount, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"this machine cannot mount a file system: {result.stderr.strip()}")

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


def path_and_remedy(error: OSError, reason: str) -> tuple[Path, str]:
    """Return the path and the remedy that the message of an error names around its reason."""
    path, _, remedy = sentence(error).partition(f": {reason}; ")
    return Path(path), remedy


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """The path of a .jsonl file of sixty documents, which several tasks read."""
    monkeypatch.setattr(pipeline, "TASK_BYTES", (5_000, 5_000))
    lines = [json.dumps({"text": f"document {i} " * (i % 40)}) + "\n" for i in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    return tmp_path / "c.jsonl"


def test_preparing_resumes_after_the_disk_filled_up(disk, documents, tmp_path, monkeypatch):
    """The disk has enough space at the start, and another program fills it."""
    prepare(tmp_path / "whole" / "c", documents)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = disk.folder / "c"
    unwritten = set()
    for kilobytes in range(4, 1000, 4):  # one more page each time
        disk(kilobytes)
        try:
            prepare(folder, documents)
            break
        except OSError as error:
            path, remedy = path_and_remedy(error, "No space left on device")
            assert folder in path.parents
            assert "make room" in remedy
            unwritten.add(path.name)
        assert not (folder / "metadata.json").exists()
        disk(1000)
        prepare(folder, documents)
        assert read_files(folder) == read_files(tmp_path / "whole" / "c")
        shutil.rmtree(folder)
    expected = {"000000.train.bin", "000002.json", "train.bin", "val.bin", "metadata.json"}
    assert expected <= unwritten


def test_finished_tasks_need_no_space_again(disk, documents, monkeypatch):
    """A disk with just enough space for a run has just enough space for the resumed run."""
    monkeypatch.setattr(pipeline, "TASK_BYTES", (200_000, 200_000))
    documents.write_bytes(documents.read_bytes() * 20)
    # one token per byte, two bytes per token, once in the files of the tasks and once in shards
    needed = 2 * 2 * documents.stat().st_size
    margin = 100_000
    folder = disk.folder / "c"
    disk(2000)
    (disk.folder / "others").write_bytes(bytes(2000 * 1024 - needed - margin))
    prepare(folder, documents, part="0/2")
    assert shutil.disk_usage(folder).free < needed - 2 * margin
    prepare(folder, documents)
    assert read_metadata(folder)


def test_training_resumes_exactly_after_the_disk_filled_up(disk, train, tmp_path):
    """The error names the file, and the last checkpoint stays as it was."""
    flags = dict(max_steps=4, eval_every=2, checkpoint_minutes=0)
    disk(4000)
    whole = train(**flags, run_name="whole")
    folder = train(**flags, run_name="mine", stop_at=1)
    unwritten = []
    shutil.copytree(folder, "kept")
    for kilobytes in (0, 20, 40, 100):
        shutil.rmtree(folder)
        shutil.copytree("kept", folder)
        disk(shutil.disk_usage(disk.folder).used // 1024 + kilobytes)
        with pytest.raises(OSError) as error:
            train(resume=folder)
        disk(4000)
        path, remedy = path_and_remedy(error.value, "No space left on device")
        unwritten.append(path.name)
        assert path.parent == folder
        assert "make room" in remedy
        assert last_checkpoint(folder)["step"] in (1, 2)
        assert not list(folder.glob("*.tmp"))
    assert unwritten[0] == "config.json"
    assert unwritten[-1] == "last.pt"
    train(resume=folder, stop_at=99)
    assert losses(folder) == losses(whole)
    assert losses(folder, "val_loss") == losses(whole, "val_loss")


def test_a_full_disk_names_the_metrics_file(disk, train):
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
    """A folder that every user can enter; only its owner can enter tmp_path."""
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        yield Path(home)


@contextlib.contextmanager
def read_only(folder):
    """Forbid writes to the folder until the end of the `with` block.

    Permissions do not bind root, so root becomes the user `nobody` for the block.
    """
    folder = folder.absolute()
    is_root = os.geteuid() == 0
    importlib.import_module("torch._dynamo")  # on some machines only root may read it
    concurrent.futures.process._check_system_limits()  # it imports modules, too
    folder.chmod(0o555)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_preparing_into_a_read_only_folder_is_an_error(home, documents):
    path = Path(shutil.copy(documents, home))
    with read_only(home), pytest.raises(OSError) as error:
        prepare(home / "data" / "c", path)
    message = sentence(error.value)
    assert message.startswith(f"{home}/data: Permission denied; change the permissions")


def test_a_new_run_in_a_read_only_folder_is_an_error(home, train, monkeypatch):
    shutil.copytree("data", home / "data")
    monkeypatch.chdir(home)
    with read_only(home), pytest.raises(OSError) as error:
        train(resume="", **TINY)
    path, remedy = path_and_remedy(error.value, "Permission denied")
    assert path == Path("out")
    assert "change the permissions" in remedy


def test_resuming_a_read_only_run_is_an_error(home, train, monkeypatch):
    shutil.copytree("data", home / "data")
    monkeypatch.chdir(home)
    train(max_steps=3, stop_at=1, run_name="mine")
    with read_only(Path("out/mine")), pytest.raises(OSError) as error:
        train(resume="out/mine")
    path, remedy = path_and_remedy(error.value, "Permission denied")
    assert path == Path("out/mine/.lock")
    assert "change the permissions" in remedy


# damaged files


def flip_bits(data: bytes, positions):
    """Yield copies of `data`, each with one bit flipped in the byte at one of the positions."""
    for position in positions:
        flipped = bytes([data[position] ^ 1 << position % 8])
        yield data[:position] + flipped + data[position + 1 :]


def test_a_flipped_bit_in_metadata_json_is_an_error_or_harmless(tmp_path):
    make_corpus(tmp_path / "c", [f"document {i}" for i in range(99)], documents=True)
    path = tmp_path / "c" / "metadata.json"
    good = read_metadata(tmp_path / "c")
    content = path.read_bytes()
    harmless = 0
    for damaged in flip_bits(content, range(len(content))):
        path.write_bytes(damaged)
        try:
            found = read_metadata(tmp_path / "c")
            harmless += 1
            assert all(found.get(name) == good[name] for name in good if name != "sha256"), damaged
        except ValueError as error:
            assert str(path) in str(error) and "run python prepare_data.py again" in str(error)
    assert harmless < 8  # a changed name of the field "sha256" removes the check


def test_preparing_again_repairs_a_damaged_metadata_json(tmp_path, documents):
    prepare(tmp_path / "c", documents)
    good = read_metadata(tmp_path / "c")
    path = tmp_path / "c" / "metadata.json"
    size = good["splits"]["val"]["bytes"]  # no other field depends on this number
    path.write_text(path.read_text().replace(f'"bytes": {size}', f'"bytes": {size + 1}'))
    with pytest.raises(ValueError, match=r"metadata\.json is damaged"):
        read_metadata(tmp_path / "c")
    prepare(tmp_path / "c", documents)
    assert read_metadata(tmp_path / "c") == good


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_flipped_bit_in_a_checkpoint_is_an_error_or_harmless(tmp_path, name):
    """The bits lie in all members of the zip file and in its directory."""
    save_checkpoint(tmp_path / "last.pt", tiny_checkpoint(1))
    path = (tmp_path / "last.pt").rename(tmp_path / name)
    (tmp_path / "last.pt").touch()
    good = load_checkpoint(path)
    content = path.read_bytes()
    harmless = 0
    remedy = "remove it to use last.pt" if name == "best.pt" else "name another, or start a new run"
    for damaged in flip_bits(content, range(0, len(content), 13)):
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
            model = found.pop("model")
            assert all(torch.equal(model[key], weight) for key, weight in good["model"].items())
            assert found.items() <= good.items()
            harmless += 1  # the bit lies in a date or in the padding between members
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a readable checkpoint (")
            assert str(error).endswith(remedy)
    assert harmless < 0.6 * len(content) / 13, harmless


def test_a_run_with_a_damaged_last_checkpoint_resumes_from_the_previous_one(train, capsys):
    """The run ends like a whole run."""
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
    found = load_checkpoint(folder / "last.pt")["model"]
    expected = load_checkpoint(whole / "last.pt")["model"]
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


# files that are removed or truncated while they are in use


@pytest.mark.parametrize("num_shards", [1, 5])
def test_a_shard_that_is_truncated_while_it_is_mapped_is_an_error(
    tmp_path, monkeypatch, num_shards
):
    """A read past the end of the file would raise SIGBUS."""
    if num_shards > 1:
        monkeypatch.setattr(pipeline, "TASK_BYTES", (20_000, 20_000))
        monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)
    make_corpus(tmp_path / "c", ["some text, " * 20_000])
    tokens = Tokens(tmp_path / "c" / "train")
    path = sorted((tmp_path / "c").glob("train*.bin"))[-1]
    assert len(tokens.shards) == num_shards
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


def test_a_removed_shard_is_readable_while_it_is_open(train, rhyme):
    tokens = Tokens(rhyme / "train")
    ids = np.fromfile(rhyme / "train.bin", np.uint16)
    (rhyme / "train.bin").unlink()
    assert np.array_equal(tokens.read([0], len(ids))[0], ids)
    with pytest.raises(FileNotFoundError, match=r"train.bin is missing: run python prepare_data"):
        train(max_steps=3)


def test_training_on_a_truncated_shard_is_an_error(train, rhyme, monkeypatch):
    compute_loss = train_gpt2.compute_loss

    def truncate(*args):
        os.truncate(rhyme / "train.bin", 100)
        return compute_loss(*args)

    monkeypatch.setattr(train_gpt2, "compute_loss", truncate)
    with pytest.raises(ValueError, match=r"train.bin was cut from .* to 100 while it was in use"):
        train(max_steps=3)


def test_a_crash_in_c_code_prints_the_python_function(tmp_path):
    """A file may be truncated between the check of its length and the read."""
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


def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path, documents):
    """The failed run leaves no corpus, and the next run reads the changed source."""
    corpus = Corpus("c", {"made": "by a test"}, [Source(str(documents), "jsonl")])

    def run_tasks(function, tasks):
        for i, task in enumerate(tasks):
            yield i, function(*task)
            lines = documents.read_text().splitlines(keepends=True)
            documents.write_text("".join(lines[:-9]))

    with pytest.raises(ValueError, match="the text of c has changed while it was read"):
        pipeline.prepare(corpus, get_tokenizer("bytes"), tmp_path / "c", run_tasks)
    assert not (tmp_path / "c").exists()
    prepare(tmp_path / "c", documents)


def test_a_source_that_is_removed_while_it_is_read_is_an_error(tmp_path, documents):
    corpus = Corpus("c", {"made": "by a test"}, [Source(str(documents), "jsonl")])

    def run_tasks(function, tasks):
        for i, task in enumerate(tasks):
            documents.unlink(missing_ok=True)
            yield i, function(*task)

    with pytest.raises(OSError) as error:
        pipeline.prepare(corpus, get_tokenizer("bytes"), tmp_path / "c", run_tasks)
    assert sentence(error.value) == f"{documents}: No such file or directory"
