"""Inputs: known corpora, files, folders, described data, and the `datasets` library.

Known corpora come from a real server on this machine. The file also tests the flags --list,
--prefetch and --verify of prepare_data.py.
"""

import base64
import concurrent.futures
import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import unittest.mock
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line_error, make_tar, read_documents, run_script
from test_tokenizer import make_json

import prepare_data
from corpus import download, inputs, pipeline
from corpus.archives import unpack
from corpus.catalog import CATALOG
from corpus.descriptions import describe, read_description
from corpus.engines import open_engine
from corpus.files import find
from corpus.inputs import load_corpus
from corpus.metadata import with_checksum
from corpus.sources import InvalidDocument
from corpus.tokenizer import _load, get_tokenizer
from corpus.verify import verify


@pytest.fixture
def serve(server, monkeypatch):
    """A function that makes a known corpus come from the second address of the local server.

    serve("imdb", {"aclImdb_v1.tar.gz": data}) replaces the files of the corpus "imdb".
    """
    fetch = functools.partial(download.download, pause=0.01, tries=2)
    monkeypatch.setattr(inputs, "download", fetch)

    def serve(name, files):
        entry = CATALOG[name]
        downloads = []
        for real, (file, data) in zip(entry.downloads, files.items(), strict=False):
            assert real.urls[0].endswith(f"/{file}")  # the name of the real file
            (server.folder / file).write_bytes(data)
            urls = (f"{server.url}/gone/{file}", f"{server.url}/{file}")
            sha256 = hashlib.sha256(data).hexdigest()
            downloads.append(replace(real, urls=urls, size=len(data), sha256=sha256))
        count = len(downloads) if name.startswith("fineweb") else max(3, len(downloads))
        made = replace(entry, downloads=tuple(downloads), sources=entry.sources[:count])
        monkeypatch.setitem(CATALOG, name, made)

    return serve


def documents(sources) -> dict[str, list[str]]:
    """Return the texts of each split."""
    found = {}
    for source in sources:
        for _, text in read_documents(source):
            assert not isinstance(text, InvalidDocument), text
            found.setdefault(source.split, []).append(text)
    return found


def main(capsys, monkeypatch, *flags) -> str:
    """Run prepare_data.py in this process; return its output or raise its error."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, flags)])
    with unittest.mock.patch.dict(os.environ):  # main() may set TIKTOKEN_CACHE_DIR
        prepare_data.main()
    return capsys.readouterr().out


def file_paths(folder: Path) -> list[str]:
    """Return the sorted relative paths of all files in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# known corpora


ARTICLE = " \n = Title {0} = \n \n Text of {0} . \n \n = = Section = = \n \n More @-@ of {0} . \n"


