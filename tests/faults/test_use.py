"""Wrong use: whatever a flag is given, it works, or it is refused in a line or two, and nothing is
written."""

import dataclasses
import io
import json
import logging
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from conftest import DEAD_PROXY, ROOT, read_documents

import dataset
import prepare_data
import sample
import train_gpt2
from common.script import run_script
from corpus import inputs
from corpus.engines import open_engine
from corpus.hub import hugging_face
from corpus.metadata import read_metadata
from corpus.pipeline import prepare
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from training import device
from training.checkpoint import load_checkpoint, save_checkpoint
from training.metrics import Metrics

TINY = (
    "--n_layer 1 --n_head 1 --n_embd 8 --sequence_length 16 --batch_size 2 --stop_at 1 "
    "--device cpu --compile false"
)
SCRIPTS = {
    "prepare_data.py": (
        prepare_data,
        "--input raw/a.jsonl --corpus mine --tokenizer bytes --workers 1",
    ),
    "train_gpt2.py": (train_gpt2, f"{TINY} --max_steps 9"),
    "sample.py": (sample, "--max_new_tokens 1"),
    "dataset.py": (dataset, "--rows 1"),
}
ALONE = {  # flags that the others wouldn't go with
    "list": "", "describe": "", "verify": "",
    **dict.fromkeys(("description", "source", "sub_corpora"), "--describe raw"),
    "prefetch": "--corpus python-docs --tokenizer bytes",
    "train_flops": TINY,
}  # fmt: skip
VALUES = {
    bool: ["x"],
    int: ["", "x", "1.5", "nan", "0", "-1", "1000000000", str(10**30)],
    float: ["", "x", "nan", "inf", "-inf", "0", "-1", "1e30"],
    str: ["", "x", "../x", "-x", "a\n?*[", "x" * 300],
}
NEVER = {"", "x", "1.5", "nan", "inf", "-inf", "-1", str(10**30)}  # what no number may be


def settings_class(script):
    module, _ = SCRIPTS[script]
    return getattr(module, "Settings", None) or module.Config


