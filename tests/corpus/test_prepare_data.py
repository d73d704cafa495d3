"""prepare_data.py: splits, metadata, substitutes without a network, and errors."""

import hashlib
import json
import os
import shutil
import sys
import time
from pydoc_data.topics import topics

import numpy as np
import pytest
import tiktoken
from conftest import DEAD_PROXY, assert_one_line_error, make_corpus, read_files, run_script

import prepare_data
from corpus import tasks
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.metadata import read_metadata
from corpus.pipeline import prepare
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer
from corpus.verify import verify


def read_ids(folder, name):
    """Return the token ids in a file of a corpus."""
    metadata = json.loads((folder / "metadata.json").read_text())
    return np.fromfile(folder / name, dtype=np.dtype(metadata["dtype"]))


def test_a_running_text_is_divided_between_characters(tmp_path):
    text = "é" * 7 + "abc"  # 10 characters, 17 bytes
    metadata = make_corpus(tmp_path / "c", [text], train_split_ratio=0.75)
    assert bytes(read_ids(tmp_path / "c", "train.bin").astype(np.uint8)).decode() == "é" * 7
    assert bytes(read_ids(tmp_path / "c", "val.bin").astype(np.uint8)).decode() == "abc"
    splits = metadata["splits"]
    assert splits["train"]["tokens"] == splits["train"]["bytes"] == 14
    assert splits["val"]["tokens"] == splits["val"]["bytes"] == 3
    assert splits["val"]["documents"] == 1


