"""Training speed: ours beside nanoGPT, with the same model, batch and threads, in one run.

    python -m bench.train --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT
    python -m bench.train --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT --device cuda

Whole processes run on the folder that prepare_data.py wrote: train_gpt2.py with its default device
settings, and nanoGPT's train.py. On a CPU, nanoGPT runs with the flags of its README (float32, not
compiled) and compiled; on a GPU, it runs in bfloat16, compiled. First, both models must give the
same loss with the same weights. The speed is that of the median step, as each script reports it,
without validation and without the first five steps.
"""

import functools
import json
import os
import pickle
import re
import statistics
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bench.report import (
    RESULTS,
    ROOT,
    as_flags,
    bars,
    check_text,
    contest,
    contest_table,
    whole_process,
    write,
)
from common.script import run_script
from common.settings import parse_settings
from model import GPT, GPTConfig
from training.device import choose_device, peak_flops

FORM = "layers/heads/channels/batch/window/tokenizer/steps"
SHAPES = {  # device -> {shape, in the form of FORM: speedup to reach over nanoGPT}
    "cpu": {
        "6/6/384/16/256/bytes/14": 2.5,
        "4/4/128/12/64/gpt2/40": 3,
        "4/4/128/12/64/bytes/150": 1,
    },
    "cuda": {"12/12/768/32/1024/gpt2/60": "", "6/6/384/64/256/bytes/200": ""},
}
VOCABULARY = {"bytes": 257, "gpt2": 50257}  # tokenizer -> number of ids
TITLES = {"cpu": "Training on a CPU", "cuda": "Training on a GPU"}
FIRST_STEPS = 5  # steps that warm up and are not counted


@dataclass
class Settings:
    text: str = ""  # file to train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    rounds: int = 3  # measurements of each contestant, in turns
    device: Literal["cpu", "cuda"] = "cpu"  # device that trains
    shapes: tuple[str, ...] = ()  # layers/heads/channels/batch/window/tokenizer/steps; (): all
    results: str = RESULTS  # Markdown file to write into; "": none


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    check_text(settings.text)
    targets = SHAPES[settings.device]
    contests = {}
    shares = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes = {text: parse_shape(text) for text in settings.shapes or targets}
        prepare(folder, settings, {shape.tokenizer for shape in shapes.values()})
        peak = peak_flops(choose_device(settings.device).value, torch.bfloat16)
        for text, shape in shapes.items():
            measures = {
                name: functools.partial(function, settings, folder, shape)
                for name, function in contestants(settings, shape).items()
            }
            target = {"nanoGPT": targets.get(text, "")}
            rows = contest(measures, settings.rounds, target, warm=0)
            contests[str(shape)] = rows
            if peak:
                flops = shape.model().flops_per_token(shape.window)
                for row in rows:
                    percent = 100 * row.median * flops / peak
                    shares.append(f"{row.name} at {shape}: {percent:.1f}%")
    text = (
        "Layers/heads/channels, sequences x tokens. Whole runs of train_gpt2.py with Muon (its "
        "default) or AdamW, and of nanoGPT's train.py, which has AdamW; both models gave the same "
        "loss with the same weights. Separate documents: the text is divided at its blank lines, "
        "and each document attends to itself alone."
        + (" Left out: nanoGPT (no --nanogpt was given)." if not settings.nanogpt else "")
        + (f" Share of the dense bfloat16 peak: {'; '.join(shares)}." if shares else "")
        + "\n\n"
        + contest_table("model, batch", "tokens/s", contests)
    )
    write(settings.results, TITLES[settings.device], text, bars("tokens/s", contests))


@dataclass
class Shape:
    """A model, a batch, a tokenizer and the number of steps to time."""

    layers: int
    heads: int
    channels: int
    batch: int
    window: int
    tokenizer: str
    steps: int

    def __str__(self) -> str:
        vocabulary = "GPT-2's vocabulary" if self.tokenizer == "gpt2" else self.tokenizer
        sizes = f"{self.layers}/{self.heads}/{self.channels}"
        return f"{sizes}, {self.batch} x {self.window}, {vocabulary}"

    def model(self) -> GPT:
        """Create the model."""
        sizes = dict(n_layer=self.layers, n_head=self.heads, n_embd=self.channels)
        return GPT(GPTConfig(VOCABULARY[self.tokenizer], self.window, **sizes))


def parse_shape(text: str) -> Shape:
    """Return the shape that a text in the form of FORM describes.

    Example: "4/4/128/12/64/bytes/150".

    Raises:
        ValueError: The text has another form.
    """
    *sizes, tokenizer, steps = text.split("/")
    numbers = [*sizes, steps]
    if len(sizes) != 5 or tokenizer not in VOCABULARY or not all(n.isdigit() for n in numbers):
        raise ValueError(f"{text} is not a shape: write {FORM}")
    return Shape(*map(int, sizes), tokenizer, int(steps))


