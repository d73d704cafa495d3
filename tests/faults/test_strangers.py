"""Untrusted files: archives, checkpoints, weights, vocabularies, descriptions, prepared corpora.

A reader reads an untrusted file correctly or raises a ValueError or OSError of one line that names
the file. A reader writes nothing outside its folder, executes nothing, and uses bounded memory.
Further tests stand beside the tests of the readers: links and devices in archives in
test_inputs.py, other models in test_huggingface.py, .tiktoken files in test_tokenizer.py.
"""

import copy
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_corpus, make_tar

from corpus.archives import unpack
from corpus.descriptions import describe
from corpus.files import find
from corpus.tokenizer import HuggingFaceTokenizer, get_tokenizer
from corpus.verify import verify
from dataset import TextDataset
from model import GPT, GPTConfig
from training.checkpoint import load_checkpoint
from training.models import load_model

MODEL_SHAPE = {"vocab_size": 257, "n_positions": 16, "n_layer": 1, "n_head": 2, "n_embd": 8}


def error_line(function, *arguments) -> str:
    """Return the message of the error that function(*arguments) raises: one line."""
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def paths_in(folder) -> list[str]:
    """Return the sorted relative paths of all files and folders in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def mutants(data: bytes, count: int, letters=bytes(range(256)), stop=None):
    """Yield `count` copies of `data`, each with one to four bytes before `stop` changed.

    Every run yields the same copies.
    """
    rng = random.Random(0)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(stop or len(data))] = rng.choice(letters)
        yield bytes(mutant)


# archives


def make_zip(members: dict, method=zipfile.ZIP_DEFLATED) -> bytes:
    """Return a .zip file; members: maps a name to a text."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            info = zipfile.ZipInfo(name)
            archive.writestr(info, text, method)
            info.external_attr = 0  # torch writes this value, too
    return file.getvalue()


