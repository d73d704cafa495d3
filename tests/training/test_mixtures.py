"""train_gpt2.py --corpus a:0.7 b:0.3: runs on a mixture of corpora."""

import json
import math
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, losses, make_corpus, run_script
from test_distributed import errors_of, start_ranks

import sample
import train_gpt2
from corpus.metadata import read_metadata
from corpus.tokenizer import get_tokenizer
from training.checkpoint import load_checkpoint
from training.corpora import corpus_weights
from training.json_lines import read_lines
from training.models import load_model
from training.report_page import write_report_page
from training.runs import read_run
from training.sampling import prompt_ids

MIXTURE = ("rhyme:0.7", "verses:0.3")


@pytest.fixture(autouse=True)
def verses(tmp_path):
    """The folder data/verses: documents, beside the running text data/rhyme."""
    texts = ["three for a girl", "four for a boy", "five for silver"] * 60
    make_corpus(tmp_path / "data/verses", texts, documents=True)
    return tmp_path / "data/verses"


def test_a_resumed_mixture_equals_a_whole_run_bit_for_bit(train):
    options = {"corpus": MIXTURE, "max_steps": 10, "token_noise": 0.1, "dropout": 0.1}
    whole = train(**options, run_name="whole")
    train(**options, run_name="parts", stop_at=5)
    parts = train(resume="out/parts")
    assert losses(parts) == losses(whole)
    for name in ("val_loss", "val_bpb", "val_loss/rhyme", "val_loss/verses"):
        assert losses(parts, name) == losses(whole, name)
    expected = load_checkpoint(whole / "last.pt")
    found = load_checkpoint(parts / "last.pt")
    assert (found["step"], found["position"]) == (10, 40)
    for name, weight in expected["model"].items():
        assert torch.equal(weight, found["model"][name]), name
    config = json.loads((parts / "config.json").read_text())
    assert config["corpus"] == list(MIXTURE)


def test_validation_is_of_each_corpus_and_of_the_mixture(train, verses, rhyme, capsys):
    """With a learning rate of 0 all runs have the same weights."""
    options = {"max_steps": 1, "learning_rate": 0}
    alone = {
        name: read_lines(train(corpus=name, **options) / "metrics.jsonl")[-1]
        for name in ("rhyme", "verses")
    }
    capsys.readouterr()
    folder = train(corpus=MIXTURE, **options)
    assert folder.name == "rhyme+verses-tiny-1"
    line = read_lines(folder / "metrics.jsonl")[-1]
    for name, expected in alone.items():
        assert line[f"val_loss/{name}"] == pytest.approx(expected["val_loss"], abs=1e-5)
        assert line[f"val_bpb/{name}"] == pytest.approx(expected["val_bpb"], abs=1e-5)
    val = [read_metadata(each)["splits"]["val"] for each in (rhyme, verses)]
    # a text of 1,000,000 tokens in these proportions
    nats = 700_000 * line["val_loss/rhyme"] + 300_000 * line["val_loss/verses"]
    num_bytes = 700_000 * val[0]["bytes"] / val[0]["tokens"]
    num_bytes += 300_000 * val[1]["bytes"] / val[1]["tokens"]
    assert line["val_loss"] == pytest.approx(nats / 1e6)
    assert line["val_bpb"] == pytest.approx(nats / math.log(2) / num_bytes)
    best = load_checkpoint(folder / "best.pt")["best"]
    assert best == {"step": 1, "val_loss": line["val_loss"]}
    out = capsys.readouterr().out
    rhyme_loss, verses_loss = line["val_loss/rhyme"], line["val_loss/verses"]
    assert f"bits per byte (rhyme {rhyme_loss:.4f}, {line['val_bpb/rhyme']:.4f}; verses " in out
    assert f"verses {verses_loss:.4f}, {line['val_bpb/verses']:.4f}); train " in out


def test_a_mixture_has_a_page_and_compares_by_its_shares(train, verses, rhyme):
    first = train(corpus=MIXTURE, max_steps=2)
    second = train(corpus=("rhyme:0.3", "verses:0.7"), max_steps=2)
    checkpoint = load_checkpoint(first / "best.pt")
    page = write_report_page(first, checkpoint, load_model(checkpoint)).read_text()
    assert "<h3>rhyme</h3>" in page and "<h3>verses</h3>" in page
    assert "cannot be scored" not in page
    num_bytes = sum(read_metadata(each)["splits"]["val"]["bytes"] for each in (rhyme, verses))
    runs = [read_run(first), read_run(second)]
    assert runs[0].text == f"{num_bytes:,} bytes of rhyme:0.7 verses:0.3"
    assert runs[0].text_key != runs[1].text_key


