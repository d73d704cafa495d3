"""Training, tokens a second: ours beside nanoGPT, the same model, batch and threads, in one run.

    python -m bench.train --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT
    python -m bench.train --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT --device cuda

Whole processes: train_gpt2.py with what it chooses by itself, and nanoGPT's own train.py, with the
flags of its README for a CPU (float32, not compiled) and compiled, or for a GPU (bfloat16,
compiled), on the folder that prepare_data.py wrote. First, both models must give the same loss with
the same weights. The speed is that of the median step, as each script tells it, without evaluation
and the first five.
"""

import functools
import json
import os
import pickle
import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.report import RESULTS, ROOT, bars, contest, contest_table, whole_process, write
from common.script import run
from common.settings import parse_settings
from model import GPT, GPTConfig
from training.device import choose_device, peak_flops

# layers/heads/channels/batch/window/vocabulary/steps: how many times nanoGPT's speed is the goal
SHAPES = {
    "cpu": {
        "6/6/384/16/256/bytes/14": 2.5,
        "4/4/128/12/64/gpt2/40": 3,
        "4/4/128/12/64/bytes/150": 1,
    },
    "cuda": {"12/12/768/32/1024/gpt2/60": "", "6/6/384/64/256/bytes/200": ""},
}
VOCABULARY = {"bytes": 257, "gpt2": 50257}
TITLES = {"cpu": "Training on a CPU", "cuda": "Training on a GPU"}


@dataclass
class Settings:
    text: str = ""  # file to train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    rounds: int = 3  # of each contestant, in turn
    device: str = "cpu"  # cpu, cuda
    shapes: tuple[str, ...] = ()  # layers/heads/channels/batch/window/vocabulary/steps; (): goals'
    results: str = RESULTS  # Markdown file to write into; "": none


def main():
    config = parse_settings(Settings, __doc__)
    if not config.text:
        raise ValueError("say by --text what to train on, say data/tinyshakespeare/input.txt")
    goals = SHAPES[config.device]
    groups, unit, shares = {}, "tokens/s", []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes = {text: parse_shape(text) for text in config.shapes or goals}
        prepare(folder, config, {shape.tokenizer for shape in shapes.values()})
        for text, sizes in shapes.items():
            contestants = {
                "ours": ours,
                "ours, AdamW": functools.partial(ours, optimizer="adamw"),
                "ours, documents apart": functools.partial(ours, corpus=f"{sizes.tokenizer}-apart"),
            }
            if config.nanogpt:
                same_loss(config, sizes)
                contestants["nanoGPT, compiled"] = functools.partial(nanogpt, compiled=True)
                if config.device == "cpu":
                    contestants["nanoGPT"] = nanogpt
            measures = {
                k: functools.partial(f, config, folder, sizes) for k, f in contestants.items()
            }
            goal = {"nanoGPT": goals.get(text, "")}
            groups[str(sizes)] = contest(measures, config.rounds, goal, warm=0)
            if peak := peak_flops(choose_device(config.device).value, torch.bfloat16):
                flops = sizes.model().flops_per_token(sizes.window)
                for name, speed, *_ in groups[str(sizes)]:
                    shares.append(f"{name} at {sizes}: {100 * speed * flops / peak:.1f}%")
    text = (
        "Layers/heads/channels, windows a step x tokens. Whole runs of train_gpt2.py, with Muon, "
        "which it takes by itself, or AdamW, and of nanoGPT's train.py, which has AdamW; both "
        "models gave the same loss with the same weights. Documents apart: the text cut at its "
        "blank lines, each attending to itself alone."
        + (" Left out: nanoGPT (no --nanogpt was given)." if not config.nanogpt else "")
        + (f" Share of the dense bfloat16 peak: {'; '.join(shares)}." if shares else "")
        + "\n\n"
        + contest_table("model, batch", unit, groups)
    )
    write(config.results, TITLES[config.device], text, bars(unit, groups))


