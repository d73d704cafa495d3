"""Trains a GPT-2 on a corpus that prepare_data.py has prepared.

    python train_gpt2.py                                      # the corpus prepared last
    python train_gpt2.py --max_steps 5000 --dropout 0.2       # every constant below is a flag
    python train_gpt2.py --resume out/mine
    torchrun --standalone --nproc_per_node 2 train_gpt2.py    # several processes

Writes OUT_DIR/RUN/: config.json, metrics.jsonl, loss.png, last.pt, previous.pt, best.pt,
sample.txt.

Exit codes: 0 where the run is at its end (or at stop_at); 130, 138, 143 where a SIGINT, SIGUSR1 or
SIGTERM ended it after a checkpoint, and --resume goes on; 1 for an error. torchrun makes all 1.
"""

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from common.files import folder_name
from common.script import run
from common.settings import check, parse_flags
from corpus.tokenizer import vocabularies_beside
from dataset import newest_corpus
from model import GPT2_SIZES
from training.checkpoint import SHAPE, last_checkpoint
from training.device import choose_device, choose_dtype, join_processes, memory_errors
from training.trainer import Trainer


@dataclass
class Config:
    corpus: str = ""  # prepared corpus; "": the one prepared last
    data_dir: str = "data"  # folder of prepared corpora
    out_dir: str = "out"  # folder of runs
    run_name: str = ""  # name of this run's folder in out_dir; "": corpus, size and a number
    resume: str = ""  # folder of a run to go on with, as it was; auto: run_name's, if there is one
    init_from: str = ""  # weights to start from: gpt2, gpt2-medium, -large, -xl, or a folder
    size: str = "auto"  # tiny, small, gpt2, gpt2-medium, -large, -xl; auto: tiny on a CPU
    n_layer: int | None = None  # blocks; without this flag, and those below: by size
    n_head: int | None = None  # attention heads a block; n_embd is a multiple of it
    n_embd: int | None = None  # channels
    sequence_length: int | None = None  # tokens a window
    dropout: float | None = None  # probability that training leaves a value out; below 1
    replace: float = 0.0  # share of input tokens replaced by random ones, against overfitting
    document_mask: str = "auto"  # true: documents don't see each other; auto: where there are any
    batch_size: int | None = None  # windows a step, over all processes
    micro_batch_size: int | None = None  # windows a forward pass; default: all that a process has
    max_steps: int | None = None  # optimizer steps; default: as many as train_flops pays for
    train_flops: float | None = None  # FLOPs the run may take: 6 a parameter and token
    stop_at: int | None = None  # step to save and stop at, as by Ctrl-C; --resume goes on
    eval_every: int | None = None  # steps between validations, each saved; default: max_steps / 5
    checkpoint_minutes: float = 15.0  # minutes between checkpoints where validations are rarer
    patience: int = 0  # end the run after so many validations without a new best; 0: never
    log_every: int = 10  # steps between lines of metrics.jsonl
    tensorboard: bool = False  # write the numbers of metrics.jsonl for TensorBoard, too
    optimizer: str = "muon"  # muon (for the blocks' matrices, adamw for the rest) or adamw
    learning_rate: float | None = None  # peak; default: by size, and a third of that for adamw
    warmup_steps: int = 100  # steps over which learning_rate rises; at most a tenth of max_steps
    weight_decay: float = 0.1  # times the learning rate, what a step takes off the blocks' matrices
    grad_clip: float = 1.0  # norm that a larger gradient is scaled down to; 0: none is
    seed: int = 0  # where random weights, the order of the data and dropout start
    device: str = "auto"  # cpu, cuda, mps; auto: cuda when there, else cpu
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: what the hardware is made for
    compile: str = "auto"  # true, false; auto: torch.compile on cuda, and where a CPU run repays it


# What a size stands for where no flag says otherwise. tiny is about three minutes of two cores,
# small some minutes of a GPU, pretrained is for --init_from, whose weights have a shape of their
# own; the others are OpenAI's shapes, trained on ten billion tokens and fewer.
SIZES = {
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=128, sequence_length=64, dropout=0.0,
        batch_size=8, train_flops=1e13, learning_rate=1e-2,
    ),
    "small": dict(
        n_layer=6, n_head=6, n_embd=384, sequence_length=256, dropout=0.2,
        batch_size=64, train_flops=2e15, learning_rate=4e-3,
    ),
    "pretrained": dict(
        sequence_length=256, dropout=0.1, batch_size=8, train_flops=3e14, learning_rate=1e-4,
    ),
}  # fmt: skip
for _name, _shape in GPT2_SIZES.items():
    SIZES[_name] = _shape | dict(
        sequence_length=1024, dropout=0.0, batch_size=512, micro_batch_size=16,
        train_flops=8e18, learning_rate=2e-3,
    )  # fmt: skip

