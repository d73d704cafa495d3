"""Where text comes from: known corpora off a real server on this machine, files, folders, described
data, the `datasets` library; and prepare_data.py's --list, --prefetch and --verify."""

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
from conftest import assert_one_line_error, flat, run_script, tar_of
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
    """serve("imdb", {"aclImdb_v1.tar.gz": data}): the known corpus comes from the local server,
    from its second mirror."""
    fetch = functools.partial(download.download, pause=0.01, tries=2)
    monkeypatch.setattr(inputs, "download", fetch)

    def serve(name, files):
        entry = CATALOG[name]
        downloads = []
        for real, (file, data) in zip(entry.downloads, files.items(), strict=False):
            assert real.urls[0].endswith(f"/{file}")  # the name that the real one has
            (server.folder / file).write_bytes(data)
            urls = (f"{server.url}/gone/{file}", f"{server.url}/{file}")
            sha256 = hashlib.sha256(data).hexdigest()
            downloads.append(replace(real, urls=urls, size=len(data), sha256=sha256))
        count = len(downloads) if name.startswith("fineweb") else max(3, len(downloads))
        made = replace(entry, downloads=tuple(downloads), sources=entry.sources[:count])
        monkeypatch.setitem(CATALOG, name, made)

    return serve


def documents(sources) -> dict[str, list[str]]:
    """The texts of each split."""
    found = {}
    for source in sources:
        for _, text in flat(source):
            assert not isinstance(text, InvalidDocument), text
            found.setdefault(source.split, []).append(text)
    return found


