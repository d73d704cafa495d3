"""Every value of every flag works, or it gives an error of one or two lines and writes nothing."""

import dataclasses
import io
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
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
from training.distributed import Ranks
from training.flags import OTHER_NAMES
from training.run_folder import RunLock

TINY_RUN = (
    "--n_layer 1 --n_head 1 --n_embd 8 --sequence_length 16 --batch_size 2 --stop_at 1 "
    "--device cpu --compile false"
)
SCRIPTS = {
    "prepare_data.py": (
        prepare_data,
        "--input raw/a.jsonl --corpus mine --tokenizer bytes --workers 1",
    ),
    "train_gpt2.py": (train_gpt2, f"{TINY_RUN} --max_steps 9"),
    "sample.py": (sample, "--max_new_tokens 1"),
    "dataset.py": (dataset, "--rows 1"),
}
# The tests give these flags together with other flags than the ones in SCRIPTS, which conflict.
FLAGS_BESIDE = {
    "list": "", "describe": "", "verify": "",
    **dict.fromkeys(("description", "source", "sub_corpora"), "--describe raw"),
    "prefetch": "--corpus python-docs --tokenizer bytes",
    "train_flops": TINY_RUN,
}  # fmt: skip
VALUES = {
    bool: ["x"],
    int: ["", "x", "1.5", "nan", "0", "-1", "1000000000", str(10**30)],
    float: ["", "x", "nan", "inf", "-inf", "0", "-1", "1e30"],
    str: ["", "x", "../x", "-x", "a\n?*[", "x" * 300],
}
# no setting that is a number accepts these values
INVALID_NUMBERS = {"", "x", "1.5", "nan", "inf", "-inf", "-1", str(10**30)}


def settings_class(script):
    """Return the dataclass with the settings of a script."""
    module, _ = SCRIPTS[script]
    return getattr(module, "Settings", None) or module.Config


