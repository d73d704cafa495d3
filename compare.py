"""Compare runs: a table in Markdown, and a picture of their validation curves.

    python compare.py                        # all runs in out/
    python compare.py out/mine out/other     # these runs
    python compare.py out/mine               # one run: its row, and its page report.html

Reads config.json and metrics.jsonl, so it also works while a run trains. Writes compare.png beside
the runs. A row holds the settings that differ between the runs; finished runs that differ in
nothing but their seeds are one row, with mean ± standard deviation. Bits per byte compare across
vocabularies, but not across validation texts: such runs are in tables of their own.
"""

import datetime
import glob
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.files import atomic_write
from common.script import run_script
from common.settings import check_conflicts, parse_settings
from training.plots import LARGEST_PICTURE, comparison_figure
from training.runs import Row, Run, comparable_groups, differing_settings, fold_repeats, read_run

PICTURE = "compare.png"
HOW_TO_TRAIN = "python train_gpt2.py trains one"


@dataclass
class Settings:
    """The runs to compare."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()  # folders of runs; none: all in out_dir
    out_dir: str = "out"  # folder of runs


def main() -> None:
    """Print the table of the runs, and write their picture or the page of the only run."""
    settings = parse_settings(Settings, __doc__)
    check_conflicts(settings, {"runs": ("out_dir",)})
    paths = run_folders(settings)
    runs = read_runs(paths)
    if not runs:
        raise ValueError(f"none of these is a run that can be read: {HOW_TO_TRAIN}")
    groups = [fold_repeats(group) for group in comparable_groups(runs)]
    for rows in groups:
        print_group(rows)
    if len(runs) == 1:
        write_page(runs[0])
        return
    if not any(run.validations for run in runs):
        return
    picture = paths[0].parent / PICTURE
    drawn = [rows for rows in groups if any(run.validations for row in rows for run in row.runs)]
    with atomic_write(picture) as f:
        comparison_figure(drawn).savefig(f, dpi=120, format="png")
    left_out = f", of the first {LARGEST_PICTURE} tables" if len(drawn) > LARGEST_PICTURE else ""
    print(f"validation curves{left_out}: {picture}")


def run_folders(settings: Settings) -> list[Path]:
    """Return the folders to read, without repetitions.

    Raises:
        FileNotFoundError: There is none.
    """
    if settings.runs:
        names = []
        for name in settings.runs:
            is_pattern = "*" in name and not Path(name).exists()  # a shell that expands no patterns
            names += sorted(glob.glob(name)) if is_pattern else [name]
    else:
        names = sorted(glob.glob(f"{glob.escape(settings.out_dir)}/*/"))
    paths = [Path(name) for name in dict.fromkeys(names)]
    # out/* names our own picture, too
    paths = [path for path in paths if path.name != PICTURE]
    if not paths:
        place = " ".join(settings.runs) or f"{settings.out_dir}/"
        raise FileNotFoundError(f"there are no runs in {place}: {HOW_TO_TRAIN}")
    return paths


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs that can be read; print one line for each of the others."""
    runs = []
    for path in paths:
        try:
            runs.append(read_run(path))
        except (ValueError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)
    return runs


def print_group(rows: list[Row]) -> None:
    """Print the table of comparable runs."""
    print(f"validation on {rows[0].runs[0].text}\n")
    names = differing_settings(rows)
    head = [
        "run", *names, "parameters", "tokens", "bits per byte", "nats per token", "best at step",
        "tokens/s", "training time",
    ]  # fmt: skip
    print(markdown_table(head, [row_cells(row, names) for row in rows]))
    print()


def row_cells(row: Row, names: Sequence[str]) -> list[str]:
    """Return the cells of a row.

    Args:
        row: One run, or several that differ in their seeds.
        names: Names of the settings to show.
    """
    runs = row.runs
    first = runs[0]
    name = first.path.name
    if len(runs) > 1:
        name = f"{len(runs)} runs: {name}, ..."
    tokens = in_units(statistics.fmean(run.tokens for run in runs))
    if not first.finished:
        tokens += f" (step {first.step:,} of {first.max_steps:,})"
    speeds = [run.speed for run in runs if run.speed]
    bests = [run.best for run in runs if run.best]
    return [
        name,
        *(setting_cell(row.settings.get(setting)) for setting in names),
        f"{first.parameters:,}" if first.parameters else "",
        tokens,
        mean_and_spread([best.bits_per_byte for best in bests]),
        mean_and_spread([best.nats for best in bests]),
        step_range([best.step for best in bests]),
        f"{statistics.fmean(speeds):,.0f}" if speeds else "",
        str(datetime.timedelta(seconds=round(statistics.fmean(run.seconds for run in runs)))),
    ]


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean of losses and, of several, their standard deviation.

    Example: [2.26, 2.28, 2.24] -> "2.2600 ± 0.0200"; none -> "".
    """
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def in_units(number: float) -> str:
    """Return a number with three digits: 228352 -> "228k"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def step_range(steps: Sequence[int]) -> str:
    """Return the first and the last of some steps: [30, 10, 20] -> "10-30"; none -> ""."""
    if not steps:
        return ""
    first = min(steps)
    last = max(steps)
    return f"{first:,}" if first == last else f"{first:,}-{last:,}"


def setting_cell(value: object) -> str:
    """Return the value of a setting; "" if it is not set."""
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, whose columns are aligned for a terminal, too.

    Args:
        head: Names of the columns.
        rows: Cells, as many as `head` has.
    """
    texts = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts)]
    lines = []
    for row in texts:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def write_page(run: Run) -> None:
    """Write the page of a run, with its best checkpoint if there is one."""
    # torch takes longer to import than a thousand runs take to compare
    from training.checkpoint import best_checkpoint
    from training.models import load_model
    from training.report_page import write_report_page
    from training.run_folder import is_run

    checkpoint = best_checkpoint(run.path) if is_run(run.path) else None
    model = load_model(checkpoint) if checkpoint else None
    print(f"page: {write_report_page(run.path, checkpoint, model)}")


if __name__ == "__main__":
    run_script(main)
