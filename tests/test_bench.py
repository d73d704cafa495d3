"""The scripts of bench/ at toy size: they run, write their sections, and the README shows them."""

import functools
import os
import re
import time

import pytest
from conftest import ROOT, run_script

from bench import learn, scale, tokenize, train
from bench.report import RESULTS, contest, contest_table, number, update_readme, write

pytestmark = pytest.mark.timeout(300)  # their peers take long to import


@pytest.fixture
def bench(monkeypatch, capsys):
    """bench(module, *flags) is `python -m bench.MODULE FLAGS`: what it prints."""

    def bench(module, *flags):
        monkeypatch.setattr("sys.argv", ["bench", *map(str, flags)])
        module.main()
        return capsys.readouterr().out

    return bench


@pytest.fixture
def forked(monkeypatch):
    """What is to be measured is forked, which spares it the imports; test_tokenize measures."""

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


def test_contestants_take_turns_and_the_first_laps_only_warm_up():
    asked, speeds = [], {"ours": iter([1, 10, 30, 20]), "theirs": iter([99, 5, 4, 6])}

    def measure(name):
        asked.append(name)
        return next(speeds[name]), len(asked)

    contestants = {name: lambda name=name: measure(name) for name in speeds}
    rows = contest(contestants, 3, {"theirs": 2})
    assert asked == ["ours", "theirs"] * 4
    assert rows == [("ours", 20, 10, 30, 1.0, "", 7), ("theirs", 5, 4, 6, 4.0, 2, 8)]
    assert contest_table("what", "MB/s", {"this": rows}).splitlines()[-1] == (
        "| this | theirs | 5 | 4 to 6 | 4 | 2 | 8 |"
    )


def test_numbers_are_short_but_not_wrong():
    shown = {
        1234567.8: "1,234,568",
        99.96: "100",
        12.345: "12.3",
        0.01234: "0.0123",
        3: "3",
        "a": "a",
    }
    assert {value: number(value) for value in shown} == shown


def test_a_section_takes_the_place_of_the_one_before(tmp_path, capsys):
    results = tmp_path / "RESULTS.md"
    for title, text in (("A", "| one |\n| two |"), ("B", "bee"), ("A", "| three |\n| four |")):
        write(results, title, text)
    written = results.read_text()
    assert re.findall("^#+ .*", written, re.M) == ["# Results", "## A", "## B"]
    assert "| three |" in written and "| one |" not in written and "bee" in written
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- from bench/RESULTS.md: A -->\nold\n<!-- to here -->\nb\n")
    update_readme(readme, results)
    assert readme.read_text() == (
        "a\n<!-- from bench/RESULTS.md: A -->\n| three |\n| four |\n<!-- to here -->\nb\n"
    )


def test_the_readmes_tables_are_those_of_the_results(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    update_readme(copy, ROOT / RESULTS)
    assert copy.read_text() == (ROOT / "README.md").read_text()
    assert copy.read_text().count("<!-- from bench/RESULTS.md: ") == 4


@pytest.mark.slow
@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="its peers have GPT-2's ids, and TIKTOKEN_CACHE_DIR is not set",
)
def test_tokenize(bench, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "contest", functools.partial(contest, warm=0))
    results = tmp_path / "RESULTS.md"
    flags = ["--text", text, "--megabytes", 1, "--rounds", 1, "--results", results]
    printed = bench(tokenize, *flags)
    for peer in ("ours, 1 worker", "datasets.map", "tiktoken.encode_ordinary_batch"):
        assert f"| {peer} |" in printed and f"| {peer} |" in results.read_text()
    assert (tmp_path / "results" / "tokenizing.png").stat().st_size > 1000


@pytest.mark.slow
def test_loader():
    """Peers that need a checkout, or a package that isn't there, are left out with a line."""
    flags = ["--tokens", 100_000, "--seconds", 0.05, "--rounds", 1, "--results", ""]
    result = run_script("bench.loader", *flags, cwd=ROOT)  # which forks, and has to be alone
    assert result.returncode == 0, result.stderr
    assert "nanoGPT's get_batch (nanogpt is not there)" in result.stdout
    assert "| with document ids | ours |" in result.stdout
    assert "| padded documents | transformers |" in result.stdout


@pytest.mark.slow
def test_train(bench, forked, text, tmp_path):
    results = tmp_path / "RESULTS.md"
    shape = ["--shapes", "1/1/8/2/8/bytes/7", "--rounds", 1]
    printed = bench(train, "--text", text, *shape, "--results", results)
    for contestant in ("ours", "ours, AdamW", "ours, documents apart"):
        assert f"| 1/1/8, 2 x 8, bytes | {contestant} |" in printed
    assert "Left out: nanoGPT" in results.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("recipes", [[], ["--recipes", "--vocabularies", "bytes"]])
def test_learn(bench, forked, text, tmp_path, recipes, monkeypatch):
    monkeypatch.setattr(learn, "TRIED", {"bytes": ["--n_embd 16"]})
    monkeypatch.setattr(learn, "RACES", {"cpu": learn.RACES["cpu"][1:3]})
    tiny = "--n_layer 1 --n_head 1 --n_embd 8 --sequence_length 8 --max_steps 20"
    flags = ["--seeds", 1, "--seconds", 1, f"--flags={tiny}", "--results", tmp_path / "R.md"]
    printed = bench(learn, "--text", text, *flags, *recipes)
    if recipes:
        assert "## Byte by byte" in printed and "| `--n_embd 16` |" in printed
    else:
        for row in (r"its seconds, seed 0 \| bytes", "a quarter, documents apart, seed 0 .*true"):
            assert re.search(rf"\| ours, {row} .*--max_steps \d+", printed)


@pytest.mark.slow
def test_scale(bench, forked, text, tiktoken_file, tmp_path, monkeypatch):
    monkeypatch.delitem(scale.ENGINES, "2 on Ray")  # test_slurm.py has it
    small = ["--megabytes", 1, "--tokens", 10**10, "--channels", 32, "--windows", 8]
    small += ["--batches", 1, "--seconds", 0.01, "--rounds", 1]
    small += ["--tokenizer", tiktoken_file]
    printed = bench(scale, "--text", text, *small, "--results", tmp_path / "RESULTS.md")
    for row in ("| 1 MB | 2 workers |", "| 10,000,000,000 |", "| 32 | 12 x 64 | 50,257 |"):
        assert row in printed
    assert len(list((tmp_path / "results").iterdir())) == 3
