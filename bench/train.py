"""Training speed: ours beside nanoGPT, with the same model, batch and threads, in one run.

    python -m bench.train --text data/tinyshakespeare/input.txt --nanogpt ../nanoGPT
    python -m bench.train --text FILE --nanogpt ../nanoGPT --shapes 4/4/128/12/64/bytes/150
    python -m bench.train --text FILE --nanogpt ../nanoGPT --device cuda

Whole processes run on the folder that prepare_data.py wrote: train_gpt2.py with its default device
settings, and nanoGPT's train.py. nanoGPT has its own 50,304 rows for GPT-2's vocabulary. On a CPU
it computes in float32, whatever its --dtype says, and runs three times: as in its README; with
malloc set to keep freed memory, as in train_gpt2.py; and with both this and the compiler. On a GPU,
it runs in bfloat16, compiled. First, both models must give the same loss with the same
weights. The speed is that of the median step, as each script reports it, without validation and
without the first steps.

Matrix products of several sizes are measured before each contestant, in its number type and with
its threads. A share of the peak is the FLOP/s of a step divided by the best of these products.
"""

import functools
import json
import math
import os
import pickle
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from bench.report import (
    RESULTS,
    ROOT,
    as_flags,
    check_text,
    contest,
    each_thread_count,
    format_number,
    table,
    whole_process,
    write,
)
from common.script import run_script
from common.settings import parse_settings
from model import GPT, GPTConfig
from training.device import choose_dtype

FORM = "layers/heads/channels/batch/window/tokenizer/steps"
SHAPES = {  # device -> {shape, in the form of FORM: percent of the peak to reach on one thread}
    "cpu": {
        "6/6/384/16/256/bytes/6": 85,
        "4/4/128/12/64/gpt2/25": 65,
        "4/4/128/12/64/bytes/100": 75,
    },
    "cuda": {"12/12/768/32/1024/gpt2/60": "", "6/6/384/64/256/bytes/200": ""},
}
VOCABULARY = {"bytes": 257, "gpt2": 50257}  # tokenizer -> number of ids
TITLES = {"cpu": "Training on a CPU", "cuda": "Training on a GPU"}
FIRST_STEPS = 3  # steps that warm up and are not counted
KEEP_MEMORY = {  # training.device.keep_freed_memory, for a process that does not call it
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
}
GPU_MATMUL_SIZE = 8192
MATMULS = {  # device -> rows, inner size and columns of the matrix products
    "cpu": ((4096, 384, 1536), (1024, 1024, 1024)),
    "cuda": ((GPU_MATMUL_SIZE,) * 3,),
}


@dataclass
class Settings:
    text: str = ""  # file to train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    rounds: int = 3  # measurements of each contestant, in turns
    device: Literal["cpu", "cuda"] = "cpu"  # device that trains
    shapes: tuple[str, ...] = ()  # layers/heads/channels/batch/window/tokenizer/steps; (): all
    threads: tuple[int, ...] = (1, 2)  # numbers of CPU threads, one contest for each
    results: str = RESULTS  # Markdown file to write into; "": none


class Contestant(NamedTuple):
    """What is measured, and its number type."""

    dtype: torch.dtype
    measure: Callable[[], tuple[float, float]]  # -> (tokens/s of the median step, peak MiB)


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    check_text(settings.text)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes = {text: parse_shape(text) for text in settings.shapes or SHAPES[settings.device]}
        prepare(folder, settings, {shape.tokenizer for shape in shapes.values()})
        for text, shape in shapes.items():
            if settings.nanogpt:
                same_loss(settings, shape)
            for threads in each_thread_count(settings.device, settings.threads):
                target = SHAPES[settings.device].get(text, "") if threads == 1 else ""
                measure_shape(settings, folder, shape, threads, target)