def read_zip(path) -> dict[str, bytes]:
    """Return the content of each member of a zip file."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_the_name_of_a_member_is_never_a_path(tmp_path, make):
    """The pattern takes all members, and all of them go to one file in the folder."""
    names = [
        "../evil",
        "/tmp/evil-of-test-strangers",
        "a/../../evil",
        "C:\\evil",
        "..\\evil",
        "~/evil",
    ]
    members = dict.fromkeys(names, "x")
    if make is make_tar:
        types = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE
        members |= {f"{i}.txt": (kind, "/etc/passwd") for i, kind in enumerate(types)}
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "archive"
    archive.write_bytes(make(members))
    unpack(archive, archive.parent, {"(?s).*": "out.raw"})
    assert paths_in(tmp_path) == ["in", "in/archive", "in/out.raw"]
    assert (tmp_path / "in" / "out.raw").read_text() == "x" * len(names)
    assert not Path("/tmp/evil-of-test-strangers").exists()


def change_headers(data: bytes, position: int, value: int) -> bytes:
    """Return a zip file of one member with a byte changed in both headers of the member."""
    changed = bytearray(data)
    central = data.index(b"PK\1\2")
    changed[position] = value
    changed[central + position + 2] = value
    return bytes(changed)


ZIP = make_zip({"a.txt": "hello " * 50})
STORED_ZIP = make_zip({"a.txt": "hello " * 50}, zipfile.ZIP_STORED)
TAR = make_tar({"a.txt": "hello " * 100})
DAMAGED_ARCHIVES = {
    "empty": b"",
    "not an archive": b"<html>",
    "truncated zip": ZIP[:-10],
    "truncated tar": gzip.compress(gzip.decompress(TAR)[:700]),
    "truncated gz": TAR[: len(TAR) // 2],
    "gz of another file": gzip.compress(b"hello" * 500),
    "encrypted": change_headers(ZIP, 6, 1),
    "unknown method": change_headers(ZIP, 8, 99),
    "other data": ZIP.replace(ZIP[36:40], b"\xff" * 4, 1),
}


@pytest.mark.parametrize("case", DAMAGED_ARCHIVES)
def test_a_damaged_archive_is_refused(tmp_path, case):
    (tmp_path / "archive").write_bytes(DAMAGED_ARCHIVES[case])
    message = error_line(unpack, tmp_path / "archive", tmp_path, {r"a\.txt": "out.raw"})
    assert message.startswith(f"{tmp_path / 'archive'} ")
    assert paths_in(tmp_path) == ["archive"]


@pytest.mark.parametrize("data", [ZIP, TAR, STORED_ZIP], ids=["zip", "tar", "stored zip"])
def test_an_archive_with_changed_bytes_is_read_or_refused(tmp_path, data):
    archive = tmp_path / "archive"
    for mutant in mutants(data, 300):
        archive.write_bytes(mutant)
        try:
            unpack(archive, tmp_path, {r"a\.txt": "out.raw"})
        except ValueError as error:
            assert str(archive) in str(error) and "\n" not in str(error)
        assert set(paths_in(tmp_path)) <= {"archive", "out.raw"}


# weights and checkpoints


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    GPT(GPTConfig(**MODEL_SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(weights, tmp_path):
    """A function that loads the model of `weights` with another header, config.json or data.

    model.data, model.header and model.config are the unchanged ones.
    """
    data = (weights / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    config_json = json.loads((weights / "config.json").read_text())

    def model(header=header, config=config_json, body=data[8 + length :], length=None, data=None):
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        start = struct.pack("<Q", len(header) if length is None else length)
        (tmp_path / "model.safetensors").write_bytes(data or start + header + body)
        config = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(config)
        return GPT.from_pretrained(tmp_path)

    model.data = data
    model.header = header
    model.config = config_json
    return model


WPE = "transformer.wpe.weight"
INVALID_TENSORS = {
    "huge": {"shape": [1 << 62, 1 << 62]},
    "no elements": {"shape": [0, 1 << 62], "data_offsets": [0, 0]},
    "negative": {"shape": [-16, -8]},
    "fraction": {"shape": [16.0, 8]},
    "overlapping": {"data_offsets": [0, 512]},
    "outside": {"data_offsets": [1 << 40, (1 << 40) + 512]},
    "before": {"data_offsets": [-512, 0]},
    "backwards": {"data_offsets": [512, 0]},
    "other size": {"dtype": "F64"},
    "four bits": {"dtype": "F4"},
    "unknown": {"dtype": "XX"},
}
INVALID_HEADERS = {
    "not JSON": b"hello",
    "not UTF-8": b'{"\xff": 1}',
    "a list": b"[1, 2]",
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "empty": b"{}",
}


@pytest.mark.parametrize("case", [*INVALID_TENSORS, *INVALID_HEADERS])
def test_an_invalid_tensor_or_header_is_refused(model, tmp_path, case):
    header = copy.deepcopy(model.header)
    header[WPE] |= INVALID_TENSORS.get(case, {})
    message = error_line(model, INVALID_HEADERS.get(case, header))
    assert message.startswith(f"{tmp_path / 'model.safetensors'} ")


@pytest.mark.parametrize("length", [0, 90_000_000, 1 << 63, (1 << 64) - 1])
def test_a_header_with_a_false_length_is_refused(model, length):
    assert "model.safetensors is damaged" in error_line(lambda: model(length=length))


def test_the_last_of_two_tensors_of_one_name_counts(model):
    def header_with_two_tensors(shape) -> bytes:
        second = json.dumps({WPE: model.header[WPE] | {"shape": shape}})
        return f"{json.dumps(model.header)[:-1]},{second[1:]}".encode()

    assert model(header_with_two_tensors([16, 8])).config.n_positions == 16
    for shape in ([8, 16], [1 << 40, 8]):
        assert "model.safetensors" in error_line(model, header_with_two_tensors(shape))


def test_weights_with_changed_bytes_in_the_header_are_refused(model):
    stop = 8 + struct.unpack("<Q", model.data[:8])[0]
    for data in mutants(model.data, 150, b'[]{}",:-0123456789eE\0\xff', stop):
        assert "model.safetensors" in error_line(lambda data=data: model(data=data))


INVALID_CONFIGS = {
    "deep": "[" * 100_000,
    "a list": "[[1, 2]]",
    "text": '"abc"',
    "not UTF-8": "\udcff",
    **{f"huge {name}": {name: 1 << 40} for name in MODEL_SHAPE},
    **{f"negative {name}": {name: -8} for name in MODEL_SHAPE},
    "many layers": {"n_layer": 1 << 20},
    "true": {"n_embd": True},
    "NaN": {"layer_norm_epsilon": float("nan")},
    "infinite": {"n_embd": float("inf")},
    "n_inner and an invalid n_embd": {"n_inner": 5, "n_embd": {"a": 1}},
    "a name of ten lines": {"model_type": "gpt\n" * 10},
}


@pytest.mark.parametrize("case", INVALID_CONFIGS)
def test_an_invalid_config_json_is_refused(model, tmp_path, case):
    changed = INVALID_CONFIGS[case]
    if isinstance(changed, dict):
        changed = model.config | changed
    if case == "not UTF-8":
        (tmp_path / "config.json").write_bytes(b'{"n_embd": "\xff"}')
        message = error_line(GPT.from_pretrained, tmp_path)
    else:
        message = error_line(lambda: model(config=changed))
    assert str(tmp_path) in message and len(message) < 300


class Evil:
    """An object whose pickle makes the folder `evil` when pickle.loads reads it."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "evil"),)


