"""The preview of a corpus (`python dataset.py NAME`): rows as text, token counts, speed."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch.utils.data import DataLoader, Dataset

from batches.documents import DocumentDataset, document_ids, pad_documents
from batches.noise import WindowDataset
from batches.order import ShuffledBatches, SimilarLengthBatches
from batches.packing import PackedDocuments, pack_documents
from corpus.tokenizer import Tokenizer

SPEED_SECONDS = 0.5  # time for which the speed of the loader is measured


def print_counts(folder: Path, metadata: dict) -> None:
    """Print tokens, documents and bytes per token of each split.

    Args:
        folder: Folder of the corpus.
        metadata: Content of its metadata.json.
    """
    name = metadata["tokenizer"]["name"]
    print(f"{folder}: {name}, {metadata['vocab_size']:,} ids, {metadata['dtype']}")
    for split, counts in metadata["splits"].items():
        bytes_per_token = counts["bytes"] / counts["tokens"]
        documents = "(running text)"
        if metadata["eot_per_document"]:
            documents = f"{counts['documents']:>10,} documents"
        print(
            f"  {split:5} {counts['tokens']:>14,} tokens {documents} "
            f"{bytes_per_token:.2f} bytes per token"
        )


def print_windows(
    dataset: WindowDataset, order: ShuffledBatches, tokenizer: Tokenizer, num_rows: int
) -> None:
    """Print the first batch of windows, check that y is x shifted by one, and measure the speed.

    Args:
        dataset: A TextDataset with stride 1.
        order: The sampler of its batches.
        tokenizer: Tokenizer of the corpus.
        num_rows: Rows that are shown as text.

    Raises:
        ValueError: In a row, y is not x shifted by one.
    """
    tokens = dataset.tokens
    indices = next(iter(order))
    order.position = 0
    x, y = dataset[indices]
    B, T = x.shape
    print(f"\nwindows: x {tuple(x.shape)}, y {tuple(y.shape)}, {x.dtype}; the first of a batch:")
    for row in x[:num_rows]:
        doc_ids = torch.zeros_like(row)
        if tokens.eot_token is not None:
            doc_ids = document_ids(row, tokens.eot_token)
        print(f"  {row_as_text(tokenizer, row, doc_ids)}")
    expected = torch.from_numpy(tokens.read(dataset.window_starts(indices), T + 1))
    if not (torch.equal(x, expected[:, :-1]) and torch.equal(y, expected[:, 1:])):
        raise ValueError(f"{tokens.path}: y is not x shifted by one")
    print(f"  aligned: y is x shifted by one in all {y.numel():,} places")
    print(f"  an epoch: {len(order):,} batches of {B} x {T}; {counts_as_text(dataset)}")
    num_batches = 0
    start = time.perf_counter()
    for _ in DataLoader(cast(Dataset, dataset), sampler=order, batch_size=None):
        num_batches += 1
        seconds = time.perf_counter() - start
        if seconds > SPEED_SECONDS:
            break
    order.position = 0
    speed = num_batches * B * T / seconds / 1e6
    print(f"  speed: {speed:,.1f} million tokens/s through a DataLoader")


def print_documents(
    documents: DocumentDataset,
    sequence_length: int,
    batch_size: int,
    seed: int,
    tokenizer: Tokenizer,
    num_rows: int,
) -> None:
    """Print the first rows of padded and of packed documents, and their shares of padding.

    Args:
        documents: Documents of a split, not cut.
        sequence_length: Largest length of a padded row, and length of a packed row.
        batch_size: Rows per batch.
        seed: Seed of the order.
        tokenizer: Tokenizer of the corpus.
        num_rows: Rows that are shown as text.
    """
    if len(documents) < batch_size:
        print(f"\n{len(documents)} documents are fewer than a batch")
        return
    padded = DocumentDataset(documents.tokens, max_length=sequence_length)
    shuffled = ShuffledBatches(len(padded), batch_size, seed)
    similar = SimilarLengthBatches(padded.lengths, batch_size, seed)
    batch = pad_documents([padded[i] for i in next(iter(shuffled))], tokenizer.eot_token)
    shuffled.position = 0
    shapes = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in batch.items())
    print(f"\ndocuments, padded: {shapes}; the first of a batch:")
    for row, labels in list(zip(batch["input_ids"], batch["labels"]))[:num_rows]:
        print(f"  {row_as_text(tokenizer, row, torch.zeros_like(row), labels == -100)}")
    print(f"  {counts_as_text(padded)}")
    print(f"  {padding_share(padded, shuffled):.1%} padding in random order")
    print(f"  {padding_share(padded, similar):.1%} padding with documents of similar length")
    packed = pack_documents(documents, sequence_length)
    print(f"\ndocuments, packed: {len(packed):,} rows of {sequence_length}; the first:")
    for i in range(min(num_rows, len(packed))):
        row = packed[i]
        doc_ids = row["document_ids"]
        print(f"  {row_as_text(tokenizer, row['input_ids'], doc_ids, doc_ids == -1)}")
    share = packed.count_tokens()["padded"] / (len(packed) * sequence_length)
    print(f"  {counts_as_text(packed)}, {share:.2%} padding")


def padding_share(documents: DocumentDataset, batches: Iterable[list[int]]) -> float:
    """Return the share of padding in some batches of documents.

    Example: documents of 2 and 4 tokens in one batch -> 0.25.

    Args:
        documents: The documents.
        batches: Indices of the documents of each batch.
    """
    num_tokens = 0
    num_tokens_with_padding = 0
    for batch in batches:
        lengths = documents.lengths[batch]
        num_tokens += lengths.sum()
        num_tokens_with_padding += lengths.max() * len(batch)
    return 1 - num_tokens / num_tokens_with_padding


def counts_as_text(dataset: WindowDataset | DocumentDataset | PackedDocuments) -> str:
    """Return the counts of count_tokens() as text.

    Example: {"trained": 90, "cut": 10} -> "90 trained + 10 cut tokens".
    """
    counts = dataset.count_tokens().items()
    return " + ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts) + " tokens"


def row_as_text(
    tokenizer: Tokenizer,
    row: torch.Tensor,
    doc_ids: torch.Tensor,
    padded: torch.Tensor | None = None,
) -> str:
    """Return a row as text on one line, with ║ between documents and one ░ per padding token.

    Example: "ab" and "c" in a row of 5 -> ab<|endoftext|>║c░.

    Args:
        tokenizer: Tokenizer of the corpus.
        row: Token ids, (T,).
        doc_ids: Document ids, (T,).
        padded: Whether each token is padding, (T,) bool; None: no token is.
    """
    if padded is None:
        padded = torch.zeros_like(row, dtype=torch.bool)
    texts = []
    for number in doc_ids[~padded].unique_consecutive():
        text = tokenizer.decode(row[~padded & (doc_ids == number)].tolist())
        texts.append(repr(text)[1:-1])
    return "║".join(texts) + "░" * int(padded.sum())