def main(capsys, monkeypatch, *flags) -> str:
    """prepare_data.py in this process; returns its output, or fails with its error."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, flags)])
    with unittest.mock.patch.dict(os.environ):  # it may set TIKTOKEN_CACHE_DIR
        prepare_data.main()
    return capsys.readouterr().out


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# known corpora


ARTICLE = " \n = Title {0} = \n \n Text of {0} . \n \n = = Section = = \n \n More @-@ of {0} . \n"


def zip_of(members) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def wikitext(counts=(3, 2, 1), name="wikitext-2") -> bytes:
    """An archive like the real one; counts: articles in train, valid and test."""
    return zip_of(
        {f"{name}-raw/": ""}
        | {
            f"{name}-raw/wiki.{split}.raw": "".join(
                ARTICLE.format(f"{split} {i}") for i in range(n)
            )
            for split, n in zip(("test", "valid", "train"), reversed(counts))
        }
    )


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
def test_wikitext_keeps_its_splits_and_an_article_is_a_document(serve, server, tmp_path, name):
    serve(name, {f"{name}-raw-v1.zip": wikitext(name=name)})
    folder = tmp_path / "data" / name
    corpus = load_corpus(name, folder)
    found = documents(corpus.sources)
    names = {"train": ("train", 3), "val": ("valid", 2), "test": ("test", 1)}
    for split, (word, n) in names.items():
        assert found.pop(split) == [ARTICLE.format(f"{word} {i}").strip() for i in range(n)]
    assert found == {} and corpus.has_documents
    assert tree(folder) == ["wiki.test.raw", "wiki.train.raw", "wiki.valid.raw"]
    assert server.asked == [f"/gone/{name}-raw-v1.zip", f"/{name}-raw-v1.zip"]
    load_corpus(name, folder)  # again: all is there
    assert len(server.asked) == 2


def test_a_corpus_that_several_processes_want_is_downloaded_and_unpacked_once(
    serve, server, tmp_path
):
    """Threads stand in for the processes: each of them has locks of its own."""
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": wikitext((3000, 200, 100))})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        corpora = list(pool.map(lambda _: load_corpus("wikitext-2", tmp_path / "c"), range(4)))
    assert len(server.asked) == 2  # of the two mirrors, the first has nothing
    assert tree(tmp_path / "c") == ["wiki.test.raw", "wiki.train.raw", "wiki.valid.raw"]
    for corpus in corpora:
        assert {split: len(texts) for split, texts in documents(corpus.sources).items()} == {
            "train": 3000, "val": 200, "test": 100
        }  # fmt: skip


def test_wikitext_end_to_end(serve, tmp_path, capsys, monkeypatch):
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": wikitext()})
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


def test_the_real_articles_of_wikitext(tinyshakespeare):
    """The official validation and test texts have 60 articles each."""
    folder = tinyshakespeare.parent / "wikitext-2"
    if not folder.is_dir():
        pytest.skip(f"{folder} isn't there")
    source = CATALOG["wikitext-2"].sources[1]
    for file in ("valid.txt", "test.txt"):
        texts = [text for _, text in flat(replace(source, path=str(folder / file)))]
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
    serve("imdb", {"aclImdb_v1.tar.gz": tar_of(REVIEWS)})
    folder = tmp_path / "imdb"
    corpus = load_corpus("imdb", folder)
    assert documents(corpus.sources) == {
        "": ["train, good\né\r\n", "train, bad", "unlabelled"],  # shared out to train and val
        "test": ["test, good", "test, bad<br />"],
    }
    assert [source.number for source in corpus.sources] == [0, 1, 2]
    assert tree(folder) == ["test.jsonl", "train.jsonl", "unlabelled.jsonl"]


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
    assert tree(tmp_path / "c") == list(files)


def test_another_archive_than_the_known_one_is_refused(serve, server, tmp_path):
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": wikitext()})
    data = bytearray((server.folder / "wikitext-2-raw-v1.zip").read_bytes())
    data[100] ^= 1
    (server.folder / "wikitext-2-raw-v1.zip").write_bytes(data)
    with pytest.raises(ConnectionError, match=r"another file: its sha256.*--prefetch"):
        load_corpus("wikitext-2", tmp_path / "c")
    assert tree(tmp_path / "c") == []


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_no_member_leaves_the_folder(tmp_path, make):
    hostile = {
        "../evil.txt": "x",
        "/tmp/evil-of-test-corpora.txt": "x",
        "aclImdb/train/pos/../../../../evil.txt": "x",
        "aclImdb/train/pos/1_7.txt": "good",
    }
    if make is tar_of:
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
    assert tree(tmp_path) == ["in/archive", "in/train.jsonl"]
    assert [json.loads(line)["text"] for line in open(tmp_path / "in" / "train.jsonl")] == ["good"]
    assert not Path("/tmp/evil-of-test-corpora.txt").exists()


@pytest.mark.parametrize("target", ["out.raw", "out.jsonl"])
@pytest.mark.parametrize("members", [1, 100])
def test_an_archive_that_grows_beyond_measure(tmp_path, target, members):
    """Each of a hundred members stays below the bound, together they don't."""
    data = zip_of({f"{i}.txt": "a" * (4_000_000 // members) for i in range(members)})
    assert 4_000_000 // 100 < 100 * len(data) < 4_000_000
    (tmp_path / "bomb.zip").write_bytes(data)
    with pytest.raises(ValueError, match="grows to more than 100 times its size"):
        unpack(tmp_path / "bomb.zip", tmp_path, {r"\d+\.txt": target})
    assert tree(tmp_path) == ["bomb.zip"]


def test_an_archive_without_what_is_wanted(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of({"other.txt": "x"}))
    with pytest.raises(ValueError, match=r"a\.zip has no file for out\.raw"):
        unpack(tmp_path / "a.zip", tmp_path, {r"wanted\.txt": "out.raw"})
    assert tree(tmp_path) == ["a.zip"]


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
            if "fineweb" not in name:  # the hub names these
                assert download_file.size and len(download_file.sha256) == 64


def test_the_built_in_corpus_stays_as_old_as_what_was_made_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--corpus", "python-docs", "--tokenizer", "bytes", "--workers", 1]
    main(capsys, monkeypatch, *flags)
    assert "prepared already" in main(capsys, monkeypatch, *flags)


# files of one's own


def row(text, field="text"):
    return json.dumps({field: text, "id": 7}) + "\n"


def zst(data: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(data)


def parquet_of(texts, field="text") -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({field: texts}), file)
    return file.getvalue()


FILES = {
    "a.jsonl": lambda: row("a").encode(),
    "b.jsonl.gz": lambda: gzip.compress(row("b").encode()),
    "c.jsonl.zst": lambda: zst(row("c").encode()),
    "d.txt": lambda: b"d\n",
    "e.txt.gz": lambda: gzip.compress(b"e\n"),
    "f.txt.zst": lambda: zst(b"f\n"),
    "g.parquet": lambda: parquet_of(["g"]),
    "h.parquet.gz": lambda: gzip.compress(parquet_of(["h"])),
    "i.parquet.zst": lambda: zst(parquet_of(["i"])),
    "J.JSONL": lambda: row("J").encode(),
}


@pytest.mark.parametrize("file", FILES)
def test_one_file_of_each_format(tmp_path, file):
    (tmp_path / file).write_bytes(FILES[file]())
    (source,) = find(str(tmp_path / file), division="line")
    assert [text for _, text in flat(source)] == [file[0]]
    kind = source.format, source.division
    assert kind == (("text", "line") if ".txt" in file else (file.lower().split(".")[1], ""))
    assert documents(find(str(tmp_path), "line")) == {"": [file[0]]}  # its folder


def test_files_folders_and_globs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("raw/b.jsonl", "raw/a.jsonl", "raw/deep/er/c.jsonl", "raw/.hidden/x.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(row(Path(name).stem))
    Path("raw/.y.jsonl").write_text(row("y"))
    Path("raw/notes.md").write_text("not taken")
    Path("lone").write_text("without a suffix: a text")
    names = lambda *items: [  # noqa: E731
        Path(s.path).name for s in load_corpus("x", tmp_path, items, "file").sources
    ]
    assert names("raw") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names("raw/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names("raw/**/*.jsonl") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names("raw/[ab].jsonl", "lone") == ["a.jsonl", "b.jsonl", "lone"]
    assert names("raw/b.jsonl", "raw/a.jsonl") == ["b.jsonl", "a.jsonl"]  # in the order given
    numbers = [s.number for s in load_corpus("x", tmp_path, ["raw", "lone"], "file").sources]
    assert numbers == [0, 1, 2, 3]


def test_a_file_of_a_folder_is_taken_once_whatever_links_lead_to_it(tmp_path):
    (tmp_path / "raw" / "a").mkdir(parents=True)
    (tmp_path / "raw" / "a" / "x.jsonl").write_text(row("x"))
    (tmp_path / "raw" / "a" / "back").symlink_to("..")  # which goes round and round
    (tmp_path / "raw" / "b.jsonl").symlink_to("a/x.jsonl")  # the shortest way
    (tmp_path / "elsewhere.jsonl").write_text(row("y"))
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
        "a/raw/": "raw",
        "a/raw/*.txt": "raw",
        "a/raw/**/*.txt": "raw",
        "a/raw/[ab]?.txt": "raw",
        "a/pile:arxiv": "pile-arxiv",
        "hf:org/name/config": "org-name-config",
    }
    assert {item: prepare_data.name_of([item]) for item in expected} == expected


def test_a_field_of_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(row("a", "body"))
    (tmp_path / "b.parquet").write_bytes(parquet_of(["b"], "body"))
    assert documents(find(str(tmp_path), text_field="body")) == {"": ["a", "b"]}
    ((_, text),) = flat(find(str(tmp_path))[0])
    assert (
        isinstance(text, InvalidDocument)
        and "body" in text.reason
        and "--text_field" in text.reason
    )


def test_running_text_beside_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text(row("a"))
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
def test_input_that_names_nothing(tmp_path, monkeypatch, item, words):
    monkeypatch.chdir(tmp_path)
    offline(monkeypatch, tmp_path)
    Path("raw").mkdir()
    Path("raw/a.txt").write_text("a")
    Path("empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        find(item)
    assert "\n" not in str(error.value)


def test_a_known_name_takes_one_file_or_none(tmp_path):
    with pytest.raises(ValueError, match="tinyshakespeare is one file"):
        load_corpus("tinyshakespeare", tmp_path, ["a.txt", "b.txt"])
    with pytest.raises(ValueError, match=r"'nope': choose one of tinyshakespeare, .*python-docs"):
        load_corpus("nope", tmp_path)


# the `datasets` library


def offline(monkeypatch, tmp_path):
    """datasets reads these when it is imported: its own settings are the ones that count."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write_rows(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(row, texts)))


def test_a_local_folder_through_datasets(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    folder = tmp_path / "mine"
    write_rows(folder / "train.jsonl", "a", "b")
    assert documents(find(f"hf:{folder}")) == {"": ["a", "b"]}  # one split is shared out
    write_rows(folder / "test.jsonl", "t")
    assert documents(find(f"hf:{folder}")) == {"": ["a", "b"], "test": ["t"]}
    write_rows(folder / "validation.jsonl", "v")
    expected = {"train": ["a", "b"], "val": ["v"], "test": ["t"]}
    assert documents(find(f"hf:{folder}")) == expected


CARD = """---
configs:
- config_name: first
  data_files: [{split: train, path: one.jsonl}]
- config_name: second
  data_files: [{split: train, path: two.jsonl}, {split: extra, path: three.jsonl}]
---
"""


def test_a_config_through_datasets(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    folder = tmp_path / "mine"
    for name in ("one", "two", "three"):
        write_rows(folder / f"{name}.jsonl", name)
    (folder / "README.md").write_text(CARD)
    assert documents(find(f"hf:{folder}/first")) == {"": ["one"]}
    assert documents(find(f"hf:{folder}/second")) == {"": ["two", "three"]}
    with pytest.raises(ValueError, match=r"third.*first.*second") as error:
        find(f"hf:{folder}/third")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"onfig.*first.*second"):
        find(f"hf:{folder}")


def test_datasets_end_to_end(tmp_path):
    pytest.importorskip("datasets")
    write_rows(tmp_path / "mine" / "train.jsonl", *(f"document {i}" for i in range(50)))
    write_rows(tmp_path / "mine" / "validation.jsonl", "v")
    write_rows(tmp_path / "mine" / "test.jsonl", "t")
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    flags = ["--input", "hf:mine", "--tokenizer", "bytes", "--workers", 1]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "data" / "mine"
    assert (folder / "test.bin").read_bytes() == np.array([ord("t"), 256], np.uint16).tobytes()
    assert (folder / "val.bin").read_bytes() == np.array([ord("v"), 256], np.uint16).tobytes()
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["splits"]["train"]["documents"] == 50


def test_running_text_beside_documents_is_one_line(tmp_path):
    write_rows(tmp_path / "mine" / "a.jsonl", "a")
    (tmp_path / "mine" / "b.txt").write_text("b")
    flags = ["--input", "mine", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert_one_line_error(result, "b.txt is one running text", "--documents")
    assert tree(tmp_path) == ["mine/a.jsonl", "mine/b.txt"]


def test_a_damaged_file_through_datasets(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    write_rows(tmp_path / "mine" / "train.jsonl", "a")
    with open(tmp_path / "mine" / "train.jsonl", "a") as f:
        f.write("{damaged\n")
    with pytest.raises(ValueError, match="hf:") as error:
        find(f"hf:{tmp_path / 'mine'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "item"),
    [("datasets", "hf:x"), ("pyarrow", "x.parquet"), ("backports.zstd", "x.txt.zst")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, item):
    if module == "backports.zstd" and sys.version_info >= (3, 14):
        pytest.skip("Python has it")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    Path("x.parquet").write_bytes(b"PAR1")
    Path("x.txt.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"pip install {module.split('.')[0]}"):
        flat(find(item)[0])


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
    for name in ("arxiv", "books", "drafts"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jsonl").write_text(row(name, "body"))
    return folder


def test_described_by_flags_and_taken_back(tmp_path, capsys, monkeypatch):
    folder = make_pile(tmp_path / "pile")
    flags = ["--describe", folder, "--corpus", "my pile", "--source", "http://example.com"]
    flags += ["--description", "what it is", "--text_field", "body"]
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked {question}"))
    main(capsys, monkeypatch, *flags, "--sub_corpora", "arxiv, books")
    told = json.loads((folder / "metadata.json").read_text())
    assert len(told.pop("date_downloaded")) == len("2026-01-31")
    assert told == {
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


def test_described_by_standard_input(tmp_path):
    folder = make_pile(tmp_path / "pile")
    answers = "arxiv\n\nhttp://example.com\nwhat it is\nbody\n"
    result = run_script("prepare_data.py", "--describe", folder, cwd=tmp_path, input=answers)
    assert result.returncode == 0, result.stderr
    told = json.loads((folder / "metadata.json").read_text())
    assert [told["name"], told["corpuses"]] == ["pile", ["arxiv"]]
    assert "wrote" in result.stdout and "arxiv,books,drafts" in result.stdout
    assert documents(find(str(folder))) == {"": ["arxiv"]}
    result = run_script("prepare_data.py", "--describe", folder, cwd=tmp_path)
    assert_one_line_error(result, "pile/metadata.json exists already: edit it, or remove it")
    (folder / "metadata.json").unlink()
    result = run_script("prepare_data.py", "--describe", folder, cwd=tmp_path, input="\n\n")
    assert_one_line_error(result, "standard input ended", "origin of the text")
    result = run_script("prepare_data.py", "--describe", "nope", cwd=tmp_path)
    assert_one_line_error(result, "nope is not a folder")


ALL = {"name": "n", "download_source": "s", "description": "d", "content_field": "text"}


def test_a_folder_without_folders_is_not_asked_for_sub_corpora(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(f"asked {question}"))
    describe(tmp_path, ALL | {"corpuses": ""})
    assert read_description(tmp_path).corpora == ()
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(ValueError, match="no folder for the sub-corpus 'a'"):
        describe(tmp_path, ALL | {"corpuses": "a"})


def test_describing_leaves_other_metadata_alone(tmp_path):
    (tmp_path / "metadata.json").write_text('{"format_version": 1}')  # of a prepared corpus, say
    with pytest.raises(FileExistsError, match=r"metadata\.json exists already"):
        describe(tmp_path, dict(ALL))
    assert (tmp_path / "metadata.json").read_text() == '{"format_version": 1}'


def test_a_folder_that_tatm_described(tmp_path):
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


def test_a_description_by_configs_goes_through_datasets(tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    offline(monkeypatch, tmp_path)
    folder = tmp_path / "mine"
    for name in ("one", "two", "three"):
        write_rows(folder / f"{name}.jsonl", name)
    (folder / "README.md").write_text(CARD)
    told = TATM.replace("data_dirs", "configs").replace("body", "text")
    told = told.replace("arxiv", "first").replace("books", "second")
    (folder / "metadata.yaml").write_text(told)
    assert documents(find(f"{folder}:first")) == {"": ["one"]}
    assert documents(find(str(folder))) == {"": ["one", "two", "three"]}


@pytest.mark.parametrize("name", ["../outside", "/", ".", "link"])
def test_a_sub_corpus_outside_its_folder_is_refused(tmp_path, name):
    folder = make_pile(tmp_path / "pile")
    make_pile(tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    told = ALL | {"data_content": "text", "corpuses": [name]}
    (folder / "metadata.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="has no folder for its sub-corpus"):
        find(str(folder))


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("metadata.json", "{", r"metadata\.json is damaged"),
        ("metadata.yaml", "name: [", r"metadata\.yaml is damaged"),
        ("metadata.yaml", "name: \xff\nx: {{}}: y", r"metadata\.yaml is damaged"),
        ("metadata.json", json.dumps(ALL | {"data_content": "images"}), "'images', not text"),
        (
            "metadata.json",
            json.dumps(ALL | {"data_content": "text", "corpuses": [1]}),
            "all be text",
        ),
    ],
)
def test_a_damaged_description(tmp_path, file, text, words):
    if file.endswith("yaml"):
        pytest.importorskip("yaml")
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        find(str(tmp_path))
    assert "\n" not in str(error.value)


# --prefetch


def test_prefetched_here_and_prepared_where_there_is_no_network(
    serve, tmp_path, capsys, monkeypatch, gpt2_tokenizer
):
    serve("wikitext-2", {"wikitext-2-raw-v1.zip": wikitext()})
    monkeypatch.chdir(tmp_path)
    out = main(capsys, monkeypatch, "--corpus", "wikitext-2", "--prefetch", "usb")
    assert "--data_dir" in out and "--corpus wikitext-2" in out and "--tokenizer gpt2" in out
    assert len(list(Path("usb/tokenizers").iterdir())) == 2  # though it was here already
    assert sorted(p.name for p in Path("usb").iterdir()) == ["tokenizers", "wikitext-2"]
    flags = ["--corpus", "wikitext-2", "--data_dir", "usb"]
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    result = run_script("prepare_data.py", *flags, "--workers", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = Path("usb/wikitext-2")
    text = ARTICLE.format("test 0").strip()
    expected = np.array([*gpt2_tokenizer.encode(text), 50256], np.uint16)
    assert (folder / "test.bin").read_bytes() == expected.tobytes()


def test_prefetch_takes_a_tokenizer_of_ones_own_along(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "here"))
    lines = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    Path("my.tiktoken").write_bytes(b"".join(lines))
    flags = ["--corpus", "python-docs", "--prefetch", "usb", "--tokenizer", "my.tiktoken"]
    out = main(capsys, monkeypatch, *flags)
    Path("my.tiktoken").unlink()
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    flags = out.split("prepare_data.py ")[1].splitlines()[0].split()  # as it tells
    main(capsys, monkeypatch, *flags, "--workers", 1)
    assert tree(Path("usb/tokenizers")) == [flags[-1]]
    assert Path("usb/python-docs/train.bin").exists()


# --verify


def prepare(folder: Path, *inputs, tokenizer="bytes", **options) -> Path:
    """Prepares files in tmp_path/c, in this process."""
    chosen = {name: options.pop(name) for name in ("division", "text_field") if name in options}
    corpus = load_corpus("c", folder, [str(path) for path in inputs], **chosen)
    with open_engine("processes", workers=1) as run_tasks:
        pipeline.prepare(corpus, get_tokenizer(tokenizer), folder, run_tasks, **options)
    return folder


TEXT = "".join(f"Line {i}, é日🜨.\n" for i in range(500))


def make_sources(folder: Path) -> dict:
    """Flags for prepare() by kind of corpus; all of its sources lie in `folder`."""
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text("another text " * 50)
    rows = "".join(row(f"document {i}") for i in range(300))
    (folder / "c.jsonl").write_text(rows)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(rows.replace("doc", "zipped doc").encode()))
    bad = row("good") + "{bad\n" + row("") + row("better") * 99
    (folder / "e.jsonl").write_text(bad)
    return {
        "running text": (["a.txt", "b.txt"], {}),
        "lines": (["a.txt"], {"division": "line"}),
        "one and a half": (["c.jsonl"], {"max_length": 10}),
        "several": (["c.jsonl", "d.jsonl.gz", "a.txt"], {"division": "file"}),
        "skipped": (["e.jsonl"], {"on_error": "skip"}),
    }


KINDS = ["running text", "lines", "one and a half", "several", "skipped"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_corpus_is_verified(tmp_path, capsys, kind):
    files, options = make_sources(tmp_path)[kind]
    folder = prepare(tmp_path / "c", *(tmp_path / file for file in files), **options)
    capsys.readouterr()
    verify(folder)
    *splits, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in splits] == ["train", "val"]
    counts = {"running text": "whole text", "lines": "500", "one and a half": "300"}
    counts |= {"several": "601", "skipped": "101"}
    assert counts[kind] in last and last.endswith("compared with the source: the same")


def test_a_table_is_verified(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(parquet_of([f"document {i}" for i in range(50)]))
    verify(prepare(tmp_path / "c", tmp_path / "a.parquet"))
    assert "50 of 50 documents were compared" in capsys.readouterr().out


def flip(path: Path, position: int, value=None) -> None:
    data = bytearray(path.read_bytes())
    data[position] = data[position] ^ 1 if value is None else value
    overwrite(path, bytes(data))


def overwrite(path: Path, data: bytes) -> None:
    """Changes a file as a broken disk does: its date stays."""
    before = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(before, before))


def told_sha256(folder: Path, split="train") -> None:
    """Makes metadata.json agree with a file that was changed."""
    metadata = json.loads((folder / "metadata.json").read_text())
    data = (folder / f"{split}.bin").read_bytes()
    metadata["splits"][split]["files"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "metadata.json").write_text(json.dumps(with_checksum(metadata)))


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_what_changed(tmp_path, kind):
    files, options = make_sources(tmp_path)[kind]
    files = [tmp_path / file for file in files]
    folder = prepare(tmp_path / "c", *files, **options)
    verify(folder)
    ids = np.fromfile(folder / "train.bin", np.uint16)
    place = 10 + 2 * int(np.argmax(ids[5:] < 256))  # of a letter, not an end of text
    flip(folder / "train.bin", place)
    with pytest.raises(ValueError, match=r"train\.bin: its sha256 differs"):
        verify(folder)
    told_sha256(folder)  # a wrong id with the right checksum: seen by its text
    with pytest.raises(ValueError, match="differs from the source"):
        verify(folder)
    flip(folder / "train.bin", place)
    flip(folder / "train.bin", place + 1, 1)
    told_sha256(folder)
    with pytest.raises(ValueError, match=r"id \d+ is outside the vocabulary|end-of-text tok"):
        verify(folder)
    flip(folder / "train.bin", place + 1, 0)
    told_sha256(folder)
    verify(folder)
    source = files[0]
    good = source.read_bytes()
    flip(source, good.index(b"9"), ord("8")) if b"9" in good else flip(source, 11)
    with pytest.raises(ValueError, match="differs from the source"):
        verify(folder)
    overwrite(source, good)
    verify(folder)


def test_verify_sees_documents_that_went_from_the_end_of_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(row(f"document {i}") for i in range(100)))
    folder = prepare(tmp_path / "c", tmp_path / "a.jsonl")
    data = (tmp_path / "a.jsonl").read_bytes()
    last = len(data.splitlines(keepends=True)[-1])
    overwrite(tmp_path / "a.jsonl", data[:-last] + b" " * last)
    with pytest.raises(ValueError, match="number of documents"):
        verify(folder)


def test_verify_without_the_source(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    folder = prepare(tmp_path / "c", tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("of another length")
    verify(folder)
    assert "is missing or has changed" in capsys.readouterr().out
    (tmp_path / "a.txt").unlink()
    verify(folder)
    assert "train" in (out := capsys.readouterr().out) and "is missing or has changed" in out


@pytest.mark.parametrize("division", ["", "line"])
def test_a_corpus_by_a_tokenizer_json_is_verified(tmp_path, monkeypatch, capsys, division):
    """One that changes the text: what it gives can't be decoded to the source."""
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
    flip(tmp_path / "a.txt", TEXT.index("9"), ord("8"))
    with pytest.raises(ValueError, match="differs from the source"):
        verify(folder)


def test_verify_sees_another_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "kept"))
    lines = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    (tmp_path / "my.tiktoken").write_bytes(b"".join(lines))
    (tmp_path / "a.txt").write_text(TEXT)
    folder = prepare(tmp_path / "c", tmp_path / "a.txt", tokenizer=str(tmp_path / "my.tiktoken"))
    verify(folder)
    (kept,) = (tmp_path / "kept").iterdir()
    kept.write_bytes(kept.read_bytes() + base64.b64encode(b"ab") + b" 256\n")
    _load.cache_clear()  # as in another process
    with pytest.raises(ValueError, match="another vocabulary"):
        verify(folder)


def test_verify_is_a_flag(tmp_path):
    (tmp_path / "data" / "c").mkdir(parents=True)
    (tmp_path / "a.txt").write_text(TEXT)
    prepare(tmp_path / "data" / "c", tmp_path / "a.txt")
    result = run_script("prepare_data.py", "--verify", "c", cwd=tmp_path)
    assert result.returncode == 0 and "the same" in result.stdout, result.stderr
    flip(tmp_path / "data" / "c" / "val.bin", 0)
    result = run_script("prepare_data.py", "--verify", "c", cwd=tmp_path)
    assert_one_line_error(result, "val.bin", "sha256", "run python prepare_data.py again")
    assert_one_line_error(run_script("prepare_data.py", "--verify", "d", cwd=tmp_path), "data/d")
