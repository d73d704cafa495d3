"""How a run computes on this machine: number type, compiler, mask, sequences per forward pass.

What the user asked for (the settings, where "auto" stays "auto") and what was chosen for this
machine (ComputeChoices) are two things. A checkpoint holds both: a run that continues on another
kind of device, or on more processes, chooses again.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from model import GPT
from training.corpora import corpus_name
from training.device import (
    Choice,
    choose_compile,
    choose_dtype,
    flex_attention_failure,
    peak_flops,
    slow_dtype_remark,
    total_memory,
)
from training.distributed import Ranks
from training.run_settings import RunSettings, left_out_first_tokens, saved_choices

TOKENS_PER_FORWARD = 2048  # of a scored text, where no run says otherwise


@dataclass(frozen=True)
class ComputeChoices:
    """How this process computes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products
    compile: bool
    micro_batch_size: int  # sequences per forward pass
    separate_documents: bool  # whether documents in one sequence do not attend to each other
    flex_attention: bool  # how documents are separated: by flex_attention, or by a dense mask
    eot_token: int  # id that ends a document
    flops_per_token: int  # of training
    peak: float | None  # FLOP/s of all devices of the run, None where unknown
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

    def plain_values(self) -> dict:
        """Return the choices that a checkpoint and config.json keep, as plain values."""
        return {
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compile": str(self.compile).lower(),
            "document_mask": str(self.separate_documents).lower(),
            "document_start": "eot",  # see left_out_first_tokens
            "micro_batch_size": self.micro_batch_size,
        }


def choose_compute(
    settings: RunSettings,
    metadata: dict,
    checkpoint: dict | None,
    device: Choice,
    micro_batch_size: int,
    model: GPT,
    ranks: Ranks,
) -> ComputeChoices:
    """Choose number type, compiler and document mask for a run.

    A resumed run keeps the choices of its checkpoint if the run continues on the same type of
    device, and this machine can follow the choices.

    Args:
        settings: After resolve_steps.
        metadata: Metadata of the corpus.
        checkpoint: The checkpoint that the run resumes, or None.
        device: From choose_device.
        micro_batch_size: From choose_micro_batch_size.
        model: The model that the run trains.
        ranks: This process among all.

    Raises:
        ValueError: A choice by name does not fit the machine, the corpus or the resumed run.
    """
    old_choices = (checkpoint or {}).get("chosen", {})
    same_type = old_choices.get("device") == device.value.type
    dtype = choose_dtype(settings.dtype, device.value)
    has_scaler = dtype.value == torch.float16  # an older GPU, which has no bfloat16 units
    if same_type and settings.dtype == "auto" and not has_scaler:
        old_dtype = getattr(torch, old_choices["dtype"])
        reason = "as in the checkpoint" + slow_dtype_remark(old_dtype, device.value)
        dtype = Choice("dtype", old_dtype, reason)
    flops_per_token = model.flops_per_token(settings.sequence_length)
    num_tokens = settings.batch_size * settings.sequence_length * settings.max_steps
    if same_type and settings.compile == "auto":
        compiler = Choice("compile", False, "as in the checkpoint")
        if old_choices["compile"] == "true":
            compiler = choose_compile("auto", device.value, math.inf)
    else:
        compiler = choose_compile(settings.compile, device.value, flops_per_token * num_tokens)
    lines = [str(device), str(dtype), str(compiler)]

    separate = separates_documents(settings, metadata, checkpoint)
    if checkpoint and left_out_first_tokens(checkpoint):
        lines.append(
            "the best validation starts anew: the version that saved this run gave the first "
            "tokens of documents no loss"
        )
    flex = False
    if separate:
        failure = why_no_flex_attention(device.value, dtype.value, compiler.value, model)
        flex = not failure
        kernel = "flex_attention" if flex else f"a dense mask, because {failure}"
        lines.append(f"documents do not attend to each other: {kernel}")

    peak = peak_flops(device.value, dtype.value)
    if device.value.type == "cuda" and peak is None:
        lines.append("MFU is not shown: the peak of this device in this number type is unknown")
    return ComputeChoices(
        device=device.value,
        dtype=dtype.value,
        compile=compiler.value,
        micro_batch_size=micro_batch_size,
        separate_documents=separate,
        flex_attention=flex,
        eot_token=metadata["eot_token"],
        flops_per_token=flops_per_token,
        peak=None if peak is None else peak * ranks.world_size,
        lines=tuple(lines),
    )