def make_zip(members) -> bytes:
    """Return a .zip file; members: maps a name to a text."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def make_wikitext(counts=None, name="wikitext-2") -> bytes:
    """Return an archive like the real one.

    Args:
        counts: Maps each official split to its number of articles; 3, 2 and 1 by default.
        name: Name of the corpus.
    """
    counts = counts or {"train": 3, "valid": 2, "test": 1}
    members = {f"{name}-raw/": ""}
    for split, num_articles in reversed(counts.items()):
        articles = [ARTICLE.format(f"{split} {i}") for i in range(num_articles)]
        members[f"{name}-raw/wiki.{split}.raw"] = "".join(articles)
    return make_zip(members)


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
def test_wikitext_keeps_its_splits_and_an_article_is_a_document(serve, server, tmp_path, name):
    serve(name, {f"{name}-raw-v1.zip": make_wikitext(name=name)})
    folder = tmp_path / "data" / name
    corpus = load_corpus(name, folder)
    found = documents(corpus.sources)
    expected = {"train": ("train", 3), "val": ("valid", 2), "test": ("test", 1)}
    for split, (official_name, num_articles) in expected.items():
        titles = [f"{official_name} {i}" for i in range(num_articles)]
        assert found.pop(split) == [ARTICLE.format(title).strip() for title in titles]
    assert found == {}
    assert corpus.has_documents
    assert file_paths(folder) == ["wiki.test.raw", "wiki.train.raw", "wiki.valid.raw"]
    assert server.requested_paths == [f"/gone/{name}-raw-v1.zip", f"/{name}-raw-v1.zip"]
    load_corpus(name, folder)  # no second download
    assert len(server.requested_paths) == 2


def test_several_processes_download_and_unpack_a_corpus_once(serve, server, tmp_path):
    """Threads stand in for the processes: each thread has its own locks."""
    counts = {"train": 3000, "valid": 200, "test": 100}
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": make_wikitext(counts)})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(lambda _: load_corpus("wikitext-2", tmp_path / "c"), range(4)))
    assert len(server.requested_paths) == 2  # the first of the two addresses has no file
    assert file_paths(tmp_path / "c") == ["wiki.test.raw", "wiki.train.raw", "wiki.valid.raw"]
    for corpus in corpora:
        texts = documents(corpus.sources)
        assert {split: len(texts[split]) for split in texts} == {
            "train": 3000, "val": 200, "test": 100
        }  # fmt: skip


def test_wikitext_is_prepared_with_its_three_splits(serve, tmp_path, capsys, monkeypatch):
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": make_wikitext()})
    monkeypatch.chdir(tmp_path)
    main(capsys, monkeypatch, "--corpus", "wikitext-2", "--tokenizer", "bytes", "--workers", 1)
    folder = tmp_path / "data" / "wikitext-2"
    metadata = json.loads((folder / "metadata.json").read_text())
    assert {k: v["documents"] for k, v in metadata["splits"].items()} == {
        "train": 3,
        "val": 2,
        "test": 1,
    }
    text = ARTICLE.format("test 0").strip()
    expected = np.array([*text.encode(), 256], np.uint16)
    assert (folder / "test.bin").read_bytes() == expected.tobytes()
    assert metadata["source"]["licence"] == "CC BY-SA 3.0"


def test_the_real_wikitext_has_60_articles_per_evaluation_split(tinyshakespeare):
    folder = tinyshakespeare.parent / "wikitext-2"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    source = CATALOG["wikitext-2"].sources[1]
    for file in ("valid.txt", "test.txt"):
        texts = [text for _, text in read_documents(replace(source, path=str(folder / file)))]
        assert len(texts) == 60
        assert all(text.startswith("= ") and not text.startswith("= =") for text in texts)
        whole = (folder / file).read_bytes().decode()
        assert sum(len("".join(text.split())) for text in texts) == len("".join(whole.split()))


REVIEWS = {
    "aclImdb/README": "about it",
    "aclImdb/imdb.vocab": "the",
    "aclImdb/test/urls_pos.txt": "http://",
    "aclImdb/test/pos/0_10.txt": "test, good",
    "aclImdb/test/neg/0_2.txt": "test, bad<br />",
    "aclImdb/train/labeledBow.feat": "9 0:9",
    "aclImdb/train/unsupBow.feat": "0 0:9",
    "aclImdb/train/pos/1_7.txt": "train, good\né\r\n",
    "aclImdb/train/neg/1_3.txt": "train, bad",
    "aclImdb/train/unsup/2_0.txt": "unlabelled",
}


def test_imdb_has_train_unlabelled_and_test_reviews(serve, tmp_path):
    serve("imdb", {"aclImdb_v1.tar.gz": make_tar(REVIEWS)})
    folder = tmp_path / "imdb"
    corpus = load_corpus("imdb", folder)
    assert documents(corpus.sources) == {
        "": ["train, good\né\r\n", "train, bad", "unlabelled"],  # divided between train and val
        "test": ["test, good", "test, bad<br />"],
    }
    assert [source.number for source in corpus.sources] == [0, 1, 2]
    assert file_paths(folder) == ["test.jsonl", "train.jsonl", "unlabelled.jsonl"]


def test_fineweb_is_a_list_of_parquet_files(serve, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert len(CATALOG["fineweb-edu-10BT"].downloads) == 14
    files = {}
    for i in range(2):
        data = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": [f"{i} a", f"{i} b"], "id": [0, 1]}), data)
        files[f"{i:03}_00000.parquet"] = data.getvalue()
    serve("fineweb-edu-10BT", files)
    corpus = load_corpus("fineweb-edu-10BT", tmp_path / "c")
    assert documents(corpus.sources) == {"": ["0 a", "0 b", "1 a", "1 b"]}
    assert file_paths(tmp_path / "c") == list(files)


def test_an_archive_with_another_sha256_is_refused(serve, server, tmp_path):
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": make_wikitext()})
    data = bytearray((server.folder / "wikitext-2-raw-v1.zip").read_bytes())
    data[100] ^= 1
    (server.folder / "wikitext-2-raw-v1.zip").write_bytes(data)
    with pytest.raises(ConnectionError, match=r"another file: its sha256.*--prefetch"):
        load_corpus("wikitext-2", tmp_path / "c")
    assert file_paths(tmp_path / "c") == []


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_no_member_of_an_archive_leaves_the_folder(tmp_path, make):
    hostile = {
        "../evil.txt": "x",
        "/tmp/evil-of-test-corpora.txt": "x",
        "aclImdb/train/pos/../../../../evil.txt": "x",
        "aclImdb/train/pos/1_7.txt": "good",
    }
    if make is make_tar:
        hostile |= {
            "aclImdb/train/pos/2_7.txt": (tarfile.SYMTYPE, "/etc/passwd"),
            "aclImdb/train/pos/3_7.txt": (tarfile.LNKTYPE, "/etc/passwd"),
            "aclImdb/train/pos/4_7.txt": (tarfile.CHRTYPE, ""),
            "aclImdb/train/pos/5_7.txt": (tarfile.FIFOTYPE, ""),
        }
    (tmp_path / "in").mkdir()
    archive = tmp_path / "in" / "archive"
    archive.write_bytes(make(hostile))
    members = dict(CATALOG["imdb"].downloads[0].members[:1])
    unpack(archive, tmp_path / "in", members)
    assert file_paths(tmp_path) == ["in/archive", "in/train.jsonl"]
    assert [json.loads(line)["text"] for line in open(tmp_path / "in" / "train.jsonl")] == ["good"]
    assert not Path("/tmp/evil-of-test-corpora.txt").exists()


@pytest.mark.parametrize("target", ["out.raw", "out.jsonl"])
@pytest.mark.parametrize("members", [1, 100])
def test_an_archive_that_expands_too_much_is_refused(tmp_path, target, members):
    """Each of a hundred members stays below the limit, and their sum exceeds the limit."""
    data = make_zip({f"{i}.txt": "a" * (4_000_000 // members) for i in range(members)})
    assert 4_000_000 // 100 < 100 * len(data) < 4_000_000
    (tmp_path / "bomb.zip").write_bytes(data)
    with pytest.raises(ValueError, match="grows to more than 100 times its size"):
        unpack(tmp_path / "bomb.zip", tmp_path, {r"\d+\.txt": target})
    assert file_paths(tmp_path) == ["bomb.zip"]


def test_an_archive_without_the_expected_member_is_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(make_zip({"other.txt": "x"}))
    with pytest.raises(ValueError, match=r"a\.zip has no file for out\.raw"):
        unpack(tmp_path / "a.zip", tmp_path, {r"wanted\.txt": "out.raw"})
    assert file_paths(tmp_path) == ["a.zip"]


def test_list_shows_size_licence_and_home_page(capsys, monkeypatch):
    head, *lines = main(capsys, monkeypatch, "--list").splitlines()
    assert head.split() == ["name", "download", "licence", "home"]
    rows = {line.split()[0]: line for line in lines}
    expected = {
        "tinyshakespeare": ("1.1 MB", "public domain", "https://github.com/karpathy/char-rnn"),
        "wikitext-2": ("4.7 MB", "CC BY-SA 3.0", "https://huggingface.co/datasets/Salesforce"),
        "wikitext-103": ("192.0 MB", "CC BY-SA 3.0", "https://huggingface.co/datasets/Salesforce"),
        "imdb": ("84.1 MB", "not stated", "https://ai.stanford.edu/~amaas/data/sentiment/"),
        "fineweb-edu-10BT": ("28.5 GB", "ODC-By 1.0", "https://huggingface.co/datasets/Hugging"),
        "python-docs": ("nothing", "PSF-2.0", "Python's own documentation"),
    }
    assert rows.keys() == expected.keys()
    for name, words in expected.items():
        assert all(word in rows[name] for word in words), rows[name]


def test_every_download_of_the_catalog_has_mirrors_size_and_checksum():
    for name, entry in CATALOG.items():
        for download_file in entry.downloads:
            hosts = {url.split("/")[2] for url in download_file.urls}
            assert len(hosts) == len(download_file.urls) >= 2, name
            if "fineweb" not in name:  # the hub sends the sizes and checksums of fineweb
                assert download_file.size
                assert len(download_file.sha256) == 64


def test_the_built_in_corpus_is_not_prepared_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--corpus", "python-docs", "--tokenizer", "bytes", "--workers", 1]
    main(capsys, monkeypatch, *flags)
    assert "prepared already" in main(capsys, monkeypatch, *flags)


# files of the user


def json_line(text, field="text"):
    """Return a line of a .jsonl file."""
    return json.dumps({field: text, "id": 7}) + "\n"


def compress_zst(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(data)


def make_parquet(texts, field="text") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({field: texts}), file)
    return file.getvalue()


FILES = {
    "a.jsonl": lambda: json_line("a").encode(),
    "b.jsonl.gz": lambda: gzip.compress(json_line("b").encode()),
    "c.jsonl.zst": lambda: compress_zst(json_line("c").encode()),
    "d.txt": lambda: b"d\n",
    "e.txt.gz": lambda: gzip.compress(b"e\n"),
    "f.txt.zst": lambda: compress_zst(b"f\n"),
    "g.parquet": lambda: make_parquet(["g"]),
    "h.parquet.gz": lambda: gzip.compress(make_parquet(["h"])),
    "i.parquet.zst": lambda: compress_zst(make_parquet(["i"])),
    "J.JSONL": lambda: json_line("J").encode(),
}


@pytest.mark.parametrize("file", FILES)
def test_one_file_of_each_format(tmp_path, file):
    (tmp_path / file).write_bytes(FILES[file]())
    (source,) = find(str(tmp_path / file), division="line")
    assert [text for _, text in read_documents(source)] == [file[0]]
    if ".txt" in file:
        assert (source.format, source.division) == ("text", "line")
    else:
        assert (source.format, source.division) == (file.lower().split(".")[1], "")
    assert documents(find(str(tmp_path), "line")) == {"": [file[0]]}  # the folder of the file


def test_files_folders_and_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("raw/b.jsonl", "raw/a.jsonl", "raw/deep/er/c.jsonl", "raw/.hidden/x.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json_line(Path(name).stem))
    Path("raw/.y.jsonl").write_text(json_line("y"))
    Path("raw/notes.md").write_text("not taken")
    Path("lone").write_text("without a suffix: a text")

    def names(*items):
        sources = load_corpus("x", tmp_path, items, "file").sources
        return [Path(source.path).name for source in sources]

    assert names("raw") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names("raw/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("raw/**/*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names("raw/[ab].jsonl", "lone") == ["a.jsonl", "b.jsonl", "lone"]
    assert names("raw/b.jsonl", "raw/a.jsonl") == ["b.jsonl", "a.jsonl"]  # in the order given
    numbers = [s.number for s in load_corpus("x", tmp_path, ["raw", "lone"], "file").sources]
    assert numbers == [0, 1, 2, 3]


def test_a_file_with_several_links_in_a_folder_is_read_once(tmp_path):
    (tmp_path / "raw" / "a").mkdir(parents=True)
    (tmp_path / "raw" / "a" / "x.jsonl").write_text(json_line("x"))
    (tmp_path / "raw" / "a" / "back").symlink_to("..")  # a circle
    (tmp_path / "raw" / "b.jsonl").symlink_to("a/x.jsonl")  # the shortest way
    (tmp_path / "elsewhere.jsonl").write_text(json_line("y"))
    (tmp_path / "raw" / "c.jsonl").symlink_to("../elsewhere.jsonl")
    found = find(str(tmp_path / "raw"))
    assert [source.path for source in found] == [
        f"{tmp_path}/raw/{name}" for name in ("b.jsonl", "c.jsonl")
    ]


def test_the_name_of_a_corpus_comes_from_its_first_input():
    expected = {
        "a/my.txt": "my",
        "a/my.jsonl.gz": "my",
        "a/my.parquet.zst": "my",
        "a/my.v2.NDJSON.Bz2": "my.v2",
        "a/my.json": "my",
        "a/my.md.xz": "my.md",
        "a/raw/": "raw",
        "a/raw/*.txt": "raw",
        "a/raw/**/*.txt": "raw",
        "a/raw/[ab]?.txt": "raw",
        "a/pile:arxiv": "pile-arxiv",
        "hf:org/name/config": "org-name-config",
    }
    assert {item: prepare_data.name_of([item]) for item in expected} == expected


def test_text_field_names_the_field_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_line("a", "body"))
    (tmp_path / "b.parquet").write_bytes(make_parquet(["b"], "body"))
    assert documents(find(str(tmp_path), text_field="body")) == {"": ["a", "b"]}
    ((_, text),) = read_documents(find(str(tmp_path))[0])
    assert isinstance(text, InvalidDocument)
    assert "body" in text.reason
    assert "--text_field" in text.reason


def test_a_running_text_beside_documents_needs_a_flag(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_line("a"))
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=r"b\.txt is one running text.*--documents"):
        _ = load_corpus("x", tmp_path, [str(tmp_path)]).has_documents
    assert load_corpus("x", tmp_path, [str(tmp_path)], "file").has_documents
    assert not load_corpus("x", tmp_path, [str(tmp_path / "b.txt")]).has_documents


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("nope.txt", "nope.txt: no such file"),
        ("raw/*.nope", r"raw/\*\.nope: no such file or folder, and no glob"),
        ("empty", r"empty has no .txt, .jsonl or .parquet"),
        ("raw:arxiv", "raw has no description.*--describe raw"),
        ("nope:arxiv", "nope:arxiv: no such file"),
        ("hf:nope", "hf:nope: "),
    ],
)
def test_an_input_that_names_no_source_is_an_error(tmp_path, monkeypatch, item, words):
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch, tmp_path)
    Path("raw").mkdir()
    Path("raw/a.txt").write_text("a")
    Path("empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        find(item)
    assert "\n" not in str(error.value)


def test_a_known_corpus_takes_at_most_one_file(tmp_path):
    with pytest.raises(ValueError, match="tinyshakespeare is one file"):
        load_corpus("tinyshakespeare", tmp_path, ["a.txt", "b.txt"])
    with pytest.raises(ValueError, match=r"'nope': choose one of tinyshakespeare, .*python-docs"):
        load_corpus("nope", tmp_path)


# the `datasets` library


def offline(monkeypatch, tmp_path):
    """Make `datasets` work offline.

    `datasets` reads the environment at its import, so this function changes its settings instead.
    """
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write_jsonl(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(json_line, texts)))


def test_datasets_keeps_the_splits_of_a_local_folder(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    folder = tmp_path / "mine"
    write_jsonl(folder / "train.jsonl", "a", "b")
    assert documents(find(f"hf:{folder}")) == {"": ["a", "b"]}  # one split is divided
    write_jsonl(folder / "test.jsonl", "t")
    assert documents(find(f"hf:{folder}")) == {"": ["a", "b"], "test": ["t"]}
    write_jsonl(folder / "validation.jsonl", "v")
    expected = {"train": ["a", "b"], "val": ["v"], "test": ["t"]}
    found = find(f"hf:{folder}")
    assert documents(found) == expected
    # no path of this machine, and no hash of all files of the data set
    assert {source.name for source in found} == {
        f"default/{s}" for s in ("train", "validation", "test")
    }


CARD = """---
configs:
- config_name: first
  data_files: [{split: train, path: one.jsonl}]
