"""The order of the data: a pure function of (seed, position), so that it can be gone on with.

order = ShuffledBatches(len(dataset), batch_size=32, seed=0)
DataLoader(dataset, batch_sampler=order)                                    # anyone's dataset
DataLoader(dataset, batch_size=32, sampler=ShuffledBatches(len(dataset)))   # one by one
"""

import numpy as np
from torch.utils.data import Sampler

from common.hashing import splitmix64

TOGETHER = 1 << 15  # items whose order is computed at once
BUCKET = 64  # batches among which items of similar length are brought together


class ShuffledBatches(Sampler):
    """Batches of indices in an order that is a pure function of (seed, position).

    A position counts items over all ranks since the training began. Epoch e is positions e * n to
    (e + 1) * n - 1, each a keyed permutation of the n items: nothing is drawn twice, nothing is
    stored, and a batch may reach from one epoch into the next. Iterating yields the rest of a pass,
    as many whole batches as an epoch has, from `position` on, and leaves `position` behind the last
    one drawn. Set it to resume anywhere: to the items that were used, which workers, drawing ahead,
    fall behind (or leave it to torchdata's StatefulDataLoader, by way of state_dict).

    batch_size: items over all `world_size` ranks, of which `rank` gets its part; None for single
    indices, to be a DataLoader's `sampler`. stride: an epoch visits every stride-th item only, from
    an offset of its own: over windows that slide by one and stride = sequence_length it reads no
    token twice, and cuts the text elsewhere each time. lengths: (num_items,); batches are then of
    items of similar length, chosen among the next 64 batches', which come in an order of their own.
    Raises ValueError where ranks can't share a batch.
    """

    def __init__(
        self, num_items, batch_size=None, seed=0, stride=1, rank=0, world_size=1, lengths=None
    ):
        self.single, self.batch_size = batch_size is None, batch_size or world_size
        if self.batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not a multiple of {world_size} processes")
        self.seed, self.rank, self.world_size, self.lengths = seed, rank, world_size, lengths
        self.rank_batch_size = self.batch_size // world_size
        self.stride = min(stride, num_items)
        self.num_items = num_items // self.stride  # an epoch's, at every offset
        self.position = 0

    def __len__(self):
        return max(1, self.num_items // self.batch_size)

    def __iter__(self):
        left = len(self) - self.position // self.batch_size % len(self)
        while left:
            for batch in self.batches(self.position):
                left, self.position = left - 1, self.position + self.batch_size
                yield batch[0] if self.single else batch

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["position"]

    def batches(self, position) -> list[list[int]]:
        """This rank's part of some batches from `position` on, at least one."""
        number = position // self.batch_size
        end = (number // len(self) + 1) * len(self)  # of the pass
        if self.lengths is None:
            count = min(max(1, TOGETHER // self.batch_size), end - number)
            places = np.arange(position, position + count * self.batch_size)
            batches = self.order(places).reshape(count, self.batch_size)
        else:
            first = end - len(self) + number % len(self) // BUCKET * BUCKET
            count = min(BUCKET, end - first)
            places = np.arange(first * self.batch_size, (first + count) * self.batch_size)
            items = self.order(places)
            alike = items[np.argsort(self.lengths[items], kind="stable")]
            keys = np.random.SeedSequence((self.seed, first, 1)).generate_state(4, np.uint64)
            mixed = permute(np.arange(count), count, keys)
            batches = alike.reshape(count, self.batch_size)[mixed][number - first :]
        share = slice(self.rank * self.rank_batch_size, (self.rank + 1) * self.rank_batch_size)
        return batches[:, share].tolist()

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
    Feistel network over the next power of two, walked on from any value >= n (Black & Rogaway
    2002)."""
    bits = max(2, (n - 1).bit_length())
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask, high_mask = (np.uint64((1 << int(size)) - 1) for size in (low, high))
    out = i.astype(np.uint64)
    walking = slice(None)
    while True:
        x = out[walking]
        left, right = x >> low, x & low_mask
        for a, b in keys.reshape(-1, 2):
            left ^= splitmix64(right ^ a) & high_mask
            right ^= splitmix64(left ^ b) & low_mask
        x = left << low | right
        out[walking] = x
        walking = np.flatnonzero(out >= n)
        if not len(walking):
            return out.astype(np.int64)
