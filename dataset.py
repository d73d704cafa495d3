"""Prepared tokens to batches of (x, y).

    train_loader, val_loader = create_dataloaders("data/tinyshakespeare", 256, batch_size=32)
    x, y = next(iter(train_loader))    # (32, 256) int64 each

y is x shifted by one: y[b, t] is the token that follows x[b, t].
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from common import mix


class TextDataset(Dataset):
    """Windows over one long sequence of tokens, memory-mapped.

    With tokens 0 1 2 3 4 5 6, sequence_length 3 and stride 2, item 0 is x = [0 1 2], y = [1 2 3],
    and item 1, the last, is x = [2 3 4], y = [3 4 5]: a window is whole or it is not there.

    path: a split of a prepared corpus (data/NAME/train), or a bare .bin file together with its
    dtype ("uint16", "uint32"), or a one-dimensional array of ids. stride: tokens between the starts
    of neighbours; 1 slides, sequence_length gives blocks. Items are pairs of int64 tensors of
    shape (sequence_length,).

    Raises FileNotFoundError or ValueError, with the remedy, for files that aren't there or don't
    match metadata.json and for a split shorter than one window; on reading, IndexError for an
    index out of range and ValueError for an id outside the vocabulary.
    """

    def __init__(self, path, sequence_length: int, stride: int = 1, dtype=None):
        if sequence_length < 1 or stride < 1:
            raise ValueError(
                f"sequence_length ({sequence_length}) and stride ({stride}) start at 1"
            )
        self.arguments = path, sequence_length, stride, dtype
        self.sequence_length, self.stride = sequence_length, stride
        if isinstance(path, (str, Path)):
            self.path, (self.shards, self.vocab_size) = path, open_tokens(Path(path), dtype)
        else:
            self.path, self.shards, self.vocab_size = "the array", [np.asarray(path)], None
        self.ends = np.cumsum([len(shard) for shard in self.shards])  # in the stream of all shards
        self.num_tokens = int(self.ends[-1])
        if self.num_tokens < sequence_length + 1:
            raise ValueError(
                f"{self.path} has {self.num_tokens:,} tokens, fewer than one window of "
                f"{sequence_length} and the token after it: lower sequence_length, or prepare "
                f"more text"
            )

    def __reduce__(self):  # a worker process maps the files itself: pickle would copy them whole
        return type(self), self.arguments

    def __len__(self):
        return (self.num_tokens - self.sequence_length - 1) // self.stride + 1

    def __getitem__(self, index):
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices):
        """A whole batch in one gather: indices (B,) -> x, y of shape (B, sequence_length)."""
        indices = np.asarray(indices, dtype=np.int64)
        outside = indices[(indices < -len(self)) | (indices >= len(self))]
        if len(outside):
            raise IndexError(f"window {outside[0]} of {self.path}: there are {len(self):,}")
        windows = self.read(indices % len(self) * self.stride, self.sequence_length + 1)
        # contiguous, or the copy from pinned memory to a GPU would wait
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def read(self, starts, length):
        """Positions in the stream, (B,) -> ids, (B, length) int64."""
        starts = np.asarray(starts, dtype=np.int64)
        first = np.searchsorted(self.ends, starts, side="right")  # the shard of the first token
        last = np.searchsorted(self.ends, starts + length - 1, side="right")
        tokens = np.empty((len(starts), length), dtype=self.shards[0].dtype)
        for i in np.unique(first[first == last]):
            here, begin = (first == i) & (last == i), self.ends[i] - len(self.shards[i])
            tokens[here] = sliding_window_view(self.shards[i], length)[starts[here] - begin]
        for row in np.flatnonzero(first != last):  # windows over an edge between shards
            done = 0
            for i in range(first[row], last[row] + 1):
                begin = starts[row] + done - self.ends[i] + len(self.shards[i])
                part = self.shards[i][begin : begin + length - done]
                tokens[row, done : done + len(part)] = part
                done += len(part)
        if self.vocab_size and tokens.max(initial=0) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds the id {tokens.max()}, but its vocabulary has "
                f"{self.vocab_size}: the file is damaged; prepare it again"
            )
        return torch.from_numpy(tokens.astype(np.int64))


def read_metadata(corpus_dir) -> dict:
    """metadata.json of a prepared corpus (data/README.md says what it holds).

    Raises FileNotFoundError, or ValueError for one that is damaged, with the remedy.
    """
    path = Path(corpus_dir) / "metadata.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        files = [file for split in metadata["splits"].values() for file in split["files"]]
        sound = (
            metadata["format_version"] == 1
            and metadata["dtype"] in ("uint16", "uint32")
            and metadata["vocab_size"] > 0
            and {"name", "sha256"} <= metadata["tokenizer"].keys()
            and all(split["files"] and split["tokens"] > 0 for split in metadata["splits"].values())
            and all(split["bytes"] > 0 for split in metadata["splits"].values())
            and all(Path(f["name"]).name == f["name"] and f["tokens"] >= 0 for f in files)
        )
    except FileNotFoundError:
        prepared = sorted(path.parent.parent.glob("*/metadata.json"))
        there = [other.parent.name for other in prepared]
        raise FileNotFoundError(
            f"{path.parent} is no prepared corpus: run python prepare_data.py, or choose "
            f"another (there: {', '.join(there) or 'none'})"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path} is damaged, or of another version: run python prepare_data.py again, with the "
            f"flags it was made with"
        )
    return metadata


def newest_corpus(data_dir) -> Path:
    """The folder under `data_dir` that was prepared last."""
    prepared = sorted(Path(data_dir).glob("*/metadata.json"), key=os.path.getmtime)
    if not prepared:
        raise FileNotFoundError(
            f"{Path(data_dir).resolve()} has no prepared corpus: run python prepare_data.py, or "
            f"name its folder by --data_dir"
        )
    return prepared[-1].parent


def open_tokens(path: Path, dtype=None):
    """A split (data/NAME/train) or a bare .bin and its dtype -> its memory-mapped files, in order,
    and the size of the vocabulary (None for a bare file)."""
    if dtype is not None:
        return [_map(path, np.dtype(dtype).newbyteorder("<"))], None
    if path.suffix == ".bin" and not (path.parent / "metadata.json").exists():
        raise ValueError(f"{path} has no metadata.json beside it: say which dtype its ids have")
    metadata, name = read_metadata(path.parent), path.name.removesuffix(".bin")
    splits, dtype = metadata["splits"], np.dtype(metadata["dtype"]).newbyteorder("<")
    if name not in splits:
        raise ValueError(f"{path.parent} has no split {name!r}, but {', '.join(splits)}")
    files = splits[name]["files"]
    shards = [_map(path.parent / file["name"], dtype, file["tokens"]) for file in files]
    return shards, metadata["vocab_size"]


def _map(path, dtype, tokens=None):
    """A memory map of a file that has as many `tokens` as it should, if that is known."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run python prepare_data.py as before")
    size = path.stat().st_size
    if tokens is not None and size != tokens * dtype.itemsize:
        raise ValueError(
            f"{path} has {size:,} bytes, metadata.json says {tokens * dtype.itemsize:,}: run "
            f"python prepare_data.py again, with the flags it was made with"
        )
    if size % dtype.itemsize:
        raise ValueError(f"{path} is no whole number of {dtype} ids: {size:,} bytes")
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)  # 0: can't be mapped


