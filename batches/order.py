"""The order of the data: a pure function of (seed, epoch, position), so that a run can resume.

    order = ShuffledBatches(len(dataset), batch_size=32, seed=0)
    DataLoader(dataset, sampler=order, batch_size=None)     # TextDataset: one gather per batch
    DataLoader(dataset, batch_sampler=order)                # any other dataset
    DataLoader(dataset, batch_size=32, sampler=ShuffledIndices(len(dataset)))

- permute: a keyed permutation of range(n), computed index by index.
- ShuffledOrder: one such permutation per epoch.
- OrderedBatches: a sampler of batches in any order.
- ShuffledBatches, ShuffledIndices: samplers of batches and of single indices in this order.
- SimilarLengthBatches: a sampler of batches whose items have similar lengths.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler

from common.hashing import splitmix64

ITEMS_AT_ONCE = 1 << 15  # items whose order is computed at once
BUCKET_BATCHES = 64  # batches whose items are sorted by length together


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return where a keyed permutation of range(n) sends some indices, in O(1) memory.

    A Feistel network permutes a range whose size is the next power of two. An index that leaves
    range(n) goes through the network again until it is back in range(n) (cycle walking, Black &
    Rogaway 2002).

    Example: for n=3 and some keys, [0, 1, 2] -> [2, 0, 1].

    Args:
        indices: Integers from 0 to n - 1, (k,).
        n: Size of the range, less than 2**62.
        keys: Keys of the network, (r,) uint64 with r even. Each pair of keys makes two rounds.

    Returns:
        The new index for each index, (k,) int64.
    """
    bits = max(2, (n - 1).bit_length())
    right_bits = np.uint64(bits // 2)
    right_mask = np.uint64((1 << (bits // 2)) - 1)
    left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    permuted = indices.astype(np.uint64)
    outside: Any = slice(None)  # all of `permuted` at first, then the positions outside range(n)
    while True:
        values = permuted[outside]
        left = values >> right_bits
        right = values & right_mask
        for left_key, right_key in keys.reshape(-1, 2):
            left ^= splitmix64(right ^ left_key) & left_mask
            right ^= splitmix64(left ^ right_key) & right_mask
        permuted[outside] = left << right_bits | right
        outside = np.flatnonzero(permuted >= n)
        if not len(outside):
            return permuted.astype(np.int64)


class ShuffledOrder:
    """The order of a dataset's items, epoch after epoch, without storing it.

    - Position p belongs to epoch p // n, where n = len(order) items make an epoch.
    - Every epoch is a permutation of its own: no item comes twice in an epoch.
    - With stride s, an epoch visits every s-th item only. Each epoch begins at another offset.
    - Over windows that slide by one token, a stride of sequence_length makes epochs that read no
      token twice. Each epoch then divides the text into other windows.

    Example: 10 items with stride 2 make epochs of 5; one epoch may be [4, 0, 8, 2, 6], the next
    [3, 9, 1, 5, 7].

    Args:
        num_items: Number of items of the dataset.
        seed: Seed of all permutations.
        stride: Distance between the items of one epoch.

    Raises:
        ValueError: There are no items, or an argument is out of range.
    """

    def __init__(self, num_items: int, seed: int = 0, stride: int = 1):
        if num_items < 1:
            raise ValueError("the dataset is empty: there is nothing to shuffle")
        if stride < 1 or seed < 0:
            raise ValueError(f"stride ({stride}) must be at least 1 and seed ({seed}) at least 0")
        self.seed = seed
        self.stride = min(stride, num_items)
        self.epoch_items = num_items // self.stride  # the same from every offset

    def __len__(self) -> int:
        return self.epoch_items

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the index into the dataset at each position, (n,) int64 both."""
        indices = np.empty(len(positions), np.int64)
        epochs = positions // self.epoch_items
        for epoch in np.unique(epochs):
            seeds = np.random.SeedSequence((self.seed, int(epoch)))
            keys = seeds.generate_state(5, np.uint64)
            in_epoch = epochs == epoch
            positions_in_epoch = positions[in_epoch] % self.epoch_items
            permuted = permute(positions_in_epoch, self.epoch_items, keys[:4])
            offset = int(keys[4] % np.uint64(self.stride))
            indices[in_epoch] = permuted * self.stride + offset
        return indices


class Order(Protocol):
    """An endless order of a dataset's items: ShuffledOrder, or MixtureOrder in mixture.py."""

    def __len__(self) -> int:
        """Return the number of items in an epoch."""

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the index into the dataset at each position, (n,) int64 both."""


class OrderedBatches(Sampler):
    """Sampler of batches of indices, in a given order.

    - The state is one integer, `position`: items over all ranks since training began.
    - One iteration is one pass: as many whole batches as an epoch has. A batch may reach from one
      epoch into the next, so that no item is dropped.
    - A batch is the same for any number of ranks; each rank gets an equal slice of it.
    - To resume, set `position` to the number of items that training has used. Count these items in
      the training loop, since DataLoader workers draw ahead of it. torchdata's StatefulDataLoader
      counts them by calling state_dict.

    Args:
        order: The order of the items.
        batch_size: Items per batch, over all ranks.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: The ranks cannot share a batch equally.
    """

    def __init__(self, order: Order, batch_size: int, rank: int = 0, world_size: int = 1):
        check_rank(rank, world_size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not a multiple of {world_size} processes")
        self.order = order
        self.batch_size = batch_size
        self.rank_batch_size = batch_size // world_size
        self.rank_slice = slice(rank * self.rank_batch_size, (rank + 1) * self.rank_batch_size)
        self.position = 0

    def __len__(self) -> int:
        return max(1, len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        number = self.position // self.batch_size
        end = self._end_of_pass(number)
        while number < end:
            for batch in self._batches(number, end)[:, self.rank_slice].tolist():
                number += 1
                self.position += self.batch_size
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the state for load_state_dict."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position that state_dict returned."""
        self.position = state["position"]

    def _end_of_pass(self, number: int) -> int:
        """Return the number of the first batch of the pass after the pass of batch `number`."""
        return (number // len(self) + 1) * len(self)

    def _batches(self, number: int, end: int) -> np.ndarray:
        """Return (n, batch_size) indices: batch `number` and some that follow it, before `end`."""
        count = min(max(1, ITEMS_AT_ONCE // self.batch_size), end - number)
        positions = np.arange(count * self.batch_size) + self.position
        return self.order.indices(positions).reshape(count, self.batch_size)


class ShuffledBatches(OrderedBatches):
    """Sampler of batches of indices, in the order of ShuffledOrder; see OrderedBatches.

    Example: 10 items in batches of 4 -> [[1, 5, 4, 8], [9, 3, 7, 2]], and the next pass begins
    with [0, 6], the rest of the epoch.

    Args:
        num_items: Number of items of the dataset.
        batch_size: Items per batch, over all ranks.
        seed: Seed of the order.
        stride: Distance between the items of one epoch, see ShuffledOrder.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: There are no items, or the ranks cannot share a batch equally.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int = 0,
        stride: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(ShuffledOrder(num_items, seed, stride), batch_size, rank, world_size)
        self.seed = seed


class ShuffledIndices(ShuffledBatches):
    """Sampler of single indices, in the order of ShuffledOrder: a DataLoader's `sampler`.

    Example: 4 items -> 2, 0, 3, 1; of two ranks, rank 0 gets 2, 3 and rank 1 gets 0, 1.

    Args:
        num_items: Number of items of the dataset.
        seed: Seed of the order.
        stride: Distance between the items of one epoch, see ShuffledOrder.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, num_items: int, seed: int = 0, stride: int = 1, rank: int = 0, world_size: int = 1
    ):
        super().__init__(num_items, world_size, seed, stride, rank, world_size)

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]
        for (index,) in super().__iter__():
            yield index


class SimilarLengthBatches(ShuffledBatches):
    """Sampler of batches whose items have similar lengths, so that padding is short.

    - The items of 64 batches are sorted by length and divided into 64 new batches, which are
      shuffled.
    - State, ranks and passes are those of ShuffledBatches.

    Example: lengths [9, 2, 8, 1] in batches of 2 -> items [0, 2] and [3, 1], in random order.

    Args:
        lengths: Length of each item, (num_items,).
        batch_size: Items per batch, over all ranks.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: There are no items, or the ranks cannot share a batch equally.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.lengths = np.asarray(lengths)
        if self.lengths.ndim != 1 or self.lengths.dtype.kind not in "iuf":
            raise ValueError("lengths must be one number per item")
        super().__init__(len(self.lengths), batch_size, seed, 1, rank, world_size)

    def _batches(self, number: int, end: int) -> np.ndarray:
        start_of_pass = end - len(self)
        first = number - (number - start_of_pass) % BUCKET_BATCHES  # first batch of the bucket
        count = min(BUCKET_BATCHES, end - first)
        positions = np.arange(first * self.batch_size, (first + count) * self.batch_size)
        items = self.order.indices(positions)
        by_length = items[np.argsort(self.lengths[items], kind="stable")]
        seeds = np.random.SeedSequence((self.seed, first, 1))
        shuffled = permute(np.arange(count), count, seeds.generate_state(4, np.uint64))
        batches = by_length.reshape(count, self.batch_size)[shuffled]
        return batches[number - first :]


def check_rank(rank: int, world_size: int) -> None:
    """Check that `rank` is the number of one of `world_size` processes.

    Raises:
        ValueError: The rank is not from 0 to world_size - 1.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1 ({world_size - 1}), not {rank}")
