"""--tokenizer bpe:N: the vocabulary is that of the training split, whole, and always the same."""

import collections
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from conftest import ROOT, assert_one_line_error, read_files, run_script

from corpus import bpe
from corpus.engines import open_engine
from corpus.inputs import Corpus, load_corpus
from corpus.metadata import read_metadata
from corpus.pipeline import prepare
from corpus.sources import Source
from corpus.tasks import assign_split
from corpus.tokenizer import _load, get_tokenizer
from corpus.verify import verify
from corpus.vocabulary import tokenizer_of, vocabulary_of

pytest.importorskip("tokenizers")
RHYME = "one for sorrow, two for mirth, three for a funeral and four for a birth\n"
HOSTILE = ["", "<|endoftext|>", "  a \n\n\t b", "naïve 日本語 👩‍👩‍👧 'll", "\ud800x", "a\0b"]


@pytest.fixture(autouse=True)
def vocabularies(tmp_path, monkeypatch) -> Path:
    """The vocabulary folder of the test."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tokenizers"))
    return tmp_path / "tokenizers"


def text_corpus(folder, text, name="my") -> Corpus:
    """Return a corpus of one running text; the file is FOLDER/NAME.txt."""
    (folder / f"{name}.txt").write_text(text)
    return Corpus(name, {}, [Source(str(folder / f"{name}.txt"))])


def train(corpus, folder, num_ids, **settings):
    return bpe.trained_tokenizer(
        f"bpe:{num_ids}", corpus, folder / "data" / corpus.name, **settings
    )


def prepare_with(corpus, tokenizer, folder) -> dict:
    with open_engine("processes", workers=1) as run_tasks:
        return prepare(corpus, tokenizer, folder / "data" / corpus.name, run_tasks)


def naive_merges(text, num_merges) -> list[bytes]:
    """Return the merges of byte-level BPE, by definition: the most frequent pair comes next.

    The text has only lower-case words, single spaces and line feeds. Of equally frequent pairs the
    one with the lower ids comes first; the bytes are numbered as in GPT-2's vocabulary.
    """
    words = collections.Counter(re.findall(r" ?[a-z]+| ?[,]+|\s", text))
    order = sorted(range(256), key=lambda byte: (byte not in PRINTABLE, byte))
    ranks = {bytes([byte]): i for i, byte in enumerate(order)}
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    merges = []
    for _ in range(num_merges):
        counts = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(pieces[word]):
                counts[pair] += count
        best = min(counts, key=lambda pair: (-counts[pair], ranks[pair[0]], ranks[pair[1]]))
        merges.append(best[0] + best[1])
        ranks[merges[-1]] = len(ranks)
        for tokens in pieces.values():
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == best:
                    tokens[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}


def test_the_ids_are_the_bytes_the_merges_and_the_end_of_text(tmp_path):
    text = RHYME * 9
    tokenizer = train(text_corpus(tmp_path, text + "x" * (len(text) // 9)), tmp_path, 280)
    vocabulary = vocabulary_of(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eot_token, len(vocabulary)) == (280, 279, 280)
    order = sorted(range(256), key=lambda byte: (byte not in PRINTABLE, byte))
    assert [vocabulary[i] for i in range(256)] == [bytes([byte]) for byte in order]
    assert [vocabulary[i] for i in range(256, 279)] == naive_merges(text, 23)
    for other in HOSTILE:
        assert 279 not in tokenizer.encode(other)


def test_the_ids_are_those_of_tiktoken_with_the_same_vocabulary(tmp_path, tinyshakespeare):
    text = tinyshakespeare.read_text()
    tokenizer = train(text_corpus(tmp_path, text), tmp_path, 2048)
    ranks = {token: i for i, token in vocabulary_of(tokenizer).items() if i != 2047}
    theirs = tiktoken.Encoding(
        "my", pat_str=tiktoken_ext.openai_public.r50k_pat_str, mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 2047},
    )  # fmt: skip
    for other in [text, *HOSTILE[:4], HOSTILE[5]]:
        assert tokenizer.encode(other).tolist() == theirs.encode_ordinary(other)


def documents_corpus(folder, words) -> Corpus:
    """Return a corpus of 200 documents with the same number of bytes: words[split of the document].

    Args:
        folder: Folder for the file.
        words: Split -> word of five letters.
    """
    source = Source(str(folder / "my.jsonl"), "jsonl", name="my.jsonl")
    size = len(json.dumps({"text": "xxxxx xxxxx"})) + 1
    is_train = assign_split(source, range(0, 200 * size, size), 0.9, 0)["train"]
    texts = [" ".join([words["train" if train else "val"]] * 2) for train in is_train]
    Path(source.path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus("my", {}, [source])


def named_corpus(folder, words) -> Corpus:
    """Return a corpus of files with official splits."""
    (folder / "raw").mkdir(exist_ok=True)
    for split, word in words.items():
        (folder / "raw" / f"{split}.txt").write_text(f"{word} {word}\n" * 20)
    return load_corpus("my", folder / "data" / "my", (str(folder / "raw"),), "line", "", "keep")


def running_corpus(folder, words) -> Corpus:
    return text_corpus(folder, f"{words['train']} " * 90 + f"{words['val']} " * 10)


@pytest.mark.parametrize("make", [running_corpus, documents_corpus, named_corpus])
def test_no_text_for_validation_reaches_the_vocabulary(make, tmp_path):
    tokens = {}
    names = set()  # of the files, to see that there were two trainings
    for word in ("quick", "zebra"):
        corpus = make(tmp_path, {"train": "rhyme", "val": word})
        with pytest.raises(ValueError, match="gives only 262 ids"):  # those of the word rhyme
            train(corpus, tmp_path, 263)
        tokenizer = train(corpus, tmp_path, 262)
        tokens[word] = vocabulary_of(tokenizer)
        names.add(tokenizer.name)
        metadata = prepare_with(corpus, tokenizer, tmp_path)
        assert metadata["splits"]["val"]["bytes"] >= 50
    assert len(names) == 2
    assert tokens["quick"] == tokens["zebra"]  # no letter of a word for validation has a merge
    assert {b"rhyme", b" rhyme"} <= {*tokens["quick"].values()}


def test_the_literal_end_of_text_in_a_document_is_ordinary_text(tmp_path):
    rows = "".join(json.dumps({"text": "<|endoftext|>"}) + "\n" for _ in range(60))
    (tmp_path / "my.jsonl").write_text(rows)
    corpus = Corpus("my", {}, [Source(str(tmp_path / "my.jsonl"), "jsonl")])
    tokenizer = train(corpus, tmp_path, 261)
    merges = [vocabulary_of(tokenizer)[i] for i in range(256, 260)]
    assert all(token in b"<|endoftext|>" for token in merges)
    metadata = prepare_with(corpus, tokenizer, tmp_path)
    ids = np.fromfile(tmp_path / "data" / "my" / "train.bin", metadata["dtype"])
    assert (ids == tokenizer.eot_token).sum() == metadata["splits"]["train"]["documents"]
    verify(tmp_path / "data" / "my")


def test_the_files_are_the_same_for_any_number_of_threads_and_workers_and_in_parts(tmp_path):
    (tmp_path / "my.txt").write_text("".join(f"{i % 83} times {RHYME}" for i in range(30_000)))
    runs = {
        "one": ("1", [["--workers", "1"]]),
        "two": ("2", [["--workers", "2"]]),
        "parts": ("2", [["--part", "0/2"], ["--part", "1/2"]]),
    }
    found = {}
    for name, (threads, calls) in runs.items():
        env = {"RAYON_NUM_THREADS": threads, "TIKTOKEN_CACHE_DIR": f"vocabularies-{name}"}
        flags = ["--input", "my.txt", "--tokenizer", "bpe:300", "--data_dir", f"data-{name}"]
        results = [
            run_script("prepare_data.py", *flags, *call, cwd=tmp_path, env=env) for call in calls
        ]
        assert [result.returncode for result in results] == [0] * len(calls), results[-1].stderr
        trained = [result.stdout.count("vocabulary: 300 ids trained") for result in results]
        assert trained == [1, 0][: len(calls)]
        assert "my-bpe300-" in results[-1].stdout  # size and bytes per token
        files = read_files(tmp_path / f"vocabularies-{name}")
        found[name] = files | read_files(tmp_path / f"data-{name}" / "my")
        (vocabulary,) = files.values()
        assert found[name]["tokenizer.json"] == vocabulary
    assert found["one"] == found["two"] == found["parts"]


def test_a_mistyped_name_of_a_trained_vocabulary_is_suggested(tmp_path):
    train(text_corpus(tmp_path, RHYME * 9), tmp_path, 270)
    with pytest.raises(ValueError, match=r"my-bpe270, or the path .*; did you mean my-bpe270\?"):
        get_tokenizer("my-bpe27")


def test_a_vocabulary_is_trained_once_for_a_text_and_again_for_another(
    tmp_path, vocabularies, monkeypatch, capsys
):
    corpus = text_corpus(tmp_path, RHYME * 50)
    first = train(corpus, tmp_path, 270)
    path = vocabularies / first.name
    data = path.read_bytes()
    path.unlink()
    assert train(corpus, tmp_path, 270).name == first.name
    assert path.read_bytes() == data  # trained again, to the same bytes
    with monkeypatch.context() as patch:  # as after a run that was killed when it had trained
        patch.setattr(bpe, "_train", None)
        metadata = prepare_with(corpus, train(corpus, tmp_path, 270), tmp_path)
        assert prepare_with(corpus, train(corpus, tmp_path, 270), tmp_path) == metadata
        assert "is prepared already" in capsys.readouterr().out
    text_corpus(tmp_path, RHYME.upper() * 50)
    other = train(corpus, tmp_path, 270)
    assert other.name != first.name
    assert vocabulary_of(other) != vocabulary_of(first)
    assert path.read_bytes() == data
    with pytest.raises(ValueError, match="several vocabularies are called my-bpe270") as error:
        get_tokenizer("my-bpe270")
    assert first.name in str(error.value)
    assert other.name in str(error.value)
    path.unlink()
    assert get_tokenizer("my-bpe270").name == other.name


def test_a_text_that_changes_while_it_is_read_gives_no_vocabulary(
    tmp_path, vocabularies, monkeypatch
):
    corpus = text_corpus(tmp_path, RHYME * 50)
    train_only = bpe._train

    def train_and_change(*arguments):
        text = train_only(*arguments)
        text_corpus(tmp_path, RHYME * 51)
        return text

    monkeypatch.setattr(bpe, "_train", train_and_change)
    with pytest.raises(ValueError, match="has changed while it was read: run this again"):
        train(corpus, tmp_path, 270)
    assert not vocabularies.exists()


ENDLESS = """
import sys
from pathlib import Path

