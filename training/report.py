"""What a run prints at its start and at its end."""

import shlex
from pathlib import Path

import torch

from common.files import atomic_write
from common.settings import print_settings
from corpus.tokenizer import get_tokenizer
from training.checkpoint import Progress, best_checkpoint, load_model
from training.metrics import plot_losses
from training.run_settings import sequences_per_pass


def print_model(settings, compute, model, ranks) -> None:
    """Print the settings, the choices with their reasons, and the size of model and batch."""
    print_settings(settings)
    for line in compute.lines:
        print(line)
    share = settings.batch_size // ranks.world_size
    micro_batch_size = sequences_per_pass(settings, ranks)
    factors = f"{settings.sequence_length} x {micro_batch_size} sequences"
    if share > micro_batch_size:
        factors += f" x {share // micro_batch_size} accumulation steps"
    if ranks.world_size > 1:
        factors += f" x {ranks.world_size} processes"
    tokens = settings.batch_size * settings.sequence_length
    print(f"{model.num_parameters():,} parameters; {tokens:,} tokens per step = {factors}")


def print_report(
    folder: Path, progress: Progress, settings, metadata: dict, device, complete: bool
) -> None:
    """Print how to resume the run or, if it is complete, a sample and where the files are."""
    quoted = shlex.quote(str(folder))
    if progress.skipped_steps:
        print(f"{progress.skipped_steps} steps were skipped: their gradients were beyond float16")
    if not complete:
        plot_losses(folder)
        print(
            f"stopped at step {progress.step}; continue with: "
            f"python train_gpt2.py --resume {quoted}",
            flush=True,
        )
        return
    if progress.step < settings.max_steps:
        steps = progress.step - progress.best_step
        print(f"no better validation for {steps} steps: ended early")
    print_sample(folder, metadata, device)
    print(f"best validation {progress.best_loss:.4f} nats per token, at step {progress.best_step}")
    names = ", ".join(sorted(path.name for path in folder.glob("[!.]*")))
    print(f"files: {folder}/ ({names})")
    print(f'text:  python sample.py --run {quoted} --prompt "..."')


def print_sample(folder: Path, metadata: dict, device: torch.device) -> None:
    """Print 200 tokens by the run's best weights, and write them to sample.txt."""
    model = load_model(best_checkpoint(folder), device)
    try:
        tokenizer = get_tokenizer(metadata["tokenizer"]["name"])
    except FileNotFoundError as error:  # a run on a machine that has data/ but no vocabulary
        print(f"no sample: {error}")
        return
    # a vocabulary without white space has no ids for it
    ids = tokenizer.encode("\n").tolist() or [tokenizer.eot_token]
    prompt = torch.as_tensor(ids, device=device)[None]
    new = model.generate(prompt, 200, temperature=0.8, top_k=50)
    text = tokenizer.decode([int(token) for token in new])
    with atomic_write(folder / "sample.txt") as f:
        f.write(text.encode())
    print(f"\n{text}\n")
