"""Which files --input names: official splits, files with several names, links, what is left out,
and what is said about it."""

import json
import os
from pathlib import Path

import pytest
from conftest import assert_one_line_error, run_script
from test_inputs import documents, json_line, main, offline, prepare, write_jsonl

from batches.streaming import StreamingTextDataset
from corpus.descriptions import describe, read_description
from corpus.files import find
from corpus.inputs import load_corpus
from corpus.split_names import split_of_name
from corpus.tokenizer import get_tokenizer
from corpus.verify import verify


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names):
    """Write files of one document each, the name of the file without its suffixes."""
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json_line(name) if ".jsonl" in name else name)


# splits by name


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train TRAIN.txt train-00000-of-00002.parquet train_sft c4-train.00000.jsonl.gz"),
        ("val", "val valid validation dev eval dev.jsonl validation_matched val2 wiki.valid.raw"),
        ("test", "test test_hard test-1.jsonl.gz wiki.test.raw Testing train_test_split.txt"),
        (
            "",
            "latest.txt contest trainspotting.txt valley evaluate devil.jsonl unsupervised",
        ),
    ],
)
def test_split_of_a_name(split, names):
    assert {name: split_of_name(name) for name in names.split()} == dict.fromkeys(
        names.split(), split
    )


SPLITS = {  # files and inputs -> splits
    "files of a folder": (
        ["raw/train.jsonl", "raw/dev.jsonl", "raw/test_hard.jsonl"],
        ["raw"],
        {"train": ["raw/train.jsonl"], "val": ["raw/dev.jsonl"], "test": ["raw/test_hard.jsonl"]},
    ),
    "folders of a folder": (
        ["raw/train/a.jsonl", "raw/validation/a.jsonl", "raw/x/test/b/a.jsonl"],
        ["raw/"],
        {
            "train": ["raw/train/a.jsonl"],
            "val": ["raw/validation/a.jsonl"],
            "test": ["raw/x/test/b/a.jsonl"],
        },
    ),
    "a glob": (
        ["raw/train-0.jsonl", "raw/train-1.jsonl", "raw/val.jsonl"],
        ["raw/*.jsonl"],
        {"train": ["raw/train-0.jsonl", "raw/train-1.jsonl"], "val": ["raw/val.jsonl"]},
    ),
    "several files": (
        ["raw/train.jsonl", "raw/val.jsonl"],
        ["raw/train.jsonl", "raw/val.jsonl"],
        {"train": ["raw/train.jsonl"], "val": ["raw/val.jsonl"]},
    ),
    "several folders": (
        ["raw/train/a.jsonl", "raw/test/a.jsonl"],
        ["raw/train", "raw/test"],
        {"": ["raw/train/a.jsonl"], "test": ["raw/test/a.jsonl"]},
    ),
    "no val": (
        ["raw/train.jsonl", "raw/test.jsonl"],
        ["raw"],
        {"": ["raw/train.jsonl"], "test": ["raw/test.jsonl"]},
    ),
    "no train": (
        ["raw/a.jsonl", "raw/test.jsonl"],
        ["raw"],
        {"": ["raw/a.jsonl"], "test": ["raw/test.jsonl"]},
    ),
    "no train, but val": (
        ["raw/a.jsonl", "raw/val.jsonl"],
        ["raw"],
        {"train": ["raw/a.jsonl"], "val": ["raw/val.jsonl"]},
    ),
    "one file, named": (["raw/test.jsonl"], ["raw/test.jsonl"], {"": ["raw/test.jsonl"]}),
    "a folder of this name": (["test/a.jsonl"], ["test"], {"": ["test/a.jsonl"]}),
}


