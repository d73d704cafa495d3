"""Runs as their small files describe them: config.json and metrics.jsonl, without PyTorch.

run = read_run(Path("out/mine"))
run.best.bits_per_byte                      # of the best validation
for group in comparable_groups(runs):       # runs with one validation text
    rows = fold_repeats(group)              # runs that differ in the seed alone are one row
"""

import functools
import json
import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_json
from training.json_lines import read_lines
from training.run_settings import left_out_first_tokens, saved_choices, saved_corpus

# settings that name a run, or decide when it logs and stops, but not what it learns
WITHOUT_EFFECT = {
    "data_dir", "out_dir", "run_name", "resume", "stop_at", "train_flops", "eval_every",
    "checkpoint_minutes", "patience", "log_every", "tracker", "tensorboard", "document_start",
}  # fmt: skip


@dataclass(frozen=True)
class Validation:
    """One validation of a run."""

    step: int  # optimizer steps done
    tokens: float  # tokens trained on
    seconds: float  # of training alone, without validations and saving
    nats: float  # per token
    bits_per_byte: float


@dataclass(frozen=True)
class Run:
    """A run, finished or not."""

    path: Path
    settings: dict[str, Any]  # without those of WITHOUT_EFFECT; "auto" is replaced by the choice
    parameters: int | None  # None for runs of older versions
    text_key: tuple[Any, ...]  # equal for runs whose bits per byte can be compared
    text: str  # describes the validation text, for tables and titles
    finished: bool
    step: int
    max_steps: int
    tokens: float
    seconds: float
    speed: float | None  # tokens per second of the median line, None before the first line
    validations: list[Validation]

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest loss, None before the first one."""
        return min(self.validations, key=lambda validation: validation.nats, default=None)


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seeds; or one run."""

    runs: list[Run]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of all runs of the row, without the seed if there are several."""
        settings = dict(self.runs[0].settings)
        if len(self.runs) > 1:
            settings.pop("seed", None)
        return settings

    @functools.cached_property
    def bits_per_byte(self) -> float:
        """Mean of the best bits per byte of the runs, infinite without a validation."""
        return statistics.fmean(
            run.best.bits_per_byte if run.best else math.inf for run in self.runs
        )


def read_run(run_dir: Path) -> Run:
    """Return a run as its config.json and metrics.jsonl describe it.

    Args:
        run_dir: Folder of the run.

    Raises:
        FileNotFoundError: The folder is not a run.
        ValueError: A file is damaged.
        OSError: A file cannot be read.
    """
    if not run_dir.exists():
        raise FileNotFoundError(f"{run_dir} does not exist")
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder: name the folder of the run")
    if not (run_dir / "config.json").is_file():
        raise FileNotFoundError(f"{run_dir} is not a run: it has no config.json")
    config = read_json(run_dir / "config.json")
    try:
        config["corpus"] = " ".join(saved_corpus(config))  # as on the command line
        num_tokens = config["batch_size"] * config["sequence_length"]
        max_steps = int(config["max_steps"])
        text_key, text = _validation_text(config)
        parameters = config.get("parameters")
        settings = {
            name: value
            for name, value in (config | saved_choices(config)).items()
            if name not in WITHOUT_EFFECT | {"chosen", "parameters", "val_text"}
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{run_dir / 'config.json'} is damaged, or not the config.json of a run"
        ) from None
    lines = read_lines(run_dir / "metrics.jsonl")
    try:
        validations, tokens, seconds = _curve(lines, num_tokens)
        if "val_text" not in config and validations:
            bits_per_nat = validations[0].bits_per_byte / validations[0].nats
            text_key = (*text_key, round(bits_per_nat * math.log(2), 6))  # tokens per byte
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise ValueError(
            f"{run_dir / 'metrics.jsonl'} has a line whose values are not numbers: remove that line"
        ) from None
    step = max((line["step"] for line in lines), default=0)
    return Run(
        path=run_dir,
        settings=settings,
        parameters=parameters,
        text_key=text_key,
        text=text,
        finished=step >= max_steps or _ran_out_of_patience(config, validations),
        step=step,
        max_steps=max_steps,
        tokens=tokens,
        seconds=seconds,
        speed=_speed(lines),
        validations=validations,
    )


def _validation_text(config: dict) -> tuple[tuple[Any, ...], str]:
    """Return (text_key, text) of a run: what its losses can be compared by."""
    text = config.get("val_text")
    corpus = config["corpus"]
    if text:
        key: tuple[Any, ...] = (text["bytes"], text["sha256"])
        description = f"{text['bytes']:,} bytes of {corpus}"
    else:
        key = (corpus,)
        description = (
            f"{corpus} (known by its name and its tokens per byte only, because "
            f"config.json has no val_text)"
        )
    if left_out_first_tokens(config):
        key += ("without first tokens",)
        description += ", without the first tokens of documents"
    return key, description


def _curve(lines: list[dict], tokens_per_step: int) -> tuple[list[Validation], float, float]:
    """Return the validations, and the tokens and seconds of training at the last line.

    A line of a training step holds the speed since the line before it.
    """
    steps = [0]
    seconds = [0.0]
    tokens = [0.0]
    for line in lines:
        if "tokens_per_second" in line:
            total = float(line.get("tokens", line["step"] * tokens_per_step))
            seconds.append(seconds[-1] + (total - tokens[-1]) / float(line["tokens_per_second"]))
            steps.append(line["step"])
            tokens.append(total)
    validations = []
    for line in lines:
        if "val_loss" in line:
            total = float(line.get("tokens", line["step"] * tokens_per_step))
            nats = float(line["val_loss"])
            bits_per_byte = float(line["val_bpb"])
            if not (math.isfinite(nats) and math.isfinite(bits_per_byte)):
                raise ValueError
            when = _interpolate(total, tokens, seconds)
            validations.append(Validation(line["step"], total, when, nats, bits_per_byte))
    last = max(tokens[-1], validations[-1].tokens if validations else 0)
    return validations, last, seconds[-1]


def _speed(lines: list[dict]) -> float | None:
    """Return the median of tokens_per_second, None if no line has it.

    Compiling makes the first line slow. The median of two or more lines is not affected: of two
    values, it is the higher one.
    """
    speeds = [float(line["tokens_per_second"]) for line in lines if "tokens_per_second" in line]
    return statistics.median_high(speeds) if speeds else None


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return y at x on the line through the points (xs, ys), whose xs rise."""
    i = bisect_left(xs, x)
    if i == len(xs):
        return ys[-1]
    if xs[i] == x:
        return ys[i]
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])


