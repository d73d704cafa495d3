"""train_gpt2.py: runs, resuming, several processes, settings and errors."""

import dataclasses
import fcntl
import functools
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
import time
import types
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, losses, make_corpus, run_script
from processes import start_script

import train_gpt2
from corpus.metadata import with_checksum
from training.checkpoint import Progress, load_checkpoint
from training.compute import choose_micro_batch_size
from training.distributed import Ranks
from training.flags import checkpoint_settings, load_settings, parse_flags, resolve_size
from training.json_lines import read_lines
from training.metrics import Metrics
from training.models import load_model
from training.run_folder import RunLock, newest_run
from training.run_settings import RunSettings


def test_a_run_writes_its_files_and_metrics(rhyme, tmp_path):
    result = run_script("train_gpt2.py", *flags(max_steps=40), cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    folder = tmp_path / "out" / "rhyme-tiny-1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt", "config.json", "last.pt", "loss.png", "metrics.jsonl", "previous.pt",
        "report.html", "sample.txt", "samples.jsonl",
    ]  # fmt: skip
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if "val_loss" in line] == [8, 16, 24, 32, 40]
    assert all(line["tokens_per_second"] > 0 for line in lines if "train_loss" in line)
    assert abs(lines[0]["train_loss"] - math.log(257)) < 0.1
    assert lines[-1]["val_loss"] < 3.5
    for line in lines:  # one token is one byte here
        if "val_loss" in line:
            assert line["val_bpb"] == pytest.approx(line["val_loss"] / math.log(2))
    config = json.loads((folder / "config.json").read_text())
    assert (config["n_layer"], config["max_steps"], config["chosen"]["dtype"]) == (2, 40, "float32")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "max_steps=40" in result.stdout and "train_flops" not in result.stdout
    assert "batch_size=4" in result.stdout and "64 tokens per step" in result.stdout
    assert "best validation" in result.stdout
    assert "sample.py --run out/rhyme-tiny-1" in result.stdout


def test_no_run_overwrites_another(train):
    assert [train(max_steps=1).name for _ in range(2)] == ["rhyme-tiny-1", "rhyme-tiny-2"]
    assert train(max_steps=1, run_name="mine").name == "mine"
    with pytest.raises(FileExistsError, match=r"--resume out/mine"):
        train(max_steps=1, run_name="mine")


def test_validation_is_a_full_pass(train, tmp_path):
    """The model predicts each token but the first once, also those after the last whole block."""
    make_corpus(tmp_path / "data" / "odd", ["x" * 900 + "abcdefghij" * 10 + "xyz"])
    folder = train(max_steps=1, corpus="odd")
    tokens = np.fromfile(tmp_path / "data" / "odd" / "val.bin", np.uint16).astype(np.int64)
    assert len(tokens) == 101  # 6 blocks of 16 and a tail of 4 targets
    model = load_model(load_checkpoint(folder / "last.pt"))
    tokens = torch.from_numpy(tokens)
    total = 0.0
    with torch.no_grad():
        for start in range(0, 96, 16):
            x = tokens[None, start : start + 16]
            y = tokens[None, start + 1 : start + 17]
            total += model(x, y, reduction="sum")[1].item()
        log_probs = model(tokens[None, 84:100])[0].log_softmax(-1)[0]
        total -= sum(log_probs[t - 84, tokens[t + 1]].item() for t in range(96, 100))
    assert losses(folder, "val_loss")[1] == pytest.approx(total / 100, abs=1e-5)


def test_micro_batches_add_up_to_the_batch(train):
    whole = losses(train(max_steps=6, micro_batch_size=4))
    for size in (1, 2):
        assert losses(train(max_steps=6, micro_batch_size=size)) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("optimizer, corpus", [("muon", "documents"), ("adamw", "rhyme")])
def test_a_resumed_run_equals_a_whole_run_bit_for_bit(train, tmp_path, optimizer, corpus):
    make_corpus(tmp_path / "data/documents", ["one for sorrow", "two for mirth"] * 99, True)
    options = {"max_steps": 30, "dropout": 0.2, "optimizer": optimizer, "micro_batch_size": 2}
    options |= {"corpus": corpus, "token_noise": 0.1}
    before = signal.getsignal(signal.SIGTERM)
    whole = train(**options, run_name="whole")
    train(**options, run_name="parts", stop_at=11)
    assert signal.getsignal(signal.SIGTERM) is before
    assert max(losses(newest_run("out"))) == 11
    train(resume="out/parts", stop_at=19)
    parts = train(resume="out/parts", stop_at=99)
    assert parts.name == "parts"
    assert losses(parts) == losses(whole)
    assert losses(parts, "val_loss") == losses(whole, "val_loss")
    expected = torch.load(whole / "last.pt", weights_only=True)
    found = torch.load(parts / "last.pt", weights_only=True)
    for name, weight in expected["model"].items():
        assert torch.equal(weight, found["model"][name]), name
    for expected_optimizer, optimizer in zip(expected["optimizers"], found["optimizers"]):
        for key, state in expected_optimizer["state"].items():
            for name, value in state.items():
                assert torch.equal(value, optimizer["state"][key][name])