def make_checkpoint(weights, **changed) -> dict:
    """Return a checkpoint with the weights in a folder and some changed fields."""
    checkpoint = {
        "step": 1,
        "best": {"step": 1, "val_loss": 1.0},
        "model": GPT.from_pretrained(weights).state_dict(),
        "model_config": dict(MODEL_SHAPE),
        "metadata": {"vocab_size": 257, "tokenizer": {"name": "bytes", "sha256": ""}, "splits": {}},
        "config": {},
    }
    return checkpoint | changed


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_checkpoint_is_executed(weights, tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path)))
    (tmp_path / "evil").rmdir()  # pickle.loads has executed the object
    evil = make_checkpoint(weights, step=Evil(tmp_path))
    for name, legacy in ("new.pt", False), ("old.pt", True):
        torch.save(evil, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(tmp_path)))
    for path in sorted(tmp_path.glob("*.pt")):
        assert f"{path} is not a readable checkpoint" in error_line(load_checkpoint, path)
    assert paths_in(tmp_path) == ["new.pt", "old.pt", "plain.pt"]


INVALID_CHECKPOINTS = {
    "no weights": {"model": {}},
    "texts as weights": {"model": dict.fromkeys(("a", "b"), "x")},
    "one tensor as weights": {"model": torch.zeros(3)},
    "no shape": {"model_config": {}},
    "another shape": {"model_config": MODEL_SHAPE | {"n_layer": 2}},
    "a huge shape": {"model_config": MODEL_SHAPE | {"n_embd": 1 << 40}},
    "a text as n_embd": {"model_config": MODEL_SHAPE | {"n_embd": "many"}},
    "an unknown setting": {"model_config": MODEL_SHAPE | {"rotary": 1}},
    "more tokens than rows": {"metadata": {"vocab_size": 258}},
    "a text as vocab_size": {"metadata": {"vocab_size": "many"}},
    "no metadata": {"metadata": None},
    "no tokenizer": {"metadata": {"vocab_size": 257, "splits": {}}},
    "no splits": {"metadata": {"vocab_size": 257, "tokenizer": {"name": "bytes", "sha256": ""}}},
    "a text as step": {"step": "many"},
    "no best step": {"best": {}},
    "no settings": {"config": None},
}


@pytest.mark.parametrize("case", INVALID_CHECKPOINTS)
def test_an_invalid_checkpoint_is_refused(weights, tmp_path, case):
    path = tmp_path / "best.pt"
    torch.save(make_checkpoint(weights), path)
    assert load_model(load_checkpoint(path)).config.n_embd == 8
    torch.save(make_checkpoint(weights, **INVALID_CHECKPOINTS[case]), path)
    message = error_line(load_checkpoint, path)
    assert f"{path} is not a checkpoint of this version of train_gpt2.py" in message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_with_changed_bytes_in_its_pickle_is_read_or_refused(weights, tmp_path):
    """The checksums of the zip file are correct: torch itself meets the changed bytes."""
    path = tmp_path / "best.pt"
    torch.save(make_checkpoint(weights), path)
    members = read_zip(path)
    name = next(name for name in members if name.endswith("data.pkl"))
    for mutant in mutants(members[name], 300):
        path.write_bytes(make_zip(members | {name: mutant}, zipfile.ZIP_STORED))
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


