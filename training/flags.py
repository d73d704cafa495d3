"""Where the settings of a run come from: flags, the run that is resumed, and a size."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import torch

from common.files import folder_name
from common.settings import (
    check_conflicts,
    check_ranges,
    parse_settings,
    print_changes,
    setting_text,
)
from corpus.metadata import newest_corpus
from corpus.vocabulary_files import use_prefetched_vocabularies
from model import GPT
from training.checkpoint import shared_checkpoint
from training.corpora import same_mixture
from training.distributed import is_first_rank
from training.models import num_positions
from training.run_folder import RunLock, run_of
from training.run_settings import SHAPE_SETTINGS, RunSettings, saved_corpus

# settings that --resume cannot change
FIXED = ("corpus", "init_from", "size", *SHAPE_SETTINGS, "sequence_length", "optimizer", "seed")
AT_LEAST_1 = (
    *SHAPE_SETTINGS, "sequence_length", "batch_size", "micro_batch_size", "max_steps", "stop_at",
    "eval_every", "log_every",
)  # fmt: skip
RANGES = dict.fromkeys(AT_LEAST_1, (1, 2**31 - 1)) | {
    "dropout": (0, 0.999), "token_noise": (0, 1), "train_flops": (1, math.inf),
}  # fmt: skip
EXCLUDES = {"max_steps": ("train_flops",)}
NEW_NAMES = {"replace": "token_noise"}  # settings of older checkpoints
OTHER_NAMES = {  # name in nanoGPT, transformers or elsewhere -> setting
    "ctx_len": "sequence_length", "block_size": "sequence_length",
    "context_length": "sequence_length", "context_size": "sequence_length",
    "max_seq_len": "sequence_length", "n_ctx": "sequence_length",
    "n_positions": "sequence_length", "seq_len": "sequence_length",
    "d_model": "n_embd", "hidden_size": "n_embd", "num_heads": "n_head", "num_layers": "n_layer",
    "device_batch_size": "micro_batch_size", "grad_accum_steps": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "max_iters": "max_steps", "num_steps": "max_steps", "epochs": "max_steps",
    "eval_interval": "eval_every", "eval_steps": "eval_every",
    "log_interval": "log_every", "logging_steps": "log_every",
    "lr": "learning_rate", "max_lr": "learning_rate", "warmup_iters": "warmup_steps",
    "max_grad_norm": "grad_clip", "wd": "weight_decay",
    "checkpoint": "resume", "dataset": "corpus", "model": "size", "model_type": "size",
    "output_dir": "out_dir",
    "report_to": "tracker", "tensorboard": "tracker", "wandb_log": "tracker",
}  # fmt: skip
Flags = TypeVar("Flags")  # the dataclass of settings in train_gpt2.py


def parse_flags(cls: type[Flags], doc: str) -> Flags:
    """Return the settings that the command line gives.

    Args:
        cls: The dataclass of settings.
        doc: The text that --help prints above the flags.

    Raises:
        ValueError: A value is out of range, or a flag has no effect beside another.
    """
    flags = parse_settings(cls, doc, other_names=OTHER_NAMES)
    check_ranges(flags, RANGES)
    check_conflicts(flags, EXCLUDES)
    return flags


def load_settings(flags: Any, doc: str, lock: RunLock) -> tuple[Any, dict | None]:
    """Return the settings of a run, and the checkpoint that the run resumes.

    Settings that no flag sets are those of the resumed run.

    Args:
        flags: From parse_flags.
        doc: As for parse_flags.
        lock: Locks the run before its checkpoint is read.

    Returns:
        (settings, checkpoint), where the checkpoint of a new run is None.

    Raises:
        ValueError: A value cannot be used, or --resume cannot change a setting.
        FileNotFoundError: The run to resume does not exist, or no corpus is prepared.
        BlockingIOError: Another process trains the run.
    """
    settings = flags
    checkpoint = None
    ranks = lock.ranks
    run_dir = ranks.on_first(lambda: resumed_run(flags))
    if run_dir:
        if ranks.on_first(run_dir.is_dir):
            lock.take(run_dir)
        checkpoint = shared_checkpoint(run_dir, ranks)
        settings = resumed_settings(type(flags), doc, run_dir, checkpoint)
    if settings.corpus in ((), ("",)):
        settings.corpus = (ranks.on_first(lambda: newest_corpus(settings.data_dir).name),)
    use_prefetched_vocabularies(settings.data_dir)
    return settings, checkpoint


def resumed_run(flags: Any) -> Path | None:
    """Return the folder of the run that the flags resume, or None for a new run.

    Raises:
        ValueError: --run_name is not the name of a folder, or contradicts --resume.
    """
    if not flags.resume:
        return None
    if flags.resume == "auto":  # a job that may have been started before
        if not flags.run_name:
            raise ValueError("--resume auto needs --run_name NAME")
        run_dir = Path(flags.out_dir) / folder_name(flags.run_name, "--run_name")
        return run_dir if (run_dir / "last.pt").exists() else None
    run_dir = run_of(Path(flags.resume))
    if run_dir != Path(flags.resume) and Path(flags.resume).name != "last.pt":
        print(f"{flags.resume} stands for its run: resuming {run_dir} from last.pt")
    if flags.run_name not in ("", run_dir.name):
        raise ValueError(
            f"--run_name {flags.run_name} differs from the name of --resume {flags.resume}: "
            f"leave out --run_name"
        )
    return run_dir


def resumed_settings(cls: type, doc: str, run_dir: Path, checkpoint: dict) -> Any:
    """Return the settings of a resumed run: those of its checkpoint, changed by flags.

    Args:
        cls: The dataclass of settings.
        doc: As for parse_flags.
        run_dir: Folder of the run.
        checkpoint: The run's last checkpoint.

    Raises:
        ValueError: The settings are those of another version, or --resume cannot change one.
    """
    old: Any = checkpoint_settings(cls, run_dir, checkpoint["config"])
    settings = parse_settings(cls, doc, defaults=old)
    check_ranges(settings, RANGES)
    if same_mixture(settings.corpus, old.corpus):
        settings.corpus = old.corpus
    for name in FIXED:
        old_value = getattr(old, name)
        new_value = getattr(settings, name)
        if new_value != old_value:
            raise ValueError(
                f"{run_dir} was trained with {name} {setting_text(old_value)}: --resume cannot "
                f"change it to {setting_text(new_value)}"
            )
    step = checkpoint["step"]
    if settings.train_flops != old.train_flops:
        raise ValueError(
            f"--train_flops has no effect on --resume: {run_dir} has {old.max_steps} steps; "
            f"change them with --max_steps"
        )
    if Path(settings.out_dir) not in (Path(old.out_dir), run_dir.parent):
        raise ValueError(f"--out_dir has no effect on --resume: {run_dir} is continued where it is")
    if settings.max_steps != old.max_steps:
        if settings.max_steps <= step:
            raise ValueError(
                f"{run_dir} is at step {step}, not before --max_steps {settings.max_steps}"
            )
        # train_flops does not decide max_steps any more
        old.train_flops = None
        settings.train_flops = None
    if settings.stop_at and settings.stop_at <= step:
        raise ValueError(f"{run_dir} is at step {step}, not before --stop_at {settings.stop_at}")
    for either in (old, settings):  # these flags name the run, and do not change it
        either.out_dir = str(run_dir.parent)
        either.run_name = run_dir.name
        either.resume = str(run_dir)
    if is_first_rank():
        print_changes(replace(old, stop_at=settings.stop_at), settings)
    return settings


def checkpoint_settings(cls: type[Flags], run_dir: Path, values: dict) -> Flags:
    """Return the settings of a checkpoint, without its stop_at.

    Args:
        cls: The dataclass of settings.
        run_dir: Folder of the run, for the message.
        values: Name of a setting -> value.

    Raises:
        ValueError: A setting is that of another version.
    """
    types: dict[str, Any] = {f.name: f.type for f in fields(cast(Any, cls))}
    for name, kind in types.items():
        if float in (kind, *get_args(kind)):
            types[name] = kind | int  # as one may write it, for example dropout=0
        if get_origin(kind) is tuple:
            types[name] = tuple
    values = {NEW_NAMES.get(name, name): value for name, value in values.items()}
    if isinstance(values.get("corpus"), str):
        values["corpus"] = saved_corpus(values)
    if "tensorboard" in values:  # the only tracker of older versions, on or off
        values["tracker"] = "tensorboard" if values.pop("tensorboard") else ""
    for name, value in values.items():
        kind = types.get(name, ())
        valid = value in get_args(kind) if get_origin(kind) is Literal else isinstance(value, kind)
        if not valid:
            raise ValueError(
                f"{run_dir} was trained with {name} {value!r:.40}, which is not a setting of this "
                f"train_gpt2.py: start a new run"
            )
    return cls(**values | {"stop_at": None})


def resolve_size(
    settings: Any, sizes: dict[str, dict[str, Any]], device: torch.device
) -> RunSettings:
    """Fill in, by size, the settings that no flag has set.

    micro_batch_size stays as asked for, because the value in use also depends on the number of
    processes (choose_micro_batch_size).

    Args:
        settings: From load_settings; changed in place.
        sizes: The sizes of train_gpt2.py.
        device: Device of the run, which decides what "auto" is.

    Returns:
        The same object.

    Raises:
        ValueError: --size contradicts --init_from, or the weights of --init_from are damaged.
        FileNotFoundError: The weights of --init_from do not exist.
    """
    if settings.init_from and settings.size not in ("auto", "pretrained"):
        raise ValueError(
            f"--init_from {settings.init_from} has a shape of its own: leave out --size"
        )
    if settings.size == "pretrained" and not settings.init_from:
        raise ValueError("--size pretrained has no shape of its own: add --init_from")
    if settings.init_from:
        settings.size = "pretrained"
    if settings.size == "auto":
        settings.size = "tiny" if device.type == "cpu" else "small"
    defaults = dict(sizes[settings.size])
    defaults.pop("micro_batch_size", None)
    if settings.optimizer == "adamw":
        defaults["learning_rate"] /= 3
    if settings.init_from and settings.sequence_length is None:
        limit = num_positions(settings.init_from, settings.data_dir)
        defaults["sequence_length"] = min(defaults["sequence_length"], limit)
    if settings.max_steps:
        del defaults["train_flops"]  # which has no effect
    for name, value in defaults.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    return settings


def resolve_steps(settings: RunSettings, model: GPT) -> None:
    """Set max_steps by train_flops, and eval_every by max_steps, where no flag has set them."""
    tokens_per_step = settings.batch_size * settings.sequence_length
    flops_per_step = model.flops_per_token(settings.sequence_length) * tokens_per_step
    if settings.train_flops is not None and not settings.max_steps:
        settings.max_steps = max(1, round(settings.train_flops / flops_per_step))
    settings.eval_every = settings.eval_every or math.ceil(settings.max_steps / 5)
