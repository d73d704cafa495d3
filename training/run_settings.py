"""The settings of a run: from flags, from the run that is resumed, and from a size.

What the user asked for (the settings, where "auto" stays "auto") and what was chosen for this
machine (ComputeChoices) are two things. A checkpoint holds both: a run that continues on another
kind of device chooses anew.
"""

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from common.files import folder_name
from common.settings import check_conflicts, check_ranges, parse_settings
from corpus.metadata import newest_corpus
from corpus.tokenizer import use_prefetched_vocabularies
from training.checkpoint import SHAPE_SETTINGS, last_checkpoint
from training.device import (
    Choice,
    choose_compile,
    choose_dtype,
    flex_attention_failure,
    peak_flops,
    total_memory,
)

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
RENAMED = {"replace": "token_noise"}  # settings of older checkpoints


def load_settings(cls, doc: str, sizes: dict):
    """Read the settings of train_gpt2.py from the command line and from the run to resume.

    Args:
        cls: The dataclass of settings.
        doc: Shown by --help.
        sizes: Name of a size -> its values of settings.

    Returns:
        (settings, checkpoint): the checkpoint to resume, or None.

    Raises:
        ValueError: A value that cannot be used.
        FileNotFoundError: There is no such run, or no prepared corpus.
    """
    settings = parse_settings(cls, doc)
    check_ranges(settings, RANGES)
    check_conflicts(settings, EXCLUDES)
    checkpoint = None
    if settings.resume == "auto":  # a job that may have been started before
        folder = Path(settings.out_dir) / folder_name(settings.run_name, "--run_name")
        if (folder / "last.pt").exists():
            settings.resume = str(folder)
    elif settings.resume and settings.run_name not in ("", Path(settings.resume).name):
        raise ValueError(
            f"--run_name {settings.run_name} differs from the name of --resume {settings.resume}: "
            f"leave out --run_name"
        )
    if settings.resume not in ("", "auto"):
        folder = Path(settings.resume)
        checkpoint = last_checkpoint(folder)
        saved = saved_settings(cls, folder, checkpoint["config"])
        settings = parse_settings(cls, doc, defaults=saved)  # flags given now still win
        check_ranges(settings, RANGES)
        for name in FIXED:
            now, before = getattr(settings, name), getattr(saved, name)
            if now != before:
                raise ValueError(
                    f"{folder} was trained with {name} {before}: --resume cannot change it to {now}"
                )
        if settings.train_flops != saved.train_flops:
            raise ValueError(
                f"--train_flops has no effect on --resume: {folder} has {saved.max_steps} steps; "
                f"change them with --max_steps"
            )
        if settings.max_steps != saved.max_steps and settings.max_steps <= checkpoint["step"]:
            raise ValueError(
                f"{folder} is at step {checkpoint['step']}, not before --max_steps "
                f"{settings.max_steps}"
            )
        if (settings.stop_at or math.inf) <= checkpoint["step"]:
            raise ValueError(
                f"{folder} is at step {checkpoint['step']}, not before --stop_at {settings.stop_at}"
            )
        settings.out_dir, settings.run_name = str(folder.parent), folder.name
        settings.resume = str(folder)
    settings.corpus = settings.corpus or newest_corpus(settings.data_dir).name
    use_prefetched_vocabularies(settings.data_dir)
    return settings, checkpoint


def saved_settings(cls, folder: Path, values: dict):
    """Return the settings of a checkpoint, without its stop_at.

    Raises:
        ValueError: They are those of another version.
    """
    types: dict[str, Any] = {f.name: f.type for f in fields(cls)}
    for name, kind in types.items():
        if float in (kind, *get_args(kind)):
            types[name] = kind | int  # as one may write it, for example dropout=0
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    for name, value in values.items():
        kind = types.get(name, ())
        valid = value in get_args(kind) if get_origin(kind) is Literal else isinstance(value, kind)
        if not valid:
            raise ValueError(
                f"{folder} was trained with {name} {value!r:.40}, which is not a setting of this "
                f"train_gpt2.py: start a new run"
            )
    return cls(**values | {"stop_at": None})


def resolve_size(settings, sizes: dict, device: torch.device) -> None:
    """Fill in, by size, what no flag has set.

    Raises:
        ValueError: --size contradicts --init_from.
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
    size = dict(sizes[settings.size])
    if settings.optimizer == "adamw":
        size["learning_rate"] /= 3
    if "micro_batch_size" in size:  # the largest number up to it that divides a process's share
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        share = (settings.batch_size or size["batch_size"]) // world_size
        limit = size["micro_batch_size"]
        size["micro_batch_size"] = max(n for n in range(1, limit + 1) if share % n == 0)
    for name, value in size.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def fill_in_steps(settings, model) -> None:
    """Set max_steps by train_flops, and eval_every by max_steps, where no flag has."""
    tokens = settings.batch_size * settings.sequence_length
    flops = model.flops_per_token(settings.sequence_length) * tokens  # of a step
    settings.max_steps = settings.max_steps or max(1, round(settings.train_flops / flops))
    settings.eval_every = settings.eval_every or math.ceil(settings.max_steps / 5)


@dataclass(frozen=True)
class ComputeChoices:
    """How this process computes.

    eot_token ends a document. separate_documents: documents in one sequence do not attend to each
    other, by flex_attention or else by a dense mask. peak: FLOP/s of all devices of the run, None
    where unknown; flops_per_token: of training.
    """

    device: torch.device
    dtype: torch.dtype
    compile: bool
    separate_documents: bool
    flex_attention: bool
    eot_token: int
    flops_per_token: int
    peak: float | None
    lines: tuple[str, ...]  # the choices and their reasons, for people

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products use `dtype`."""
        enabled = self.dtype != torch.float32
        return torch.autocast(
            self.device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled
        )

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the share of the devices' peak that training uses, None where unknown."""
        if self.peak is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak

    def saved(self) -> dict:
        """Return what a checkpoint keeps of the choices: plain values."""
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": str(self.compile).lower(),
            "document_mask": str(self.separate_documents).lower(),
        }


