"""report.html: a run's own page, which needs no other file."""

import datetime
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from batches.tokens import Tokens
from common.files import atomic_write, read_json
from common.settings import setting_text
from corpus.vocabulary import tokenizer_of
from model import GPT
from training.corpora import corpus_weights
from training.json_lines import read_lines
from training.plots import loss_figure, printable_name
from training.run_settings import saved_choices, saved_corpus
from training.runs import Run, read_run
from training.score_page import (
    html_document,
    html_fragment,
    html_legend,
    spans_of,
    visible_html,
)
from training.validation_text import score_beginning

INK = "#12ab34"  # stands for the color of the text while a picture is drawn


def write_report_page(run_dir: Path, checkpoint: dict | None, model: GPT | None) -> Path:
    """Write RUN/report.html: curves, scored validation text, samples and settings.

    Args:
        run_dir: Folder of the run.
        checkpoint: Its best checkpoint, or None before the first one.
        model: The model of the checkpoint, in evaluation mode; not used for anything else
            afterwards.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: The folder is not a run.
        ValueError: A file of the run is damaged.
        OSError: A file cannot be read or written.
    """
    run = read_run(run_dir)
    samples = read_lines(run_dir / "samples.jsonl")
    body = BODY.format(
        summary=_summary(run),
        curves=_curves(run_dir),
        legend=html_legend(),
        scored=_scored_text(run_dir, checkpoint, model),
        samples="".join(map(_sample, samples)) or "<p>There are none.</p>",
        settings=_settings(read_json(run_dir / "config.json")),
    )
    page = html_document(printable_name(run_dir), "train_gpt2.py", body, REPORT_STYLE)
    with atomic_write(run_dir / "report.html") as f:
        f.write(page.encode())
    return run_dir / "report.html"


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    """Return the rows of a table of two columns."""
    return "".join(
        f"<tr><th>{visible_html(name)}<td>{visible_html(value)}" for name, value in pairs
    )


def _summary(run: Run) -> str:
    time = datetime.timedelta(seconds=round(run.seconds))
    pairs = []
    if run.best:
        pairs = [
            ("best validation", f"{run.best.bits_per_byte:.4f} bits per byte"),
            ("", f"{run.best.nats:.4f} nats per token, at step {run.best.step:,}"),
        ]
    pairs += [
        ("steps", f"{run.step:,} of {run.max_steps:,}"),
        ("tokens", f"{run.tokens:,.0f}"),
        ("parameters", f"{run.parameters:,}" if run.parameters else "unknown"),
        ("training time", f"{time}, without validations"),
        ("validation text", run.text),
    ]
    return _pairs(pairs)


def _curves(run_dir: Path) -> str:
    """Return the curves of loss.png as SVG, in the colors of the page."""
    import matplotlib

    file = io.StringIO()
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colors: Any = dict.fromkeys(names, INK) | {
        "legend.facecolor": "none",
        "legend.edgecolor": "none",
    }
    with matplotlib.rc_context(colors | {"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure = loss_figure(read_lines(run_dir / "metrics.jsonl"), run_dir, INK, title=False)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _scored_text(run_dir: Path, checkpoint: dict | None, model: GPT | None) -> str:
    """Return the beginning of the validation text, scored by the best weights, or why it lacks."""
    if not checkpoint or not model:
        return "<p>The run has no checkpoint yet.</p>"
    config = checkpoint["config"]
    choices = saved_choices(checkpoint)
    metadata = checkpoint["metadata"]
    parts = []
    try:
        tokenizer = tokenizer_of(metadata, run_dir)
        names = list(corpus_weights(saved_corpus(config)))
        for name in names:
            tokens = Tokens(Path(config["data_dir"]) / name / "val")
            first_id, scores = score_beginning(
                model,
                tokens,
                config["sequence_length"],
                tokenizer.eot_token,
                choices["document_mask"] == "true",
            )
            if len(names) > 1:
                parts.append(f"<h3>{visible_html(name)}</h3>")
            parts.append(html_fragment(spans_of(first_id, scores, tokenizer)))
    except (FileNotFoundError, ValueError) as error:  # moved, or prepared again
        return f"<p>The validation text cannot be scored: {visible_html(error)}</p>"
    return "".join(parts)


def _sample(line: dict) -> str:
    text = visible_html(line.get("text", ""))
    return f"<h3>Step {line['step']:,}</h3>\n<pre>{text}</pre>\n"


def _settings(config: dict) -> str:
    config = config | {"corpus": " ".join(saved_corpus(config))}
    pairs = [(name, value) for name, value in config.items() if not isinstance(value, dict)]
    for name in ("chosen", "val_text"):
        pairs += [(f"{name}: {key}", value) for key, value in config.get(name, {}).items()]
    return _pairs((name, "" if value is None else setting_text(value)) for name, value in pairs)


REPORT_STYLE = """h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin-bottom: 0; }
th { text-align: left; font-weight: normal; opacity: .7; padding-right: 1rem; }
th, td { vertical-align: top; }
.curves svg { width: 100%; height: auto; }
pre { white-space: pre-wrap; margin: .3rem 0; border-left: 3px solid #8886; padding-left: .8rem;
  font: .9rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""
BODY = """<table>{summary}</table>
<h2>Losses</h2>
<div class="curves">{curves}</div>
<h2>The beginning of the validation text</h2>
<p>By the best weights. Point at a token, or tap it, for its probability, its rank and the five most
likely tokens in its place.</p>
{legend}
{scored}
<h2>Samples</h2>
<p>At each validation the model continues the same beginning, with the same random numbers.</p>
{samples}
<h2>Settings</h2>
<details><summary>All settings, and what was chosen for the machine</summary>
<table>{settings}</table></details>"""
