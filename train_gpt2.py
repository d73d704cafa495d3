"""Trains a GPT-2 on a corpus that prepare_data.py has prepared.

    python train_gpt2.py                                      # the corpus prepared last
    python train_gpt2.py --max_steps 5000 --dropout 0.2       # every constant below is a flag
    python train_gpt2.py --resume out/tinyshakespeare-tiny-1
    torchrun --standalone --nproc_per_node 2 train_gpt2.py    # several processes

Writes OUT_DIR/RUN/: config.json, metrics.jsonl, loss.png, last.pt, best.pt, sample.txt.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import load_checkpoint, load_model, new_run, save_checkpoint
from common import atomic_write, parse_flags, print_flags, run
from dataset import create_dataloaders, newest_corpus, read_metadata
from device import choose_compile, choose_device, choose_dtype, join_processes
from metrics import Metrics, plot_losses
from model import GPT, GPT2_SIZES, GPTConfig
from optimizer import create_optimizers
from tokenizer import get_tokenizer


@dataclass
class Config:
    corpus: str = ""  # prepared corpus; "": the one prepared last
    data_dir: str = "data"  # folder of prepared corpora
    out_dir: str = "out"  # folder of runs
    run_name: str = ""  # of this run's folder in out_dir; "": corpus, size and a number
    resume: str = ""  # folder of a run to go on with; its constants are kept
    size: str = "auto"  # a key of SIZES; auto: tiny on a CPU, small elsewhere
    n_layer: int | None = None  # blocks; None, here and below: by size
    n_head: int | None = None  # attention heads a block; divides n_embd
    n_embd: int | None = None  # channels
    sequence_length: int | None = None  # tokens a window
    dropout: float | None = None  # probability
    batch_size: int | None = None  # windows a step, over all processes
    micro_batch_size: int | None = None  # windows a forward pass; None: all that a process has
    max_steps: int | None = None  # optimizer steps; None: as many as train_flops pays for
    train_flops: float | None = None  # FLOPs, at 6 a parameter and token
    stop_at: int | None = None  # step to save and stop at, as Ctrl-C would; None: never
    eval_every: int | None = None  # steps between validations and checkpoints; None: max_steps / 5
    log_every: int = 10  # steps between lines of metrics.jsonl
    optimizer: str = "muon"  # muon (the blocks' matrices; the rest is AdamW's), adamw
    learning_rate: float | None = None  # peak, the same for both optimizers
    warmup_steps: int = 100  # steps from 0 to the peak; at most a tenth of max_steps
    weight_decay: float = 0.1  # a step, times the learning rate; of the blocks' matrices
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    seed: int = 0  # of weights, order and dropout
    device: str = "auto"  # cpu, cuda, mps; auto: cuda when there, else cpu
    dtype: str = "auto"  # float32, bfloat16 (autocast); auto: what the hardware is made for
    compile: str = "auto"  # true, false; auto: on cuda, and on a CPU where the run repays it


# What a size stands for where no flag says otherwise. tiny is two minutes of two CPU cores, small
# some minutes of a GPU; the others are OpenAI's shapes, trained on ten billion tokens and fewer.
SIZES = {
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=128, sequence_length=64, dropout=0.0,
        batch_size=12, train_flops=6e12, learning_rate=1e-2,
    ),
    "small": dict(
        n_layer=6, n_head=6, n_embd=384, sequence_length=256, dropout=0.2,
        batch_size=64, train_flops=2e15, learning_rate=4e-3,
    ),
}  # fmt: skip
for _name, _shape in GPT2_SIZES.items():
    SIZES[_name] = _shape | dict(
        sequence_length=1024, dropout=0.0, batch_size=512, micro_batch_size=16,
        train_flops=8e18, learning_rate=2e-3,
    )  # fmt: skip


def main() -> int:
    config, checkpoint = configure()
    with join_processes(config.device) as (rank, world_size, device):
        signum = Trainer(config, checkpoint, rank, world_size, device).fit()
        return 128 + signum if signum else 0  # as a shell reports a signal


def configure():
    """The constants in use, with "auto" and sizes resolved, and the checkpoint to go on from, or
    None. Raises ValueError for a value that can't be used."""
    config, checkpoint = parse_flags(Config, __doc__), None
    if config.resume:
        folder = Path(config.resume)
        checkpoint = load_checkpoint(folder / "last.pt")
        saved = Config(**checkpoint["config"] | {"stop_at": None})
        config = parse_flags(Config, __doc__, defaults=saved)  # flags given now still win
        config.out_dir, config.run_name = str(folder.parent), folder.name
        for name in ("corpus", "n_layer", "n_head", "n_embd", "sequence_length", "optimizer"):
            now, then = getattr(config, name), getattr(saved, name)
            if now != then:
                raise ValueError(f"{folder} has {name} {then}: --resume can't change it to {now}")
    config.device = choose_device(config.device)
    config.dtype = choose_dtype(config.dtype, config.device)
    if config.size == "auto":
        config.size = "tiny" if config.device == "cpu" else "small"
    for name, values in {
        "size": SIZES,
        "optimizer": ("muon", "adamw"),
        "dtype": ("float32", "bfloat16"),
        "compile": ("auto", "true", "false"),
    }.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{name} is one of {', '.join(values)}, not {getattr(config, name)}")
    for name, value in SIZES[config.size].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    for name in ("sequence_length", "batch_size", "max_steps", "eval_every", "log_every"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    config.corpus = config.corpus or newest_corpus(config.data_dir).name
    return config, checkpoint


class Trainer:
    """One run: data, model, optimizers and files. fit() takes it to its end, or to a signal."""

    def __init__(self, config: Config, checkpoint, rank: int, world_size: int, device):
        self.config, self.rank, self.world_size, self.device = config, rank, world_size, device
        corpus_dir = Path(config.data_dir) / config.corpus
        self.metadata = read_metadata(corpus_dir)
        window, batch = config.sequence_length, config.batch_size
        self.train_loader, self.val_loader = create_dataloaders(
            corpus_dir, window, batch, config.seed, rank=rank, world_size=world_size
        )
        micro = self.micro_batch_size = config.micro_batch_size or batch // world_size
        if batch % (micro * world_size):
            raise ValueError(
                f"batch_size ({batch}) must be a multiple of micro_batch_size ({micro}) times the "
                f"number of processes ({world_size})"
            )
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # tf32 on a GPU
        shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "dropout")}
        self.shape = GPTConfig(self.metadata["vocab_size"], n_positions=window, **shape)
        self.model = GPT(self.shape).to(device)
        self.optimizers = create_optimizers(
            self.model, config.optimizer, config.learning_rate, config.weight_decay
        )
        self.step, self.best = 0, {"step": 0, "val_loss": math.inf}
        if checkpoint:
            self.restore(checkpoint)

        flops = 6 * self.model.num_parameters() * batch * window  # a step (Kaplan et al. 2020)
        config.max_steps = config.max_steps or max(1, round(config.train_flops / flops))
        config.eval_every = config.eval_every or math.ceil(config.max_steps / 5)
        flops *= config.max_steps - self.step
        compiled = choose_compile(config.compile, config.device, flops)
        self.forward = torch.compile(self.model) if compiled else self.model  # the same parameters
        if world_size > 1:
            self.forward = DistributedDataParallel(self.forward)
        bfloat16 = config.dtype == "bfloat16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
        if rank == 0:
            self.folder = Path(config.resume) if checkpoint else new_run(config)
            config.run_name = self.folder.name
            with atomic_write(self.folder / "config.json") as f:
                f.write(json.dumps(dataclasses.asdict(config), indent=2).encode())
            print_flags(config)
            print(
                f"{device}, {config.dtype}, {'compiled' if compiled else 'not compiled'}; "
                f"{self.model.num_parameters():,} parameters; {batch * window:,} tokens a step = "
                f"{world_size} x {batch // micro // world_size} x {micro} x {window} (processes, "
                f"passes, windows, tokens)"
            )

    def fit(self) -> int:
        """Trains until max_steps, stop_at or a signal, whose number it returns (otherwise 0)."""
        config, stop = self.config, StopSignal()
        metrics = Metrics(self.folder, self.step, config.max_steps) if self.rank == 0 else None
        self.train_loader.batch_sampler.position = self.step * config.batch_size
        batches = itertools.chain.from_iterable(itertools.repeat(self.train_loader))  # no end
        done = self.step >= config.max_steps
        tokens, since = 0, time.perf_counter()
        while not done:
            loss = self.train_step(*next(batches))
            tokens += config.batch_size * config.sequence_length
            last = self.step == config.max_steps
            if self.step % config.log_every == 0 or last:
                loss = self.finite(self.sum_over_ranks(loss))
                if metrics:
                    speed = tokens / (time.perf_counter() - since)
                    metrics.train(self.step, loss, self.learning_rate(self.step - 1), speed)
                tokens, since = 0, time.perf_counter()
            done = last or self.step == config.stop_at or self.any_rank(stop.signum)
            if self.step % config.eval_every == 0 or last:
                self.validate(metrics)
                tokens, since = 0, time.perf_counter()
            elif done:
                self.finite(loss)
                self.save("last.pt")
        if metrics:
            metrics.close()
            self.report()
        return stop.signum

    def train_step(self, x, y):
        """One optimizer step on this process's windows: (B, T) ids and targets.

        Returns its part of the loss, a 0-d tensor on the device: cross-entropy in nats summed over
        its targets, divided by the number of targets of all processes.
        """
        # dropout is a function of the step, so that a resumed run draws the same
        torch.manual_seed((self.config.seed << 32) + self.step * self.world_size + self.rank)
        targets = self.sum_over_ranks((y != -100).sum()).item()
        pieces = list(zip(x.split(self.micro_batch_size), y.split(self.micro_batch_size)))
        total = torch.zeros((), device=self.device)
        for i, piece in enumerate(pieces):
            x, y = (ids.to(self.device, non_blocking=True) for ids in piece)
            add_only = self.world_size > 1 and i < len(pieces) - 1  # the last piece averages
            with self.forward.no_sync() if add_only else contextlib.nullcontext():
                with self.autocast:
                    loss = self.forward(x, y, reduction="sum")[1] / targets
                (loss * self.world_size).backward()  # times: an average over processes is a sum
            total += loss.detach()
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total

    def learning_rate(self, step: int) -> float:
        """Linear from 0 to the peak over warmup_steps, then linear to 0 at max_steps."""
        steps, warmup = self.config.max_steps, self.config.warmup_steps
        warmup = min(warmup, steps // 10)
        up, down = (step + 1) / (warmup + 1), (steps - step) / (steps - warmup)
        return self.config.learning_rate * min(up, down)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Nats per token over every token of the validation split but its first: one pass, in
        fixed order, shared by all processes."""
        data, T = self.val_loader.dataset, self.config.sequence_length
        batches = iter(self.val_loader)
        rest = data.num_tokens - 1 - len(data) * T  # targets behind the last whole block
        if rest and self.rank == 0:
            tokens = torch.from_numpy(data.read([data.num_tokens - 1 - T], T + 1).astype("int64"))
            x, y = tokens[:, :-1], tokens[:, 1:].clone()
            y[:, :-rest] = -100  # counted already
            batches = itertools.chain(batches, [(x, y)])
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        self.model.eval()
        for x, y in batches:
            with self.autocast:
                total += self.model(x.to(self.device), y.to(self.device), reduction="sum")[1]
        self.model.train()
        return self.finite(self.sum_over_ranks(total)) / (data.num_tokens - 1)

    def validate(self, metrics) -> None:
        """Evaluates, and saves what the run has come to."""
        loss, split = self.evaluate(), self.metadata["splits"]["val"]
        if metrics:
            bits_per_token = loss / math.log(2)
            metrics.validation(self.step, loss, bits_per_token * split["tokens"] / split["bytes"])
            plot_losses(self.folder)
        if loss < self.best["val_loss"]:
            self.best = {"step": self.step, "val_loss": loss}
            self.save("best.pt", resumable=False)
        self.save("last.pt")

    def save(self, name: str, resumable=True) -> None:
        if self.rank != 0:
            return
        checkpoint = {
            "step": self.step,
            "best": self.best,
            "config": dataclasses.asdict(self.config),
            "metadata": self.metadata,
            "model_config": dataclasses.asdict(self.shape),
            "model": self.model.state_dict(),
        }
        if resumable:
            checkpoint["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_checkpoint(self.folder / name, checkpoint)

    def restore(self, checkpoint) -> None:
        """Takes over weights, optimizer states and step; constants stay as self.config has them."""
        for name in ("tokenizer", "splits"):
            if checkpoint["metadata"][name] != self.metadata[name]:
                raise ValueError(
                    f"{self.config.corpus} was prepared anew, with another text or vocabulary, "
                    f"since {self.config.resume} was trained on it: prepare it as it was"
                )
        self.step, self.best = checkpoint["step"], checkpoint["best"]
        self.model.load_state_dict(checkpoint["model"])
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizers"]):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})

    def report(self) -> None:
        """The last lines a person sees: a sample and where the files are, or how to go on."""
        plot_losses(self.folder)
        if self.step < self.config.max_steps:
            print(
                f"stopped at step {self.step}; python train_gpt2.py --resume {self.folder} goes on"
            )
            return
        model = load_model(load_checkpoint(self.folder / "best.pt"), self.device)
        try:
            tokenizer = get_tokenizer(self.metadata["tokenizer"]["name"])
        except FileNotFoundError as error:  # a run on a machine that only got data/
            print(f"no sample: {error}")
        else:
            prompt = torch.tensor(tokenizer.encode("\n").astype("int64"), device=self.device)[None]
            ids = [i.item() for i in model.generate(prompt, 200, temperature=0.8, top_k=50)]
            (self.folder / "sample.txt").write_text(tokenizer.decode(ids))
            print(f"\n{tokenizer.decode(ids)}\n")
        print(
            f"best validation {self.best['val_loss']:.4f} nats per token, step {self.best['step']}"
        )
        print(f"files: {self.folder}/ ({', '.join(sorted(p.name for p in self.folder.iterdir()))})")
        print(f'text:  python sample.py --run {self.folder} --prompt "..."')

    def finite(self, loss) -> float:
        """The loss as a number. Raises ValueError for NaN, before anything is saved."""
        loss = float(loss)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: lower learning_rate and start again, or "
                f"--resume from the last checkpoint, which is from before"
            )
        return loss

    def sum_over_ranks(self, value):
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any_rank(self, flag: int) -> bool:
        """Whether any process has seen a signal: all must stop at the same step."""
        return bool(self.sum_over_ranks(torch.tensor(flag)))


class StopSignal:
    """Keeps the number of a SIGINT, SIGTERM or SIGUSR1 that came; a second one ends the program."""

    def __init__(self):
        self.signum = 0
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.note)

    def note(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)


if __name__ == "__main__":
    run(main)