@dataclass
class Shape:
    layers: int
    heads: int
    channels: int
    batch: int
    window: int
    tokenizer: str
    steps: int

    def __str__(self):
        vocabulary = {"gpt2": "GPT-2's vocabulary"}.get(self.tokenizer, self.tokenizer)
        sizes = f"{self.layers}/{self.heads}/{self.channels}"
        return f"{sizes}, {self.batch} x {self.window}, {vocabulary}"

    def model(self) -> GPT:
        sizes = dict(n_layer=self.layers, n_head=self.heads, n_embd=self.channels)
        return GPT(GPTConfig(VOCABULARY[self.tokenizer], self.window, **sizes))


def parse_shape(text: str) -> Shape:
    """Raises ValueError for one that isn't layers/heads/channels/batch/window/vocabulary/steps."""
    match text.split("/"):
        case [*sizes, tokenizer, steps] if len(sizes) == 5 and tokenizer in VOCABULARY:
            return Shape(*map(int, sizes), tokenizer, int(steps))
    raise ValueError(f"{text} is not layers/heads/channels/batch/window/vocabulary/steps")


def prepare(folder: Path, config, vocabularies) -> None:
    """The text as one text and as documents; and where nanoGPT looks."""
    for name in vocabularies:
        for corpus, flags in ((name, []), (f"{name}-apart", ["--documents", "blank-line"])):
            flags = [*flags, "--input", Path(config.text).resolve(), "--tokenizer", name]
            command = [sys.executable, ROOT / "prepare_data.py", "--corpus", corpus, *flags]
            whole_process(command, cwd=folder)
        size = pickle.dumps({"vocab_size": VOCABULARY[name]})
        (folder / "data" / name / "meta.pkl").write_bytes(size)
    for file in Path(config.nanogpt).resolve().glob("*.py") if config.nanogpt else ():
        (folder / file.name).symlink_to(file)


# ---- contestants: (tokens/s of the median step, peak memory in MiB)


def ours(config, folder, shape, **extra):
    flags = dict(
        corpus=shape.tokenizer, n_layer=shape.layers, n_head=shape.heads, dropout=0,
        n_embd=shape.channels, batch_size=shape.batch, sequence_length=shape.window,
        max_steps=100_000, stop_at=shape.steps, log_every=1, device=config.device,
    ) | extra  # fmt: skip
    flags = [part for name, value in flags.items() for part in (f"--{name}", value)]
    _, mib, _ = whole_process([sys.executable, ROOT / "train_gpt2.py", *flags], cwd=folder)
    newest = max(folder.glob("out/*/metrics.jsonl"), key=os.path.getmtime)
    lines = map(json.loads, newest.read_text().splitlines())
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds[5:]), mib


def nanogpt(config, folder, shape, compiled=False):
    flags = dict(
        dataset=shape.tokenizer, device=config.device, compile=compiled, n_layer=shape.layers,
        n_head=shape.heads, n_embd=shape.channels, batch_size=shape.batch, block_size=shape.window,
        max_iters=shape.steps, dropout=0.0, bias=True, gradient_accumulation_steps=1, eval_iters=1,
        eval_interval=10**6, log_interval=1,
    )  # fmt: skip
    command = [sys.executable, "train.py", *(f"--{k}={v}" for k, v in flags.items())]
    _, mib, printed = whole_process(command, cwd=folder)
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", printed)]
    return shape.batch * shape.window / statistics.median(times[5:]) * 1e3, mib


# ----


def same_loss(config, shape) -> None:
    """Asserts that nanoGPT's model with our weights has our loss on one batch."""
    theirs_module = {"__name__": "nanogpt"}
    sys.modules.setdefault("nanogpt", type(sys)("nanogpt"))  # their dataclass looks itself up
    exec((Path(config.nanogpt) / "model.py").read_text(), theirs_module)
    model = shape.model()
    sizes = dict(n_layer=shape.layers, n_head=shape.heads, n_embd=shape.channels)
    vocabulary = VOCABULARY[shape.tokenizer]
    their_config = theirs_module["GPTConfig"](shape.window, vocabulary, dropout=0.0, **sizes)
    theirs = theirs_module["GPT"](their_config)
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # which is the embedding
    x, y = torch.randint(0, vocabulary, (2, min(shape.batch, 4), shape.window))
    with torch.no_grad():
        losses = [m(x, y)[1].item() for m in (model, theirs)]
    assert abs(losses[0] - losses[1]) < 1e-4, losses


if __name__ == "__main__":
    run(main)
