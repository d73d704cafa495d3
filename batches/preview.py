"""Shows what a prepared corpus gives, before anything is trained on it.

    python dataset.py tinyshakespeare
    python dataset.py wikitext-2 --split val --sequence_length 256

Prints the first rows of a batch as text, checks that y is x shifted by one, and tells for each form
of batch what is trained on, padded and left out. ║ stands between documents, ░ for padding.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from batches.documents import DocumentDataset, document_ids, pack_documents, pad_documents
from batches.order import ShuffledBatches
from batches.tokens import Tokens
from common.settings import check_ranges, parse_settings
from corpus.metadata import newest_corpus, read_metadata
from corpus.tokenizer import get_tokenizer
from dataset import TextDataset
from training.device import memory_errors

SAMPLE = 100_000_000  # tokens whose documents are looked at


@dataclass
class Config:
    corpus: str = ""  # prepared corpus; "": the one prepared last
    data_dir: str = "data"  # folder of prepared corpora
    split: Literal["train", "val", "test"] = "train"  # part of the corpus
    sequence_length: int = 64  # tokens a row
    batch_size: int = 8  # rows of a batch
    rows: int = 3  # how many of them are shown as text
    seed: int = 0  # of the random order of the rows


LIMITS = {"sequence_length": (1, 1 << 16), "batch_size": (1, 1 << 12)}


@memory_errors("--batch_size or --sequence_length")
def main():
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--corpus")
    config = parse_settings(Config, __doc__)
    check_ranges(config, LIMITS)
    name = config.corpus or newest_corpus(config.data_dir).name
    folder = Path(config.data_dir) / name
    metadata = read_metadata(folder)
    tokenizer = get_tokenizer(metadata["tokenizer"]["name"])
    print(f"{folder}: {tokenizer.name}, {metadata['vocab_size']:,} ids, {metadata['dtype']}")
    for split, of in metadata["splits"].items():
        print(f"  {split:5} {of['tokens']:>14,} tokens {of['documents']:>10,} documents "
              f"{of['bytes'] / of['tokens']:.2f} bytes a token")  # fmt: skip
    tokens = Tokens(folder / config.split)
    show_windows(config, tokens, tokenizer)
    if metadata["eot_per_document"]:
        show_documents(config, tokens.part(0, min(len(tokens), SAMPLE)), tokenizer)


def show_windows(config, tokens, tokenizer) -> None:
    T, B = config.sequence_length, config.batch_size
    data = TextDataset(tokens, T)
    order = ShuffledBatches(len(data), B, config.seed, stride=T)
    x, y = data.__getitems__(order.order(np.arange(B)))
    print(f"\nwindows: x {tuple(x.shape)}, y {tuple(y.shape)}, {x.dtype}; the first of a batch:")
    for row in x[: config.rows]:
        print(f"  {show(tokenizer, row, document_ids(row, tokens.eot_token))}")
    source = torch.from_numpy(tokens.read(order.order(np.arange(B)), T + 1))
    if not (torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y, source[:, 1:])):
        raise ValueError(f"{tokens.path}: y is not x shifted by one")
    print(f"  aligned: y is x shifted by one in all {y.numel():,} places")
    print(f"  an epoch: {len(order):,} batches of {B} x {T}; {sentence(data.account())}")
    loader = DataLoader(data, batch_sampler=order, collate_fn=lambda batch: batch)
    batches, start = 0, time.perf_counter()
    for _ in loader:
        batches += 1
        if (seconds := time.perf_counter() - start) > 0.5:
            break
    print(f"  speed: {batches * B * T / seconds / 1e6:,.1f} million tokens/s through a DataLoader")


def show_documents(config, tokens, tokenizer) -> None:
    T, B = config.sequence_length, config.batch_size
    documents = DocumentDataset(tokens, max_length=T)
    if len(documents) < B:
        return print(f"\n{len(documents)} documents are fewer than a batch")
    plain = ShuffledBatches(len(documents), B, config.seed)
    similar = ShuffledBatches(len(documents), B, config.seed, lengths=documents.lengths)
    batch = pad_documents([documents[i] for i in next(iter(plain))], tokenizer.eot_token)
    shapes = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in batch.items())
    print(f"\ndocuments, padded: {shapes}; the first of a batch:")
    for row, labels in list(zip(batch["input_ids"], batch["labels"]))[: config.rows]:
        print(f"  {show(tokenizer, row, torch.zeros_like(row), labels == -100)}")
    print(f"  {sentence(documents.account())}")
    for order, name in (plain, "in random order"), (similar, "with those of similar length"):
        order.position = 0
        print(f"  {100 * padding(documents.lengths, order):.1f}% padding {name}")
    packed = pack_documents(DocumentDataset(tokens), T)
    print(f"\ndocuments, packed: {len(packed):,} rows of {T}; the first:")
    for row in (packed[i] for i in range(min(config.rows, len(packed)))):
        ids = row["document_ids"]
        print(f"  {show(tokenizer, row['input_ids'], ids, ids == -1)}")
    account = packed.account()
    print(f"  {sentence(account)}, {100 * account['padded'] / (len(packed) * T):.2f}% padding")


def padding(lengths, order) -> float:
    """The share of padding in a pass over batches of documents of these lengths."""
    longest = [lengths[batch].max() * len(batch) for batch in order]
    order.position = 0
    return 1 - sum(lengths[batch].sum() for batch in order) / sum(longest)


def sentence(account: dict[str, int]) -> str:
    return " + ".join(f"{count:,} {name}" for name, count in account.items()) + " tokens"


def show(tokenizer, row, ids, padded=None) -> str:
    """A row as text on one line: ║ between documents, ░ for each padded place."""
    parts = []
    kept = torch.ones_like(row, dtype=torch.bool) if padded is None else ~padded
    for number in ids[kept].unique_consecutive():
        text = tokenizer.decode(row[kept & (ids == number)].tolist())
        parts.append(repr(text)[1:-1])
    return "║".join(parts) + "░" * int((~kept).sum())
