"""Batches of 32 x 256 tokens from a split of 20 million: ours beside the peers, in one run.

    python -m bench.loader --nanogpt ../nanoGPT --tatm ../tatm

Each contestant gives batches for a second a round, in turn, in a process of its own, after a check
that what it gives is what ours gives from the same places. A peer without a checkout (nanoGPT,
tatm) is left out. Needs bench/requirements.txt.
"""

import ast
import contextlib
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from bench.report import RESULTS, bars, contest, contest_table, private_mib, write
from common.script import run
from common.settings import parse_settings
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
class Settings:
    tokens: int = 20_000_000  # of the split
    nanogpt: str = ""  # checkout of nanoGPT
    tatm: str = ""  # checkout of tatm
    rounds: int = 5  # of each contestant, in turn, after one that warms up
    seconds: float = 1.0  # a contestant and round
    results: str = RESULTS  # Markdown file to write into; "": none


def main():
    config = parse_settings(Settings, __doc__)
    groups, left_out, unit = {}, [], "million tokens/s"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make(folder, config.tokens)
        for group, (contestants, goals) in GROUPS.items():
            measures = {}
            for name, (contestant, needs) in contestants.items():
                checkout = getattr(config, needs, "")
                if checkout or importlib.util.find_spec(needs):
                    measures[name] = functools.partial(rate, contestant, folder, checkout, config)
                else:
                    left_out.append(f"{name} ({needs} is not there)")
            groups[group] = contest(measures, config.rounds, goals)
    text = (
        f"Batches of {B} x {T} from a split of {config.tokens:,} tokens in the page cache, each "
        "contestant in a process of its own. Peers were held against ours first: the same tokens "
        "(transformers' collator pads whole documents: what ours does of the same is in the last "
        "rows). MiB: what isn't page cache, Python and torch included."
        + "".join(f" Left out: {peer}." for peer in left_out)
        + "\n\n"
        + contest_table("what", unit, groups)
    )
    write(config.results, "Batches", text, bars(unit, groups))


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


def ours(folder, _=""):
    loader, _ = create_dataloaders(folder, T, B)
    return functools.partial(next, endless(loader))


def ours_with_ids(folder, _):
    batch = ours(folder)

    def with_ids():
        x, _ = batch()
        return x, document_ids(x, EOT)

    return with_ids


def ours_padded(folder, _):
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
    same = data[torch.randint(data.num_tokens() - T, (B,))]
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
    same = windows(folder, range(B))
    assert torch.equal(x, same) and torch.equal(ids, document_ids(same, EOT))
    return batch


def transformers(folder, _):
    """DataCollatorForLanguageModeling, padding the same documents."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    # To pad ids, a tokenizer needs only the id to pad with.
    end_of_text = "<|endoftext|>"
    vocabulary = Tokenizer(WordLevel({end_of_text: EOT}, unk_token=end_of_text))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token=end_of_text)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = DocumentDataset(folder / "train", max_length=T)
    rows = [{"input_ids": data[i].tolist()} for i in range(min(len(data), 2000))]
    expected = pad_documents([data[i] for i in range(B)], EOT)
    found = collate(rows[:B])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    loader = DataLoader(rows, batch_sampler=ShuffledBatches(len(rows), B), collate_fn=collate)
    return functools.partial(next, endless(loader))


def huggingface_blocks(folder, _):
    """Blocks of T tokens from `datasets`, memory-mapped, as torch tensors."""
    import datasets

    datasets.disable_progress_bars()
    ids = np.fromfile(folder / "train.bin", "<u2").astype(np.int64)
    blocks = ids[: len(ids) // T * T].reshape(-1, T)
    if not (folder / "blocks").exists():
        datasets.Dataset.from_dict({"input_ids": blocks}).save_to_disk(folder / "blocks")
    data = datasets.load_from_disk(folder / "blocks").with_format("torch")
    assert torch.equal(data[:B]["input_ids"], windows(folder, range(B)))
    loader = DataLoader(data, B, shuffle=True)
    return functools.partial(next, ([batch["input_ids"]] for batch in endless(loader)))


def litdata(folder, _):
    """Blocks of T tokens from its StreamingDataset, which shuffles them."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    ids = np.fromfile(folder / "train.bin", "<u2").astype(np.int32)
    parts = [torch.from_numpy(part) for part in np.array_split(ids[: len(ids) // T * T], 16)]
    quiet = io.StringIO()
    if not (folder / "litdata").exists():
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            optimize(
                fn=_pass_on, inputs=parts, output_dir=str(folder / "litdata"), num_workers=1,
                chunk_size=T * 4096, item_loader=TokensLoader(), start_method="fork",
            )  # fmt: skip

    def data(shuffle):
        loader = TokensLoader(block_size=T)
        return StreamingDataset(str(folder / "litdata"), item_loader=loader, shuffle=shuffle)

    first = torch.stack([block for block, _ in zip(data(False), range(B))])
    assert torch.equal(first.long(), windows(folder, range(B)))
    loader = StreamingDataLoader(data(True), batch_size=B)
    return functools.partial(next, ([batch.long()] for batch in endless(loader)))


def _pass_on(tokens):
    yield tokens


def stateful(folder, _):
    """Ours, through torchdata's StatefulDataLoader."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = TextDataset(folder / "train", T)
    order = ShuffledBatches(len(data), B)
    loader = StatefulDataLoader(data, sampler=order, batch_size=None)
    return functools.partial(next, endless(loader))


def windows(folder, indices):
    return TextDataset(folder / "train", T, stride=T)[indices][0]


GROUPS = {  # what is compared: {contestant: (its function, what it needs: a package or a
    # checkout)}, ours first, and how many times faster ours should be
    "windows": (
        {
            "ours": (ours, "torch"),
            "ours, in torchdata's StatefulDataLoader": (stateful, "torchdata"),
            "nanoGPT's get_batch": (nanogpt, "nanogpt"),
            "litdata, blocks": (litdata, "litdata"),
            "datasets, blocks": (huggingface_blocks, "datasets"),
            "transformers' padding collator": (transformers, "transformers"),
        },
        {"nanoGPT's get_batch": 15, "transformers' padding collator": 50},
    ),
    "with document ids": ({"ours": (ours_with_ids, "torch"), "tatm": (tatm, "tatm")}, {"tatm": 20}),
    "padded documents": (
        {"ours": (ours_padded, "torch"), "transformers": (transformers, "transformers")},
        {},
    ),
}


def rate(contestant, folder, checkout, config) -> tuple[float, float]:
    """(million tokens a second: of x, or of rows without their padding; MiB), in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_rate, contestant, folder, checkout, config.seconds).result()


def _rate(contestant, folder, checkout, seconds):
    batch = contestant(folder, checkout)
    batch()  # whatever is made once
    tokens, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        given = batch()
        tokens += int(given["attention_mask"].sum()) if hasattr(given, "keys") else given[0].numel()
    return tokens / spent / 1e6, private_mib()


if __name__ == "__main__":
    run(main)
