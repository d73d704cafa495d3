"""Any bytes through any reader: tokenized so that decoding gives the text back, or refused by file
and line.

What is right is told by simple oracles: json.loads line by line, str.split, pyarrow's own
read_table, gzip and zstd at one go. FUZZ=10000 pytest tests/faults/test_text.py runs as many files
through them, others each time.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from corpus import pipeline, reader
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.sources import Source, zstd
from corpus.tokenizer import get_tokenizer

FUZZ = int(os.environ.get("FUZZ", 400))  # files in all


def fuzzed(share: float):
    """Of a test that gets so much of them."""
    return settings(
        max_examples=max(1, round(FUZZ * share)),
        derandomize="FUZZ" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# what a file may hold

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates, too
ODD = st.sampled_from(
    [
        "",
        "<|endoftext|>",
        "\0",
        "\ufeff",
        "\r\n",
        "\u2028\x85\x1c",
        "\u00a0",
        "\ud83d\ude00",
        "a\rb",
    ]
)
DOCUMENTS = st.lists(TEXTS | ODD, max_size=4).map("".join)
ENDS = st.sampled_from([b"\n"] * 4 + [b"\r\n", b"\n\n", b" \n\t\n", b"\r", b""])
NOT_UTF8 = st.sampled_from(
    [b"\xff\xfe\x00", b"caf\xe9", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"]
)


@st.composite
def rows(draw):
    """A line of a .jsonl file that is good, and what comes close."""
    text = draw(DOCUMENTS)
    row = json.dumps({"text": text}, ensure_ascii=draw(st.booleans()))
    twice = row.replace("{", '{"text": 1, ')
    return draw(
        st.sampled_from(
            [
                row,
                row,
                row,
                twice,  # the last one counts
                row.replace("}", ', "n": [NaN, -Infinity, 1e999]}'),
                row.replace("}", f', "n": {"[" * 40}{"]" * 40}}}'),
                "\ufeff" + row,
                f"\t {row}\x0b",
                f"{row} {row}",
                row[:-1],
                json.dumps({"text": draw(st.none() | st.integers() | st.just([text]))}),
                json.dumps({"body": text}),
                json.dumps(text),
            ]
        )
    ).encode(errors="surrogatepass")


HOSTILE = st.sampled_from(
    [
        b"[" * 5000,
        b'{"text": ' * 5000,
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": "' + b"long " * 2000 + b'"}',
        b'{"text": "\0"}',
        b'{"text": "\\ud83d"}',
        b'{"text": "\\u"}',
        b"[]",
    ]
)
LINES = st.lists(st.tuples(rows() | HOSTILE | NOT_UTF8 | st.binary(max_size=20), ENDS), max_size=8)
JSONL = LINES.map(lambda lines: b"".join(itertools.chain.from_iterable(lines)))
CHUNKS = DOCUMENTS.map(lambda text: text.encode(errors="replace")) | st.just(b"word " * 300)
PLAIN = st.lists(CHUNKS | CHUNKS | ENDS | NOT_UTF8, max_size=8).map(b"".join)
SUFFIX = st.sampled_from(["", "", ".gz", ".zst"])
BLOCKS = st.sampled_from([5, 16, 64, 1 << 20])
PIECES = st.sampled_from([16, 100, 1 << 20])


# what is right: a list of texts, or of (number of a line that is none, None)


def whole(data: bytes):
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return error.start


def of_jsonl(data: bytes):
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                good = isinstance(row, dict) and isinstance(row.get("text"), str)
            except (ValueError, RecursionError):
                good = False
            yield row["text"] if good else number


def of_text(data: bytes, documents: str):
    lines = data.split(b"\n")
    if documents == "line":
        groups = [([line], i) for i, line in enumerate(lines, 1) if line.strip()]
    elif documents == "blank-line":
        kept = itertools.groupby(enumerate(lines, 1), key=lambda pair: bool(pair[1].strip()))
        groups = [list(group) for filled, group in kept if filled]
        groups = [([line for _, line in group], group[0][0]) for group in groups]
    else:
        groups = [(lines, 1)] if data else []
    for group, number in groups:
        text = whole(b"\n".join(group))
        if isinstance(text, int):
            yield number + b"\n".join(group)[:text].count(b"\n")
        else:
            yield text if documents in ("", "file") else text.strip()


def tokenizable(text: str) -> str:
    """Halves of a character become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def unpacked(data: bytes, suffix: str) -> bytes | None:
    """None where the compressed file is damaged."""
    try:
        return gzip.decompress(data) if suffix == ".gz" else zstd("").decompress(data)
    except (OSError, EOFError, zlib.error, zstd("").ZstdError):
        return None


