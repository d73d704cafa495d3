"""Checkpoints: out/RUN/last.pt to resume from, previous.pt in case that is damaged, best.pt to use.

A checkpoint holds tensors and plain values only, so that torch.load(weights_only=True) reads it:
step, position, best (its step and val_loss), model (weights), model_config, metadata (of the
corpus, or of a mixture: see corpora.py), config (the settings asked for), chosen (device, dtype,
compile, document_mask, micro_batch_size); and, but for best.pt, optimizers (their states), scaler
(of float16 gradients) and skipped_steps.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import atomic_write
from corpus.metadata import source_path
from corpus.vocabulary import same_vocabulary
from model import GPT, GPTConfig
from training.compute import ComputeChoices
from training.corpora import corpus_name
from training.distributed import Ranks, is_first_rank
from training.huggingface import EMBEDDING
from training.optimizer import OptimizerGroup
from training.run_folder import run_of
from training.run_settings import RunSettings, left_out_first_tokens

# settings that may differ between the machines of a run
MACHINE_SETTINGS = ("data_dir", "out_dir", "resume", "init_from", "device")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    position: int = 0  # training sequences used
    best_step: int = 0  # step of the best validation
    best_loss: float = math.inf  # its loss, nats per token
    skipped_steps: int = 0  # steps without an update, because of gradients beyond float16


def save(
    path: Path,
    progress: Progress,
    *,
    settings: RunSettings,
    compute: ComputeChoices,
    metadata: dict,
    model: GPT,
    optimizer: OptimizerGroup | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write a checkpoint; with `optimizer`, a checkpoint that a run can be resumed from.

    Args:
        path: The file: last.pt or best.pt.
        progress: How far the run is.
        settings: After resolve_steps.
        compute: From choose_compute.
        metadata: Metadata of the corpus.
        model: The model itself, neither compiled nor wrapped.
        optimizer: Optimizers whose states are saved.
        scaler: Gradient scaler, given with `optimizer`.

    Raises:
        OSError: The file cannot be written. An older checkpoint is still whole.
    """
    checkpoint = {
        "step": progress.step,
        "position": progress.position,
        "best": {"step": progress.best_step, "val_loss": progress.best_loss},
        "config": dataclasses.asdict(settings),
        "chosen": compute.plain_values(),
        "metadata": metadata,
        "model_config": dataclasses.asdict(model.config),
        "model": model.state_dict(),
    }
    if optimizer is not None and scaler is not None:
        checkpoint["optimizers"] = optimizer.state_dicts()
        checkpoint["scaler"] = scaler.state_dict()
        checkpoint["skipped_steps"] = progress.skipped_steps
    save_checkpoint(path, checkpoint)


def restore(
    checkpoint: dict,
    settings: RunSettings,
    metadata: dict,
    model: GPT,
    optimizer: OptimizerGroup,
    scaler: torch.amp.GradScaler,
) -> Progress:
    """Load the state of a checkpoint into a run's model, optimizer and gradient scaler.

    Args:
        checkpoint: From last_checkpoint.
        settings: The settings of the resumed run.
        metadata: Metadata of the corpus as it is now.
        model: Gets the weights.
        optimizer: Gets the optimizer states.
        scaler: Gets the scale of float16 gradients.

    Returns:
        How far the run was.

    Raises:
        ValueError: The corpus, or the optimizer, is another one.
    """
    old = checkpoint["metadata"]
    if old["splits"] != metadata["splits"] or not same_vocabulary(old, metadata):
        raise ValueError(_describe_change(old, metadata, settings))
    model.load_state_dict(checkpoint["model"])
    skipped_steps = checkpoint.get("skipped_steps", 0)
    optimizer.load_states(
        checkpoint["optimizers"],
        f"{settings.resume}/last.pt",
        never_stepped=skipped_steps == checkpoint["step"],
    )
    if scaler.is_enabled() and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    progress = Progress(
        checkpoint["step"],
        checkpoint["position"],
        checkpoint["best"]["step"],
        checkpoint["best"]["val_loss"],
        skipped_steps,
    )
    if left_out_first_tokens(checkpoint):
        progress.best_step = progress.step
        progress.best_loss = math.inf
    return progress


def check_ranks_agree(
    settings: RunSettings, progress: Progress, metadata: dict, ranks: Ranks
) -> None:
    """Check that all ranks have the same settings, and are at the same place of the same corpus.

    DistributedDataParallel then gives the weights of rank 0 to all ranks.

    Args:
        settings: After resolve_steps. Folders and devices may differ between machines.
        progress: How far the run is.
        metadata: Metadata of the corpus.
        ranks: This process among all.

    Raises:
        ValueError: A rank differs from rank 0; the message names the rank.
    """
    corpus = [metadata["tokenizer"]["sha256"], metadata["splits"]]
    checksum = hashlib.sha256(json.dumps(corpus, sort_keys=True).encode()).hexdigest()
    flags = {
        name: value
        for name, value in dataclasses.asdict(settings).items()
        if name not in MACHINE_SETTINGS
    }
    ranks.check_equal(**flags)
    ranks.check_equal(step=progress.step, position=progress.position, corpus_checksum=checksum)


