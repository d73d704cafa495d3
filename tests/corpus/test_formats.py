"""Formats: which files are read, which are refused by their first bytes, and damaged files."""

import bz2
import gzip
import io
import json
import lzma
import random
import sqlite3
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import make_tar, read_documents

from batches.streaming import tokenize
from corpus import pipeline, reader, sources
from corpus.engines import open_engine
from corpus.files import find
from corpus.inputs import Corpus
from corpus.opening import UnreadableFile, open_text, zstd
from corpus.reader import divide
from corpus.sources import InvalidDocument, Source
from corpus.tokenizer import get_tokenizer
from corpus.verify import verify

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstd("").compress(data),
}
LINES = b'{"text": "one"}\n\n{"text": "two"}\n'
NAMES = [
    *("a.jsonl", "a.ndjson", "a.jsonlines", "a.jl", "a.json", "A.JSONL", "a.Json"),
    *("a.txt", "a.TXT", "a.parquet", "a.stream.arrow", "a.file.arrow"),
]


def content(name: str) -> bytes:
    """Return a file of the format with the documents "one" and "two"."""
    if name.lower().endswith(".txt"):
        return b"one\ntwo\n"
    if not name.endswith((".parquet", ".arrow")):
        return LINES
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", "two"]})
    data = io.BytesIO()
    if name == "a.parquet":
        parquet.write_table(table, data)
        return data.getvalue()
    new = pyarrow.ipc.new_stream if ".stream" in name else pyarrow.ipc.new_file
    with new(data, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return data.getvalue()


@pytest.mark.parametrize("suffix", [*COMPRESS, ".GZ", ".Bz2"])
@pytest.mark.parametrize("name", NAMES)
def test_each_format_is_read_compressed_and_in_any_case(tmp_path, name, suffix):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix.lower()](content(name)))
    (source,) = find(str(path), division="line")
    assert [text for _, text in read_documents(source)] == ["one", "two"]
    assert find(str(tmp_path), "line") == [source]  # in its folder, too
    ids = tokenize(path, get_tokenizer("bytes"), documents="line").read([0], length=8)[0]
    assert bytes(i % 256 for i in ids.tolist()) == b"one\0two\0"  # 256 ends a text


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESS if suffix])
def test_a_compressed_file_that_is_cut_anywhere_is_damaged(tmp_path, suffix):
    """Also within the first bytes, which are read to find out what the file is."""
    data = COMPRESS[suffix](LINES)
    path = tmp_path / f"a.jsonl{suffix}"
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        found = [text for _, text in read_documents(Source(str(path), "jsonl"))]
        assert isinstance(found[-1], InvalidDocument), size


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_txt_with_json_lines_stays_text(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES))
    (source,) = find(str(path))
    assert "".join(text for _, text in read_documents(source)) == LINES.decode()


