"""Weights, corpora and tokenizers with other vocabularies of the same size are not mixed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_corpus

import dataset
import sample
import train_gpt2
from corpus.metadata import read_metadata
from corpus.tokenizer import HuggingFaceTokenizer, get_tokenizer, vocabulary_digest
from corpus.verify import verify
from corpus.vocabulary import GPT2_DIGEST, read_vocabulary, vocabulary_of
from corpus.vocabulary_files import vocabulary_folder
from model import GPT, GPTConfig
from training.huggingface import tokenizer_json
from training.vocabulary import check_vocabulary

pytest.importorskip("tokenizers", reason="needs tokenizers")

TEXT = "one for sorrow, two for mirth\n" * 180


@pytest.fixture
def vocabularies(tiktoken_file, monkeypatch, tmp_path):
    """Two tokenizers of 321 ids, in which ids from 256 on stand for other bytes."""
    monkeypatch.chdir(tmp_path)
    lines = tiktoken_file.read_bytes().splitlines()
    tokens = [line.split()[0] for line in lines]
    changed = tokens[:256] + tokens[:255:-1]
    other_file = tiktoken_file.with_name("other.tiktoken")
    other_file.write_bytes(b"".join(b"%s %d\n" % (token, i) for i, token in enumerate(changed)))
    return {"mine": get_tokenizer(str(tiktoken_file)), "other": get_tokenizer(str(other_file))}


def write_weights(folder: Path, tokenizer, form: str) -> None:
    """Write a small model of 321 ids, and a vocabulary in one of three forms."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(321, n_positions=16, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(folder)
    content = json.loads(tokenizer_json(tokenizer))
    if form == "tokenizer.json":
        (folder / form).write_text(json.dumps(content))
    if form == "vocab.json":
        (folder / form).write_text(json.dumps(content["model"]["vocab"]))
        merges = [" ".join(pair) for pair in content["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def fine_tune(monkeypatch, **changes):
    flags = TINY | {"init_from": "weights", "max_steps": 1, "run_name": "run"} | changes
    for name in ("n_layer", "n_head", "n_embd"):
        flags.pop(name, None)
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *argv])
    for module in ("metrics", "report"):
        monkeypatch.setattr(f"training.{module}.plot_losses", lambda folder: None)
    return train_gpt2.main()


def test_one_vocabulary_in_three_forms_is_the_same(vocabularies, tmp_path):
    for name, tokenizer in vocabularies.items():
        for form in ("tokenizer.json", "vocab.json"):
            write_weights(tmp_path / name / form, tokenizer, form)
            assert read_vocabulary(tmp_path / name / form) == tokenizer.token_bytes
        file = HuggingFaceTokenizer("file", tmp_path / name / "tokenizer.json" / "tokenizer.json")
        assert vocabulary_digest(vocabulary_of(file)) == tokenizer.sha256
    assert read_vocabulary(tmp_path) is None
    assert vocabularies["mine"].sha256 != vocabularies["other"].sha256


def test_gpt2s_vocabulary_is_the_same_in_all_forms(gpt2_tokenizer, tmp_path):
    content = json.loads(tokenizer_json(gpt2_tokenizer))
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    assert vocabulary_digest(read_vocabulary(tmp_path)) == gpt2_tokenizer.sha256 == GPT2_DIGEST
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert vocabulary_digest(read_vocabulary(tmp_path)) == GPT2_DIGEST


