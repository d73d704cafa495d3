"""Runs on disk: out/RUN/last.pt to go on from, previous.pt where that is damaged, best.pt to use.

A checkpoint holds tensors and plain values only, so torch.load(weights_only=True) reads it:
step, best (its step and val_loss), model (weights), model_config, metadata (of the corpus), config
(the constants of the run); but for best.pt also position (windows used) and optimizers (their
states).
"""

import contextlib
import itertools
import os
import shutil
import zipfile
from pathlib import Path

import torch

from common.files import atomic_write, folder_name
from model import EMBEDDING, GPT, GPTConfig
from training.huggingface import pretrained_folder

SHAPE = ("n_layer", "n_head", "n_embd")  # constants that weights from elsewhere settle


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Replaces `path` once the new file is whole and on the disk; what a last.pt was is then
    previous.pt. Raises OSError."""
    keep = _kept(path) if path.name == "last.pt" else contextlib.nullcontext()
    with keep, atomic_write(path) as f:
        try:
            torch.save(checkpoint, f)
        except RuntimeError as error:  # what torch makes of a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


@contextlib.contextmanager
def _kept(path):
    """What `path` is before the block that replaces it is previous.pt after it, and not earlier: at
    any time, two checkpoints are there."""
    previous = path.with_name("previous.pt")
    older = path.with_name("previous.pt.tmp")
    older.unlink(missing_ok=True)  # of a run that was killed
    try:
        if path.exists():
            try:
                os.link(path, older)  # another name for the same bytes
            except OSError:  # a file system that can't
                shutil.copyfile(path, older)
        yield
        if older.exists():
            os.replace(older, previous)
    finally:
        older.unlink(missing_ok=True)


def last_checkpoint(run: Path) -> dict:
    """What --resume goes on from: last.pt or, where that is damaged, the one before it. Raises what
    load_checkpoint raises."""
    try:
        return load_checkpoint(run / "last.pt")
    except ValueError as error:
        if not (run / "previous.pt").exists():
            raise
        checkpoint = load_checkpoint(run / "previous.pt")
        if os.environ.get("RANK", "0") == "0":  # one of several processes tells it
            print(f"{error}\ngoing on from the one before: {run}/previous.pt")
        return checkpoint


def load_checkpoint(path: Path) -> dict:
    """Raises FileNotFoundError, or ValueError for what is damaged or no checkpoint of ours."""
    try:
        _check_parts(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} isn't there: "
            + ("nothing was saved" if path.parent.is_dir() else f"there is no folder {path.parent}")
            + ", so name another run, or train anew"
        ) from None
    except Exception as error:  # torch raises whatever its reader stumbles on
        if isinstance(error, OSError) and error.filename:
            raise  # it can't be opened
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        other = path.name == "best.pt" and (path.parent / "last.pt").exists()
        remedy = "remove it, and last.pt is taken" if other else "take another, or train anew"
        raise ValueError(f"{path} is no readable checkpoint ({reason[:60]}): {remedy}") from None
    needed = {"step", "best", "model", "model_config", "metadata", "config"}
    if path.name != "best.pt":
        needed |= {"position", "optimizers"}
    if not (isinstance(checkpoint, dict) and needed <= checkpoint.keys() and _whole(checkpoint)):
        raise ValueError(f"{path} is no checkpoint of train_gpt2.py, or of another version")
    return checkpoint


def _whole(checkpoint) -> bool:
    """Whether it has the weights of the shape that it tells, and all their memory, and plain values
    of the right types."""
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
    """Raises BadZipFile where a bit isn't as it was written: torch looks at no checksum."""
    with zipfile.ZipFile(path) as parts:
        changed = (p for p in parts.infolist() if p.external_attr)  # no CRC has it; torch writes 0
        damaged = parts.testzip() or next(changed, None)
    if damaged:
        raise zipfile.BadZipFile(f"{damaged} isn't what was saved")


def best_checkpoint(run: Path) -> dict:
    """The checkpoint to use of a run: its best, or its last where it was never validated."""
    best = run / "best.pt"
    return load_checkpoint(best) if best.exists() else last_checkpoint(run)


def load_model(checkpoint: dict, device="cpu") -> GPT:
    """The model of a checkpoint, on `device`, ready to generate, without the rows that its
    vocabulary was padded by."""
    vocab_size, weights = checkpoint["metadata"]["vocab_size"], dict(checkpoint["model"])
    weights[EMBEDDING] = weights[EMBEDDING][:vocab_size]
    model = GPT(GPTConfig(**checkpoint["model_config"] | {"vocab_size": vocab_size}))
    model.load_state_dict(weights)
    return model.to(device).eval()


def create_model(config, metadata: dict, checkpoint: dict | None) -> GPT:
    """The model that a run trains: of its checkpoint's shape, or with the weights that
    config.init_from names, or new. Raises ValueError where those weights don't go with the corpus
    or the constants."""
    vocab_size, T = metadata["vocab_size"], config.sequence_length
    if checkpoint:
        return GPT(GPTConfig(**checkpoint["model_config"] | {"dropout": config.dropout}))
    if not config.init_from:
        shape = {name: getattr(config, name) for name in (*SHAPE, "dropout")}
        # a GPU multiplies faster by multiples of 64; the rows beyond are never a target
        padded = -(-vocab_size // 64) * 64 if config.device.startswith("cuda") else vocab_size
        return GPT(GPTConfig(padded, n_positions=T, **shape))
    folder = pretrained_folder(config.init_from, config.data_dir)
    model = GPT.from_pretrained(folder, config.dropout)
    shape = model.config
    if not 0 <= shape.vocab_size - vocab_size < 1024:  # which may be padding
        raise ValueError(
            f"{config.corpus} has {vocab_size:,} ids and {config.init_from} {shape.vocab_size:,}: "
            f"prepare the corpus with the vocabulary of those weights"
        )
    if shape.n_positions < T:
        raise ValueError(
            f"sequence_length ({T}) is longer than the {shape.n_positions} positions of "
            f"{config.init_from}: lower it"
        )
    for name in SHAPE:
        own = getattr(shape, name)
        if getattr(config, name) not in (None, own):
            raise ValueError(f"{config.init_from} has {name} {own}: leave out --{name}")
        setattr(config, name, own)
    return model


def newest_run(out_dir) -> Path:
    """The folder under `out_dir` whose checkpoint was saved last."""
    checkpoints = sorted(Path(out_dir).glob("*/last.pt"), key=os.path.getmtime)
    if not checkpoints:
        raise FileNotFoundError(f"{out_dir}/ has no trained model: run `python train_gpt2.py`")
    return checkpoints[-1].parent


def new_run(config) -> Path:
    """Makes the folder of a new run: out_dir/run_name, or out_dir/corpus-size-1, -2, ...; raises
    FileExistsError rather than take an old one."""
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    numbered = (f"{config.corpus}-{config.size}-{i}" for i in itertools.count(1))
    for name in [folder_name(config.run_name, "--run_name")] if config.run_name else numbered:
        folder = out_dir / name
        try:  # not looked up first: two runs may start at once
            # but a job of a scheduler may have been killed before its first checkpoint
            folder.mkdir(exist_ok=config.resume == "auto")
            return folder
        except FileExistsError:
            continue
    goes_on = f"--resume {folder} goes on with it, " if (folder / "last.pt").exists() else ""
    raise FileExistsError(f"{folder} is there already: {goes_on}another --run_name starts anew")
