"""The loss reached in a number of seconds: ours beside nanoGPT; settings compared (RECIPES.md).

    python -m bench.learn --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT
    python -m bench.learn --text data/tinyshakespeare/input.txt --default_run
    python -m bench.learn --text data/tinyshakespeare/input.txt --recipes

The first command runs nanoGPT's train.py on our bytes, with the flags of nanoGPT's README and with
malloc set to keep freed memory, as in train_gpt2.py; on a CPU in float32, nanoGPT's only number
type there. Then it runs train_gpt2.py for the number of steps that fits a share of nanoGPT's
seconds, with three seeds, on the same number of threads. The seconds are those of whole processes.
Every loss is that of one full pass over the validation text. The second command runs
train_gpt2.py's default run with several vocabularies. The third runs train_gpt2.py with other
settings: all of them with the first seed, and the best three with the other seeds, too.
"""

import json
import math
import os
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from bench.report import (
    RESULTS,
    ROOT,
    check_text,
    each_thread_count,
    table,
    whole_process,
    write,
)
from bench.train import KEEP_MEMORY, corpus_of, prepare
from common.script import run_script
from common.settings import parse_settings
from model import GPT, GPTConfig

RECIPES = "bench/RECIPES.md"
TITLES = {"bytes": "Byte by byte", "gpt2": "GPT-2's vocabulary"}
NANOGPT_FLAGS = {  # device -> flags that nanoGPT's README gives
    "cpu": "--compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0",
    "cuda": "",
}
SHORT_STEPS = 50  # steps of the run that shows how long a step takes
BEST_RECIPES = 3  # recipes that are run with every seed


@dataclass
class Race:
    """Runs of train_gpt2.py that get a share of nanoGPT's seconds."""

    name: str
    corpus: str
    share: float
    target: str  # the loss to reach; "": none
    flags: str = ""


MASKED = "--document_mask"
LARGE = "--size gpt2 --batch_size 16 --document_mask"
RACES = {
    "cpu": [
        Race("0.4 of its seconds", "bytes", 0.4, "1.8857 nats"),
        Race("its seconds", "bytes", 1, "1.62 nats"),
        Race("a quarter, separate documents", "bytes-documents", 1 / 4, "", f"{MASKED} true"),
        Race("a quarter, joined documents", "bytes-documents", 1 / 4, "", f"{MASKED} false"),
    ],
    "cuda": [
        Race("a quarter of its seconds", "bytes", 1 / 4, "1.4697 nats"),
        Race("its seconds", "bytes", 1, "1.40 nats"),
        Race("its seconds", "gpt2", 1, "2.00 bits"),
        Race("124M, separate documents", "gpt2-documents", 1, "", f"{LARGE} true"),
        Race("124M, joined documents", "gpt2-documents", 1, "", f"{LARGE} false"),
    ],
}  # fmt: skip
DEFAULT_RUNS = {  # tokenizer -> the loss to reach
    "bytes": "1.54 nats",
    "bpe:512": "2.15 bits, the best of all",
    "bpe:1024": "2.15 bits, the best of all",
    "gpt2": "",
}
TRIED = {  # tokenizer -> flags of train_gpt2.py
    "bytes": ["--batch_size 8", "--batch_size 12", "--batch_size 16", "--batch_size 32",
              "--batch_size 8 --sequence_length 128", "--batch_size 12 --learning_rate 0.02",
              "--n_embd 96", "--n_embd 128", "--batch_size 12 --optimizer adamw"],
    "gpt2": ["--batch_size 4", "--batch_size 8", "--batch_size 12", "--batch_size 16",
             "--batch_size 8 --sequence_length 128", "--batch_size 8 --learning_rate 0.02",
             "--batch_size 8 --learning_rate 0.005", "--n_embd 96", "--n_embd 128",
             "--batch_size 12 --optimizer adamw"],
}  # fmt: skip


@dataclass
class Settings:
    text: str = ""  # file to train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    threads: tuple[int, ...] = (1, 2)  # numbers of CPU threads, one section for each
    default_run: bool = False  # the default run with several vocabularies instead
    recipes: bool = False  # write RECIPES.md instead; takes over an hour on two cores
    vocabularies: tuple[str, ...] = tuple(TRIED)  # tokenizers of the recipes
    seeds: int = 3  # runs with each setting
    seconds: float = 60.0  # seconds of nanoGPT's run, if nanoGPT is left out
    flags: str = ""  # flags for all runs of train_gpt2.py: --flags="--train_flops 1e12"
    device: Literal["cpu", "cuda"] = "cpu"  # device that trains
    results: str = ""  # Markdown file to write into; "": RESULTS.md, or RECIPES.md


