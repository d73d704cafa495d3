"""Train a GPT-2 on a corpus that prepare_data.py has prepared.

    python train_gpt2.py                                      # the corpus prepared last
    python train_gpt2.py --max_steps 5000 --dropout 0.2       # every setting below is a flag
    python train_gpt2.py --resume out/mine
    torchrun --standalone --nproc_per_node 2 train_gpt2.py    # several processes

Writes OUT_DIR/RUN/: config.json, metrics.jsonl, samples.jsonl, loss.png, last.pt, previous.pt,
best.pt, sample.txt, report.html.

Exit codes: 0 when the run is complete (or at stop_at); 129, 130, 138, 143 when SIGHUP, SIGINT,
SIGUSR1 or SIGTERM ended it after a checkpoint, from which --resume continues; 1 for an error; 2 for
an unknown flag or a value of the wrong type. Under torchrun, each code but 0 becomes 1.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from batches.block_mask import document_block_mask
from common.script import run_script
from dataset import (
    create_mixture_dataloaders,
    document_ids,
    document_mask,
    document_positions,
)
from model import GPT2_SIZES
from training.checkpoint import (
    Progress,
    check_finite,
    check_ranks_agree,
    check_weights,
    remove_unfinished_files,
    restore,
    save,
)
from training.compute import (
    ComputeChoices,
    check_batch,
    choose_compute,
    choose_micro_batch_size,
)
from training.corpora import epochs_line, mixture_metadata, read_corpora, validation_metrics
from training.device import (
    Choice,
    choose_device,
    keep_freed_memory,
    memory_errors,
    move_to_device,
)
from training.distributed import Ranks, join_processes
from training.flags import (
    load_settings,
    parse_flags,
    resolve_size,
    resolve_steps,
)
from training.metrics import open_metrics
from training.models import create_model
from training.optimizer import create_optimizer
from training.report import print_complete, print_model, print_report
from training.run_folder import RunLock, run_folder, write_config
from training.run_settings import RunSettings
from training.signals import StopSignal
from training.validation_text import describe_val_text

Size = Literal[
    "auto", "tiny", "small", "pretrained", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
]
Switch = Literal["auto", "true", "false"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TrackerName = Literal["", "tensorboard", "trackio", "wandb"]


@dataclass
class Settings:
    """Every setting is also a flag: --max_steps 100."""

    corpus: tuple[str, ...] = ()  # prepared corpus, or a mixture: a:0.7 b:0.3; default: newest
    data_dir: str = "data"  # folder of prepared corpora
    out_dir: str = "out"  # folder of runs
    run_name: str = ""  # name of this run's folder in out_dir; "": corpus, size and a number
    resume: str = ""  # folder of a run to continue; auto: run_name's, if it has a checkpoint
    init_from: str = ""  # weights to start from: gpt2, gpt2-medium, -large, -xl, a folder or run
    size: Size = "auto"  # what the flags below are by default; auto: tiny on a CPU, else small
    n_layer: int | None = None  # blocks; default: by size
    n_head: int | None = None  # attention heads per block, a divisor of n_embd; default: by size
    n_embd: int | None = None  # channels; default: by size
    sequence_length: int | None = None  # tokens per sequence; default: by size
    dropout: float | None = None  # share of values set to 0 in training; default: by size
    token_noise: float | None = None  # share of input tokens drawn at random; default: by size
    document_mask: Switch = "auto"  # documents do not attend to each other; auto: if any
    batch_size: int | None = None  # sequences per step, over all processes; default: by size
    micro_batch_size: int | None = None  # sequences per forward pass; default: by size
    max_steps: int | None = None  # optimizer steps; default: as many as train_flops allows
    train_flops: float | None = None  # FLOPs of all steps, for max_steps; default: by size
    stop_at: int | None = None  # step to save and stop at, as Ctrl-C does; --resume continues
    eval_every: int | None = None  # steps between validations, each saved; default: max_steps / 5
    checkpoint_minutes: float = 15.0  # minutes between checkpoints where validations are rarer
    patience: int = 0  # validations without a new best that end the run; 0: never
    log_every: int = 10  # steps between lines of metrics.jsonl
    tracker: TrackerName = ""  # write the numbers of metrics.jsonl there, too; "": nowhere else
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: matrices inside the blocks, else adamw
    learning_rate: float | None = None  # peak; default: by size, and a third of that for adamw
    warmup_steps: int = 100  # steps of rising learning rate; at most a tenth of max_steps
    weight_decay: float | None = None  # of the blocks' matrices, as in AdamW; default: by size
    grad_clip: float = 1.0  # gradient norm above which gradients are scaled down; 0: never
    seed: int = 0  # of initial weights, data order, token noise and dropout
    device: str = "auto"  # cpu, cuda, cuda:N, mps; auto: cuda, else mps, else cpu
    dtype: Dtype = "auto"  # of matrix products (autocast); auto: by the hardware
    compile: Switch = "auto"  # torch.compile; auto: where it works and saves time


# Defaults of the settings that depend on the size. tiny takes about two minutes on two cores;
# small is for a GPU. pretrained is for --init_from, whose weights have their own shape. The others
# are OpenAI's shapes, trained on up to ten billion tokens. small reads TinyShakespeare 14 times by
# bytes. Token noise and weight decay reduce overfitting; with twice as many steps it overfits.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        n_layer=4, n_head=4, n_embd=80, sequence_length=64, dropout=0.0, token_noise=0.0,
        batch_size=12, train_flops=1e13, learning_rate=1e-2, weight_decay=0.1,
    ),
    "small": dict(
        n_layer=6, n_head=6, n_embd=384, sequence_length=256, dropout=0.0, token_noise=0.1,
        batch_size=64, train_flops=1e15, learning_rate=4e-3, weight_decay=1.6,
    ),
    "pretrained": dict(
        sequence_length=256, dropout=0.1, token_noise=0.0,
        batch_size=8, train_flops=3e14, learning_rate=1e-4, weight_decay=0.1,
    ),
}  # fmt: skip
for _name, _gpt2_size in GPT2_SIZES.items():
    SIZES[_name] = _gpt2_size | dict(
        sequence_length=1024, dropout=0.0, token_noise=0.0, batch_size=512, micro_batch_size=16,
        train_flops=8e18, learning_rate=2e-3, weight_decay=0.1,
    )  # fmt: skip


def learning_rate(step: int, settings: RunSettings) -> float:
    """Return the learning rate of a step, counted from 0.

    It rises linearly to the peak over the warm-up, and then falls linearly to 0 at max_steps.
    """
    warmup = num_warmup_steps(settings)
    rising = (step + 1) / (warmup + 1)
    falling = (settings.max_steps - step) / (settings.max_steps - warmup)
    return settings.learning_rate * min(rising, falling)


def num_warmup_steps(settings: RunSettings) -> int:
    """Return how many steps the learning rate rises: warmup_steps, at most max_steps / 10."""
    return min(settings.warmup_steps, settings.max_steps // 10)


def print_short_warmup(settings: RunSettings) -> None:
    """Print the length of the warm-up if --warmup_steps asks for a longer one."""
    warmup = num_warmup_steps(settings)
    if settings.warmup_steps not in (warmup, Settings.warmup_steps):  # the default needs no line
        print(
            f"the learning rate rises for {warmup} steps, a tenth of max_steps, instead of "
            f"{settings.warmup_steps} (warmup_steps)"
        )


def compute_loss(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, compute: ComputeChoices
) -> torch.Tensor:
    """Return the cross-entropy in nats, summed over the targets of a micro-batch.

    Args:
        model: A GPT, perhaps compiled or wrapped for several processes.
        x: (B, T) token ids on the CPU.
        y: (B, T) targets on the CPU, -100 where there is no target.
        compute: Device, number type, and whether documents are separate.

    Returns:
        A 0-d tensor on the device.
    """
    mask_kwargs: dict[str, Any] = {}
    if compute.separate_documents:
        doc_ids = document_ids(x, compute.eot_token)
        positions = document_positions(doc_ids)
        x, y, doc_ids, positions = move_to_device((x, y, doc_ids, positions), compute.device)
        if compute.flex_attention:
            mask_kwargs["mask"] = document_block_mask(doc_ids)
        else:
            mask_kwargs["mask"] = document_mask(doc_ids)
        mask_kwargs["positions"] = positions
    else:
        x, y = move_to_device((x, y), compute.device)
    with compute.autocast():
        return model(x, y, reduction="sum", **mask_kwargs)[1]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, val_loader: DataLoader, compute: ComputeChoices, ranks: Ranks
) -> float:
    """Return the validation loss in nats per token: one full pass, in fixed order.

    Every token but the first of the split is predicted once. The ranks divide the batches among
    them.

    Args:
        model: The model, perhaps compiled.
        val_loader: Yields this rank's batches of the validation split.
        compute: From choose_compute.
        ranks: This process among all.
    """
    model.eval()
    nats = 0.0
    num_targets = 0.0
    micro_batch_size = compute.micro_batch_size
    for x, y in validation_batches(val_loader, ranks):
        num_targets += (y != -100).sum().item()
        for rows_x, rows_y in zip(x.split(micro_batch_size), y.split(micro_batch_size)):
            missing = micro_batch_size - len(rows_x)  # one shape, so that it is compiled once
            rows_x = torch.nn.functional.pad(rows_x, (0, 0, 0, missing))
            rows_y = torch.nn.functional.pad(rows_y, (0, 0, 0, missing), value=-100)
            # item(): a small tensor kept per batch would take the beginning of the place that the
            # logits leave, and the next logits would no longer fit there (keep_freed_memory)
            nats += compute_loss(model, rows_x, rows_y, compute).item()
    model.train()
    totals = ranks.sum(torch.tensor([nats, num_targets], dtype=torch.float64))
    return (totals[0] / totals[1]).item()


def validation_batches(
    val_loader: DataLoader, ranks: Ranks
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this rank's batches (x, y); on rank 0, last, the tokens after the last sequence."""
    yield from val_loader
    dataset: Any = val_loader.dataset
    T = dataset.sequence_length
    num_tokens = dataset.num_tokens()
    rest = num_tokens - 1 - len(dataset) * T  # targets after the last whole sequence
    if rest and ranks.is_first:
        tokens = torch.from_numpy(dataset.tokens.read([num_tokens - 1 - T], T + 1))
        x = tokens[:, :-1]
        y = tokens[:, 1:].clone()
        y[:, :-rest] = -100  # counted already
        yield x, y


