"""Checkpoints: out/RUN/last.pt to resume from, previous.pt in case that is damaged, best.pt to use.

A checkpoint holds tensors and plain values only, so that torch.load(weights_only=True) reads it:
step, position, best (its step and val_loss), model (weights), model_config, metadata (of the
corpus), config (the settings asked for), chosen (device, dtype, compile); and, but for best.pt,
optimizers (their states), scaler (of float16 gradients) and skipped_steps.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import atomic_write
from model import GPT, GPTConfig
from training.huggingface import EMBEDDING, pretrained_folder

SHAPE_SETTINGS = ("n_layer", "n_head", "n_embd")  # settings that weights from elsewhere decide


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    position: int = 0  # training sequences used
    best_step: int = 0  # step of the best validation
    best_loss: float = math.inf  # its loss, nats per token
    skipped_steps: int = 0  # steps without an update, because of gradients beyond float16


def save(
    path: Path, progress: Progress, *, settings, compute, metadata, model, optimizer=None,
    scaler=None,
) -> None:  # fmt: skip
    """Write a checkpoint; with `optimizer`, one that a run can be resumed from.

    Raises:
        OSError: It cannot be written. An older checkpoint is still whole.
    """
    checkpoint = {
        "step": progress.step,
        "position": progress.position,
        "best": {"step": progress.best_step, "val_loss": progress.best_loss},
        "config": dataclasses.asdict(settings),
        "chosen": compute.saved(),
        "metadata": metadata,
        "model_config": dataclasses.asdict(model.config),
        "model": model.state_dict(),
    }
    if optimizer is not None:
        checkpoint["optimizers"] = optimizer.state_dicts()
        checkpoint["scaler"] = scaler.state_dict()
        checkpoint["skipped_steps"] = progress.skipped_steps
    save_checkpoint(path, checkpoint)


def restore(checkpoint: dict, settings, metadata: dict, model, optimizer, scaler) -> Progress:
    """Load the state of a checkpoint into a run's model, optimizer and gradient scaler.

    Returns:
        How far the run was.

    Raises:
        ValueError: The corpus, or the optimizer, is another one.
    """
    for name in ("tokenizer", "splits"):
        if checkpoint["metadata"][name] != metadata[name]:
            raise ValueError(
                f"{settings.corpus} has another text or vocabulary than when {settings.resume} was "
                f"trained on it: prepare it as it was"
            )
    model.load_state_dict(checkpoint["model"])
    skipped_steps = checkpoint.get("skipped_steps", 0)
    optimizer.load_states(
        checkpoint["optimizers"],
        f"{settings.resume}/last.pt",
        never_stepped=skipped_steps == checkpoint["step"],
    )
    if scaler.is_enabled() and checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    return Progress(
        checkpoint["step"],
        checkpoint["position"],
        checkpoint["best"]["step"],
        checkpoint["best"]["val_loss"],
        skipped_steps,
    )


def check_finite(value: float, what: str, step: int, folder: Path) -> float:
    """Return `value`.

    Raises:
        ValueError: It is NaN or infinite; before anything is saved.
    """
    if not math.isfinite(value):
        remedy = "start a new run"
        if (folder / "last.pt").exists():
            remedy = f"continue from {folder}/last.pt, which is good"
        raise ValueError(f"{what} is {value} at step {step}: lower --learning_rate, and {remedy}")
    return value


def check_weights(model, step: int, folder: Path) -> None:
    """Raise ValueError if a weight is NaN or infinite, before anything is saved."""
    total = sum(p.detach().abs().max() for p in model.parameters())
    check_finite(total.item(), "a weight", step, folder)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Replace `path` once the new file is whole and on the disk.

    An older last.pt becomes previous.pt.

    Raises:
        OSError: It cannot be written.
    """
    keeping = _keep_previous(path) if path.name == "last.pt" else contextlib.nullcontext()
    with keeping, atomic_write(path) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as error:  # torch turns a failed write into this
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextlib.contextmanager
def _keep_previous(path):
    """Around a block that replaces `path`: keep the old file as previous.pt.

    previous.pt changes only after the block, so that there are two checkpoints at any time.
    """
    previous = path.with_name("previous.pt")
    older = path.with_name("previous.pt.tmp")
    older.unlink(missing_ok=True)  # by a run that was killed
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


