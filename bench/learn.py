"""What is learnt in how many seconds: nanoGPT's own README run beside ours, and RECIPES.md.

    python -m bench.learn --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT
    python -m bench.learn --text data/tinyshakespeare/input.txt --recipes

The first runs nanoGPT's train.py with the flags of its README on our bytes, then train_gpt2.py for
as many steps as a share of those seconds pays for, and as all of them do, three seeds each. Whole
processes; every model is judged by one full pass over the validation text. The second runs the
default run with other constants, all with the first seed and the best three with the others, too,
and writes what they came to.
"""

import json
import math
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.report import RESULTS, ROOT, table, whole_process, write
from bench.train import prepare
from common.script import run
from common.settings import parse_settings
from model import GPT, GPTConfig

RECIPES = "bench/RECIPES.md"
TITLES = {"bytes": "Byte by byte", "gpt2": "GPT-2's vocabulary"}
THEIRS = {  # nanoGPT's README, by device
    "cpu": "--compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0",
    "cuda": "",
}
APART = "--batch_size 12 --document_mask"
LARGE = "--size gpt2 --batch_size 16 --document_mask"
RACES = {  # what, corpus, share of nanoGPT's seconds, goal to reach in them, flags of ours
    "cpu": [
        ("a fifth of its seconds", "bytes", 1 / 5, "1.8857 nats",
         "--sequence_length 32 --batch_size 24"),
        ("its seconds", "bytes", 1, "1.58 nats", "--batch_size 12"),
        ("a quarter, documents apart", "bytes-apart", 1 / 4, "", f"{APART} true"),
        ("a quarter, documents in one", "bytes-apart", 1 / 4, "", f"{APART} false"),
    ],
    "cuda": [
        ("a quarter of its seconds", "bytes", 1 / 4, "1.4697 nats", ""),
        ("its seconds", "bytes", 1, "1.40 nats", ""),
        ("its seconds", "gpt2", 1, "2.00 bits", ""),
        ("124M, documents apart", "gpt2-apart", 1, "", f"{LARGE} true"),
        ("124M, documents in one", "gpt2-apart", 1, "", f"{LARGE} false"),
    ],
}  # fmt: skip
TRIED = {  # flags of train_gpt2.py, by vocabulary
    "bytes": ["--batch_size 8", "--batch_size 12", "--batch_size 16", "--batch_size 32",
              "--batch_size 8 --sequence_length 128", "--batch_size 12 --learning_rate 0.02",
              "--batch_size 12 --n_embd 192", "--batch_size 12 --optimizer adamw"],
    "gpt2": ["--batch_size 4", "--batch_size 8", "--batch_size 12", "--batch_size 16",
             "--batch_size 8 --sequence_length 128", "--batch_size 8 --learning_rate 0.02",
             "--batch_size 8 --learning_rate 0.005", "--batch_size 12 --optimizer adamw"],
}  # fmt: skip


@dataclass
class Settings:
    text: str = ""  # file to train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    recipes: bool = False  # write RECIPES.md instead: an hour and more on two cores
    vocabularies: tuple[str, ...] = tuple(TRIED)  # of recipes
    seeds: int = 3  # runs of each
    seconds: float = 60.0  # for ours where no nanoGPT says how many
    flags: str = ""  # of train_gpt2.py, for all runs of ours, say --flags="--train_flops 1e12"
    device: str = "cpu"  # cpu, cuda
    results: str = ""  # Markdown file to write into; "": RESULTS.md, or RECIPES.md


def main():
    config = parse_settings(Settings, __doc__)
    if not config.text:
        raise ValueError("say by --text what to train on, say data/tinyshakespeare/input.txt")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        corpora = {corpus.removesuffix("-apart") for _, corpus, *_ in RACES[config.device]}
        prepare(folder, config, config.vocabularies if config.recipes else corpora)
        (recipes if config.recipes else race)(config, folder)


