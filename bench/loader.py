"""Batches of 32 x 256 tokens from a split of 20 million tokens: ours beside other loaders.

    python -m bench.loader --nanogpt ../nanoGPT --tatm ../tatm

The contestants load batches in turns, each in its own process, for one second per round. A check
comes first: the contestant must give the same tokens as ours. A contestant is left out if its
checkout (nanoGPT, tatm) or its package is missing. Needs bench/requirements.txt.
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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from bench.report import RESULTS, bars, contest, contest_table, private_mib, write
from common.script import run_script
from common.settings import parse_settings
from dataset import (
    DocumentDataset,
    ShuffledBatches,
    TextDataset,
    create_dataloaders,
    document_ids,
    pad_documents,
)

B = 32  # sequences per batch
T = 256  # tokens per sequence
EOT = 50256  # end-of-text token
VAL_TOKENS = 10_000


@dataclass
class Settings:
    tokens: int = 20_000_000  # size of the split
    nanogpt: str = ""  # checkout of nanoGPT
    tatm: str = ""  # checkout of tatm
    rounds: int = 5  # measurements of each contestant, after one that warms up
    seconds: float = 1.0  # length of a measurement
    results: str = RESULTS  # Markdown file to write into; "": none


@dataclass
class Contestant:
    """A loader.

    Attributes:
        create: Function (folder of the corpus, checkout) -> a function that returns a batch.
            `create` checks that the tokens are those of ours.
        needs: Package, or setting that names a checkout.
        target: Speedup that ours should reach over this contestant.
    """

    create: Callable[[Path, str], Callable]
    needs: str = "torch"
    target: float | str = ""


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    contests = {}
    left_out = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_split(folder, settings.tokens)
        for contest_name, contestants in CONTESTS.items():
            measures = {}
            targets = {}
            for contestant_name, contestant in contestants.items():
                checkout = getattr(settings, contestant.needs, "")
                if not checkout and not importlib.util.find_spec(contestant.needs):
                    left_out.append(f"{contestant_name} ({contestant.needs} is missing)")
                    continue
                targets[contestant_name] = contestant.target
                measures[contestant_name] = functools.partial(
                    measure, contestant.create, folder, checkout, settings.seconds
                )
            contests[contest_name] = contest(measures, settings.rounds, targets)
    text = (
        f"Batches of {B} x {T} from a split of {settings.tokens:,} tokens in the page cache, each "
        "contestant in its own process. All gave the same tokens as ours (transformers' collator "
        "pads whole documents: the last rows show ours on the same task). MiB: memory without "
        "the page cache, Python and torch included."
        + "".join(f" Left out: {contestant_name}." for contestant_name in left_out)
        + "\n\n"
        + contest_table("form of batch", "million tokens/s", contests)
    )
    write(settings.results, "Batches", text, bars("million tokens/s", contests))


def make_split(folder: Path, num_tokens: int, sparse: bool = False) -> None:
    """Write a prepared corpus of random documents of 20 to 500 tokens.

    Args:
        folder: Folder of the corpus.
        num_tokens: Tokens of train.
        sparse: Whether to write zeros, which take no room on the disk.
    """
    splits = {}
    for name, n in (("train", num_tokens), ("val", VAL_TOKENS)):
        path = folder / f"{name}.bin"
        if sparse:
            with open(path, "wb") as f:
                f.truncate(2 * n)
        else:
            rng = np.random.default_rng(0)
            ids = rng.integers(0, EOT, n).astype("<u2")
            ends = np.cumsum(rng.integers(20, 500, n // 20))
            ids[ends[ends < n]] = EOT
            ids.tofile(path)
        splits[name] = {"files": [{"name": path.name, "tokens": n}], "tokens": n, "bytes": n}
    metadata = {
        "format_version": 1,
        "dtype": "uint16",
        "vocab_size": EOT + 1,
        "eot_token": EOT,
        "eot_per_document": True,
        "tokenizer": {"name": "gpt2", "sha256": ""},
        "splits": splits,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))


# ---- contestants: (folder of the corpus, checkout) -> a function that returns a batch


def repeat(loader):
    """Yield the batches of a loader, pass after pass, without end."""
    while True:
        yield from loader


def check_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that a contestant's tokens are those of ours.

    Raises:
        AssertionError: The tokens differ.
    """
    if not torch.equal(found, expected):
        raise AssertionError("a contestant gives other tokens")


