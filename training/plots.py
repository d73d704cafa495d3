"""Pictures: the losses of a run, and runs side by side."""

import gc
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.runs import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_ROWS = 10  # rows of a table whose curves have a color and a name; the others are gray
LARGEST_PICTURE = 6  # groups of comparable runs in one picture


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; width and height are in inches."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a read-only home
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # boxes in a name are enough
    from matplotlib.figure import Figure  # no pyplot: no window, no state

    gc.collect()  # the last figure, a megabyte of objects that refer to each other
    return Figure(figsize=(width, height), layout="constrained")


def printable_name(run_dir: Path) -> str:
    """Return the name of a run's folder as text; the name may be any bytes."""
    return os.fsencode(run_dir.name).decode(errors="replace")


def loss_figure(
    lines: Sequence[dict], run_dir: Path, ink: str = "black", title: bool = True
) -> "Figure":
    """Return a figure of both losses against steps, the best validation marked.

    Args:
        lines: The lines of metrics.jsonl.
        run_dir: Folder of the run.
        ink: Color of the mark.
        title: Whether the figure has the name of the run.
    """
    train = [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure = new_figure(7, 4)
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train), linewidth=0.8, alpha=0.8, label="training batch")
    if val:
        best = min(val, key=lambda point: point[1])
        axes.plot(*zip(*val), marker=".", label="validation")
        label = f"best: {best[1]:.4f} at step {best[0]}"
        axes.plot(*best, "o", fillstyle="none", color=ink, label=label)
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    if title:
        axes.set_title(printable_name(run_dir), parse_math=False)
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    return figure


def comparison_figure(groups: Sequence[Sequence[Row]]) -> "Figure":
    """Return a figure of the validation curves of runs, against tokens and against seconds.

    Args:
        groups: Rows of comparable runs, the best first. A group has a line of the figure of its
            own; runs of one row have one color. Only the first LARGEST_PICTURE groups are drawn.
    """
    groups = groups[:LARGEST_PICTURE]
    figure = new_figure(11, 4 * len(groups))
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for rows, (by_tokens, by_seconds) in zip(groups, grid):
        for i, row in reversed(list(enumerate(rows))):  # the best last, on top
            named = i < NAMED_ROWS
            color = f"C{i}" if named else "lightgray"
            for run in row.runs:
                points = run.validations
                losses = [point.bits_per_byte for point in points]
                for axes, xs in (
                    (by_tokens, [point.tokens for point in points]),
                    (by_seconds, [point.seconds for point in points]),
                ):
                    axes.plot(xs, losses, color=color, marker="." if named else None, linewidth=1)
        by_tokens.set_title(rows[0].runs[0].text, fontsize="medium", parse_math=False)
        by_tokens.set(xlabel="tokens", ylabel="validation (bits per byte)")
        by_seconds.set(xlabel="seconds of training")
        _name_curves(by_seconds, rows)
        for axes in (by_tokens, by_seconds):
            axes.grid(alpha=0.3)
            axes.locator_params(axis="x", nbins=6)  # more labels of six digits would overlap
    return figure


def _name_curves(axes, rows: Sequence[Row]) -> None:
    """Add a legend with the names of the first rows, the best first."""
    from matplotlib.lines import Line2D

    handles = []
    for i, row in enumerate(rows[:NAMED_ROWS]):
        name = printable_name(row.runs[0].path).replace("$", r"\$")[:40]
        others = f" and {len(row.runs) - 1} more" if len(row.runs) > 1 else ""
        handles.append(Line2D([], [], color=f"C{i}", label=f"\u200b{name}{others}"))
    if len(rows) > NAMED_ROWS:
        label = f"{len(rows) - NAMED_ROWS} more rows of the table"
        handles.append(Line2D([], [], color="lightgray", label=label))
    axes.legend(handles=handles, fontsize="small", loc="upper right")
