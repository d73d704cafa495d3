"""The scripts of bench/ run at toy size and write the sections that docs/ shows."""

import functools
import os
import re
import time

import pytest
import torch
from conftest import ROOT, run_script

from bench import all as bench_all
from bench import block_mask, learn, scale, tokenize, train
from bench.report import PAGE, contest, contest_table, format_number, update_page, write

pytestmark = pytest.mark.timeout(300)  # the compared libraries import slowly


@pytest.fixture
def bench(monkeypatch, capsys):
    """A function bench(module, *flags) that returns the output of a script of bench/."""

    def bench(module, *flags):
        monkeypatch.setattr("sys.argv", ["bench", *map(str, flags)])
        module.main()
        return capsys.readouterr().out

    return bench


@pytest.fixture
def forked(monkeypatch):
    """Fork the measured processes, which saves their imports; test_tokenize does not fork."""

    def whole_process(command, cwd=ROOT):
        _, *command = command
        start = time.perf_counter()
        result = run_script(*command[command[0] == "-m" :], cwd=cwd)
        assert result.returncode == 0, result.stderr
        return time.perf_counter() - start, 1, result.stdout

    for module in (learn, scale, train):
        monkeypatch.setattr(module, "whole_process", whole_process)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("to be, or not to be:\n\nthat is the question\n" * 200)
    return path


def test_contestants_take_turns_and_the_first_rounds_only_warm_up():
    calls = []
    speeds = {"ours": iter([1, 10, 30, 20]), "theirs": iter([99, 5, 4, 6])}

    def measure(name):
        calls.append(name)
        return next(speeds[name]), len(calls)

    contestants = {name: lambda name=name: measure(name) for name in speeds}
    rows = contest(contestants, 3, {"theirs": 2})
    assert calls == ["ours", "theirs"] * 4
    assert rows == [("ours", 20, 10, 30, 1.0, "", 7), ("theirs", 5, 4, 6, 4.0, 2, 8)]
    lines = contest_table("corpus", "MB/s", {"1 MB": rows}).splitlines()
    assert lines[0] == "| corpus |  | MB/s, median (min-max) | speedup | target | MiB |"
    assert lines[-1] == "| 1 MB | theirs | 5 (4-6) | 4 | 2 | 8 |"


def test_numbers_are_short_but_not_wrong():
    shown = {
        1234567.8: "1,234,568",
        99.96: "100",
        12.345: "12.3",
        0.01234: "0.0123",
        3: "3",
        "a": "a",
    }
    assert {value: format_number(value) for value in shown} == shown


def test_a_section_replaces_the_one_with_the_same_title(tmp_path, capsys):
    results = tmp_path / "RESULTS.md"
    for title, text in (("A", "| one |\n| two |"), ("B", "bee"), ("A", "| three |\n| four |")):
        write(results, title, text)
    written = results.read_text()
    assert re.findall("^#+ .*", written, re.M) == ["# Results", "## A", "## B"]
    assert "| three |" in written and "| one |" not in written and "bee" in written
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- from bench/RESULTS.md: A -->\nold\n<!-- end -->\nb\n")
    update_page(page, results)
    assert page.read_text() == (
        "a\n<!-- from bench/RESULTS.md: A -->\n| three |\n| four |\n<!-- end -->\nb\n"
    )