def ours(folder, checkout=""):
    """Create our training loader."""
    train_loader, _ = create_dataloaders(folder, T, B)
    return functools.partial(next, repeat(train_loader))


def ours_with_ids(folder, checkout):
    """Create our training loader, with the document id of each token."""
    next_batch = ours(folder)

    def with_ids():
        x, _ = next_batch()
        return x, document_ids(x, EOT)

    return with_ids


def ours_padded(folder, checkout):
    """Create a loader of our documents, padded to the longest of a batch."""
    data = DocumentDataset(folder / "train", max_length=T)
    order = ShuffledBatches(len(data), B)
    loader = DataLoader(data, batch_sampler=order, collate_fn=pad_documents)
    return functools.partial(next, repeat(loader))


def nanogpt(folder, checkout):
    """Return the function get_batch of nanoGPT's train.py, without the rest of the script."""
    tree = ast.parse((Path(checkout) / "train.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "get_batch"]
    scope = dict(
        np=np, torch=torch, os=os, data_dir=str(folder), block_size=T, batch_size=B,
        device_type="cpu", device="cpu",
    )  # fmt: skip
    exec(compile(tree, "train.py", "exec"), scope)
    get_batch = functools.partial(scope["get_batch"], "train")
    data = TextDataset(folder / "train", T)
    torch.manual_seed(0)
    x, y = get_batch()
    torch.manual_seed(0)
    expected_x, expected_y = data[torch.randint(data.num_tokens() - T, (B,))]
    check_same(x, expected_x)
    check_same(y, expected_y)
    return get_batch


def tatm(folder, checkout):
    """Create batches from tatm's memory-mapped dataset: its items and document ids, stacked."""
    package = Path(checkout) / "src" / "tatm"
    # Empty modules replace tatm's __init__ files, which import packages of its catalog.
    for name in ("", ".data", ".data.metadata_store"):
        module = sys.modules["tatm" + name] = types.ModuleType("tatm" + name)
        module.__path__ = [str(package.joinpath(*name.split(".")[1:2]))]
    from tatm.data.datasets import TatmMemmapDataset

    data = TatmMemmapDataset(str(folder / "train"), T, eos_token=EOT)
    rng = np.random.default_rng(0)

    def next_batch(indices=None):
        if indices is None:
            indices = rng.integers(len(data) - 1, size=B)
        items = [data[i] for i in indices]
        doc_ids = torch.stack([item.document_ids for item in items])
        return torch.stack([item.token_ids for item in items]), doc_ids

    x, doc_ids = next_batch(range(B))
    expected = first_windows(folder)
    check_same(x, expected)
    check_same(doc_ids, document_ids(expected, EOT))
    return next_batch


def transformers(folder, checkout):
    """Create a loader of the same documents, padded by DataCollatorForLanguageModeling."""
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
    check_same(collate(rows[:B])["input_ids"], expected["input_ids"])
    loader = DataLoader(rows, batch_sampler=ShuffledBatches(len(rows), B), collate_fn=collate)
    return functools.partial(next, repeat(loader))


def huggingface(folder, checkout):
    """Create a loader of windows from `datasets`: memory-mapped, without overlap."""
    import datasets

    datasets.disable_progress_bars()
    ids = np.fromfile(folder / "train.bin", "<u2").astype(np.int64)
    windows = ids[: len(ids) // T * T].reshape(-1, T)
    if not (folder / "huggingface").exists():
        datasets.Dataset.from_dict({"input_ids": windows}).save_to_disk(folder / "huggingface")
    data = datasets.load_from_disk(folder / "huggingface").with_format("torch")
    check_same(data[:B]["input_ids"], first_windows(folder))
    loader = DataLoader(data, B, shuffle=True)
    return functools.partial(next, ([batch["input_ids"]] for batch in repeat(loader)))


def litdata(folder, checkout):
    """Create a loader of windows from litdata's StreamingDataset, shuffled, without overlap."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    ids = np.fromfile(folder / "train.bin", "<u2").astype(np.int32)
    arrays = np.array_split(ids[: len(ids) // T * T], 16)
    inputs = [torch.from_numpy(array) for array in arrays]
    output = io.StringIO()
    if not (folder / "litdata").exists():
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            optimize(
                fn=_yield_tokens, inputs=inputs, output_dir=str(folder / "litdata"), num_workers=1,
                chunk_size=T * 4096, item_loader=TokensLoader(), start_method="fork",
            )  # fmt: skip

    def create_dataset(shuffle):
        item_loader = TokensLoader(block_size=T)
        return StreamingDataset(str(folder / "litdata"), item_loader=item_loader, shuffle=shuffle)

    windows = torch.stack([window for window, _ in zip(create_dataset(False), range(B))])
    check_same(windows.long(), first_windows(folder))
    loader = StreamingDataLoader(create_dataset(True), batch_size=B)
    return functools.partial(next, ([batch.long()] for batch in repeat(loader)))


def _yield_tokens(tokens):
    """Yield the tokens of one input, for litdata's optimize()."""
    yield tokens


def stateful(folder, checkout):
    """Create torchdata's StatefulDataLoader of our dataset."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = TextDataset(folder / "train", T)
    order = ShuffledBatches(len(data), B)
    loader = StatefulDataLoader(data, sampler=order, batch_size=None)
    return functools.partial(next, repeat(loader))


def first_windows(folder) -> torch.Tensor:
    """Return the first B windows of the split, without overlap, (B, T)."""
    return TextDataset(folder / "train", T, stride=T)[range(B)][0]


CONTESTS = {  # form of batch -> contestants, ours first
    "windows": {
        "ours": Contestant(ours),
        "ours, in torchdata's StatefulDataLoader": Contestant(stateful, "torchdata"),
        "nanoGPT's get_batch": Contestant(nanogpt, "nanogpt", target=15),
        "litdata, blocks": Contestant(litdata, "litdata"),
        "datasets, blocks": Contestant(huggingface, "datasets"),
        "transformers' padding collator": Contestant(transformers, "transformers", target=50),
    },
    "with document ids": {
        "ours": Contestant(ours_with_ids),
        "tatm": Contestant(tatm, "tatm", target=20),
    },
    "padded documents": {
        "ours": Contestant(ours_padded),
        "transformers": Contestant(transformers, "transformers"),
    },
}


def measure(create, folder: Path, checkout: str, seconds: float) -> tuple[float, float]:
    """Measure a contestant in a new process.

    Returns:
        (speed, memory in MiB). The speed is in million tokens of x per second; padding does not
        count.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_measure, create, folder, checkout, seconds).result()


def _measure(create, folder: Path, checkout: str, seconds: float) -> tuple[float, float]:
    """Measure a contestant in this process."""
    next_batch = create(folder, checkout)
    next_batch()  # the first call is slower: it sets up
    num_tokens = 0
    start = time.perf_counter()
    elapsed = 0.0
    while elapsed < seconds:
        batch = next_batch()
        if hasattr(batch, "keys"):
            num_tokens += int(batch["attention_mask"].sum())
        else:
            num_tokens += batch[0].numel()
        elapsed = time.perf_counter() - start
    return num_tokens / elapsed / 1e6, private_mib()


if __name__ == "__main__":
    run_script(main)
