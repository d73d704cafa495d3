"""Readers: files of every format become documents, for any division into chunks."""

import gzip
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import tiktoken
from conftest import read_documents

from common.files import atomic_write
from corpus import reader
from corpus.files import find
from corpus.opening import UnreadableFile, zstd
from corpus.reader import divide, place_of, read
from corpus.sources import InvalidDocument, Source

TEXT = (
    "\n \n = One = \n \n First line , with a word .\nSecond line .\n \n = = Part = = \n \n"
    " More .\n \n = Two = \r\n \n\n\n\t\nÄ é 漢字 。\nx\n \n = Three = \n"
)
LONG_TEXT = "word " * 5000
TEXTS = ["", "one", "two\nlines\r\n", "é" * 50, "\0", "<|endoftext|>", " \n ", LONG_TEXT, "end"]


def documents(source, size):
    """Return the (position, text) pairs of a source that is divided into chunks of `size` bytes."""
    chunks = divide(source, size)
    assert all(num_bytes >= size for _, num_bytes in chunks[:-1])
    return [document for chunk, _ in chunks for document in read_documents(chunk)]


def write(path, data: bytes) -> str:
    """Write a file, compressed if its suffix says so, and return its path."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstd("").compress(data)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 1 << 20])
def test_jsonl_gives_the_same_documents_for_any_chunk_size(tmp_path, size, suffix):
    lines = "\ufeff" + "\n\n".join(json.dumps({"text": text}) for text in TEXTS)
    source = Source(write(tmp_path / f"a.jsonl{suffix}", lines.encode()), "jsonl")
    found = documents(source, size)
    assert [text for _, text in found] == TEXTS  # the last line has no line feed
    assert found == documents(source, 1 << 30)  # the same positions, too


@pytest.mark.parametrize("kind", ["line", "blank-line", "article", "file", ""])
@pytest.mark.parametrize("size", [1, 5, 40, 1 << 20])
def test_plain_text_gives_the_same_documents_for_any_chunk_size(tmp_path, kind, size):
    source = Source(write(tmp_path / "a.txt", TEXT.encode()), division=kind)
    texts = [text for _, text in documents(source, size)]
    expected = {
        "line": [line.removesuffix("\r") for line in TEXT.split("\n") if line.strip()],
        "blank-line": [
            " = One = ", " First line , with a word .\nSecond line .", " = = Part = = ",
            " More .", " = Two = ", "Ä é 漢字 。\nx", " = Three = ",
        ],
        "article": [
            "= One = \n \n First line , with a word .\nSecond line .\n \n = = Part = = \n \n"
            " More .",
            "= Two = \r\n \n\n\n\t\nÄ é 漢字 。\nx", "= Three =",
        ],
    }  # fmt: skip
    if kind == "":
        assert "".join(texts) == TEXT
    else:
        assert texts == expected.get(kind, [TEXT])


@pytest.mark.parametrize("size", [1, 300, 1 << 30])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet_gives_the_same_documents_for_any_chunk_size(tmp_path, size, suffix):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    texts = [f"document {i} " * (i % 7) for i in range(100)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": range(100), "text": texts}), path, row_group_size=9)
    source = Source(write(tmp_path / f"b.parquet{suffix}", path.read_bytes()), "parquet")
    assert [text for _, text in documents(source, size)] == texts
    assert [position for position, _ in documents(source, size)] == list(range(100))
    without_field = Source(source.path, "parquet", field="body", stop=9)
    invalid = [text for _, text in read_documents(without_field)]
    assert len(invalid) == 9  # one for each row
    assert str(invalid[8]).startswith(f"{source.path}, row 8: no field 'body'; it has n, text: ")
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cut\.parquet: a damaged \.parquet file"):
        divide(Source(str(tmp_path / "cut.parquet"), "parquet"), size)


INVALID_LINES = {  # case -> line, reason
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9)"),
    "broken": (b'{"text": "a"', "not JSON"),
    "not an object": (b"[1, 2]", "no field 'text'"),
    "missing field": (b'{"body": 1, "id": 2}', "no field 'text'; it has body, id"),
    "wrong type": (b'{"text": 12}', "the field 'text' is not text, but int"),
    "null": (b'{"text": null}', "NoneType"),
    "deep": (b"[" * 100_000, "not JSON"),
    "a huge number": (b'{"text": ' + b"9" * 5000 + b"}", "not text, but int"),
}


@pytest.mark.parametrize("case", INVALID_LINES)
def test_an_invalid_document_has_a_place_and_a_reason_and_the_next_one_is_read(tmp_path, case):
    line, reason = INVALID_LINES[case]
    data = b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n'
    source = Source(write(tmp_path / "a.jsonl", data), "jsonl")
    (_, first), (position, invalid), (_, last) = read_documents(source)
    assert first == "a"
    assert last == "b"
    assert isinstance(invalid, InvalidDocument)
    assert reason in invalid.reason
    assert invalid.place == f"{source.path}, line 2"
    assert place_of(source, position) == invalid.place
    assert str(invalid) == f"{invalid.place}: {invalid.reason}"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_compressed_file_gives_its_documents_and_then_an_invalid_one(tmp_path, suffix):
    noise = random.Random(0).randbytes(100_000).hex()
    lines = b"".join(
        json.dumps({"text": noise[90 * i : 90 * i + 90]}).encode() + b"\n" for i in range(2000)
    )
    path = tmp_path / f"a.jsonl{suffix}"
    write(path, lines)
    path.write_bytes(path.read_bytes()[:-20_000])
    *whole, (_, bad) = read_documents(Source(str(path), "jsonl"))
    assert whole and not any(isinstance(text, InvalidDocument) for _, text in whole)
    assert [text for _, text in whole] == [noise[90 * i : 90 * i + 90] for i in range(len(whole))]
    assert isinstance(bad, InvalidDocument) and "damaged from here on" in bad.reason


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_of_no_bytes_is_an_invalid_document(tmp_path, suffix):
    """A download that failed leaves such a file; an empty text has a compressed form with bytes."""
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"")
    ((_, invalid),) = read_documents(Source(str(path), "jsonl"))
    assert invalid.reason == "the file has 0 bytes: download it again, or remove it"


def test_a_running_text_gives_the_ids_of_the_whole(tmp_path, monkeypatch, tinyshakespeare):
    """The text has scripts without spaces and is read in small blocks and in chunks of any size."""
    encoding = tiktoken.get_encoding("gpt2")
    monkeypatch.setattr(reader, "BLOCK", 3000)
    text = tinyshakespeare.read_text()[:60_000] + "x" * 20_000 + "漢字。\n" * 3000
    source = Source(write(tmp_path / "a.txt", text.encode()))
    expected = encoding.encode_ordinary(text)
    for size in (5000, 1 << 30):
        parts = [part for _, part in documents(source, size)]
        assert len(parts) > 25
        ids = np.concatenate([encoding.encode_to_numpy(part) for part in parts])
        assert ids.tolist() == expected


def test_a_damaged_compressed_table_is_an_error(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    pytest.importorskip("backports.zstd", reason="needs backports.zstd")
    path = tmp_path / "a.parquet.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd not what it says")
    source = Source(str(path), "parquet")
    with pytest.raises(UnreadableFile, match=r"a.parquet.zst: a damaged .parquet file"):
        divide(source, 1)
    ((_, bad),) = read_documents(source)
    assert bad.place == str(path)
    assert bad.reason.startswith("a damaged .parquet file (the compressed file is damaged")


def test_a_part_of_a_compressed_text_has_the_size_of_the_file(tmp_path):
    """Start and stop are positions in the decompressed text."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some words " * 10_000))
    size = path.stat().st_size
    for part in (Source(str(path), stop=100_000), Source(str(path), start=100_000)):
        assert divide(part, 1000) == [(part, size)]


