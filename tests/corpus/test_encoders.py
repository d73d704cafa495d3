"""The fast encoder gives the ids of tiktoken, or tiktoken encodes the whole corpus."""

# ruff: noqa: RUF001  (the test needs Chinese punctuation)

import importlib.metadata
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_tasks import ADVERSARIAL_TEXTS, corpus_files

from bench.encoders import compare_documents, compare_unicode
from corpus import encoders, pipeline, tasks
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
from corpus.json_encoding import TIKTOKEN_VERSION
from corpus.sources import Source
from corpus.tokenizer import CannotEncode, get_tokenizer

pytest.importorskip(FAST)
LONG_TEXTS = [
    "To be, or not to be: that is the question.\n" * 300,  # longer than a block
    "人人生而自由，在尊严和权利上一律平等。\U0001f600 café, e\u0301té; \ud83d \0 <|endoftext|>"
    * 200,
    "x1y22'LL  \r\n\n" * 1000,
]


load_native = encoders._load_native  # the real one


@pytest.fixture(autouse=True)
def always_fast(monkeypatch, gpt2_tokenizer):
    """Let the smallest corpus use the fast encoder."""
    monkeypatch.setattr(encoders, "SMALLEST_CORPUS", 0)
    monkeypatch.setattr(pipeline, "TASK_BYTES", (2000, 2000))
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)  # workers are forks of this process


class Liar:
    """The fast package, but with one wrong id per call, where the texts hold a word last."""

    def __init__(self, word: str):
        self.word = word
        self.native = load_native(get_tokenizer("gpt2"))

    def encode_batch_flat(self, texts, split_special_tokens):
        options = {"split_special_tokens": split_special_tokens}
        ids, offsets = self.native.encode_batch_flat(texts, **options)
        if self.word in texts[0]:
            before = texts[0].rpartition(self.word)[0]
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
        encoder._check = lambda *arguments: None  # this test does
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
    installed = {FAST: FAST_VERSION, REFERENCE: TIKTOKEN_VERSION}
    monkeypatch.setattr(importlib.metadata, "version", installed.get)
    for version, reason in ("", "is not installed"), ("9.9", "9.9 was not compared"):
        installed[FAST] = version
        name, line = choose_encoder("auto", gpt2_tokenizer, 2)
        assert name == REFERENCE and reason in line and f"fastokens=={FAST_VERSION}" in line
    installed |= {FAST: FAST_VERSION, REFERENCE: "9.9"}
    name, line = choose_encoder("auto", gpt2_tokenizer, 2)
    assert (name, line) == (REFERENCE, "encoder: tiktoken (fastokens was compared with tiktoken "
                                       f"{TIKTOKEN_VERSION} only)")  # fmt: skip
    installed[REFERENCE] = TIKTOKEN_VERSION
    assert choose_encoder("auto", gpt2_tokenizer, 2)[0] == FAST


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


def test_each_text_of_the_first_block_is_compared(monkeypatch, gpt2_tokenizer):
    """The error names the text, and the bytes before the first wrong id."""
    texts = [f"document {i:010} é 漢 " for i in range(1000)]
    length = len(texts[0])
    for index in 0, 1, encoders.BLOCK_CHARACTERS // (length + 1) - 1:
        let_lie(monkeypatch, texts[index][9:19])
        encoder = open_encoder(FAST, gpt2_tokenizer)
        with pytest.raises(EncodersDiffer) as caught:
            encoder.encode_documents(texts)
        assert caught.value.index == index
        assert len("document ") - 1 <= caught.value.offset < length
    assert index > 40


@pytest.mark.parametrize("text", LONG_TEXTS, ids=ascii)
def test_the_beginning_of_a_long_text_is_compared(text, monkeypatch, gpt2_tokenizer):
    for place in 0, encoders.BLOCK_CHARACTERS - 30:
        lie = f"{text[:place]} a lie {text[place:]}"
        let_lie(monkeypatch, "a lie")
        for encode in (
            lambda encoder, lie=lie: encoder.encode(lie),
            lambda encoder, lie=lie: encoder.encode_documents([lie, "b"]),
        ):
            with pytest.raises(EncodersDiffer) as caught:
                encode(open_encoder(FAST, gpt2_tokenizer))
            expected = len(text[:place].encode("utf-8", "surrogatepass"))
            assert caught.value.index == 0 and 0 <= caught.value.offset - expected <= 2