def _changed_corpora(old: dict, metadata: dict) -> str:
    """Return the names of the corpora of a mixture whose splits have changed, "" for one corpus."""
    then = old["splits"]
    now = metadata["splits"]
    changed = [split for split in then | now if then.get(split) != now.get(split)]
    names = [split.rpartition("/")[0] for split in changed]
    return ", ".join(dict.fromkeys(filter(None, names)))


def _describe_change(old: dict, metadata: dict, settings: RunSettings) -> str:
    """Return a message: how a corpus differs from the one of the run, and the remedy."""
    since = f"than when {settings.resume} was trained on it"
    remedy = _remedy(old, metadata, settings)
    if same_vocabulary(old, metadata):
        name = _changed_corpora(old, metadata) or corpus_name(settings)
        return f"{name} has another text, or other splits, {since}: {remedy}"
    tokenizers = f"then {old['tokenizer']['name']}, now {metadata['tokenizer']['name']}"
    return f"{corpus_name(settings)} has another vocabulary {since} ({tokenizers}): {remedy}"


def _remedy(old: dict, metadata: dict, settings: RunSettings) -> str:
    """Return how to prepare a corpus as it was, with the command if a few flags suffice.

    No command brings back a text that has changed.
    """
    source = old.get("source", {})
    files = source.get("files", [])
    same_settings = all(
        old.get(name) == metadata.get(name) for name in ("train_split_ratio", "seed", "max_length")
    )
    is_text = len(files) == 1 and files[0].get("format") == "text"
    if not (same_settings and is_text) or same_vocabulary(old, metadata):
        return "prepare it as it was"
    flags = ["--corpus", corpus_name(settings), "--tokenizer", old["tokenizer"]["name"]]
    if "url" not in source:
        path = source_path(Path(settings.data_dir) / corpus_name(settings), files[0])
        flags += ["--input", os.path.relpath(path)]
        if files[0].get("division"):
            flags += ["--documents", files[0]["division"]]
    if settings.data_dir != "data":
        flags += ["--data_dir", settings.data_dir]
    return f"prepare it again with python prepare_data.py {shlex.join(flags)}"


def check_finite(value: float, name: str, step: int, run_dir: Path) -> float:
    """Return `value` if it is a finite number; called before anything is saved.

    Args:
        value: A loss, or a sum of weights.
        name: What the value is, for the message.
        step: Optimizer steps done.
        run_dir: Folder of the run.

    Raises:
        ValueError: The value is NaN or infinite.
    """
    if not math.isfinite(value):
        remedy = "start a new run"
        if (run_dir / "last.pt").exists():
            remedy = f"continue from {run_dir}/last.pt, which is good"
        raise ValueError(f"{name} is {value} at step {step}: lower --learning_rate, and {remedy}")
    return value


def check_weights(model: GPT, step: int, run_dir: Path) -> None:
    """Check that all weights are finite, before anything is saved.

    Args:
        model: The model that the run trains.
        step: Optimizer steps done.
        run_dir: Folder of the run.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    total = sum(p.detach().abs().max() for p in model.parameters())
    check_finite(float(total), "a weight", step, run_dir)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Replace `path` once the new file is whole and on the disk.

    An older last.pt becomes previous.pt.

    Args:
        path: The file: last.pt or best.pt.
        checkpoint: Tensors and plain values.

    Raises:
        OSError: The file cannot be written.
    """
    previous_kept = _keep_previous(path) if path.name == "last.pt" else contextlib.nullcontext()
    with previous_kept, atomic_write(path) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as error:  # torch turns a failed write into this
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextlib.contextmanager
def _keep_previous(path: Path) -> Iterator[None]:
    """Keep the old file as previous.pt around a block that replaces `path`.

    previous.pt changes only after the block, so that there are two checkpoints at any time.
    """
    previous = path.with_name("previous.pt")
    older = path.with_name("previous.pt.tmp")
    older.unlink(missing_ok=True)  # a killed run may have left it
    try:
        if path.exists():
            try:
                os.link(path, older)  # another name for the same bytes
            except OSError:  # a file system without links
                shutil.copyfile(path, older)
        yield
        if older.exists():
            os.replace(older, previous)
    finally:
        older.unlink(missing_ok=True)


def remove_unfinished_files(run_dir: Path) -> None:
    """Remove temporary files that a killed process left in a run's folder. Lock the run first."""
    for path in run_dir.glob("*.tmp"):
        path.unlink(missing_ok=True)


def last_checkpoint(run_dir: Path) -> dict:
    """Load the checkpoint to resume from: last.pt or, where last.pt is damaged, previous.pt.

    Args:
        run_dir: Folder of the run.

    Raises:
        FileNotFoundError: The run has no checkpoint.
        ValueError: Both files are damaged, or checkpoints of another program.
    """
    return _load_last(run_dir)[1]