def test_a_run_cannot_resume_with_another_shape_or_corpus(train, tmp_path):
    train(max_steps=2, stop_at=1)
    changes = {"n_layer": 3, "sequence_length": 8, "corpus": "x", "optimizer": "adamw", "seed": 1}
    for flag, value in changes.items():
        with pytest.raises(ValueError, match=f"{flag}.*--resume cannot change it to {value}"):
            train(resume="out/rhyme-tiny-1", **{flag: value})
    with pytest.raises(ValueError, match="at step 1, not before --stop_at 1"):
        train(resume="out/rhyme-tiny-1", stop_at=1)
    path = tmp_path / "data" / "rhyme" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata["tokenizer"]["sha256"] = "another"
    path.write_text(json.dumps(with_checksum(metadata)))
    with pytest.raises(ValueError, match="rhyme has another vocabulary"):
        train(resume="out/rhyme-tiny-1")
    make_corpus(tmp_path / "data" / "rhyme", ["another text " * 400])
    with pytest.raises(ValueError, match="rhyme has another text, or other splits, than"):
        train(resume="out/rhyme-tiny-1")


def test_a_file_of_a_run_stands_for_the_run(train, capsys):
    train(max_steps=9, run_name="a", stop_at=1)
    for step, name in enumerate(["a/last.pt", "a/", "a/previous.pt", "a/metrics.jsonl"], 2):
        capsys.readouterr()
        train(resume=f"out/{name}", stop_at=step)
        assert load_checkpoint(Path("out/a/last.pt"))["step"] == step
        expected = name in ("a/previous.pt", "a/metrics.jsonl")
        assert ("stands for its run: resuming out/a from" in capsys.readouterr().out) == expected
    with pytest.raises(
        FileNotFoundError, match=r"out/b/last.pt does not exist: there is no folder"
    ):
        train(resume="out/b/last.pt")


def test_resume_auto_starts_or_continues_a_run_with_the_same_command(train, capsys):
    """A scheduler may kill a job at any time and repeat its command."""
    command = TINY | {"max_steps": 4, "run_name": "job", "resume": "auto"}
    folder = Path("out/job")
    folder.mkdir(parents=True)  # left by a kill before the first checkpoint
    train(**command, stop_at=2)
    assert train(**command).name == "job"
    assert list(losses(folder)) == [1, 2, 3, 4]
    (folder / "sample.txt").unlink()
    capsys.readouterr()
    train(**command)  # the run has ended already, but a kill prevented its sample
    assert load_checkpoint(folder / "last.pt")["step"] == 4
    assert (folder / "sample.txt").exists()
    capsys.readouterr()
    train(resume="out/job")
    line = "out/job is complete at step 4; continue with --max_steps M\n"
    assert capsys.readouterr().out == line
    train(resume="out/job", max_steps=5, learning_rate=0.02, stop_at=6)
    line = "changed by flags: max_steps 4 -> 5, learning_rate 0.01 -> 0.02"
    assert line in capsys.readouterr().out.splitlines()
    assert load_checkpoint(folder / "last.pt")["step"] == 5
    with pytest.raises(ValueError, match="--resume auto needs --run_name NAME"):
        train(**TINY, resume="auto")


def test_a_report_that_a_kill_prevented_is_written_later(train, monkeypatch):
    def killed(*arguments):
        raise SystemExit

    monkeypatch.setattr("training.report.write_report_page", killed)
    with pytest.raises(SystemExit):
        train(max_steps=1, run_name="job")
    pages = []
    monkeypatch.setattr("training.report.write_report_page", lambda *args: pages.append(args[0]))
    train(resume="out/job")
    assert pages == [Path("out/job")]
    assert (pages[0] / "sample.txt").exists()
    train(resume="out/job")
    assert len(pages) == 1