NOT_JSON_LINES = {
    "array": b'[{"text": "one"},\n {"text": "two"}]',
    "array on one line": b'\xef\xbb\xbf [{"text": "one"}, {"text": "two"}]\n',
    "long array": b"\n[" + b'{"text": "word"}, ' * 100 + b'{"text": "end"}]',
    "object of several lines": b'{\n "text": "one"\n}\n',
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("case", NOT_JSON_LINES)
def test_a_json_file_without_json_lines_is_refused_with_the_command_that_converts_it(
    tmp_path, case, suffix
):
    path = tmp_path / f"my data.json{suffix}"
    path.write_bytes(COMPRESS[suffix](NOT_JSON_LINES[case]))
    with pytest.raises(ValueError, match="convert it with: ") as error:
        find(str(path))
    assert "\n" not in str(error.value)
    command = str(error.value).split("convert it with: ")[1]
    if "python" in command:  # jq may be missing
        command = command.replace("python", sys.executable)
        subprocess.run(command, shell=True, check=True)
        (source,) = find(str(tmp_path / "my data.jsonl"))
        texts = [text for _, text in read_documents(source)]
        assert texts[0] in ("one", "word")
        assert texts[-1] in ("two", "end")
    else:
        assert "jq -c ." in command
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert str(path) not in [source.path for source in find(str(tmp_path))]


def make_zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.txt", "one\n" * 100)
    return data.getvalue()


def make_sqlite() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table posts (body text)")
        return connection.serialize()


def make_npy() -> bytes:
    data = io.BytesIO()
    np.save(data, np.arange(3))
    return data.getvalue()


def uncompressed_tar() -> bytes:
    return gzip.decompress(make_tar({"a.txt": "one\n"}))


BINARY = {  # name of the file: (content, words of the message)
    "a.tar": (uncompressed_tar, "a tar archive, not text: unpack it with: tar -xf"),
    "a.tar.gz": (lambda: gzip.compress(uncompressed_tar()), r"tar archive.* tar -xf .*a\.tar\.gz$"),
    "a.tgz": (lambda: gzip.compress(uncompressed_tar()), r"tar archive.* tar -xf .*a\.tgz$"),
    "a.txz": (lambda: lzma.compress(uncompressed_tar()), r"tar archive.* tar -xf .*a\.txz$"),
    "a.txt.bz2": (lambda: bz2.compress(uncompressed_tar()), "a tar archive.* tar -xf"),
    "a.txt": (uncompressed_tar, "a tar archive"),
    "a.jsonl": (make_zip, "a zip archive, not text: unpack it with: unzip"),
    "a.zip": (make_zip, "unzip"),
    "a.zip.gz": (lambda: gzip.compress(make_zip()), r"gzip -d .*a\.zip\.gz; then .*unzip .*zip$"),
    "a.7z": (lambda: b"7z\xbc\xaf\x27\x1c\0\4" + bytes(40), "7z x"),
    "a.rar": (lambda: b"Rar!\x1a\x07\x01\x00" + bytes(40), "unrar x"),
    "a.pdf": (lambda: b"%PDF-1.7\n%\xb5\xed", "pdftotext"),
    "a.sqlite": (make_sqlite, "an SQLite database"),
    "a.npy": (make_npy, "a NumPy array"),
    "a.table": (lambda: content("a.parquet"), r"a parquet table.*mv .*a\.table\.parquet$"),
    "b.table": (lambda: content("a.stream.arrow"), "an Arrow table"),
    "c.table": (lambda: content("a.file.arrow"), "an Arrow table"),
    "gzip": (lambda: gzip.compress(b"one"), r"compressed with gzip.*mv .*gzip .*gzip\.gz$"),
    "b.txt": (lambda: bz2.compress(b"one"), r"compressed with bzip2.*b\.txt\.bz2$"),
    "c.jsonl": (lambda: COMPRESS[".zst"](LINES), r"compressed with zstd.*c\.jsonl\.zst$"),
    "text.txt.gz": (lambda: b"one", r"not compressed with gzip.*mv .*text\.txt\.gz .*text\.txt$"),
    "xz.txt.gz": (lambda: lzma.compress(b"one"), r"with xz, not with gzip.*xz\.txt\.xz$"),
    "tar.txt.zst": (uncompressed_tar, "a tar archive"),
    "twice.txt.gz": (lambda: gzip.compress(gzip.compress(b"one")), "compressed twice: .*gzip -d"),
}


@pytest.mark.parametrize("name", BINARY)
def test_a_file_that_is_not_text_is_refused_by_its_first_bytes(tmp_path, monkeypatch, name):
    make, words = BINARY[name]
    path = tmp_path / name
    path.write_bytes(make())
    for division in ("", "line"):
        (source,) = find(str(path), division)
        with pytest.raises(UnreadableFile, match=words) as error:
            divide(source, 1 << 20)
        assert str(error.value).startswith(f"{path}: ")
        assert "iconv" not in str(error.value)
        ((_, invalid),) = read_documents(source)
        assert str(invalid) == str(error.value)
    with pytest.raises(UnreadableFile, match=words):
        tokenize(path, get_tokenizer("bytes"))


@pytest.mark.parametrize("text", ["ustar", "BZh91 is a text", "PAR1 ", "a" * 257 + "ustarde", "7z"])
def test_a_text_with_the_words_of_a_binary_format_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with open_text(str(tmp_path / "a.txt")) as file:
        assert file.read() == text.encode()


def test_binary_bytes_get_no_advice_for_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" + random.Random(0).randbytes(1000))
    for division in ("", "file"):
        texts = [text for _, text in read_documents(Source(str(path), division=division))]
        invalid = [text for text in texts if isinstance(text, InvalidDocument)]
        assert invalid
        assert all("binary data" in text.reason for text in invalid)
        assert not any("iconv" in text.reason for text in invalid)


# white space


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_documents_keep_their_white_space(tmp_path, end):
    lines = ["def f():", "    return 1  ", "\tx", "\u3000段落", "", " ", "  # two", "   last"]
    path = tmp_path / "a.txt"
    for last in ("", end, end + end + " " + end):
        path.write_bytes((end.join(lines) + last).encode())
        for chunk_bytes in (1, 1 << 20):
            for division, expected in (
                ("line", [line for line in lines if line.strip()]),
                ("blank-line", [end.join(lines[:4]), end.join(lines[6:])]),
            ):
                chunks = [
                    chunk for chunk, _ in divide(Source(str(path), division=division), chunk_bytes)
                ]
                assert [text for chunk in chunks for _, text in read_documents(chunk)] == expected


def test_a_corpus_from_before_white_space_was_kept_is_verified_and_prepared_anew(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"    line {i}\n" for i in range(100)))
    with monkeypatch.context() as old:
        old.setitem(reader._PARSERS, "line", reader._decode_stripped)
        old.setattr(sources, "KEEPING_WHITE_SPACE", ())
        prepare(tmp_path / "c", [(path, "text")], "stop")
    verify(tmp_path / "c")
    assert "100 of 100 documents were compared with the source" in capsys.readouterr().out
    metadata, _ = prepare(tmp_path / "c", [(path, "text")], "stop")
    assert "prepared already" not in capsys.readouterr().out
    assert sum(split["bytes"] for split in metadata["splits"].values()) == 10 * 10 + 90 * 11
    verify(tmp_path / "c")
    assert "100 of 100 documents were compared with the source" in capsys.readouterr().out