def prepare(folder: Path, settings, tokenizers: Collection[str]) -> None:
    """Prepare the text for train_gpt2.py and for nanoGPT.

    For each tokenizer, folder/data/TOKENIZER has the text as a running text, and
    folder/data/TOKENIZER-documents has its paragraphs as documents. nanoGPT's scripts are linked
    into `folder`.
    """
    for name in tokenizers:
        for corpus, flags in ((name, []), (f"{name}-documents", ["--documents", "blank-line"])):
            flags = [*flags, "--input", Path(settings.text).resolve(), "--tokenizer", name]
            command = [sys.executable, ROOT / "prepare_data.py", "--corpus", corpus, *flags]
            whole_process(command, cwd=folder)
        vocabulary = pickle.dumps({"vocab_size": VOCABULARY[name]})
        (folder / "data" / name / "meta.pkl").write_bytes(vocabulary)
    if settings.nanogpt:
        for script in Path(settings.nanogpt).resolve().glob("*.py"):
            (folder / script.name).symlink_to(script)


# ---- contestants: (settings, folder, shape) -> (tokens/s of the median step, peak MiB)


def contestants(settings: Settings, shape: Shape) -> dict:
    """Return the contestants for one shape as name -> function, ours first."""
    functions = {
        "ours": ours,
        "ours, AdamW": functools.partial(ours, optimizer="adamw"),
        "ours, separate documents": functools.partial(ours, corpus=f"{shape.tokenizer}-documents"),
    }
    if settings.nanogpt:
        same_loss(settings, shape)
        functions["nanoGPT, compiled"] = functools.partial(nanogpt, compiled=True)
        if settings.device == "cpu":
            functions["nanoGPT"] = nanogpt
    return functions


def ours(settings, folder: Path, shape: Shape, **more_flags) -> tuple[float, float]:
    """Run train_gpt2.py for the steps of the shape and return (tokens/s, peak MiB)."""
    values = dict(
        corpus=shape.tokenizer, n_layer=shape.layers, n_head=shape.heads, dropout=0,
        n_embd=shape.channels, batch_size=shape.batch, sequence_length=shape.window,
        max_steps=100_000, stop_at=shape.steps, log_every=1, device=settings.device,
    ) | more_flags  # fmt: skip
    command = [sys.executable, ROOT / "train_gpt2.py", *as_flags(values)]
    _, mib, _ = whole_process(command, cwd=folder)
    newest = max(folder.glob("out/*/metrics.jsonl"), key=os.path.getmtime)
    lines = map(json.loads, newest.read_text().splitlines())
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds[FIRST_STEPS:]), mib


def nanogpt(settings, folder: Path, shape: Shape, compiled: bool = False) -> tuple[float, float]:
    """Run nanoGPT's train.py for the steps of the shape and return (tokens/s, peak MiB)."""
    values = dict(
        dataset=shape.tokenizer, device=settings.device, compile=compiled, n_layer=shape.layers,
        n_head=shape.heads, n_embd=shape.channels, batch_size=shape.batch, block_size=shape.window,
        max_iters=shape.steps, dropout=0.0, bias=True, gradient_accumulation_steps=1, eval_iters=1,
        eval_interval=10**6, log_interval=1,
    )  # fmt: skip
    flags = [f"--{name}={value}" for name, value in values.items()]
    _, mib, printed = whole_process([sys.executable, "train.py", *flags], cwd=folder)
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", printed)]
    median_ms = statistics.median(times[FIRST_STEPS:])
    return shape.batch * shape.window / median_ms * 1e3, mib


def same_loss(settings, shape: Shape) -> None:
    """Check that nanoGPT's model with our weights has our loss on one batch.

    Raises:
        AssertionError: The losses differ, or nanoGPT's model has other weights.
    """
    namespace = {"__name__": "nanogpt"}
    sys.modules.setdefault("nanogpt", type(sys)("nanogpt"))  # its dataclass looks its module up
    exec((Path(settings.nanogpt) / "model.py").read_text(), namespace)
    model = shape.model()
    vocab_size = VOCABULARY[shape.tokenizer]
    peer_config = namespace["GPTConfig"](
        shape.window, vocab_size, dropout=0.0, n_layer=shape.layers, n_head=shape.heads,
        n_embd=shape.channels,
    )  # fmt: skip
    peer = namespace["GPT"](peer_config)
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:  # the head is the token embedding
        raise AssertionError(f"nanoGPT's model has other weights: {missing}, {unexpected}")
    x, y = torch.randint(0, vocab_size, (2, min(shape.batch, 4), shape.window))
    with torch.no_grad():
        our_loss = model(x, y)[1].item()
        peer_loss = peer(x, y)[1].item()
    if abs(our_loss - peer_loss) >= 1e-4:
        raise AssertionError(f"the losses differ: {our_loss} and nanoGPT's {peer_loss}")


if __name__ == "__main__":
    run_script(main)