def test_an_error_inside_a_write_keeps_the_name_of_its_file(tmp_path):
    with pytest.raises(FileNotFoundError) as error, atomic_write(tmp_path / "out.bin"):
        open(tmp_path / "gone.jsonl")
    assert error.value.filename == str(tmp_path / "gone.jsonl")
    assert not list(tmp_path.iterdir())


def test_the_size_of_a_table_is_its_uncompressed_size(tmp_path):
    """A parquet file contains this size; for a .gz file, the reader estimates the size."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    path = tmp_path / "a.parquet"
    texts = ["one for sorrow, two for mirth " * 100] * 1000
    parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)
    ((_, size),) = divide(Source(str(path), "parquet"), 1 << 30)
    assert path.stat().st_size < size / 4  # the file is well compressed
    assert abs(size - sum(map(len, texts))) < size / 50


@pytest.mark.parametrize("rows", [10, 2000, 5000])
def test_a_table_is_read_from_any_row_to_any_row(tmp_path, rows):
    """Streaming may resume at a row in the middle of a row group."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    table = pyarrow.table({"n": range(5000), "text": map(str, range(5000))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=rows)
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=rows)  # `datasets` writes such files
    for kind in ("parquet", "arrow"):
        source = Source(str(tmp_path / f"a.{kind}"), kind)
        for start, stop in ((0, None), (1024, None), (1024, 3000), (4999, 5000), (7, 8)):
            part = replace(source, start=start, stop=stop)
            assert read_documents(part) == [(i, str(i)) for i in range(5000)][start:stop], (
                kind,
                start,
                stop,
            )
        assert documents(source, 9000) == read_documents(source)


