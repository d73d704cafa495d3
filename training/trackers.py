"""Trackers of experiments, which get the numbers of metrics.jsonl, too (--tracker).

Each function imports its optional package and returns a Tracker. A resumed run continues in the
tracker:

- TensorBoard drops the steps after the checkpoint, which a killed run has left.
- trackio and wandb keep these steps. They are not logged a second time: the first value counts.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.packages import optional
from training.run_settings import RunSettings

PROJECT = "train_gpt2"  # of trackio and wandb


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Where the numbers of a run go, beside metrics.jsonl."""

    log: Callable[[int, dict[str, float]], Any]  # takes the step and the values by name
    close: Callable[[], Any]


def open_tracker(run_dir: Path, step: int, settings: RunSettings) -> Tracker | None:
    """Return the tracker that --tracker names, or None.

    Args:
        run_dir: Folder of the run.
        step: Optimizer steps done.
        settings: After resolve_steps.

    Raises:
        ValueError: The tracker's package is not installed.
    """
    if not settings.tracker:
        return None
    openers = {"tensorboard": open_tensorboard, "trackio": open_trackio, "wandb": open_wandb}
    return openers[settings.tracker](run_dir, step, settings)


def open_tensorboard(run_dir: Path, step: int, settings: RunSettings) -> Tracker:
    """Return a tracker that writes RUN/tensorboard/."""
    module = optional("torch.utils.tensorboard", "--tracker tensorboard", "tensorboard")
    writer = module.SummaryWriter(run_dir / "tensorboard", purge_step=step + 1)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def open_trackio(run_dir: Path, step: int, settings: RunSettings) -> Tracker:
    """Return a tracker that writes a run of trackio, which keeps its runs on this machine.

    A resumed run is the newest one of its name. A new run may have the name of an older one.
    """
    trackio = optional("trackio", "--tracker trackio")
    run = trackio.init(
        project=PROJECT,
        name=run_dir.name,
        resume="allow" if step else "never",
        config=dataclasses.asdict(settings),
    )
    next_step = run._next_step  # not public: requirements-dev.txt pins the version that is tested

    def log(step: int, values: dict[str, float]) -> None:
        if step >= next_step:
            run.log(values, step=step)

    return Tracker(log, run.finish)


def open_wandb(run_dir: Path, step: int, settings: RunSettings) -> Tracker:
    """Return a tracker that writes a run of Weights & Biases.

    wandb's environment variables work as usual: WANDB_MODE=offline keeps the run in RUN/wandb/, for
    `wandb sync`, and WANDB_PROJECT names another project.

    Raises:
        ValueError: wandb cannot start the run, for example because nobody is logged in.
    """
    wandb = optional("wandb", "--tracker wandb")
    # wandb's folders are named run-DATE-ID or offline-run-DATE-ID
    folders = sorted(run_dir.glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime)
    run_id = folders[-1].name.rpartition("-")[2] if step and folders else None
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.name,
            id=run_id,
            resume="allow",
            dir=run_dir,
            config=dataclasses.asdict(settings),
            allow_val_change=True,
        )
    except wandb.Error as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"--tracker wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from None
    return Tracker(lambda step, values: run.log(values, step=step), run.finish)