def test_a_vocabulary_without_byte_letters_is_read(tmp_path):
    content = {
        "model": {"type": "Unigram", "vocab": [["<unk>", 0], ["\u2581a", -1.5]]},
        "decoder": {"type": "Metaspace"},
        "added_tokens": [{"id": 2, "content": "</s>"}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(tmp_path) == {0: b"<unk>", 1: "\u2581a".encode(), 2: b"</s>"}
    for damaged in ("[]", "{}", '{"model": {"vocab": 3}}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer.json is damaged"):
            read_vocabulary(tmp_path)


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json", "none"])
def test_fine_tuning_compares_the_vocabularies(vocabularies, form, monkeypatch, capsys, tmp_path):
    make_corpus(Path("data/mine"), [TEXT], tokenizer=vocabularies["mine"].name)
    write_weights(tmp_path / "weights", vocabularies["other"], form)
    if form == "none":
        assert fine_tune(monkeypatch) == 0
        assumed = "weights has no vocabulary: assuming that of the corpus mine (small-"
        assert assumed in capsys.readouterr().err
        return
    with pytest.raises(ValueError, match=r"mine .* has another vocabulary than weights .*id 256"):
        fine_tune(monkeypatch)
    assert not Path("out").exists()
    write_weights(tmp_path / "weights", vocabularies["mine"], form)
    assert fine_tune(monkeypatch) == 0
    assert capsys.readouterr().err == ""


def test_openais_weights_take_gpt2s_vocabulary(vocabularies, tmp_path, capsys):
    corpora = {
        name: make_corpus(tmp_path / "data" / name, [TEXT], tokenizer=tokenizer.name)
        for name, tokenizer in vocabularies.items()
    }
    with pytest.raises(ValueError, match=r"has another vocabulary than gpt2 \(it is GPT-2's\)"):
        check_vocabulary("gpt2", tmp_path, "mine", corpora["mine"])
    gpt2 = corpora["mine"] | {"tokenizer": {"name": "gpt2", "sha256": GPT2_DIGEST}}
    check_vocabulary("gpt2", tmp_path, "mine", gpt2)  # GPT-2's vocabulary is not on this machine
    assert capsys.readouterr().err == ""
    write_weights(tmp_path / "weights", vocabularies["mine"], "vocab.json")
    check_vocabulary("weights", tmp_path / "weights", "mine", gpt2)
    assert "(gpt2) is not on this machine: assuming that it is" in capsys.readouterr().err


def test_a_run_does_not_resume_with_another_vocabulary(vocabularies, monkeypatch, tmp_path):
    make_corpus(Path("data/mine"), [TEXT], tokenizer=vocabularies["mine"].name)
    write_weights(tmp_path / "weights", vocabularies["mine"], "tokenizer.json")
    assert fine_tune(monkeypatch, max_steps=2, stop_at=1) == 0
    make_corpus(Path("data/mine"), [TEXT], tokenizer=vocabularies["other"].name)
    monkeypatch.setattr("sys.argv", ["train_gpt2.py", "--resume", "out/run"])
    with pytest.raises(ValueError, match="mine has another vocabulary than when out/run") as error:
        train_gpt2.main()
    names = [vocabularies[name].name for name in ("mine", "other")]
    assert f"(then {names[0]}, now {names[1]}): prepare it again with python" in str(error.value)
    assert f"--corpus mine --tokenizer {names[0]} --input data/mine.txt" in str(error.value)
    # the same vocabulary from a file of another name gives the same ids
    copy = tmp_path / "copy.tiktoken"
    copy.write_bytes((vocabulary_folder() / vocabularies["mine"].name).read_bytes())
    make_corpus(Path("data/mine"), [TEXT], tokenizer=str(copy))
    assert read_metadata("data/mine")["tokenizer"]["name"].startswith("copy-")
    assert train_gpt2.main() == 0


def test_a_name_that_stands_for_another_vocabulary(vocabularies, monkeypatch, capsys, tmp_path):
    """The name of a tokenizer is in the metadata; its file may have changed since."""
    make_corpus(Path("data/mine"), [TEXT], tokenizer=vocabularies["mine"].name)
    write_weights(tmp_path / "weights", vocabularies["mine"], "tokenizer.json")
    assert fine_tune(monkeypatch) == 0
    file = vocabulary_folder() / vocabularies["mine"].name
    file.write_bytes((vocabulary_folder() / vocabularies["other"].name).read_bytes())
    monkeypatch.setattr("corpus.tokenizer._load", lambda name, folder: vocabularies["other"])
    for flags in ([], ["--export", "exported"], ["--run", "out/run"]):
        monkeypatch.setattr("sys.argv", ["sample.py", *flags])
        with pytest.raises(ValueError, match="out/run was made with another vocabulary of the nam"):
            sample.main()
    assert not Path("exported").exists()
    with pytest.raises(ValueError, match="data/mine was made with another vocabulary of the name"):
        verify(Path("data/mine"))
    monkeypatch.setattr("sys.argv", ["dataset.py", "mine"])
    with pytest.raises(ValueError, match="data/mine was made with another vocabulary of the name"):
        dataset.main()
    capsys.readouterr()
    assert fine_tune(monkeypatch, run_name="two", init_from="") == 0  # trains, without a sample
    assert "no samples: out/two was made with another vocabulary" in capsys.readouterr().out


def test_sampling_takes_the_vocabulary_of_the_folder(vocabularies, monkeypatch, capsys, tmp_path):
    def write(form):
        write_weights(tmp_path / "weights", vocabularies["other"], form)
        flags = ["--init_from", "weights", "--prompt", "te", "--max_new_tokens", "8"]
        monkeypatch.setattr("sys.argv", ["sample.py", *flags])
        sample.main()
        return capsys.readouterr()

    by_vocab = write("vocab.json")
    assert by_vocab == write("tokenizer.json")
    assert by_vocab.err == ""
    (tmp_path / "weights" / "merges.txt").unlink()
    (tmp_path / "weights" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"weights has vocab.json without merges.txt"):
        sample.main()


def test_weights_without_a_vocabulary_are_said_to_have_gpt2s(
    gpt2_tokenizer, monkeypatch, capsys, tmp_path
):
    GPT(GPTConfig(50257, 16, 1, 1, 2)).save_pretrained(tmp_path / "weights")
    flags = ["--init_from", str(tmp_path / "weights"), "--max_new_tokens", "1"]
    monkeypatch.setattr("sys.argv", ["sample.py", *flags])
    sample.main()
    assert capsys.readouterr().err.endswith("weights has no vocabulary: assuming GPT-2's\n")