def measure_shape(
    settings: Settings, folder: Path, shape: "Shape", threads: int, target: float | str
) -> None:
    """Write the section on one shape and number of threads."""
    entries = contestants(settings, folder, shape)
    device = torch.device(settings.device)
    flops_per_token = shape.model().flops_per_token(shape.window)
    peaks = dict.fromkeys((entry.dtype for entry in entries.values()), 0.0)  # in FLOP/s

    def measure(entry: Contestant) -> tuple[float, float]:
        for size in MATMULS[device.type]:
            speed = measure_matmul(device, entry.dtype, *size)
            peaks[entry.dtype] = max(peaks[entry.dtype], speed)
        return entry.measure()

    measures = {name: functools.partial(measure, entry) for name, entry in entries.items()}
    rows = contest(measures, settings.rounds, warm=0)
    cells = []
    for row in rows:
        dtype = entries[row.name].dtype
        speed = "{} ({}-{})".format(*map(format_number, (row.median, row.smallest, row.largest)))
        goal = target if row.name.startswith("ours, AdamW") else ""
        share = f"{100 * row.median * flops_per_token / peaks[dtype]:.1f}%"
        goal = f"{goal}%" if goal else ""
        cells.append((row.name, dtype_name(dtype), speed, row.speedup, share, goal, row.mib))
    by_name = {row.name: row.median for row in rows}
    muon = 100 * (1 - by_name["ours"] / by_name["ours, AdamW"])
    head = ["", "numbers", "tokens/s, median (min-max)", "speedup", "of the peak", "target", "MiB"]
    text = (
        "Layers/heads/channels, sequences x tokens, tokenizer. Whole runs of train_gpt2.py with "
        "Muon (its default) or AdamW, and of nanoGPT's train.py, which has AdamW; both models gave "
        f"the same loss with the same weights. Muon takes {muon:.0f}% of a step: the first row "
        "beside the second. The peak of matrix products, the best before any contestant: "
        + ", ".join(
            f"{peak / 1e9:,.0f} GFLOP/s in {dtype_name(dtype)}" for dtype, peak in peaks.items()
        )
        + "."
        + (" Left out: nanoGPT (no --nanogpt was given)." if not settings.nanogpt else "")
        + "\n\n"
        + table(head, cells)
    )
    title = f"{TITLES[settings.device]}: {shape}"
    if settings.device == "cpu":
        title += f", {threads} thread{'s' * (threads > 1)}"
    write(settings.results, title, text)


@dataclass
class Shape:
    """A model, a batch, a tokenizer and the number of steps to time."""

    layers: int
    heads: int
    channels: int
    batch: int
    window: int
    tokenizer: str
    steps: int

    def __str__(self) -> str:
        vocabulary = "GPT-2's vocabulary" if self.tokenizer == "gpt2" else self.tokenizer
        sizes = f"{self.layers}/{self.heads}/{self.channels}"
        return f"{sizes}, {self.batch} x {self.window}, {vocabulary}"

    def model(self) -> GPT:
        """Create the model."""
        sizes = dict(n_layer=self.layers, n_head=self.heads, n_embd=self.channels)
        return GPT(GPTConfig(VOCABULARY[self.tokenizer], self.window, **sizes))


def parse_shape(text: str) -> Shape:
    """Return the shape that a text in the form of FORM describes.

    Example: "4/4/128/12/64/bytes/150".

    Raises:
        ValueError: The text has another form.
    """
    *sizes, tokenizer, steps = text.split("/")
    numbers = [*sizes, steps]
    if len(sizes) != 5 or tokenizer not in VOCABULARY or not all(n.isdigit() for n in numbers):
        raise ValueError(f"{text} is not a shape: write {FORM}")
    return Shape(*map(int, sizes), tokenizer, int(steps))


def prepare(folder: Path, settings, tokenizers: Collection[str]) -> None:
    """Prepare the text for train_gpt2.py and for nanoGPT.

    For each tokenizer, the corpus corpus_of(tokenizer) is the text as a running text, and another
    one, whose name ends in -documents, has its paragraphs as documents. nanoGPT's scripts are
    linked into `folder`.
    """
    for name in tokenizers:
        running = corpus_of(name)
        documents = f"{running}-documents"
        for corpus, flags in ((running, []), (documents, ["--documents", "blank-line"])):
            flags = [*flags, "--input", Path(settings.text).resolve(), "--tokenizer", name]
            command = [sys.executable, ROOT / "prepare_data.py", "--corpus", corpus, *flags]
            whole_process(command, cwd=folder)
        if name == "bytes":  # for GPT-2's vocabulary, nanoGPT takes 50,304 rows by itself
            vocabulary = pickle.dumps({"vocab_size": VOCABULARY[name]})
            (folder / "data" / name / "meta.pkl").write_bytes(vocabulary)
    if settings.nanogpt:
        for script in Path(settings.nanogpt).resolve().glob("*.py"):
            (folder / script.name).symlink_to(script)


def corpus_of(tokenizer: str) -> str:
    """Return the name of the corpus of a tokenizer. Example: "bpe:1024" -> "bpe1024"."""
    return tokenizer.replace(":", "")


# ---- contestants


