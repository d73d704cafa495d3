"""Helpers of the benchmarks: contests, tables, pictures, and the sections of RESULTS.md.

python -m bench.report       # copies the tables of RESULTS.md into docs/benchmarks.md
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from common.files import atomic_write
from common.script import run_script

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "bench/RESULTS.md"
PAGE = ROOT / "docs" / "benchmarks.md"
REQUIREMENTS = ROOT / "bench" / "requirements.txt"
PACKAGES = list(dict.fromkeys(re.findall(r"^([a-z]+)==", REQUIREMENTS.read_text(), re.M)))

Measure = Callable[[], tuple[float, float]]


class Row(NamedTuple):
    """One contestant's speed over all rounds."""

    name: str
    median: float
    smallest: float
    largest: float
    speedup: float  # the median of the first contestant divided by this one
    target: float | str  # the speedup to reach; "": none
    mib: float  # peak memory in MiB


def contest(
    contestants: Mapping[str, Measure],
    rounds: int,
    targets: Mapping[str, float | str] | None = None,
    warm: int = 1,
) -> list[Row]:
    """Measure contestants in turns, so that other load on the machine slows all of them.

    Args:
        contestants: Name -> function that returns (speed, peak memory in MiB). The first
            contestant is ours.
        rounds: Measurements of each contestant.
        targets: Name -> speedup that ours should reach over this contestant.
        warm: Rounds that come first and are not counted.

    Returns:
        One row per contestant.
    """
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    memory = dict.fromkeys(contestants, 0.0)
    for lap in range(warm + rounds):
        for name, measure in contestants.items():
            speed, mib = measure()
            memory[name] = max(memory[name], mib)
            if lap >= warm:
                speeds[name].append(speed)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    first = next(iter(medians.values()))
    rows = []
    for name, values in speeds.items():
        target = (targets or {}).get(name, "")
        speedup = first / medians[name]
        rows.append(
            Row(name, medians[name], min(values), max(values), speedup, target, memory[name])
        )
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table, with numbers in the form of format_number()."""
    lines = [list(head), ["---"] * len(head)]
    for row in rows:
        lines.append([format_number(cell) for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def contest_table(heading: str, unit: str, contests: Mapping[str, Sequence[Row]]) -> str:
    """Return the Markdown table of several contests.

    Args:
        heading: Heading of the first column, which names the contests.
        unit: Unit of the speeds.
        contests: Name of a contest -> its rows, from contest().
    """
    head = [heading, "", f"{unit}, median (min-max)", "speedup", "target", "MiB"]
    rows = []
    for name, contest_rows in contests.items():
        for row in contest_rows:
            numbers = map(format_number, (row.median, row.smallest, row.largest))
            speed = "{} ({}-{})".format(*numbers)
            rows.append((name, row.name, speed, row.speedup, row.target, row.mib))
    return table(head, rows)


def format_number(value: Any) -> str:
    """Return a number with three digits or all digits before the point, another value as text.

    Example: 1234567.8 -> "1,234,568", 0.01234 -> "0.0123".
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def bars(unit: str, contests: Mapping[str, Sequence[Row]]) -> Figure:
    """Return a picture of the medians, one panel per contest, with min and max as a line."""
    num_rows = sum(len(rows) for rows in contests.values())
    figure = Figure(figsize=(8, 0.9 + 0.42 * num_rows + 0.4 * len(contests)), layout="constrained")
    ratios = [len(rows) + 1 for rows in contests.values()]
    panels = figure.subplots(len(contests), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (contest_name, rows) in zip(panels, contests.items()):
        names = [row.name for row in rows]
        medians = [row.median for row in rows]
        below = [row.median - row.smallest for row in rows]
        above = [row.largest - row.median for row in rows]
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        axes.barh(names, medians, xerr=[below, above], color=colours, height=0.6)
        axes.invert_yaxis()
        axes.set_title(contest_name, fontsize=10, loc="left")
    axes.set_xlabel(unit)
    return figure


def curves(panels: Mapping[str, Mapping], x: str, y: str, log: str = "both") -> Figure:
    """Return a picture of curves.

    Args:
        panels: Title of a panel -> {name of a curve: [(x, y), ...]}.
        x: Label of the x axis.
        y: Label of the y axis.
        log: Logarithmic axes: "both", "x" or "".
    """
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items()):
        for name, points in lines.items():
            axes.plot(*zip(*points), marker=".", label=name)
        if log:
            axes.set_xscale("log")
        if log == "both":
            axes.set_yscale("log")
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def write(path: str | Path, title: str, text: str, figure: Figure | None = None) -> None:
    """Print a section of results and write it into a Markdown file.

    The section replaces the section with the same title, or is added at the end. The command, the
    commit and the machine follow the text.

    Args:
        path: Markdown file; "": print only.
        title: Title of the section.
        text: Markdown text.
        figure: Picture, which is written to the folder `results` beside the Markdown file.
    """
    text = f"{text.strip()}\n\n`{command()}`: {machine()}.\n"
    print(f"\n## {title}\n\n{text}", flush=True)
    if not path:
        return
    path = Path(path)
    if figure:
        picture = path.parent / "results" / f"{re.sub('[^a-z0-9]+', '-', title.lower())}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(picture) as f:
            figure.savefig(f, dpi=110, format="png")
        text += f"\n![{title}](results/{picture.name})\n"
    before = path.read_text() if path.exists() else f"# {path.stem.title()}\n"
    section = f"## {title}\n\n{text}\n"
    old_section = section_pattern(title)
    if old_section.search(before):
        after = old_section.sub(lambda _: section, before)
    else:
        after = f"{before.rstrip()}\n\n{section}"
    with atomic_write(path) as f:
        f.write((after.rstrip() + "\n").encode())


