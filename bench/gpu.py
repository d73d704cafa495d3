"""Training on one GPU: tokens/s, MFU and memory of gpt2 (124M); the best loss on TinyShakespeare.

    python -m bench.gpu --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT

As in bench/train.py, whole processes run in turns: train_gpt2.py with its default device settings,
and nanoGPT's train.py (bfloat16, compiled), on the same tokens, with micro-batches of 8 to 64. The
peak of matrix products on the GPU is measured in the same run. Memory is all memory in use on the
GPU, sampled ten times per second. Then train_gpt2.py --size small trains on the text, by bytes,
until its validation loss no longer improves.
"""

import functools
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bench import train
from bench.report import (
    RESULTS,
    ROOT,
    as_flags,
    bars,
    check_text,
    contest,
    contest_table,
    table,
    whole_process,
    write,
)
from common.script import run_script
from common.settings import parse_settings
from training.device import has_bfloat16_units, peak_flops

NANOGPT_LOSS = 1.4697  # best validation loss on TinyShakespeare by characters in nanoGPT's README
SHAPES = tuple(f"12/12/768/{batch}/1024/gpt2/40" for batch in (8, 16, 32, 64))
TOY_SHAPES = ("2/2/16/4/16/bytes/8",)
TOY_FLAGS = dict(
    n_layer=1, n_head=1, n_embd=16, sequence_length=16, batch_size=4, max_steps=8, eval_every=4,
    log_every=1,
)  # fmt: skip
TOY_MATMUL_SIZE = 64


@dataclass
class Settings:
    text: str = ""  # file to train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    rounds: int = 3  # measurements of each contestant, in turns
    device: Literal["cuda", "cpu"] = "cuda"  # device that trains; cpu needs --toy
    toy: bool = False  # a tiny model and one round, to test this script
    results: str = RESULTS  # Markdown file to write into; "": none


def main() -> int:
    settings = parse_settings(Settings, __doc__)
    if settings.device == "cpu" and not settings.toy:
        raise ValueError("--device cpu needs --toy: the figures of this script are a GPU's")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no NVIDIA GPU on this machine: nothing was measured")
    check_text(settings.text)
    device = torch.device("cuda", 0) if settings.device == "cuda" else torch.device("cpu")
    has_bfloat16 = device.type == "cpu" or has_bfloat16_units(device)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    size = TOY_MATMUL_SIZE if settings.toy else train.GPU_MATMUL_SIZE
    matmul = train.measure_matmul(device, dtype, size, size, size)
    torch.cuda.empty_cache()  # free the GPU's memory for the processes that follow
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contests, shares = contest_shapes(settings, device, dtype, matmul, folder)
        learning = measure_learning(settings, folder)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "No GPU"
    peak = peak_flops(device, dtype)
    left_out = "" if settings.nanogpt else " Left out: nanoGPT (no --nanogpt was given)."
    text = "\n\n".join(
        [
            f"{card}. Matrix products of {size} x {size} in {dtype} reached "
            f"{matmul / 1e12:.3g} TFLOP/s; the data sheet's peak is "
            + (f"{peak / 1e12:.3g}." if peak else "unknown.")
            + " Layers/heads/channels, sequences x tokens. MiB is all that was in use on the card."
            + left_out,
            contest_table("model, micro-batch", "tokens/s", contests),
            "Training FLOPs per second as a share of that peak (MFU), and of the matrix products:",
            table(["model, micro-batch", "", "MFU, %", "of measured matmul, %"], shares),
            "TinyShakespeare by bytes, `train_gpt2.py --size small`:",
            table(["", "best validation, nats per byte", "step", "s to it", "s in all"], learning),
        ]
    )
    title = (
        "One GPU, toy size" if settings.toy else "One GPU"
    )  # a test at toy size replaces no figures
    write(settings.results, title, text, bars("tokens/s", contests))
    return 0


def contest_shapes(settings, device, dtype, matmul: float, folder: Path) -> tuple[dict, list]:
    """Measure every shape.

    Returns:
        (name of a shape -> rows of its contest, rows of the table of shares of the peaks).
    """
    texts = TOY_SHAPES if settings.toy else SHAPES
    shapes = [train.parse_shape(text) for text in texts]
    train.prepare(folder, settings, {shape.tokenizer for shape in shapes} | {"bytes"})
    peak = peak_flops(device, dtype)
    contests = {}
    shares = []
    for shape in shapes:
        functions = {
            "ours": train.ours,
            "ours, AdamW": functools.partial(train.ours, optimizer="adamw"),
        }
        if settings.nanogpt:
            train.same_loss(settings, shape)
            compiled = settings.device == "cuda"
            functions["nanoGPT"] = functools.partial(train.nanogpt, compiled=compiled)
        measures = {
            name: functools.partial(with_card_memory, device, measure, settings, folder, shape)
            for name, measure in functions.items()
        }
        rows = contest(measures, 1 if settings.toy else settings.rounds, warm=0)
        contests[str(shape)] = rows
        flops_per_token = shape.model().flops_per_token(shape.window)
        for name, speed, *_ in rows:
            flops = speed * flops_per_token
            mfu = 100 * flops / peak if peak else "unknown"
            shares.append((str(shape), name, mfu, 100 * flops / matmul))
    return contests, shares


def with_card_memory(device: torch.device, measure, *args) -> tuple[float, float]:
    """Return measure(*args), that is (speed, MiB), on a GPU with the peak of the GPU's memory."""
    if device.type != "cuda":
        return measure(*args)
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.1):
            free, total = torch.cuda.mem_get_info(device)
            peak = max(peak, total - free)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        speed, _ = measure(*args)
    finally:
        done.set()
        thread.join()
    return speed, peak / 2**20


def measure_learning(settings, folder: Path) -> list[tuple]:
    """Run train_gpt2.py --size small to its end and return the rows of the table of losses."""
    flags = {"corpus": "bytes", "run_name": "learn", "device": settings.device, "log_every": 10}
    if settings.toy:
        flags |= TOY_FLAGS
    else:
        flags |= {"size": "small", "patience": 5}
    command = [sys.executable, ROOT / "train_gpt2.py", *as_flags(flags)]
    began = time.time()
    seconds, _, _ = whole_process(command, cwd=folder)
    lines = (folder / "out" / "learn" / "metrics.jsonl").read_text().splitlines()
    validations = [line for line in map(json.loads, lines) if "val_loss" in line]
    best = min(validations, key=lambda line: line["val_loss"])
    saved = os.path.getmtime(folder / "out" / "learn" / "best.pt")
    return [
        ("ours", best["val_loss"], best["step"], saved - began, seconds),
        ("nanoGPT's README, by characters", NANOGPT_LOSS, "", "", ""),
    ]


if __name__ == "__main__":
    run_script(main)