def test_a_zst_file_with_a_window_of_2_gib_is_read(tmp_path):
    """`zstd --long=31` writes such files; the test writes the frame by hand."""
    text = b"the same words again\n" * 1000
    header = b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3])  # no size, no checksum; a window of 2^31
    block = (1 | len(text) << 3).to_bytes(3, "little")  # last, not compressed
    path = tmp_path / "a.txt.zst"
    path.write_bytes(header + block + text)
    source = Source(str(path), division="line")
    assert [text for _, text in read_documents(source)] == ["the same words again"] * 1000


def test_lines_are_counted_while_a_chunk_is_read(tmp_path, monkeypatch):
    """The lines before a chunk are counted once, not for each invalid document."""
    lines = [b'{"text": "a"}', b"{broken", b"", b'{"text": 1}'] * 500
    source = Source(write(tmp_path / "a.jsonl", b"\n".join(lines)), "jsonl")
    counted = []
    count_line_feeds = reader._count_line_feeds

    def record(path, stop):
        counted.append(stop)
        return count_line_feeds(path, stop)

    monkeypatch.setattr(reader, "_count_line_feeds", record)
    monkeypatch.setattr(reader, "BLOCK", 700)
    for size in (1 << 20, 5000, 1):
        chunks = [chunk for chunk, _ in divide(source, size)]
        counted.clear()
        found = [document for chunk in chunks for document in read_documents(chunk)]
        places = [text.place for _, text in found if isinstance(text, InvalidDocument)]
        numbers = [n for n, line in enumerate(lines, 1) if line in (lines[1], lines[3])]
        assert places == [f"{source.path}, line {n}" for n in numbers]
        assert len(counted) <= len(chunks)


def test_the_size_of_a_table_counts_the_text_column_only(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    images = [random.Random(i).randbytes(100_000) for i in range(20)]
    table = pyarrow.table({"image": images, "text": ["a few words"] * 20})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    for kind in ("parquet", "arrow"):
        ((_, size),) = divide(Source(str(tmp_path / f"a.{kind}"), kind), 1 << 30)
        assert 0 < size < 1000


def test_long_rows_are_read_a_few_at_a_time(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    texts = [f"{i} " + random.Random(i).randbytes(150_000).hex() for i in range(30)]
    table = pyarrow.table({"text": [*texts, *["short"] * 3000]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=30)
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table, max_chunksize=30)
    for kind in ("parquet", "arrow"):
        groups = [group for _, group in read(Source(str(tmp_path / f"a.{kind}"), kind))]
        assert max(sum(map(len, group)) for group in groups) < 1 << 20
        assert [text for group in groups for text in group] == table["text"].to_pylist()


def test_a_long_text_that_repeats_is_read_a_few_times_at_a_time(tmp_path):
    """A parquet file holds such a text once, so its size does not tell how long the rows are."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    texts = ["lorem ipsum " * 25_000, "short"] * 50
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"), "parquet")
    assert max(sum(map(len, group)) for _, group in read(source)) <= 2 << 20
    assert [document for document in read_documents(source)] == list(enumerate(texts))


def test_a_long_integer_in_another_field_is_no_fault(tmp_path):
    """Python converts no more than 4,300 digits, but JSON has no limit."""
    row = '{"id": [' + "9" * 5000 + '], "text": "one"}'
    (tmp_path / "a.json").write_text(f"{row}\n" + '{"text": ' + "1" * 5000 + "}\n")
    (source,) = find(str(tmp_path / "a.json"))
    (_, first), (_, second) = read_documents(source)
    assert first == "one"
    assert second.reason == "the field 'text' is not text, but int"


def test_a_field_inside_another_one_is_refused_with_the_reason(tmp_path):
    row = '{"meta": {"text": "a"}, "a.b": "dotted"}'
    for field, expected in (("meta.text", "not one inside 'meta'"), ("a.c", "it has meta, a.b")):
        source = Source(write(tmp_path / "a.jsonl", row.encode()), "jsonl", field=field)
        ((_, invalid),) = read_documents(source)
        assert expected in invalid.reason
    assert read_documents(replace(source, field="a.b")) == [(0, "dotted")]


def test_every_row_of_a_table_without_the_column_is_an_invalid_document(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    parquet.write_table(pyarrow.table({"body": ["a"] * 3000}), tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"), "parquet")
    found = [document for chunk, _ in divide(source, 1) for document in read_documents(chunk)]
    assert [position for position, _ in found] == list(range(3000))
    assert str(found[-1][1]).startswith(f"{source.path}, row 2999: no field 'text'; it has body")