@pytest.mark.parametrize("title", ["B", "C"])
def test_a_page_needs_sections_with_tables(tmp_path, capsys, title):
    results = tmp_path / "RESULTS.md"
    write(results, "B", "no table")
    page = tmp_path / "page.md"
    page.write_text(f"<!-- from bench/RESULTS.md: {title} -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=f"has no section '{title}' with a table"):
        update_page(page, results)


def test_the_tables_of_the_page_are_those_of_the_results(tmp_path):
    copy = tmp_path / "benchmarks.md"
    copy.write_text(PAGE.read_text())
    update_page(copy)
    assert copy.read_text() == PAGE.read_text()
    assert copy.read_text().count("<!-- from bench/RESULTS.md: ") == 6


def test_block_mask(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)
    results = tmp_path / "RESULTS.md"
    small = ["--batch_size", 2, "--sequence_length", 300, "--rounds", 2]
    printed = bench(block_mask, *small, "--results", results)
    assert "The mask of 2 x 300 document ids on cpu" in printed
    for name in ("document_block_mask", "create_block_mask"):
        assert f"| {name} |" in printed and f"| {name} |" in results.read_text()


def test_all_says_that_nothing_is_measured_on_a_gpu_without_one(bench, text, driver, monkeypatch):
    """bench.gpu is one of all benchmarks; what another machine measured stays in RESULTS.md."""
    driver(gpus=0)
    commands = []  # are recorded, not run: each of them has a test of its own
    monkeypatch.setattr(bench_all.subprocess, "run", lambda command, **_: commands.append(command))
    assert "gpu" in bench_all.SCRIPTS
    printed = bench(bench_all, "--text", text, "--scripts", "gpu", "train")
    assert printed == "".join(
        f"bench.{script}: no GPU here: not measured\n" for script in ("gpu", "train")
    )
    assert [command[2] for command in commands] == ["bench.train"]  # on the CPU


def test_all_runs_the_gpu_benchmark_on_a_gpu(bench, text, driver, monkeypatch):
    driver(gpus=1)
    commands = []  # are recorded, not run: each of them has a test of its own
    monkeypatch.setattr(bench_all.subprocess, "run", lambda command, **_: commands.append(command))
    bench(bench_all, "--text", text, "--nanogpt", "n", "--tatm", "t", "--scripts", "gpu")
    assert [command[1:] for command in commands] == [
        ["-m", "bench.gpu", "--text", str(text), "--nanogpt", "n"]
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="the compared libraries use GPT-2's ids, and TIKTOKEN_CACHE_DIR is not set",
)
def test_tokenize(bench, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "contest", functools.partial(contest, warm=0))
    results = tmp_path / "RESULTS.md"
    flags = ["--text", text, "--megabytes", 1, "--rounds", 1, "--results", results]
    printed = bench(tokenize, *flags)
    for contestant in ("ours, 1 worker", "datasets.map", "tiktoken.encode_ordinary_batch"):
        assert f"| {contestant} |" in printed
        assert f"| {contestant} |" in results.read_text()
    assert (tmp_path / "results" / "tokenizing.png").stat().st_size > 1000


@pytest.mark.slow
def test_loader():
    """The script leaves out a library that is not installed, and says so."""
    flags = ["--tokens", 100_000, "--seconds", 0.05, "--rounds", 1, "--results", ""]
    result = run_script(
        "bench.loader", *flags, cwd=ROOT
    )  # the script forks, so it needs a separate process
    assert result.returncode == 0, result.stderr
    assert "nanoGPT's get_batch (nanogpt is missing)" in result.stdout
    assert "| with document ids | ours |" in result.stdout
    assert "| padded documents | transformers |" in result.stdout


@pytest.mark.slow
def test_train(bench, forked, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = tmp_path / "RESULTS.md"
    shape = ["--shapes", "1/1/8/2/8/bytes/7", "--rounds", 1, "--threads", 1]
    printed = bench(train, "--text", text, *shape, "--results", results)
    assert "## Training on a CPU: 1/1/8, 2 x 8, bytes, 1 thread\n" in printed
    for contestant in ("ours", "ours, AdamW"):
        assert f"| {contestant} |" in printed
    assert "Left out: nanoGPT" in results.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("recipes", [[], ["--recipes", "--vocabularies", "bytes"]])
def test_learn(bench, forked, text, tmp_path, recipes, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(learn, "TRIED", {"bytes": ["--n_embd 16"]})
    monkeypatch.setattr(learn, "RACES", {"cpu": learn.RACES["cpu"][1:3]})
    tiny = "--n_layer 1 --n_head 1 --n_embd 8 --sequence_length 8 --max_steps 20"
    flags = [
        "--threads",
        1,
        "--seeds",
        1,
        "--seconds",
        1,
        f"--flags={tiny}",
        "--results",
        tmp_path / "R.md",
    ]
    printed = bench(learn, "--text", text, *flags, *recipes)
    if recipes:
        assert "## Byte by byte" in printed and "| `--n_embd 16` |" in printed
    else:
        for row in (
            r"its seconds, seed 0 \| bytes",
            "a quarter, separate documents, seed 0 .*true",
        ):
            assert re.search(rf"\| ours, {row} .*--max_steps \d+", printed)


@pytest.mark.slow
def test_scale(bench, forked, text, tiktoken_file, tmp_path, monkeypatch):
    monkeypatch.delitem(scale.ENGINES, "2 on Ray")  # test_slurm.py tests Ray
    small = ["--megabytes", 1, "--tokens", 10**10, "--channels", 32, "--windows", 8]
    small += ["--batches", 1, "--seconds", 0.01, "--rounds", 1]
    small += ["--tokenizer", tiktoken_file]
    printed = bench(scale, "--text", text, *small, "--results", tmp_path / "RESULTS.md")
    for row in ("| 1 MB | 2 workers |", "| 10,000,000,000 |", "| 32 | 12 x 64 | 50,257 |"):
        assert row in printed
    assert len(list((tmp_path / "results").iterdir())) == 3