def test_one_line_says_how_often_each_corpus_is_read(train, capsys):
    train(corpus=MIXTURE, max_steps=100, stop_at=1)  # 400 sequences of 16 tokens
    num_tokens = {
        name: read_metadata(f"data/{name}")["splits"]["train"]["tokens"]
        for name in ("rhyme", "verses")
    }
    epochs = {name: (count - 16) // 16 for name, count in num_tokens.items()}
    expected = (
        f"mixture: rhyme 70.00%, read {280 / epochs['rhyme']:.2f} times; "
        f"verses 30.00%, read {120 / epochs['verses']:.2f} times"
    )
    assert expected in capsys.readouterr().out.splitlines()


def test_the_same_line_for_a_single_corpus(train, capsys):
    """Whether the training loss falls because the text comes again depends on this number."""
    train(corpus="rhyme", max_steps=100, stop_at=1)
    epoch = (read_metadata("data/rhyme")["splits"]["train"]["tokens"] - 16) // 16
    assert f"corpus: rhyme, read {400 / epoch:.2f} times" in capsys.readouterr().out.splitlines()


def test_without_weights_every_corpus_is_read_equally_often(train, capsys):
    train(corpus=("rhyme", "verses"), max_steps=100, stop_at=1)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("mixture: ")]
    times = [float(part.split()[3]) for part in line.removeprefix("mixture: ").split("; ")]
    assert times[0] == pytest.approx(times[1], rel=0.05)


def test_a_single_corpus_may_have_a_weight(train):
    plain = train(corpus="rhyme", max_steps=2, run_name="plain")
    weighted = train(corpus=("rhyme:3",), max_steps=2, run_name="weighted")
    assert losses(weighted) == losses(plain)
    assert losses(weighted, "val_loss") == losses(plain, "val_loss")
    line = read_lines(weighted / "metrics.jsonl")[-1]
    assert line.keys() == {"step", "tokens", "val_loss", "val_bpb"}


def test_the_mixture_cannot_change_on_resume(train, verses):
    train(corpus=MIXTURE, max_steps=4, stop_at=1, run_name="run")
    for other in (("rhyme:0.5", "verses:0.5"), ("rhyme",)):
        words = "corpus rhyme:0.7 verses:0.3: --resume cannot change it to " + " ".join(other)
        with pytest.raises(ValueError, match=words):
            train(resume="out/run", corpus=other)
    train(resume="out/run", corpus=MIXTURE, stop_at=2)  # the same again
    make_corpus(verses, ["another text"] * 180, documents=True)
    with pytest.raises(ValueError, match=r"^verses has another text"):
        train(resume="out/run")


def test_equal_shares_may_be_written_in_another_way_on_resume(train):
    folder = train(corpus=MIXTURE, max_steps=4, stop_at=1, run_name="run")
    for same in (("rhyme:7", "verses:3"), ("rhyme:.70", "verses:.30")):
        train(resume="out/run", corpus=same, max_steps=4, stop_at=2)
        (folder / "previous.pt").replace(folder / "last.pt")
    assert json.loads((folder / "config.json").read_text())["corpus"] == list(MIXTURE)
    for other in (("verses:3", "rhyme:7"), ("rhyme", "verses")):
        with pytest.raises(ValueError, match="cannot change it to " + " ".join(other)):
            train(resume="out/run", corpus=other)


def test_a_mixture_has_documents_if_one_of_its_corpora_has(train):
    """The losses of each corpus are those under its own masks: see the test of validation."""
    checkpoint = load_checkpoint(train(corpus=MIXTURE, max_steps=1) / "last.pt")
    assert checkpoint["chosen"]["document_mask"] == "true"
    splits = checkpoint["metadata"]["splits"]
    assert sorted(splits) == ["rhyme/train", "rhyme/val", "verses/train", "verses/val"]
    with pytest.raises(ValueError, match=r"rhyme\+again .* has no documents to mask"):
        make_corpus(Path("data/again"), ["one for sorrow\n" * 200])
        train(corpus=("rhyme:1", "again:1"), document_mask="true", max_steps=1)


def test_sample_writes_text_of_a_mixture(train, monkeypatch, capsys):
    folder = train(corpus=MIXTURE, max_steps=2)
    assert (folder / "sample.txt").exists()
    for prompt in ([], ["--prompt", "one for"]):
        flags = ["--max_new_tokens", "4", "--device", "cpu", *prompt]
        monkeypatch.setattr(sys, "argv", ["sample.py", "--run", str(folder), *flags])
        sample.main()
    metadata = load_checkpoint(folder / "last.pt")["metadata"]
    # text begins with the end of text, as the documents of the mixture do
    assert prompt_ids(get_tokenizer("bytes"), "", metadata) == [256]
    # a run on one corpus may start with the weights of a mixture of the same vocabulary
    assert train(init_from=str(folder), corpus="rhyme", max_steps=1).name != folder.name


