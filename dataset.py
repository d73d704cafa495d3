"""Prepared tokens to batches of (x, y).

    train_loader, val_loader = create_dataloaders("data/tinyshakespeare", 256, batch_size=32)
    x, y = next(iter(train_loader))    # (32, 256) int64 each

y is x shifted by one: y[b, t] is the token that follows x[b, t].
"""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler


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
        self.sequence_length, self.stride = sequence_length, stride
        self.path, self.vocab_size = path, None
        if isinstance(path, (str, Path)):
            self.shards, self.vocab_size = open_tokens(Path(path), dtype)
        else:
            self.path, self.shards = "the array", [np.asarray(path)]
        self.ends = np.cumsum([len(shard) for shard in self.shards])  # in the stream of all shards
        self.num_tokens = int(self.ends[-1])
        if self.num_tokens < sequence_length + 1:
            raise ValueError(
                f"{self.path} has {self.num_tokens:,} tokens, fewer than one window of "
                f"{sequence_length} and the token after it: lower sequence_length"
            )

    def __len__(self):
        return (self.num_tokens - self.sequence_length - 1) // self.stride + 1

    def __getitem__(self, index):
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices):
        """A whole batch in one gather: indices (B,) -> x, y of shape (B, sequence_length)."""
        indices = np.asarray(indices, dtype=np.int64)
        out = indices[(indices < -len(self)) | (indices >= len(self))]
        if len(out):
            raise IndexError(f"window {out[0]} of {self.path}: there are {len(self):,}")
        windows = self.read(indices % len(self) * self.stride, self.sequence_length + 1)
        windows = torch.from_numpy(windows.astype(np.int64))  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def read(self, starts, length):
        """(B,) positions in the stream -> (B, length) ids, as they are stored."""
        if len(self.shards) == 1:
            tokens = sliding_window_view(self.shards[0], length)[starts]
        else:  # a window may begin in one shard and end in another
            tokens = np.stack([self._read_across(start, length) for start in starts])
        if self.vocab_size and tokens.max(initial=0) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds the id {tokens.max()}, but its vocabulary has "
                f"{self.vocab_size}: the file is damaged; prepare it again"
            )
        return tokens

    def _read_across(self, start, length):
        parts, shard = [], int(np.searchsorted(self.ends, start, side="right"))
        while length:
            begin = start - (self.ends[shard] - len(self.shards[shard]))
            parts.append(self.shards[shard][begin : begin + length])
            start, length, shard = start + len(parts[-1]), length - len(parts[-1]), shard + 1
        return np.concatenate(parts)


def read_metadata(corpus_dir) -> dict:
    """metadata.json of a prepared corpus (data/README.md says what it holds).

    Raises FileNotFoundError or ValueError, with the command that mends it.
    """
    path = Path(corpus_dir) / "metadata.json"
    remedy = f"run `python prepare_data.py --corpus {path.parent.name}`"
    try:
        metadata = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} is no prepared corpus: {remedy}") from None
    except ValueError:
        raise ValueError(f"{path} is damaged: {remedy}") from None
    if metadata.get("format_version") != 1:
        raise ValueError(f"{path} was written by another version of prepare_data.py: {remedy}")
    return metadata


def newest_corpus(data_dir) -> Path:
    """The folder under `data_dir` that was prepared last."""
    prepared = sorted(Path(data_dir).glob("*/metadata.json"), key=lambda path: path.stat().st_mtime)
    if not prepared:
        raise FileNotFoundError(f"{data_dir}/ has no prepared corpus: run `python prepare_data.py`")
    return prepared[-1].parent


def open_tokens(path: Path, dtype=None):
    """A split (data/NAME/train) or a bare .bin and its dtype -> its memory-mapped files, in order,
    and the size of the vocabulary (None for a bare file)."""
    if dtype is not None:
        if not path.exists():
            raise FileNotFoundError(f"{path} isn't there")
        return [_map(path, np.dtype(dtype).newbyteorder("<"))], None
    if path.suffix == ".bin" and not (path.parent / "metadata.json").exists():
        raise ValueError(f"{path} has no metadata.json beside it: say which dtype its ids have")
    metadata = read_metadata(path.parent)
    name = path.name.removesuffix(".bin")
    if name not in metadata["splits"]:
        raise ValueError(
            f"{path.parent} has no split {name!r}, but {', '.join(metadata['splits'])}"
        )
    shards = []
    for file in metadata["splits"][name]["files"]:
        remedy = f"run `python prepare_data.py --corpus {path.parent.name}`"
        shard, dtype = path.parent / file["name"], np.dtype(metadata["dtype"]).newbyteorder("<")
        if not shard.exists():
            raise FileNotFoundError(f"{shard} is missing: {remedy}")
        found, expected = shard.stat().st_size, file["tokens"] * dtype.itemsize
        if found != expected:
            raise ValueError(
                f"{shard} has {found:,} bytes, metadata.json says {expected:,}: {remedy}"
            )
        shards.append(_map(shard, dtype))
    return shards, metadata["vocab_size"]


def _map(path, dtype):
    if path.stat().st_size % dtype.itemsize:
        raise ValueError(f"{path} is no whole number of {dtype} ids: {path.stat().st_size:,} bytes")
    if path.stat().st_size == 0:  # nothing can be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class ShuffledBatches(Sampler):
    """Batches of window indices in an order that is a pure function of (seed, position).

    `position` counts the windows that all ranks together have taken since the training began; set
    it to go on from anywhere. Epoch e is positions e * n to (e + 1) * n - 1, each a keyed
    permutation of the n windows: nothing is drawn twice, nothing is stored. A batch may reach from
    one epoch into the next. Iterating yields batches for one epoch's worth, then stops; the next
    iteration goes on where this one ended.

    With stride > 1 an epoch visits every stride-th of the dataset's items only, from an offset of
    its own: over windows that slide by one and stride = sequence_length it reads every token once,
    and cuts the text elsewhere each time.
    """

    def __init__(self, num_items, batch_size, seed=0, stride=1, rank=0, world_size=1):
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not a multiple of {world_size} processes")
        self.batch_size, self.seed, self.rank = batch_size, seed, rank
        self.share = batch_size // world_size  # windows a batch for this rank
        self.stride = min(stride, num_items)
        self.num_items = num_items // self.stride  # windows an epoch, at every offset
        self.position = 0

    def __len__(self):
        return max(1, self.num_items // self.batch_size)

    def __iter__(self):
        for _ in range(len(self)):
            first = self.position + self.rank * self.share
            self.position += self.batch_size
            yield self.order(np.arange(first, first + self.share)).tolist()

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
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[walking] = left << half | right
        walking = out >= n
    return out.astype(np.int64)


def _mix(x):
    """splitmix64's finaliser: every bit of uint64 x changes every bit of the result."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def create_dataloaders(
    corpus_dir, sequence_length, batch_size=32, seed=0, num_workers=0, rank=0, world_size=1
):
    """(train_loader, val_loader) over a prepared corpus, yielding (x, y) of shape (B, T), int64.

    Training: whole batches only, shuffled; one pass over the loader reads every token once, and
    each pass cuts and orders the text anew (`train_loader.batch_sampler.position` is where it is;
    set it to resume). Validation: blocks in order. batch_size counts windows over all `world_size`
    ranks. Workers are there for slow disks: memory-mapped reads are faster without.
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
            val, batch_sampler=BatchSampler(blocks, order.share, drop_last=False), **options
        ),
    )


def _as_it_is(batch):
    return batch  # __getitems__ has stacked it
