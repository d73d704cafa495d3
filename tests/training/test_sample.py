import contextlib
import io
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line_error, make_corpus, run_script
from processes import start_script

import sample
from corpus.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from training.checkpoint import best_checkpoint, load_model

GREEDY = ["--prompt", "one for sorrow, ", "--temperature", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run that has learnt a rhyme; its last two characters have three bytes."""
    folder = tmp_path_factory.mktemp("trained")
    make_corpus(folder / "data" / "rhyme", ["one for sorrow, 二つ\n" * 240])
    flags = "--n_layer 2 --n_head 2 --n_embd 32 --sequence_length 32 --max_steps 150 --device cpu"
    result = run_script("train_gpt2.py", *flags.split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def write(trained, monkeypatch, capsys):
    """write(*flags, typed=b"") is `python sample.py FLAGS`: what it prints."""
    monkeypatch.chdir(trained)

    def write(*flags, typed=b""):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        sample.main()
        return capsys.readouterr().out

    return write


def test_text_goes_on_from_a_flag_a_file_or_standard_input(write, tmp_path):
    expected = "one for sorrow, 二つ\none\n\n"
    assert write(*GREEDY, "--max_new_tokens", 10) == expected
    assert write(*GREEDY, "--max_new_tokens", 10, "--run", "out/rhyme-tiny-1") == expected
    prompt = "two\r\n for sörrow, "  # as it is
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    rest = ["--temperature", 0, "--max_new_tokens", 4]
    from_file = write("--prompt_file", tmp_path / "prompt.txt", *rest)
    assert from_file.startswith(prompt)
    assert write("--prompt", "-", *rest, typed=prompt.encode()) == from_file
    assert len(write("--prompt", "", *rest)) > 2  # a document's beginning


@pytest.mark.parametrize("samples", [1, 2])
def test_no_character_is_cut_in_two(write, samples):
    for bytes_made, text in {2: "", 3: "二", 5: "二", 6: "二つ", 8: "二つ\no"}.items():
        found = write(*GREEDY, "--max_new_tokens", bytes_made, "--num_samples", samples)
        end = "\n\n" if samples == 1 else "\n---\n"
        assert found == f"one for sorrow, {text}{end}" * samples


def test_several_samples_differ_and_repeat_with_the_seed(write):
    flags = ["--num_samples", 3, "--max_new_tokens", 60, "--temperature", 2, "--prompt", "t"]
    texts = write(*flags).split("\n---\n")
    assert len({*texts[:3]}) == 3 and texts[3:] == [""]
    assert all(text.startswith("t") for text in texts[:3])
    assert write(*flags).split("\n---\n") == texts
    assert write(*flags, "--seed", 1).split("\n---\n") != texts
    narrow = write(*flags, "--top_k", 1)  # only the most likely token, whatever the temperature
    assert narrow == write(*flags[:-4], "--temperature", 0, "--prompt", "t")
    assert narrow == write(*flags, "--top_p", 1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 9}, {"temperature": 2, "top_p": 0.8}]
)
def test_the_cache_changes_no_token_also_past_the_window(trained, options):
    """32 positions; 80 tokens, each also with all of the window run anew."""
    model = load_model(best_checkpoint(trained / "out" / "rhyme-tiny-1"))
    start = torch.tensor([[*b"one f"], [*b" sorr"]])
    generator = torch.Generator().manual_seed(5)
    cached = torch.stack(list(model.generate(start, 80, **options, generator=generator)), dim=1)
    generator.manual_seed(5)
    ids = start
    for _ in range(80):
        (new,) = model.generate(ids[:, -32:], 1, **options, generator=generator)
        ids = torch.cat((ids, new[:, None]), dim=1)
    assert torch.equal(cached, ids[:, 5:])


def test_prompts_one_after_the_other(write):
    flags = ["--interactive", "--temperature", 0, "--max_new_tokens", 7]
    answer = "one for sorrow, 二つ\n\n\n"
    typed = b"one for sorrow, \none for sorrow, \n"
    assert write(*flags, typed=typed) == f"> {answer}> {answer}> \n"  # Ctrl-D is its end


@pytest.fixture
def typing(trained, tmp_path):
    """typing(*flags): python sample.py FLAGS, the end to type into and that to read from."""
    for name in ("in.txt", "out.txt"):
        os.mkfifo(tmp_path / name)
    with contextlib.ExitStack() as stack:

        def typing(*flags):
            process = start_script(ROOT / "sample.py", *flags, cwd=trained, streams=tmp_path)
            keyboard = stack.enter_context(open(tmp_path / "in.txt", "wb", buffering=0))
            return process, keyboard, stack.enter_context(open(tmp_path / "out.txt", "rb"))

        yield typing


def test_ctrl_c_ends_a_text_and_then_the_prompts(typing, tmp_path):
    """The text comes while it is made: a million tokens take longer than this test may."""
    process, keyboard, screen = typing("--interactive", "--max_new_tokens", 1_000_000)
    keyboard.write(b"one for\n")
    assert screen.read(40).startswith(b"> one for")
    os.kill(process.pid, signal.SIGINT)
    rest = b""
    while not rest.endswith(b"\n> "):
        rest += screen.read(1)
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "S":
        time.sleep(0.01)  # a signal between the prompt and the wait for a key would be seen late
    os.kill(process.pid, signal.SIGINT)
    process.join()
    err = (tmp_path / "err.txt").read_text()
    assert (process.exitcode, screen.read()) == (0, b"\n"), err


def test_ctrl_c_ends_a_single_text(typing, tmp_path):
    process, _, screen = typing("--max_new_tokens", 1_000_000)
    assert len(screen.read(40)) == 40
    os.kill(process.pid, signal.SIGINT)
    screen.read()
    process.join()
    assert "Traceback" not in (tmp_path / "err.txt").read_text()
    assert process.exitcode == 130


@pytest.fixture
def weights(tmp_path):
    """A folder with a small model of 257 ids."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(257, n_positions=24, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(tmp_path / "weights", get_tokenizer("bytes"))
    return tmp_path / "weights"


def test_pretrained_weights_are_sampled_from(write, weights):
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    flags = ["--init_from", weights, "--prompt", "abc", "--max_new_tokens", 40]
    assert write(*flags).startswith("abc")


def test_weights_without_a_tokenizer_are_taken_for_gpt2s(write, weights, gpt2_tokenizer):
    (weights / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="weights has 257 ids, fewer than the 50,257 of gpt2"):
        write("--init_from", weights)


def test_a_finished_run_is_exported_and_no_model_overwritten(write, tmp_path):
    assert "from_pretrained" in write("--export", tmp_path / "mine")
    best = best_checkpoint(sample.newest_run("out"))["model"]
    exported = GPT.from_pretrained(tmp_path / "mine").state_dict()
    assert all(torch.equal(weight, best[name]) for name, weight in exported.items())
    for taken in (tmp_path / "mine", "out/rhyme-tiny-1"):
        with pytest.raises(FileExistsError, match="holds a model already"):
            write("--export", taken)


WRONG = {
    "temperature": (["--temperature", -1], "temperature"),
    "samples": (["--num_samples", 0], "num_samples must be at least 1"),
    "no such run": (["--run", "out/x"], "out/x/last.pt"),
    "two models": (["--run", "out/x", "--init_from", "gpt2"], "leave one out"),
    "two prompts": (["--prompt", "a", "--prompt_file", "b"], "leave one out"),
    "no such weights": (["--init_from", "nowhere"], "nowhere is neither a folder with config.json"),
    "no such file": (["--prompt_file", "nowhere"], "nowhere"),
    "no text": (["--prompt", "-"], "standard input is not UTF-8 text: see its byte 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_refused(write, case):
    flags, words = WRONG[case]
    with pytest.raises((ValueError, OSError), match=words):
        write(*flags, typed=b"ab\xff")


def test_wrong_use_is_one_line(trained):
    result = run_script("sample.py", "--temperature", "-1", cwd=trained)
    assert_one_line_error(result, "temperature")


def test_nothing_trained(tmp_path):
    result = run_script("sample.py", cwd=tmp_path)
    assert_one_line_error(result, "out/ has no trained model", "python train_gpt2.py")