FIELDS = [
    (script, field.name)
    for script in SCRIPTS
    for field in dataclasses.fields(settings_class(script))
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with raw/a.jsonl, data/mine/ made of it, and out/run/, never trained."""
    folder = tmp_path_factory.mktemp("use")
    (folder / "raw").mkdir()
    rows = [json.dumps({"text": f"document {i}, one for sorrow, two for mirth"}) for i in range(30)]
    (folder / "raw" / "a.jsonl").write_text("\n".join(rows))
    corpus = inputs.load_corpus("mine", folder / "data/mine", [f"{folder}/raw/a.jsonl"])
    with open_engine("processes", workers=1) as run_tasks:
        metadata = prepare(corpus, get_tokenizer("bytes"), folder / "data/mine", run_tasks)
    shape = GPTConfig(metadata["vocab_size"], n_positions=16, n_layer=1, n_head=1, n_embd=8)
    checkpoint = {
        "step": 0, "position": 0, "best": {"step": 0, "val_loss": math.inf}, "config": {},
        "metadata": metadata, "optimizers": [],
        "model_config": dataclasses.asdict(shape), "model": GPT(shape).state_dict(),
    }  # fmt: skip
    (folder / "out" / "run").mkdir(parents=True)
    save_checkpoint(folder / "out" / "run" / "last.pt", checkpoint)
    return folder


@pytest.fixture
def call(prepared, tmp_path, monkeypatch, capsys):
    """call(script, *flags) is `python SCRIPT FLAGS`, offline and without a terminal, in a folder
    of its own: (exit code, its errors)."""
    for name, value in DEAD_PROXY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tokenizers"))
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and no power is cut here
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as stop:
            run_script(SCRIPTS[script][0].main)
        return stop.value.code, capsys.readouterr().err

    return call


def files(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def kind(script, name):
    of = get_type_hints(settings_class(script))[name]
    if get_origin(of) is Literal:
        return str
    return next((t for t in get_args(of) if t in VALUES), of)


@pytest.mark.parametrize(("script", "name"), FIELDS)
def test_any_value_of_any_flag_works_or_is_refused_in_a_line(
    call, tmp_path, monkeypatch, script, name
):
    for module in ("metrics", "report"):
        monkeypatch.setattr(f"training.{module}.plot_losses", lambda folder: None)
    base = ALONE.get(name, SCRIPTS[script][1]).split()
    values = [v for v in VALUES[kind(script, name)] if (name, v) != ("max_new_tokens", str(10**9))]
    for value in values[1:] if name in ("tokenizer", "describe", "verify") else values:
        before = files(tmp_path)
        code, err = call(script, *base, f"--{name}", value)
        assert code or kind(script, name) is str or value not in NEVER, value
        if code:
            assert err.startswith("error: ") and len(err.splitlines()) <= 2, (value, err)
            if "at step 1:" not in err:  # a run that went wrong
                assert files(tmp_path) == before, (value, err)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_flag_gets_the_nearest(call, script):
    for field in dataclasses.fields(settings_class(script)):
        code, err = call(script, f"--{field.name}x", "1")
        assert err.startswith(
            f"error: unknown --{field.name}x; did you mean --{field.name}? (python"
        )
        assert (code, err.count("\n")) == (2, 1)
        assert call(script, f"--{field.name[:-1]}", "1")[0] == 2  # nor is it cut short


def test_of_a_flag_given_twice_the_last_value_counts_or_all(call, capsys):
    shutil.copy("raw/a.jsonl", "raw/b.jsonl")
    flags = ["--tokenizer", "bytes", "--workers", 1, "--seed", 7, "--seed", 8, "--corpus", "two"]
    code, _ = call("prepare_data.py", *flags, "--input", "raw/a.jsonl", "--input", "raw/b.jsonl")
    metadata = read_metadata("data/two")
    assert (code, metadata["seed"]) == (0, 8)
    assert sum(split["documents"] for split in metadata["splits"].values()) == 60


PREPARE, TRAIN, SAMPLE = "prepare_data.py", "train_gpt2.py", "sample.py"
REFUSED = [  # flags, and words of the line
    (PREPARE, "--input raw --documents line", "--documents has no effect on raw"),
    (
        PREPARE,
        "--corpus python-docs --tokenizer bytes --documents line",
        "--documents has no effect",
    ),
    (
        PREPARE,
        "--input a.txt --tokenizer bytes --text_field body",
        "--text_field has no effect on a",
    ),
    (PREPARE, "--input raw --source here", "--source has no effect without --describe"),
    (PREPARE, "--ray_address auto", "--ray_address has no effect without --engine ray"),
    (PREPARE, "--verify mine --corpus mine", "--corpus has no effect beside --verify"),
    (PREPARE, "--list --seed 1", "--seed has no effect beside --list"),
    (PREPARE, "--describe raw --sub_corpora x", "raw has no folder for the sub-corpus 'x'"),
    (PREPARE, "--describe data/mine", "data/mine/metadata.json exists already: edit it, or"),
    (
        PREPARE,
        "--input a.txt --corpus mine --tokenizer bytes",
        "data/mine was made of other files (../../raw/a.jsonl)",
    ),
    (PREPARE, "--input table.json", "table.json is a table, not plain text"),
    (PREPARE, "--corpus c --input ", "--input is empty"),
    (PREPARE, "--corpus tinyshakespear", "did you mean tinyshakespeare?"),
    (PREPARE, "--input raw --tokenizer gtp2", "did you mean gpt2?"),
    (
        PREPARE,
        "--input raw --engine rai",
        "--engine must be one of processes, ray, not 'rai'; did you mean ray?",
    ),
    (
        PREPARE,
        "--input raw --engine ray --tokenizer bytes --ray_address 127.0.0.1:9",
        "no Ray cluster answers at 127.",
    ),
    (PREPARE, "--corpus wikitext-2 --prefetch usb", "--prefetch needs a network"),
    (PREPARE, "--input raw --workers 1000000", "workers must be at most 1024"),
    (PREPARE, "--input raw --train_split_ratio 1", "train_split_ratio must be at most 0.999999"),
    (TRAIN, "--dropout 1.5", "dropout must be at most 0.999, not 1.5"),
    (TRAIN, "--eval_every 0", "eval_every must be at least 1, not 0"),
    (SAMPLE, "--top_p 0", "top_p must be at least 1e-06, not 0.0"),
    (TRAIN, "--corpus mime", "(prepared: mine); did you mean mine?"),
    (TRAIN, "--n_embd 30 --n_head 4", "n_embd (30) must be a multiple of n_head (4)"),
    (TRAIN, "--sequence_length 100000", "lower sequence_length"),
    (TRAIN, "--n_layer 1000000000", "GB of memory"),
    (TRAIN, "--n_embd 1000000 --n_head 1", "GB of memory"),
    (TRAIN, "--batch_size 1000000000", "GB of memory"),
    (TRAIN, "--max_steps 9 --train_flops 9", "--train_flops has no effect beside --max_steps"),
    (TRAIN, "--resume out/x --run_name y", "--run_name y differs from the name of --resume out/x"),
    (SAMPLE, "--interactive --prompt x", "--prompt has no effect beside --interactive"),
    (SAMPLE, "--interactive --prompt_file x", "--prompt_file has no effect beside --interactive"),
    (SAMPLE, "--export x --top_k 1", "--top_k has no effect beside --export"),
    (SAMPLE, "--run x --out_dir y", "--out_dir has no effect beside --run"),
    (
        "dataset.py",
        "mine --split tran",
        "--split must be one of train, val, test, not 'tran'; did you mean train?",
    ),
]


@pytest.mark.parametrize(("script", "flags", "words"), REFUSED)
def test_what_makes_no_sense_is_refused(call, monkeypatch, script, flags, words):
    Path("a.txt").write_text("text " * 100)
    Path("table.json").write_text('[{"text": "a"}]')
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts to download
    there = [*Path().rglob("*.bin"), *Path("out").iterdir()]
    code, err = call(script, *flags.split(" "))
    assert code == (2 if "must be one of" in words else 1), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err
    assert [*Path().rglob("*.bin"), *Path("out").iterdir()] == there


def test_the_same_corpus_with_other_flags_or_more_files_is_prepared_anew(call):
    flags = ["--corpus", "mine", "--tokenizer", "bytes", "--max_length", "5", "--input"]
    assert call("prepare_data.py", *flags, "raw/a.jsonl")[0] == 0
    assert read_metadata("data/mine")["max_length"] == 5
    shutil.copy("raw/a.jsonl", "raw/b.jsonl")
    assert call("prepare_data.py", *flags, "raw/b.jsonl", "raw/a.jsonl")[0] == 0


def test_out_of_memory_is_told(monkeypatch, capsys):
    """Where the machine has less than the check of sizes believes."""
    with pytest.raises(ValueError, match="out of memory: lower --this"):
        device.memory_errors("--this")(lambda: torch.empty(1 << 60))()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: np.empty(1 << 60, np.uint8))
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: there is not enough memory: Unable to alloc")


def test_output_that_nobody_takes(monkeypatch, capfd):
    """A disk that is full, a reader that has gone, and streams that are closed."""
    reader, writer = os.pipe()
    os.close(reader)
    for file, code in (open("/dev/full", "w"), 1), (os.fdopen(writer, "w"), 128 + 13):
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: print("text"))
        file.close()  # as Python does at its end: what was left went nowhere
        assert stop.value.code == code
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: print(sys.stdin.read(), file=sys.stderr))
    assert stop.value.code == 0
    assert capfd.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_a_run_without_a_terminal_a_home_or_a_temporary_folder(call):
    """In a locale without characters, under a name that is not text, with ends of lines as Windows
    writes them. Nothing is there to write to but the run's own folder."""
    name = os.fsdecode(b"\xff $x$ 'q'\n*")
    os.rename("data/mine", f"data/{name}")
    metadata = Path("data", name, "metadata.json")
    metadata.write_bytes(metadata.read_bytes().replace(b"\n", b"\r\n"))
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), "/proc/none")
    env |= {"LC_ALL": "C", "TERM": "dumb", "COLUMNS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_gpt2.py", *TINY.split(), "--max_steps", "1"]
    closed = ["bash", "-c", 'exec "$@" <&- >&-', "bash", *command, "--run_name", name]
    result = subprocess.run(closed, env=env, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b"")
    files = ["best.pt", "config.json", "last.pt", "loss.png", "metrics.jsonl", "sample.txt"]
    assert {*files} <= {*os.listdir(f"out/{name}")}


