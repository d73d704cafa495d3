"""What the scripts here share: contestants in turn, tables, pictures, RESULTS.md.

python -m bench.report       # copies the tables that README.md shows from RESULTS.md
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
from pathlib import Path

import torch
from matplotlib.figure import Figure

from common.files import atomic_write
from common.script import run

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "bench/RESULTS.md"
PACKAGES = re.findall(r"^([a-z]+)==", (ROOT / "bench" / "requirements.txt").read_text(), re.M)


def contest(contestants: dict, rounds: int, goals: dict | None = None, warm=1) -> list[tuple]:
    """Asks each contestant in turn, `rounds` times after `warm` that only warm up.

    contestants: {name: function () -> (speed, peak memory in MiB)}, ours first; goals: {name: how
    many times faster ours should be}. Returns rows of (name, median speed, least, most, ours by it,
    goal, MiB).
    """
    speeds, memory = {name: [] for name in contestants}, dict.fromkeys(contestants, 0)
    for lap in range(warm + rounds):
        for name, measure in contestants.items():
            speed, mib = measure()
            memory[name] = max(memory[name], mib)
            if lap >= warm:
                speeds[name].append(speed)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    first = next(iter(medians.values()))
    return [
        (name, medians[name], min(values), max(values), first / medians[name],
         (goals or {}).get(name, ""), memory[name])
        for name, values in speeds.items()
    ]  # fmt: skip


def table(head: list[str], rows: list) -> str:
    """A table in Markdown; numbers with three digits or all before the point."""
    lines = [head, ["---"] * len(head), *([number(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def contest_table(what: str, unit: str, groups: dict[str, list]) -> str:
    """groups: {what is compared: rows of contest()}."""
    head = [what, "", f"{unit}, median", "least to most", "ours is faster by", "goal", "MiB"]
    rows = [
        (group, name, median, f"{number(least)} to {number(most)}", ratio, goal, memory)
        for group, contestants in groups.items()
        for name, median, least, most, ratio, goal, memory in contestants
    ]
    return table(head, rows)


def number(value) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def bars(unit: str, groups: dict[str, list]) -> Figure:
    """Speeds of contest()'s rows, a panel a group, least and most as a line."""
    height = sum(len(rows) for rows in groups.values())
    figure = Figure(figsize=(8, 0.9 + 0.42 * height + 0.4 * len(groups)), layout="constrained")
    ratios = [len(rows) + 1 for rows in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, (group, rows) in zip(panels, groups.items()):
        names, medians, least, most = list(zip(*rows))[:4]
        error = [[m - a for m, a in zip(medians, least)], [a - m for m, a in zip(medians, most)]]
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in names]
        axes.barh(names, medians, xerr=error, color=colours, height=0.6)
        axes.invert_yaxis()
        axes.set_title(group, fontsize=10, loc="left")
    axes.set_xlabel(unit)
    return figure


def curves(panels: dict[str, dict], x: str, y: str, log="both") -> Figure:
    """panels: {title: {name of a curve: [(x, y), ...]}}."""
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
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


def write(path: str, title: str, text: str, figure: Figure | None = None) -> None:
    """Puts `text`, with what was run where, into `path` as the section `title`, in place of the one
    it had, or at the end; prints it, too. path "": prints alone."""
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
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.M | re.S)
    found = old.search(before)
    after = old.sub(lambda _: section, before) if found else f"{before.rstrip()}\n\n{section}"
    with atomic_write(path) as f:
        f.write((after.rstrip() + "\n").encode())


def command() -> str:
    script = sys.modules["__main__"].__spec__  # None within a test
    return " ".join([f"python -m {script.name if script else 'pytest'}", *sys.argv[1:]])


def machine() -> str:
    """The day, the commit, processor, memory, GPU and versions."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    widest = [n for n in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
              if torch.cpu.get_capabilities().get(n)]  # fmt: skip
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else ["no GPU"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("tiktoken", "numpy", *PACKAGES):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    processor = (
        f"{cpu[1] if cpu else platform.processor()} ({widest[0] if widest else 'no avx2'}), "
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB"
    )
    what = [str(datetime.date.today()), f"commit {commit or 'unknown'}", processor, *gpu]
    return "; ".join([*what, ", ".join(versions)])


# a process of its own, since a peak is handed down from who starts a program
LAUNCH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:], stdout=sys.stderr, stderr=sys.stderr).returncode
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def whole_process(command: list, **options) -> tuple[float, float, str]:
    """Runs it; returns (seconds, peak memory in MiB of its largest process, what it printed)."""
    with tempfile.NamedTemporaryFile() as peak:
        launch = [sys.executable, "-S", "-c", LAUNCH, peak.name, *map(str, command)]
        start = time.perf_counter()
        result = subprocess.run(launch, stderr=subprocess.PIPE, text=True, **options)
        seconds = time.perf_counter() - start
        if result.returncode:
            raise ValueError(f"{' '.join(launch[5:])} failed: {result.stderr[-2000:]}")
        return seconds, int(Path(peak.name).read_text()) / 1024, result.stderr


def private_mib(pid="self") -> float:
    """Memory of a process that isn't the page cache's; 0 where it has ended."""
    with contextlib.suppress(OSError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.search(r"^Anonymous:\s+(\d+)", rollup, re.M)[1]) / 1024
    return 0


def update_readme(readme=ROOT / "README.md", results=ROOT / RESULTS) -> None:
    """Puts the first table of each section of RESULTS.md that the README shows into its place."""
    text = results.read_text()

    def first_table(match):
        section = re.search(rf"^## {re.escape(match[2])}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        if not section:
            raise ValueError(f"{results} has no section {match[2]!r}, which {readme} shows")
        return match[1] + re.search(r"(?:^\|.*\n)+", section[1], re.M)[0] + match[3]

    shown = re.compile(
        r"(<!-- from bench/RESULTS\.md: (.*?) -->\n).*?(<!-- to here -->)", re.DOTALL
    )
    with atomic_write(readme) as f:
        f.write(shown.sub(first_table, readme.read_text()).encode())


if __name__ == "__main__":
    run(update_readme)
