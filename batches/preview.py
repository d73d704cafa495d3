"""What `python dataset.py NAME` prints: rows of each form of batch as text, and token counts."""

import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from batches.documents import DocumentDataset, document_ids, pad_documents
from batches.order import ShuffledBatches, SimilarLengthBatches
from batches.packing import pack_documents

SPEED_SECONDS = 0.5  # how long the loader's speed is measured


def print_counts(folder: Path, metadata: dict) -> None:
    """Print tokens, documents and bytes per token of each split."""
    name = metadata["tokenizer"]["name"]
    print(f"{folder}: {name}, {metadata['vocab_size']:,} ids, {metadata['dtype']}")
    for split, counts in metadata["splits"].items():
        bytes_per_token = counts["bytes"] / counts["tokens"]
        print(
            f"  {split:5} {counts['tokens']:>14,} tokens {counts['documents']:>10,} documents "
            f"{bytes_per_token:.2f} bytes per token"
        )


def print_windows(dataset, order: ShuffledBatches, tokenizer, num_rows: int) -> None:
    """Print the first batch of windows, check that y is x shifted by one, and measure the speed.

    Args:
        dataset: A TextDataset with stride 1.
        order: The sampler of its batches.
        tokenizer: Turns ids back to text.
        num_rows: Rows that are shown as text.

    Raises:
        ValueError: If y is not x shifted by one.
    """
    tokens = dataset.tokens
    indices = next(iter(order))
    order.position = 0
    x, y = dataset[indices]
    B, T = x.shape
    print(f"\nwindows: x {tuple(x.shape)}, y {tuple(y.shape)}, {x.dtype}; the first of a batch:")
    for row in x[:num_rows]:
        ids = torch.zeros_like(row)
        if tokens.eot_token is not None:
            ids = document_ids(row, tokens.eot_token)
        print(f"  {row_as_text(tokenizer, row, ids)}")
    text = torch.from_numpy(tokens.read(dataset.window_starts(indices), T + 1))
    if not (torch.equal(x, text[:, :-1]) and torch.equal(y, text[:, 1:])):
        raise ValueError(f"{tokens.path}: y is not x shifted by one")
    print(f"  aligned: y is x shifted by one in all {y.numel():,} places")
    print(f"  an epoch: {len(order):,} batches of {B} x {T}; {counts_as_text(dataset)}")
    num_batches = 0
    start = time.perf_counter()
    for _ in DataLoader(dataset, sampler=order, batch_size=None):
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
    tokenizer,
    num_rows: int,
) -> None:
    """Print the first rows of padded and packed documents, and how much padding they have."""
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
        ids = row["document_ids"]
        print(f"  {row_as_text(tokenizer, row['input_ids'], ids, ids == -1)}")
    share = packed.count_tokens()["padded"] / (len(packed) * sequence_length)
    print(f"  {counts_as_text(packed)}, {share:.2%} padding")


def padding_share(documents: DocumentDataset, batches) -> float:
    """Return the share of padding in one pass over batches of documents.

    Example: lengths [2, 4] in one batch -> 0.25.
    """
    tokens = 0
    places = 0
    for batch in batches:
        lengths = documents.lengths[batch]
        tokens += lengths.sum()
        places += lengths.max() * len(batch)
    return 1 - tokens / places


def counts_as_text(dataset) -> str:
    """Return the counts of count_tokens() as "90 trained + 10 cut tokens"."""
    counts = dataset.count_tokens().items()
    return " + ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts) + " tokens"


def row_as_text(
    tokenizer, row: torch.Tensor, ids: torch.Tensor, padded: torch.Tensor | None = None
) -> str:
    """Return a row as text on one line, with ║ between documents and one ░ per padded place.

    Example: "ab" and "c" in a row of 5 -> ab<|endoftext|>║c░.

    Args:
        tokenizer: Turns ids back to text.
        row: (T,) token ids.
        ids: (T,) document ids.
        padded: (T,) bool, which places are padding; None: none.
    """
    if padded is None:
        padded = torch.zeros_like(row, dtype=torch.bool)
    texts = []
    for number in ids[~padded].unique_consecutive():
        text = tokenizer.decode(row[~padded & (ids == number)].tolist())
        texts.append(repr(text)[1:-1])
    return "║".join(texts) + "░" * int(padded.sum())