# vocabularies


@pytest.fixture(scope="module")
def vocabulary():
    """The content of a valid tokenizer.json."""
    pytest.importorskip("tokenizers", reason="tokenizers is in requirements-dev.txt")
    from training.huggingface import tokenizer_json

    return json.loads(tokenizer_json(get_tokenizer("bytes")))


def load_tokenizer(path, content):
    """Write a tokenizer.json, load it and encode a text."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = HuggingFaceTokenizer("strange", path)
    tokenizer.encode("hello")
    return tokenizer


def remove_token_for_h(vocabulary):
    vocabulary["model"].update(unk_token="nope")
    vocabulary["model"]["vocab"].pop("h")


INVALID_VOCABULARIES = {
    "a huge id": lambda v: v["model"]["vocab"].update(zz=4_000_000_000),
    "a negative id": lambda v: v["model"]["vocab"].update(zz=-1),
    "empty": lambda v: v.update(added_tokens=[], model=v["model"] | {"vocab": {}, "merges": []}),
    "a merge of unknown tokens": lambda v: v["model"].update(merges=[["never", "there"]]),
    "an invalid regular expression": lambda v: v["pre_tokenizer"].update(
        type="Split", pattern={"Regex": "("}
    ),
    "no token for h": remove_token_for_h,
}


@pytest.mark.parametrize("case", INVALID_VOCABULARIES)
def test_an_invalid_vocabulary_is_refused(vocabulary, tmp_path, case):
    changed = copy.deepcopy(vocabulary)
    assert load_tokenizer(tmp_path / "a.json", changed).vocab_size == 257
    INVALID_VOCABULARIES[case](changed)
    message = error_line(load_tokenizer, tmp_path / "a.json", changed)
    assert str(tmp_path / "a.json") in message or message.startswith("strange cannot encode")


def test_a_vocabulary_with_changed_bytes_is_read_or_refused(vocabulary, tmp_path):
    error_line(load_tokenizer, tmp_path / "a.json", "[" * 100_000)
    for mutant in mutants(json.dumps(vocabulary).encode(), 200, b'[]{}",:-0123456789en', 900):
        try:
            assert load_tokenizer(tmp_path / "a.json", mutant.decode()).vocab_size <= 2 * 257 + 1
        except ValueError as error:
            assert "a.json" in str(error) or "strange" in str(error)


# described folders

DESCRIPTION = {"name": "n", "data_content": "text", "corpuses": ["a"]}


@pytest.fixture
def pile(tmp_path):
    """A function that writes the description of the folder `pile` and returns the sources.

    The folder `outside` lies beside it, and no description may reach it.
    """
    for name in ("pile/a/a.jsonl", "outside/a/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "pile" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "pile" / "loop").symlink_to(tmp_path / "pile" / "loop")

    def pile(description, suffix="json"):
        if not isinstance(description, bytes):
            description = json.dumps(description).encode()
        (tmp_path / "pile" / f"metadata.{suffix}").write_bytes(description)
        return find(str(tmp_path / "pile"))

    pile.folder = tmp_path / "pile"
    return pile


OUTSIDE_PATHS = ["/", "..", "../outside", "link", "link/a", "{outside}"]
INVALID_DESCRIPTIONS = {
    "NaN": {"corpuses": [float("nan")]},
    "an object": {"corpuses": {"a": 1}},
    "a number": {"content_field": 5},
    "a list": {"data_content": ["text"]},
    "ten lines": {"data_content": "text\n" * 10},
    "a huge number": {"dataset_path": 10**400},
    "NUL": {"corpuses": ["\0"]},
    "half a character": {"corpuses": ["\ud800"]},
    "a long name": {"dataset_path": "a" * 5000},
    "a circle": {"corpuses": ["loop"]},
}


def test_a_description_stays_in_its_folder(pile, tmp_path):
    assert [source.path for source in pile(DESCRIPTION)] == [str(pile.folder / "a" / "a.jsonl")]
    assert pile(DESCRIPTION | {"dataset_path": str(pile.folder)}) == pile(DESCRIPTION)
    assert pile(DESCRIPTION | {"dataset_path": "/moved/away"}) == pile(DESCRIPTION)
    for template in OUTSIDE_PATHS:
        path = template.format(outside=tmp_path / "outside")
        for changed in (
            {"dataset_path": path},
            {"corpus_data_dir_parent": path},
            {"corpuses": [path]},
            {"corpuses": [path], "corpus_separation_strategy": "configs"},
        ):
            assert str(pile.folder) in error_line(pile, DESCRIPTION | changed), changed


def test_a_link_out_of_a_described_folder_is_refused(pile):
    link = pile.folder / "a" / "b.jsonl"
    (pile.folder / ".git").mkdir()
    (pile.folder / ".git" / "object").write_text('{"text": "b"}\n')
    link.symlink_to("../.git/object")  # git-annex stores files in this way
    assert [Path(source.path).name for source in pile(DESCRIPTION)] == ["a.jsonl", "b.jsonl"]
    for target in "../../outside/a/a.jsonl", "../../outside/a":
        link.unlink()
        link.symlink_to(target)
        for description in (DESCRIPTION, DESCRIPTION | {"corpuses": []}):
            assert f" is a link out of {pile.folder}: " in error_line(pile, description)


@pytest.mark.parametrize("case", INVALID_DESCRIPTIONS)
def test_an_invalid_description_is_refused(pile, case):
    message = error_line(pile, DESCRIPTION | INVALID_DESCRIPTIONS[case])
    assert str(pile.folder) in message


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)
INVALID_YAML = {
    "a bomb of lists": f"{BOMB}name: n\ndata_content: *j\n",
    "a bomb of merges": BOMB.replace("&a [x, x, x]", "&a {k: v}").replace("[*", "{<<: [*").replace(
        "]\n", "]}\n"
    ),
    "Python": "name: !!python/object/apply:os.mkdir [evil]\ndata_content: text\n",
    "a Python name": "name: !!python/name:os.system\ndata_content: text\n",
    "deep": "[" * 100_000,
    "deep and closed": "name: " + "[" * 5000 + "]" * 5000,
    "two documents": "---\na: 1\n---\nb: 2",
    **{f"invalid {tag}": f"name: !!{tag} '?'\n" for tag in ("bool", "int", "float", "timestamp")},
    "an invalid date": "name: 2020-99-99",
    "before the first year": "name: 0001-01-01t00:00:00+23:00\ndata_content: 1",
    "NUL": "name: \0",
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID_YAML)
def test_an_invalid_description_in_yaml_is_refused(pile, monkeypatch, case):
    pytest.importorskip("yaml", reason="pyyaml is in requirements-dev.txt")
    monkeypatch.chdir(pile.folder.parent)
    before = paths_in(pile.folder.parent)
    assert "metadata.yaml" in error_line(pile, INVALID_YAML[case].encode(), "yaml")
    assert paths_in(pile.folder.parent) == sorted([*before, "pile/metadata.yaml"])


def test_a_description_with_changed_bytes_is_read_or_refused(pile):
    yaml = pytest.importorskip("yaml", reason="pyyaml is in requirements-dev.txt")
    letters = b'[]{}",:-0129eE!&*?|>#%\n \xff'
    contents = {"json": json.dumps(DESCRIPTION), "yaml": yaml.dump(DESCRIPTION)}
    for suffix, content in contents.items():
        data = content.encode()
        for mutant in mutants(data, 300, letters):
            try:
                pile(mutant, suffix)
            except (ValueError, OSError) as error:
                assert str(pile.folder) in str(error)
        (pile.folder / f"metadata.{suffix}").unlink()


def test_describing_does_not_write_through_a_link(tmp_path):
    """An untrusted folder may contain a link in place of a file that describe() writes."""
    (tmp_path / "pile").mkdir()
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "pile" / "metadata.json.tmp").symlink_to(tmp_path / "mine")
    answers = dict.fromkeys(("name", "download_source", "description", "content_field"), "x")
    describe(tmp_path / "pile", answers | {"corpuses": ""})
    assert (tmp_path / "mine").read_text() == "keep"
    assert paths_in(tmp_path) == ["mine", "pile", "pile/metadata.json"]


# prepared corpora


def test_preparing_in_an_untrusted_folder_follows_no_link(tmp_path):
    """Preparing does not wait for a named pipe either."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text("keep")
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / ".work").symlink_to(tmp_path / "home")
    assert "c/.work is a link" in error_line(make_corpus, corpus, ["some text " * 9])
    (corpus / ".work").unlink()
    (corpus / ".work").mkdir()
    (corpus / ".work" / "lock").symlink_to(tmp_path / "home" / "mine")
    for name in ("train.bin.tmp", "val.bin", "skipped.txt"):
        (corpus / name).symlink_to(tmp_path / "home" / "mine")
    os.mkfifo(corpus / "metadata.json")
    make_corpus(corpus, ["some text " * 9])
    assert not (corpus / "val.bin").is_symlink()
    assert (tmp_path / "home" / "mine").read_text() == "keep"
    assert paths_in(tmp_path / "home") == ["mine"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a valid corpus of fifty documents."""
    folder = tmp_path_factory.mktemp("corpus") / "c"
    make_corpus(folder, [f"document {i}" for i in range(50)], documents=True)
    return folder


def change_split(**changed):
    return lambda m: m["splits"]["train"].update(changed)


def change_file(**changed):
    return lambda m: m["splits"]["train"]["files"][0].update(changed)


def change_tokenizer(name):
    return lambda m: m["tokenizer"].update(name=name)


def change_source(**changed):
    return lambda m: m["source"]["files"][0].update(changed)


INVALID_METADATA = {
    **{f"a file at {n!r}": change_file(name=n) for n in ("/etc/passwd", "..", "../c/x", "", "a/b")},
    **{f"{n} tokens": change_file(tokens=n) for n in (-1, 1.5, float("nan"), True, None, "5")},
    **{f"{n} bytes": change_split(bytes=n) for n in (0, float("inf"), [5])},
    **{f"{n} documents": change_split(documents=n) for n in (-1, "many")},
    **{f"files {n}": change_split(files=n) for n in ([], {}, 5, [[]], "abc")},
    **{f"splits {n}": lambda m, n=n: m.update(splits=n) for n in ([], 5, {"train": 5})},
    **{f"{n} token ids": lambda m, n=n: m.update(vocab_size=n) for n in (0, -1, 1.5, "many", None)},
    **{f"eot_token {n}": lambda m, n=n: m.update(eot_token=n) for n in (-1, 257, 1.0, [256])},
    **{f"vocabulary {n!r}": change_tokenizer(n) for n in ("/x.json", "../x.json", 5)},
    "no tokenizer": lambda m: m.update(tokenizer=[]),
    "a text as eot_per_document": lambda m: m.update(eot_per_document="no"),
    "another dtype": lambda m: m.update(dtype="object"),
    "another version": lambda m: m.update(format_version=[1]),
}  # fmt: skip
INVALID_SOURCES = {
    "a number as path": change_source(path=5),
    "an unknown format": change_source(format="pickle"),
    "an unknown kind of documents": change_source(documents="page"),
    "a negative number": change_source(number=-1),
    "a list as field": change_source(field=["text"]),
    "a list as source": lambda m: m["source"].update(files=[[]]),
}


def copy_and_change(corpus, tmp_path, change) -> Path:
    """Return a copy of `corpus` whose metadata.json is changed."""
    folder = tmp_path / "c"
    folder.mkdir()
    for path in corpus.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata.pop("sha256", None)  # an attacker could compute it
    change(metadata)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.mark.parametrize("case", INVALID_METADATA)
def test_a_corpus_with_invalid_metadata_is_refused(corpus, tmp_path, case):
    folder = copy_and_change(corpus, tmp_path, INVALID_METADATA[case])
    assert f"{folder / 'metadata.json'} is damaged" in error_line(TextDataset, folder / "train", 4)


@pytest.mark.parametrize("case", INVALID_SOURCES)
def test_verify_refuses_an_invalid_source(corpus, tmp_path, case):
    folder = copy_and_change(corpus, tmp_path, INVALID_SOURCES[case])
    assert f"{folder / 'metadata.json'} is damaged" in error_line(verify, folder)


def test_metadata_that_is_a_pipe_or_not_an_object_is_refused(corpus, tmp_path):
    folder = copy_and_change(corpus, tmp_path, lambda m: None)
    assert len(TextDataset(folder / "train", 4)) > 0
    for number, text in enumerate(["[" * 100_000, '{"splits":' * 100_000, "\ud800", "5"]):
        (folder / "metadata.json").write_text(text, errors="surrogatepass")
        message = error_line(TextDataset, folder / "train", 4)
        assert f"{folder / 'metadata.json'} is damaged" in message, number
    (folder / "metadata.json").unlink()
    os.mkfifo(folder / "metadata.json")  # no process writes to the pipe
    assert f"{folder / 'metadata.json'} is damaged" in error_line(TextDataset, folder / "train", 4)


# memory


def write_tar_bomb(folder, kind) -> Path:
    """Write a .tar.gz of two megabytes with two gigabytes of zeros."""
    info = tarfile.TarInfo("a.txt")
    info.size = 1 << 31
    info.type = kind
    zeros = gzip.compress(bytes(1 << 24), 9)
    path = folder / f"{kind.decode()}.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf()) + zeros * 128)
    return path


def write_checkpoint_bomb(weights, folder) -> Path:
    """Write a small checkpoint whose pickle promises two gigabytes of weights."""
    checkpoint = make_checkpoint(weights, model={"a": torch.zeros(1 << 20)})
    torch.save(checkpoint, folder / "small.pt")
    members = read_zip(folder / "small.pt")
    name = next(name for name in members if name.endswith("data.pkl"))
    size = struct.pack("<i", 1 << 20)
    false_size = struct.pack("<i", 1 << 29)
    members[name] = members[name].replace(size, false_size)
    (folder / "best.pt").write_bytes(make_zip(members))
    return folder / "best.pt"


def check_bombs(folder: Path) -> None:
    """Assert that files that expand to gigabytes are refused in half a gigabyte of memory."""
    weights = folder / "weights"
    GPT(GPTConfig(**MODEL_SHAPE)).save_pretrained(weights)
    config = json.loads((weights / "config.json").read_text())
    huge_shape = MODEL_SHAPE | {"n_embd": 1 << 20, "vocab_size": 1 << 20}
    huge_tensor = torch.zeros(1).expand(1 << 20, 1 << 20)
    huge_weights = {name: huge_tensor for name in GPT.from_pretrained(weights).state_dict()}
    cases = []
    for kind in (b"0", b"x"):
        cases.append((unpack, write_tar_bomb(folder, kind), folder, {".*": "out.raw"}))
    cases.append((load_checkpoint, write_checkpoint_bomb(weights, folder)))
    checkpoint = make_checkpoint(weights, model_config=huge_shape)
    torch.save(checkpoint, folder / "huge.pt")
    cases.append((load_checkpoint, folder / "huge.pt"))
    torch.save(checkpoint | {"model": huge_weights}, folder / "expanded.pt")
    cases.append((load_checkpoint, folder / "expanded.pt"))
    for name in ("n_embd", "vocab_size"):
        shutil.copytree(weights, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | {name: 1 << 20}))
        cases.append((GPT.from_pretrained, folder / name))
    for name in ("a bomb of lists", "a bomb of merges"):
        (folder / name).mkdir()
        (folder / name / "metadata.yaml").write_text(INVALID_YAML[name])
        cases.append((find, str(folder / name)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
    with pytest.raises(MemoryError):
        np.ones(1 << 28)
    for function, *arguments in cases:
        start = time.perf_counter()
        message = error_line(function, *arguments)
        print(f"{time.perf_counter() - start:.2f} s {message}")
    assert not (folder / "out.raw").exists()
    assert not list(folder.glob("*.tmp"))


def test_memory_is_bounded_for_files_that_expand_to_gigabytes(tmp_path):
    if sys.platform != "linux":
        pytest.skip("the measurement reads /proc")
    code = (
        "import pathlib, sys, test_strangers\n"
        "test_strangers.check_bombs(pathlib.Path(sys.argv[1]))\n"
    )
    python_path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    env = os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