from corpus import bpe
from corpus.inputs import load_corpus

def texts(*arguments):
    print("training", flush=True)
    while True:
        yield "one for sorrow"

bpe._training_texts = texts
corpus = load_corpus("my", Path("data/my"), ("my.txt",), "", "", "keep")
bpe.trained_tokenizer("bpe:270", corpus, Path("data/my"))
"""


def test_ctrl_c_ends_the_training_at_once_and_a_restart_trains(tmp_path, vocabularies):
    corpus = text_corpus(tmp_path, RHYME * 50)
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"training\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert train(corpus, tmp_path, 270).vocab_size == 270
    assert [path.suffix for path in vocabularies.iterdir()] == [".json"]  # and no lock


def test_more_ids_than_the_text_gives_are_refused(tmp_path, vocabularies):
    corpus = text_corpus(tmp_path, "zyxwv" + RHYME * 50)  # no pair of zyxwv comes twice
    with pytest.raises(ValueError, match="gives only") as error:
        train(corpus, tmp_path, 4096)
    assert not vocabularies.exists()
    (most,) = re.findall(r"choose --tokenizer bpe:(\d+)", str(error.value))
    tokenizer = train(corpus, tmp_path, int(most))
    assert tokenizer.vocab_size == int(most)
    assert [token for token in vocabulary_of(tokenizer).values() if b"v" in token] == [b"v"]


@pytest.mark.parametrize("name", ["bpe:", "bpe:many", "bpe:256", "bpe:-5", "bpe:1000001"])
def test_a_number_of_ids_out_of_range_is_refused(tmp_path, name):
    (tmp_path / "my.txt").write_text(RHYME)
    result = run_script("prepare_data.py", "--input", "my.txt", "--tokenizer", name, cwd=tmp_path)
    assert_one_line_error(result, "from 257", "as in bpe:4096", repr(name))


def test_an_invalid_document_stops_the_training_or_is_skipped(tmp_path, vocabularies):
    rows = [json.dumps({"text": RHYME}) for _ in range(60)]
    (tmp_path / "my.jsonl").write_text("\n".join([*rows, "{", *rows]))
    corpus = Corpus("my", {}, [Source(str(tmp_path / "my.jsonl"), "jsonl")])
    with pytest.raises(ValueError, match=r"line 61: not JSON .*; --on_error skip leaves it out"):
        train(corpus, tmp_path, 270)
    assert not vocabularies.exists()
    assert train(corpus, tmp_path, 270, on_error="skip").vocab_size == 270


def test_a_corpus_can_be_moved_without_the_vocabulary_folder(tmp_path, vocabularies):
    corpus = text_corpus(tmp_path, RHYME * 50)
    tokenizer = train(corpus, tmp_path, 270)
    metadata = prepare_with(corpus, tokenizer, tmp_path)
    shutil.rmtree(vocabularies)
    moved = tmp_path / "moved"
    os.rename(tmp_path / "data" / "my", moved)
    assert tokenizer_of(read_metadata(moved), moved).sha256 == metadata["tokenizer"]["sha256"]
    assert [path.name for path in vocabularies.iterdir()] == [tokenizer.name]
    shutil.rmtree(vocabularies)
    (moved / "tokenizer.json").write_text("{}")  # a copy of something else is not taken
    _load.cache_clear()  # another process has an empty cache
    with pytest.raises(FileNotFoundError, match=tokenizer.name):
        tokenizer_of(read_metadata(moved), moved)


def test_a_corpus_has_no_copy_of_a_vocabulary_that_it_no_longer_uses(tmp_path):
    corpus = text_corpus(tmp_path, RHYME * 50)
    prepare_with(corpus, train(corpus, tmp_path, 270), tmp_path)
    assert (tmp_path / "data" / "my" / "tokenizer.json").exists()
    prepare_with(corpus, get_tokenizer("bytes"), tmp_path)
    assert not (tmp_path / "data" / "my" / "tokenizer.json").exists()


def test_the_exported_tokenizer_gives_the_same_ids_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from training.huggingface import write_tokenizer

    tokenizer = train(text_corpus(tmp_path, RHYME * 50), tmp_path, 280)
    (tmp_path / "exported").mkdir()
    write_tokenizer(tmp_path / "exported", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert theirs.eos_token_id == tokenizer.eot_token == 279
    for text in [RHYME, *HOSTILE[2:4]]:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