def _ran_out_of_patience(config: dict, validations: list[Validation]) -> bool:
    """Return whether the last `patience` validations brought no new best."""
    patience = config.get("patience") or 0
    if not 0 < patience < len(validations):
        return False
    nats = [validation.nats for validation in validations]
    return nats.index(min(nats)) < len(nats) - patience


def comparable_groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Divide runs into groups with one validation text each, the largest group first."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.text_key, []).append(run)
    return sorted(groups.values(), key=len, reverse=True)


def fold_repeats(runs: Sequence[Run]) -> list[Row]:
    """Return rows of runs, the lowest bits per byte first.

    Finished runs that differ in their seeds alone are one row. A run that is not finished is a row
    of its own, because its best validation may still come.
    """
    rows: dict[str, list[Run]] = {}
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name != "seed"}
        key = json.dumps(settings, sort_keys=True)
        if not run.finished:
            key = str(run.path)
        rows.setdefault(key, []).append(run)
    return sorted(map(Row, rows.values()), key=lambda row: row.bits_per_byte)


def differing_settings(rows: Sequence[Row]) -> list[str]:
    """Return the names of the settings that are not the same in all rows."""
    names: dict[str, None] = {}  # in order
    for row in rows:
        names |= dict.fromkeys(row.settings)
    if any("seed" not in row.settings for row in rows):
        names.pop("seed", None)
    return [name for name in names if len({str(row.settings.get(name)) for row in rows}) > 1]
