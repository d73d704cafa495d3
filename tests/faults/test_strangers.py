"""What others made: archives, checkpoints, weights, vocabularies, descriptions, prepared corpora.

It is read right, or refused in one line that names the file (ValueError or OSError, which
common.run prints); nothing is written outside, nothing executed, and memory stays bounded. More of
it where its reader is tested: links and devices in archives (test_corpora.py), other models
(test_pretrained.py), .tiktoken files (test_tokenizer.py).
"""

import copy
import gzip
import io
import json
import os
import pickle
import random
import resource
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
from training.checkpoint import load_checkpoint, load_model

SHAPE = {"vocab_size": 257, "n_positions": 16, "n_layer": 1, "n_head": 2, "n_embd": 8}


def refusal(function, *arguments) -> str:
    """The one line by which function(*arguments) refuses."""
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def tree(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def mutants(data: bytes, count: int, letters=bytes(range(256)), stop=None):
    """`data` with one to four bytes of it changed, before `stop`; the same in every run."""
    rng = random.Random(0)
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(stop or len(data))] = rng.choice(letters)
        yield bytes(mutant)


# archives


def zip_of(members: dict, method=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(info := zipfile.ZipInfo(name), text, method)
            info.external_attr = 0  # as torch writes it
    return file.getvalue()


@pytest.mark.parametrize("make", [zip_of, make_tar])
def test_names_in_an_archive_are_never_paths(tmp_path, make):
    """Even where all members are wanted."""
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
    assert tree(tmp_path) == ["in", "in/archive", "in/out.raw"]
    assert (tmp_path / "in" / "out.raw").read_text() == "x" * len(names)
    assert not Path("/tmp/evil-of-test-strangers").exists()


def with_flags(data: bytes, at: int, value: int) -> bytes:
    """A zip of one member with a byte changed in both of its headers."""
    data, central = bytearray(data), data.index(b"PK\1\2")
    data[at] = data[central + at + 2] = value
    return bytes(data)


ZIP, TAR = zip_of({"a.txt": "hello " * 50}), make_tar({"a.txt": "hello " * 100})
ARCHIVES = {
    "empty": b"",
    "no archive": b"<html>",
    "cut zip": ZIP[:-10],
    "cut tar": gzip.compress(gzip.decompress(TAR)[:700]),
    "cut gz": TAR[: len(TAR) // 2],
    "gz of something": gzip.compress(b"hello" * 500),
    "encrypted": with_flags(ZIP, 6, 1),
    "unknown method": with_flags(ZIP, 8, 99),
    "other data": ZIP.replace(ZIP[36:40], b"\xff" * 4, 1),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_damaged_archive_is_refused(tmp_path, case):
    (tmp_path / "archive").write_bytes(ARCHIVES[case])
    message = refusal(unpack, tmp_path / "archive", tmp_path, {r"a\.txt": "out.raw"})
    assert message.startswith(f"{tmp_path / 'archive'} ")
    assert tree(tmp_path) == ["archive"]


@pytest.mark.parametrize("data", [ZIP, TAR, zip_of({"a.txt": "hello " * 50}, zipfile.ZIP_STORED)])
def test_an_archive_with_other_bytes(tmp_path, data):
    archive = tmp_path / "archive"
    for mutant in mutants(data, 300):
        archive.write_bytes(mutant)
        try:
            unpack(archive, tmp_path, {r"a\.txt": "out.raw"})
        except ValueError as error:
            assert str(archive) in str(error) and "\n" not in str(error)
        assert set(tree(tmp_path)) <= {"archive", "out.raw"}


# weights and checkpoints


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    GPT(GPTConfig(**SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(weights, tmp_path):
    """model(header=..., config=...): of a folder with these changes in its files."""
    data = (weights / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    told = json.loads((weights / "config.json").read_text())

    def model(header=header, config=told, body=data[8 + length :], length=None, data=None):
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        start = struct.pack("<Q", len(header) if length is None else length)
        (tmp_path / "model.safetensors").write_bytes(data or start + header + body)
        config = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(config)
        return GPT.from_pretrained(tmp_path)

    model.data, model.header, model.config = data, header, told
    return model


WPE = "transformer.wpe.weight"
TENSORS = {
    "huge": {"shape": [1 << 62, 1 << 62]},
    "no elements": {"shape": [0, 1 << 62], "data_offsets": [0, 0]},
    "negative": {"shape": [-16, -8]},
    "no number": {"shape": [16.0, 8]},
    "overlapping": {"data_offsets": [0, 512]},
    "outside": {"data_offsets": [1 << 40, (1 << 40) + 512]},
    "before": {"data_offsets": [-512, 0]},
    "backwards": {"data_offsets": [512, 0]},
    "other size": {"dtype": "F64"},
    "four bits": {"dtype": "F4"},
    "unknown": {"dtype": "XX"},
}
HEADERS = {
    "not JSON": b"hello",
    "not UTF-8": b'{"\xff": 1}',
    "a list": b"[1, 2]",
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "empty": b"{}",
}


@pytest.mark.parametrize("case", [*TENSORS, *HEADERS])
def test_a_tensor_that_is_none(model, tmp_path, case):
    header = copy.deepcopy(model.header)
    header[WPE] |= TENSORS.get(case, {})
    message = refusal(model, HEADERS.get(case, header))
    assert message.startswith(f"{tmp_path / 'model.safetensors'} ")


def test_a_header_of_any_length_or_with_a_name_twice(model):
    for length in (0, 90_000_000, 1 << 63, (1 << 64) - 1):
        assert "model.safetensors is damaged" in refusal(lambda length=length: model(length=length))
    for shape, right in ([16, 8], True), ([8, 16], False), ([1 << 40, 8], False):
        twice = (
            json.dumps(model.header)[:-1]
            + ","
            + json.dumps({WPE: model.header[WPE] | {"shape": shape}})[1:]
        )
        if right:
            assert model(twice.encode()).config.n_positions == 16
        else:
            assert "model.safetensors" in refusal(model, twice.encode())


def test_weights_with_another_header(model):
    stop = 8 + struct.unpack("<Q", model.data[:8])[0]
    for data in mutants(model.data, 150, b'[]{}",:-0123456789eE\0\xff', stop):
        assert "model.safetensors" in refusal(lambda data=data: model(data=data))


CONFIGS = {
    "deep": "[" * 100_000,
    "no object": "[[1, 2]]",
    "text": '"abc"',
    "not UTF-8": "\udcff",
    **{f"huge {name}": {name: 1 << 40} for name in SHAPE},
    **{f"negative {name}": {name: -8} for name in SHAPE},
    "many layers": {"n_layer": 1 << 20},
    "true": {"n_embd": True},
    "NaN": {"layer_norm_epsilon": float("nan")},
    "infinite": {"n_embd": float("inf")},
    "n_inner beside no n_embd": {"n_inner": 5, "n_embd": {"a": 1}},
    "a name of ten lines": {"model_type": "gpt\n" * 10},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_shape_that_is_none(model, tmp_path, case):
    changed = CONFIGS[case]
    changed = model.config | changed if isinstance(changed, dict) else changed
    if case == "not UTF-8":
        (tmp_path / "config.json").write_bytes(b'{"n_embd": "\xff"}')
        message = refusal(GPT.from_pretrained, tmp_path)
    else:
        message = refusal(lambda: model(config=changed))
    assert str(tmp_path) in message and len(message) < 300


class Evil:
    """A pickle of it makes the folder `evil` when it is loaded as pickles are."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "evil"),)


def checkpoint(weights, **changed) -> dict:
    model = GPT.from_pretrained(weights)
    metadata = {"vocab_size": 257, "tokenizer": {"name": "bytes"}, "splits": {}}
    best = {"step": 1, "val_loss": 1.0}
    return {"step": 1, "best": best, "model": model.state_dict(), "model_config": dict(SHAPE),
            "metadata": metadata, "config": {}} | changed  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_checkpoint_is_executed(weights, tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path)))
    (tmp_path / "evil").rmdir()  # it works
    evil = checkpoint(weights, step=Evil(tmp_path))
    for name, legacy in ("new.pt", False), ("old.pt", True):
        torch.save(evil, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil(tmp_path)))
    for path in sorted(tmp_path.glob("*.pt")):
        assert f"{path} is not a readable checkpoint" in refusal(load_checkpoint, path)
    assert tree(tmp_path) == ["new.pt", "old.pt", "plain.pt"]


CHECKPOINTS = {
    "other weights": {"model": {}},
    "no weights": {"model": dict.fromkeys(("a", "b"), "x")},
    "a tensor of weights": {"model": torch.zeros(3)},
    "no shape": {"model_config": {}},
    "another shape": {"model_config": SHAPE | {"n_layer": 2}},
    "a huge shape": {"model_config": SHAPE | {"n_embd": 1 << 40}},
    "no number": {"model_config": SHAPE | {"n_embd": "many"}},
    "an unknown constant": {"model_config": SHAPE | {"rotary": 1}},
    "more ids than rows": {"metadata": {"vocab_size": 258}},
    "no ids": {"metadata": {"vocab_size": "many"}},
    "no metadata": {"metadata": None},
    "no tokenizer": {"metadata": {"vocab_size": 257, "splits": {}}},
    "no splits": {"metadata": {"vocab_size": 257, "tokenizer": {"name": "bytes"}}},
    "no step": {"step": "many"},
    "nothing best": {"best": {}},
    "no constants": {"config": None},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_is_none(weights, tmp_path, case):
    path = tmp_path / "best.pt"
    torch.save(checkpoint(weights), path)
    assert load_model(load_checkpoint(path)).config.n_embd == 8
    torch.save(checkpoint(weights, **CHECKPOINTS[case]), path)
    assert f"{path} is not a checkpoint of this version of train_gpt2.py" in refusal(
        load_checkpoint, path
    )


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_with_another_pickle(weights, tmp_path):
    """Whatever torch stumbles on, and with the checksum that zip asks for."""
    path, good = tmp_path / "best.pt", tmp_path / "good.pt"
    torch.save(checkpoint(weights), good)
    with zipfile.ZipFile(good) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    for mutant in mutants(parts[name], 300):
        path.write_bytes(zip_of(parts | {name: mutant}, zipfile.ZIP_STORED))
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


# vocabularies


@pytest.fixture(scope="module")
def vocabulary():
    pytest.importorskip("tokenizers", reason="tokenizers is in requirements-dev.txt")
    from training.huggingface import tokenizer_json

    return json.loads(tokenizer_json(get_tokenizer("bytes")))


def tokenizer_of(path, told):
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    tokenizer = HuggingFaceTokenizer("strange", path)
    tokenizer.encode("hello")
    return tokenizer


VOCABULARIES = {
    "far": lambda v: v["model"]["vocab"].update(zz=4_000_000_000),
    "negative": lambda v: v["model"]["vocab"].update(zz=-1),
    "empty": lambda v: v.update(added_tokens=[], model=v["model"] | {"vocab": {}, "merges": []}),
    "merges of nothing": lambda v: v["model"].update(merges=[["never", "there"]]),
    "no expression": lambda v: v["pre_tokenizer"].update(type="Split", pattern={"Regex": "("}),
    "unknown letter": lambda v: (v["model"].update(unk_token="nope"), v["model"]["vocab"].pop("h")),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_a_vocabulary_that_is_none(vocabulary, tmp_path, case):
    told = copy.deepcopy(vocabulary)
    assert tokenizer_of(tmp_path / "a.json", told).vocab_size == 257
    VOCABULARIES[case](told)
    message = refusal(tokenizer_of, tmp_path / "a.json", told)
    assert str(tmp_path / "a.json") in message or message.startswith("strange cannot encode")


def test_a_vocabulary_with_other_bytes(vocabulary, tmp_path):
    refusal(tokenizer_of, tmp_path / "a.json", "[" * 100_000)
    for mutant in mutants(json.dumps(vocabulary).encode(), 200, b'[]{}",:-0123456789en', 900):
        try:
            assert tokenizer_of(tmp_path / "a.json", mutant.decode()).vocab_size <= 2 * 257 + 1
        except ValueError as error:
            assert "a.json" in str(error) or "strange" in str(error)


# described folders

TOLD = {"name": "n", "data_content": "text", "corpuses": ["a"]}


@pytest.fixture
def pile(tmp_path):
    """pile({...}): the sources of a folder with that description, beside one that is not of it."""
    for name in ("pile/a/a.jsonl", "outside/a/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "pile" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "pile" / "loop").symlink_to(tmp_path / "pile" / "loop")

    def pile(told, suffix="json"):
        path = tmp_path / "pile" / f"metadata.{suffix}"
        path.write_bytes(told if isinstance(told, bytes) else json.dumps(told).encode())
        return find(str(tmp_path / "pile"))

    pile.folder = tmp_path / "pile"
    return pile


PLACES = ["/", "..", "../outside", "link", "link/a", "{outside}"]
DESCRIPTIONS = {
    "NaN": {"corpuses": [float("nan")]},
    "an object": {"corpuses": {"a": 1}},
    "a number": {"content_field": 5},
    "no text": {"data_content": ["text"]},
    "ten lines": {"data_content": "text\n" * 10},
    "a huge number": {"dataset_path": 10**400},
    "NUL": {"corpuses": ["\0"]},
    "half a character": {"corpuses": ["\ud800"]},
    "a long name": {"dataset_path": "a" * 5000},
    "a circle": {"corpuses": ["loop"]},
}


def test_a_description_stays_in_its_folder(pile, tmp_path):
    assert [source.path for source in pile(TOLD)] == [str(pile.folder / "a" / "a.jsonl")]
    assert pile(TOLD | {"dataset_path": str(pile.folder)}) == pile(TOLD)
    assert pile(TOLD | {"dataset_path": "/moved/away"}) == pile(TOLD)
    for place in PLACES:
        place = place.format(outside=tmp_path / "outside")
        for changed in (
            {"dataset_path": place},
            {"corpus_data_dir_parent": place},
            {"corpuses": [place]},
            {"corpuses": [place], "corpus_separation_strategy": "configs"},
        ):
            assert str(pile.folder) in refusal(pile, TOLD | changed), changed


def test_a_file_of_a_described_folder_is_no_link_out_of_it(pile):
    link = pile.folder / "a" / "b.jsonl"
    (pile.folder / ".git").mkdir()
    (pile.folder / ".git" / "object").write_text('{"text": "b"}\n')
    link.symlink_to("../.git/object")  # as git-annex keeps its files
    assert [Path(source.path).name for source in pile(TOLD)] == ["a.jsonl", "b.jsonl"]
    for target in "../../outside/a/a.jsonl", "../../outside/a":
        link.unlink()
        link.symlink_to(target)
        for told in TOLD, TOLD | {"corpuses": []}:
            assert f" is a link out of {pile.folder}: " in refusal(pile, told)


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_that_is_none(pile, case):
    message = refusal(pile, TOLD | DESCRIPTIONS[case])
    assert str(pile.folder) in message


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij")
)
YAML = {
    "a bomb of lists": f"{BOMB}name: n\ndata_content: *j\n",
    "a bomb of merges": BOMB.replace("&a [x, x, x]", "&a {k: v}").replace("[*", "{<<: [*").replace(
        "]\n", "]}\n"
    ),
    "Python": "name: !!python/object/apply:os.mkdir [evil]\ndata_content: text\n",
    "a Python name": "name: !!python/name:os.system\ndata_content: text\n",
    "deep": "[" * 100_000,
    "deep and closed": "name: " + "[" * 5000 + "]" * 5000,
    "two documents": "---\na: 1\n---\nb: 2",
    **{f"no {tag}": f"name: !!{tag} '?'\n" for tag in ("bool", "int", "float", "timestamp")},
    "a day that never was": "name: 2020-99-99",
    "before the first year": "name: 0001-01-01t00:00:00+23:00\ndata_content: 1",
    "NUL": "name: \0",
}  # fmt: skip


@pytest.mark.parametrize("case", YAML)
def test_a_description_in_yaml(pile, monkeypatch, case):
    pytest.importorskip("yaml", reason="pyyaml is in requirements-dev.txt")
    monkeypatch.chdir(pile.folder.parent)
    before = tree(pile.folder.parent)
    assert "metadata.yaml" in refusal(pile, YAML[case].encode(), "yaml")
    assert tree(pile.folder.parent) == sorted([*before, "pile/metadata.yaml"])


def test_a_description_with_other_letters(pile):
    yaml = pytest.importorskip("yaml", reason="pyyaml is in requirements-dev.txt")
    letters = b'[]{}",:-0129eE!&*?|>#%\n \xff'
    for suffix, data in ("json", json.dumps(TOLD).encode()), ("yaml", yaml.dump(TOLD).encode()):
        for mutant in mutants(data, 300, letters):
            try:
                pile(mutant, suffix)
            except (ValueError, OSError) as error:
                assert str(pile.folder) in str(error)
        (pile.folder / f"metadata.{suffix}").unlink()


def test_describing_writes_through_no_link(tmp_path):
    """Which a stranger's folder may have in the place of a file that is about to be written."""
    (tmp_path / "pile").mkdir()
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "pile" / "metadata.json.tmp").symlink_to(tmp_path / "mine")
    answers = dict.fromkeys(("name", "download_source", "description", "content_field"), "x")
    describe(tmp_path / "pile", answers | {"corpuses": ""})
    assert (tmp_path / "mine").read_text() == "keep"
    assert tree(tmp_path) == ["mine", "pile", "pile/metadata.json"]


# prepared corpora


def test_preparing_in_a_strangers_folder_goes_through_no_link(tmp_path):
    """A pipe isn't waited for either."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text("keep")
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / ".work").symlink_to(tmp_path / "home")
    assert "c/.work is a link" in refusal(make_corpus, corpus, ["some text " * 9])
    (corpus / ".work").unlink()
    (corpus / ".work").mkdir()
    (corpus / ".work" / "lock").symlink_to(tmp_path / "home" / "mine")
    for name in ("train.bin.tmp", "val.bin", "skipped.txt"):
        (corpus / name).symlink_to(tmp_path / "home" / "mine")
    os.mkfifo(corpus / "metadata.json")
    make_corpus(corpus, ["some text " * 9])
    assert not (corpus / "val.bin").is_symlink()
    assert (tmp_path / "home" / "mine").read_text() == "keep"
    assert tree(tmp_path / "home") == ["mine"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "c"
    make_corpus(folder, [f"document {i}" for i in range(50)], documents=True)
    return folder


def split(**changed):
    return lambda m: m["splits"]["train"].update(changed)


def file(**changed):
    return lambda m: m["splits"]["train"]["files"][0].update(changed)


def vocabulary_of(name):
    return lambda m: m["tokenizer"].update(name=name)


def source(**changed):
    return lambda m: m["source"]["files"][0].update(changed)


METADATA = {
    **{f"a file at {n!r}": file(name=n) for n in ("/etc/passwd", "..", "../c/x", "", "a/b")},
    **{f"{n} tokens": file(tokens=n) for n in (-1, 1.5, float("nan"), True, None, "5")},
    **{f"{n} bytes": split(bytes=n) for n in (0, float("inf"), [5])},
    **{f"{n} documents": split(documents=n) for n in (-1, "many")},
    **{f"files {n}": split(files=n) for n in ([], {}, 5, [[]], "abc")},
    **{f"splits {n}": lambda m, n=n: m.update(splits=n) for n in ([], 5, {"train": 5})},
    **{f"{n} ids": lambda m, n=n: m.update(vocab_size=n) for n in (0, -1, 1.5, "many", None)},
    **{f"ends by {n}": lambda m, n=n: m.update(eot_token=n) for n in (-1, 257, 1.0, [256])},
    **{f"vocabulary {n!r}": vocabulary_of(n) for n in ("/x.json", "../x.json", 5)},
    "no tokenizer": lambda m: m.update(tokenizer=[]),
    "no answer": lambda m: m.update(eot_per_document="no"),
    "another type": lambda m: m.update(dtype="object"),
    "another version": lambda m: m.update(format_version=[1]),
}  # fmt: skip
SOURCES = {
    "no path": source(path=5),
    "an unknown format": source(format="pickle"),
    "an unknown cut": source(documents="page"),
    "a negative number": source(number=-1),
    "no field": source(field=["text"]),
    "a list": lambda m: m["source"].update(files=[[]]),
}


def damaged(corpus, tmp_path, change) -> Path:
    """A copy of `corpus` with a change in metadata.json."""
    folder = tmp_path / "c"
    folder.mkdir()
    for path in corpus.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata.pop("sha256", None)  # a stranger would know how to make it
    change(metadata)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.mark.parametrize("case", METADATA)
def test_a_corpus_whose_metadata_is_none(corpus, tmp_path, case):
    folder = damaged(corpus, tmp_path, METADATA[case])
    assert f"{folder / 'metadata.json'} is damaged" in refusal(TextDataset, folder / "train", 4)


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_is_none(corpus, tmp_path, case):
    folder = damaged(corpus, tmp_path, SOURCES[case])
    assert f"{folder / 'metadata.json'} is damaged" in refusal(verify, folder)


def test_metadata_that_is_no_file_or_too_deep(corpus, tmp_path):
    folder = damaged(corpus, tmp_path, lambda m: None)
    assert len(TextDataset(folder / "train", 4)) > 0
    for number, text in enumerate(["[" * 100_000, '{"splits":' * 100_000, "\ud800", "5"]):
        (folder / "metadata.json").write_text(text, errors="surrogatepass")
        message = refusal(TextDataset, folder / "train", 4)
        assert f"{folder / 'metadata.json'} is damaged" in message, number
    (folder / "metadata.json").unlink()
    os.mkfifo(folder / "metadata.json")  # nobody will write to it
    assert f"{folder / 'metadata.json'} is damaged" in refusal(TextDataset, folder / "train", 4)


# memory


def tar_bomb(folder, kind) -> Path:
    """Two gigabytes of zeros in two megabytes."""
    info = tarfile.TarInfo("a.txt")
    info.size, info.type = 1 << 31, kind
    zeros = gzip.compress(bytes(1 << 24), 9)
    path = folder / f"{kind.decode()}.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf()) + zeros * 128)
    return path


def long_records(weights, folder) -> Path:
    """A checkpoint whose weights are two gigabytes of packed zeros, and lie about their number."""
    torch.save(checkpoint(weights, model={"a": torch.zeros(1 << 20)}), folder / "small.pt")
    with zipfile.ZipFile(folder / "small.pt") as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    parts[pickled] = parts[pickled].replace(struct.pack("<i", 1 << 20), struct.pack("<i", 1 << 29))
    (folder / "best.pt").write_bytes(zip_of(parts))
    return folder / "best.pt"


def bombs(folder: Path) -> None:
    """Refuses all that would take gigabytes, in a process that has half a gigabyte to spare."""
    weights = folder / "weights"
    GPT(GPTConfig(**SHAPE)).save_pretrained(weights)
    told = json.loads((weights / "config.json").read_text())
    stretched = torch.zeros(1).expand(1 << 20, 1 << 20)
    huge = SHAPE | {"n_embd": 1 << 20, "vocab_size": 1 << 20}
    cases = [(unpack, tar_bomb(folder, kind), folder, {".*": "out.raw"}) for kind in (b"0", b"x")]
    cases.append((load_checkpoint, long_records(weights, folder)))
    torch.save(checkpoint(weights, model_config=huge), folder / "huge.pt")
    all_huge = {name: stretched for name in GPT.from_pretrained(weights).state_dict()}
    torch.save(checkpoint(weights, model_config=huge, model=all_huge), folder / "stretched.pt")
    cases += [(load_checkpoint, folder / name) for name in ("huge.pt", "stretched.pt")]
    for i, changed in enumerate([{"n_embd": 1 << 20}, {"vocab_size": 1 << 20}]):
        (folder / f"{i}").mkdir()
        (folder / f"{i}" / "config.json").write_text(json.dumps(told | changed))
        (folder / f"{i}" / "model.safetensors").write_bytes(
            (weights / "model.safetensors").read_bytes()
        )
        cases.append((GPT.from_pretrained, folder / f"{i}"))
    for name in ("a bomb of lists", "a bomb of merges"):
        (folder / name).mkdir()
        (folder / name / "metadata.yaml").write_text(YAML[name])
        cases.append((find, str(folder / name)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
    with pytest.raises(MemoryError):
        np.ones(1 << 28)
    for function, *arguments in cases:
        began = time.perf_counter()
        message = refusal(function, *arguments)
        print(f"{time.perf_counter() - began:.2f} s {message}")
    assert not (folder / "out.raw").exists() and not list(folder.glob("*.tmp"))


def test_memory_is_bounded(tmp_path):
    if sys.platform != "linux":
        pytest.skip("measures by /proc")
    code = "import pathlib, sys, test_strangers; test_strangers.bombs(pathlib.Path(sys.argv[1]))"
    here = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    env = os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