def test_two_processes_train_on_the_order_of_one(train, tmp_path):
    one = train(corpus=MIXTURE, max_steps=8)
    flags = TINY | {"max_steps": 8, "run_name": "two", "stop_at": 5}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    ranks = start_ranks(tmp_path, ROOT / "train_gpt2.py", *argv, "--corpus", *MIXTURE)
    assert errors_of(tmp_path, ranks) == ["", ""]
    two = train(resume="out/two")  # in one process
    for name in ("train_loss", "val_loss", "val_loss/rhyme", "val_loss/verses"):
        assert losses(two, name) == pytest.approx(losses(one, name), abs=1e-5)


def test_weights_are_the_numbers_that_are_written():
    weights = corpus_weights(("a:0.7", "b:.3", "c:2e-1", "d:5"))
    assert weights == {
        "a": Fraction(7, 10), "b": Fraction(3, 10), "c": Fraction(1, 5), "d": Fraction(5)
    }  # fmt: skip
    assert corpus_weights(("a", "b/")) == {"a": None, "b": None}


WRONG = {
    "not prepared": (["rhyme:1", "nope:1"], ["data/nope", "prepared: rhyme, verses"]),
    "a comma": (["rhyme:7,verses:3"], ["spaces, not by commas: --corpus rhyme:7 verses:3"]),
    "a digit": (["rhyme:7,20news:3"], ["--corpus rhyme:7 20news:3"]),
    "comma and space": (["rhyme:.7,", "verses:.3"], ["--corpus rhyme:.7 verses:.3"]),
    "a decimal comma": (["rhyme:0,7", "verses:0,3"], ["positive number, not '0,7'"]),
    "not a number": (["rhyme:much", "verses:1"], ["weight of the corpus rhyme", "'much'"]),
    "no number": (["rhyme:", "verses:1"], ["weight of the corpus rhyme", "not ''"]),
    "zero": (["rhyme:0", "verses:1"], ["rhyme", "positive number, not '0'"]),
    "negative": (["rhyme:-1", "verses:1"], ["rhyme", "positive number, not '-1'"]),
    "nan": (["rhyme:nan", "verses:1"], ["rhyme", "positive number, not 'nan'"]),
    "huge": (["rhyme:1e999999999", "verses:1"], ["rhyme", "positive number"]),
    "tiny": (["rhyme:1e9", "verses:1"], ["--corpus rhyme:1e9 verses:1", "weight 1 is too small"]),
    "some weights": (["rhyme:1", "verses"], ["no weight to verses", "by size"]),
    "twice": (["rhyme:1", "rhyme:2"], ["rhyme twice"]),
    "twice, as a folder": (["rhyme/", "rhyme"], ["rhyme twice"]),
    "no name": ([":1"], ["':1'", "NAME:WEIGHT"]),
    "too short": (["rhyme:1", "short:1"], ["data/short/val", "lower sequence_length"]),
    "no val": (["rhyme:1", "train-only:1"], ["data/train-only has no split 'val', only train"]),
    "vocabulary": (
        ["rhyme:1", "other:1"],
        ["data/other (small", "than data/rhyme: prepare data/other again with --tokenizer bytes"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_mixture_is_an_error_before_the_run_has_a_folder(
    rhyme, tmp_path, monkeypatch, tiktoken_file, case
):
    monkeypatch.chdir(tmp_path)
    corpus, words = WRONG[case]
    if case == "too short":
        make_corpus(Path("data/short"), ["one for sorrow, " * 8])
    if case == "vocabulary":
        make_corpus(Path("data/other"), ["one for sorrow, " * 200], tokenizer=str(tiktoken_file))
    if case == "no val":
        make_corpus(Path("data/train-only"), ["one for sorrow, " * 200])
        path = Path("data/train-only/metadata.json")
        metadata = json.loads(path.read_text())
        del metadata["splits"]["val"], metadata["sha256"]
        path.write_text(json.dumps(metadata))
    argv = [str(part) for name, value in TINY.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *argv, "--corpus", *corpus])
    with pytest.raises((ValueError, OSError)) as error:
        train_gpt2.main()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.glob("out/*")) == []


def test_prepare_data_refuses_a_name_with_a_colon(tmp_path):
    (tmp_path / "my.txt").write_text("one for sorrow\n" * 100)
    flags = ["--input", "my.txt", "--tokenizer", "bytes", "--corpus", "my:1"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert_one_line_error(result, "'my:1' has a colon", "--corpus NAME")
    assert not (tmp_path / "data" / "my:1").exists()