def hold(folder, held):
    metrics = Metrics(folder, step=1, max_steps=2)  # what a run holds from its first to last step
    held.set()
    time.sleep(600)
    metrics.close()


def test_two_processes_cannot_train_one_run(call):
    flags = [*TINY.split(), "--max_steps", "2", "--run_name", "one"]
    assert call("train_gpt2.py", *flags)[0] == 0
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(Path("out/one"), held), daemon=True)
    other.start()
    assert held.wait(60)
    before = files(Path("out"))
    assert call("train_gpt2.py", *flags)[1].startswith(
        "error: out/one holds a run already: continue it with --resume"
    )
    for resume in (["--resume", "out/one"], ["--resume", "auto", "--run_name", "one"]):
        code, err = call("train_gpt2.py", *resume)
        assert code == 1 and err.startswith("error: out/one is being trained by another process")
    assert files(Path("out")) == before
    other.kill()
    other.join()  # and the kernel has taken its lock
    assert call("train_gpt2.py", "--resume", "out/one")[0] == 0
    assert load_checkpoint(Path("out/one/last.pt"))["step"] == 2


@pytest.mark.parametrize(
    ("format", "documents"), [("text", "line"), ("text", "blank-line"), ("jsonl", "")]
)
def test_windows_ends_of_lines(tmp_path, format, documents):
    text = '{"text": "one"}\n\n{"text": "two"}\n  \n{"text": "three"}'
    (tmp_path / "a").write_bytes(text.encode())
    (tmp_path / "b").write_bytes(text.replace("\n", "\r\n").encode())
    ours, theirs = ([text for _, text in read_documents(Source(str(tmp_path / name), format, documents))]
                    for name in "ab")  # fmt: skip
    assert ours == theirs and len(ours) == 3