@pytest.mark.parametrize("case", SPLITS)
def test_official_splits_of_files_are_kept(here, capsys, case):
    files, inputs, expected = SPLITS[case]
    write(*files)
    found = {}
    for source in load_corpus("x", here / "data/x", inputs).sources:
        found.setdefault(source.split, []).append(source.path)
    assert found == expected
    out = capsys.readouterr().out
    assert ("splits by the names of the files" in out) == (found.keys() != {""})
    (sources,) = [load_corpus("x", here / "x", inputs, split_names="ignore").sources]
    assert {source.split for source in sources} == {""}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["raw/more.jsonl", "raw/train.jsonl"], "raw/more.jsonl has no split in its name"),
        (["raw/test.jsonl", "raw/dev.jsonl"], "names of val or test only"),
    ],
)
def test_splits_that_cannot_be_kept_are_refused(here, files, words):
    write(*files)
    with pytest.raises(ValueError, match=f"{words}.*--split_names ignore") as error:
        find("raw")
    assert "\n" not in str(error.value)
    assert len(find("raw", split_names="ignore")) == 2


def test_running_texts_keep_their_splits(here, capsys, monkeypatch):
    Path("raw").mkdir()
    for split in ("train", "valid", "test"):
        Path(f"raw/{split}.txt").write_text(f"the text of {split}\n" * 9)
    flags = ["--input", "raw", "--tokenizer", "bytes", "--workers", 1]
    out = main(capsys, monkeypatch, *flags)
    assert "splits by the names of the files (number of files): train 1; val 1; test 1" in out
    for name, split in {"train": "train", "valid": "val", "test": "test"}.items():
        ids = Path(f"data/raw/{split}.bin").read_bytes()[::2]
        assert ids == Path(f"raw/{name}.txt").read_bytes()
    verify(Path("data/raw"))
    main(capsys, monkeypatch, *flags, "--split_names", "ignore")
    assert not Path("data/raw/test.bin").exists()
    assert b"the text of test" in Path("data/raw/train.bin").read_bytes()[::2]
    result = run_script("prepare_data.py", "--split_names", "ignore", cwd=here)
    assert_one_line_error(result, "--split_names has no effect without --input")


def test_a_running_text_without_val_is_cut_beside_its_test_text(here):
    Path("raw").mkdir()
    Path("raw/train.txt").write_text("0123456789" * 10)
    Path("raw/test.txt").write_text("of the test")
    folder = prepare(here / "c", "raw")
    assert (folder / "train.bin").read_bytes()[::2] == b"0123456789" * 9
    assert (folder / "val.bin").read_bytes()[::2] == b"0123456789"
    assert (folder / "test.bin").read_bytes()[::2] == b"of the test"


def test_a_stream_leaves_val_and_test_out(here, capsys):
    Path("raw").mkdir()
    for split in ("train", "dev", "test"):
        Path(f"raw/{split}.txt").write_text(split * 20)
    tokenizer = get_tokenizer("bytes")
    data = StreamingTextDataset("raw", tokenizer, 9)
    assert [source.path for source in data.sources] == ["raw/train.txt"]
    assert "val and test are left out" in capsys.readouterr().out
    data = StreamingTextDataset("raw", tokenizer, 9, split_names="ignore", rank=1, world_size=2)
    assert len(data.sources) == 3
    assert capsys.readouterr().out == ""


def test_other_splits_of_a_data_set_are_left_out_and_named(here, monkeypatch, capsys):
    offline(monkeypatch, here)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split in ("train", "dev", "test_hard", "unsupervised"):
        write_jsonl(here / "mine" / f"{split}.jsonl", split)
        card += f"  - {{split: {split}, path: {split}.jsonl}}\n"
    Path("mine/README.md").write_text(card + "---\n")
    expected = {"train": ["train"], "val": ["dev"], "test": ["test_hard"]}
    assert documents(find("hf:mine")) == expected
    assert "neither train, val nor test (unsupervised)" in capsys.readouterr().out
    everything = documents(find("hf:mine", split_names="ignore"))
    assert everything == {"": ["train", "dev", "test_hard", "unsupervised"]}