def section_pattern(title: str) -> re.Pattern:
    """Return the pattern of a section of a Markdown file; group 1 is the text after the title."""
    return re.compile(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", re.M | re.S)


def command() -> str:
    """Return the command that runs this process, in the form that one types."""
    script = sys.modules["__main__"].__spec__  # None in a test
    return " ".join([f"python -m {script.name if script else 'pytest'}", *sys.argv[1:]])


def machine() -> str:
    """Return the day, the commit, the processor, the GPU and the versions, in one line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    facts = [str(datetime.date.today()), f"commit {commit or 'unknown'}", _processor(), gpu]
    return "; ".join([*facts, ", ".join(_versions())])


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return values as flags of a command.

    Example: {"corpus": "c", "workers": 2} -> ["--corpus", "c", "--workers", "2"].
    """
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", str(value)]
    return flags


def _processor() -> str:
    """Return the processor, its widest instructions, cores, threads and memory."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    capabilities = torch.cpu.get_capabilities()
    widest = "no avx2"
    for instructions in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16"):
        if capabilities.get(instructions):
            widest = instructions
    return (
        f"{name[1] if name else platform.processor()} ({widest}), "
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, {gib:.0f} GiB"
    )


def _versions() -> list[str]:
    """Return the versions of Python, torch and the packages of the benchmarks."""
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("tiktoken", "numpy", *PACKAGES):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return versions


# A process inherits the peak memory of its parent, so a small process starts the measured one.
LAUNCH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:], stdout=sys.stderr, stderr=sys.stderr).returncode
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def whole_process(command: Sequence, **options) -> tuple[float, float, str]:
    """Run a command from start to end.

    Args:
        command: Program and arguments.
        options: Arguments of subprocess.run.

    Returns:
        (seconds, peak memory of the largest process in MiB, printed text).

    Raises:
        ValueError: The command failed.
    """
    with tempfile.NamedTemporaryFile() as peak:
        launch = [sys.executable, "-S", "-c", LAUNCH, peak.name, *map(str, command)]
        start = time.perf_counter()
        result = subprocess.run(launch, stderr=subprocess.PIPE, text=True, **options)
        seconds = time.perf_counter() - start
        if result.returncode:
            raise ValueError(f"{' '.join(launch[5:])} failed: {result.stderr[-2000:]}")
        return seconds, int(Path(peak.name).read_text()) / 1024, result.stderr


def private_mib(pid: int | str = "self") -> float:
    """Return the memory of a process in MiB, without the page cache; 0 if it has ended."""
    with contextlib.suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        anonymous = re.search(r"^Anonymous:\s+(\d+)", rollup, re.M)
        if anonymous:
            return int(anonymous[1]) / 1024
    return 0


def each_thread_count(device: str, threads: Sequence[int]) -> Iterator[int]:
    """Yield each number of CPU threads, once this process and those that it starts use it.

    Args:
        device: "cpu"; on any other device, all cores are the only number.
        threads: Numbers of threads.
    """
    for num_threads in threads if device == "cpu" else [os.cpu_count() or 1]:
        torch.set_num_threads(num_threads)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        yield num_threads


def check_text(text: str) -> None:
    """Check that --text names a file.

    Raises:
        ValueError: --text is missing.
    """
    if not text:
        raise ValueError(
            "--text is missing: name the text to train on, for example "
            "data/tinyshakespeare/input.txt"
        )


def update_page(page: Path = PAGE, results: Path = ROOT / RESULTS) -> None:
    """Copy tables of RESULTS.md into a page: the first table of each section that the page names.

    In the page, a table is between `<!-- from bench/RESULTS.md: TITLE -->` and `<!-- end -->`.

    Args:
        page: Markdown file to update.
        results: Path of RESULTS.md.

    Raises:
        ValueError: RESULTS.md lacks a section that the page names, or the section has no table.
    """
    text = results.read_text()

    def with_table(match: re.Match) -> str:
        title = match[2]
        section = section_pattern(title).search(text)
        found = re.search(r"(?:^\|.*\n)+", section[1], re.M) if section else None
        if not found:
            raise ValueError(f"{results} has no section {title!r} with a table, for {page}")
        return match[1] + found[0] + match[3]

    copied_table = re.compile(
        r"(<!-- from bench/RESULTS\.md: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL
    )
    updated = copied_table.sub(with_table, page.read_text())
    with atomic_write(page) as f:
        f.write(updated.encode())


if __name__ == "__main__":
    run_script(update_page)
