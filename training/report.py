"""What a run prints at its start and at its end."""

import shlex
from pathlib import Path

import torch

from common.files import atomic_write
from common.settings import print_settings
from model import GPT
from training.checkpoint import Progress, best_checkpoint
from training.compute import ComputeChoices
from training.distributed import Ranks
from training.metrics import plot_losses
from training.models import load_model
from training.report_page import write_report_page
from training.run_settings import RunSettings
from training.sampling import open_sampler

FINAL_SAMPLE = 200  # tokens that the best weights write at the end


def print_model(settings: RunSettings, compute: ComputeChoices, model: GPT, ranks: Ranks) -> None:
    """Print the settings, the choices with their reasons, and the size of model and batch.

    Args:
        settings: After resolve_steps.
        compute: From choose_compute.
        model: The model that the run trains.
        ranks: This process among all.
    """
    print_settings(settings)
    for line in compute.lines:
        print(line)
    share = settings.batch_size // ranks.world_size
    micro_batch_size = compute.micro_batch_size
    factors = f"{settings.sequence_length} x {micro_batch_size} sequences"
    if share > micro_batch_size:
        factors += f" x {share // micro_batch_size} accumulation steps"
    if ranks.world_size > 1:
        factors += f" x {ranks.world_size} processes"
    tokens = settings.batch_size * settings.sequence_length
    print(f"{model.num_parameters():,} parameters; {tokens:,} tokens per step = {factors}")


def print_complete(
    progress: Progress, settings: RunSettings, metadata: dict, device: torch.device
) -> None:
    """Print how to continue a resumed run that was complete already.

    If the run was killed before it wrote its sample, the sample is printed and written first.

    Args:
        progress: How far the run is.
        settings: The settings of the resumed run.
        metadata: Metadata of the corpus.
        device: Device of the run.
    """
    run_dir = Path(settings.resume)
    if not (run_dir / "sample.txt").exists():
        print_sample(run_dir, metadata, device)
    remedy = "--max_steps M"
    if progress.step < settings.max_steps:
        remedy = f"--patience P, above {settings.patience}"
    print(f"{run_dir} is complete at step {progress.step}; continue with {remedy}")


def print_report(
    run_dir: Path,
    progress: Progress,
    settings: RunSettings,
    metadata: dict,
    device: torch.device,
    complete: bool,
) -> None:
    """Print how to resume the run or, if it is complete, a sample and the names of its files.

    Args:
        run_dir: Folder of the run.
        progress: How far the run is.
        settings: After resolve_steps.
        metadata: Metadata of the corpus.
        device: Device of the run.
        complete: Whether the run is complete.
    """
    quoted = shlex.quote(str(run_dir))
    if progress.skipped_steps:
        print(f"{progress.skipped_steps} steps were skipped: their gradients were beyond float16")
    if not complete:
        plot_losses(run_dir)
        print(
            f"stopped at step {progress.step}; continue with: "
            f"python train_gpt2.py --resume {quoted}",
            flush=True,
        )
        return
    if progress.step < settings.max_steps:
        steps = progress.step - progress.best_step
        print(f"no better validation for {steps} steps: ended early")
    print_sample(run_dir, metadata, device)
    print(f"best validation {progress.best_loss:.4f} nats per token, at step {progress.best_step}")
    names = ", ".join(sorted(path.name for path in run_dir.glob("[!.]*")))
    print(f"files: {run_dir}/ ({names})")
    print(f'text:  python sample.py --run {quoted} --prompt "..."')


def print_sample(run_dir: Path, metadata: dict, device: torch.device) -> None:
    """Print about 200 tokens by the run's best weights; write report.html and sample.txt.

    sample.txt is written last: where it exists, the report of the run is complete.

    Args:
        run_dir: Folder of the run.
        metadata: Metadata of the corpus.
        device: Device of the run.
    """
    checkpoint = best_checkpoint(run_dir)
    model = load_model(checkpoint, device)
    sampler = open_sampler(run_dir, metadata, FINAL_SAMPLE)
    text = sampler(model) if sampler else None
    if text is not None:
        print(f"\n{text}\n")
    write_report_page(run_dir, checkpoint, model)
    if text is not None:
        with atomic_write(run_dir / "sample.txt") as f:
            f.write(text.encode())
