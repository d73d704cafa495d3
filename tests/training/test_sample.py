"""sample.py: prompts, samples, the KV cache, Ctrl-C, exports and errors."""

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
from training.checkpoint import best_checkpoint
from training.models import load_model
from training.sampling import prompt_ids

GREEDY = ["--prompt", "one for sorrow, ", "--temperature", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run that has learned a rhyme; two of its characters have three bytes."""
    folder = tmp_path_factory.mktemp("trained")
    make_corpus(folder / "data" / "rhyme", ["one for sorrow, 二つ\n" * 240])
    flags = "--n_layer 2 --n_head 2 --n_embd 32 --sequence_length 32 --max_steps 150 --device cpu"
    result = run_script("train_gpt2.py", *flags.split(), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def write(trained, monkeypatch, capsys):
    """A function write(*flags, typed=b"") that returns the output of `python sample.py FLAGS`."""
    monkeypatch.chdir(trained)

    def write(*flags, typed=b""):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        sample.main()
        return capsys.readouterr().out

    return write


def test_the_prompt_is_a_flag_a_file_or_standard_input(write, tmp_path):
    expected = "one for sorrow, 二つ\none\n\n"
    assert write(*GREEDY, "--max_new_tokens", 10) == expected
    assert write(*GREEDY, "--max_new_tokens", 10, "--run", "out/rhyme-tiny-1") == expected
    prompt = "two\r\n for sörrow, "  # stays unchanged
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    rest = ["--temperature", 0, "--max_new_tokens", 4]
    from_file = write("--prompt_file", tmp_path / "prompt.txt", *rest)
    assert from_file.startswith(prompt)
    assert write("--prompt", "-", *rest, typed=prompt.encode()) == from_file
    assert write("--prompt", "", *rest) == "one \n\n"  # after a line break


DOCUMENTS = ["once upon a time", "once more", "once a king sat on a throne of gold"]


@pytest.mark.parametrize("document_mask", ["true", "false"])
def test_a_model_of_documents_begins_and_ends_them(
    train, tmp_path, monkeypatch, capsys, document_mask
):
    make_corpus(tmp_path / "data" / "tales", DOCUMENTS * 60, documents=True)
    shape = {"n_embd": 32, "sequence_length": 48, "batch_size": 8}
    folder = train(corpus="tales", max_steps=250, document_mask=document_mask, **shape)
    samples = (folder / "sample.txt").read_text().split("\n---\n")
    assert len(samples) > 3  # 200 tokens of short documents, each for itself
    assert all(text.startswith("once") for text in samples[:-1])  # the last one may be cut
    capsys.readouterr()

    def write(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
        sample.main()
        return capsys.readouterr().out

    texts = write("--num_samples", "9", "--temperature", "0.5").split("\n---\n")
    assert texts[9:] == [""] and {*texts[:9]} <= {*DOCUMENTS}
    assert write("--temperature", "0") in [f"{text}\n\n" for text in DOCUMENTS]
    assert write("--prompt", "once m", "--temperature", "0") == "once more\n\n"
    model = load_model(best_checkpoint(folder))
    with torch.no_grad():
        assert model(torch.tensor([[256]]))[0][0, -1].softmax(-1)[ord("o")] > 0.9


def test_prompts_begin_as_texts_do_in_training():
    """After documents with an end-of-text token, after a running text without it."""
    tokenizer = get_tokenizer("bytes")
    documents = {"eot_per_document": True}
    running_text = {"eot_per_document": False}
    assert prompt_ids(tokenizer, "hi", documents) == [256, *b"hi"]
    assert prompt_ids(tokenizer, "", documents) == [256]
    assert prompt_ids(tokenizer, "hi", running_text) == [*b"hi"]
    assert prompt_ids(tokenizer, "", running_text) == [*b"\n"]
    assert prompt_ids(tokenizer, "hi", None) == [*b"hi"]
    assert prompt_ids(tokenizer, "", None) == [256]


@pytest.mark.parametrize("samples", [1, 2])
def test_the_output_has_whole_characters_only(write, samples):
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
def test_the_cache_changes_no_token_beyond_the_last_position(trained, options):
    """The model has 32 positions and generates 80 tokens, with and without the cache."""
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


def test_interactive_answers_one_prompt_after_another(write):
    flags = ["--interactive", "--temperature", 0, "--max_new_tokens", 7]
    answer = "one for sorrow, 二つ\n\n\n"
    typed = b"one for sorrow, \none for sorrow, \n"
    assert write(*flags, typed=typed) == f"> {answer}> {answer}> \n"  # Ctrl-D ends the input


@pytest.fixture
def typing(trained, tmp_path):
    """A function that starts sample.py and returns its process, its input and its output."""
    for name in ("in.txt", "out.txt"):
        os.mkfifo(tmp_path / name)
    with contextlib.ExitStack() as stack:

        def typing(*flags):
            process = start_script(ROOT / "sample.py", *flags, cwd=trained, streams=tmp_path)
            keyboard = stack.enter_context(open(tmp_path / "in.txt", "wb", buffering=0))
            screen = stack.enter_context(open(tmp_path / "out.txt", "rb"))
            return process, keyboard, screen

        yield typing


def test_ctrl_c_ends_a_text_and_a_second_one_ends_the_program(typing, tmp_path):
    """The output appears during generation: a million tokens exceed the time limit of the test."""
    process, keyboard, screen = typing("--interactive", "--max_new_tokens", 1_000_000)
    keyboard.write(b"one for\n")
    assert screen.read(40).startswith(b"> one for")
    os.kill(process.pid, signal.SIGINT)
    rest = b""
    while not rest.endswith(b"\n> "):
        rest += screen.read(1)
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "S":
        # a signal between the prompt and the wait for a key would have no effect until a key
        time.sleep(0.01)
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


def test_pretrained_weights_continue_a_prompt(write, weights):
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    flags = ["--init_from", weights, "--prompt", "abc", "--max_new_tokens", 40]
    assert write(*flags).startswith("abc")


def test_weights_without_a_tokenizer_need_the_vocabulary_of_gpt2(write, weights, gpt2_tokenizer):
    (weights / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="weights has 257 ids, fewer than the 50,257 of gpt2"):
        write("--init_from", weights)


def test_export_writes_the_best_weights_and_overwrites_no_model(write, tmp_path):
    assert "from_pretrained" in write("--export", tmp_path / "mine")
    best = load_model(best_checkpoint(sample.newest_run("out"))).state_dict()
    exported = GPT.from_pretrained(tmp_path / "mine").state_dict()
    assert all(torch.equal(weight, best[name]) for name, weight in exported.items())
    for used_folder in (tmp_path / "mine", "out/rhyme-tiny-1"):
        with pytest.raises(FileExistsError, match="holds a model already"):
            write("--export", used_folder)


@pytest.mark.parametrize("flag", ["--run", "--init_from"])
def test_a_run_is_named_by_its_folder_or_a_file(write, flag):
    expected = write(*GREEDY)
    for name in ("", "/", "/best.pt", "/last.pt"):
        assert write(flag, f"out/rhyme-tiny-1{name}", *GREEDY) == expected


WRONG_FLAGS = {  # case -> flags, words of the error
    "temperature": (["--temperature", -1], "temperature"),
    "samples": (["--num_samples", 0], "num_samples must be at least 1"),
    "no such run": (["--run", "out/x"], "out/x is not a run .* such as out/rhyme-tiny-1"),
    "the folder of runs": (["--run", "out"], "out is not a run .* such as out/rhyme-tiny-1"),
    "two models": (["--run", "out/x", "--init_from", "gpt2"], "leave one out"),
    "two prompts": (["--prompt", "a", "--prompt_file", "b"], "leave one out"),
    "no such weights": (["--init_from", "nowhere"], "nowhere is neither a folder with config.json"),
    "no such file": (["--prompt_file", "nowhere"], "nowhere"),
    "flag not UTF-8": (["--prompt", "ab\udcff"], "--prompt is not UTF-8 text: see its byte 2"),
    "not UTF-8": (["--prompt", "-"], "standard input is not UTF-8 text: see its byte 2"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flags_are_an_error(write, case):
    flags, words = WRONG_FLAGS[case]
    with pytest.raises((ValueError, OSError), match=words):
        write(*flags, typed=b"ab\xff")


def test_a_wrong_flag_is_a_one_line_error(trained):
    result = run_script("sample.py", "--temperature", "-1", cwd=trained)
    assert_one_line_error(result, "temperature")


def test_sampling_without_a_run_is_a_one_line_error(tmp_path):
    result = run_script("sample.py", cwd=tmp_path)
    assert_one_line_error(result, "out/ has no trained model", "python train_gpt2.py")
    result = run_script("sample.py", "--run", "out/x", cwd=tmp_path)
    assert_one_line_error(result, "out/x is not a run", "train one with python train_gpt2.py")
