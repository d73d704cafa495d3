"""Run every benchmark, one after another, into RESULTS.md, and copy the tables into docs/.

    python -m bench.all --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT --tatm ../tatm

This takes some hours on a machine that does nothing else. Benchmarks that need a GPU are run if
there is one. bench.block_mask and bench.fuzz write no section and are not run.
"""

import dataclasses
import importlib
import subprocess
import sys
from dataclasses import dataclass

import torch

from bench.report import ROOT, check_text, update_page
from common.script import run_script
from common.settings import parse_settings

SCRIPTS = ("tokenize", "loader", "train", "learn", "scale", "faults", "gpu")
ON_BOTH = ("train", "learn", "scale")  # these run on the CPU and, if there is one, on a GPU


@dataclass
class Settings:
    text: str = ""  # file to tokenize and to train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    tatm: str = ""  # checkout of tatm; "": left out
    scripts: tuple[str, ...] = SCRIPTS  # benchmarks to run


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    check_text(settings.text)
    for script in settings.scripts:
        if script not in SCRIPTS:
            raise ValueError(f"--scripts takes {', '.join(SCRIPTS)}, not {script}")
        run_benchmark(script, settings)
    if settings.scripts == SCRIPTS:
        update_page()


def run_benchmark(script: str, settings: Settings) -> None:
    """Run one benchmark, with the settings that it has, on the CPU and on a GPU."""
    has_gpu = torch.cuda.is_available()
    if script == "gpu" and not has_gpu:
        print_not_measured(script)
        return
    fields = dataclasses.fields(importlib.import_module(f"bench.{script}").Settings)
    names = {field.name for field in fields}
    flags = []
    for name in ("text", "nanogpt", "tatm"):
        if name in names and getattr(settings, name):
            flags += [f"--{name}", getattr(settings, name)]
    command = [sys.executable, "-m", f"bench.{script}", *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    if script in ON_BOTH and has_gpu:
        subprocess.run([*command, "--device", "cuda"], cwd=ROOT, check=True)
    elif script in ON_BOTH:
        print_not_measured(script)


def print_not_measured(script: str) -> None:
    """Print that a GPU is missing. Figures of another machine's GPU stay in RESULTS.md."""
    print(f"bench.{script}: no GPU here: not measured", flush=True)


if __name__ == "__main__":
    run_script(main)
