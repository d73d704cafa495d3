"""What a run tells: a progress bar or plain lines, metrics.jsonl, loss.png."""

import contextlib
import datetime
import gc
import json
import logging
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from common.files import atomic_write, lock
from common.packages import optional

EVERY = 60  # seconds between lines where there is no terminal for a bar


class Metrics:
    """Writes RUN/metrics.jsonl, and the same to RUN/tensorboard, and shows where the run is.

    Each line of the file holds `step` (optimizer steps done) and what is known then: train_loss
    (nats per token, of that step's batch), learning_rate, tokens_per_second (of training alone) and
    mfu (the share of the device's peak, where that is known); or val_loss (nats per token) and
    val_bpb (bits per byte of text, all of it: documents' first tokens, which nothing foretells and
    val_loss leaves out, are counted as tokens like any other). Lines beyond `step`, which a killed
    run leaves behind, are dropped. The file is locked, so that no two processes train one run:
    raises BlockingIOError (OSError) where another does.
    """

    def __init__(self, folder: Path, step: int, max_steps: int, tensorboard=False):
        self.path, self.first, self.max_steps = folder / "metrics.jsonl", step, max_steps
        self.file = open(self.path, "a", buffering=1)  # a line at a time
        if not lock(self.file):
            raise BlockingIOError(
                f"{folder} is being trained by another process: wait for it, or choose another "
                f"--run_name"
            )
        self.file.truncate(sum(size for size, n in _lines(self.path) if n["step"] <= step))
        self.tensorboard = None
        if tensorboard:
            writer = optional("torch.utils.tensorboard", "--tensorboard", "tensorboard")
            self.tensorboard = writer.SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self.start = self.told = time.perf_counter()
        self.status = "training"
        self.bar = tqdm(
            total=max_steps, initial=step, unit="step", leave=False,
            disable=not sys.stderr.isatty(), delay=1e-9,  # not before the first step is done
        )  # fmt: skip

    def train(self, step: int, tokens_per_second: float, mfu: float | None = None, **values):
        known = {} if mfu is None else {"mfu": round(mfu, 4)}
        self._write(step, **values, tokens_per_second=round(tokens_per_second, 1), **known)
        self.status = f"train {values['train_loss']:.4f}, {tokens_per_second:,.0f} tokens/s"
        if known:
            self.status += f", MFU {100 * mfu:.0f}%"
        self.bar.set_postfix_str(self.status, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.perf_counter() - self.told >= EVERY:
            self.tell(step)

    def validation(self, step: int, val_loss: float, val_bpb: float):
        self._write(step, val_loss=val_loss, val_bpb=val_bpb)
        self.tell(step, f"validation {val_loss:.4f} nats per token, {val_bpb:.4f} bits per byte; ")

    def tell(self, step: int, text: str = "") -> None:
        """A line of its own, above the bar."""
        self.told = time.perf_counter()
        pace = (self.told - self.start) / max(1, step - self.first)
        left = datetime.timedelta(seconds=round(pace * (self.max_steps - step)))
        number = f"{step:>{len(str(self.max_steps))}}/{self.max_steps}"
        with self.bar.external_write_mode():
            print(f"step {number}: {text}{self.status}; {left} left", flush=True)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()

    def _write(self, step, **values):
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            error.filename = str(self.path)  # a failed write doesn't know it
            with contextlib.suppress(OSError):
                self.file.close()  # which writes again; a later close() doesn't
            raise
        for name, value in values.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, if it is there, without one that a kill has cut short. Raises
    ValueError for a damaged one."""
    return [line for _, line in _lines(path)] if path.exists() else []


def _lines(path):
    """(bytes, what it says) of each whole line."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield len(line), (told := json.loads(line)) | {"step": int(told["step"])}
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number} is damaged: remove that line") from None


def plot_losses(folder: Path) -> None:
    """metrics.jsonl -> loss.png: both losses against steps, the best validation marked."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of a home it can't write to
    from matplotlib.figure import Figure  # no pyplot: no window, no state

    gc.collect()  # the last figure, whose parts hold each other: a megabyte, found late
    lines = read_metrics(folder / "metrics.jsonl")
    train = [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train), linewidth=0.8, alpha=0.6, label="training batch")
    if val:
        best = min(val, key=lambda point: point[1])
        axes.plot(*zip(*val), marker=".", label="validation")
        axes.plot(
            *best,
            "o",
            fillstyle="none",
            color="black",
            label=f"best: {best[1]:.4f} at step {best[0]}",
        )
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    name = os.fsencode(folder.name).decode(errors="replace")  # a name may be any bytes
    axes.set_title(name, parse_math=False)
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    with atomic_write(folder / "loss.png") as f:
        figure.savefig(f, dpi=120, format="png")