def train(
    settings: RunSettings, checkpoint: dict | None, device: Choice, ranks: Ranks, lock: RunLock
) -> int:
    """Train until max_steps, stop_at, patience or a signal.

    Args:
        settings: From resolve_size.
        checkpoint: The checkpoint of the run to resume, or None.
        device: From choose_device.
        ranks: This process among all.
        lock: Locks the run, so that no other process trains it.

    Returns:
        The number of the signal that ended the run early, or 0.

    Raises:
        ValueError: A setting does not fit the corpus, the weights or the machine.
        OSError: A file cannot be read or written.
    """
    # --- data: the order is a function of (seed, position), so that it resumes anywhere
    corpora = read_corpora(settings)
    metadata = mixture_metadata(corpora)
    micro_batch_size = choose_micro_batch_size(settings, SIZES, ranks)
    check_batch(settings, metadata, device.value, micro_batch_size, ranks)
    train_loader, val_loaders = create_mixture_dataloaders(
        {corpus.folder: corpus.share for corpus in corpora}, settings.sequence_length,
        settings.batch_size, settings.seed, rank=ranks.rank, world_size=ranks.world_size,
        token_noise=settings.token_noise,
    )  # fmt: skip
    order: Any = train_loader.sampler

    # --- model and optimizer
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")  # tf32 on a GPU
    model = create_model(settings, metadata, checkpoint).to(device.value)
    resolve_steps(settings, model)
    compute = choose_compute(settings, metadata, checkpoint, device, micro_batch_size, model, ranks)
    optimizer = create_optimizer(
        model, settings.optimizer, settings.learning_rate, settings.weight_decay
    )
    scaler: Any = torch.amp.GradScaler(device.value.type, enabled=compute.dtype == torch.float16)
    progress = Progress()
    if checkpoint:
        progress = restore(checkpoint, settings, metadata, model, optimizer, scaler)
    check_ranks_agree(settings, progress, metadata, ranks)
    if checkpoint and is_complete(progress, settings):
        if ranks.is_first:
            remove_unfinished_files(Path(settings.resume))
            print_complete(progress, settings, metadata, device.value)
        return 0
    compiled: Any = torch.compile(model) if compute.compile else model  # shares the parameters
    parallel: Any = compiled
    if ranks.world_size > 1:
        parallel = DistributedDataParallel(
            compiled, process_group=ranks.gradient_group(device.value)
        )

    # --- the run's folder
    run_dir = run_folder(settings, ranks)
    lock.take(run_dir)
    settings.run_name = run_dir.name
    metrics = open_metrics(run_dir, progress, settings, metadata, ranks)
    if ranks.is_first:
        val_text = describe_val_text(corpora)
        write_config(run_dir, settings, compute, model.num_parameters(), val_text)
        print_model(settings, compute, model, ranks)
        print(epochs_line(corpora, order, settings.max_steps * settings.batch_size))
        print_short_warmup(settings)
    contents: dict[str, Any] = dict(
        settings=settings, compute=compute, metadata=metadata, model=model
    )

    def save_last() -> None:
        if ranks.is_first:
            path = run_dir / "last.pt"
            save(path, progress, **contents, optimizer=optimizer, scaler=scaler)

    # --- the loop
    order.position = progress.position
    batches = repeat(train_loader)
    num_targets = settings.batch_size * settings.sequence_length  # per step, over all ranks
    signum = 0
    num_tokens = 0  # trained on since last_log
    last_log = time.perf_counter()
    last_save = time.monotonic()
    with StopSignal() as stop, closing(metrics):
        done = is_complete(progress, settings)
        while not done:
            # forward and backward, one micro-batch after another
            x, y = next(batches)  # (B, T) int64 each: this rank's share of batch_size
            # dropout is a function of the step, so that a resumed run draws the same
            torch.manual_seed((settings.seed << 32) + progress.step * ranks.world_size + ranks.rank)
            micro_batches = list(zip(x.split(micro_batch_size), y.split(micro_batch_size)))
            loss = torch.zeros((), device=compute.device)
            for i, (micro_x, micro_y) in enumerate(micro_batches):
                is_last = i == len(micro_batches) - 1
                if ranks.world_size == 1 or is_last:
                    synchronization = ranks.waiting()  # backward averages over the processes
                else:
                    synchronization = parallel.no_sync()  # backward only adds gradients up
                with synchronization:
                    micro_loss = compute_loss(parallel, micro_x, micro_y, compute) / num_targets
                    # times world_size: an average over processes becomes a sum
                    scaler.scale(micro_loss * ranks.world_size).backward()
                loss += micro_loss.detach()

            # update
            scaler.unscale_(optimizer)
            if settings.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            optimizer.set_learning_rate(learning_rate(progress.step, settings))
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            progress.skipped_steps += scaler.get_scale() < scale  # gradients beyond float16
            optimizer.zero_grad()
            progress.step += 1
            progress.position += settings.batch_size
            num_tokens += num_targets

            # log
            signum = ranks.max(stop.signum)
            at_end = progress.step == settings.max_steps
            done = at_end or progress.step == settings.stop_at or signum > 0
            if done or progress.step % settings.log_every == 0:
                train_loss = ranks.sum(loss).item()
                check_finite(train_loss, "the loss", progress.step, run_dir)
                speed = num_tokens / (time.perf_counter() - last_log)
                rate = learning_rate(progress.step - 1, settings)
                metrics.train(progress, speed, compute.mfu(speed), train_loss, rate)
                num_tokens = 0
                last_log = time.perf_counter()

            # validate and save
            validates = at_end or progress.step % settings.eval_every == 0
            if validates:
                # of each corpus by itself, and of the mixture as a whole
                val_losses = [
                    evaluate(compiled, val_loader, compute, ranks) for val_loader in val_loaders
                ]
                val_metrics = validation_metrics(corpora, val_losses)
                val_loss = val_metrics["val_loss"]
                check_finite(val_loss, "the validation loss", progress.step, run_dir)
                check_weights(model, progress.step, run_dir)
                metrics.validation(progress.step, val_metrics)
                metrics.sample(progress.step, model)
                if val_loss < progress.best_loss:
                    progress.best_step = progress.step
                    progress.best_loss = val_loss
                    if ranks.is_first:
                        save(run_dir / "best.pt", progress, **contents)
                done = done or is_complete(progress, settings)
            overdue = time.monotonic() - last_save > 60 * settings.checkpoint_minutes
            if validates or done or overdue:
                if not validates:
                    check_weights(model, progress.step, run_dir)
                save_last()
                num_tokens = 0  # the speed is that of training alone
                last_log = time.perf_counter()
                last_save = time.monotonic()
        if ranks.is_first:  # schedulers repeat their signal, so this is still within the block
            complete = is_complete(progress, settings)
            print_report(run_dir, progress, settings, metadata, compute.device, complete)
    return 0 if is_complete(progress, settings) else signum


def repeat(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    """Yield the batches of one pass after another, without end."""
    while True:
        yield from loader


def is_complete(progress: Progress, settings: RunSettings) -> bool:
    """Return whether the run is at max_steps, or had `patience` validations without a new best."""
    validations_since_best = (progress.step - progress.best_step) // settings.eval_every
    out_of_patience = 0 < settings.patience <= validations_since_best
    return progress.step >= settings.max_steps or out_of_patience


@memory_errors("--micro_batch_size or --sequence_length")
def main() -> int:
    """Train a run, as the command line says; return the exit code."""
    flags = parse_flags(Settings, __doc__)
    with join_processes() as ranks, RunLock(ranks) as lock:
        settings, checkpoint = load_settings(flags, __doc__, lock)
        device = choose_device(settings.device)
        settings = resolve_size(settings, SIZES, device.value)
        if device.value.type == "cpu":
            keep_freed_memory()
        signum = train(settings, checkpoint, device, ranks, lock)
    return 128 + signum if signum else 0  # as a shell reports a signal


if __name__ == "__main__":
    run_script(main)