def test_metadata_describes_the_files(tmp_path):
    folder = tmp_path / "c"
    metadata = make_corpus(folder, ["0123456789" * 10])
    assert metadata == json.loads((folder / "metadata.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == [
        "metadata.json",
        "train.bin",
        "val.bin",
    ]
    tokenizer = get_tokenizer("bytes")
    assert metadata["tokenizer"] == {"name": "bytes", "sha256": tokenizer.sha256}
    assert metadata["vocab_size"] == 257
    assert metadata["eot_token"] == 256
    assert metadata["dtype"] == "uint16"
    for split in metadata["splits"].values():
        (file,) = split["files"]
        data = (folder / file["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
        assert len(data) == 2 * file["tokens"] == 2 * split["tokens"]


def test_documents_end_with_an_end_of_text_and_their_position_decides_the_split(tmp_path):
    texts = [f"document {i}" for i in range(200)] + [""]
    make_corpus(tmp_path / "c", texts, documents=True)
    found = {}
    for name in ("train.bin", "val.bin"):
        ids = read_ids(tmp_path / "c", name).tolist()
        assert ids[-1] == 256
        documents = bytes(i if i < 256 else 0 for i in ids[:-1]).decode().split("\0")
        found[name] = documents
        assert documents == [text for text in texts if text in documents]  # in order
    assert sorted(found["train.bin"] + found["val.bin"]) == sorted(texts)
    assert 5 <= len(found["val.bin"]) <= 40  # about a tenth
    # the split of a document depends on its position and the seed, not on later documents
    make_corpus(tmp_path / "few", texts[:50], documents=True)
    n = len(read_ids(tmp_path / "few", "val.bin"))
    assert np.array_equal(
        read_ids(tmp_path / "few", "val.bin"), read_ids(tmp_path / "c", "val.bin")[:n]
    )
    make_corpus(tmp_path / "few", texts[:50], documents=True, seed=1)
    assert len(read_ids(tmp_path / "few", "val.bin")) != n


def test_the_built_in_corpus_decodes_to_pythons_documentation(tmp_path):
    texts = [topics[key] for key in sorted(topics)]
    assert len(texts) > 70
    result = run_script(
        "prepare_data.py", "--corpus", "python-docs", "--tokenizer", "bytes", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    metadata = json.loads((tmp_path / "data/python-docs/metadata.json").read_text())
    documents = []
    for name in ("train.bin", "val.bin"):
        ids = read_ids(tmp_path / "data" / "python-docs", name)
        ends = np.flatnonzero(ids == 256)
        documents += [bytes(d[d < 256].astype(np.uint8)).decode() for d in np.split(ids, ends)[:-1]]
    assert sorted(documents) == sorted(texts)
    assert sum(split["documents"] for split in metadata["splits"].values()) == len(texts)


def test_a_literal_end_of_text_marker_is_ordinary_text(tmp_path, gpt2_tokenizer):
    text = "a <|endoftext|> b\n" * 20
    make_corpus(tmp_path / "c", [text], tokenizer="gpt2")
    assert 50256 not in read_ids(tmp_path / "c", "train.bin")


def test_tinyshakespeare_equals_the_files_of_nanogpt(tmp_path, tinyshakespeare, gpt2_tokenizer):
    flags = ["--corpus", "tinyshakespeare", "--input", tinyshakespeare]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "data" / "tinyshakespeare"
    text = tinyshakespeare.read_text(encoding="utf-8")
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    end_of_train = int(len(text) * 0.9)
    parts = {"train": (text[:end_of_train], 301_966), "val": (text[end_of_train:], 36_059)}
    for name, (part, tokens) in parts.items():
        expected = np.array(encode(part), dtype=np.uint16)  # as in nanoGPT's prepare.py
        assert len(expected) == tokens
        assert (folder / f"{name}.bin").read_bytes() == expected.tobytes()
        assert f"{tokens:,} tokens" in result.stdout


def test_a_corpus_takes_the_name_of_its_file(tmp_path):
    (tmp_path / "my.txt").write_bytes(b"one line\r\n" * 50)
    result = run_script(
        "prepare_data.py", "--input", "my.txt", "--tokenizer", "bytes", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert read_ids(tmp_path / "data" / "my", "train.bin").tolist() == list(b"one line\r\n" * 45)


def test_without_a_network_the_built_in_corpus_is_prepared(tmp_path):
    result = run_script("prepare_data.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "No network" in result.stdout
    assert "Python's own documentation" in result.stdout
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["python-docs"]
    metadata = json.loads((tmp_path / "data/python-docs/metadata.json").read_text())
    assert metadata["tokenizer"]["name"] == "bytes"


def test_without_a_network_the_error_says_where_a_copied_file_goes(tmp_path, offline_error):
    error = offline_error("--corpus", "tinyshakespeare", "--tokenizer", "bytes")
    assert "or put the file at data/tinyshakespeare/input.txt" in error


def test_without_a_vocabulary_the_built_in_corpus_is_prepared(tmp_path, tinyshakespeare):
    """The text of TinyShakespeare exists, and the files of GPT-2's vocabulary are missing."""
    folder = tmp_path / "data" / "tinyshakespeare"
    folder.mkdir(parents=True)
    shutil.copy(tinyshakespeare, folder / "input.txt")
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "vocabulary")}
    result = run_script("prepare_data.py", cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert "vocab.bpe" in result.stdout and "Python's own documentation" in result.stdout
    assert (tmp_path / "data" / "python-docs" / "metadata.json").exists()
    assert not (folder / "metadata.json").exists()


@pytest.fixture
def offline_error(tmp_path, monkeypatch):
    """A function that returns the error of prepare_data.py without a network.

    The fixture removes the pauses between the attempts to download.
    """
    for name, value in DEAD_PROXY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "vocabulary"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)

    def offline_error(*flags):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags])
        with pytest.raises((ValueError, OSError)) as error:
            prepare_data.main()
        return str(error.value)

    return offline_error


@pytest.mark.parametrize("flags", [["--corpus", "tinyshakespeare"], ["--tokenizer", "bytes"]])
def test_a_named_corpus_or_tokenizer_has_no_substitute(tmp_path, offline_error, flags):
    error = offline_error(*flags)
    assert "no connection" in error and "--input" in error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_vocabulary_is_an_error_with_remedies(tmp_path, offline_error):
    (tmp_path / "my.txt").write_text("some text")
    error = offline_error("--input", "my.txt")
    assert all(word in error for word in ("vocab.bpe", "TIKTOKEN_CACHE_DIR", "--tokenizer bytes"))
    assert [path.name for path in tmp_path.iterdir()] == ["my.txt"]


WRONG_FLAGS = {  # case -> flags, words of the error
    "no such flag": (["--corpsu", "x"], ["--corpsu"]),
    "wrong type": (["--seed", "1.5"], ["--seed", "1.5"]),
    "not a number": (["--train_split_ratio", "nan"], ["--train_split_ratio", "nan"]),
    "out of range": (["--train_split_ratio", "1"], ["train_split_ratio", "1"]),
    "no such corpus": (["--corpus", "nope"], ["nope", "tinyshakespeare", "python-docs"]),
    "no such tokenizer": (["--input", "ok.txt", "--tokenizer", "gpt5"], ["gpt5", "bytes"]),
    "no such file": (["--input", "nope.txt"], ["nope.txt"]),
    "an empty folder": (["--input", "nothing"], ["nothing has no .txt, .jsonl or .parquet"]),
    "no name": (["--input", "."], ["''", "--corpus NAME"]),
    "the folder itself": (["--corpus", ".."], ["'..'", "--corpus NAME"]),
    "outside": (["--input", "ok.txt", "--corpus", "../x"], ["'../x'", "--corpus NAME"]),
    "another text": (["--corpus", "tinyshakespeare", "--input", "ok.txt"], ["ok.txt", "sha256"]),
    "not UTF-8": (
        ["--input", "latin1.txt", "--tokenizer", "bytes"],
        ["latin1.txt", "line 2", "0xe9"],
    ),
    "UTF-16": (["--input", "utf16.txt", "--tokenizer", "bytes"], ["line 1", "-f utf-16"]),
    "too short": (["--input", "short.txt", "--tokenizer", "bytes"], ["short", "too little text"]),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flags_are_a_one_line_error_and_leave_no_file(tmp_path, case):
    flags, words = WRONG_FLAGS[case]
    (tmp_path / "ok.txt").write_text("text " * 100)
    (tmp_path / "latin1.txt").write_bytes("fine\ncafé".encode("latin1"))
    (tmp_path / "utf16.txt").write_text("fine", encoding="utf-16")
    (tmp_path / "short.txt").write_text("x")
    (tmp_path / "nothing").mkdir()
    assert_one_line_error(run_script("prepare_data.py", *flags, cwd=tmp_path), *words)
    assert not (tmp_path / "data").exists()


def test_a_full_disk_leaves_no_corpus(tmp_path):
    """A limit on file sizes stands in for a disk that is full in the middle of a file."""
    (tmp_path / "my.txt").write_text("text " * 10_000)
    flags = ["--input", "my.txt", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path, max_file_bytes=20_000)
    assert_one_line_error(result, "train.bin: File too large; make room")
    assert not (tmp_path / "data").exists()


def test_the_corpus_of_a_file_is_prepared_again_with_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_corpus(tmp_path / "data" / "c", ["a text " * 40])
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--corpus", "c"])
    with pytest.raises(ValueError, match=r"data/c was made from data/c.txt: add --input data/c"):
        prepare_data.main()


@pytest.mark.parametrize(("num_tokens", "length"), [(2, 1), (17, 16), (18, 16), (65, 64)])
def test_the_next_command_fits_a_small_corpus(tmp_path, capsys, num_tokens, length):
    make_corpus(tmp_path / "c", ["a" * 2 * num_tokens], train_split_ratio=0.5)
    assert f" --sequence_length {length}\n" in capsys.readouterr().out
    assert read_metadata(tmp_path / "c")["splits"]["val"]["tokens"] > length


def test_preparing_again_says_what_it_replaces(tmp_path, capsys):
    make_corpus(tmp_path / "c", ["a text " * 40])
    assert "replaces" not in capsys.readouterr().out
    make_corpus(tmp_path / "c", ["a text " * 40], seed=1)
    assert f"replaces {tmp_path / 'c'} (bytes)\n" in capsys.readouterr().out


def test_preparing_again_replaces_the_corpus(tmp_path):
    folder = tmp_path / "c"
    make_corpus(folder, ["old " * 100])
    make_corpus(folder, ["new " * 100])
    assert bytes(read_ids(folder, "val.bin").astype(np.uint8)) == b"new " * 10
    make_corpus(tmp_path / "d", ["new " * 100])
    for name in ("train.bin", "val.bin"):
        assert (folder / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


def test_preparing_again_removes_only_files_of_the_corpus(tmp_path):
    folder = tmp_path / "c"
    old = "train-00001-of-00003.bin"
    folder.mkdir()
    for name in ("value.bin", "train_old.bin"):
        (folder / name).write_text("mine")
    make_corpus(folder, ["text " * 100])
    (folder / old).write_text("of an earlier preparation")
    make_corpus(folder, ["text " * 101])
    left = {path.name for path in folder.iterdir()} - {"train.bin", "val.bin", "metadata.json"}
    assert left == {"value.bin", "train_old.bin"}


def test_tokens_of_another_program_are_not_overwritten(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "train.bin").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"c/train\.bin has no metadata\.json beside it"):
        make_corpus(folder, ["text " * 100])
    assert read_files(folder) == {"train.bin": b"mine"}


def test_preparing_and_verifying_agree_on_whether_a_source_has_changed(tmp_path, capsys):
    """Size and modification time of the source decide.

    The modification time may lie before the preparation or in the future.
    """
    folder = tmp_path / "c"
    make_corpus(folder, ["one text " * 100])
    source = tmp_path / "c.txt"
    for seconds in (-(10**6), 10**6):
        now = time.time()
        os.utime(source, (now + seconds, now + seconds))
        verify(folder)
        assert "has changed since: nothing was compared" in capsys.readouterr().out
        prepare_again(folder, source)
        assert "done in" in capsys.readouterr().out
        verify(folder)
        assert "compared with the source: the same" in capsys.readouterr().out
        prepare_again(folder, source)
        assert "is prepared already" in capsys.readouterr().out


def prepare_again(folder, source):
    corpus = Corpus(folder.name, {"made": "by a test"}, [Source(str(source))])
    with open_engine("processes", workers=1) as run_tasks:
        prepare(corpus, get_tokenizer("bytes"), folder, run_tasks)


def test_a_split_of_empty_documents_is_refused(tmp_path):
    """The tokens of such a split would be end-of-text tokens only, which readers refuse."""
    texts = ["", *[f"document {i}" for i in range(5)]]
    seeds = range(200)
    refused = 0
    for seed in seeds:
        folder = tmp_path / str(seed)
        try:
            make_corpus(folder, texts, documents=True, seed=seed)
        except ValueError as error:
            assert "nothing is left for" in str(error) and "another --seed" in str(error)
            assert not (folder / "metadata.json").exists()
            refused += 1
        else:
            assert read_metadata(folder)["splits"]["val"]["bytes"] > 0
    assert 0 < refused < len(seeds)


def test_a_vocabulary_beyond_uint16_takes_uint32(tmp_path, monkeypatch):
    class Wide(type(get_tokenizer("bytes"))):
        vocab_size = 65_537

        def encode(self, text):
            return super().encode(text) + 65_536 - 120  # "x" becomes the last id

    monkeypatch.setattr("conftest.get_tokenizer", lambda name: Wide())
    monkeypatch.setattr(tasks, "get_tokenizer", lambda name: Wide())
    metadata = make_corpus(tmp_path / "c", ["x" * 100])
    assert metadata["dtype"] == "uint32"
    assert read_ids(tmp_path / "c", "val.bin").tolist() == [65_536] * 10
    # the id lies outside the vocabulary now, and uint16 would turn it into 0
    Wide.vocab_size = 65_536
    with pytest.raises(ValueError, match="65536"):
        make_corpus(tmp_path / "d", ["x" * 100])


def test_a_corpus_can_be_moved(tmp_path):
    make_corpus(tmp_path / "c", ["text " * 100])
    shutil.move(tmp_path / "c", tmp_path / "elsewhere")
    text = (tmp_path / "elsewhere" / "metadata.json").read_text()
    assert str(tmp_path) not in text
    assert os.sep not in json.loads(text)["splits"]["train"]["files"][0]["name"]