def scoring_choices(
    checkpoint: dict | None,
    device: torch.device,
    eot_token: int,
    num_windows: int,
    sequence_length: int,
) -> ComputeChoices:
    """Return how a text is scored: as the validation of the run, but uncompiled.

    On another type of device than the run's, the number type is chosen again. Weights without a run
    are scored in float32.

    Args:
        checkpoint: Checkpoint of a run, or None for other weights.
        device: Device of the model.
        eot_token: Id that ends a document.
        num_windows: Number of windows of the text.
        sequence_length: Tokens of a window.
    """
    choices: dict[str, Any] = {}
    dtype = torch.float32
    if checkpoint:
        choices = saved_choices(checkpoint)
        dtype = choose_dtype("auto", device).value
    micro_batch_size = max(1, TOKENS_PER_FORWARD // sequence_length)
    if choices.get("device") == device.type and choices.get("dtype", "auto") != "auto":
        dtype = getattr(torch, choices["dtype"])
        micro_batch_size = choices.get("micro_batch_size") or micro_batch_size
    return ComputeChoices(
        device=device,
        dtype=dtype,
        compile=False,
        micro_batch_size=min(micro_batch_size, num_windows),
        separate_documents=choices.get("document_mask") == "true",
        flex_attention=False,
        eot_token=eot_token,
        flops_per_token=0,
        peak=None,
        lines=(),
    )


def separates_documents(settings: RunSettings, metadata: dict, checkpoint: dict | None) -> bool:
    """Return whether documents in one sequence do not attend to each other.

    Args:
        settings: After resolve_size.
        metadata: Metadata of the corpus.
        checkpoint: The checkpoint that the run resumes, or None.

    Raises:
        ValueError: The setting does not fit the corpus or the resumed run.
    """
    has_documents = metadata["eot_per_document"]
    if settings.document_mask == "true" and not has_documents:
        raise ValueError(
            f"{corpus_name(settings)} is one running text: it has no documents to mask"
        )
    separate = has_documents and settings.document_mask != "false"
    if checkpoint:
        # older checkpoints have the value in use among their settings
        choices = checkpoint.get("chosen", {})
        old_mask = choices.get("document_mask", checkpoint["config"].get("document_mask"))
        if old_mask in ("true", "false") and separate != (old_mask == "true"):
            raise ValueError(
                f"{settings.resume} was trained with document_mask {old_mask}, which decides "
                f"what its validation loss means: --resume cannot change it"
            )
    return separate


def why_no_flex_attention(
    device: torch.device, dtype: torch.dtype, compiled: bool, model: GPT
) -> str:
    """Return why documents take a dense mask, or "" if they take flex_attention."""
    if device.type != "cuda":
        return f"flex_attention does not train on {device.type}"
    if not compiled:
        return "nothing is compiled"
    if model.config.dropout:
        return "flex_attention has no dropout"
    return flex_attention_failure(device, model.config.n_embd // model.config.n_head, dtype)


def choose_micro_batch_size(
    settings: RunSettings, sizes: dict[str, dict[str, Any]], ranks: Ranks
) -> int:
    """Return the number of sequences in one forward pass.

    That is the setting, if a flag gives it. Otherwise it is the largest number up to the size's
    micro_batch_size that divides this process's share of the batch.

    Example: size gpt2 (16), batch_size 125, one process -> 5.

    Args:
        settings: After resolve_size.
        sizes: The sizes of train_gpt2.py.
        ranks: This process among all.
    """
    if settings.micro_batch_size:
        return settings.micro_batch_size
    share = max(1, settings.batch_size // ranks.world_size)
    limit = min(share, sizes[settings.size].get("micro_batch_size", share))
    return next(number for number in range(limit, 0, -1) if share % number == 0)


def check_batch(
    settings: RunSettings,
    metadata: dict,
    device: torch.device,
    micro_batch_size: int,
    ranks: Ranks,
) -> None:
    """Check that the batch can be divided among processes, and that the memory can be enough.

    Args:
        settings: After resolve_size.
        metadata: Metadata of the corpus.
        device: Device of the run.
        micro_batch_size: From choose_micro_batch_size.
        ranks: This process among all.

    Raises:
        ValueError: The batch or the memory is not enough; the message names the settings to change.
    """
    if settings.batch_size % (micro_batch_size * ranks.world_size):
        raise ValueError(
            f"batch_size ({settings.batch_size}) must be a multiple of micro_batch_size "
            f"({micro_batch_size}) times the number of processes ({ranks.world_size})"
        )
    share = settings.batch_size // ranks.world_size
    needed = least_memory(settings, metadata["vocab_size"], share, micro_batch_size)
    available = total_memory(device)
    if needed > available:
        remedy = "batch_size, n_layer or n_embd"
        if least_memory(settings, metadata["vocab_size"], share, 1) <= available:
            remedy = f"--micro_batch_size, which is {micro_batch_size} now"
        raise ValueError(
            f"this run needs at least {needed / 1e9:,.0f} GB of memory, and {device} has "
            f"{available / 1e9:,.0f} GB: lower {remedy}"
        )


def least_memory(settings: RunSettings, vocab_size: int, share: int, micro_batch_size: int) -> int:
    """Return the bytes that a process needs at least.

    They are 12 per weight (weight, gradient and momentum), 16 per token of the batch and, per token
    of a micro-batch, 8 activations in bfloat16 for each channel of each block.

    Args:
        settings: After resolve_size.
        vocab_size: Number of token ids.
        share: Sequences per step of one process.
        micro_batch_size: Sequences per forward pass.
    """
    L = settings.n_layer or 0  # unknown before --init_from is read
    C = settings.n_embd or 0
    T = settings.sequence_length
    num_weights = 12 * L * C * C + (vocab_size + T) * C
    return 12 * num_weights + 16 * T * (share + micro_batch_size * L * C)
