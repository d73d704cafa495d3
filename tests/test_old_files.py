"""Corpora and runs that commit 58944c1 wrote (fixtures/58944c1) are still readable."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, losses, run_script

from corpus.tokenizer import get_tokenizer
from corpus.verify import verify
from dataset import DocumentDataset, TextDataset
from training.checkpoint import load_checkpoint

TOKENIZER = get_tokenizer("bytes")
END_OF_TEXT = "<|endoftext|>"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the old corpora and runs, which is the current folder."""
    folder = tmp_path / "old"
    shutil.copytree(ROOT / "tests" / "fixtures" / "58944c1", folder)
    monkeypatch.chdir(folder)
    return folder


def decode(tensors) -> str:
    return TOKENIZER.decode(torch.cat(list(tensors)).tolist())


@pytest.mark.parametrize("corpus", ["running", "documents"])
def test_an_old_corpus_is_verified(folder, capsys, corpus):
    verify(folder / "data" / corpus)
    assert "compared with the source: the same" in capsys.readouterr().out


def test_an_old_running_text_decodes_to_its_source(folder):
    text = (folder / "running.txt").read_text()
    for split, expected in (("train", text[:3933]), ("val", text[3933:])):
        data = TextDataset(folder / "data" / "running" / split, 16, stride=16)
        x, y = data[0]
        assert (x.shape, y.shape) == ((16,), (16,)) and torch.equal(x[1:], y[:-1])
        rows = [data[i][0] for i in range(len(data))]
        assert decode(rows) == expected[: 16 * len(data)]
        assert len(data) == (len(expected) - 1) // 16


def test_old_documents_decode_to_their_source(folder):
    lines = (folder / "documents.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    found = []
    for split in ("train", "val"):
        documents = DocumentDataset(folder / "data" / "documents" / split)
        found += [decode([documents[i]]) for i in range(len(documents))]
    assert sorted(found) == sorted(text + END_OF_TEXT for text in texts)


@pytest.mark.parametrize(
    ("run", "text"),
    [("running", "one for" + " for" * 10), ("documents", "one for" + " " * 40)],
    ids=["running", "documents"],
)
def test_an_old_run_generates_the_same_text(folder, run, text):
    """sample.py of the old commit printed the expected texts."""
    flags = ["--prompt", "one for", "--temperature", 0, "--max_new_tokens", 40, "--device", "cpu"]
    result = run_script("sample.py", "--run", f"out/{run}", *flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{text}\n\n"


def test_an_old_run_resumes_with_the_same_losses(folder):
    """The old commit resumed the run with the expected loss (see the fixture's README.md)."""
    result = run_script("train_gpt2.py", "--resume", "out/running", cwd=folder)
    assert result.returncode == 0, result.stderr
    found = losses(folder / "out" / "running", "val_loss")
    assert list(found) == [40, 80, 120]
    assert found[120] == pytest.approx(1.371833124292006, rel=1e-3)


def test_an_old_run_on_documents_resumes_with_a_new_best(folder):
    """The old commit resumed it to 2.4896, without the first tokens of documents."""
    checkpoint = load_checkpoint(folder / "out" / "documents" / "last.pt")
    result = run_script("train_gpt2.py", "--resume", "out/documents", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "the best validation starts anew" in result.stdout
    found = losses(folder / "out" / "documents", "val_loss")
    assert list(found) == [40, 80, 120]
    assert found[120] == pytest.approx(2.4896, abs=0.1)
    resumed = load_checkpoint(folder / "out" / "documents" / "last.pt")
    assert resumed["best"]["step"] > checkpoint["step"]
    assert resumed["best"]["val_loss"] == min(found[80], found[120])