# what happens


@pytest.fixture(scope="module")
def folder():
    """In memory where there is such a place: files are made by the thousand."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        (Path(folder) / "val.txt").write_text("the end")
        yield Path(folder)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """What a test sets, it puts back."""
    monkeypatch.setattr(reader, "BLOCK", reader.BLOCK)
    monkeypatch.setattr(pipeline, "TASK_BYTES", pipeline.TASK_BYTES)


def prepared(folder, source, block, piece, on_error="stop"):
    """The bytes of train and val that were prepared of a source, and what was skipped. Raises
    what prepare_data.py prints."""
    reader.BLOCK, pipeline.TASK_BYTES = block, (piece, piece)
    sources = [source]
    if source.division or source.format != "text":  # all of it to train
        end = Source(str(folder / "val.txt"), division="file", split="val")
        sources = [replace(source, split="train"), replace(end, number=1)]
    shutil.rmtree(folder / "out", ignore_errors=True)
    try:
        with open_engine("processes", 1) as run_tasks, contextlib.redirect_stdout(io.StringIO()):
            corpus, tokenizer = Corpus("fuzz", {}, sources), get_tokenizer("bytes")
            pipeline.prepare(corpus, tokenizer, folder / "out", run_tasks, on_error=on_error)
    except BaseException:
        assert not (folder / "out" / "metadata.json").exists()  # there is no corpus
        raise
    skipped = folder / "out" / "skipped.txt"
    ids = [np.fromfile(folder / "out" / f"{name}.bin", "<u2") for name in ("train", "val")]
    return *ids, skipped.read_text().splitlines() if skipped.exists() else []


def check(folder, source, expected, block, piece):
    """Both ways of --on_error, for a corpus of documents."""
    path, expected = source.path, list(expected)
    texts = [tokenizable(item).encode() for item in expected if isinstance(item, str)]
    places = [item for item in expected if not isinstance(item, str)]
    unit = "row" if source.format == "parquet" else "line"
    names = [f"{path}, {unit} {item}: " for item in places]
    if not any(texts) or places:
        with pytest.raises(ValueError) as error:
            prepared(folder, source, block, piece)
        message = str(error.value)
        assert message.startswith(tuple(names) or "fuzz has too little text"), message
    if not any(texts):
        return
    train, _, skipped = prepared(folder, source, block, piece, "skip")
    ends = np.flatnonzero(train == 256)
    assert ends[-1] == len(train) - 1
    found = [part[:-1].astype(np.uint8).tobytes() for part in np.split(train, ends + 1)[:-1]]
    assert found == texts
    assert [line[: len(name)] for line, name in zip(skipped, names)] == names
    assert len(skipped) == len(names)


def write(folder, name, data, suffix):
    path = folder / (name + suffix)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd("").compress}
    path.write_bytes(pack[suffix](data))
    return str(path)


@fuzzed(0.4)
@given(JSONL, SUFFIX, BLOCKS, PIECES)
@example(b"\xef\xbb\xbf", "", 64, 64)
@example(b'{"text": "a"}\n\xef\xbb\xbf\n', "", 64, 64)
def test_jsonl(folder, data, suffix, block, piece):
    source = Source(write(folder, "a.jsonl", data, suffix), "jsonl")
    check(folder, source, of_jsonl(data), block, piece)


@fuzzed(0.3)
@given(PLAIN, st.sampled_from(["line", "blank-line", "file"]), SUFFIX, BLOCKS, PIECES)
@example(b"", "file", ".gz", 64, 64)
def test_documents_of_plain_text(folder, data, documents, suffix, block, piece):
    source = Source(write(folder, "a.txt", data, suffix), division=documents)
    check(folder, source, of_text(data, documents), block, piece)


@fuzzed(0.1)
@given(PLAIN, SUFFIX, BLOCKS, PIECES)
def test_a_running_text(folder, data, suffix, block, piece):
    source = Source(write(folder, "a.txt", data, suffix))
    text = whole(data)
    if isinstance(text, str) and len(text) > 1:
        train, val, _ = prepared(folder, source, block, piece)
        cut = int(len(text) * 0.9)
        assert [train.astype(np.uint8).tobytes(), val.astype(np.uint8).tobytes()] == [
            text[:cut].encode(), text[cut:].encode(),
        ]  # fmt: skip
    else:
        with pytest.raises(ValueError) as error:
            prepared(folder, source, block, piece)
        line = 0 if isinstance(text, str) else 1 + data[:text].count(b"\n")
        words = f"{source.path}, line {line}: not UTF-8" if line else "fuzz has too little text"
        assert str(error.value).startswith(words)


@st.composite
def tables(draw):
    """Values of a column, and the type that it has in the file."""
    kind = draw(
        st.sampled_from(["string", "large_string", "dictionary", "binary", "int64", "null"])
    )
    if kind in ("int64", "null"):
        return kind, draw(st.lists(st.none() if kind == "null" else st.integers(0, 9), max_size=9))
    value = DOCUMENTS.map(lambda text: text.encode(errors="replace"))
    return kind, draw(st.lists(st.none() | value | value | NOT_UTF8, max_size=9))


@fuzzed(0.1)
@given(tables(), st.integers(1, 4), SUFFIX, PIECES)
def test_parquet(folder, table, group, suffix, piece):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    kind, values = table
    if kind in ("int64", "null"):
        column = pa.array(values, getattr(pa, kind)())
        expected = [i for i, _ in enumerate(values)]
    else:
        column = pa.array(values, pa.large_binary() if kind == "large_string" else pa.binary())
        texts = [whole(value) if value is not None else i for i, value in enumerate(values)]
        good = kind != "binary"
        expected = [t if good and isinstance(t, str) else i for i, t in enumerate(texts)]
    if kind in ("string", "large_string", "dictionary"):
        strings = pa.large_string() if kind == "large_string" else pa.string()
        column = column.view(strings)  # nothing looks whether it is UTF-8
    if kind == "dictionary":
        column = column.dictionary_encode()
    data = io.BytesIO()
    pq.write_table(pa.table({"n": range(len(values)), "text": column}), data, row_group_size=group)
    source = Source(write(folder, "a.parquet", data.getvalue(), suffix), "parquet")
    check(folder, source, expected, 1 << 20, piece)


def test_a_column_of_what_python_has_not(folder):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    days = pa.array([1 << 30], pa.int32()).view(pa.date32())
    for column in days, pa.array([1 << 60]).view(pa.timestamp("us")):
        pq.write_table(pa.table({"text": column}), folder / "a.parquet")
        check(folder, Source(str(folder / "a.parquet"), "parquet"), [0], 1 << 20, 1 << 20)


@fuzzed(0.3)
@given(st.data())
def test_a_table_with_other_bytes(folder, data):
    """Parquet has no checksums here: whether the texts are right is not to be told."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"n": range(20), "text": ["some words"] * 20}), file, row_group_size=9)
    mutant = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
    source = Source(write(folder, "a.parquet", bytes(mutant), ""), "parquet")
    try:
        prepared(folder, source, 1 << 20, 100)
    except ValueError as error:
        assert str(error).startswith((source.path, "fuzz has too little text"))
    except OSError as error:  # by what it says of its size
        assert "GB free: make room there" in str(error)


@fuzzed(0.1)
@given(st.data(), st.sampled_from([".gz", ".zst"]), BLOCKS)
def test_a_compressed_file_with_other_bytes(folder, data, suffix, block):
    """The texts before the damage may be kept, and are right; the damage is told."""
    texts = [f"document {i} " * 9 for i in range(30)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    path = write(folder, "a.jsonl", lines, suffix)
    mutant = bytearray(Path(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
    mutant = bytes(mutant[: data.draw(st.integers(1, len(mutant)))])
    Path(path).write_bytes(mutant)
    right = unpacked(mutant, suffix)
    source = Source(path, "jsonl")
    if right is not None:
        check(folder, source, of_jsonl(right), max(64, block), 64)
    else:
        with pytest.raises(ValueError, match=rf"{re.escape(path)}, line \d+: "):
            prepared(folder, source, max(64, block), 64)
