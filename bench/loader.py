"""Batches of 32 x 256 tokens from a split of 20 million: ours beside the peers, in one run.

    python -m bench.loader --nanogpt ../nanoGPT --tatm ../tatm
    python -m bench.loader --large true        # a split of 10^10 tokens, in a sparse file

Each contestant gives batches for a second a round, in turn, after a check that what it gives is
what ours gives from the same places. A peer without a checkout (nanoGPT, tatm) is left out.
Needs bench/requirements.txt.
"""

import ast
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from common import parse_flags, run
from dataset import (
    DocumentDataset,
    ShuffledBatches,
    TextDataset,
    create_dataloaders,
    document_ids,
    pad_documents,
)

B, T, EOT = 32, 256, 50256


@dataclass
class Config:
    tokens: int = 20_000_000  # of the split
    nanogpt: str = ""  # checkout of nanoGPT
    tatm: str = ""  # checkout of tatm
    rounds: int = 5  # of each contestant, alternating
    seconds: float = 1.0  # a contestant and round
    large: str = "false"  # true: measure a split of 10^10 tokens instead


def main():
    if len(sys.argv) > 1 and sys.argv[1] == "ready":
        return ready(Path(sys.argv[2]))
    config = parse_flags(Config, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        (measure_large if config.large == "true" else compare)(config, Path(folder))


def make(folder: Path, tokens: int, sparse=False) -> None:
    """A prepared corpus of documents of 20 to 500 tokens; sparse: of zeros, which take no room."""
    splits = {}
    for name, n in (("train", tokens), ("val", 10_000)):
        if sparse:
            with open(folder / f"{name}.bin", "wb") as f:
                f.truncate(2 * n)
        else:
            rng = np.random.default_rng(0)
            ids = rng.integers(0, EOT, n).astype("<u2")
            ends = np.cumsum(rng.integers(20, 500, n // 20))
            ids[ends[ends < n]] = EOT
            ids.tofile(folder / f"{name}.bin")
        splits[name] = {"files": [{"name": f"{name}.bin", "tokens": n}], "tokens": n, "bytes": n}
    metadata = {"format_version": 1, "dtype": "uint16", "vocab_size": EOT + 1, "eot_token": EOT,
                "tokenizer": {"name": "gpt2", "sha256": ""}, "splits": splits}  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata))


# ---- contestants: functions that give a batch, and check themselves first


def endless(loader):
    while True:
        yield from loader


def ours(folder):
    loader, _ = create_dataloaders(folder, T, B)
    return functools.partial(next, endless(loader))


def ours_with_ids(folder):
    batch = ours(folder)
    return lambda: document_ids(batch()[0], EOT)


def ours_padded(folder):
    data = DocumentDataset(folder / "train", max_length=T)
    order = ShuffledBatches(len(data), B)
    loader = DataLoader(data, batch_sampler=order, collate_fn=pad_documents)
    return functools.partial(next, endless(loader))


def nanogpt(folder, checkout):
    """get_batch of its train.py, by itself."""
    tree = ast.parse((Path(checkout) / "train.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "get_batch"]
    scope = dict(np=np, torch=torch, os=os, data_dir=str(folder), block_size=T, batch_size=B,
                 device_type="cpu", device="cpu")  # fmt: skip
    exec(compile(tree, "train.py", "exec"), scope)
    get_batch = functools.partial(scope["get_batch"], "train")
    data = TextDataset(folder / "train", T)
    torch.manual_seed(0)
    x, y = get_batch()
    torch.manual_seed(0)
    same = data.__getitems__(torch.randint(data.num_tokens() - T, (B,)))
    assert torch.equal(x, same[0]) and torch.equal(y, same[1])
    return get_batch


def tatm(folder, checkout):
    """Its memory-mapped dataset, items and document ids stacked to a batch."""
    source = Path(checkout) / "src" / "tatm"
    for name in ("", ".data", ".data.metadata_store"):  # without what only its catalogue needs
        module = sys.modules["tatm" + name] = types.ModuleType("tatm" + name)
        module.__path__ = [str(source.joinpath(*name.split(".")[1:2]))]
    from tatm.data.datasets import TatmMemmapDataset

    data = TatmMemmapDataset(str(folder / "train"), T, eos_token=EOT)
    order = np.random.default_rng(0)

    def batch(indices=None):
        chosen = order.integers(len(data) - 1, size=B) if indices is None else indices
        items = [data[i] for i in chosen]
        ids = torch.stack([item.document_ids for item in items])
        return torch.stack([item.token_ids for item in items]), ids

    x, ids = batch(range(B))
    same, _ = TextDataset(folder / "train", T, stride=T).__getitems__(range(B))
    assert torch.equal(x, same) and torch.equal(ids, document_ids(same, EOT))
    return batch


def transformers(folder, _):
    """DataCollatorForLanguageModeling, padding the same documents."""
    from transformers import DataCollatorForLanguageModeling, GPT2TokenizerFast

    from bench.tokenize import gpt2_files

    tokenizer = GPT2TokenizerFast(*gpt2_files(str(folder)), pad_token="<|endoftext|>")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = DocumentDataset(folder / "train", max_length=T)
    rows = [{"input_ids": data[i].tolist()} for i in range(min(len(data), 2000))]
    expected = pad_documents([data[i] for i in range(B)], EOT)
    found = collate(rows[:B])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    loader = DataLoader(rows, batch_sampler=ShuffledBatches(len(rows), B), collate_fn=collate)
    return functools.partial(next, endless(loader))


def rate(batch, seconds) -> float:
    """Tokens a second: of x, or of rows without their padding."""
    tokens, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        given = batch()
        if isinstance(given, dict) or hasattr(given, "keys"):
            tokens += int(given["attention_mask"].sum())
        else:
            tokens += (given if torch.is_tensor(given) else given[0]).numel()
    return tokens / spent


def compare(config, folder):
    make(folder, config.tokens)
    print(f"{config.tokens:,} tokens, batches of {B} x {T}, torch {torch.__version__}\n")
    contests = [
        ("windows", ours, [("nanoGPT's get_batch", nanogpt, config.nanogpt),
                           ("transformers' padding collator", transformers, "installed")]),
        ("with document ids", ours_with_ids, [("tatm", tatm, config.tatm)]),
        ("padded documents", ours_padded, [("transformers", transformers, "installed")]),
    ]  # fmt: skip
    print("| | | million tokens/s (median) | least to most | ours is faster by |")
    print("|---|---|---|---|---|")
    for what, own, peers in contests:
        contestants = {"ours": own(folder)}
        for name, peer, checkout in peers:
            if checkout:
                contestants[name] = peer(folder, checkout)
        rates = {name: [] for name in contestants}
        for number in range(config.rounds + 1):
            for name, batch in contestants.items():
                measured = rate(batch, config.seconds)
                if number:  # the first warms up
                    rates[name].append(measured / 1e6)
        for name, measured in rates.items():
            median = statistics.median(measured)
            faster = statistics.median(rates["ours"]) / median
            spread = f"{min(measured):.2f} to {max(measured):.2f}"
            print(f"| {what} | {name} | {median:.2f} | {spread} | {faster:.1f} |")
        for name, _, checkout in peers:
            if not checkout:
                print(f"| {what} | {name} | left out: no checkout was given | | |")


def ready(folder) -> None:
    """In a process of its own: seconds to the first batch, and for each of a thousand later ones;
    private memory in MiB (that of the page cache isn't)."""
    start = time.perf_counter()
    batch = ours(folder)
    batch()
    first = time.perf_counter() - start
    for _ in range(1000):
        batch()
    status = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in status if line.startswith("Anonymous"))
    start = time.perf_counter()
    for _ in range(1000):
        batch()
    print(json.dumps([first, (time.perf_counter() - start) / 1000, private / 1024]))


def measure_large(config, folder):
    """10^10 tokens beside config.tokens, alternating."""
    sizes, rows = {"small": config.tokens, "large": 10**10}, {"small": [], "large": []}
    for name, tokens in sizes.items():
        (folder / name).mkdir()
        make(folder / name, tokens, sparse=True)
    for _ in range(config.rounds):
        for name in sizes:
            command = [sys.executable, "-m", "bench.loader", "ready", str(folder / name)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows[name].append(json.loads(output))
    print("| tokens | first shuffled batch, s | a batch after it, ms | private memory, MiB |")
    print("|---|---|---|---|")
    for name, tokens in sizes.items():
        first, later, private = (statistics.median(column) for column in zip(*rows[name]))
        print(f"| {tokens:,} | {first:.3f} | {later * 1e3:.3f} | {private:.0f} |")


if __name__ == "__main__":
    run(main)
