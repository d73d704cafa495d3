"""How cost grows with size: tokenizing a corpus, opening a split, a training step of a model.

    python -m bench.scale --text data/tinyshakespeare/input.txt

- Tokenizing: a .jsonl of short documents to finished shards, whole processes, with one worker, two
  workers, and two workers on Ray.
- Opening: the time of the first shuffled batch of a split, and of each later batch. The split is a
  sparse file.
- A training step: forward, backward and optimizer, as a share of the peak of matrix products on
  this machine, which is measured in the same run.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bench.loader import make_split
from bench.loader import ours as create_loader
from bench.report import RESULTS, ROOT, curves, private_mib, table, whole_process, write
from bench.tokenize import make_documents, prepare_command
from common.script import run_script
from common.settings import parse_settings
from model import GPT, GPTConfig
from training.device import choose_compile, choose_device, choose_dtype
from training.optimizer import create_optimizer

ENGINES = {  # name -> flags of prepare_data.py
    "1 worker": ["--workers", "1"],
    "2 workers": ["--workers", "2"],
    "2 on Ray": ["--workers", "2", "--engine", "ray"],
}
ONCE_FROM = 1000  # megabytes from which tokenizing is measured once
OPENING_BATCHES = 1000  # batches that are timed, after as many batches that warm up
HEAD_CHANNELS = 32  # channels per attention head
VOCABULARIES = (257, 50257)  # bytes and GPT-2


@dataclass
class Settings:
    text: str = ""  # file whose words make the documents; "": numbered words
    megabytes: tuple[int, ...] = (1, 10, 100, 1000)  # sizes of the .jsonl
    tokens: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9, 10**10)  # sizes of the split
    channels: tuple[int, ...] = (64, 128, 256, 512)  # widths of the model of 4 layers
    windows: tuple[int, ...] = (64, 256, 1024)  # sequence lengths
    batches: tuple[int, ...] = (1, 4, 16, 64)  # sequences per step
    tokenizer: str = "gpt2"  # tokenizer of the documents
    rounds: int = 3  # measurements of each size
    seconds: float = 2.0  # least length of each measurement of a step
    device: Literal["cpu", "cuda"] = "cpu"  # device of the training step
    results: str = RESULTS  # Markdown file to write into; "": none


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "open":  # this process is measured
        open_split(Path(sys.argv[2]))
        return
    settings = parse_settings(Settings, __doc__)
    measure_tokenizing(settings)
    measure_opening(settings)
    measure_steps(settings)


def measure_tokenizing(settings: Settings) -> None:
    """Write the section on tokenizing."""
    rows = []
    lines: dict[str, list] = {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        for megabytes in settings.megabytes:
            make_documents(corpus, megabytes, settings.text)
            rounds = settings.rounds if megabytes < ONCE_FROM else 1
            for name, engine_flags in ENGINES.items():
                flags = [*engine_flags, "--tokenizer", settings.tokenizer]
                times = []
                mib = 0.0
                for _ in range(rounds):
                    with tempfile.TemporaryDirectory() as out:
                        command = [*prepare_command(str(corpus), out, workers=1), *flags]
                        seconds, peak, _ = whole_process(command)
                    times.append(seconds)
                    mib = max(mib, peak)
                median = statistics.median(times)
                rows.append((f"{megabytes:,} MB", name, median, megabytes / median, mib))
                lines[name].append((megabytes, median))
    text = (
        f"A .jsonl of documents of about 150 bytes, --tokenizer {settings.tokenizer}, whole "
        f"processes, the median of {settings.rounds} (1,000 MB: once). MiB: the largest process at "
        "its peak, without Ray's own.\n\n" + table(["corpus", "", "seconds", "MB/s", "MiB"], rows)
    )
    figure = curves({"tokenizing": lines}, "MB", "seconds")
    write(settings.results, "Scale: tokenizing", text, figure)


def measure_opening(settings: Settings) -> None:
    """Write the section on opening a split."""
    measured: dict[int, list] = {num_tokens: [] for num_tokens in settings.tokens}
    with tempfile.TemporaryDirectory() as name:
        splits = {num_tokens: Path(name) / str(num_tokens) for num_tokens in settings.tokens}
        for num_tokens, split in splits.items():
            split.mkdir()
            make_split(split, num_tokens, sparse=True)
        for _ in range(settings.rounds):
            for num_tokens, split in splits.items():
                command = [sys.executable, "-m", "bench.scale", "open", split]
                measured[num_tokens].append(json.loads(whole_process(command, cwd=ROOT)[2]))
    rows = []
    lines: dict[str, list] = {"first batch": [], "each after it": []}
    for num_tokens, values in measured.items():
        first, later, mib = (statistics.median(column) for column in zip(*values))
        rows.append((f"{num_tokens:,}", first * 1e3, later * 1e3, mib))
        lines["first batch"].append((num_tokens, first * 1e3))
        lines["each after it"].append((num_tokens, later * 1e3))
    head = ["tokens", "ready with a first batch, ms", "each batch after it, ms", "MiB"]
    text = (
        "A split in a sparse file, 32 x 256 tokens per batch, shuffled; in its own process, "
        f"without imports, the median of {settings.rounds}. MiB: memory without the page cache, "
        "Python and torch included.\n\n" + table(head, rows)
    )
    figure = curves({"opening": lines}, "tokens", "ms")
    write(settings.results, "Scale: opening", text, figure)


def open_split(folder: Path) -> None:
    """Print [seconds to the first batch, seconds per later batch, MiB] as JSON."""
    start = time.perf_counter()
    next_batch = create_loader(folder)
    next_batch()
    first = time.perf_counter() - start
    for _ in range(OPENING_BATCHES):
        next_batch()
    mib = private_mib()
    start = time.perf_counter()
    for _ in range(OPENING_BATCHES):
        next_batch()
    later = (time.perf_counter() - start) / OPENING_BATCHES
    print(json.dumps([first, later, mib]))


def measure_steps(settings: Settings) -> None:
    """Write the section on a training step of a model of 4 layers; one size changes at a time."""
    dtype = choose_dtype("auto", choose_device(settings.device).value).value
    peak = matmul_peak(settings, dtype)
    default_sizes = {"channels": 128, "window": 64, "batch": 12}
    changes = {
        "channels": settings.channels,
        "window": settings.windows,
        "batch": settings.batches,
    }
    panels: dict[str, dict] = {name: {} for name in changes}
    rows = []
    for name, values in changes.items():
        for vocab_size in VOCABULARIES:
            line = []
            for value in values:
                sizes = default_sizes | {name: value}
                speed, flops = measure_step(settings, dtype, vocab_size=vocab_size, **sizes)
                percent = 100 * flops / peak
                line.append((value, percent))
                batch = f"{sizes['batch']} x {sizes['window']}"
                ids = f"{vocab_size:,}"
                rows.append((sizes["channels"], batch, ids, speed, flops / 1e9, percent))
            panels[name][f"{vocab_size:,} ids"] = line
    dtype_name = str(dtype).removeprefix("torch.")
    head = ["channels", "batch", "ids", "tokens/s", "GFLOP/s", "% of peak"]
    text = (
        f"A model of 4 layers, heads of {HEAD_CHANNELS} channels, {dtype_name}: forward, backward, "
        "clipping and Muon with AdamW. FLOPs are the model's (PaLM, appendix B), without the "
        f"optimizer's. The peak, {peak / 1e9:,.0f} GFLOP/s, is that of the best square matrix "
        "product, measured just before.\n\n" + table(head, rows)
    )
    title = "Scale: a training step"
    if settings.device == "cuda":
        title += " on a GPU"
    write(settings.results, title, text, curves(panels, "", "% of peak", log="x"))


def shortest_call(function: Callable, seconds: float, device: str) -> float:
    """Return the seconds of the fastest of several calls, which other processes slowed least."""
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_peak(settings: Settings, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the best square matrix product."""
    speeds = []
    for n in (1024, 2048) if settings.device == "cpu" else (4096, 8192, 16384):
        a, b = torch.randn(2, n, n, device=settings.device).to(dtype)

        def product(a=a, b=b):
            return a @ b

        speeds.append(2 * n**3 / shortest_call(product, settings.seconds, settings.device))
    return max(speeds)


def measure_step(
    settings: Settings, dtype: torch.dtype, channels: int, window: int, batch: int, vocab_size: int
) -> tuple[float, float]:
    """Return (tokens/s, FLOP/s) of a training step."""
    torch.manual_seed(0)
    n_head = max(1, channels // HEAD_CHANNELS)
    config = GPTConfig(vocab_size, window, n_layer=4, n_head=n_head, n_embd=channels)
    model = GPT(config).to(settings.device)
    optimizer = create_optimizer(model, "muon", 1e-3, 0.1)
    compiled = choose_compile("auto", choose_device(settings.device).value, 0).value
    forward = torch.compile(model) if compiled else model
    x, y = torch.randint(0, vocab_size, (2, batch, window), device=settings.device)

    def step():
        with torch.autocast(settings.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = forward(x, y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    tokens_per_second = batch * window / shortest_call(step, settings.seconds, settings.device)
    return tokens_per_second, tokens_per_second * model.flops_per_token(window)


if __name__ == "__main__":
    run_script(main)
