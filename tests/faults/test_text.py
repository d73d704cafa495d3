"""Any bytes in any format give ids that decode to the text, or an error that names file and line.

Simple oracles give the expected texts: json.loads line by line, str.split, gzip and zstd on the
whole file. FUZZ=10000 pytest tests/faults/test_text.py tests 10,000 new random files.
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
from corpus.opening import zstd
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer

FUZZ = int(os.environ.get("FUZZ", 400))  # number of files over all tests


def fuzzed(share: float):
    """Return the settings of a test that gets a share of the files."""
    return settings(
        max_examples=max(1, round(FUZZ * share)),
        derandomize="FUZZ" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# strategies for the content of a file

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)  # lone surrogates, too
UNUSUAL_TEXTS = st.sampled_from(
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
DOCUMENTS = st.lists(TEXTS | UNUSUAL_TEXTS, max_size=4).map("".join)
LINE_ENDS = st.sampled_from([b"\n"] * 4 + [b"\r\n", b"\n\n", b" \n\t\n", b"\r", b""])
NOT_UTF8 = st.sampled_from(
    [b"\xff\xfe\x00", b"caf\xe9", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"]
)


@st.composite
def rows(draw):
    """Draw a valid line of a .jsonl file, or a nearly valid one."""
    text = draw(DOCUMENTS)
    row = json.dumps({"text": text}, ensure_ascii=draw(st.booleans()))
    with_two_texts = row.replace("{", '{"text": 1, ')
    return draw(
        st.sampled_from(
            [
                row,
                row,
                row,
                with_two_texts,  # the last one counts
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


HOSTILE_LINES = st.sampled_from(
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
LINE_CONTENTS = rows() | HOSTILE_LINES | NOT_UTF8 | st.binary(max_size=20)
LINES = st.lists(st.tuples(LINE_CONTENTS, LINE_ENDS), max_size=8)
JSONL = LINES.map(lambda lines: b"".join(itertools.chain.from_iterable(lines)))
WORDS = DOCUMENTS.map(lambda text: text.encode(errors="replace")) | st.just(b"word " * 300)
PLAIN_TEXTS = st.lists(WORDS | WORDS | LINE_ENDS | NOT_UTF8, max_size=8).map(b"".join)
SUFFIXES = st.sampled_from(["", "", ".gz", ".zst"])
BLOCK_BYTES = st.sampled_from([5, 16, 64, 1 << 20])
TASK_BYTES = st.sampled_from([16, 100, 1 << 20])


# oracles: each yields a text for a valid document and the line number of an invalid one


def decode(data: bytes) -> str | int:
    """Return the text, or the position of the first byte that is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return error.start


def expected_from_jsonl(data: bytes):
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig"))
                valid = isinstance(row, dict) and isinstance(row.get("text"), str)
            except (ValueError, RecursionError):
                valid = False
            yield row["text"] if valid else number


def expected_from_text(data: bytes, documents: str):
    numbered_lines = list(enumerate(data.split(b"\n"), 1))
    if documents == "line":
        groups = [[(number, line)] for number, line in numbered_lines if line.strip()]
    elif documents == "blank-line":
        runs = itertools.groupby(numbered_lines, key=lambda pair: bool(pair[1].strip()))
        groups = [list(run) for has_text, run in runs if has_text]
    else:
        groups = [numbered_lines] if data else []
    for group in groups:
        first_number = group[0][0]
        content = b"\n".join(line for _, line in group)
        text = decode(content)
        if isinstance(text, int):
            yield first_number + content[:text].count(b"\n")
        else:
            followed_by_line_feed = group[-1][0] < len(numbered_lines)
            if documents in ("line", "blank-line") and followed_by_line_feed:
                text = text.removesuffix("\r")
            yield text


def tokenizable(text: str) -> str:
    """Replace lone surrogates by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def decompress(data: bytes, suffix: str) -> bytes | None:
    """Return the decompressed data, or None if the file is damaged."""
    try:
        return gzip.decompress(data) if suffix == ".gz" else zstd("").decompress(data)
    except (OSError, EOFError, zlib.error, zstd("").ZstdError):
        return None


# tests


@pytest.fixture(scope="module")
def folder():
    """A temporary folder, in memory if possible, because the tests write thousands of files."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        (Path(folder) / "val.txt").write_text("the end")
        yield Path(folder)


@pytest.fixture(autouse=True)
def restore_sizes(monkeypatch):
    """Restore the sizes that prepare_source changes."""
    monkeypatch.setattr(reader, "BLOCK", reader.BLOCK)
    monkeypatch.setattr(pipeline, "TASK_BYTES", pipeline.TASK_BYTES)