- config_name: second
  data_files: [{split: train, path: two.jsonl}, {split: extra, path: three.jsonl}]
---
"""


def test_datasets_reads_one_config_of_a_folder(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    folder = tmp_path / "mine"
    for name in ("one", "two", "three"):
        write_jsonl(folder / f"{name}.jsonl", name)
    (folder / "README.md").write_text(CARD)
    assert documents(find(f"hf:{folder}/first")) == {"": ["one"]}
    assert documents(find(f"hf:{folder}/second")) == {"": ["two"]}  # without extra
    with pytest.raises(ValueError, match=r"third.*first.*second") as error:
        find(f"hf:{folder}/third")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"onfig.*first.*second"):
        find(f"hf:{folder}")


def test_a_folder_is_prepared_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "mine" / "train.jsonl", *(f"document {i}" for i in range(50)))
    write_jsonl(tmp_path / "mine" / "validation.jsonl", "v")
    write_jsonl(tmp_path / "mine" / "test.jsonl", "t")
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    flags = ["--input", "hf:mine", "--tokenizer", "bytes", "--workers", 1]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "data" / "mine"
    assert (folder / "test.bin").read_bytes() == np.array([ord("t"), 256], np.uint16).tobytes()
    assert (folder / "val.bin").read_bytes() == np.array([ord("v"), 256], np.uint16).tobytes()
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["splits"]["train"]["documents"] == 50


def test_a_running_text_beside_documents_is_a_one_line_error(tmp_path):
    write_jsonl(tmp_path / "mine" / "a.jsonl", "a")
    (tmp_path / "mine" / "b.txt").write_text("b")
    flags = ["--input", "mine", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert_one_line_error(result, "b.txt is one running text", "--documents")
    assert file_paths(tmp_path) == ["mine/a.jsonl", "mine/b.txt"]


def test_a_damaged_file_in_datasets_is_a_one_line_error(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    write_jsonl(tmp_path / "mine" / "train.jsonl", "a")
    with open(tmp_path / "mine" / "train.jsonl", "a") as f:
        f.write("{damaged\n")
    with pytest.raises(ValueError, match="hf:") as error:
        find(f"hf:{tmp_path / 'mine'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "item"),
    [("datasets", "hf:x"), ("pyarrow", "x.parquet"), ("backports.zstd", "x.txt.zst")],
)
def test_a_missing_package_is_an_error_that_names_it(tmp_path, monkeypatch, module, item):
    if module == "backports.zstd" and sys.version_info >= (3, 14):
        pytest.skip("Python 3.14 contains zstd")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    Path("x.parquet").write_bytes(b"PAR1")
    Path("x.txt.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"pip install {module.split('.')[0]}"):
        read_documents(find(item)[0])


# described data


TATM = """content_field: body
corpus_separation_strategy: data_dirs
corpuses:
- arxiv
- books
data_content: text
dataset_path: tests/data/elsewhere
date_downloaded: '2021-01-01'
description: A test data set.
download_source: http://example.com
name: pile
"""


def make_pile(folder: Path) -> Path:
    """Write a folder with three sub-corpora of one document each."""
    for name in ("arxiv", "books", "drafts"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jsonl").write_text(json_line(name, "body"))
    return folder


def test_a_folder_described_by_flags_has_its_sub_corpora(tmp_path, capsys, monkeypatch):
    folder = make_pile(tmp_path / "pile")
    flags = ["--describe", folder, "--corpus", "my pile", "--source", "http://example.com"]
    flags += ["--description", "what it is", "--text_field", "body"]
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked {question}"))
    main(capsys, monkeypatch, *flags, "--sub_corpora", "arxiv, books")
    description = json.loads((folder / "metadata.json").read_text())
    assert len(description.pop("date_downloaded")) == len("2026-01-31")
    assert description == {
        "name": "my pile",
        "dataset_path": ".",
        "description": "what it is",
        "download_source": "http://example.com",
        "data_content": "text",
        "content_field": "body",
        "corpuses": ["arxiv", "books"],
        "corpus_separation_strategy": "data_dirs",
        "corpus_data_dir_parent": None,
    }
    assert documents(find(str(folder))) == {"": ["arxiv", "books"]}
    assert documents(find(f"{folder}:books")) == {"": ["books"]}
    with pytest.raises(ValueError, match="no sub-corpus 'drafts'; its sub-corpora: arxiv, books"):
        find(f"{folder}:drafts")
    monkeypatch.chdir(tmp_path)
    Path("pile/metadata.json").unlink()
    main(capsys, monkeypatch, *flags, "--sub_corpora", "-")  # none: the folder is one corpus
    assert documents(find("pile")) == {"": ["arxiv", "books", "drafts"]}
    with pytest.raises(ValueError, match="no sub-corpus 'arxiv'; its sub-corpora: none"):
        find("pile:arxiv")


def test_a_folder_is_described_by_standard_input(tmp_path):
    folder = make_pile(tmp_path / "pile")
    answers = "arxiv\n\nhttp://example.com\nwhat it is\nbody\n"
    result = run_script("prepare_data.py", "--describe", folder, cwd=tmp_path, input=answers)
    assert result.returncode == 0, result.stderr
    description = json.loads((folder / "metadata.json").read_text())
    assert description["name"] == "pile"
    assert description["corpuses"] == ["arxiv"]
    assert "wrote" in result.stdout
    assert "arxiv,books,drafts" in result.stdout
    assert documents(find(str(folder))) == {"": ["arxiv"]}
    result = run_script("prepare_data.py", "--describe", folder, cwd=tmp_path)
    assert_one_line_error(result, "pile/metadata.json exists already: edit it, or remove it")
    (folder / "metadata.json").unlink()
    result = run_script("prepare_data.py", "--describe", folder, cwd=tmp_path, input="\n\n")
    assert_one_line_error(result, "standard input ended", "origin of the text")
    result = run_script("prepare_data.py", "--describe", "nope", cwd=tmp_path)
    assert_one_line_error(result, "nope is not a folder")


ANSWERS = {"name": "n", "download_source": "s", "description": "d", "content_field": "text"}


def test_describing_a_folder_without_subfolders_asks_for_no_sub_corpora(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked {question}"))
    describe(tmp_path, ANSWERS | {"corpuses": ""})
    assert read_description(tmp_path).corpora == ()
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(ValueError, match="no folder for the sub-corpus 'a'"):
        describe(tmp_path, ANSWERS | {"corpuses": "a"})


def test_describing_leaves_other_metadata_alone(tmp_path):
    (tmp_path / "metadata.json").write_text('{"format_version": 1}')  # a prepared corpus
    with pytest.raises(FileExistsError, match=r"metadata\.json exists already"):
        describe(tmp_path, dict(ANSWERS))
    assert (tmp_path / "metadata.json").read_text() == '{"format_version": 1}'


def test_a_description_by_tatm_is_read(tmp_path):
    pytest.importorskip("yaml")
    folder = make_pile(tmp_path / "pile")
    (folder / "metadata.yaml").write_text(TATM)
    assert documents(find(str(folder))) == {"": ["arxiv", "books"]}
    assert documents(find(f"{folder}:arxiv")) == {"": ["arxiv"]}
    assert find(f"{folder}:arxiv", text_field="other")[0].field == "other"
    (folder / "deep").mkdir()
    shutil.move(folder / "arxiv", folder / "deep" / "arxiv")
    (folder / "metadata.yaml").write_text(TATM + "corpus_data_dir_parent: deep\n")
    assert documents(find(f"{folder}:arxiv")) == {"": ["arxiv"]}


def test_a_description_by_configs_is_read_by_datasets(tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    offline(monkeypatch, tmp_path)
    folder = tmp_path / "mine"
    for name in ("one", "two", "three"):
        write_jsonl(folder / f"{name}.jsonl", name)
    (folder / "README.md").write_text(CARD)
    description = TATM.replace("data_dirs", "configs").replace("body", "text")
    description = description.replace("arxiv", "first").replace("books", "second")
    (folder / "metadata.yaml").write_text(description)
    assert documents(find(f"{folder}:first")) == {"": ["one"]}
    assert documents(find(str(folder))) == {"": ["one", "two"]}  # without extra


@pytest.mark.parametrize("name", ["../outside", "/", ".", "link"])
def test_a_sub_corpus_outside_its_folder_is_refused(tmp_path, name):
    folder = make_pile(tmp_path / "pile")
    make_pile(tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    description = ANSWERS | {"data_content": "text", "corpuses": [name]}
    (folder / "metadata.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="has no folder for its sub-corpus"):
        find(str(folder))


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("metadata.json", "{", r"metadata\.json is damaged"),
        ("metadata.yaml", "name: [", r"metadata\.yaml is damaged"),
        ("metadata.yaml", "name: \xff\nx: {{}}: y", r"metadata\.yaml is damaged"),
        ("metadata.json", json.dumps(ANSWERS | {"data_content": "images"}), "'images', not text"),
        (
            "metadata.json",
            json.dumps(ANSWERS | {"data_content": "text", "corpuses": [1]}),
            "all be text",
        ),
    ],
)
def test_a_damaged_description_is_a_one_line_error(tmp_path, file, text, words):
    if file.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        find(str(tmp_path))
    assert "\n" not in str(error.value)


# --prefetch


def test_a_prefetched_corpus_is_prepared_without_a_network(
    serve, tmp_path, capsys, monkeypatch, gpt2_tokenizer
):
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": make_wikitext()})
    monkeypatch.chdir(tmp_path)
    out = main(capsys, monkeypatch, "--corpus", "wikitext-2", "--prefetch", "usb")
    assert "--data_dir" in out and "--corpus wikitext-2" in out and "--tokenizer gpt2" in out
    assert len(list(Path("usb/tokenizers").iterdir())) == 2  # a copy of the local vocabulary
    assert sorted(p.name for p in Path("usb").iterdir()) == ["tokenizers", "wikitext-2"]
    flags = ["--corpus", "wikitext-2", "--data_dir", "usb"]
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    result = run_script("prepare_data.py", *flags, "--workers", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = Path("usb/wikitext-2")
    text = ARTICLE.format("test 0").strip()
    expected = np.array([*gpt2_tokenizer.encode(text), 50256], np.uint16)
    assert (folder / "test.bin").read_bytes() == expected.tobytes()


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_a_failed_prefetch_says_what_it_leaves(
    serve, server, tmp_path, capsys, monkeypatch, gpt2_tokenizer, tokenizer
):
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": make_wikitext()})
    (server.folder / "wikitext-2-raw-v1.zip").unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConnectionError, match="--prefetch needs a network") as error:
        flags = ("--prefetch", "usb", "--tokenizer", tokenizer)
        main(capsys, monkeypatch, "--corpus", "wikitext-2", *flags)
    if tokenizer == "bytes":
        assert not Path("usb").exists()
    else:
        assert "usb is incomplete: it has only tokenizers/" in str(error.value)
        assert [path.name for path in Path("usb").iterdir()] == ["tokenizers"]


def test_prefetch_copies_a_tokenizer_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "here"))
    lines = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    Path("my.tiktoken").write_bytes(b"".join(lines))
    flags = ["--corpus", "python-docs", "--prefetch", "usb", "--tokenizer", "my.tiktoken"]
    out = main(capsys, monkeypatch, *flags)
    Path("my.tiktoken").unlink()
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    flags = out.split("prepare_data.py ")[1].splitlines()[0].split()  # the printed command
    main(capsys, monkeypatch, *flags, "--workers", 1)
    assert file_paths(Path("usb/tokenizers")) == [flags[-1]]
    assert Path("usb/python-docs/train.bin").exists()


# --verify


def prepare(folder: Path, *inputs, tokenizer="bytes", **options) -> Path:
    """Prepare files as the corpus `folder` in this process, and return the folder."""
    names = {"division", "text_field"} & options.keys()
    corpus_options = {name: options.pop(name) for name in names}
    corpus = load_corpus("c", folder, [str(path) for path in inputs], **corpus_options)
    with open_engine("processes", workers=1) as run_tasks:
        pipeline.prepare(corpus, get_tokenizer(tokenizer), folder, run_tasks, **options)
    return folder


TEXT = "".join(f"Line {i}, é日🜨.\n" for i in range(500))


def make_sources(folder: Path) -> dict:
    """Write sources and return the files and the options of prepare() for each kind of corpus."""
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text("another text " * 50)
    rows = "".join(json_line(f"document {i}") for i in range(300))
    (folder / "c.jsonl").write_text(rows)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(rows.replace("doc", "zipped doc").encode()))
    with_invalid_line = json_line("good") + "{bad\n" + json_line("") + json_line("better") * 99
    (folder / "e.jsonl").write_text(with_invalid_line)
    return {
        "running text": (["a.txt", "b.txt"], {}),
        "lines": (["a.txt"], {"division": "line"}),
        "truncated documents": (["c.jsonl"], {"max_length": 10}),
        "several files": (["c.jsonl", "d.jsonl.gz", "a.txt"], {"division": "file"}),
        "skipped": (["e.jsonl"], {"on_error": "skip"}),
    }


KINDS_OF_CORPUS = ["running text", "lines", "truncated documents", "several files", "skipped"]


@pytest.mark.parametrize("kind", KINDS_OF_CORPUS)
def test_a_good_corpus_is_verified(tmp_path, capsys, kind):
    files, options = make_sources(tmp_path)[kind]
    folder = prepare(tmp_path / "c", *(tmp_path / file for file in files), **options)
    capsys.readouterr()
    verify(folder)
    *splits, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in splits] == ["train", "val"]
    counts = {"running text": "whole text", "lines": "500", "truncated documents": "300"}
    counts |= {"several files": "601", "skipped": "101"}
    assert counts[kind] in last
    assert last.endswith("compared with the source: the same")


def test_a_table_is_verified(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(make_parquet([f"document {i}" for i in range(50)]))
    verify(prepare(tmp_path / "c", tmp_path / "a.parquet"))
    assert "50 of 50 documents were compared" in capsys.readouterr().out


def change_byte(path: Path, position: int, value=None) -> None:
    """Set one byte of a file, or change_byte its lowest bit if no value is given."""
    data = bytearray(path.read_bytes())
    data[position] = data[position] ^ 1 if value is None else value
    overwrite(path, bytes(data))


def overwrite(path: Path, data: bytes) -> None:
    """Change a file as a broken disk does: the modification time stays."""
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before, before))


def update_sha256(folder: Path, split="train") -> None:
    """Write the sha256 of a changed file into metadata.json."""
    metadata = json.loads((folder / "metadata.json").read_text())
    data = (folder / f"{split}.bin").read_bytes()
    metadata["splits"][split]["files"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "metadata.json").write_text(json.dumps(with_checksum(metadata)))


@pytest.mark.parametrize("kind", KINDS_OF_CORPUS)
def test_verify_finds_what_changed(tmp_path, kind):
    files, options = make_sources(tmp_path)[kind]
    files = [tmp_path / file for file in files]
    folder = prepare(tmp_path / "c", *files, **options)
    verify(folder)
    ids = np.fromfile(folder / "train.bin", np.uint16)
    # the position of a letter, not of an end of text
    position = 10 + 2 * int(np.argmax(ids[5:] < 256))
    change_byte(folder / "train.bin", position)
    with pytest.raises(ValueError, match=r"train\.bin: its sha256 differs"):
        verify(folder)
    update_sha256(folder)  # the comparison of the text finds a wrong id with a correct checksum
    with pytest.raises(ValueError, match="differs from the source"):
        verify(folder)
    change_byte(folder / "train.bin", position)
    change_byte(folder / "train.bin", position + 1, 1)
    update_sha256(folder)
    with pytest.raises(ValueError, match=r"id \d+ is outside the vocabulary|end-of-text tok"):
        verify(folder)
    change_byte(folder / "train.bin", position + 1, 0)
    update_sha256(folder)
    verify(folder)
    source = files[0]
    good = source.read_bytes()
    if b"9" in good:
        change_byte(source, good.index(b"9"), ord("8"))
    else:
        change_byte(source, 11)
    with pytest.raises(ValueError, match="differs from the source"):
        verify(folder)
    overwrite(source, good)
    verify(folder)


def test_verify_finds_documents_missing_at_the_end_of_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json_line(f"document {i}") for i in range(100)))
    folder = prepare(tmp_path / "c", tmp_path / "a.jsonl")
    data = (tmp_path / "a.jsonl").read_bytes()
    last = len(data.splitlines(keepends=True)[-1])
    overwrite(tmp_path / "a.jsonl", data[:-last] + b" " * last)
    with pytest.raises(ValueError, match="number of documents"):
        verify(folder)


def test_verify_says_that_the_source_is_missing_or_changed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    folder = prepare(tmp_path / "c", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("of another length")
    verify(folder)
    assert "is missing or has changed" in capsys.readouterr().out
    (tmp_path / "a.txt").unlink()
    verify(folder)
    out = capsys.readouterr().out
    assert "train" in out
    assert "is missing or has changed" in out


@pytest.mark.parametrize("division", ["", "line"])
def test_a_corpus_of_a_tokenizer_that_changes_the_text_is_verified(
    tmp_path, monkeypatch, capsys, division
):
    """The ids of a tokenizer.json with Lowercase do not decode to the source."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "kept"))
    made = make_json(tmp_path / "mine.json")
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.save(str(tmp_path / "mine.json"))
    (tmp_path / "a.txt").write_text(TEXT)
    folder = tmp_path / "c"
    tokenizer = str(tmp_path / "mine.json")
    prepare(folder, tmp_path / "a.txt", tokenizer=tokenizer, division=division, max_length=0)
    verify(folder)
    words = "500 documents were" if division else "the whole text was"
    assert f"{words} compared with the source" in capsys.readouterr().out
    change_byte(tmp_path / "a.txt", TEXT.index("9"), ord("8"))
    with pytest.raises(ValueError, match="differs from the source"):
        verify(folder)


def test_verify_finds_another_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "kept"))
    lines = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    (tmp_path / "my.tiktoken").write_bytes(b"".join(lines))
    (tmp_path / "a.txt").write_text(TEXT)
    folder = prepare(tmp_path / "c", tmp_path / "a.txt", tokenizer=str(tmp_path / "my.tiktoken"))
    verify(folder)
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes() + base64.b64encode(b"ab") + b" 256\n")
    _load.cache_clear()  # another process has an empty cache
    with pytest.raises(ValueError, match="another vocabulary"):
        verify(folder)


def test_the_flag_verify_reports_the_result(tmp_path):
    (tmp_path / "data" / "c").mkdir(parents=True)
    (tmp_path / "a.txt").write_text(TEXT)
    prepare(tmp_path / "data" / "c", tmp_path / "a.txt")
    result = run_script("prepare_data.py", "--verify", "c", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "the same" in result.stdout
    change_byte(tmp_path / "data" / "c" / "val.bin", 0)
    result = run_script("prepare_data.py", "--verify", "c", cwd=tmp_path)
    assert_one_line_error(result, "val.bin", "sha256", "run python prepare_data.py again")
    assert_one_line_error(run_script("prepare_data.py", "--verify", "d", cwd=tmp_path), "data/d")
