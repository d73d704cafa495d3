"""What a run logs: a progress bar or plain lines, metrics.jsonl, loss.png."""

import contextlib
import datetime
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from common.files import atomic_write
from common.packages import optional
from training.checkpoint import Progress
from training.distributed import Ranks
from training.run_settings import RunSettings

SECONDS_BETWEEN_LINES = 60  # where there is no terminal for a progress bar


def open_metrics(
    run_dir: Path, step: int, settings: RunSettings, ranks: Ranks
) -> "Metrics | NoMetrics":
    """Return the Metrics of a run on rank 0, and an object that logs nothing on other ranks.

    Args:
        run_dir: Folder of the run.
        step: Optimizer steps done.
        settings: After resolve_steps.
        ranks: This process among all.
    """
    if not ranks.is_first:
        return NoMetrics()
    return Metrics(run_dir, step, settings.max_steps, settings.tensorboard)


class NoMetrics:
    """The metrics of ranks other than 0: nothing."""

    def train(self, *args: object) -> None:
        """Log nothing."""

    def validation(self, *args: object) -> None:
        """Log nothing."""

    def close(self) -> None:
        """Close nothing."""


class Metrics:
    """Writes RUN/metrics.jsonl, and the same to RUN/tensorboard, and shows the progress of a run.

    Each line of the file holds `step` (optimizer steps done) and either

    - train_loss (nats per token, of that step's batch), learning_rate, tokens_per_second (of
      training alone), mfu (the share of the devices' peak) if the peak is known, and skipped_steps
      once a step was skipped; or
    - val_loss (nats per token) and val_bpb (bits per byte of text); of a mixture also
      val_loss/NAME and val_bpb/NAME for each corpus by itself.

    Lines after `step`, which a killed run leaves, are dropped.

    Args:
        run_dir: Folder of the run.
        step: Optimizer steps done.
        max_steps: Optimizer steps of the whole run.
        tensorboard: Whether to write the numbers for TensorBoard, too.

    Raises:
        ValueError: A line of an existing metrics.jsonl is damaged.
        OSError: The file cannot be written.
    """

    def __init__(self, run_dir: Path, step: int, max_steps: int, tensorboard: bool = False):
        self.run_dir = run_dir
        self.path = run_dir / "metrics.jsonl"
        self.first_step = step
        self.max_steps = max_steps
        self.file = open(self.path, "a", buffering=1)  # a line at a time
        size = sum(num_bytes for num_bytes, line in _lines(self.path) if line["step"] <= step)
        self.file.truncate(size)
        self.tensorboard = None
        if tensorboard:
            writer = optional("torch.utils.tensorboard", "--tensorboard", "tensorboard")
            self.tensorboard = writer.SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)
        self.start = time.perf_counter()
        self.last_line = self.start
        self.status = ""  # the last training step that was logged
        self.bar = tqdm(
            total=max_steps, initial=step, unit="step", leave=False,
            disable=not sys.stderr.isatty(), delay=1e-9,  # not before the first step is done
        )  # fmt: skip

    def train(
        self,
        progress: Progress,
        tokens_per_second: float,
        mfu: float | None,
        train_loss: float,
        learning_rate: float,
    ) -> None:
        """Log a training step.

        Args:
            progress: How far the run is.
            tokens_per_second: Speed of training since the last line.
            mfu: Share of the devices' peak, None if unknown.
            train_loss: Nats per token of the step's batch.
            learning_rate: Learning rate of the step.
        """
        values = {
            "train_loss": train_loss,
            "learning_rate": learning_rate,
            "tokens_per_second": round(tokens_per_second, 1),
        }
        self.status = f"train {train_loss:.4f}, {tokens_per_second:,.0f} tokens/s"
        if mfu is not None:
            values["mfu"] = round(mfu, 4)
            self.status += f", MFU {100 * mfu:.0f}%"
        if progress.skipped_steps:
            values["skipped_steps"] = progress.skipped_steps
            self.status += f", {progress.skipped_steps} skipped"
        self._write(progress.step, values)
        self.bar.set_postfix_str(self.status, refresh=False)
        self.bar.update(progress.step - self.bar.n)
        if self.bar.disable and time.perf_counter() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.print_line(progress.step)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Log a validation and draw loss.png.

        Args:
            step: Optimizer steps done.
            values: val_loss and val_bpb, see validation_metrics in corpora.py.
        """
        self._write(step, values)
        text = (
            f"validation {values['val_loss']:.4f} nats per token, "
            f"{values['val_bpb']:.4f} bits per byte"
        )
        names = [key.removeprefix("val_loss/") for key in values if key.startswith("val_loss/")]
        own_losses = [
            f"{name} {values[f'val_loss/{name}']:.4f}, {values[f'val_bpb/{name}']:.4f}"
            for name in names
        ]
        if own_losses:
            text += f" ({'; '.join(own_losses)})"
        self.print_line(step, text)
        plot_losses(self.run_dir)

    def print_line(self, step: int, text: str = "") -> None:
        """Print a line above the progress bar."""
        self.last_line = time.perf_counter()
        pace = (self.last_line - self.start) / max(1, step - self.first_step)
        time_left = datetime.timedelta(seconds=round(pace * (self.max_steps - step)))
        number = f"{step:>{len(str(self.max_steps))}}/{self.max_steps}"
        with self.bar.external_write_mode():
            parts = [part for part in (text, self.status, f"{time_left} left") if part]
            print(f"step {number}: {'; '.join(parts)}", flush=True)

    def close(self) -> None:
        """End the progress bar and close the files."""
        self.bar.close()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            error.filename = str(self.path)  # a failed write does not set it
            with contextlib.suppress(OSError):
                self.file.close()  # which writes again; a later close() does not
            raise
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of a metrics.jsonl, without a last line that a kill has cut short.

    Raises:
        ValueError: A line is damaged.
    """
    return [line for _, line in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the number of bytes and the values of each whole line."""
    with open(path, "rb") as f:
        for line_number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                return
            try:
                values = json.loads(line)
                yield len(line), values | {"step": int(values["step"])}
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{path}, line {line_number} is damaged: remove that line"
                ) from None


def plot_losses(run_dir: Path) -> None:
    """Draw loss.png from metrics.jsonl: both losses against steps, the best validation marked."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a read-only home
    from matplotlib.figure import Figure  # no pyplot: no window, no state

    gc.collect()  # the last figure, a megabyte of objects that refer to each other
    lines = read_metrics(run_dir / "metrics.jsonl")
    train = [(line["step"], line["train_loss"]) for line in lines if "train_loss" in line]
    val = [(line["step"], line["val_loss"]) for line in lines if "val_loss" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train), linewidth=0.8, alpha=0.6, label="training batch")
    if val:
        best = min(val, key=lambda point: point[1])
        axes.plot(*zip(*val), marker=".", label="validation")
        label = f"best: {best[1]:.4f} at step {best[0]}"
        axes.plot(*best, "o", fillstyle="none", color="black", label=label)
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    name = os.fsencode(run_dir.name).decode(errors="replace")  # a name may be any bytes
    axes.set_title(name, parse_math=False)
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    with atomic_write(run_dir / "loss.png") as f:
        figure.savefig(f, dpi=120, format="png")
