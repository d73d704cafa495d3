"""Every measurement, one after the other, into RESULTS.md, and from there into README.md.

    python -m bench.all --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT --tatm ../tatm

An hour of a machine that does nothing else. What needs a GPU is measured where there is one.
"""

import dataclasses
import importlib
import subprocess
import sys
from dataclasses import dataclass

import torch

from bench.report import RESULTS, ROOT, update_page, write
from common.script import run
from common.settings import parse_settings

SCRIPTS = ("tokenize", "loader", "train", "learn", "scale", "faults")
ON_GPU = {  # scripts that can use one, and the section that they then write
    "train": "Training on a GPU",
    "learn": "Learning on a GPU",
    "scale": "Scale: a training step on a GPU",
}


@dataclass
class Settings:
    text: str = ""  # file to tokenize and train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    tatm: str = ""  # checkout of tatm; "": left out
    scripts: tuple[str, ...] = SCRIPTS  # which of them


def main():
    config = parse_settings(Settings, __doc__)
    if not config.text:
        raise ValueError("say by --text what to train on, say data/tinyshakespeare/input.txt")
    for script in config.scripts:
        if script not in SCRIPTS:
            raise ValueError(f"scripts are {', '.join(SCRIPTS)}, not {script}")
        known = {
            f.name for f in dataclasses.fields(importlib.import_module(f"bench.{script}").Settings)
        }
        values = {k: v for k, v in dataclasses.asdict(config).items() if k in known and v}
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        call = [sys.executable, "-m", f"bench.{script}", *flags]
        subprocess.run(call, cwd=ROOT, check=True)
        if script in ON_GPU and torch.cuda.is_available():
            subprocess.run([*call, "--device", "cuda"], cwd=ROOT, check=True)
        elif script in ON_GPU:
            write(RESULTS, ON_GPU[script], "Not measured: no NVIDIA GPU was at hand.")
    if config.scripts == SCRIPTS:
        update_page()


if __name__ == "__main__":
    run(main)
