"""Splits: each document is in one of them, once, and stays there when other files come and go."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from corpus import pipeline, reader, tables
from corpus.engines import open_engine
from corpus.files import find
from corpus.inputs import Corpus, load_corpus
from corpus.metadata import read_metadata
from corpus.sources import Source
from corpus.tasks import assign_split
from corpus.tokenizer import get_tokenizer
from corpus.verify import verify

COUNT = 60  # documents per file


@pytest.fixture
def tmp_path(memory_folder):
    return memory_folder


def write_jsonl(path: Path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_parquet(path: Path, texts):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": texts}), path, row_group_size=7)


def write_arrow(path: Path, texts):
    """A file as the `datasets` library writes them."""
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"text": texts})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=7)


def write_lines(path: Path, texts):
    path.write_text("".join(f"{text}\n" for text in texts))


def write_paragraphs(path: Path, texts):
    path.write_text("".join(f"{text}\n\n \n" for text in texts))


def write_articles(path: Path, texts):
    path.write_text("".join(f" \n = {text} = \n \n And more . \n" for text in texts))


def write_file(path: Path, texts):
    path.write_text("\n".join(texts))


WRITERS = {  # form -> (function that writes a file, suffix, division)
    "jsonl": (write_jsonl, "jsonl", ""),
    "parquet": (write_parquet, "parquet", ""),
    "arrow": (write_arrow, "arrow", ""),
    "line": (write_lines, "txt", "line"),
    "blank-line": (write_paragraphs, "txt", "blank-line"),
    "article": (write_articles, "txt", "article"),
    "file": (write_file, "txt", "file"),
}


def write(form, folder: Path, name: str) -> None:
    """Write a file of COUNT documents, or COUNT files of one document; each text is unique."""
    folder.mkdir(parents=True, exist_ok=True)
    function, suffix, _ = WRITERS[form]
    texts = [f"{name} {i:02}" for i in range(COUNT)]
    if form == "file":
        for i, text in enumerate(texts):
            function(folder / f"{name}{i:02}.{suffix}", [text])
    else:
        function(folder / f"{name}.{suffix}", texts)


def prepare(sources, folder: Path, workers=1, **settings) -> dict:
    """Prepare a corpus by bytes, verify it, and return its documents: split -> list of texts."""
    numbered = [replace(source, number=i) for i, source in enumerate(sources)]
    corpus = Corpus("c", {}, numbered)
    settings = {"train_split_ratio": 0.6} | settings
    with open_engine("processes", workers) as run_tasks:
        pipeline.prepare(corpus, get_tokenizer("bytes"), folder, run_tasks, **settings)
    verify(folder)
    splits = {}
    for split, entry in read_metadata(folder)["splits"].items():
        ids = np.concatenate([np.fromfile(folder / f["name"], "<u2") for f in entry["files"]])
        documents = np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]
        splits[split] = [bytes(document[:-1].tolist()).decode() for document in documents]
    return splits


def sources_of(form, folder: Path) -> list[Source]:
    """Return the sources of a folder of files, or of the .arrow files of a data set."""
    if form == "arrow":  # hub.py gives these names
        paths = sorted(folder.rglob("*.arrow"))
        return [Source(str(path), "arrow", name=f"default/{path.stem}") for path in paths]
    return find(str(folder), WRITERS[form][2])


def split_of_each(splits: dict) -> dict[str, str]:
    """Return text -> split, after the check that no text is there twice."""
    pairs = [(text, split) for split, texts in splits.items() for text in texts]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("form", WRITERS)
def test_files_that_come_and_go_move_no_document(tmp_path, form):
    raw = tmp_path / "raw"
    write(form, raw, "m")
    write(form, raw / "sub", "n")
    old = split_of_each(prepare(sources_of(form, raw), tmp_path / "c"))
    assert len(old) == 2 * COUNT
    write(form, raw, "a")  # sorts before all others
    write(form, raw / "another", "b")
    new = split_of_each(prepare(sources_of(form, raw), tmp_path / "c"))
    assert len(new) == 4 * COUNT
    assert {text: new[text] for text in old} == old
    for path in raw.glob("m*"):
        path.unlink()
    less = split_of_each(prepare(sources_of(form, raw), tmp_path / "c"))
    assert len(less) == 3 * COUNT
    assert {text: new[text] for text in less} == less


def test_files_are_split_independently(tmp_path):
    """Else rows of the same number would always be together, and lines of one length, too."""
    for name in ("a", "b"):
        write("jsonl", tmp_path / "raw", name)
    splits = split_of_each(prepare(find(str(tmp_path / "raw")), tmp_path / "c"))
    equal = sum(splits[f"a {i:02}"] == splits[f"b {i:02}"] for i in range(COUNT))
    assert COUNT / 4 < equal < 3 * COUNT / 4


def test_only_the_path_in_the_input_counts(tmp_path, monkeypatch):
    """Not where the input, the corpus or the current folder is, nor how the files are named."""
    home = tmp_path / "home"
    write("jsonl", home / "raw", "m")
    write("jsonl", home / "raw", "a")
    expected = split_of_each(prepare(find(str(home / "raw")), tmp_path / "c"))
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(home / "raw", copy)
    monkeypatch.chdir(copy)
    inputs = [[str(copy)], ["."], ["../copy"], ["*.jsonl"], ["m.jsonl", "a.jsonl"]]
    for number, items in enumerate(inputs):
        sources = [source for item in items for source in find(item)]
        splits = prepare(sources, tmp_path / f"{number}" / "c", workers=1 + number % 2)
        assert split_of_each(splits) == expected, items


def test_names_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("raw/a.jsonl", "raw/sub/b.jsonl", "raw/[x]/c.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(Path(name), ["text"])
    names = lambda item: [source.name for source in find(item)]  # noqa: E731
    for item in ("raw", "raw/", "./raw", "raw/**/*.jsonl", f"{tmp_path}/raw"):
        assert names(item) == ["[x]/c.jsonl", "a.jsonl", "sub/b.jsonl"]
    assert names("raw/sub/b.jsonl") == ["b.jsonl"]
    assert names("raw/[x]/c.jsonl") == ["c.jsonl"]  # a file, not a glob
    assert names("raw/s*/b.jsonl") == ["sub/b.jsonl"]
    description = {"name": "n", "data_content": "text", "corpuses": ["sub"]}
    Path("raw/metadata.json").write_text(json.dumps(description))
    assert names("raw") == names("raw:sub") == ["sub/b.jsonl"]


def test_one_name_in_two_encodings_of_its_characters():
    """macOS may write é as two characters."""
    composed, decomposed = Source("x", "jsonl", name="\u00e9"), Source("x", "jsonl", name="e\u0301")
    masks = [assign_split(s, range(100), 0.5, 0)["train"] for s in (composed, decomposed)]
    assert (masks[0] == masks[1]).all()


@pytest.mark.parametrize("form", WRITERS)
def test_every_document_is_once_in_one_split(tmp_path, monkeypatch, form):
    """Whatever the size of tasks and blocks, and the number of workers."""
    raw = tmp_path / "raw"
    write(form, raw, "a")
    write(form, raw / "sub", "b")
    expected = None
    for size, block, workers in [(200, 1 << 20, 1), (900, 50, 3), (1 << 20, 7, 2)]:
        monkeypatch.setattr(pipeline, "TASK_BYTES", (size, size))
        for module in (reader, tables):
            monkeypatch.setattr(module, "BLOCK", block)
        splits = prepare(sources_of(form, raw), tmp_path / f"{size}", workers)
        texts = {text.removeprefix("= ").split(" =")[0] for text in split_of_each(splits)}
        assert texts == {f"{name} {i:02}" for name in "ab" for i in range(COUNT)}
        assert set(splits) == {"train", "val"}
        expected = expected or splits
        assert splits == expected  # in the same order, too


# ---- corpora of versions that took the number of a file for its name


@pytest.fixture
def source(tmp_path):
    """A source with its name; without it, the source is as the older version had it."""
    write("jsonl", tmp_path, "m")
    (source,) = find(str(tmp_path / "m.jsonl"))
    return source


def test_a_corpus_of_the_older_rule_stays_until_something_changes(tmp_path, source, capsys):
    folder = tmp_path / "c"
    old = prepare([replace(source, name="")], folder)
    assert "split_rule" not in read_metadata(folder)
    before = (folder / "metadata.json").read_bytes()
    capsys.readouterr()
    assert prepare([source], folder) == old
    out = capsys.readouterr().out
    assert "is prepared already" in out and "splits of an older version" in out
    assert (folder / "metadata.json").read_bytes() == before
    with open(source.path, "a") as file:
        file.write('{"text": "one more"}\n')
    new = prepare([source], folder)
    assert read_metadata(folder)["split_rule"] == 2
    fresh = prepare([source], tmp_path / "fresh")
    assert new == fresh != old


def test_tasks_of_the_older_rule_are_not_mixed_in(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "TASK_BYTES", (500, 500))
    with open_engine("processes", 1) as run_tasks:
        corpus = Corpus("c", {}, [replace(source, name="")])
        arguments = corpus, get_tokenizer("bytes"), tmp_path / "c", run_tasks
        pipeline.prepare(*arguments, train_split_ratio=0.6, part="0/2")
    found = prepare([source], tmp_path / "c")
    assert "resuming" not in (out := capsys.readouterr().out)
    assert "finished tasks of other files or flags are thrown away" in out
    assert found == prepare([source], tmp_path / "fresh")


def test_running_texts_and_official_splits_have_no_rule(tmp_path, source):
    """Their bytes do not depend on it, so what older versions made of them is up to date."""
    (tmp_path / "r.txt").write_text("some text " * 50)
    for name, sources in {
        "running": find(str(tmp_path / "r.txt")),
        "official": [replace(source, split="train"), replace(source, split="val")],
    }.items():
        with open_engine("processes", 1) as run_tasks:
            corpus = Corpus("c", {}, sources)
            metadata = pipeline.prepare(corpus, get_tokenizer("bytes"), tmp_path / name, run_tasks)
        assert "split_rule" not in metadata
        assert all("name" not in file for file in metadata["source"]["files"])


def test_a_known_corpus_goes_by_numbers(tmp_path):
    """Its list of files never changes, and its bytes shall not either."""
    corpus = load_corpus("python-docs", tmp_path)
    assert [source.name for source in corpus.sources] == [""]


@pytest.mark.parametrize("change", ["no name", "an unknown rule"])
def test_verify_needs_the_name_and_the_rule(tmp_path, source, change):
    prepare([source], tmp_path / "c")
    metadata = read_metadata(tmp_path / "c")
    del metadata["sha256"]
    if change == "no name":
        del metadata["source"]["files"][0]["name"]
    else:
        metadata["split_rule"] = 3
    (tmp_path / "c" / "metadata.json").write_text(json.dumps(metadata))
    reason = "no name" if change == "no name" else "split_rule 3 is unknown"
    with pytest.raises(ValueError, match=reason):
        verify(tmp_path / "c")