def contestants(settings: Settings, folder: Path, shape: Shape) -> dict[str, Contestant]:
    """Return the contestants for one shape as name -> contestant, ours first."""
    dtype = choose_dtype("auto", torch.device(settings.device)).value
    peer_dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16

    def run_ours(**flags) -> Callable[[], tuple[float, float]]:
        return functools.partial(ours, settings, folder, shape, **flags)

    def run_nanogpt(**options) -> Callable[[], tuple[float, float]]:
        return functools.partial(nanogpt, settings, folder, shape, **options)

    entries = {
        "ours": Contestant(dtype, run_ours()),
        "ours, AdamW": Contestant(dtype, run_ours(optimizer="adamw")),
    }
    if dtype != peer_dtype:
        name = f"ours, AdamW, {dtype_name(peer_dtype)}"
        flags = {"optimizer": "adamw", "dtype": dtype_name(peer_dtype)}
        entries[name] = Contestant(peer_dtype, run_ours(**flags))
    if settings.nanogpt and settings.device == "cpu":
        keeping = {"env": os.environ | KEEP_MEMORY}
        entries["nanoGPT"] = Contestant(peer_dtype, run_nanogpt())
        entries["nanoGPT, memory kept"] = Contestant(peer_dtype, run_nanogpt(**keeping))
        compiled = run_nanogpt(compiled=True, **keeping)
        entries["nanoGPT, memory kept, compiled"] = Contestant(peer_dtype, compiled)
    elif settings.nanogpt:
        entries["nanoGPT, compiled"] = Contestant(peer_dtype, run_nanogpt(compiled=True))
    return entries


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a number type: "float32"."""
    return str(dtype).removeprefix("torch.")


def ours(settings, folder: Path, shape: Shape, **more_flags) -> tuple[float, float]:
    """Run train_gpt2.py for the steps of the shape and return (tokens/s, peak MiB)."""
    values = dict(
        corpus=shape.tokenizer, n_layer=shape.layers, n_head=shape.heads, dropout=0,
        n_embd=shape.channels, batch_size=shape.batch, sequence_length=shape.window,
        max_steps=100_000, stop_at=shape.steps, log_every=1, device=settings.device,
    ) | more_flags  # fmt: skip
    if settings.device == "cpu":
        values.setdefault("compile", "false")  # what train_gpt2.py chooses for a short run
    command = [sys.executable, ROOT / "train_gpt2.py", *as_flags(values)]
    _, mib, _ = whole_process(command, cwd=folder)
    newest = max(folder.glob("out/*/metrics.jsonl"), key=os.path.getmtime)
    lines = map(json.loads, newest.read_text().splitlines())
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds[FIRST_STEPS:]), mib


def nanogpt(
    settings, folder: Path, shape: Shape, compiled: bool = False, **options
) -> tuple[float, float]:
    """Run nanoGPT's train.py for the steps of the shape and return (tokens/s, peak MiB)."""
    values = dict(
        dataset=shape.tokenizer, device=settings.device, compile=compiled, n_layer=shape.layers,
        n_head=shape.heads, n_embd=shape.channels, batch_size=shape.batch, block_size=shape.window,
        max_iters=shape.steps, dropout=0.0, bias=True, gradient_accumulation_steps=1, eval_iters=1,
        eval_interval=10**6, log_interval=1,
    )  # fmt: skip
    flags = [f"--{name}={value}" for name, value in values.items()]
    _, mib, printed = whole_process([sys.executable, "train.py", *flags], cwd=folder, **options)
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", printed)]
    median_ms = statistics.median(times[FIRST_STEPS:])
    return shape.batch * shape.window / median_ms * 1e3, mib


def measure_matmul(
    device: torch.device, dtype: torch.dtype, rows: int, inner: int, columns: int
) -> float:
    """Return the FLOP/s of a matrix product, the best of 25."""
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(columns, inner, device=device, dtype=dtype)
    best = math.inf
    for _ in range(25):
        start = time.perf_counter()
        a @ b.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns / best


def same_loss(settings, shape: Shape) -> None:
    """Check that nanoGPT's model with our weights has our loss on one batch.

    Raises:
        AssertionError: The losses differ, or nanoGPT's model has other weights.
    """
    namespace = {"__name__": "nanogpt"}
    sys.modules.setdefault("nanogpt", type(sys)("nanogpt"))  # its dataclass looks its module up
    exec((Path(settings.nanogpt) / "model.py").read_text(), namespace)
    model = shape.model()
    vocab_size = VOCABULARY[shape.tokenizer]
    peer_config = namespace["GPTConfig"](
        shape.window, vocab_size, dropout=0.0, n_layer=shape.layers, n_head=shape.heads,
        n_embd=shape.channels,
    )  # fmt: skip
    peer = namespace["GPT"](peer_config)
    missing, unexpected = peer.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:  # the head is the token embedding
        raise AssertionError(f"nanoGPT's model has other weights: {missing}, {unexpected}")
    x, y = torch.randint(0, vocab_size, (2, min(shape.batch, 4), shape.window))
    with torch.no_grad():
        our_loss = model(x, y)[1].item()
        peer_loss = peer(x, y)[1].item()
    if abs(our_loss - peer_loss) >= 1e-4:
        raise AssertionError(f"the losses differ: {our_loss} and nanoGPT's {peer_loss}")


if __name__ == "__main__":
    run_script(main)