# byte order mark


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("division", ["", "line", "blank-line", "file"])
def test_a_byte_order_mark_is_not_part_of_a_text(tmp_path, capsys, division, suffix):
    """Tokens, the character at which val begins and --verify are those of the text without it."""
    text = "".join(f"línea {i}\n\n" for i in range(100))
    metadata = {}
    for name, mark in (("with", b"\xef\xbb\xbf"), ("without", b"")):
        for i in range(20):
            path = tmp_path / name / f"{i}.txt{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(COMPRESS[suffix](mark + text[i * 10 :].encode()))
        found = find(str(path.parent), division)
        corpus = Corpus(name, {}, found)
        with open_engine("processes", workers=1) as run_tasks:
            metadata[name] = pipeline.prepare(
                corpus,
                get_tokenizer("bytes"),
                tmp_path / "data" / name,
                run_tasks,
                train_split_ratio=0.5,
            )
        verify(tmp_path / "data" / name)
        assert "the same" in capsys.readouterr().out
        ids = tokenize(path.parent, get_tokenizer("bytes"), documents=division)
        assert 0xEF not in ids.read([0], length=len(ids))
    sizes = [
        sum(split["bytes"] for split in entry["splits"].values()) for entry in metadata.values()
    ]
    assert sizes[0] == sizes[1]
    if not division:  # a document is in another split, because its position is 3 in place of 0
        for split in ("train.bin", "val.bin"):
            files = [(tmp_path / "data" / name / split).read_bytes() for name in metadata]
            assert files[0] == files[1]
    (tmp_path / "only.txt").write_bytes(b"\xef\xbb\xbf")
    (source,) = find(str(tmp_path / "only.txt"), division)
    assert divide(source, 1) == []


# damaged files