@pytest.mark.parametrize(
    "texts", [["one", *LONG_TEXTS], ["a", "", "b"] * 999], ids=["long", "short"]
)
def test_any_text_of_a_later_call_may_be_in_a_block(texts, monkeypatch, gpt2_tokenizer):
    monkeypatch.setattr(encoders, "IDS_PER_BLOCK", 1)
    index = len(texts) // 2
    texts = [
        *texts[:index],
        f"{texts[index][:5000]} a lie {texts[index][5000:]}",
        *texts[index + 1 :],
    ]
    let_lie(monkeypatch, "a lie")
    encoder = open_encoder(FAST, gpt2_tokenizer)
    encoder.is_first_call = False
    num_calls = 0
    with pytest.raises(EncodersDiffer) as caught:
        while num_calls < 1000:
            num_calls += 1
            encoder.encode_documents(texts)
    assert caught.value.index == index and num_calls > 1


def test_correct_ids_never_count_as_different(monkeypatch, gpt2_tokenizer):
    """Blocks at all kinds of places, among short and long texts of all kinds."""
    monkeypatch.setattr(encoders, "IDS_PER_BLOCK", 1)
    monkeypatch.setattr(encoders, "BLOCK_CHARACTERS", 50)
    texts = [*LONG_TEXTS, *(text[:3000] for text in ADVERSARIAL_TEXTS), "", "a"]
    encoder = open_encoder(FAST, gpt2_tokenizer)
    for seed in range(150):
        encoder.generator.seed(seed)
        encoder.is_first_call = True
        encoder.encode_documents(texts[seed % len(texts) :])
        encoder.encode(texts[seed % len(texts)])


def test_a_million_ids_are_compared_at_a_few_places_only(monkeypatch, gpt2_tokenizer):
    lengths = []
    encode_documents = type(gpt2_tokenizer).encode_documents

    def encode_and_record(self, texts):
        lengths.append(sum(map(len, texts)))
        return encode_documents(self, texts)

    monkeypatch.setattr(type(gpt2_tokenizer), "encode_documents", encode_and_record)
    encoder = open_encoder(FAST, gpt2_tokenizer)
    for _ in range(20):  # calls of 200,000 characters
        encoder.encode_documents(["to be or not to be, " * 10] * 1000)
    assert 0 < lengths[0] < 2.5 * encoders.BLOCK_CHARACTERS
    assert 4 < len(lengths) <= 10 and max(lengths[1:]) < 1.2 * encoders.BLOCK_CHARACTERS


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("lies", [(1510, 1511), (2000, 2060)], ids=["first block", "late block"])
def test_a_wrong_id_in_a_later_task_turns_the_encoder_off(
    tmp_path, lies, workers, monkeypatch, capsys
):
    """Each task encodes some hundred documents, a few in each call."""
    monkeypatch.setattr(pipeline, "TASK_BYTES", (16_000, 16_000))
    monkeypatch.setattr("corpus.reader.BLOCK", 1000)  # bytes read at once
    monkeypatch.setattr(tasks, "BLOCK", 2000)  # twice the characters of a call
    monkeypatch.setattr(encoders, "IDS_PER_BLOCK", 1)
    source = write_documents(tmp_path / "my.jsonl", count=4000)
    lines = (tmp_path / "my.jsonl").read_text().splitlines()
    for number in range(*lies):
        lines[number] = lines[number].replace("document", "a lie in document")
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    prepare(tmp_path / "expected" / "my", source, encoder="tiktoken")
    capsys.readouterr()
    let_lie(monkeypatch, "a lie")
    prepare(tmp_path / "found" / "my", source, workers)
    (message,) = [line for line in capsys.readouterr().out.splitlines() if "different" in line]
    assert "tiktoken does all tasks, from the beginning" in message
    place = int(re.search(r"my\.jsonl, line (\d+)", message)[1])
    assert lies[0] < place <= lies[1]
    assert corpus_files(tmp_path / "found" / "my") == corpus_files(tmp_path / "expected" / "my")


def test_a_lost_document_is_a_difference(gpt2_tokenizer):
    encoder = open_encoder(FAST, gpt2_tokenizer)
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
@pytest.mark.parametrize("word_lengths", [[5], [5, 12, 60, 250, 2000]], ids=["short", "mixed"])
def test_memory_is_below_300_mb_for_many_distinct_words(word_lengths):
    command = [sys.executable, "-m", "bench.encoders", "memory", "75", *map(str, word_lengths)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(result.stdout.split(" MiB")[0].split()[-1]) < 300e6 / 2**20