class ShuffledBatches(Sampler):
    """Batches of window indices in an order that is a pure function of (seed, position).

    A position counts windows over all ranks since the training began. Epoch e is positions e * n
    to (e + 1) * n - 1, each a keyed permutation of the n windows: nothing is drawn twice, nothing
    is stored, and a batch may reach from one epoch into the next. Iterating yields one epoch's
    worth of batches, from `position` on, and leaves `position` behind the last one drawn. Set it to
    resume anywhere: to the windows that were used, which workers, drawing ahead, fall behind.

    With stride > 1 an epoch visits every stride-th of the dataset's items only, from an offset of
    its own: over windows that slide by one and stride = sequence_length it reads no token twice,
    and cuts the text elsewhere each time. Raises ValueError where ranks can't share a batch.
    """

    def __init__(self, num_items, batch_size, seed=0, stride=1, rank=0, world_size=1):
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not a multiple of {world_size} processes")
        self.batch_size, self.seed, self.rank = batch_size, seed, rank
        self.rank_batch_size = batch_size // world_size
        self.stride = min(stride, num_items)
        self.num_items = num_items // self.stride  # windows an epoch, at every offset
        self.position = 0

    def __len__(self):
        return max(1, self.num_items // self.batch_size)

    def __iter__(self):
        for _ in range(len(self)):
            first = self.position + self.rank * self.rank_batch_size
            self.position += self.batch_size
            yield self.order(np.arange(first, first + self.rank_batch_size)).tolist()

    def order(self, positions):
        """(n,) global positions -> (n,) indices into the dataset."""
        indices = np.empty(len(positions), np.int64)
        epochs = positions // self.num_items
        for epoch in np.unique(epochs):
            keys = np.random.SeedSequence((self.seed, int(epoch))).generate_state(5, np.uint64)
            here = epochs == epoch
            block = permute(positions[here] % self.num_items, self.num_items, keys[:4])
            indices[here] = block * self.stride + int(keys[4] % np.uint64(self.stride))
        return indices


def permute(i, n: int, keys):
    """Where a keyed permutation of range(n) sends i, (k,) int64, for n < 2**62, in O(1) memory: a
    Feistel network over the next power of four, walked on from any value >= n (Black & Rogaway
    2002)."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = i.astype(np.uint64)
    walking = np.ones(len(out), bool)
    while walking.any():
        x = out[walking]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        out[walking] = left << half | right
        walking = out >= n
    return out.astype(np.int64)


def create_dataloaders(
    corpus_dir, sequence_length, batch_size=32, seed=0, num_workers=0, rank=0, world_size=1
):
    """(train_loader, val_loader) over a prepared corpus, yielding (x, y) of shape (B, T), int64.

    Training: whole batches, shuffled; a pass over the loader reads no token twice and, but for the
    rest of a window and a batch, all of them, and each pass cuts and orders the text anew (resume
    by train_loader.batch_sampler.position). Validation: blocks in order. batch_size counts windows
    over all `world_size` ranks. Workers are there for slow disks: memory-mapped reads are faster
    without. Raises what TextDataset and ShuffledBatches raise.
    """
    train = TextDataset(Path(corpus_dir) / "train", sequence_length)
    val = TextDataset(Path(corpus_dir) / "val", sequence_length, stride=sequence_length)
    order = ShuffledBatches(len(train), batch_size, seed, sequence_length, rank, world_size)
    blocks = range(rank, len(val), world_size)
    options = dict(
        collate_fn=_as_it_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
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