FIELDS = [
    (script, field.name)
    for script in SCRIPTS
    for field in dataclasses.fields(settings_class(script))
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with raw/a.jsonl, the corpus data/mine/ and the untrained run out/run/."""
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
    """A function call(script, *flags) that returns the exit code and the errors of a script.

    The script runs offline, without a terminal, in a copy of the folder `prepared`.
    """
    for name, value in DEAD_PROXY.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tokenizers"))
    monkeypatch.setattr(os, "fsync", lambda file: None)  # fsync is slow
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(SystemExit) as stop:
            run_script(SCRIPTS[script][0].main)
        return stop.value.code, capsys.readouterr().err

    return call


def files_and_folders(folder):
    """Return the content of each file in a folder, and False for each folder."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def setting_type(script, name):
    """Return the type of a setting: a key of VALUES."""
    hint = get_type_hints(settings_class(script))[name]
    if get_origin(hint) is Literal:
        return str
    return next((argument for argument in get_args(hint) if argument in VALUES), hint)


@pytest.mark.parametrize(("script", "name"), FIELDS)
def test_any_value_of_any_flag_works_or_is_a_short_error(call, tmp_path, monkeypatch, script, name):
    for module in ("metrics", "report"):
        monkeypatch.setattr(f"training.{module}.plot_losses", lambda folder: None)
    other_flags = FLAGS_BESIDE.get(name, SCRIPTS[script][1]).split()
    values = list(VALUES[setting_type(script, name)])
    if name == "max_new_tokens":
        values.remove(str(10**9))  # a valid value, which would take too long
    if name in ("tokenizer", "describe", "verify"):
        values.remove("")  # the default of these flags, which is valid
    for value in values:
        before = files_and_folders(tmp_path)
        code, err = call(script, *other_flags, f"--{name}", value)
        if value in INVALID_NUMBERS and setting_type(script, name) is not str:
            assert code, value
        if code:
            assert err.startswith("error: "), (value, err)
            assert len(err.splitlines()) <= 2, (value, err)
            if "at step 1:" not in err:  # a run with a NaN loss has written its files
                assert files_and_folders(tmp_path) == before, (value, err)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_flag_suggests_the_nearest_flag(call, script):
    for field in dataclasses.fields(settings_class(script)):
        code, err = call(script, f"--{field.name}x", "1")
        assert err.startswith(
            f"error: unknown --{field.name}x; did you mean --{field.name}? (python"
        )
        assert (code, err.count("\n")) == (2, 1)
        assert call(script, f"--{field.name[:-1]}", "1")[0] == 2  # a prefix is not a flag


def test_names_of_other_programs_lead_to_our_flags(call):
    names = {field.name for field in dataclasses.fields(train_gpt2.Settings)}
    assert {*OTHER_NAMES.values()} <= names and names.isdisjoint(OTHER_NAMES)
    for flag, name in (("--lr", "learning_rate"), ("--block-size=64", "sequence_length")):
        code, err = call("train_gpt2.py", flag, "1")
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: unknown {flag}; did you mean --{name}? (python")


def test_a_repeated_flag_takes_its_last_value_and_input_takes_all(call, capsys):
    shutil.copy("raw/a.jsonl", "raw/b.jsonl")
    flags = ["--tokenizer", "bytes", "--workers", 1, "--seed", 7, "--seed", 8, "--corpus", "two"]
    code, _ = call("prepare_data.py", *flags, "--input", "raw/a.jsonl", "--input", "raw/b.jsonl")
    metadata = read_metadata("data/two")
    assert (code, metadata["seed"]) == (0, 8)
    assert sum(split["documents"] for split in metadata["splits"].values()) == 60


PREPARE, TRAIN, SAMPLE = "prepare_data.py", "train_gpt2.py", "sample.py"
REFUSED = [  # script, flags, words of the error
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
    (
        PREPARE,
        "--input table.json",
        "table.json is one JSON array, not one object per line: convert",
    ),
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
    (TRAIN, "--batch_size 1000000", "lower --micro_batch_size, which is 1000000 now"),
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
def test_conflicting_or_useless_flags_are_an_error(call, monkeypatch, script, flags, words):
    Path("a.txt").write_text("text " * 100)
    Path("table.json").write_text('[{"text": "a"}]')
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts to download
    before = [*Path().rglob("*.bin"), *Path("out").iterdir()]
    code, err = call(script, *flags.split(" "))
    assert code == (2 if "must be one of" in words else 1), err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert words in err
    assert [*Path().rglob("*.bin"), *Path("out").iterdir()] == before


def test_a_corpus_with_other_flags_or_more_files_is_prepared_again(call):
    flags = ["--corpus", "mine", "--tokenizer", "bytes", "--max_length", "5", "--input"]
    assert call("prepare_data.py", *flags, "raw/a.jsonl")[0] == 0
    assert read_metadata("data/mine")["max_length"] == 5
    shutil.copy("raw/a.jsonl", "raw/b.jsonl")
    assert call("prepare_data.py", *flags, "raw/b.jsonl", "raw/a.jsonl")[0] == 0


def test_out_of_memory_is_an_error_that_names_a_flag(monkeypatch, capsys):
    """The machine may have less memory than the check of sizes assumes."""
    with pytest.raises(ValueError, match="out of memory: lower --flag"):
        device.memory_errors("--flag")(lambda: torch.empty(1 << 60))()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: np.empty(1 << 60, np.uint8))
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: there is not enough memory: Unable to alloc")


def test_output_to_a_full_disk_a_closed_pipe_or_closed_streams(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    full_disk = open("/dev/full", "w")
    closed_pipe = os.fdopen(writer, "w")
    for file, code in ((full_disk, 1), (closed_pipe, 128 + signal.SIGPIPE)):
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: print("text"))
        file.close()  # Python closes it at its exit: no buffered text may be left
        assert stop.value.code == code
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: print(sys.stdin.read(), file=sys.stderr))
    assert stop.value.code == 0
    assert capfd.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_training_without_a_terminal_a_home_or_a_temporary_folder(call):
    """Training writes to the folder of the run only.

    The locale is C, the name of the corpus is not valid text, and metadata.json has Windows line
    ends.
    """
    name = os.fsdecode(b"\xff $x$ 'q'\n*")
    os.rename("data/mine", f"data/{name}")
    metadata = Path("data", name, "metadata.json")
    metadata.write_bytes(metadata.read_bytes().replace(b"\n", b"\r\n"))
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), "/proc/none")
    env |= {"LC_ALL": "C", "TERM": "dumb", "COLUMNS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train_gpt2.py", *TINY_RUN.split(), "--max_steps", "1"]
    with_closed_streams = ["bash", "-c", 'exec "$@" <&- >&-', "bash", *command, "--run_name", name]
    result = subprocess.run(with_closed_streams, env=env, stderr=subprocess.PIPE)
    assert (result.returncode, result.stderr) == (0, b"")
    files = ["best.pt", "config.json", "last.pt", "loss.png", "metrics.jsonl", "sample.txt"]
    assert {*files} <= {*os.listdir(f"out/{name}")}