FIXED = ("corpus", "init_from", "size", *SHAPE, "sequence_length", "optimizer", "seed")  # --resume
CHOICES = {
    "size": ("auto", *SIZES),
    "optimizer": ("muon", "adamw"),
    "dtype": ("auto", "float32", "bfloat16"),
    "compile": ("auto", "true", "false"),
    "document_mask": ("auto", "true", "false"),
}
AT_LEAST_1 = (
    *SHAPE, "sequence_length", "batch_size", "micro_batch_size", "max_steps", "stop_at",
    "eval_every", "log_every",
)  # fmt: skip
LIMITS = dict.fromkeys(AT_LEAST_1, (1, 2**31 - 1)) | {
    "dropout": (0, 0.999), "replace": (0, 1), "train_flops": (1, math.inf),
}  # fmt: skip
WITHOUT = {"max_steps": ("train_flops",)}


@memory_errors("--micro_batch_size or --sequence_length")
def main() -> int:
    config, checkpoint = configure()
    with join_processes(config.device) as (rank, world_size):
        signum = Trainer(config, checkpoint, rank, world_size).fit()
    return 128 + signum if signum else 0  # as a shell reports a signal


def configure():
    """The constants in use, with "auto" and sizes resolved, and the checkpoint to go on from, or
    None. Raises ValueError for a value that can't be used."""
    config, checkpoint = parse_flags(Config, __doc__), None
    check(config, CHOICES, LIMITS, WITHOUT)
    if config.resume == "auto":  # a job that may have been started before
        folder = Path(config.out_dir) / folder_name(config.run_name, "--run_name")
        if (folder / "last.pt").exists():
            config.resume = str(folder)
    elif config.resume and config.run_name not in ("", Path(config.resume).name):
        raise ValueError(f"--run_name {config.run_name} is another than --resume {config.resume}'s")
    if config.resume not in ("", "auto"):
        folder = Path(config.resume)
        checkpoint = last_checkpoint(folder)
        saved = saved_config(folder, checkpoint["config"])
        config = parse_flags(Config, __doc__, defaults=saved)  # flags given now still win
        check(config, CHOICES, LIMITS)
        for name in FIXED:
            now, then = getattr(config, name), getattr(saved, name)
            if now != then:
                raise ValueError(f"{folder} has {name} {then}: --resume can't change it to {now}")
        config.out_dir, config.run_name = str(folder.parent), folder.name
        config.resume = str(folder)
    config.device = choose_device(config.device)
    config.dtype = choose_dtype(config.dtype, config.device)
    if config.init_from and config.size not in ("auto", "pretrained"):
        raise ValueError(f"--init_from {config.init_from} has a size of its own: leave out --size")
    if config.size == "pretrained" and not config.init_from:
        raise ValueError("size pretrained has no shape of its own: say --init_from, too")
    if config.init_from:
        config.size = "pretrained"
    if config.size == "auto":
        config.size = "tiny" if config.device == "cpu" else "small"
    size = dict(SIZES[config.size])
    if config.optimizer == "adamw":
        size["learning_rate"] /= 3
    if "micro_batch_size" in size:  # the largest number up to it that divides a process's share
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        share = (config.batch_size or size["batch_size"]) // world_size
        most = size["micro_batch_size"]
        size["micro_batch_size"] = max(n for n in range(1, most + 1) if share % n == 0)
    for name, value in size.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if checkpoint and (config.stop_at or math.inf) <= checkpoint["step"]:
        raise ValueError(f"{config.resume} is at step {checkpoint['step']}: stop_at lies behind it")
    config.corpus = config.corpus or newest_corpus(config.data_dir).name
    vocabularies_beside(config.data_dir)
    return config, checkpoint


def saved_config(folder: Path, values: dict) -> Config:
    """The constants of a checkpoint, but for stop_at. Raises ValueError for those of another
    version."""
    types = {f.name: f.type for f in fields(Config)}
    for name, kind in types.items():
        if float in (kind, *get_args(kind)):
            types[name] = kind | int  # as one may write it, say dropout=0
    for name, value in values.items():
        if not isinstance(value, types.get(name, ())):
            raise ValueError(
                f"{folder} was trained with {name} {value!r:.40}, which is no constant of this "
                f"train_gpt2.py: train anew"
            )
    return Config(**values | {"stop_at": None})


if __name__ == "__main__":
    run(main)
