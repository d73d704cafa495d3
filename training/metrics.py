"""What a run logs: a progress bar or plain lines, metrics.jsonl, samples.jsonl, loss.png."""

import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from common.files import atomic_write
from model import GPT
from training.checkpoint import Progress
from training.distributed import Ranks
from training.json_lines import JsonLines, read_lines
from training.plots import loss_figure
from training.run_settings import RunSettings
from training.sampling import open_sampler
from training.trackers import Tracker, open_tracker

VALIDATION_SAMPLE = 100  # tokens that the model writes at each validation
SECONDS_BETWEEN_LINES = 60  # where there is no terminal for a progress bar


def open_metrics(
    run_dir: Path, progress: Progress, settings: RunSettings, metadata: dict, ranks: Ranks
) -> "Metrics | NoMetrics":
    """Return the Metrics of a run on rank 0, and an object that logs nothing on other ranks.

    Args:
        run_dir: Folder of the run.
        progress: How far the run is.
        settings: After resolve_steps.
        metadata: Metadata of the corpus.
        ranks: This process among all.

    Raises:
        ValueError: The package of the tracker is not installed, or a file of the run is damaged.
        OSError: A file cannot be written.
    """
    if not ranks.is_first:
        return NoMetrics()
    return Metrics(
        run_dir,
        progress.step,
        settings.max_steps,
        first_tokens=progress.position * settings.sequence_length,
        tokens_per_step=settings.batch_size * settings.sequence_length,
        tracker=open_tracker(run_dir, progress.step, settings),
        sampler=open_sampler(run_dir, metadata, VALIDATION_SAMPLE, settings.seed),
    )


class NoMetrics:
    """The metrics of ranks other than 0: nothing."""

    def train(self, *args: object) -> None:
        """Log nothing."""

    def validation(self, *args: object) -> None:
        """Log nothing."""

    def sample(self, *args: object) -> None:
        """Sample nothing: rank 0 does, and the other ranks wait for it in their next step."""

    def close(self) -> None:
        """Close nothing."""


class Metrics:
    """Writes RUN/metrics.jsonl, and the same to a tracker, and shows the progress of a run.

    Each line of the file holds `step` (optimizer steps done), `tokens` (trained on) and either

    - train_loss (nats per token, of that step's batch), learning_rate, tokens_per_second (of
      training alone), mfu (the share of the devices' peak) if the peak is known, and skipped_steps
      once a step was skipped; or
    - val_loss (nats per token) and val_bpb (bits per byte of text); of a mixture also
      val_loss/NAME and val_bpb/NAME for each corpus by itself.

    RUN/samples.jsonl holds a text that the model writes at each validation. Lines of both files
    after `step`, which a killed run leaves, are dropped.

    Args:
        run_dir: Folder of the run.
        step: Optimizer steps done.
        max_steps: Optimizer steps of the whole run.
        first_tokens: Tokens trained on so far.
        tokens_per_step: Tokens of a step.
        tracker: Gets the same numbers, None for no tracker.
        sampler: Returns a text that a model writes, None to write no samples.

    Raises:
        ValueError: A line of an existing metrics.jsonl or samples.jsonl is damaged.
        OSError: A file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        max_steps: int,
        *,
        first_tokens: int = 0,
        tokens_per_step: int = 0,
        tracker: Tracker | None = None,
        sampler: Callable[[GPT], str] | None = None,
    ):
        self.run_dir = run_dir
        self.first_step = step
        self.max_steps = max_steps
        self.first_tokens = first_tokens
        self.tokens_per_step = tokens_per_step
        self.tracker = tracker
        self.sampler = sampler
        self.file = JsonLines(run_dir / "metrics.jsonl", step)
        self.samples = JsonLines(run_dir / "samples.jsonl", step) if sampler else None
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

    def sample(self, step: int, model: GPT) -> None:
        """Write a sample of the model to samples.jsonl; the random state of the run stays.

        Args:
            step: Optimizer steps done.
            model: The model itself, neither compiled nor wrapped, in training mode.
        """
        if self.sampler and self.samples:
            model.eval()
            self.samples.write(step, {"text": self.sampler(model)})
            model.train()

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
        if self.samples:
            self.samples.close()
        if self.tracker:
            self.tracker.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        tokens = self.first_tokens + (step - self.first_step) * self.tokens_per_step
        values = {"tokens": tokens, **values}
        self.file.write(step, values)
        if self.tracker:
            self.tracker.log(step, values)


def plot_losses(run_dir: Path) -> None:
    """Draw loss.png from metrics.jsonl: both losses against steps, the best validation marked."""
    figure = loss_figure(read_lines(run_dir / "metrics.jsonl"), run_dir)
    with atomic_write(run_dir / "loss.png") as f:
        figure.savefig(f, dpi=120, format="png")