class Run(NamedTuple):
    """Time and loss of a run of train_gpt2.py."""

    seconds: float  # time of the whole process
    nats: float  # lowest validation loss, nats per token
    bits: float  # the same loss, bits per byte
    step_seconds: float  # time of the median step


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    check_text(settings.text)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if settings.recipes:
            prepare(folder, settings, settings.vocabularies)
            try_recipes(settings, folder)
        elif settings.default_run:
            prepare(folder, settings, tuple(DEFAULT_RUNS))
            run_defaults(settings, folder)
        else:
            races = RACES[settings.device]
            prepare(folder, settings, {race.corpus.removesuffix("-documents") for race in races})
            for _ in each_thread_count(settings.device, settings.threads):
                run_races(settings, folder, races)


def run_defaults(settings: Settings, folder: Path) -> None:
    """Write the section on the default run, the vocabularies in turns."""
    rows = []
    for seed in range(settings.seeds):
        for tokenizer, target in DEFAULT_RUNS.items():
            result = ours(settings, folder, seed, "", corpus_of(tokenizer))
            losses = (f"{result.nats:.4f}", f"{result.bits:.4f}")
            rows.append((tokenizer, seed, result.seconds, *losses, target))
    head = ["tokenizer", "seed", "seconds", "nats per token", "bits per byte", "target"]
    text = (
        "The default run of train_gpt2.py on TinyShakespeare, whole processes from start to "
        "sample; the loss by a full pass over the validation text.\n\n" + table(head, sorted(rows))
    )
    write(settings.results or RESULTS, "Learning: the default run", text)


def run_races(settings: Settings, folder: Path, races: list[Race]) -> None:
    """Write the section on learning in nanoGPT's seconds."""
    rows = []
    budget = settings.seconds
    left_out = ""
    if settings.nanogpt:
        budget, loss = nanogpt(settings, folder)
        bits = loss / math.log(2)  # a token is a byte
        rows.append(("nanoGPT, its README's run", "", "", budget, f"{loss:.4f}", f"{bits:.4f}", ""))
    else:
        left_out = f" Left out: nanoGPT (no --nanogpt was given), as if it took {budget:.0f} s."
    for race in races:
        steps = steps_that_fit(settings, folder, race, race.share * budget)
        flags = f"{race.flags} --max_steps {steps} --eval_every {steps}".strip()
        for seed in range(settings.seeds):
            result = ours(settings, folder, seed, flags, race.corpus)
            name = f"ours, {race.name}, seed {seed}"
            losses = (f"{result.nats:.4f}", f"{result.bits:.4f}")
            rows.append((name, race.corpus, flags, result.seconds, *losses, race.target))
    head = ["", "corpus", "flags", "seconds", "nats per token", "bits per byte", "target"]
    text = (
        "TinyShakespeare, whole processes from start to sample; the loss by a full pass over the "
        "validation text. nanoGPT's characters are bytes. Separate documents: the text is divided "
        "at its blank lines, and each document attends to itself alone; joined: the same documents "
        f"attend to those before them.{left_out}\n\n" + table(head, rows)
    )
    threads = torch.get_num_threads()
    title = f"Learning: {threads} thread{'s' * (threads > 1)}"
    if settings.device == "cuda":
        title = "Learning on a GPU"
    write(settings.results or RESULTS, title, text)


def steps_that_fit(settings: Settings, folder: Path, race: Race, seconds: float) -> int:
    """Return the number of steps of a run of `seconds` seconds, estimated from a short run."""
    flags = f"{race.flags} --max_steps {SHORT_STEPS} --eval_every {SHORT_STEPS}"
    short = ours(settings, folder, 0, flags, race.corpus)
    overhead = max(0, short.seconds - SHORT_STEPS * short.step_seconds)
    return max(20, int((0.97 * seconds - overhead) / short.step_seconds))