def make_source(path, format) -> Source:
    """Return a source of documents."""
    return Source(str(path), format, "line" if format == "text" else "")


def prepare(folder, files, on_error):
    """Prepare (path, format) pairs by bytes, and return (metadata, lines of skipped.txt)."""
    corpus = Corpus("c", {}, [make_source(path, format) for path, format in files])
    with open_engine("processes", workers=1) as run_tasks:
        metadata = pipeline.prepare(
            corpus, get_tokenizer("bytes"), folder, run_tasks, on_error=on_error
        )
    skipped = folder / "skipped.txt"
    return metadata, skipped.read_text().splitlines() if skipped.exists() else []


def noise(n) -> list[str]:
    """Return n texts that cannot be compressed well."""
    return [random.Random(i).randbytes(60).hex() for i in range(n)]


def write_good(path):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in noise(60)))
    return path, "jsonl"


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def change_third(path):
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third : third + 100] = bytes(100)
    path.write_bytes(data)


def write_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": noise(30)})
    parquet.write_table(table, path, row_group_size=10, compression="gzip", use_dictionary=False)


def write_arrow(path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": noise(30)})
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=10)


def write_lines(path):
    path.write_bytes(COMPRESS[path.suffix]("".join(f"{text}\n" for text in noise(3000)).encode()))


DAMAGED = {  # name: (writer, damage, (fewest, most) skipped, words of the first skipped line)
    "cut.parquet": (write_parquet, cut, (1, 1), "a damaged .parquet file"),
    "rows.parquet": (write_parquet, change_third, (10, 10), "row 10: a damaged .parquet file"),
    "cut.arrow": (write_arrow, cut, (1, 1), "a damaged .arrow file"),
    "cut.txt.gz": (write_lines, cut, (1, 1), "damaged from here on"),
    "cut.txt.bz2": (write_lines, cut, (1, 1), "damaged from here on"),
    "cut.txt.xz": (write_lines, cut, (1, 1), "damaged from here on"),
    "cut.txt.zst": (write_lines, cut, (1, 1), "damaged from here on"),
    "bits.txt.bz2": (write_lines, change_third, (1, 1), "damaged from here on"),
    "bits.txt.xz": (write_lines, change_third, (1, 1), "damaged from here on"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_among_others_is_skipped_and_named(tmp_path, name):
    write, damage, (fewest, most), words = DAMAGED[name]
    path = tmp_path / name
    write(path)
    damage(path)
    kind = "text" if ".txt" in name else path.suffix[1:]
    files = [write_good(tmp_path / "a.jsonl"), (path, kind), write_good(tmp_path / "z.jsonl")]
    with pytest.raises(ValueError, match=f"{name}.*{words}.*--on_error skip") as error:
        prepare(tmp_path / "stopped", files, "stop")
    assert "\n" not in str(error.value)
    metadata, skipped = prepare(tmp_path / "skipped", files, "skip")
    assert metadata["skipped"] == len(skipped)
    assert fewest <= len(skipped) <= most
    assert str(path) in skipped[0]
    assert words in skipped[0]
    num_documents = sum(split["documents"] for split in metadata["splits"].values())
    assert num_documents >= 120
    if name == "rows.parquet":
        assert num_documents == 140
    found = [text for _, text in read_documents(make_source(path, kind))]
    texts = [text for text in found if isinstance(text, str)]
    assert len(texts) == num_documents - 120
    assert set(texts) <= set(noise(3000))


def test_an_archive_among_texts_is_skipped_and_named(tmp_path):
    (tmp_path / "b.txt").write_bytes(uncompressed_tar())
    files = [write_good(tmp_path / "a.jsonl"), (tmp_path / "b.txt", "text")]
    with pytest.raises(ValueError, match=r"b\.txt: this is a tar archive.*; --on_error skip"):
        prepare(tmp_path / "stopped", files, "stop")
    assert not (tmp_path / "stopped").exists()
    _, skipped = prepare(tmp_path / "skipped", files, "skip")
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{tmp_path}/b.txt: this is a tar archive")