def race(config, folder) -> None:
    rows, budget = [], config.seconds
    if config.nanogpt:
        budget, loss = nanogpt(config, folder)
        bits = f"{loss / math.log(2):.4f}"  # of a byte a token
        rows.append(("nanoGPT, its README's run", "", "", budget, f"{loss:.4f}", bits, ""))
    for what, corpus, share, goal, flags in RACES[config.device]:
        # a short run: what a step costs, and what everything else does
        short = f"{flags} --max_steps 50 --eval_every 50"
        seconds, _, _, step = ours(config, folder, 0, short, corpus)
        steps = max(20, int((0.97 * share * budget - max(0, seconds - 50 * step)) / step))
        flags += f" --max_steps {steps} --eval_every {steps}"
        for seed in range(config.seeds):
            seconds, *losses, _ = ours(config, folder, seed, flags, corpus)
            losses = [f"{loss:.4f}" for loss in losses]
            rows.append(
                (f"ours, {what}, seed {seed}", corpus, flags.strip(), seconds, *losses, goal)
            )
    left_out = "" if config.nanogpt else f" Left out: nanoGPT (no --nanogpt); {budget:.0f} s taken."
    text = (
        "TinyShakespeare, whole processes from start to sample; the loss by a full pass over the "
        "validation text, a character being a byte. Documents apart: the text cut at its blank "
        "lines, each attending to itself alone; in one: the same documents, seeing those before."
        f"{left_out}\n\n"
        + table(["", "corpus", "flags", "seconds", "nats per token", "bits per byte", "goal"], rows)
    )  # fmt: skip
    title = "Learning" + (" on a GPU" if config.device == "cuda" else "")
    write(config.results or RESULTS, title, text)


def nanogpt(config, folder) -> tuple[float, float]:
    """(seconds, nats per token of the validation split)"""
    flags = f"--dataset=bytes --out_dir=theirs --device={config.device} {THEIRS[config.device]}"
    settings = Path(config.nanogpt).resolve() / "config" / "train_shakespeare_char.py"
    command = [sys.executable, "train.py", settings, *flags.split()]
    seconds, _, _ = whole_process(command, cwd=folder)
    saved = torch.load(folder / "theirs" / "ckpt.pt", map_location="cpu", weights_only=True)
    sizes = {
        name: saved["model_args"][name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")
    }
    model = GPT(GPTConfig(n_positions=saved["model_args"]["block_size"], **sizes))
    weights = {name.removeprefix("_orig_mod."): w for name, w in saved["model"].items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)  # ours start with zeros
    assert unexpected == ["lm_head.weight"] and all(name.endswith(".bias") for name in missing)
    return seconds, full_pass(model.eval(), np.fromfile(folder / "data/bytes/val.bin", "<u2"))


@torch.no_grad()
def full_pass(model, tokens) -> float:
    """Nats per token, of all but the first, each seen in a window with those before it."""
    tokens, T = torch.from_numpy(tokens.astype(np.int64)), model.config.n_positions
    nats = 0.0
    for start in range(0, len(tokens) - 1, T):
        part = tokens[start : start + T + 1]
        nats += model(part[None, :-1], part[None, 1:], reduction="sum")[1].item()
    return nats / (len(tokens) - 1)


def ours(config, folder, seed, flags, corpus) -> tuple[float, float, float, float]:
    """(seconds, lowest nats per token and bits per byte of the validation split, seconds a step)"""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, ROOT / "train_gpt2.py", "--out_dir", out, "--corpus", corpus]
        command += ["--seed", seed, "--device", config.device]
        command += shlex.split(config.flags) + shlex.split(flags)
        seconds, _, _ = whole_process(command, cwd=folder)
        (folder,) = Path(out).iterdir()
        lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
        used = json.loads((folder / "config.json").read_text())
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
    speed = statistics.median(n["tokens_per_second"] for n in lines if "train_loss" in n)
    step = used["batch_size"] * used["sequence_length"] / speed
    return seconds, best["val_loss"], best["val_bpb"], step


def recipes(config, folder) -> None:
    for vocabulary in config.vocabularies:
        runs = {flags: [] for flags in TRIED[vocabulary]}
        chosen = list(runs)
        for seed in range(config.seeds):
            if seed == 1:
                chosen = sorted(runs, key=lambda flags: mean(runs[flags], 1))[:3]
            for flags in chosen:
                runs[flags].append(ours(config, folder, seed, flags, vocabulary))
                write_recipes(config, vocabulary, runs)  # what is known so far


def mean(runs, column) -> float:
    return statistics.mean(run[column] for run in runs)


def write_recipes(config, vocabulary, runs) -> None:
    known = [(flags, tried) for flags, tried in runs.items() if tried]
    rows = [
        (f"`{flags}`", f"{mean(tried, 1):.3f}", f"{mean(tried, 2):.3f}",
         ", ".join(f"{nats:.3f}" for _, nats, *_ in tried), mean(tried, 0))
        for flags, tried in sorted(known, key=lambda pair: mean(pair[1], 1))
    ]  # fmt: skip
    head = ["flags", "nats per token", "bits per byte", "nats of each seed", "seconds"]
    text = (
        "The default run on TinyShakespeare with these flags of train_gpt2.py, of as many FLOPs "
        "each: the lowest validation by a full pass, the mean of the seeds; the best three after "
        "the first seed were run with the others, too.\n\n" + table(head, rows)
    )
    write(config.results or RECIPES, TITLES[vocabulary], text)


if __name__ == "__main__":
    run(main)