def nanogpt(settings: Settings, folder: Path) -> tuple[float, float]:
    """Run nanoGPT's train.py and return (seconds, validation loss in nats per token)."""
    flags = f"--dataset=bytes --out_dir=peer --device={settings.device}"
    config_file = Path(settings.nanogpt).resolve() / "config" / "train_shakespeare_char.py"
    command = [sys.executable, "train.py", config_file, *flags.split()]
    command += NANOGPT_FLAGS[settings.device].split()
    seconds, _, _ = whole_process(command, cwd=folder, env=os.environ | KEEP_MEMORY)
    saved = torch.load(folder / "peer" / "ckpt.pt", map_location="cpu", weights_only=True)
    sizes = {
        name: saved["model_args"][name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")
    }
    model = GPT(GPTConfig(n_positions=saved["model_args"]["block_size"], **sizes))
    weights = {name.removeprefix("_orig_mod."): w for name, w in saved["model"].items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # nanoGPT's model has no biases; in ours, they start as zeros.
    if unexpected != ["lm_head.weight"] or not all(name.endswith(".bias") for name in missing):
        raise AssertionError(f"nanoGPT's model has other weights: {missing}, {unexpected}")
    loss = full_pass(model.eval(), np.fromfile(folder / "data/bytes/val.bin", "<u2"))
    return seconds, loss


@torch.no_grad()
def full_pass(model: GPT, tokens: np.ndarray) -> float:
    """Return the mean loss of all tokens but the first, in nats, over windows without overlap."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    T = model.config.n_positions
    nats = 0.0
    for start in range(0, len(ids) - 1, T):
        window = ids[start : start + T + 1]
        nats += model(window[None, :-1], window[None, 1:], reduction="sum")[1].item()
    return nats / (len(ids) - 1)


def ours(settings: Settings, folder: Path, seed: int, flags: str, corpus: str) -> Run:
    """Run train_gpt2.py and return its time and loss."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, ROOT / "train_gpt2.py", "--out_dir", out, "--corpus", corpus]
        command += ["--seed", seed, "--device", settings.device]
        command += shlex.split(settings.flags) + shlex.split(flags)
        seconds, _, _ = whole_process(command, cwd=folder)
        (run_folder,) = Path(out).iterdir()
        lines = list(map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines()))
        used = json.loads((run_folder / "config.json").read_text())
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
    speed = statistics.median(
        line["tokens_per_second"] for line in lines if "tokens_per_second" in line
    )
    step_seconds = used["batch_size"] * used["sequence_length"] / speed
    return Run(seconds, best["val_loss"], best["val_bpb"], step_seconds)


# ---- recipes


def try_recipes(settings: Settings, folder: Path) -> None:
    """Run train_gpt2.py with the settings to compare, and write RECIPES.md after each run."""
    for tokenizer in settings.vocabularies:
        runs: dict[str, list[Run]] = {flags: [] for flags in TRIED[tokenizer]}
        chosen = list(runs)
        for seed in range(settings.seeds):
            if seed == 1:
                chosen = sorted(runs, key=lambda flags: mean(runs[flags]).nats)[:BEST_RECIPES]
            for flags in chosen:
                runs[flags].append(ours(settings, folder, seed, flags, corpus_of(tokenizer)))
                write_recipes(settings, tokenizer, runs)


def mean(runs: list[Run]) -> Run:
    """Return the mean of each field."""
    return Run(*(statistics.mean(column) for column in zip(*runs)))


def write_recipes(settings: Settings, tokenizer: str, runs: dict[str, list[Run]]) -> None:
    """Write the table of the runs so far, the best flags first."""
    finished = [(mean(results), flags) for flags, results in runs.items() if results]
    rows = []
    for average, flags in sorted(finished, key=lambda pair: pair[0].nats):
        nats_by_seed = ", ".join(f"{result.nats:.3f}" for result in runs[flags])
        losses = (f"{average.nats:.3f}", f"{average.bits:.3f}")
        rows.append((f"`{flags}`", *losses, nats_by_seed, average.seconds))
    head = ["flags", "nats per token", "bits per byte", "nats of each seed", "seconds"]
    text = (
        "The default run on TinyShakespeare with these flags of train_gpt2.py, all with the same "
        "FLOPs: the lowest validation loss by a full pass, the mean over the seeds. The best three "
        "after the first seed were run with the other seeds, too.\n\n" + table(head, rows)
    )
    write(settings.results or RECIPES, TITLES[tokenizer], text)


if __name__ == "__main__":
    run_script(main)
