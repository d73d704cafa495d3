"""The training loop: one run, from its constants to its last checkpoint."""

import dataclasses
import itertools
import json
import math
import shlex
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common.files import atomic_write
from common.settings import print_flags
from corpus.tokenizer import get_tokenizer
from dataset import (
    attention_mask,
    create_dataloaders,
    document_ids,
    document_positions,
    read_metadata,
)
from training.checkpoint import best_checkpoint, create_model, load_model, new_run, save_checkpoint
from training.device import StopSignal, choose_compile, memory, peak_flops
from training.metrics import Metrics, plot_losses
from training.optimizer import create_optimizers, load_states


class Trainer:
    """One run: data, model, optimizers and files. fit() takes it to its end, or to a signal.

    config: of train_gpt2.py, with nothing left to choose but what depends on the corpus and the
    run. checkpoint: what last_checkpoint gave for the run, or None for a new one.
    """

    def __init__(self, config, checkpoint, rank: int, world_size: int):
        self.config, self.rank, self.world_size = config, rank, world_size
        self.device = torch.device(config.device)
        corpus_dir, window = Path(config.data_dir) / config.corpus, config.sequence_length
        self.metadata = read_metadata(corpus_dir)
        self.train_loader, self.val_loader = create_dataloaders(
            corpus_dir, window, config.batch_size, config.seed, rank=rank, world_size=world_size,
            replace=config.replace,
        )  # fmt: skip
        share = config.batch_size // world_size  # windows a step on this process
        self.micro_batch_size = config.micro_batch_size or share
        if share % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({config.batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}) times the number of processes ({world_size})"
            )
        needed = least_memory(config, self.metadata["vocab_size"], share, self.micro_batch_size)
        if needed > (there := memory(config.device)):
            raise ValueError(
                f"this run needs at least {needed / 1e9:,.0f} GB of memory, of which there are "
                f"{there / 1e9:,.0f}: lower batch_size, n_layer or n_embd"
            )
        documents = self.metadata["eot_per_document"]
        if config.document_mask == "true" and not documents:
            raise ValueError(f"{config.corpus} is one running text: there is no document to mask")
        self.document_mask = documents and config.document_mask != "false"
        config.document_mask = str(self.document_mask).lower()
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high")  # tf32 on a GPU
        self.model = create_model(config, self.metadata, checkpoint).to(self.device)
        self.shape = self.model.config
        self.optimizers = create_optimizers(
            self.model, config.optimizer, config.learning_rate, config.weight_decay
        )
        self.step, self.position = 0, 0  # optimizer steps and windows behind us
        self.best = {"step": 0, "val_loss": math.inf}
        if checkpoint:
            self.restore(checkpoint)

        flops = 6 * self.model.num_parameters() * config.batch_size * window  # Kaplan et al. 2020
        config.max_steps = config.max_steps or max(1, round(config.train_flops / flops))
        config.eval_every = config.eval_every or math.ceil(config.max_steps / 5)
        compiled = choose_compile(config.compile, config.device, flops * config.max_steps)
        config.compile = str(compiled).lower()  # a resumed run does as this one
        self.parallel = torch.compile(self.model) if compiled else self.model  # same parameters
        if world_size > 1:
            self.parallel = DistributedDataParallel(self.parallel)
        bfloat16 = config.dtype == "bfloat16"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)
        self.folder, self.metrics = Path(config.resume) if checkpoint else None, None
        if rank == 0:  # which alone writes to it
            self.open_folder()
        if world_size > 1:
            folder = [self.folder]
            dist.broadcast_object_list(folder, device=torch.device("cpu"))
            self.folder = folder[0]

    def open_folder(self) -> None:
        """Makes the run's folder, or goes on in it, and shows what is about to happen."""
        config = self.config
        self.folder = self.folder or new_run(config)
        config.run_name = self.folder.name
        self.metrics = Metrics(self.folder, self.step, config.max_steps, config.tensorboard)
        for left in self.folder.glob("*.tmp"):  # by a run that was killed
            left.unlink()
        with atomic_write(self.folder / "config.json") as f:
            f.write(json.dumps(dataclasses.asdict(config), indent=2).encode())
        print_flags(config)
        accumulation = config.batch_size // self.world_size // self.micro_batch_size
        print(
            f"{self.model.num_parameters():,} parameters; "
            f"{config.batch_size * config.sequence_length:,} tokens a step = "
            f"{config.sequence_length} x {self.micro_batch_size} windows"
            + (f" x {accumulation} accumulation steps" if accumulation > 1 else "")
            + (f" x {self.world_size} processes" if self.world_size > 1 else "")
        )

    def fit(self) -> int:
        """Trains until max_steps, stop_at or a signal, whose number it returns (otherwise 0)."""
        config, metrics = self.config, self.metrics
        self.train_loader.batch_sampler.position = self.position
        batches = itertools.chain.from_iterable(itertools.repeat(self.train_loader))  # no end
        tokens, since, self.saved, signum = 0, time.perf_counter(), time.monotonic(), 0
        with StopSignal() as stop:
            with closing(metrics) if metrics else nullcontext():
                done = self.ended()
                while not done:
                    loss = self.train_step(*next(batches))
                    tokens += config.batch_size * config.sequence_length
                    last = self.step == config.max_steps
                    signum = self.any_rank(stop.signum)
                    done = last or self.step == config.stop_at or signum > 0
                    if done or self.step % config.log_every == 0:
                        loss = self.finite(self.sum_over_ranks(loss))  # waits for the device
                        if metrics:
                            speed = tokens / (time.perf_counter() - since)
                            metrics.train(
                                self.step, speed, self.mfu(speed), train_loss=loss,
                                learning_rate=self.learning_rate(self.step - 1),
                            )  # fmt: skip
                        tokens, since = 0, time.perf_counter()
                    if last or self.step % config.eval_every == 0:
                        self.validate(metrics)
                        tokens, since, done = 0, time.perf_counter(), done or self.ended()
                    elif done or time.monotonic() - self.saved > 60 * config.checkpoint_minutes:
                        self.save("last.pt")
                        tokens, since = 0, time.perf_counter()
            if self.rank == 0:  # within the block: schedulers repeat their signal
                self.report()
        return signum

    def ended(self) -> bool:
        """Whether the run has come to max_steps, or has had `patience` validations in a row that
        were no better than the best."""
        worse = (self.step - self.best["step"]) // self.config.eval_every
        return self.step >= self.config.max_steps or 0 < self.config.patience <= worse

    def mfu(self, tokens_per_second: float) -> float | None:
        """The share of the devices' peak that goes into the model; None where no peak is known."""
        if (peak := peak_flops(self.config.device, self.config.dtype)) is None:
            return None
        flops = self.model.flops_per_token(self.config.sequence_length)
        return tokens_per_second * flops / (peak * self.world_size)

    def train_step(self, x, y):
        """One optimizer step on this process's windows: (B, T) ids and targets.

        Returns its part of the loss, a 0-d tensor on the device: cross-entropy in nats summed over
        its targets, divided by the number of targets of all processes.
        """
        y = self.targets(x, y)
        # dropout is a function of the step, so that a resumed run draws the same
        torch.manual_seed((self.config.seed << 32) + self.step * self.world_size + self.rank)
        targets = max(1, self.sum_over_ranks((y != -100).sum()).item())
        pieces = list(zip(x.split(self.micro_batch_size), y.split(self.micro_batch_size)))
        total = torch.zeros((), device=self.device)
        for i, piece in enumerate(pieces):
            add_only = self.world_size > 1 and i < len(pieces) - 1  # the last piece averages
            with self.parallel.no_sync() if add_only else nullcontext():
                loss = self.loss(self.parallel, *piece) / targets
                (loss * self.world_size).backward()  # times: an average over processes is a sum
            total += loss.detach()
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(self.step)
            optimizer.step()
            optimizer.zero_grad()
        self.step, self.position = self.step + 1, self.position + self.config.batch_size
        return total

    def targets(self, x, y):
        """y, -100 where x ends a document and documents are kept apart: nothing foretells what the
        next one begins with."""
        return y.masked_fill(x == self.metadata["eot_token"], -100) if self.document_mask else y

    def loss(self, model, x, y):
        """Cross-entropy in nats, summed over the targets of (B, T) windows; a 0-d tensor."""
        x, y = (ids.to(self.device, non_blocking=True) for ids in (x, y))
        apart = {}
        if self.document_mask:
            ids = document_ids(x, self.metadata["eot_token"])
            dropout = self.shape.dropout > 0 and model.training
            apart = {"positions": document_positions(ids), "mask": attention_mask(ids, dropout)}
        with self.autocast:
            return model(x, y, reduction="sum", **apart)[1]

    def learning_rate(self, step: int) -> float:
        """Linear from 0 to the peak over warmup_steps, then linear to 0 at max_steps."""
        steps, warmup = self.config.max_steps, self.config.warmup_steps
        warmup = min(warmup, steps // 10)
        up, down = (step + 1) / (warmup + 1), (steps - step) / (steps - warmup)
        return self.config.learning_rate * min(up, down)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Nats per token over every token of the validation split but its first (and, where
        documents are kept apart, the first of each): one pass, in fixed order, shared by all
        processes."""
        data, T = self.val_loader.dataset, self.config.sequence_length
        batches = iter(self.val_loader)
        rest = data.num_tokens() - 1 - len(data) * T  # targets behind the last whole block
        if rest and self.rank == 0:
            tokens = torch.from_numpy(data.tokens.read([data.num_tokens() - 1 - T], T + 1))
            x, y = tokens[:, :-1], tokens[:, 1:].clone()
            y[:, :-rest] = -100  # counted already
            batches = itertools.chain(batches, [(x, y)])
        total = torch.zeros(2, dtype=torch.float64)  # nats, targets
        self.model.eval()
        for batch in batches:
            for x, y in zip(*(ids.split(self.micro_batch_size) for ids in batch)):
                y = self.targets(x, y)
                total[0] += self.loss(self.model, x, y).item()
                total[1] += (y != -100).sum()
        self.model.train()
        nats, targets = self.sum_over_ranks(total)
        return self.finite(nats / targets)

    def validate(self, metrics) -> None:
        """Evaluates, and saves what the run has come to."""
        loss, split = self.evaluate(), self.metadata["splits"]["val"]
        if metrics:
            # every byte has to be paid for: tokens that nothing foretells cost what others do
            bits_per_token = loss / math.log(2)
            metrics.validation(self.step, loss, bits_per_token * split["tokens"] / split["bytes"])
            plot_losses(self.folder)
        if loss < self.best["val_loss"]:
            self.best = {"step": self.step, "val_loss": loss}
            self.save("best.pt", resumable=False)
        self.save("last.pt")

    def save(self, name: str, resumable=True) -> None:
        self.saved = time.monotonic()
        self.finite(sum(p.detach().abs().max() for p in self.model.parameters()), "a weight")
        if self.rank != 0:
            return
        checkpoint = {
            "step": self.step,
            "position": self.position,
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
        self.step, self.position = checkpoint["step"], checkpoint["position"]
        self.best = checkpoint["best"]
        self.model.load_state_dict(checkpoint["model"])
        load_states(self.optimizers, checkpoint["optimizers"], self.config.resume)

    def report(self) -> None:
        """The last lines a person sees: a sample and where the files are, or how to go on."""
        folder = shlex.quote(str(self.folder))
        if not self.ended():
            plot_losses(self.folder)
            how = f"python train_gpt2.py --resume {folder} goes on"
            print(f"stopped at step {self.step}; {how}", flush=True)
            return
        if self.step < self.config.max_steps:
            print(f"no better validation for {self.step - self.best['step']} steps: ended early")
        model = load_model(best_checkpoint(self.folder), self.device)
        try:
            tokenizer = get_tokenizer(self.metadata["tokenizer"]["name"])
        except FileNotFoundError as error:  # a run on a machine that only got data/
            print(f"no sample: {error}")
        else:
            prompt = torch.tensor(tokenizer.encode("\n").astype("int64"), device=self.device)[None]
            ids = [i.item() for i in model.generate(prompt, 200, temperature=0.8, top_k=50)]
            text = tokenizer.decode(ids)
            with atomic_write(self.folder / "sample.txt") as f:
                f.write(text.encode())
            print(f"\n{text}\n")
        print(
            f"best validation {self.best['val_loss']:.4f} nats per token, step {self.best['step']}"
        )
        print(f"files: {self.folder}/ ({', '.join(sorted(p.name for p in self.folder.iterdir()))})")
        print(f'text:  python sample.py --run {folder} --prompt "..."')

    def finite(self, value, what="the loss") -> float:
        """A loss as a number. Raises ValueError for NaN or infinity, before anything is saved."""
        if not math.isfinite(value := float(value)):
            good = (self.folder / "last.pt").exists()
            raise ValueError(
                f"{what} is {value} at step {self.step}: lower --learning_rate, and "
                + (f"go on from {self.folder}/last.pt, which is good" if good else "start anew")
            )
        return value

    def sum_over_ranks(self, value):
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def any_rank(self, signum: int) -> int:
        """The signal that any process has seen: all must stop at the same step."""
        signum = torch.tensor(signum)
        if self.world_size > 1:
            dist.all_reduce(signum, dist.ReduceOp.MAX)
        return signum.item()


def least_memory(config, vocab_size: int, share: int, micro_batch_size: int) -> int:
    """Bytes that a process surely needs for `share` windows a step: weights, gradients and
    momentum; ids; and 8 activations a block in bfloat16."""
    L, C, T = config.n_layer or 0, config.n_embd or 0, config.sequence_length  # 0: of init_from
    weights = 12 * L * C * C + (vocab_size + T) * C
    return 12 * weights + 16 * T * (share + micro_batch_size * L * C)