def last_checkpoint(run: Path) -> dict:
    """Load the checkpoint to resume from: last.pt or, where that is damaged, previous.pt.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Both are damaged, or of another program.
    """
    try:
        return load_checkpoint(run / "last.pt")
    except ValueError as error:
        if not (run / "previous.pt").exists():
            raise
        checkpoint = load_checkpoint(run / "previous.pt")
        if os.environ.get("RANK", "0") == "0":  # one of several processes prints it
            print(f"{error}\ncontinuing from the checkpoint before it: {run}/previous.pt")
        return checkpoint


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint of train_gpt2.py onto the CPU.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is damaged, or not a checkpoint of this program.
    """
    try:
        _check_parts(path)
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


def _is_sound(checkpoint) -> bool:
    """Whether the weights have the shapes of model_config, and other values their types."""
    try:
        numbers = checkpoint["step"], checkpoint["best"]["step"], checkpoint.get("position", 0)
        with torch.device("meta"):  # no memory yet: the shape may be anything
            shapes = GPT(GPTConfig(**checkpoint["model_config"])).state_dict()
        weights, vocab_size = checkpoint["model"], checkpoint["metadata"]["vocab_size"]
        return (
            weights.keys() == shapes.keys()
            and all(
                p.shape == shapes[name].shape and p.is_contiguous() for name, p in weights.items()
            )
            and 0 < vocab_size <= len(weights[EMBEDDING])
            and isinstance(checkpoint["metadata"]["tokenizer"]["name"], str)
            and isinstance(checkpoint["metadata"]["splits"], dict)
            and isinstance(checkpoint["config"], dict)
            and isinstance(checkpoint["best"]["val_loss"], float)
            and all(type(n) is int and n >= 0 for n in numbers)
        )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return False


def _check_parts(path) -> None:
    """Raise BadZipFile where a bit has changed: torch itself checks no checksum."""
    with zipfile.ZipFile(path) as parts:
        # torch writes 0 here, and no checksum covers it
        changed = (part for part in parts.infolist() if part.external_attr)
        damaged = parts.testzip() or next(changed, None)
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} differs from what was saved")


def best_checkpoint(run: Path) -> dict:
    """Load the checkpoint to use of a run: best.pt, or last.pt if it was never validated.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or not a checkpoint of this program.
    """
    best = run / "best.pt"
    return load_checkpoint(best) if best.exists() else last_checkpoint(run)


def load_model(checkpoint: dict, device: torch.device | str = "cpu") -> GPT:
    """Return the model of a checkpoint on `device`, in evaluation mode.

    Rows of the output layer beyond the corpus's vocabulary are cut off.
    """
    vocab_size = checkpoint["metadata"]["vocab_size"]
    weights = dict(checkpoint["model"])
    weights[EMBEDDING] = weights[EMBEDDING][:vocab_size]
    shape = checkpoint["model_config"] | {"vocab_size": vocab_size, "vocab_multiple": 1}
    model = GPT(GPTConfig(**shape))
    model.load_state_dict(weights)
    return model.to(device).eval()


def create_model(settings, metadata: dict, checkpoint: dict | None, device: torch.device) -> GPT:
    """Create the model that a run trains.

    It has the shape of the checkpoint, or the weights of --init_from (whose shape is then filled
    into the settings), or is new.

    Raises:
        ValueError: The weights of --init_from do not fit the corpus or the settings.
        FileNotFoundError: There are no such weights.
        ConnectionError: They cannot be downloaded.
    """
    vocab_size = metadata["vocab_size"]
    T = settings.sequence_length
    if checkpoint:
        shape = checkpoint["model_config"] | {"dropout": settings.dropout}
        return GPT(GPTConfig(**shape))
    # a GPU multiplies faster by multiples of 64
    vocab_multiple = 64 if device.type == "cuda" else 1
    if not settings.init_from:
        shape = {name: getattr(settings, name) for name in (*SHAPE_SETTINGS, "dropout")}
        config = GPTConfig(vocab_size, n_positions=T, vocab_multiple=vocab_multiple, **shape)
        return GPT(config)
    folder = pretrained_folder(settings.init_from, settings.data_dir)
    model = GPT.from_pretrained(folder, settings.dropout, vocab_multiple)
    config = model.config
    if not 0 <= config.vocab_size - vocab_size < 1024:  # a difference that may be padding
        raise ValueError(
            f"{settings.corpus} has {vocab_size:,} ids and {settings.init_from} has "
            f"{config.vocab_size:,}: prepare the corpus with the vocabulary of those weights"
        )
    if config.n_positions < T:
        raise ValueError(
            f"--sequence_length {T} is longer than the {config.n_positions} positions of "
            f"{settings.init_from}: lower it"
        )
    for name in SHAPE_SETTINGS:
        value = getattr(config, name)
        if getattr(settings, name) not in (None, value):
            raise ValueError(f"{settings.init_from} has {name} {value}: leave out --{name}")
        setattr(settings, name, value)
    return model
