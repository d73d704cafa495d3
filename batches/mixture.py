"""A mixture: sequences from several corpora in fixed proportions.

    data = ConcatTextDataset([TextDataset("data/a/train", 64), TextDataset("data/b/train", 64)])
    order = MixtureBatches([len(d) for d in data.datasets], [0.7, 0.3], batch_size=32, stride=64)
    DataLoader(data, sampler=order, batch_size=None)

- proportions: weights to exact shares.
- alternate: a pattern that repeats, in which each dataset has its share.
- MixtureOrder: the dataset that each position draws from, and the item of that dataset.
- MixtureBatches: a sampler of batches in this order.
- ConcatTextDataset: several datasets of windows as one.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import ConcatDataset

from batches.order import OrderedBatches, ShuffledOrder

LONGEST_PATTERN = 10_000  # items after which every dataset has had exactly its share


def proportions(weights: Sequence[float | Fraction]) -> list[Fraction]:
    """Return the share of each dataset in a mixture; the shares add up to 1.

    Shares are exact if they have a common denominator of at most 10,000. Other shares are rounded
    to multiples of 1/10,000.

    Example: weights [7, 3] and [0.7, 0.3] -> [7/10, 3/10].

    Args:
        weights: Positive numbers. Only their ratios matter.

    Raises:
        ValueError: A weight is not a positive number, or a share is rounded to 0.
    """
    if not len(weights):
        raise ValueError("a mixture needs at least one weight")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ValueError(f"a weight must be a positive number, not {weight}")
    # str: 0.7 stands for 7/10, not for the binary number beside it
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    if math.lcm(*(share.denominator for share in shares)) <= LONGEST_PATTERN:
        return shares
    ends = [round(end * LONGEST_PATTERN) for end in itertools.accumulate(shares)]
    parts = [end - start for start, end in itertools.pairwise([0, *ends])]
    if 0 in parts:
        weight = weights[parts.index(0)]
        raise ValueError(
            f"the weight {float(weight):g} is too small a part of {float(total):g}, the sum of "
            f"weights: give it at least 1/{LONGEST_PATTERN} of the sum"
        )
    return [Fraction(part, LONGEST_PATTERN) for part in parts]


def alternate(parts: Sequence[int]) -> np.ndarray:
    """Return a pattern with parts[k] items of each dataset k, spread evenly.

    Among the first n items of the pattern, each dataset has its share of n, rounded up or down.
    To this end, item j of a dataset with share s comes between the positions j / s and
    (j + 1) / s. The position takes, of the datasets whose next item may come, the one whose item
    must come first (earliest deadline first; Baruah et al. 1996).

    Example: parts [3, 1] -> [0, 0, 1, 0].

    Args:
        parts: Items of each dataset in the pattern, positive.

    Returns:
        The number of a dataset at each position, (sum(parts),) int64.
    """
    length = sum(parts)
    drawn = [0] * len(parts)
    pattern = np.empty(length, np.int64)

    def deadline(dataset: int) -> tuple[int, int]:
        rounded_up = -(-(drawn[dataset] + 1) * length // parts[dataset])
        return rounded_up, parts[dataset]  # of two deadlines, that of the rarer dataset

    for position in range(length):
        may_come = [k for k in range(len(parts)) if drawn[k] * length < parts[k] * (position + 1)]
        dataset = min(may_come, key=deadline)
        drawn[dataset] += 1
        pattern[position] = dataset
    return pattern


class MixtureOrder:
    """The order of several datasets' items in fixed proportions, without storing it.

    - Among the first n items, each dataset has its share of n, rounded up or down.
    - The items of one dataset come in the order that it has alone (ShuffledOrder). An item comes
      again only after all other items of its dataset.
    - A mixture of one dataset has the order of ShuffledOrder.

    Example: datasets of 4 and 2 items with weights [3, 1]. The items 0 to 3 are of the first
    dataset, and 4 and 5 are of the second one: [3, 1, 4, 2, 0, 3, 5, 1].

    Args:
        num_items: Number of items of each dataset.
        weights: Weight of each dataset, see proportions.
        seed: Seed of all permutations.
        stride: Distance between the items of one epoch, see ShuffledOrder.

    Raises:
        ValueError: A dataset is empty, or an argument is out of range.
    """

    def __init__(
        self,
        num_items: Sequence[int],
        weights: Sequence[float | Fraction],
        seed: int = 0,
        stride: int = 1,
    ):
        if len(num_items) != len(weights):
            raise ValueError(f"{len(num_items)} datasets have {len(weights)} weights")
        self.orders = [ShuffledOrder(n, seed, stride) for n in num_items]
        self.first_items = np.cumsum([0, *num_items[:-1]])
        self.shares = proportions(weights)
        length = math.lcm(*(share.denominator for share in self.shares))
        self.parts = np.array([int(share * length) for share in self.shares])
        self.pattern = alternate(self.parts.tolist())
        # how many earlier items of the pattern are of the same dataset
        self.earlier = np.empty(length, np.int64)
        for dataset, part in enumerate(self.parts):
            self.earlier[self.pattern == dataset] = np.arange(part)

    def __len__(self) -> int:
        """Return the number of items in an epoch of all datasets together."""
        return sum(map(len, self.orders))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the dataset of each position, and the position in the order of this dataset.

        Example: with the weights [3, 1], positions [0, 2, 4, 6] -> datasets [0, 1, 0, 1] and their
        positions [0, 0, 3, 1].

        Args:
            positions: Positions in the mixture, (n,) int64.

        Returns:
            Two arrays, (n,) int64 each.
        """
        patterns, places = np.divmod(positions, len(self.pattern))
        datasets = self.pattern[places]
        return datasets, patterns * self.parts[datasets] + self.earlier[places]

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the index at each position, (n,) int64 both.

        Indices count the items of all datasets, one dataset after another.
        """
        datasets, own_positions = self.locate(positions)
        indices = np.empty(len(positions), np.int64)
        for dataset in np.unique(datasets):
            of_dataset = datasets == dataset
            own_indices = self.orders[dataset].indices(own_positions[of_dataset])
            indices[of_dataset] = own_indices + self.first_items[dataset]
        return indices

    def epochs(self, position: int) -> list[float]:
        """Return how often each dataset is read in the items before a position.

        Example: datasets of 4 and 2 items with weights [3, 1], position 8 -> [1.5, 1.0].
        """
        patterns, place = divmod(position, len(self.pattern))
        rest = np.bincount(self.pattern[:place], minlength=len(self.parts)).tolist()
        parts = self.parts.tolist()  # Python's integers, as position may be beyond 64 bits
        return [
            (patterns * part + count) / len(order)
            for part, count, order in zip(parts, rest, self.orders)
        ]


class MixtureBatches(OrderedBatches):
    """Sampler of batches of indices, in the order of MixtureOrder.

    - Indices count the items of all datasets, one dataset after another, as torch's ConcatDataset
      and ConcatTextDataset do.
    - State and ranks are those of OrderedBatches. A pass is as many whole batches as the epochs
      of all datasets have together.

    Example: datasets of 4 and 2 items, weights [3, 1], in batches of 4 -> [[3, 1, 4, 2]].

    Args:
        num_items: Number of items of each dataset.
        weights: Weight of each dataset, see proportions.
        batch_size: Items per batch, over all ranks.
        seed: Seed of the order.
        stride: Distance between the items of one epoch, see ShuffledOrder.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: An argument is out of range, or the ranks cannot share a batch equally.
    """

    order: MixtureOrder

    def __init__(
        self,
        num_items: Sequence[int],
        weights: Sequence[float | Fraction],
        batch_size: int,
        seed: int = 0,
        stride: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        order = MixtureOrder(num_items, weights, seed, stride)
        super().__init__(order, batch_size, rank, world_size)


class ConcatTextDataset(ConcatDataset):
    """Several datasets of windows as one: torch's ConcatDataset, with lists of indices.

    - Item i of the second dataset has the index i + n, with n = len(first dataset).
    - A list or array of indices gives (B, T) tensors, read in one gather per dataset.

    Args:
        datasets: TextDatasets or NoisyTextDatasets with one sequence_length.
    """

    def __getitem__(self, index: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x, y): (T,) tensors for one index, (B, T) tensors for a list of indices."""
        indices = np.asarray(index)
        if indices.ndim == 0:
            return super().__getitem__(int(indices))
        outside = indices[(indices < -len(self)) | (indices >= len(self))]
        if outside.size:
            raise IndexError(f"window {outside.flat[0]} is out of range: there are {len(self):,}")
        indices = indices % len(self)
        numbers = np.searchsorted(self.cumulative_sizes, indices, side="right")
        first_items = [0, *self.cumulative_sizes]
        first: Any = self.datasets[0]
        x = np.empty((len(indices), first.sequence_length), np.int64)
        y = np.empty_like(x)
        for number in np.unique(numbers):
            rows = np.flatnonzero(numbers == number)
            dataset: Any = self.datasets[number]
            own_x, own_y = dataset[indices[rows] - first_items[number]]
            # in NumPy: torch would start threads for so few rows
            x[rows] = own_x.numpy()
            y[rows] = own_y.numpy()
        return torch.from_numpy(x), torch.from_numpy(y)

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the (x, y) of each index, read together; DataLoader calls this method."""
        x, y = self[indices]
        return list(zip(x, y))
