"""Mixtures: exact proportions, the order of each corpus, and datasets of windows as one."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from batches.mixture import alternate, proportions
from dataset import (
    ConcatTextDataset,
    MixtureBatches,
    MixtureOrder,
    ShuffledBatches,
    ShuffledOrder,
    TextDataset,
    create_dataloaders,
    create_mixture_dataloaders,
)


def walk(num_items, weights, seed, stride, n):
    """Return the first n indices of a mixture by going from item to item, without a pattern."""
    shares = proportions(weights)
    orders = [ShuffledOrder(count, seed, stride) for count in num_items]
    drawn = [0] * len(shares)
    indices = []
    for position in range(n):
        may_come = [k for k, share in enumerate(shares) if drawn[k] < share * (position + 1)]
        k = min(may_come, key=lambda k: (math.ceil((drawn[k] + 1) / shares[k]), shares[k]))
        own_index = orders[k].indices(np.array([drawn[k]]))[0]
        indices.append(sum(num_items[:k]) + int(own_index))
        drawn[k] += 1
        for count, share in zip(drawn, shares):
            assert abs(count - (position + 1) * share) < 1
    return indices


@pytest.mark.parametrize(
    "num_items, weights, stride",
    [
        ([40], [2], 1),
        ([40, 9], [0.7, 0.3], 1),
        ([40, 90, 33], [1, 1, 1], 4),
        ([50, 20, 30, 9], [0.001, 0.5, 7, 3], 2),
        ([30, 31], [301_966, 36_059], 3),  # rounded to 1/10,000
    ],
)
def test_the_order_equals_that_of_a_walk(num_items, weights, stride):
    n = 700
    expected = walk(num_items, weights, 3, stride, n)
    order = MixtureOrder(num_items, weights, seed=3, stride=stride)
    assert order.indices(np.arange(n)).tolist() == expected
    some = np.random.default_rng(0).permutation(n)[:50]  # at any positions, in any order
    assert order.indices(some).tolist() == [expected[position] for position in some]
    for world_size, position in itertools.product((1, 2, 4), (0, 8, 88)):
        ranks = []
        for rank in range(world_size):
            batches = MixtureBatches(num_items, weights, 8, 3, stride, rank, world_size)
            batches.position = position
            ranks.append(next(iter(batches)))
        batch = [index for part in ranks for index in part]
        assert batch == expected[position : position + 8]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60) | st.integers(1, 2000), min_size=1, max_size=7))
def test_every_beginning_of_a_pattern_has_the_proportions_within_one(parts):
    pattern = alternate(parts)
    counts = np.cumsum(pattern[:, None] == np.arange(len(parts)), axis=0)
    length = len(pattern)
    exact = np.arange(1, length + 1)[:, None] * np.array(parts)  # times length
    assert (np.abs(counts * length - exact) < length).all()
    assert counts[-1].tolist() == parts


def test_far_positions_are_located_at_once():
    order = MixtureOrder([1000, 10], [Fraction(7, 10), Fraction(3, 10)])
    position = 10**15
    datasets, own_positions = order.locate(position + np.arange(10))
    assert sorted(datasets.tolist()) == [0] * 7 + [1] * 3
    assert own_positions[datasets == 0].tolist() == [7 * 10**14 + i for i in range(7)]
    assert own_positions[datasets == 1].tolist() == [3 * 10**14 + i for i in range(3)]


def test_a_mixture_of_one_has_the_order_of_its_dataset():
    alone = ShuffledBatches(1000, 8, seed=7, stride=4)
    mixture = MixtureBatches([1000], [0.2], 8, seed=7, stride=4)
    assert len(mixture) == len(alone)
    assert list(mixture) + list(mixture) == list(alone) + list(alone)
    assert mixture.state_dict() == alone.state_dict()


def test_an_item_comes_again_after_all_others_of_its_dataset():
    num_items = [100, 7]
    order = MixtureOrder(num_items, [1, 1], seed=2)
    indices = order.indices(np.arange(200))
    small = indices[indices >= 100]
    assert len(small) == 100
    for epoch in range(14):
        assert sorted(small[7 * epoch : 7 * epoch + 7]) == list(range(100, 107))
    assert sorted(indices[indices < 100]) == list(range(100))
    assert order.epochs(200) == [1, 100 / 7]


def test_the_docstring_examples():
    assert proportions([7, 3]) == proportions([0.7, 0.3]) == [Fraction(7, 10), Fraction(3, 10)]
    assert alternate([3, 1]).tolist() == [0, 0, 1, 0]
    order = MixtureOrder([4, 2], [3, 1])
    assert order.indices(np.arange(8)).tolist() == [3, 1, 4, 2, 0, 3, 5, 1]
    datasets, own_positions = order.locate(np.array([0, 2, 4, 6]))
    assert (datasets.tolist(), own_positions.tolist()) == ([0, 1, 0, 1], [0, 0, 3, 1])
    assert order.epochs(8) == [1.5, 1.0]
    assert list(MixtureBatches([4, 2], [3, 1], batch_size=4)) == [[3, 1, 4, 2]]


def test_shares_are_exact_or_rounded_to_a_ten_thousandth():
    assert proportions([1, 1, 1]) == [Fraction(1, 3)] * 3
    sizes = [301_966, 36_059, 5000.5]
    shares = proportions(sizes)
    assert sum(shares) == 1
    for size, share in zip(sizes, shares):
        assert abs(share - size / sum(sizes)) <= 1e-4
    assert proportions(shares) == shares
    for weights, words in (
        ([1, 0], "positive number, not 0"),
        ([1, -2], "positive number, not -2"),
        ([1, math.nan], "positive number, not nan"),
        ([1, math.inf], "positive number, not inf"),
        ([1e6, 1], "weight 1 is too small a part of 1e"),
        ([], "at least one weight"),
    ):
        with pytest.raises(ValueError, match=words):
            proportions(weights)
    with pytest.raises(ValueError, match="2 datasets have 1 weights"):
        MixtureOrder([3, 4], [1])
    with pytest.raises(ValueError, match="the dataset is empty"):
        MixtureOrder([3, 0], [1, 1])


def test_datasets_of_windows_are_read_as_one():
    parts = [TextDataset(np.arange(start, start + 20), 4) for start in (0, 100, 200)]
    data = ConcatTextDataset(parts)
    rows = [pair for part in parts for pair in (part[i] for i in range(len(part)))]
    assert len(data) == len(rows) == 48
    indices = [47, 0, 16, 15, 16, -1, 32]
    x, y = data[indices]
    for i, index in enumerate(indices):
        for expected in (rows[index], data[index], data.__getitems__([index])[0]):
            assert torch.equal(x[i], expected[0]) and torch.equal(y[i], expected[1])
    for outside in ([48], [0, -49]):
        with pytest.raises(IndexError, match="out of range: there are 48"):
            data[outside]


@pytest.fixture
def corpora(tmp_path):
    """The folders of a running text and of documents."""
    make_corpus(tmp_path / "a", ["".join(chr(33 + i % 90) for i in range(4000))])
    make_corpus(tmp_path / "b", ["one for sorrow", "two for mirth"] * 40, documents=True)
    return [tmp_path / "a", tmp_path / "b"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("token_noise", [0, 0.2])
def test_a_mixture_has_the_sequences_of_each_corpus_in_their_order(corpora, workers, token_noise):
    options = {"sequence_length": 16, "seed": 5, "token_noise": token_noise}
    weights = dict(zip(corpora, (3, 1)))
    mixture, val_loaders = create_mixture_dataloaders(
        weights, batch_size=8, num_workers=workers, **options
    )
    alone = [create_dataloaders(folder, batch_size=4, **options) for folder in corpora]
    streams = [itertools.chain.from_iterable(zip(*batch) for batch in each[0]) for each in alone]
    batches = list(itertools.islice(mixture, 10))
    for x, y in batches:
        for dataset, own_x, own_y in zip([0, 0, 1, 0] * 2, x, y, strict=True):
            expected_x, expected_y = next(streams[dataset])
            assert torch.equal(own_x, expected_x) and torch.equal(own_y, expected_y)
    for val_loader, (_, expected) in zip(val_loaders, alone, strict=True):
        found = torch.cat([x for x, _ in val_loader])
        assert torch.equal(found, torch.cat([x for x, _ in expected]))
    resumed = create_mixture_dataloaders(weights, batch_size=8, **options)[0]
    resumed.sampler.position = 8 * 8
    for (x, _), (expected_x, _) in zip(resumed, batches[8:]):
        assert torch.equal(x, expected_x)


def test_a_loader_with_a_batch_sampler_reads_a_mixture(corpora):
    data = ConcatTextDataset([TextDataset(folder / "train", 16) for folder in corpora])
    order = MixtureBatches([len(part) for part in data.datasets], [1, 1], 4)
    x, _ = next(iter(DataLoader(data, batch_sampler=order)))
    order.position = 0
    assert torch.equal(x, data[next(iter(order))][0])