def prepare_source(folder, source, block_bytes, task_bytes, on_error="stop"):
    """Prepare a source; return the ids of train and val and the lines of skipped.txt.

    All documents go to train, and the file val.txt is the validation split. A running text is
    divided between train and val.
    """
    reader.BLOCK = block_bytes
    pipeline.TASK_BYTES = (task_bytes, task_bytes)
    sources = [source]
    if source.division or source.format != "text":
        val = Source(str(folder / "val.txt"), division="file", split="val")
        sources = [replace(source, split="train"), replace(val, number=1)]
    corpus = Corpus("fuzz", {}, sources)
    tokenizer = get_tokenizer("bytes")
    shutil.rmtree(folder / "out", ignore_errors=True)
    try:
        with open_engine("processes", 1) as run_tasks, contextlib.redirect_stdout(io.StringIO()):
            pipeline.prepare(corpus, tokenizer, folder / "out", run_tasks, on_error=on_error)
    except BaseException:
        assert not (folder / "out" / "metadata.json").exists()  # an error leaves no corpus
        raise
    train = np.fromfile(folder / "out" / "train.bin", "<u2")
    val = np.fromfile(folder / "out" / "val.bin", "<u2")
    skipped = folder / "out" / "skipped.txt"
    return train, val, skipped.read_text().splitlines() if skipped.exists() else []


def check(folder, source, expected, block_bytes, task_bytes):
    """Check a source of documents against an oracle, with --on_error stop and skip."""
    expected = list(expected)
    texts = [tokenizable(item).encode() for item in expected if isinstance(item, str)]
    invalid = [item for item in expected if not isinstance(item, str)]
    unit = "row" if source.format == "parquet" else "line"
    places = [f"{source.path}, {unit} {item}: " for item in invalid]
    if not any(texts) or places:
        with pytest.raises(ValueError) as error:
            prepare_source(folder, source, block_bytes, task_bytes)
        message = str(error.value)
        assert message.startswith(tuple(places) or "fuzz has too little text"), message
    if not any(texts):
        return
    train, _, skipped = prepare_source(folder, source, block_bytes, task_bytes, "skip")
    ends = np.flatnonzero(train == 256)
    assert ends[-1] == len(train) - 1
    documents = np.split(train, ends + 1)[:-1]
    assert [ids[:-1].astype(np.uint8).tobytes() for ids in documents] == texts
    assert [line[: len(place)] for line, place in zip(skipped, places)] == places
    assert len(skipped) == len(places)


def write(folder, name, data, suffix):
    """Write a file, compressed if its suffix says so, and return its path."""
    path = folder / (name + suffix)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstd("").compress}
    path.write_bytes(compress[suffix](data))
    return str(path)