def test_names_that_are_no_text_in_what_was_skipped(call):
    name = os.fsdecode(b"\xff.jsonl")
    Path(name).write_text('{"text": "good"}\n' * 60 + "{bad\n")
    flags = ["--input", name, "--corpus", "c", "--tokenizer", "bytes", "--on_error", "skip"]
    assert call("prepare_data.py", *flags)[0] == 0
    assert os.fsencode(name) in Path("data/c/skipped.txt").read_bytes()


def test_the_hub_is_quiet_where_it_cannot_be_reached(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hf:x/y: .*; is there a network"):
        hugging_face("x/y", "")
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


NAMES = [
    b"a b",
    b'it\'s "q"',
    b"new\nline",
    b"[1]*?",
    b"-dash",
    "é漢".encode(),
    b"\xff",
    b"$HOME;ls",
]


@pytest.mark.parametrize("name", [os.fsdecode(name) for name in NAMES], ids=repr)
def test_any_name_of_a_file(call, name):
    Path(f"{name}.txt").write_text("text " * 100)
    flags = [f"--input={name}.txt", "--tokenizer", "bytes", "--workers", 1]
    assert call("prepare_data.py", *flags) == (0, "")
    assert call("prepare_data.py", f"--verify={name}") == (0, "")
    assert read_metadata(Path("data", name))["splits"]["train"]["tokens"] == 450
