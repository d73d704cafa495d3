"""compare.py: the table, the picture, the groups; report.html and the samples of a run."""

import io
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import time
import warnings
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT, assert_one_line_error, losses, make_corpus, run_script

from batches.tokens import Tokens
from training.checkpoint import load_checkpoint
from training.json_lines import read_lines
from training.models import load_model
from training.plots import comparison_figure, loss_figure
from training.report_page import write_report_page
from training.runs import comparable_groups, fold_repeats, read_run
from training.validation_text import score_beginning

CONFIG = {
    "corpus": "c", "batch_size": 2, "sequence_length": 5, "max_steps": 40, "seed": 0, "n_layer": 4,
    "chosen": {"dtype": "float32"}, "parameters": 1234567, "val_text": {"bytes": 9, "sha256": "a"},
}  # fmt: skip


def write_run(folder, bits=(3.0, 2.0), last_step=40, **config):
    """Write a run whose steps have 10 tokens and take 0.1 seconds."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    lines = []
    for i, bpb in enumerate(bits, 1):
        step = last_step * i // len(bits)
        lines.append({"step": step, "tokens": 10 * step, "train_loss": 1, "tokens_per_second": 100})
        nats = bpb * math.log(2)
        lines.append({"step": step, "tokens": 10 * step, "val_loss": nats, "val_bpb": bpb})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def compare(folder, *arguments):
    return run_script("compare.py", *arguments, cwd=folder)


def table(output):
    """Return the rows of the tables as lists of cells."""
    rows = [line.strip("| ").split("|") for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_a_name_that_the_font_lacks_prints_no_warnings(tmp_path):
    """The warnings of matplotlib name its own fonts, which nobody has chosen here."""
    write_run(tmp_path / "out" / "紅樓夢")
    run = read_run(tmp_path / "out" / "紅樓夢")
    lines = read_lines(run.path / "metrics.jsonl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison_figure([fold_repeats([run])]).savefig(io.BytesIO())
        loss_figure(lines, run.path).savefig(io.BytesIO())


def test_runs_are_sorted_and_repeats_are_folded(tmp_path):
    for seed, bits in enumerate((2.5, 2.6, 2.9)):
        write_run(tmp_path / "out" / f"wide-{seed}", (3, bits), seed=seed, n_layer=8)
    write_run(tmp_path / "out" / "deep", (2.7, 2.8), seed=0, n_layer=16)
    write_run(tmp_path / "out" / "early", (2.4,), last_step=10, seed=3, n_layer=8)
    result = compare(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    head, _, *rows = table(result.stdout)
    assert head == [
        "run", "n_layer", "parameters", "tokens", "bits per byte", "nats per token",
        "best at step", "tokens/s", "training time",
    ]  # fmt: skip
    mean = statistics.fmean((2.5, 2.6, 2.9))
    bits = f"{mean:.4f} ± {statistics.stdev((2.5, 2.6, 2.9)):.4f}"
    assert [row[:5] for row in rows] == [
        ["early", "8", "1,234,567", "100 (step 10 of 40)", "2.4000"],
        ["3 runs: wide-0, ...", "8", "1,234,567", "400", bits],
        ["deep", "16", "1,234,567", "400", "2.7000"],
    ]
    assert [row[6:] for row in rows][-1] == ["20", "100", "0:00:04"]
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_speed_of_a_run_does_not_include_compiling(tmp_path):
    """The first steps of a compiled run take as long as the compiler."""
    write_run(tmp_path / "out" / "compiled", (3.0, 2.0))
    path = tmp_path / "out" / "compiled" / "metrics.jsonl"
    lines = path.read_text().replace('"tokens_per_second": 100', '"tokens_per_second": 2', 1)
    path.write_text(lines)
    *_, row = table(compare(tmp_path).stdout)
    assert row[-2:] == ["100", "0:01:42"]  # 200 tokens at 2 tokens/s, and 200 at 100


def test_runs_with_another_validation_text_are_in_a_table_of_their_own(tmp_path):
    write_run(tmp_path / "a", corpus="bytes")
    write_run(tmp_path / "b", corpus="gpt2")  # another vocabulary, the same text
    write_run(tmp_path / "c", val_text={"bytes": 10, "sha256": "a"})
    for name, corpus in (("old-1", "x"), ("old-2", "x"), ("old-3", "y")):  # of an older version
        write_run(tmp_path / name, corpus=corpus, val_text=None)
    groups = comparable_groups([read_run(path) for path in sorted(tmp_path.iterdir())])
    names = [[run.path.name for run in group] for group in groups]
    assert names == [["a", "b"], ["old-1", "old-2"], ["c"], ["old-3"]]
    assert "no val_text" in groups[1][0].text


def test_corpora_are_shown_as_on_the_command_line(tmp_path):
    write_run(tmp_path / "old", (2.1,), corpus="a")  # of an older version
    write_run(tmp_path / "one", (2.2,), corpus=["a"], seed=1)
    write_run(tmp_path / "mixture", (2.3,), corpus=["a:0.7", "b:0.3"])
    head, _, *rows = table(compare(tmp_path, "old", "one", "mixture").stdout)
    corpora = [row[head.index("corpus")] for row in rows]
    assert corpora == ["a", "a:0.7 b:0.3"]  # old and one differ in their seeds alone
    page = write_report_page(tmp_path / "mixture", None, None).read_text()
    assert "<th>corpus<td>a:0.7 b:0.3" in page


def test_labels_of_tokens_do_not_touch(tmp_path):
    write_run(tmp_path / "one", (2.1,), last_step=19200)
    (axes, _) = comparison_figure([fold_repeats([read_run(tmp_path / "one")])]).axes
    axes.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    gap = boxes[0].width / 6  # about a digit
    assert all(left.x1 + gap < right.x0 for left, right in itertools.pairwise(boxes))


def test_what_is_not_a_folder_is_named(tmp_path):
    (tmp_path / "best.pt").touch()
    result = compare(tmp_path, "absent", "best.pt")
    assert result.stderr.splitlines()[:2] == [
        "left out: absent does not exist",
        "left out: best.pt is not a folder: name the folder of the run",
    ]


def test_unreadable_runs_do_not_hide_the_others(tmp_path):
    write_run(tmp_path / "good")
    write_run(tmp_path / "other", (2.2,), n_layer=5)
    write_run(tmp_path / "running", ())
    (tmp_path / "running" / "metrics.jsonl").write_text('{"step": 1, "tok')
    damages = {
        "cut": ("config.json", '{"corpus": '),
        "list": ("config.json", "[]"),
        "torn": ("metrics.jsonl", '{"step": 1}\nxx\n'),
        "text": ("metrics.jsonl", '{"step": 1, "val_loss": "x", "val_bpb": 1}\n'),
        "nan": ("metrics.jsonl", '{"step": 1, "val_loss": NaN, "val_bpb": NaN}\n'),
        "zero": ("metrics.jsonl", '{"step": 1, "tokens_per_second": 0}\n'),
    }
    for name, (file, text) in damages.items():
        write_run(tmp_path / name)
        (tmp_path / name / file).write_text(text)
    (tmp_path / "notes").mkdir()
    result = compare(tmp_path, *sorted(path.name for path in tmp_path.iterdir()), "absent")
    assert result.returncode == 0
    assert [row[0] for row in table(result.stdout)[2:]] == ["good", "other", "running"]
    lines = result.stderr.splitlines()
    for name in (*damages, "notes", "absent"):
        assert len([line for line in lines if re.match(rf"left out: {name}\b", line)]) == 1
    assert len(lines) == len(damages) + 2
    assert_one_line_error(compare(tmp_path, "--out_dir", "nowhere"), "no runs in nowhere/")
    result = compare(tmp_path, "notes")
    assert result.returncode == 1 and result.stderr.count("\n") == 2


def test_a_thousand_runs_take_a_few_seconds(tmp_path):
    for i in range(1000):
        write_run(tmp_path / "out" / str(i), [3 - j / 100 for j in range(50)], seed=i % 7)
    start = time.process_time()
    groups = comparable_groups([read_run(path) for path in (tmp_path / "out").iterdir()])
    assert len(fold_repeats(groups[0])) == 1
    assert time.process_time() - start < 5


def test_the_table_needs_no_pytorch():
    code = "import sys, compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("corpus", ["rhyme", "documents"])
def test_samples_change_nothing_in_a_run(train, tmp_path, monkeypatch, corpus):
    """With dropout and noise, the weights are those of a run without samples, bit for bit."""
    make_corpus(tmp_path / "data/documents", ["one for sorrow", "two for mirth"] * 99, True)
    options = dict(max_steps=16, dropout=0.2, token_noise=0.1, corpus=corpus)
    sampled = train(**options, run_name="sampled")
    parts = train(**options, run_name="parts", stop_at=12)
    samples = read_lines(parts / "samples.jsonl")
    assert [line["step"] for line in samples] == [8]
    with open(parts / "samples.jsonl", "a") as f:
        f.write('{"step": 13, "text": "left by a kill"}\n')
    train(resume=parts)
    monkeypatch.setattr("training.metrics.open_sampler", lambda *arguments: None)
    plain = train(**options, run_name="plain")
    assert not (plain / "samples.jsonl").exists()
    assert losses(plain) == losses(sampled)
    weights = [load_checkpoint(folder / "last.pt")["model"] for folder in (sampled, parts, plain)]
    for name, weight in weights[2].items():
        assert torch.equal(weight, weights[0][name]) and torch.equal(weight, weights[1][name])
    lines = read_lines(sampled / "samples.jsonl")
    assert lines == read_lines(parts / "samples.jsonl")
    assert [line["step"] for line in lines] == [8, 16] and lines[0]["text"] != lines[1]["text"]


def test_vocabularies_give_one_text_the_same_key(train, tmp_path, gpt2_tokenizer):
    text = ["one for sorrow, two for mirth\n" * 180]
    make_corpus(tmp_path / "data" / "gpt2", text, tokenizer="gpt2")
    make_corpus(tmp_path / "data" / "other", ["two for mirth, one for sorrow\n" * 180])
    for corpus in ("rhyme", "gpt2", "other"):
        train(max_steps=1, corpus=corpus, run_name=corpus)
    keys = [read_run(tmp_path / "out" / name).text_key for name in ("rhyme", "gpt2", "other")]
    assert keys[0] == keys[1] != keys[2]


def test_the_tokens_of_a_run_count_each_batch_size(train):
    folder = train(max_steps=4, stop_at=2, eval_every=2)
    train(resume=folder, batch_size=8)
    run = read_run(folder)
    assert (run.tokens, run.best.tokens) == (2 * 64 + 2 * 128, 2 * 64 + 2 * 128)
    speeds = losses(folder, "tokens_per_second")
    expected = 64 / speeds[1] + 64 / speeds[2]
    assert run.validations[0].seconds == pytest.approx(expected, rel=1e-3)


class Elements(HTMLParser):
    """Collects the elements of a page that refer to other files, and its scored tokens."""

    def __init__(self):
        super().__init__()
        self.references = []
        self.tokens = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.references.append(value)
            if name == "data-tokens":
                self.tokens += [token[0] for token in json.loads(value)]


@pytest.mark.parametrize("corpus", ["rhyme", "documents"])
def test_the_page_of_a_run(train, tmp_path, corpus):
    make_corpus(tmp_path / "data/documents", ["one <b>for</b> sorrow", "two & mirth"] * 99, True)
    folder = train(max_steps=16, corpus=corpus, run_name="<i>&mine")
    result = compare(tmp_path, str(folder))
    assert (result.returncode, result.stderr) == (0, "")
    assert len(table(result.stdout)) == 3
    page = (folder / "report.html").read_text()
    elements = Elements()
    elements.feed(page)
    assert not elements.references and "url(http" not in page and "@import" not in page
    assert "<i>" not in page and "<b>for" not in page and "&lt;i&gt;&amp;mine" in page
    val_tokens = Tokens(tmp_path / "data" / corpus / "val")
    assert len(elements.tokens) == min(256, len(val_tokens) - 1)
    for line in read_lines(folder / "samples.jsonl"):
        assert f"<h3>Step {line['step']}</h3>" in page
    (tmp_path / "data" / corpus / "val.bin").unlink()
    checkpoint = load_checkpoint(folder / "best.pt")
    write_report_page(folder, checkpoint, load_model(checkpoint))
    assert "The validation text cannot be scored" in (folder / "report.html").read_text()


def test_the_scores_of_the_beginning_are_those_of_validation(train, tmp_path):
    """On a short split of whole sequences, their mean is the validation loss."""
    for number in range(20, 99):
        make_corpus(tmp_path / "data/short", ["one for sorrow", "two"] * number, True)
        tokens = Tokens(tmp_path / "data/short/val")
        if len(tokens) % 16 == 1:
            break
    assert 16 < len(tokens) <= 257
    folder = train(max_steps=1, corpus="short", eval_every=1)
    model = load_model(load_checkpoint(folder / "best.pt"))
    _, scores = score_beginning(model, tokens, 16, 256, True)
    assert scores.nats.mean() == pytest.approx(losses(folder, "val_loss")[1], abs=1e-5)