def choose_compute(
    settings, metadata: dict, checkpoint: dict | None, device: Choice, model, ranks
) -> ComputeChoices:
    """Choose number type, compiler and document mask for a run.

    A resumed run keeps the choices of its checkpoint if it continues on the same type of device,
    and this machine can follow them.

    Raises:
        ValueError: A choice by name does not fit the machine, the corpus or the resumed run.
    """
    before = (checkpoint or {}).get("chosen", {})
    same_type = before.get("device") == device.value.type
    dtype = choose_dtype(settings.dtype, device.value)
    old_gpu = dtype.value == torch.float16
    if same_type and settings.dtype == "auto" and not old_gpu:
        dtype = Choice("dtype", getattr(torch, before["dtype"]), "as in the checkpoint")
    tokens = settings.batch_size * settings.sequence_length * settings.max_steps
    flops_per_token = model.flops_per_token(settings.sequence_length)
    if same_type and settings.compile == "auto":
        compiled = Choice("compile", False, "as in the checkpoint")
        if before["compile"] == "true":
            compiled = choose_compile("auto", device.value, math.inf)
    else:
        compiled = choose_compile(settings.compile, device.value, flops_per_token * tokens)
    lines = [str(device), str(dtype), str(compiled)]

    documents = metadata["eot_per_document"]
    if settings.document_mask == "true" and not documents:
        raise ValueError(f"{settings.corpus} is one running text: it has no documents to mask")
    separate = documents and settings.document_mask != "false"
    if checkpoint:
        # older checkpoints have the value in use among their settings
        masked_before = before.get("document_mask", checkpoint["config"].get("document_mask"))
        if masked_before in ("true", "false") and separate != (masked_before == "true"):
            raise ValueError(
                f"{settings.resume} was trained with document_mask {masked_before}, which decides "
                f"what its validation loss means: --resume cannot change it"
            )
    flex = False
    if separate:
        failure = why_no_flex_attention(device.value, dtype.value, compiled.value, model)
        flex = not failure
        kernel = "flex_attention" if flex else f"a dense mask, because {failure}"
        lines.append(f"documents do not attend to each other: {kernel}")

    peak = peak_flops(device.value, dtype.value)
    if device.value.type == "cuda" and peak is None:
        lines.append("MFU is not shown: the peak of this device in this number type is unknown")
    return ComputeChoices(
        device=device.value, dtype=dtype.value, compile=compiled.value,
        separate_documents=separate, flex_attention=flex, eot_token=metadata["eot_token"],
        flops_per_token=flops_per_token, peak=None if peak is None else peak * ranks.world_size,
        lines=tuple(lines),
    )  # fmt: skip


def why_no_flex_attention(device: torch.device, dtype: torch.dtype, compiled: bool, model) -> str:
    """Return why documents take a dense mask, or "" if they take flex_attention."""
    if device.type != "cuda":
        return f"flex_attention does not train on {device.type}"
    if not compiled:
        return "nothing is compiled"
    if model.config.dropout:
        return "flex_attention has no dropout"
    return flex_attention_failure(device, model.config.n_embd // model.config.n_head, dtype)


def sequences_per_pass(settings, ranks) -> int:
    """Return the sequences of a forward pass: micro_batch_size, or else all of this process."""
    return settings.micro_batch_size or settings.batch_size // ranks.world_size


def check_batch(settings, metadata: dict, device: torch.device, ranks) -> None:
    """Check that the batch can be divided among processes, and that the memory can be enough.

    Raises:
        ValueError: It cannot; the message names the settings to lower.
    """
    share = settings.batch_size // ranks.world_size  # sequences per step of this process
    micro_batch_size = sequences_per_pass(settings, ranks)
    if share % micro_batch_size:
        raise ValueError(
            f"batch_size ({settings.batch_size}) must be a multiple of micro_batch_size "
            f"({micro_batch_size}) times the number of processes ({ranks.world_size})"
        )
    needed = least_memory(settings, metadata["vocab_size"], share, micro_batch_size)
    available = total_memory(device)
    if needed > available:
        raise ValueError(
            f"this run needs at least {needed / 1e9:,.0f} GB of memory, and {device} has "
            f"{available / 1e9:,.0f} GB: lower batch_size, n_layer or n_embd"
        )


def least_memory(settings, vocab_size: int, share: int, micro_batch_size: int) -> int:
    """Return the bytes that a process needs at least, for `share` sequences per step.

    Weights, gradients and momentum; ids; and 8 activations per block in bfloat16.
    """
    L = settings.n_layer or 0  # unknown before --init_from is read
    C = settings.n_embd or 0
    T = settings.sequence_length
    weights = 12 * L * C * C + (vocab_size + T) * C
    return 12 * weights + 16 * T * (share + micro_batch_size * L * C)
