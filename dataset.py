"""Prepared tokens to batches of (x, y).

    train_loader, val_loader = create_dataloaders("data/tinyshakespeare", 256, batch_size=32)
    x, y = next(iter(train_loader))    # (32, 256) int64 each

y is x shifted by one: y[b, t] is the token that follows x[b, t]. All forms of batch are imported
from here: windows (below), whole documents (documents.py), a stream of raw text (streaming.py), in
the order of sampler.py. `python dataset.py CORPUS` shows what a corpus gives.
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from batches.documents import (
    DocumentDataset,
    PackedDocuments,
    attention_mask,
    document_ids,
    document_mask,
    document_positions,
    pack_documents,
    pad_documents,
)
from batches.order import ShuffledBatches
from batches.streaming import StreamingTextDataset, tokenize
from batches.tokens import Tokens
from common.hashing import splitmix64
from common.script import run
from corpus.metadata import newest_corpus, read_metadata

__all__ = [
    "DocumentDataset", "PackedDocuments", "ShuffledBatches", "StreamingTextDataset", "TextDataset",
    "Tokens", "attention_mask", "create_dataloaders", "document_ids", "document_mask",
    "document_positions", "newest_corpus", "pack_documents", "pad_documents", "read_metadata",
    "tokenize",
]  # fmt: skip


class TextDataset(Dataset):
    """Windows over one long sequence of tokens, memory-mapped.

    With tokens 0 1 2 3 4 5 6, sequence_length 3 and stride 2, item 0 is x = [0 1 2], y = [1 2 3],
    and item 1, the last, is x = [2 3 4], y = [3 4 5]: a window is whole or it is not there.

    path: a split of a prepared corpus (data/NAME/train), or a bare .bin file together with its
    dtype ("uint16", "uint32"), or a one-dimensional array of ids, or Tokens. stride: tokens between
    the starts of neighbours; 1 slides, sequence_length gives blocks. An item is, with T for
    sequence_length and int64 throughout,

        item="tuple"        (x, y), (T,) each
        item="huggingface"  {"input_ids", "labels"}, (T,) each and the same: the model shifts
        item="documents"    {"token_ids" (T,), "document_ids" (T,), "document_mask" (T, T) bool}

    replace: share of the tokens of x (none that ends a document) that are replaced by random ones,
    against overfitting; which and by what is a function of `seed`, the window and the place in it.

    Raises FileNotFoundError or ValueError, with the remedy, for files that aren't there or don't
    match metadata.json and for a split shorter than one window; on reading, IndexError for an
    index out of range and ValueError for an id outside the vocabulary.
    """

    def __init__(
        self, path, sequence_length: int, stride: int = 1, dtype=None, *, item="tuple", replace=0.0,
        seed=0, eot_token=None,
    ):  # fmt: skip
        if sequence_length < 1 or stride < 1:
            raise ValueError(
                f"sequence_length ({sequence_length}) and stride ({stride}) start at 1"
            )
        self.tokens = path if isinstance(path, Tokens) else Tokens(path, dtype, eot_token)
        self.sequence_length, self.stride = sequence_length, stride
        self.item, self.replace, self.seed = item, replace, seed
        if item not in ("tuple", "huggingface", "documents"):
            raise ValueError(f"item is tuple, huggingface or documents, not {item!r}")
        if item == "documents" and self.tokens.eot_token is None:
            raise ValueError(f"which id ends a document of {self.tokens.path}? Name it: eot_token")
        if not 0 <= replace <= 1 or (replace and not self.tokens.vocab_size):
            raise ValueError(
                f"replace ({replace}) lies from 0 to 1, and needs a corpus with a vocabulary"
            )
        if len(self.tokens) < sequence_length + 1:
            raise ValueError(
                f"{self.tokens.path} has {len(self.tokens):,} tokens, fewer than one window of "
                f"{sequence_length} and the token after it: lower sequence_length, or prepare "
                f"more text"
            )
        self.num_windows = (len(self.tokens) - sequence_length - 1) // stride + 1

    @property
    def vocab_size(self) -> int | None:
        """Ids lie below it; None for a bare file."""
        return self.tokens.vocab_size

    def num_tokens(self) -> int:
        return len(self.tokens)

    def num_documents(self) -> int:
        """Raises ValueError where eot_token is unknown."""
        return self.tokens.num_documents()

    def num_files(self) -> int:
        return len(self.tokens.shards)

    def __len__(self):
        return self.num_windows

    def __getitem__(self, index):
        if self.item != "tuple":
            return self.__getitems__([index])[0]
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices):
        """A whole batch in one gather: (B,) indices -> x, y of shape (B, T), or B dicts."""
        indices, n, T = np.asarray(indices, np.int64), self.num_windows, self.sequence_length
        if indices.min() < 0 or indices.max() >= n:
            outside = indices[(indices < -n) | (indices >= n)]
            if len(outside):
                raise IndexError(f"window {outside[0]} of {self.tokens.path}: there are {n:,}")
            indices = indices % n
        starts = indices * self.stride
        ids = self.tokens.gather(starts, T + 1)
        # two contiguous copies, or that from pinned memory to a GPU would wait
        x = torch.from_numpy(ids[:, :T].astype(np.int64))
        y = torch.from_numpy(ids[:, 1:].astype(np.int64))
        if self.item == "huggingface":
            batch = {"input_ids": self.corrupt(x, starts), "labels": x}
        elif self.item == "documents":
            ids = document_ids(x, self.tokens.eot_token)
            x = self.corrupt(x, starts)
            batch = {"token_ids": x, "document_ids": ids, "document_mask": document_mask(ids)}
        else:
            return self.corrupt(x, starts), y
        return [{name: rows[i] for name, rows in batch.items()} for i in range(len(x))]

    def corrupt(self, x, starts):
        """x, (B, T), with the share `replace` of its tokens replaced."""
        if not self.replace:
            return x
        eot, places = self.tokens.eot_token, np.arange(self.sequence_length, dtype=np.uint64)
        windows = splitmix64(np.asarray(starts, np.uint64) ^ splitmix64(np.array([self.seed], np.uint64)))
        dice = splitmix64(windows[:, None] + places)
        chosen = (dice < np.uint64(min(int(self.replace * 2**64), 2**64 - 1))) & (x.numpy() != eot)
        ids = (splitmix64(~dice) % np.uint64(self.vocab_size - 1)).astype(np.int64)
        ids += ids >= eot  # any but the end of text
        return torch.from_numpy(np.where(chosen, ids, x.numpy()))

    def split(self, size: float | int):
        """(first, last): views of the first tokens and the last, sharing none. size: of the last,
        a share (below 1), cut behind a document where there are documents, or a number of windows.
        Raises ValueError where one would be shorter than a window."""
        n = len(self.tokens)
        if size < 1:
            cut = self.tokens.document_end(n - round(n * size))
        else:
            cut = n - (size - 1) * self.stride - self.sequence_length - 1
        if not 0 < cut < n:
            raise ValueError(f"{self.tokens.path} can't be split by {size}: it has {n:,} tokens")
        options = dict(item=self.item, replace=self.replace, seed=self.seed)
        return tuple(
            TextDataset(self.tokens.part(*part), self.sequence_length, self.stride, **options)
            for part in ((0, cut), (cut, n))
        )

    def account(self) -> dict[str, int]:
        """trained (tokens that are some window's target) + left (the first token, and what is in
        no window) = tokens of the split."""
        trained = min(self.stride, self.sequence_length) * (len(self) - 1) + self.sequence_length
        return {"trained": trained, "left": len(self.tokens) - trained}


def create_dataloaders(
    corpus_dir, sequence_length, batch_size=32, seed=0, num_workers=0, rank=0, world_size=1, *,
    item="tuple", token_noise=0.0,
):  # fmt: skip
    """(train_loader, val_loader) over a prepared corpus, yielding (x, y) of shape (B, T), int64, or
    another `item` of TextDataset's.

    Training: whole batches, shuffled; a pass over the loader reads no token twice and, but for the
    rest of a window and a batch, all of them, and each pass cuts and orders the text anew (resume
    by train_loader.batch_sampler.position). Validation: blocks in order. batch_size counts windows
    over all `world_size` ranks. Workers are there for slow disks: memory-mapped reads are faster
    without. Raises what TextDataset and ShuffledBatches raise.
    """
    train, val = Path(corpus_dir) / "train", Path(corpus_dir) / "val"
    train = TextDataset(train, sequence_length, item=item, replace=token_noise, seed=seed)
    val = TextDataset(val, sequence_length, stride=sequence_length, item=item)
    order = ShuffledBatches(len(train), batch_size, seed, sequence_length, rank, world_size)
    blocks = range(rank, len(val), world_size)
    options = dict(
        collate_fn=_as_it_is if item == "tuple" else None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return (
        DataLoader(train, batch_sampler=order, **options),
        DataLoader(
            val,
            batch_sampler=BatchSampler(blocks, order.rank_batch_size, drop_last=False),
            **options,
        ),
    )


def _as_it_is(batch):
    return batch  # __getitems__ has stacked it


if __name__ == "__main__":
    from batches.preview import main

    run(main)