def test_a_data_set_without_a_split_for_train(here, monkeypatch, capsys):
    offline(monkeypatch, here)
    write_jsonl(here / "mine" / "test.jsonl", "t")
    with pytest.raises(ValueError, match=r"names of val or test only.*--split_names ignore"):
        find("hf:mine")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split in ("first", "second"):
        write_jsonl(here / "other" / f"{split}.jsonl", split)
        card += f"  - {{split: {split}, path: {split}.jsonl}}\n"
    Path("other/README.md").write_text(card + "---\n")
    assert documents(find("hf:other")) == {"": ["first", "second"]}
    assert "are divided into train and val (first, second)" in capsys.readouterr().out


# each file once


OVERLAPS = {
    "a folder and its file": ["raw", "raw/a.jsonl"],
    "a file and its folder": ["raw/b/c.jsonl", "raw"],
    "two globs": ["raw/*.jsonl", "raw/**/*.jsonl"],
    "a file twice": ["raw", "raw/../raw/a.jsonl"],
    "a link": ["raw", "link.jsonl"],
    "a hard link": ["raw", "hard.jsonl"],
    "a link to a folder": ["raw", "folder"],
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_a_file_with_several_names_is_read_once(here, capsys, case):
    write("raw/a.jsonl", "raw/b/c.jsonl")
    Path("link.jsonl").symlink_to("raw/a.jsonl")
    os.link("raw/a.jsonl", "hard.jsonl")
    Path("folder").symlink_to("raw")
    found = documents(load_corpus("x", here, OVERLAPS[case]).sources)[""]
    assert sorted(found) == ["raw/a.jsonl", "raw/b/c.jsonl"]
    assert "named more than once, and read once: " in capsys.readouterr().out
    if case == "a file and its folder":
        assert found[0] == "raw/b/c.jsonl"  # the first name counts


def test_sub_corpora_that_overlap_are_read_once(here, capsys):
    write("pile/a/x.jsonl", "pile/b/y.jsonl")
    Path("pile/b/again").symlink_to("../a")
    fields = {"name": "n", "data_content": "text", "corpuses": ["a", "b"]}
    Path("pile/metadata.json").write_text(json.dumps(fields))
    assert documents(find("pile")) == {"": ["pile/a/x.jsonl", "pile/b/y.jsonl"]}
    assert "read once: 1 files" in capsys.readouterr().out


def test_one_file_in_two_splits_is_refused(here):
    write("raw/train/a.jsonl", "raw/train/b.jsonl", "raw/test/c.jsonl")
    os.link("raw/train/a.jsonl", "raw/test/a.jsonl")
    with pytest.raises(ValueError, match=r"are one file, for t\w+ and t\w+: remove"):
        find("raw")


# links, and what is left out


def test_links_in_a_circle_are_visited_once(here):
    write("raw/a/1.jsonl", "raw/b/2.jsonl")
    for folder in "ab":
        for name in "xyz":
            Path(f"raw/{folder}/{name}").symlink_to("..")
    for item in ("raw", "raw/**/*.jsonl", "raw/*"):
        assert documents(find(item)) == {"": ["raw/a/1.jsonl", "raw/b/2.jsonl"]}


def test_a_folder_says_what_it_leaves_out(here, capsys, monkeypatch):
    write("raw/a.jsonl", "raw/.hidden", "raw/.git/x", *(f"raw/{c}.md" for c in "wxyz"))
    Path("raw/gone.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo("raw/pipe.jsonl")
    write("raw/shut/b.jsonl", "raw/old/train.bin", "raw/old/metadata.json", "raw/old/skipped.txt")
    listdir = os.listdir

    def refuse(path):
        if str(path) == "raw/shut":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)  # root may read every folder
    assert documents(find("raw")) == {"": ["raw/a.jsonl"]}
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.removeprefix("left out of raw: ") for line in lines) == [
        "1 because it is a prepared corpus (raw/old)",
        "1 because it is not a regular file (raw/pipe.jsonl)",
        "1 because the folder cannot be read (raw/shut)",
        "1 because the link leads nowhere (raw/gone.jsonl)",
        "4 because no reader takes the format (raw/w.md, raw/x.md, raw/y.md, ...)",
    ]
    Path("raw/a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"raw has no .txt.*left out: 4 because no reader"):
        find("raw")


def test_the_log_and_unfinished_work_of_spark_are_left_out(here, capsys):
    """Rows of a failed attempt would come twice, and a log of a table has no rows."""
    for name in ("_temporary/0/b.jsonl", "_delta_log/0.jsonl", "sub/_spark_metadata/0.jsonl"):
        write(f"table/{name}")
    write("table/_notes/a.jsonl")
    for item in ("table", "table/*", "table/**/*.jsonl"):
        assert [source.path for source in find(item)] == ["table/_notes/a.jsonl"]
        assert "3 because it holds no rows of the table" in capsys.readouterr().out


def test_a_glob_reads_the_folders_that_it_matches(here, capsys):
    write("raw/a.jsonl", "raw/b/c.jsonl", "raw/d/e.md")
    assert documents(find("raw/*")) == {"": ["raw/a.jsonl", "raw/b/c.jsonl"]}
    assert "raw/d/e.md" in capsys.readouterr().out


def test_a_name_with_brackets_is_a_name(here):
    write("in [2024]/a.jsonl", "in [2024]/[x].jsonl", "in 2/b.jsonl")
    names = lambda item: [source.path for source in find(item)]  # noqa: E731
    assert names("in [2024]/*.jsonl") == ["in [2024]/[x].jsonl", "in [2024]/a.jsonl"]
    assert names("in [2024]/[x].jsonl") == ["in [2024]/[x].jsonl"]
    assert names("in [0-9]/*.jsonl") == ["in 2/b.jsonl"]


def test_files_that_run_into_each_other_are_reported(here, capsys):
    Path("raw").mkdir()
    for name, text in {"a": "ends\n", "b": "has no end", "c": "", "d": "is last"}.items():
        Path(f"raw/{name}.txt").write_text(text)
    find("raw")
    out = capsys.readouterr().out
    assert out.startswith("1 files do not end with a line feed (raw/b.txt)")
    assert "--documents file" in out
    find("raw", "file")
    find("raw/d.txt")
    assert capsys.readouterr().out == ""


def test_data_dir_inside_the_input(here, capsys, monkeypatch):
    Path("raw").mkdir()
    Path("raw/a.jsonl").write_text(
        "".join(json_line(f"document {i}") for i in range(50)) + "{bad\n"
    )
    flags = ["--input", "raw", "--data_dir", "raw/out", "--tokenizer", "bytes", "--workers", 1]
    flags += ["--on_error", "skip"]
    main(capsys, monkeypatch, *flags)
    assert Path("raw/out/raw/skipped.txt").exists()
    assert "is prepared already" in main(capsys, monkeypatch, *flags)


# descriptions


@pytest.mark.parametrize("answer", ["", "x, y,z", "z,x, y", "x, y"])
def test_a_sub_corpus_with_a_comma(here, monkeypatch, answer):
    write("pile/x, y/a.jsonl", "pile/z/b.jsonl")
    monkeypatch.setattr("builtins.input", lambda question: answer)
    fields = {"name": "n", "download_source": "s", "description": "d", "content_field": "text"}
    describe(Path("pile"), fields)
    assert set(read_description(Path("pile")).corpora) == {"x, y", "z"} - (
        {"z"} if answer == "x, y" else set()
    )
    assert documents(find("pile:x, y")) == {"": ["pile/x, y/a.jsonl"]}


# the `datasets` library


def test_data_sets_that_the_library_cannot_load_are_one_line(here, monkeypatch):
    offline(monkeypatch, here)
    write_jsonl(here / "script" / "train.jsonl", "a")
    Path("script/script.py").write_text("import datasets\n")
    write_jsonl(here / "card" / "train.jsonl", "a")
    Path("card/README.md").write_text("---\nconfigs: [{a: b: c\n---\n")
    write("saved/state.json", "saved/dataset_info.json")
    expected = {
        "hf:script": "name the data files themselves: --input FOLDER",
        "hf:card": r"README\.md is damaged: mend it or remove it",
        "hf:": "write hf:NAME",
        "hf:saved": "hf:saved: ",
    }
    for item, words in expected.items():
        with pytest.raises(ValueError, match=words) as error:
            find(item)
        assert "\n" not in str(error.value)


def test_what_save_to_disk_wrote(here, monkeypatch):
    offline(monkeypatch, here)
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", "b"]})
    data.save_to_disk("one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk("two")
    assert documents(find("hf:one")) == {"": ["a", "b"]}
    assert documents(find("hf:two")) == {"": ["a", "b"], "test": ["b"]}


def test_a_small_data_set_is_not_kept_in_memory(here, monkeypatch):
    offline(monkeypatch, here)
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 1 << 30)
    write_jsonl(here / "mine" / "train.jsonl", "a")
    assert documents(find("hf:mine")) == {"": ["a"]}


@pytest.mark.parametrize("item", ["hf:mine", "mine"])
def test_a_data_set_that_got_one_row_more_is_prepared_again(here, monkeypatch, item):
    """The library gives its file a new name."""
    offline(monkeypatch, here)
    fields = {"name": "n", "data_content": "text", "corpus_separation_strategy": "configs"}
    Path("mine").mkdir()
    if item == "mine":
        Path("mine/metadata.json").write_text(json.dumps(fields))
    texts = [f"document {i}" for i in range(50)]
    for count in (49, 50):
        write_jsonl(here / "mine" / "train.jsonl", *texts[:count])
        os.utime("mine/train.jsonl", ns=(count, count))
        folder = prepare(here / "c", item)
        splits = json.loads((folder / "metadata.json").read_text())["splits"]
        assert sum(split["documents"] for split in splits.values()) == count


# small things


def test_the_same_files_through_another_link_are_the_same(here):
    write_jsonl(here / "raw" / "a.jsonl", *map(str, range(50)))
    Path("link").symlink_to("raw")
    prepare(here / "c", "raw")
    prepare(here / "c", "link")


def test_a_folder_with_the_name_of_a_known_file(here):
    write("tinyshakespeare/input.txt")
    result = run_script("prepare_data.py", "--input", "tinyshakespeare/", cwd=here)
    assert_one_line_error(result, "tinyshakespeare is not a file", "--corpus NAME")


def test_commands_that_are_printed_are_quoted(here, capsys, monkeypatch):
    write_jsonl(here / "my raw" / "a.jsonl", *map(str, range(50)))
    flags = ["--input", "my raw", "--corpus", "c", "--tokenizer", "bytes"]
    out = main(capsys, monkeypatch, *flags, "--data_dir", "my data", "--workers", 1)
    assert "python train_gpt2.py --data_dir 'my data'" in out
    out = main(capsys, monkeypatch, *flags, "--prefetch", "my usb")
    assert "prepare_data.py --data_dir 'my usb' --corpus c --input 'my raw' --tok" in out
    assert "take --data_dir 'my usb', too" in out


@pytest.mark.parametrize("place", ["data", "data/raw"])
@pytest.mark.parametrize("link", [True, False])
def test_a_data_dir_that_is_not_a_folder(here, place, link):
    write("raw/a.jsonl")
    Path(place).parent.mkdir(exist_ok=True)
    if link:
        Path(place).symlink_to("nowhere")
    else:
        write(place)
    result = run_script("prepare_data.py", "--input", "raw", "--tokenizer", "bytes", cwd=here)
    reason = "is a link to nowhere, which does not exist" if link else "is not a folder"
    assert_one_line_error(result, f"{place} {reason}")