def _load_last(run_dir: Path) -> tuple[Path, dict]:
    """Return (path, checkpoint) of last.pt or, if last.pt is damaged, of previous.pt."""
    last = run_dir / "last.pt"
    previous = run_dir / "previous.pt"
    try:
        return last, load_checkpoint(last)
    except ValueError as error:
        if not previous.exists():
            raise
        checkpoint = load_checkpoint(previous)
        if is_first_rank():
            print(f"{error}\ncontinuing from the checkpoint before it: {previous}")
        return previous, checkpoint


def shared_checkpoint(run_dir: Path, ranks: Ranks) -> dict:
    """Load the checkpoint to resume from: rank 0 chooses, and all ranks load the same one.

    The folder may lie on a disk of each machine: equal checksums make equal checkpoints.

    Args:
        run_dir: Folder of the run.
        ranks: This process among all.

    Raises:
        FileNotFoundError: The run has no checkpoint.
        ValueError: The files of rank 0 are damaged, or another rank lacks the file that rank 0
            chose; the message names the rank.
    """
    chosen: dict = {}

    def choose() -> tuple[str, list]:
        path, checkpoint = _load_last(run_dir)
        chosen.update(checkpoint)
        return path.name, _checksums(path)

    name, checksums = ranks.on_first(choose)

    def load() -> dict:
        if ranks.is_first:
            return chosen
        path = run_dir / name
        checkpoint = load_checkpoint(path)
        if _checksums(path) != checksums:
            raise ValueError(
                f"{path} differs from the checkpoint of rank 0: copy the folder of the run to each "
                f"machine, or name one that all machines share with --out_dir"
            )
        return checkpoint

    return ranks.on_each(load)


def _checksums(path: Path) -> list[tuple[str, int]]:
    """Return the checksum of each part of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        return [(member.filename, member.CRC) for member in archive.infolist()]


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint of train_gpt2.py onto the CPU.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or not a checkpoint of this program.
    """
    try:
        _check_checksums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: "
            + ("nothing was saved" if path.parent.is_dir() else f"there is no folder {path.parent}")
            + ". Name another run, or start a new one."
        ) from None
    except Exception as error:  # torch's reader raises errors of many types
        if isinstance(error, OSError) and error.filename:
            raise  # it cannot be opened
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        has_last = path.name == "best.pt" and (path.parent / "last.pt").exists()
        remedy = "remove it to use last.pt" if has_last else "name another, or start a new run"
        raise ValueError(f"{path} is not a readable checkpoint ({reason[:60]}): {remedy}") from None
    needed = {"step", "best", "model", "model_config", "metadata", "config"}
    if path.name != "best.pt":
        needed |= {"position", "optimizers"}
    if not (isinstance(checkpoint, dict) and needed <= checkpoint.keys() and _is_sound(checkpoint)):
        raise ValueError(f"{path} is not a checkpoint of this version of train_gpt2.py")
    return checkpoint


def _is_sound(checkpoint: dict) -> bool:
    """Return whether weights have the shapes of model_config, and other values their types."""
    try:
        counts = [checkpoint["step"], checkpoint["best"]["step"], checkpoint.get("position", 0)]
        with torch.device("meta"):  # no memory yet: the shape may be anything
            expected = GPT(GPTConfig(**checkpoint["model_config"])).state_dict()
        weights = checkpoint["model"]
        vocab_size = checkpoint["metadata"]["vocab_size"]
        return (
            weights.keys() == expected.keys()
            and all(
                p.shape == expected[name].shape and p.is_contiguous() for name, p in weights.items()
            )
            and 0 < vocab_size <= len(weights[EMBEDDING])
            and isinstance(checkpoint["metadata"]["tokenizer"]["name"], str)
            and isinstance(checkpoint["metadata"]["tokenizer"]["sha256"], str)
            and isinstance(checkpoint["metadata"]["splits"], dict)
            and isinstance(checkpoint["config"], dict)
            and isinstance(checkpoint["best"]["val_loss"], float)
            and all(type(count) is int and count >= 0 for count in counts)
        )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return False


def _check_checksums(path: Path) -> None:
    """Raise BadZipFile if a bit of the file has changed; torch itself compares no checksum."""
    with zipfile.ZipFile(path) as archive:
        # torch writes 0 to external_attr, and no checksum covers it
        changed = (member for member in archive.infolist() if member.external_attr)
        damaged = archive.testzip() or next(changed, None)
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} differs from what was saved")


def best_checkpoint(run: Path) -> dict:
    """Load the best weights of a run: best.pt, or last.pt if the run was never validated.

    Args:
        run: Folder of the run, or a file in it. A checkpoint of the run is loaded itself.

    Raises:
        FileNotFoundError: The run has no checkpoint.
        ValueError: The file is damaged, or not a checkpoint of this program.
    """
    if run.suffix == ".pt" and run.is_file():
        return load_checkpoint(run)
    run_dir = run_of(run)
    best = run_dir / "best.pt"
    return load_checkpoint(best) if best.exists() else last_checkpoint(run_dir)
