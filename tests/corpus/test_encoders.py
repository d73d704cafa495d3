"""The fast encoder gives the ids of tiktoken, or tiktoken encodes the whole corpus."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_tasks import ADVERSARIAL_TEXTS, corpus_files

from bench.encoders import compare_documents, compare_unicode
from corpus import encoders, pipeline
from corpus.encoders import (
    FAST,
    FAST_VERSION,
    REFERENCE,
    EncoderFailed,
    EncodersDiffer,
    choose_encoder,
    open_encoder,
)
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.sources import Source
from corpus.tokenizer import CannotEncode, get_tokenizer

pytest.importorskip(FAST)
TEXT = "To be, or not to be: that is the question. " * 400  # more than is checked of a block


@pytest.fixture(autouse=True)
def always_fast(monkeypatch, gpt2_tokenizer):
    """Let the smallest corpus use the fast encoder."""
    monkeypatch.setattr(encoders, "SMALLEST_CORPUS", 0)
    monkeypatch.setattr(pipeline, "TASK_BYTES", (2000, 2000))
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)  # workers are forks of this process


class Liar:
    """The fast package, but with a wrong id where a text holds a word."""

    def __init__(self, word: str):
        self.word = word
        self.native = encoders._load_native("gpt2", 50256)

    def encode_batch_flat(self, texts, split_special_tokens):
        options = {"split_special_tokens": split_special_tokens}
        ids, offsets = self.native.encode_batch_flat(texts, **options)
        if self.word in texts[0]:
            before = texts[0].partition(self.word)[0]
            num_bytes = len(self.native.encode_batch_flat([before], **options)[0])
            lie = np.frombuffer(ids, "<u4").copy()
            lie[num_bytes // 4] += 1
            ids = lie.tobytes()
        return ids, offsets


def let_lie(monkeypatch, word: str) -> None:
    liar = Liar(word)
    monkeypatch.setattr(encoders, "_load_native", lambda *arguments: liar)


def write_documents(path, count=150, last="the end"):
    documents = [f"document {i:010} " for i in range(count - 1)] + [last]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return Source(str(path), "jsonl")


def prepare(folder, source, workers=1, engine="processes", **settings):
    corpus = Corpus("my", {}, [source])
    with open_engine(engine, workers) as run_tasks:
        return pipeline.prepare(corpus, get_tokenizer("gpt2"), folder, run_tasks, **settings)


# the same ids


@pytest.mark.parametrize("text", ADVERSARIAL_TEXTS, ids=lambda text: ascii(text[:9]))
def test_adversarial_texts_get_the_ids_of_tiktoken(text, gpt2_tokenizer):
    for texts in [["", text, ""]] if len(text) > 100_000 else [[text], [text, "next", text]]:
        encoder = open_encoder(FAST, gpt2_tokenizer)
        encoder.num_calls = 1  # the encoder does not check, so that this test does
        assert np.array_equal(
            encoder.encode_documents(texts), gpt2_tokenizer.encode_documents(texts)
        )
    assert np.array_equal(encoder.encode(text), gpt2_tokenizer.encode(text))


def test_random_documents_get_the_ids_of_tiktoken():
    assert "same ids" in compare_documents(5000, seed=random.randrange(1_000_000))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_code_point_gets_the_ids_of_tiktoken():
    assert "same ids" in compare_unicode()


def test_white_space_that_tiktoken_cannot_encode_is_the_same_error(gpt2_tokenizer):
    text = "a" + " " * 1_000_000 + "\n" * 20 + "b"
    messages = set()
    for encoder in gpt2_tokenizer, open_encoder(FAST, gpt2_tokenizer):
        for encode in encoder.encode, lambda text, e=encoder: e.encode_documents(["x", text]):
            with pytest.raises(CannotEncode) as caught:
                encode(text)
            messages.add(str(caught.value))
    assert len(messages) == 1


# which encoder


def test_one_line_says_which_encoder_is_used_and_why(gpt2_tokenizer, monkeypatch):
    name, line = choose_encoder("auto", gpt2_tokenizer, 1)
    assert (name, line) == (FAST, f"encoder: fastokens {FAST_VERSION} (same ids as tiktoken, "
                                  "checked by samples)")  # fmt: skip
    assert choose_encoder("auto", get_tokenizer("bytes"), 1) == (REFERENCE, "")
    name, line = choose_encoder("tiktoken", gpt2_tokenizer, 1)
    assert (name, line) == (REFERENCE, "encoder: tiktoken (--encoder tiktoken)")
    monkeypatch.setattr(encoders, "SMALLEST_CORPUS", 2)
    name, line = choose_encoder("auto", gpt2_tokenizer, 1)
    assert (name, line) == (REFERENCE, "encoder: tiktoken (the corpus is small)")
    for version, reason in ("", "is not installed"), ("9.9", "9.9 is not compared"):
        monkeypatch.setattr(encoders, "_installed_version", lambda version=version: version)
        name, line = choose_encoder("auto", gpt2_tokenizer, 2)
        assert name == REFERENCE and reason in line and f"fastokens=={FAST_VERSION}" in line


@pytest.mark.parametrize("format", ["documents", "running text"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_on_disk_do_not_depend_on_the_encoder(tmp_path, format, workers, capsys):
    source = write_documents(tmp_path / "my.jsonl", last="<|endoftext|> \ud800\0")
    if format == "running text":
        (tmp_path / "my.txt").write_text("One for sorrow, two for mirth.\n \n" * 300)
        source = Source(str(tmp_path / "my.txt"), "text")
    found = []
    for encoder in "tiktoken", "auto":
        prepare(tmp_path / "data" / "my", source, workers, encoder=encoder)
        found.append(corpus_files(tmp_path / "data" / "my"))
        (tmp_path / "data" / "my").rename(tmp_path / encoder)
    assert found[0] == found[1]
    assert "encoder: fastokens" in capsys.readouterr().out


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path, capsys):
    pytest.importorskip("ray")
    source = write_documents(tmp_path / "my.jsonl")
    prepare(tmp_path / "a", source, encoder="tiktoken")
    prepare(tmp_path / "b", source, workers=2, engine="ray")
    assert "encoder: fastokens" in capsys.readouterr().out
    assert (tmp_path / "a" / "train.bin").read_bytes() == (tmp_path / "b/train.bin").read_bytes()


# differences


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("format", ["documents", "running text"])
def test_after_one_difference_tiktoken_encodes_the_whole_corpus(
    tmp_path, format, workers, monkeypatch, capsys
):
    source = write_documents(tmp_path / "my.jsonl", last="a lie")
    place = "my.jsonl, line 150"
    if format == "running text":
        (tmp_path / "my.txt").write_text("One for joy.\n" * 200 + "a lie\n" + "two\n" * 300)
        source = Source(str(tmp_path / "my.txt"), "text")
        place = "my.txt, line 201"
    prepare(tmp_path / "expected" / "my", source, encoder="tiktoken")
    capsys.readouterr()
    let_lie(monkeypatch, "a lie")
    encoder_of_tasks = []
    publish = pipeline.publish

    def spy(tasks_dir, *arguments):
        for path in tasks_dir.glob("0*.json"):
            encoder_of_tasks.append(json.loads(path.read_bytes())["encoder"])
        publish(tasks_dir, *arguments)

    monkeypatch.setattr(pipeline, "publish", spy)
    prepare(tmp_path / "found" / "my", source, workers)
    assert set(encoder_of_tasks) == {REFERENCE} and len(encoder_of_tasks) > 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "different" in line]
    assert len(lines) == 1 and place in lines[0] and "tiktoken does all tasks" in lines[0]
    assert corpus_files(tmp_path / "found" / "my") == corpus_files(tmp_path / "expected" / "my")


def test_after_a_difference_a_restart_and_other_parts_use_tiktoken(tmp_path, monkeypatch, capsys):
    source = write_documents(tmp_path / "my.jsonl", last="a lie")
    let_lie(monkeypatch, "a lie")
    folder = tmp_path / "my"
    assert prepare(folder, source, part="0/3") is None  # finished with the fast encoder
    out = capsys.readouterr().out
    assert "tiktoken does all tasks" not in out
    for part in "1/3", "2/3":
        assert prepare(folder, source, part=part) is None
    assert "tiktoken does all tasks" in capsys.readouterr().out
    (work,) = (folder / ".work").iterdir()
    for part in "0/3", "1/3", "2/3":  # those that were finished before the difference
        metadata = prepare(folder, source, part=part)
    assert metadata and not work.exists()
    prepare(tmp_path / "expected" / "my", source, encoder="tiktoken")
    for name in "train.bin", "val.bin":
        expected = (tmp_path / "expected" / "my" / name).read_bytes()
        assert (folder / name).read_bytes() == expected


def test_a_worker_without_the_package_is_no_error(tmp_path, monkeypatch, capsys):
    def missing(*arguments):
        raise EncoderFailed("fastokens is not installed on every machine")

    monkeypatch.setattr(encoders, "_load_native", missing)
    assert prepare(tmp_path / "my", write_documents(tmp_path / "my.jsonl"), workers=2)
    assert "not installed on every machine; tiktoken does all tasks" in capsys.readouterr().out


@pytest.mark.parametrize("call", [0, encoders.CALLS_PER_CHECK])
@pytest.mark.parametrize("documents", [1, 20])
def test_the_first_call_and_each_eighth_are_compared(monkeypatch, gpt2_tokenizer, call, documents):
    encoder = open_encoder(FAST, gpt2_tokenizer)
    texts = [TEXT] * documents
    for _ in range(call):
        encoder.encode_documents(texts)
    native = encoder.native

    class Wrong:
        def encode_batch_flat(self, texts, split_special_tokens):
            ids, _ = native.encode_batch_flat(texts, split_special_tokens=split_special_tokens)
            ids = np.frombuffer(ids, "<u4").copy()
            ids[-3 if call else 2] += 1
            return ids.tobytes(), b""

    encoder.native = Wrong()
    with pytest.raises(EncodersDiffer) as caught:
        encoder.encode_documents(texts)
    assert caught.value.index == (documents - 1 if call else 0)
    length = len(TEXT.encode())
    assert caught.value.offset < 20 if not call else length - 20 < caught.value.offset < length
    encoder.encode_documents(texts)  # not compared


def test_a_lost_document_is_a_difference(gpt2_tokenizer):
    encoder = open_encoder(FAST, gpt2_tokenizer)
    encoder.num_calls = 1
    native = encoder.native

    class Loses:
        def encode_batch_flat(self, texts, split_special_tokens):
            texts = [texts[0].partition("<|endoftext|>")[2]]
            return native.encode_batch_flat(texts, split_special_tokens=split_special_tokens)

    encoder.native = Loses()
    with pytest.raises(EncodersDiffer):
        encoder.encode_documents(["a", "b"])


def test_a_failure_of_the_package_is_one_of_the_encoder(gpt2_tokenizer):
    encoder = open_encoder(FAST, gpt2_tokenizer)
    encoder.native = None
    with pytest.raises(EncoderFailed, match="fastokens fails: "):
        encoder.encode("a")


# resources


def test_the_encoder_starts_no_thread_and_works_after_a_fork(tmp_path):
    code = (
        "import os\n"
        "from corpus.encoders import open_encoder\n"
        "from corpus.tokenizer import get_tokenizer\n"
        "encoder = open_encoder('fastokens', get_tokenizer('gpt2'))\n"
        "threads = len(os.listdir('/proc/self/task'))\n"
        "encoder.encode('to be or not ' * 300_000)\n"
        "encoder.encode_documents(['to be'] * 10_000)\n"
        "assert len(os.listdir('/proc/self/task')) == threads\n"
        "if os.fork():\n"
        "    assert os.wait()[1] == 0\n"
        "else:\n"
        "    encoder.encode('to be or not ' * 300_000)\n"
        "    os._exit(0)\n"
    )
    if sys.platform == "linux":
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.slow
def test_memory_is_bounded_for_many_distinct_words():
    command = [sys.executable, "-m", "bench.encoders", "memory", "100"]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(result.stdout.split(" MiB")[0].split()[-1]) < 300
