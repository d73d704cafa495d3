"""Runs on disk: out/RUN/last.pt to go on from, out/RUN/best.pt to use.

A checkpoint holds tensors and plain values only, so torch.load(weights_only=True) reads it:
step, best (its step and val_loss), model (weights), model_config, metadata (of the corpus), config
(the constants of the run), and in last.pt optimizers (their states).
"""

import itertools
import os
import pickle
from pathlib import Path

import torch

from common import atomic_write
from model import GPT, GPTConfig


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Replaces `path` once the new file is whole and on the disk."""
    with atomic_write(path) as f:
        torch.save(checkpoint, f)


def load_checkpoint(path: Path) -> dict:
    """Raises FileNotFoundError, or ValueError for what is damaged or no checkpoint of ours."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} isn't there: no run saved a checkpoint in {path.parent}"
        ) from None
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise ValueError(f"{path} is no readable checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict) or "model_config" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of train_gpt2.py")
    return checkpoint


def load_model(checkpoint: dict, device="cpu") -> GPT:
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


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
    for name in [config.run_name] if config.run_name else numbered:
        try:  # not looked up first: two runs may start at once
            (out_dir / name).mkdir()
            return out_dir / name
        except FileExistsError:
            continue
    raise FileExistsError(
        f"{out_dir / name} is there already: --resume {out_dir / name} goes on with it, another "
        f"--run_name starts anew"
    )