def test_a_resumed_run_with_another_batch_size_continues_the_order(train):
    """The position counts windows: 2 steps of 4 windows and 1 step of 8 windows give 16."""
    train(max_steps=4, stop_at=2, run_name="a")
    train(resume="out/a", batch_size=8, stop_at=3)
    assert load_checkpoint(newest_run("out") / "last.pt")["position"] == 16


def test_a_resumed_run_drops_the_metrics_after_its_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4')
    metrics = Metrics(tmp_path, step=2, max_steps=9)
    metrics.train(Progress(3), 10.0, None, 1.0, 0.1)
    metrics.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_without_a_terminal_progress_is_one_line_per_minute(tmp_path, capsys, monkeypatch):
    for every, lines in ((60, 0), (0, 2)):
        monkeypatch.setattr("training.metrics.SECONDS_BETWEEN_LINES", every)
        metrics = Metrics(tmp_path, step=0, max_steps=10)
        for step in (1, 2):
            metrics.train(Progress(step), 8.0, 0.5, 1.25, 0.1)
        metrics.close()
        out, err = capsys.readouterr()
        assert out.count("\n") == lines
        assert err == ""
    assert "step  2/10: train 1.2500, 8 tokens/s, MFU 50%; 0:00:00 left" in out


def test_a_progress_line_has_the_losses_that_exist(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.metrics.plot_losses", lambda folder: None)
    metrics = Metrics(tmp_path, step=0, max_steps=10)
    metrics.validation(2, {"val_loss": 1.5, "val_bpb": 2.164})
    metrics.train(Progress(3), 8.0, None, 1.25, 0.1)
    metrics.validation(4, {"val_loss": 1.5, "val_bpb": 2.164})
    metrics.close()
    before, after = capsys.readouterr().out.splitlines()
    validation = "validation 1.5000 nats per token, 2.1640 bits per byte"
    assert before == f"step  2/10: {validation}; 0:00:00 left"
    assert after == f"step  4/10: {validation}; train 1.2500, 8 tokens/s; 0:00:00 left"


def test_on_a_terminal_progress_is_one_changing_line(tmp_path, capsys, monkeypatch):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    monkeypatch.setattr(sys, "stderr", os.fdopen(end, "w"))
    metrics = Metrics(tmp_path, step=0, max_steps=10)
    for step in (1, 2):
        metrics.train(Progress(step), 8.0, None, 1.25, 0.1)
    metrics.bar.refresh()  # tqdm refreshes the bar ten times per second
    shown = ""
    while "tokens/s" not in shown:  # a read may return a part of the line
        assert select.select([terminal], [], [], 10)[0], shown
        shown += os.read(terminal, 10_000).decode()
    assert "| 2/10 " in shown
    assert "train 1.2500, 8 tokens/s" in shown
    assert "\n" not in shown
    metrics.close()
    assert capsys.readouterr().out == ""


def test_the_best_checkpoint_is_kept(train, tmp_path):
    """The validation text differs from the training text, so the validation loss rises."""
    make_corpus(tmp_path / "data" / "other", ["ab" * 450 + "cd" * 50])
    folder = train(max_steps=40, corpus="other", learning_rate=0.02)
    curve = losses(folder, "val_loss")
    best = min(curve, key=curve.get)
    assert best < 40
    checkpoint = load_checkpoint(folder / "best.pt")
    assert checkpoint["step"] == best
    assert checkpoint["best"] == {"step": best, "val_loss": curve[best]}
    assert "optimizers" not in checkpoint
    assert load_checkpoint(folder / "last.pt")["step"] == 40


def test_bits_per_byte_count_the_bytes_of_the_text(train, tmp_path):
    """The end-of-text token of a document counts as a token and has no bytes."""
    make_corpus(tmp_path / "data" / "d", ["abcd"] * 600, documents=True)
    splits = json.loads((tmp_path / "data" / "d" / "metadata.json").read_text())["splits"]["val"]
    assert splits["tokens"] * 4 == splits["bytes"] * 5
    for line in read_lines(train(max_steps=1, corpus="d") / "metrics.jsonl"):
        if "val_loss" in line:
            assert line["val_bpb"] == pytest.approx(line["val_loss"] / math.log(2) * 5 / 4)


def test_documents_of_a_window_do_not_attend_to_each_other(train, tmp_path):
    """The test computes the validation loss token by token, each document by itself."""
    make_corpus(tmp_path / "data" / "d", ["abcdef", "xyz", "pqrstuvw"] * 60, documents=True)
    folder = train(max_steps=2, corpus="d")
    assert json.loads((folder / "config.json").read_text())["chosen"]["document_mask"] == "true"
    checkpoint = load_checkpoint(folder / "last.pt")
    model = load_model(checkpoint)
    tokens = torch.from_numpy(np.fromfile(tmp_path / "data/d/val.bin", np.uint16).astype(np.int64))
    nats = count = 0
    for first in range(0, len(tokens) - 1, 16):
        row = tokens[first : first + 17]  # a window and the next token
        if len(row) < 17:
            row = tokens[-17:]
        ids = (row == 256).cumsum(0)
        num_new = min(17, len(tokens) - first)
        for number in ids.unique():
            positions = (ids == number).nonzero()[:, 0]
            after = positions[-1:] + 1  # an end of text, which belongs to the next document
            for position in torch.cat((positions[1:], after[after < len(row)])):
                if position < 17 - num_new + 1:
                    continue  # an earlier window has this token
                with torch.no_grad():
                    logits = model(row[positions[positions < position]][None])[0][0, -1]
                nats -= logits.log_softmax(-1)[row[position]].item()
                count += 1
    assert losses(folder, "val_loss")[2] == pytest.approx(nats / count, abs=1e-5)
    without_mask = train(max_steps=2, corpus="d", document_mask="false")
    assert losses(without_mask) != losses(folder)
    running_text = train(max_steps=1, corpus="rhyme")
    config = json.loads((running_text / "config.json").read_text())
    assert config["chosen"]["document_mask"] == "false"
    with pytest.raises(ValueError, match="rhyme is one running text"):
        train(max_steps=1, corpus="rhyme", document_mask="true")


def test_bfloat16_and_the_compiler_give_the_same_curve(train):
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    plain = losses(train(max_steps=3, stop_at=2))
    fast = train(max_steps=3, stop_at=2, dtype="bfloat16", compile="true", run_name="fast")
    assert losses(fast) == pytest.approx(plain, abs=0.02)
    assert "transformer.wte.weight" in load_checkpoint(fast / "last.pt")["model"]  # no prefix
    assert losses(train(resume="out/fast", compile="false", dtype="float32"))[3] > 0


def test_train_flops_decide_the_number_of_steps(train, capsys):
    matrices = 10_992 - 16 * 16  # all parameters but the positions
    flops = 6 * matrices + 12 * 2 * 16 * 16  # per token; 2 layers, 16 channels, 16 tokens
    folder = train(train_flops=flops * 64 * 12.2)  # 64 tokens per step
    assert load_checkpoint(folder / "last.pt")["step"] == 12
    assert "train_flops=" in capsys.readouterr().out
    train(resume=folder, max_steps=13)
    assert "train_flops" not in capsys.readouterr().out


def test_the_learning_rate_rises_and_falls(train):
    folder = train(max_steps=20, learning_rate=0.1)
    rates = losses(folder, "learning_rate")
    assert rates[1] == pytest.approx(0.1 / 3) and rates[2] == pytest.approx(0.2 / 3)
    assert rates[3] == pytest.approx(0.1)  # warmed up after 2 of 20 steps
    assert rates[12] == pytest.approx(0.1 * 9 / 18) and rates[20] == pytest.approx(0.1 * 1 / 18)


def test_a_run_says_how_many_steps_of_a_longer_warmup_remain(train, capsys):
    folder = train(max_steps=20, learning_rate=0.1, warmup_steps=10)
    assert losses(folder, "learning_rate")[3] == pytest.approx(0.1)
    sentence = "rises for 2 steps, a tenth of max_steps, instead of 10 (warmup_steps)"
    assert f"the learning rate {sentence}" in capsys.readouterr().out
    train(max_steps=20, warmup_steps=2)
    train(max_steps=20, warmup_steps=100)  # the default
    assert "rises for" not in capsys.readouterr().out


def flags(**changes):
    """Return the flags of a tiny run with some changes."""
    return [str(part) for name, value in (TINY | changes).items() for part in (f"--{name}", value)]


def start_training(folder, *argv):
    """Start `python train_gpt2.py ARGV >out.txt 2>err.txt` in `folder`."""
    return start_script(ROOT / "train_gpt2.py", *argv, cwd=folder, streams=folder)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_a_checkpoint_and_prints_how_to_continue(rhyme, tmp_path, signum):
    process = start_training(tmp_path, *flags(max_steps=100_000))
    metrics = tmp_path / "out" / "rhyme-tiny-1" / "metrics.jsonl"
    wait_for(lambda: len(read_lines(metrics)) > 3, process)
    os.kill(process.pid, signum)
    process.join()
    out, err = ((tmp_path / name).read_text() for name in ("out.txt", "err.txt"))
    assert process.exitcode == 128 + signum, err
    assert "Traceback" not in err
    assert out.splitlines()[-1].endswith("python train_gpt2.py --resume out/rhyme-tiny-1")
    step = load_checkpoint(tmp_path / "out/rhyme-tiny-1/last.pt")["step"]
    assert out.splitlines()[-1].startswith(f"stopped at step {step};")
    assert step == read_lines(metrics)[-1]["step"]


def train_in_processes(folder, world_size, *argv):
    """Run `python train_gpt2.py ARGV` in several processes with the variables of torchrun.

    Returns the output of rank 0 and the errors of all ranks, without torch's warning about a
    machine that has no name resolution.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": world_size}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    folders = [folder / f"rank-{rank}" for rank in range(world_size)]
    processes = []
    for rank in range(world_size):
        folders[rank].mkdir(exist_ok=True)
        variables |= {"RANK": rank, "LOCAL_RANK": rank}
        env = os.environ | {name: str(value) for name, value in variables.items()}
        options = {"cwd": folder, "streams": folders[rank], "env": env}
        processes.append(start_script(ROOT / "train_gpt2.py", *argv, **options))
    for process in processes:
        process.join()
    errors = "".join((streams / "err.txt").read_text() for streams in folders)
    errors = re.sub(r"\[W.*hostname of the client socket cannot be retrieved.*\n", "", errors)
    assert not any(process.exitcode for process in processes), errors
    return (folders[0] / "out.txt").read_text(), errors


def test_several_processes_give_the_losses_of_one(train, tmp_path):
    """The run resumes twice with another number of processes, also with a compiled model."""
    one = train(max_steps=12)
    options = {"run_name": "some", "micro_batch_size": 1, "stop_at": 4}
    out, _ = train_in_processes(tmp_path, 2, *flags(max_steps=12, **options))
    assert out.count("parameters;") == 1  # only rank 0 prints and writes
    _, errors = train_in_processes(tmp_path, 4, "--resume", "out/some", "--stop_at", "9")
    assert errors == ""
    compiled = "true" if shutil.which("c++") else "false"
    train(resume="out/some", micro_batch_size=4, stop_at=11, compile=compiled)
    train(resume="out/some", compile="false")
    some = tmp_path / "out" / "some"
    assert losses(some) == pytest.approx(losses(one), abs=1e-5)
    assert losses(some, "val_loss") == pytest.approx(losses(one, "val_loss"), abs=1e-5)


def test_a_signal_to_torchrun_saves_once(rhyme, tmp_path):
    """One of the two processes may be a step ahead when torchrun forwards the signal."""
    argv = ["--standalone", "--nproc_per_node", 2, ROOT / "train_gpt2.py"]
    argv += flags(max_steps=100_000, run_name="some")
    process = start_script("torch.distributed.run", *argv, cwd=tmp_path, streams=tmp_path)
    run = tmp_path / "out" / "some"
    wait_for(lambda: len(read_lines(run / "metrics.jsonl")) > 3, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    out, err = ((tmp_path / name).read_text() for name in ("out.txt", "err.txt"))
    assert process.exitcode == 1
    assert err.count("stopping after this step") == 1, err
    assert out.count("continue with: ") == 1, err
    last_line = read_lines(run / "metrics.jsonl")[-1]
    assert load_checkpoint(run / "last.pt")["step"] == last_line["step"]


def test_patience_ends_a_run_that_has_stopped_improving(train, tmp_path, capsys):
    make_corpus(tmp_path / "data" / "other", ["ab" * 450 + "cd" * 50])  # val differs from train
    options = dict(max_steps=40, corpus="other", learning_rate=0.02, eval_every=2)
    curve = losses(train(**options, run_name="whole"), "val_loss")
    patient = train(**options, patience=3, run_name="patient")
    ended = losses(patient, "val_loss")
    last = max(ended)
    assert last < 40 and ended == {step: loss for step, loss in curve.items() if step <= last}
    best = min(ended, key=ended.get)
    assert last - best == 3 * 2
    assert "no better validation for 6 steps" in capsys.readouterr().out
    assert load_checkpoint(patient / "best.pt")["step"] == best
    train(**options, patience=3, run_name="parts", stop_at=best + 3)
    assert losses(train(resume="out/parts"), "val_loss") == ended


INCOMPATIBLE_CHECKPOINTS = {
    "a removed setting": (("config", "rotary"), 1, "rotary 1, which is not a setting"),
    "a setting of another type": (("config", "max_steps"), "x", "max_steps 'x', which"),
    "no optimizers": (("optimizers",), [], "holds no optimizer"),
    "an optimizer without a state": (("optimizers", 0, "state"), {}, "holds no optimizer"),
    "a state of another shape": (
        ("optimizers", 0, "state", 0, "momentum_buffer"), torch.zeros(3), "holds no optimizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INCOMPATIBLE_CHECKPOINTS)
def test_a_checkpoint_that_this_version_cannot_resume_is_an_error(train, case):
    (*path, last), value, words = INCOMPATIBLE_CHECKPOINTS[case]
    folder = train(max_steps=2, stop_at=1)
    checkpoint = load_checkpoint(folder / "last.pt")
    part = checkpoint
    for name in path:
        part = part[name]
    part[last] = value
    torch.save(checkpoint, folder / "last.pt")
    with pytest.raises(ValueError, match=f"{folder}.*{words}"):
        train(resume=str(folder))


def test_a_float_setting_accepts_a_saved_int():
    values = {"dropout": 0, "grad_clip": 1}
    saved = checkpoint_settings(train_gpt2.Settings, Path("out/mine"), values)
    assert (saved.dropout, saved.grad_clip) == (0, 1)


def test_damaged_metrics_are_refused(train):
    folder = train(max_steps=2, stop_at=1)
    for line in ("{}", "xx", "[1]", '{"step": null}'):
        (folder / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
            train(resume=str(folder))


@pytest.mark.parametrize("batch_size, expected", [(32, 16), (12, 12), (9, 9), (125, 5), (17, 1)])
def test_the_micro_batch_size_of_a_size_divides_the_batch_size(monkeypatch, batch_size, expected):
    argv = ["train_gpt2.py", "--size", "gpt2", "--batch_size", str(batch_size), "--corpus", "c"]
    monkeypatch.setattr(sys, "argv", argv)
    flags = parse_flags(train_gpt2.Settings, "")
    settings, _ = load_settings(flags, "", RunLock(Ranks()))
    settings = resolve_size(settings, train_gpt2.SIZES, torch.device("cpu"))
    assert choose_micro_batch_size(settings, train_gpt2.SIZES, Ranks()) == expected
    assert settings.micro_batch_size is None  # as asked for: another number of processes may differ


WRONG_SETTINGS = {  # case -> changed flags, words of the error
    "no such corpus": ({"corpus": "nope"}, ["data/nope", "prepare_data.py", "prepared: rhyme"]),
    "no such size": ({"size": "huge"}, ["huge", "tiny", "gpt2-xl"]),
    "no such optimizer": ({"optimizer": "sgd"}, ["sgd", "muon", "adamw"]),
    "no such device": ({"device": "abacus"}, ["abacus"]),
    "heads": ({"n_embd": 30, "n_head": 4}, ["n_embd (30)", "n_head (4)"]),
    "window too long": ({"sequence_length": 600}, ["540 tokens", "lower sequence_length"]),
    "zero": ({"batch_size": 0}, ["batch_size must be at least 1"]),
    "negative": ({"micro_batch_size": -1}, ["micro_batch_size must be at least 1"]),
    "negative warmup": ({"warmup_steps": -1}, ["warmup_steps must be at least 0"]),
    "negative clip": ({"grad_clip": -1}, ["grad_clip must be at least 0"]),
    "negative seed": ({"seed": -1}, ["seed must be at least 0"]),
    "huge seed": ({"seed": 2**31}, ["seed must be at most"]),
    "outside": ({"run_name": "../x"}, ["'../x'", "--run_name NAME"]),
    "accumulation": ({"micro_batch_size": 3}, ["batch_size (4)", "micro_batch_size (3)"]),
    "not a number": ({"learning_rate": "inf"}, ["--learning_rate", "inf"]),
    "half a step": ({"max_steps": "1.5"}, ["--max_steps", "1.5"]),
    "no such run": ({"resume": "out/nope"}, ["out/nope/last.pt"]),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_an_error_before_the_run_has_a_folder(
    rhyme, tmp_path, monkeypatch, capsys, case
):
    changes, words = WRONG_SETTINGS[case]
    monkeypatch.chdir(tmp_path)
    argv = flags(**{"max_steps": 1} | changes)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *argv])
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        train_gpt2.main()
    text = f"{error.value} {capsys.readouterr().err}"  # argparse prints the error of a wrong flag
    assert all(word in text for word in words), text
    assert list(tmp_path.glob("out/*")) == []


def test_a_wrong_setting_is_a_one_line_error(rhyme, tmp_path):
    for case in ("heads", "half a step"):
        changes, words = WRONG_SETTINGS[case]
        argv = flags(**{"max_steps": 1} | changes)
        assert_one_line_error(run_script("train_gpt2.py", *argv, cwd=tmp_path), *words)


def test_training_without_a_corpus_is_a_one_line_error(tmp_path):
    result = run_script("train_gpt2.py", cwd=tmp_path)
    assert_one_line_error(result, "data has no prepared corpus", "python prepare_data.py")


def test_a_nan_loss_stops_the_run(train):
    unstable = {"learning_rate": 1e30, "grad_clip": 0, "run_name": "mine"}
    with pytest.raises(ValueError, match=r"is nan at step \d+: lower .* start a new run"):
        train(max_steps=50, **unstable, resume="auto")
    train(**TINY, max_steps=30, run_name="mine", resume="auto", stop_at=4)
    with pytest.raises(ValueError, match=r"continue from out/mine/last\.pt, which is good"):
        train(**unstable, resume="out/mine")
    assert load_checkpoint(Path("out/mine/last.pt"))["step"] == 4


def test_out_of_memory_is_an_error_that_names_two_settings(train, monkeypatch):
    def raise_out_of_memory(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_gpt2, "compute_loss", raise_out_of_memory)
    with pytest.raises(ValueError, match="lower --micro_batch_size or --sequence_length"):
        train(max_steps=1)


def test_a_full_disk_keeps_the_last_checkpoint(train, tmp_path):
    """A limit on file sizes stands in for the disk."""
    folder = train(max_steps=2, stop_at=1)
    result = run_script("train_gpt2.py", "--resume", folder, cwd=tmp_path, max_file_bytes=100_000)
    assert_one_line_error(result, f"{folder}/last.pt")
    assert load_checkpoint(folder / "last.pt")["step"] == 1
    assert not list(folder.glob("*.tmp"))


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "last.pt"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last.pt is not a readable checkpoint"):
            load_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"last.pt is not a checkpoint of this version"):
        load_checkpoint(path)
    torch.save({"model_config": signal.SIGINT}, path)  # an object, not a plain value
    with pytest.raises(ValueError, match=r"last.pt is not a readable checkpoint"):
        load_checkpoint(path)


def test_float16_scales_its_gradients(train, monkeypatch, capsys):
    """A step whose scaled gradients overflow is skipped and counted; a resumed run is the same."""
    # the real scaler, from a scale at which the first steps are sure to overflow
    too_large = functools.partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", too_large)
    options = {"max_steps": 24, "dtype": "float16", "dropout": 0.2}
    whole = train(**options, run_name="whole")
    skipped = losses(whole, "skipped_steps")
    assert skipped[1] == 1  # the first step is one of them
    total = skipped[24]
    assert 3 < total < 16
    assert f"{total} steps were skipped" in capsys.readouterr().out
    checkpoint = load_checkpoint(whole / "last.pt")
    assert checkpoint["scaler"]["scale"] == 2.0 ** (24 - total)
    assert losses(whole)[24] < losses(whole)[total] - 0.1
    train(**options, run_name="parts", stop_at=3)
    train(resume="out/parts", stop_at=13)
    parts = train(resume="out/parts")
    assert losses(parts) == losses(whole)
    assert losses(parts, "skipped_steps") == skipped
    assert load_checkpoint(parts / "last.pt")["scaler"] == checkpoint["scaler"]
    for name, weight in checkpoint["model"].items():
        assert torch.equal(weight, load_checkpoint(parts / "last.pt")["model"][name]), name


def test_the_document_mask_cannot_change_on_resume(train, tmp_path):
    """The mask changes the validation loss, which decides on the best checkpoint."""
    make_corpus(tmp_path / "data/documents", ["one for sorrow", "two for mirth"] * 99, True)
    train(max_steps=4, stop_at=2, corpus="documents", run_name="mine")
    with pytest.raises(ValueError, match=r"document_mask true.* --resume cannot change it"):
        train(resume="out/mine", document_mask="false")
    assert train(resume="out/mine", document_mask="true").name == "mine"


def test_a_run_that_fails_before_its_first_checkpoint_frees_its_name(train):
    with pytest.raises(ValueError, match="is nan at step"):
        train(max_steps=50, learning_rate=1e30, grad_clip=0, run_name="mine")
    assert train(max_steps=1, run_name="mine").name == "mine"


@pytest.mark.parametrize("name", ["eot_token", "eot_per_document"])
def test_metadata_without_an_end_of_text_is_refused(train, rhyme, name):
    path = rhyme / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata[name]
    path.write_text(json.dumps(with_checksum(metadata)))
    with pytest.raises(ValueError, match=rf"metadata\.json has no {name}: run python prepare_data"):
        train(max_steps=1)


def test_a_resumed_run_prints_the_choices_of_its_checkpoint(train, capsys):
    train(max_steps=4, stop_at=2, dtype="auto", run_name="mine")
    capsys.readouterr()
    train(resume="out/mine", stop_at=3)
    out = capsys.readouterr().out
    assert "compile false: as in the checkpoint" in out
    assert "dtype " in out and "as in the checkpoint" in out
    with pytest.raises(ValueError, match="--train_flops has no effect on --resume"):
        train(resume="out/mine", train_flops=1e15)
    with pytest.raises(ValueError, match="--out_dir has no effect on --resume"):
        train(resume="out/mine", out_dir="elsewhere")
    with pytest.raises(ValueError, match="out/mine is at step 3, not before --max_steps 2"):
        train(resume="out/mine", max_steps=2)


def test_a_run_is_locked_before_its_checkpoint_is_read(train):
    """A second process on --resume is refused, whatever state the file is in that it would read."""
    folder = train(max_steps=4, stop_at=2, run_name="mine")
    whole = (folder / "last.pt").read_bytes()
    with RunLock(Ranks()) as lock:
        lock.take(folder)
        (folder / "last.pt").write_bytes(whole[: len(whole) // 2])
        for flags in ({"resume": "out/mine"}, {"resume": "auto", "run_name": "mine"}):
            with pytest.raises(BlockingIOError, match="out/mine is being trained by another"):
                train(**flags)
    (folder / "last.pt").write_bytes(whole)
    assert train(resume="out/mine") == folder


def test_a_sizes_micro_batch_is_chosen_anew_on_more_processes(train, monkeypatch, tmp_path):
    """The settings are saved beside the choice for the number of processes."""
    for size in train_gpt2.SIZES.values():
        monkeypatch.setitem(size, "micro_batch_size", 4)  # as size gpt2 has 16
    folder = train(max_steps=4, stop_at=2, run_name="mine")
    checkpoint = load_checkpoint(folder / "last.pt")
    assert checkpoint["config"]["micro_batch_size"] is None
    assert checkpoint["chosen"]["micro_batch_size"] == 4
    train_in_processes(tmp_path, 2, "--resume", "out/mine")  # 2 sequences per process
    checkpoint = load_checkpoint(folder / "last.pt")
    assert (checkpoint["step"], checkpoint["chosen"]["micro_batch_size"]) == (4, 2)


def test_a_moved_run_says_how_to_name_its_corpus(train, tmp_path, monkeypatch):
    folder = train(max_steps=4, stop_at=2, run_name="mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(folder, elsewhere / "mine")
    monkeypatch.chdir(elsewhere)
    words = "mine was trained on the corpus rhyme, and data/rhyme does not exist.*--data_dir"
    with pytest.raises(FileNotFoundError, match=words):
        train(resume="mine")
    with pytest.raises(ValueError, match=r"at step 2, not before --stop_at 2"):
        train(resume="mine", data_dir=tmp_path / "data", stop_at=2)
    monkeypatch.setattr(sys, "argv", ["", "--resume", "mine", "--data_dir", str(tmp_path / "data")])
    assert train_gpt2.main() == 0


def test_the_types_of_the_settings():
    """RunSettings has every setting, with the type that it has once it is resolved."""
    may_stay_none = {"micro_batch_size", "stop_at", "train_flops"}
    expected = {}
    for field in dataclasses.fields(train_gpt2.Settings):
        kind = field.type
        if isinstance(kind, types.UnionType) and field.name not in may_stay_none:
            kind = get_args(kind)[0]
        expected[field.name] = str if get_origin(kind) is Literal else kind
    found = get_type_hints(RunSettings)
    del found["__dataclass_fields__"]
    assert found == expected