def change_bytes(data, content: bytes) -> bytearray:
    """Return `content` with one to three bytes changed; data: Hypothesis draws the changes."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(changed) - 1))
        changed[position] = data.draw(st.integers(0, 255))
    return changed


@fuzzed(0.4)
@given(JSONL, SUFFIXES, BLOCK_BYTES, TASK_BYTES)
@example(b"\xef\xbb\xbf", "", 64, 64)
@example(b'{"text": "a"}\n\xef\xbb\xbf\n', "", 64, 64)
def test_jsonl_gives_the_documents_of_json_loads(folder, data, suffix, block_bytes, task_bytes):
    source = Source(write(folder, "a.jsonl", data, suffix), "jsonl")
    check(folder, source, expected_from_jsonl(data), block_bytes, task_bytes)


@fuzzed(0.3)
@given(
    PLAIN_TEXTS,
    st.sampled_from(["line", "blank-line", "file"]),
    SUFFIXES,
    BLOCK_BYTES,
    TASK_BYTES,
)
@example(b"", "file", ".gz", 64, 64)
def test_plain_text_gives_the_documents_of_split(
    folder, data, documents, suffix, block_bytes, task_bytes
):
    source = Source(write(folder, "a.txt", data, suffix), division=documents)
    check(folder, source, expected_from_text(data, documents), block_bytes, task_bytes)


@fuzzed(0.1)
@given(PLAIN_TEXTS, SUFFIXES, BLOCK_BYTES, TASK_BYTES)
def test_a_running_text_is_divided_between_train_and_val(
    folder, data, suffix, block_bytes, task_bytes
):
    source = Source(write(folder, "a.txt", data, suffix))
    text = decode(data)
    if isinstance(text, str) and len(text) > 1:
        train, val, _ = prepare_source(folder, source, block_bytes, task_bytes)
        end_of_train = int(len(text) * 0.9)
        assert train.astype(np.uint8).tobytes() == text[:end_of_train].encode()
        assert val.astype(np.uint8).tobytes() == text[end_of_train:].encode()
    else:
        with pytest.raises(ValueError) as error:
            prepare_source(folder, source, block_bytes, task_bytes)
        line = 0 if isinstance(text, str) else 1 + data[:text].count(b"\n")
        words = f"{source.path}, line {line}: not UTF-8" if line else "fuzz has too little text"
        assert str(error.value).startswith(words)


@st.composite
def tables(draw):
    """Draw the type of a column and its values."""
    kind = draw(
        st.sampled_from(["string", "large_string", "dictionary", "binary", "int64", "null"])
    )
    if kind in ("int64", "null"):
        return kind, draw(st.lists(st.none() if kind == "null" else st.integers(0, 9), max_size=9))
    value = DOCUMENTS.map(lambda text: text.encode(errors="replace"))
    return kind, draw(st.lists(st.none() | value | value | NOT_UTF8, max_size=9))


@fuzzed(0.1)
@given(tables(), st.integers(1, 4), SUFFIXES, TASK_BYTES)
def test_parquet_gives_the_values_of_its_column(folder, table, row_group_size, suffix, task_bytes):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    kind, values = table
    if kind in ("int64", "null"):
        column = pa.array(values, getattr(pa, kind)())
        expected = [i for i, _ in enumerate(values)]
    else:
        column = pa.array(values, pa.large_binary() if kind == "large_string" else pa.binary())
        texts = [None if value is None else decode(value) for value in values]
        if kind == "binary":
            texts = [None] * len(values)
        expected = [text if isinstance(text, str) else i for i, text in enumerate(texts)]
    if kind in ("string", "large_string", "dictionary"):
        strings = pa.large_string() if kind == "large_string" else pa.string()
        column = column.view(strings)  # pyarrow does not check that the bytes are UTF-8
    if kind == "dictionary":
        column = column.dictionary_encode()
    data = io.BytesIO()
    table = pa.table({"n": range(len(values)), "text": column})
    pq.write_table(table, data, row_group_size=row_group_size)
    source = Source(write(folder, "a.parquet", data.getvalue(), suffix), "parquet")
    check(folder, source, expected, 1 << 20, task_bytes)


def test_a_date_that_python_cannot_represent_is_an_invalid_document(folder):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    days = pa.array([1 << 30], pa.int32()).view(pa.date32())
    times = pa.array([1 << 60]).view(pa.timestamp("us"))
    for column in (days, times):
        pq.write_table(pa.table({"text": column}), folder / "a.parquet")
        check(folder, Source(str(folder / "a.parquet"), "parquet"), [0], 1 << 20, 1 << 20)


@fuzzed(0.3)
@given(st.data())
def test_a_table_with_changed_bytes_is_read_or_refused(folder, data):
    """The file has no checksums, so the test cannot check the texts."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"n": range(20), "text": ["some words"] * 20}), file, row_group_size=9)
    changed = bytes(change_bytes(data, file.getvalue()))
    source = Source(write(folder, "a.parquet", changed, ""), "parquet")
    try:
        prepare_source(folder, source, 1 << 20, 100)
    except ValueError as error:
        assert str(error).startswith((source.path, "fuzz has too little text"))
    except OSError as error:  # the file claims a huge size
        assert "GB free: make room there" in str(error)


@fuzzed(0.1)
@given(st.data(), st.sampled_from([".gz", ".zst"]), BLOCK_BYTES)
def test_a_compressed_file_with_changed_bytes_is_an_error_or_harmless(
    folder, data, suffix, block_bytes
):
    """The file is also truncated at a random place."""
    texts = [f"document {i} " * 9 for i in range(30)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    path = write(folder, "a.jsonl", lines, suffix)
    changed = change_bytes(data, Path(path).read_bytes())
    changed = bytes(changed[: data.draw(st.integers(1, len(changed)))])
    Path(path).write_bytes(changed)
    content = decompress(changed, suffix)
    source = Source(path, "jsonl")
    block_bytes = max(64, block_bytes)
    if content is not None:
        check(folder, source, expected_from_jsonl(content), block_bytes, 64)
    else:
        # without a line if the first bytes are not those of the compression format
        with pytest.raises(ValueError, match=rf"{re.escape(path)}(, line \d+|: this is not .*): "):
            prepare_source(folder, source, block_bytes, 64)
