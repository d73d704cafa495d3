"""Training, tokens a second: ours beside nanoGPT, the same model, batch and threads, in one run.

    python -m bench.train --text input.txt --nanogpt ../nanoGPT

Whole processes: train_gpt2.py with what it chooses by itself, and nanoGPT's own train.py, with the
flags of its README for a CPU (not compiled, float32) and compiled, both on the folder that
prepare_data.py wrote. First, both models must give the same loss with the same weights. A step's
time is what each script says of itself, without evaluation, the first five left out.
"""

import json
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from common import parse_flags, run
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # layers, heads, channels, batch, window, tokenizer, steps a round
    "6/6/384, 16 x 256, bytes": (6, 6, 384, 16, 256, "bytes", 20),
    "4/4/128, 12 x 64, GPT-2's vocabulary": (4, 4, 128, 12, 64, "gpt2", 40),
    "4/4/128, 12 x 64, bytes": (4, 4, 128, 12, 64, "bytes", 150),
}
VOCABULARY = {"bytes": 257, "gpt2": 50257}


@dataclass
class Config:
    text: str = ""  # file to train on
    nanogpt: str = ""  # checkout of nanoGPT; "": left out
    rounds: int = 3  # of each contestant, alternating
    device: str = "cpu"  # cpu, cuda


def main():
    config = parse_flags(Config, __doc__)
    if not config.text:
        raise ValueError("say by --text what to train on, say data/tinyshakespeare/input.txt")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for tokenizer, size in VOCABULARY.items():
            flags = ["--input", Path(config.text).resolve(), "--corpus", tokenizer]
            call("prepare_data.py", *flags, "--tokenizer", tokenizer, cwd=folder)
            # where nanoGPT looks for the size of a vocabulary
            (folder / "data" / tokenizer / "meta.pkl").write_bytes(
                pickle.dumps({"vocab_size": size})
            )
        if config.nanogpt:
            for file in Path(config.nanogpt).resolve().glob("*.py"):
                (folder / file.name).symlink_to(file)
        print("| model, batch | | tokens/s (median) | least to most | ours is faster by | MiB |")
        print("|---|---|---|---|---|---|")
        for name, shape in SHAPES.items():
            compare(config, folder, name, shape)


def compare(config, folder, name, shape) -> None:
    contestants = {"ours": ours}
    if config.nanogpt:
        same_loss(config, shape)
        contestants |= {"nanoGPT": nanogpt, "nanoGPT, compiled": compiled_nanogpt}
    speeds, memory = {key: [] for key in contestants}, dict.fromkeys(contestants, 0)
    for _ in range(config.rounds):
        for key, contestant in contestants.items():
            measured, peak = contestant(config, folder, shape)
            speeds[key].append(statistics.median(measured[5:]))
            memory[key] = max(memory[key], peak)
    for key, measured in speeds.items():
        median = statistics.median(measured)
        faster = statistics.median(speeds["ours"]) / median
        spread = f"{min(measured):,.0f} to {max(measured):,.0f}"
        print(f"| {name} | {key} | {median:,.0f} | {spread} | {faster:.2f} | {memory[key]:.0f} |")
    if not config.nanogpt:
        print(f"| {name} | nanoGPT | left out: no --nanogpt was given | | | |")


def call(script, *flags, cwd) -> tuple[str, float]:
    """(what it printed, its peak memory in MiB)."""
    path = script if script == "train.py" else str(ROOT / script)
    with open(Path(cwd) / "printed", "w+") as printed:
        command = [sys.executable, path, *map(str, flags)]
        process = subprocess.Popen(command, cwd=cwd, stdout=printed, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        if process.returncode:
            raise ValueError(f"{script} failed: {printed.read()[-1000:]}")
        return printed.read(), usage.ru_maxrss / 1024


def ours(config, folder, shape):
    """(tokens/s of each step, MiB)"""
    layers, heads, channels, batch, window, tokenizer, steps = shape
    flags = dict(
        corpus=tokenizer, n_layer=layers, n_head=heads, n_embd=channels, batch_size=batch,
        sequence_length=window, max_steps=100_000, stop_at=steps, log_every=1, dropout=0,
        device=config.device,
    )  # fmt: skip
    flags = [part for name, value in flags.items() for part in (f"--{name}", value)]
    _, peak = call("train_gpt2.py", *flags, cwd=folder)
    newest = max(folder.glob("out/*/metrics.jsonl"), key=os.path.getmtime)
    lines = map(json.loads, newest.read_text().splitlines())
    return [line["tokens_per_second"] for line in lines if "tokens_per_second" in line], peak


def nanogpt(config, folder, shape, compiled=False):
    """(tokens/s of each step, MiB)"""
    layers, heads, channels, batch, window, tokenizer, steps = shape
    flags = dict(
        dataset=tokenizer, device=config.device, compile=compiled, n_layer=layers, n_head=heads,
        n_embd=channels, batch_size=batch, block_size=window, max_iters=steps, dropout=0.0,
        bias=True, gradient_accumulation_steps=1, eval_iters=1, eval_interval=10**6, log_interval=1,
    )  # fmt: skip
    printed, peak = call("train.py", *(f"--{k}={v}" for k, v in flags.items()), cwd=folder)
    times = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", printed)]
    return [batch * window / (ms / 1e3) for ms in times], peak


def compiled_nanogpt(config, folder, shape):
    return nanogpt(config, folder, shape, compiled=True)


def same_loss(config, shape) -> None:
    """Asserts that nanoGPT's model with our weights has our loss on one batch."""
    layers, heads, channels, batch, window, tokenizer, _ = shape
    code = (Path(config.nanogpt) / "model.py").read_text()
    theirs_module = {"__name__": "nanogpt"}
    sys.modules.setdefault("nanogpt", type(sys)("nanogpt"))  # their dataclass looks itself up
    exec(compile(code, "nanoGPT's model.py", "exec"), theirs_module)
    sizes = dict(n_layer=layers, n_head=heads, n_embd=channels, vocab_size=VOCABULARY[tokenizer])
    model = GPT(GPTConfig(n_positions=window, **sizes))
    theirs = theirs_module["GPT"](theirs_module["GPTConfig"](block_size=window, **sizes))
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # which is the embedding
    x, y = torch.randint(0, VOCABULARY[tokenizer], (2, batch, window))
    with torch.no_grad():
        losses = [m(x, y)[1].item() for m in (model, theirs)]
    assert abs(losses[0] - losses[1]) < 1e-4, losses


if __name__ == "__main__":
    run(main)