def hold_lock(folder, held):
    """Hold the lock that a run holds from its first to its last step."""
    with RunLock(Ranks()) as lock:
        lock.take(folder)
        held.set()
        time.sleep(600)


def test_two_processes_cannot_train_one_run(call):
    flags = [*TINY_RUN.split(), "--max_steps", "2", "--run_name", "one"]
    assert call("train_gpt2.py", *flags)[0] == 0
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold_lock, args=(Path("out/one"), held), daemon=True)
    other.start()
    assert held.wait(60)
    before = files_and_folders(Path("out"))
    assert call("train_gpt2.py", *flags)[1].startswith(
        "error: out/one holds a run already: continue it with --resume"
    )
    for resume in (["--resume", "out/one"], ["--resume", "auto", "--run_name", "one"]):
        code, err = call("train_gpt2.py", *resume)
        assert code == 1
        assert err.startswith("error: out/one is being trained by another process")
    assert files_and_folders(Path("out")) == before
    other.kill()
    other.join()  # the kernel has released the lock
    assert call("train_gpt2.py", "--resume", "out/one")[0] == 0
    assert load_checkpoint(Path("out/one/last.pt"))["step"] == 2


@pytest.mark.parametrize(
    ("format", "documents"), [("text", "line"), ("text", "blank-line"), ("jsonl", "")]
)
def test_windows_line_ends_give_the_same_documents(tmp_path, format, documents):
    content = '{"text": "one"}\n\n{"text": "two"}\n  \n{"text": "three"}'
    (tmp_path / "unix").write_bytes(content.encode())
    (tmp_path / "windows").write_bytes(content.replace("\n", "\r\n").encode())
    texts = {}
    for name in ("unix", "windows"):
        source = Source(str(tmp_path / name), format, documents)
        texts[name] = [text for _, text in read_documents(source)]
    assert texts["unix"] == texts["windows"]
    assert len(texts["unix"]) == 3


def test_skipped_txt_keeps_a_file_name_that_is_not_valid_text(call):
    name = os.fsdecode(b"\xff.jsonl")
    Path(name).write_text('{"text": "good"}\n' * 60 + "{bad\n")
    flags = ["--input", name, "--corpus", "c", "--tokenizer", "bytes", "--on_error", "skip"]
    assert call("prepare_data.py", *flags)[0] == 0
    assert os.fsencode(name) in Path("data/c/skipped.txt").read_bytes()


def test_an_unreachable_hub_logs_nothing(tmp_path, monkeypatch):
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
def test_any_file_name_is_prepared_and_verified(call, name):
    Path(f"{name}.txt").write_text("text " * 100)
    flags = [f"--input={name}.txt", "--tokenizer", "bytes", "--workers", 1]
    assert call("prepare_data.py", *flags) == (0, "")
    assert call("prepare_data.py", f"--verify={name}") == (0, "")
    assert read_metadata(Path("data", name))["splits"]["train"]["tokens"] == 450
