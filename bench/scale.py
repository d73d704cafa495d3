"""How cost grows: tokenizing with the corpus, opening with the split, a step with the model.

    python -m bench.scale --text data/tinyshakespeare/input.txt

Tokenizing: from a .jsonl of short documents to finished shards, whole processes, with one worker,
two, and two on Ray. Opening: ready, first shuffled batch and each after it, of a split in a sparse
file. A step: forward, backward and optimizer, as a share of the matrix-product peak of this
machine, measured in the same run.
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.loader import make as make_split
from bench.loader import ours as batches
from bench.report import RESULTS, ROOT, curves, private_mib, table, whole_process, write
from bench.tokenize import make as make_documents
from bench.tokenize import ours as prepare
from common.script import run
from common.settings import parse_settings
from model import GPT, GPTConfig
from training.device import choose_compile, choose_device, choose_dtype
from training.optimizer import create_optimizer

ENGINES = {  # contestants, and prepare_data.py's flags
    "1 worker": ["--workers", "1"],
    "2 workers": ["--workers", "2"],
    "2 on Ray": ["--workers", "2", "--engine", "ray"],
}


@dataclass
class Settings:
    text: str = ""  # file whose words the documents are made of; "": numbers
    megabytes: tuple[int, ...] = (1, 10, 100, 1000)  # of documents
    tokens: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9, 10**10)  # of a split
    channels: tuple[int, ...] = (64, 128, 256, 512)  # of a model of 4 layers, GPT-2's 768 once
    windows: tuple[int, ...] = (64, 256, 1024)  # tokens
    batches: tuple[int, ...] = (1, 4, 16, 64)  # windows a step
    tokenizer: str = "gpt2"  # of the documents
    rounds: int = 3  # of each
    seconds: float = 2.0  # at least, of each step's timing
    device: str = "cpu"  # of the training step: cpu, cuda
    results: str = RESULTS  # Markdown file to write into; "": none


def main():
    if len(sys.argv) > 2 and sys.argv[1] == "open":
        return open_split(Path(sys.argv[2]))
    config = parse_settings(Settings, __doc__)
    tokenizing(config)
    opening(config)
    training_step(config)


def tokenizing(config) -> None:
    rows, lines = [], {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        for megabytes in config.megabytes:
            make_documents(corpus, megabytes, config.text)
            for name, engine in ENGINES.items():
                flags = [*engine, "--tokenizer", config.tokenizer]
                seconds, mib = [], 0
                for _ in range(config.rounds if megabytes < 1000 else 1):
                    with tempfile.TemporaryDirectory() as out:
                        took, peak, _ = whole_process([*prepare(str(corpus), out, 1), *flags])
                    seconds, mib = [*seconds, took], max(mib, peak)
                took = statistics.median(seconds)
                rows.append((f"{megabytes:,} MB", name, took, megabytes / took, mib))
                lines[name].append((megabytes, took))
    text = (
        f"A .jsonl of documents of about 150 bytes, --tokenizer {config.tokenizer}, whole "
        f"processes, the median of {config.rounds} (1,000 MB: once). MiB: the largest process at "
        "its peak, Ray's own not counted.\n\n"
        + table(["corpus", "", "seconds", "MB/s", "MiB"], rows)
    )
    figure = curves({"tokenizing": lines}, "MB", "seconds")
    write(config.results, "Scale: tokenizing", text, figure)


def opening(config) -> None:
    rows, first, later = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        folders = {}
        for tokens in config.tokens:
            folders[tokens] = Path(folder) / str(tokens)
            folders[tokens].mkdir()
            make_split(folders[tokens], tokens, sparse=True)
        seen = {tokens: [] for tokens in folders}
        for _ in range(config.rounds):
            for tokens, split in folders.items():
                command = [sys.executable, "-m", "bench.scale", "open", split]
                seen[tokens].append(json.loads(whole_process(command, cwd=ROOT)[2]))
    for tokens, measured in seen.items():
        ready, each, mib = (statistics.median(column) for column in zip(*measured))
        rows.append((f"{tokens:,}", ready * 1e3, each * 1e3, mib))
        first.append((tokens, ready * 1e3))
        later.append((tokens, each * 1e3))
    text = (
        "A split in a sparse file, windows of 256 tokens, 32 a batch, shuffled; in a process of "
        f"its own, imports not counted, the median of {config.rounds}. MiB: what isn't page "
        "cache, Python and torch included.\n\n"
        + table(["tokens", "ready with a first batch, ms", "each batch after it, ms", "MiB"], rows)
    )
    lines = {"first batch": first, "each after it": later}
    write(config.results, "Scale: opening", text, curves({"opening": lines}, "tokens", "ms"))


def open_split(folder: Path) -> None:
    """Prints seconds to the first batch, for each of a thousand after another thousand, and MiB."""
    start = time.perf_counter()
    batch = batches(folder)
    batch()
    first = time.perf_counter() - start
    for _ in range(1000):
        batch()
    mib, start = private_mib(), time.perf_counter()
    for _ in range(1000):
        batch()
    print(json.dumps([first, (time.perf_counter() - start) / 1000, mib]))


def training_step(config) -> None:
    """4 layers, one thing changed at a time."""
    dtype = choose_dtype("auto", choose_device(config.device).value).value
    peak = product_peak(config, dtype)
    base = dict(channels=128, window=64, batch=12, vocab_size=257)
    panels, rows = {}, []
    for name, values in (
        ("channels", config.channels), ("window", config.windows), ("batch", config.batches)
    ):  # fmt: skip
        for vocabulary in (257, 50257):
            line = panels.setdefault(name, {}).setdefault(f"{vocabulary:,} ids", [])
            for value in values:
                shape = base | {name: value, "vocab_size": vocabulary}
                speed, flops = step(config, dtype, **shape)
                line.append((value, 100 * flops / peak))
                sizes = [shape["channels"], f"{shape['batch']} x {shape['window']}"]
                rows.append((*sizes, f"{vocabulary:,}", speed, flops / 1e9, 100 * flops / peak))
    dtype_name = str(dtype).removeprefix("torch.")
    head = ["channels", "batch", "ids", "tokens/s", "GFLOP/s", "% of the peak"]
    text = (
        f"A model of 4 layers, heads of 32 channels, {dtype_name}: forward, backward, clipping and "
        "Muon with AdamW; the FLOPs are the model's (PaLM's appendix B), those of the optimizer "
        f"are not counted. The peak, {peak / 1e9:,.0f} GFLOP/s, is that of the best square matrix "
        "product measured just before.\n\n" + table(head, rows)
    )
    title = "Scale: a training step" + (" on a GPU" if config.device == "cuda" else "")
    write(config.results, title, text, curves(panels, "", "% of the peak", log="x"))


def clock(function, seconds: float, device: str) -> float:
    """Seconds a call, the least of several: other processes only ever add to it."""
    times, end = [], time.perf_counter() + seconds
    function()
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def product_peak(config, dtype) -> float:
    """FLOP/s of the best square matrix product."""

    def rate(n):
        a, b = torch.randn(2, n, n, device=config.device).to(dtype)
        return 2 * n**3 / clock(lambda: a @ b, config.seconds, config.device)

    return max(map(rate, (1024, 2048) if config.device == "cpu" else (4096, 8192, 16384)))


def step(config, dtype, channels, window, batch, vocab_size) -> tuple[float, float]:
    """(tokens/s, FLOP/s) of a training step."""
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size, window, n_layer=4, n_head=max(1, channels // 32), n_embd=channels)
    model = GPT(shape).to(config.device)
    optimizers = [create_optimizer(model, "muon", 1e-3, 0.1)]
    compiled = choose_compile("auto", choose_device(config.device).value, 0).value
    forward = torch.compile(model) if compiled else model
    x, y = torch.randint(0, vocab_size, (2, batch, window), device=config.device)

    def one():
        with torch.autocast(config.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            forward(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    speed = batch * window / clock(one, config.seconds, config.device)
    return speed, speed * model.flops_per_token(window)


if __name__ == "__main__":
    run(main)
