"""The order of batches: shuffled, resumable, the same for any number of ranks."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from batches.order import permute
from dataset import (
    ShuffledBatches,
    ShuffledIndices,
    ShuffledOrder,
    SimilarLengthBatches,
    TextDataset,
)


def test_permute_returns_a_permutation():
    keys = np.random.SeedSequence(0).generate_state(4, np.uint64)
    for n in [*range(1, 2500), 4095, 4096, 4097]:
        assert sorted(permute(np.arange(n), n, keys).tolist()) == list(range(n))
    big = permute(np.arange(1000), 10**10, keys)
    assert len(set(big.tolist())) == 1000 and big.min() >= 0 and big.max() < 10**10


def test_the_permutation_looks_random():
    """The test computes chi-squared over 16 x 16 cells of (i, permute(i)) for 20 keys.

    Each value has 225 degrees of freedom. The mean of 20 values therefore lies within
    225 +- 5 * sqrt(2 * 225 / 20) almost surely.
    """
    n = 16 * 1000
    statistics = []
    for seed in range(20):
        keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
        i = np.arange(n)
        cells = np.histogram2d(i, permute(i, n, keys), bins=16)[0]
        statistics.append(((cells - n / 256) ** 2 / (n / 256)).sum())
    assert abs(np.mean(statistics) - 225) < 24


def next_batches(order, num_batches):
    """Return the next batches, over as many epochs as necessary."""
    batches = []
    while len(batches) < num_batches:
        batches += list(order)
    return batches[:num_batches]


def test_an_epoch_reads_every_token_once():
    T, n = 8, 1003
    data = TextDataset(np.arange(n), T)
    order = ShuffledOrder(len(data), seed=3, stride=T)
    num_windows = len(order)
    assert num_windows == (n - 1 - (T - 1)) // T  # whole windows after any offset
    offsets = set()
    for epoch in range(3):
        starts = order.indices(np.arange(epoch * num_windows, (epoch + 1) * num_windows))
        offsets.add(starts[0] % T)
        assert len(np.unique(starts)) == num_windows
        assert (starts % T == starts[0] % T).all()
        assert starts.min() >= 0 and starts.max() < len(data)
    assert len(offsets) > 1  # each epoch begins at another offset


def test_a_batch_may_continue_in_the_next_epoch():
    order = ShuffledBatches(10, batch_size=4, seed=1)
    drawn = [i for batch in next_batches(order, 5) for i in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_the_order_resumes_anywhere_on_any_number_of_ranks():
    whole = next_batches(ShuffledBatches(37, batch_size=4, seed=5), 40)
    for step in (0, 1, 7, 8, 9, 31):
        for world_size in (1, 2, 4):
            ranks = []
            for rank in range(world_size):
                order = ShuffledBatches(37, 4, 5, rank=rank, world_size=world_size)
                order.position = step * 4
                ranks.append(next_batches(order, 5))
            resumed = [[i for slice_ in slices for i in slice_] for slices in zip(*ranks)]
            assert resumed == whole[step : step + 5]
    assert whole != next_batches(ShuffledBatches(37, batch_size=4, seed=6), 40)
    with pytest.raises(ValueError, match="4 is not a multiple of 3"):
        ShuffledBatches(37, 4, world_size=3)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**61), st.integers(0, 2**32), st.data())
def test_permute_maps_different_numbers_to_different_numbers(n, seed, data):
    keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
    numbers = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=50))
    out = permute(np.array(sorted(numbers)), n, keys)
    assert len({*out.tolist()}) == len(numbers)
    assert out.min() >= 0
    assert out.max() < n


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_epoch_that_resumes_twice_has_the_same_batches():
    """Each rank has a loader whose workers prefetch batches.

    The number of windows that the training loop has used decides where a loader resumes.
    """
    data = TextDataset(np.arange(300), 4)  # 296 windows, 37 batches of 8
    whole = next_batches(ShuffledBatches(len(data), 8, seed=2), 21)
    for world_size, workers in itertools.product((1, 2, 4), (0, 1, 4)):
        used = []
        for steps in (5, 7, 9):
            ranks = []
            for rank in range(world_size):
                order = ShuffledBatches(len(data), 8, seed=2, rank=rank, world_size=world_size)
                order.position = 8 * len(used)
                loader = DataLoader(data, sampler=order, batch_size=None, num_workers=workers)
                ranks.append([x[:, 0].tolist() for x, _ in itertools.islice(loader, steps)])
            used += [[i for slice_ in slices for i in slice_] for slices in zip(*ranks)]
        assert used == whole


def test_a_resumed_epoch_ends_at_the_same_batch():
    order = ShuffledBatches(37, batch_size=4)
    order.position = 5 * 4
    assert len(list(order)) == 9 - 5
    assert len(list(order)) == 9
    order.load_state_dict({"position": 12 * 4})
    assert len(list(order)) == 18 - 12
    assert order.state_dict() == {"position": 18 * 4}


def test_a_sampler_of_single_indices_has_the_order_of_the_batches():
    data = torch.utils.data.TensorDataset(torch.arange(50))
    loader = DataLoader(data, batch_size=7, sampler=ShuffledIndices(50, seed=4))
    seen = torch.cat([batch for (batch,) in loader]).tolist()
    assert sorted(seen) == list(range(50)) != seen
    ranks = [list(ShuffledIndices(50, seed=4, rank=r, world_size=2)) for r in range(2)]
    assert [i for pair in zip(*ranks) for i in pair] == seen
    loader = DataLoader(data, batch_sampler=ShuffledBatches(50, 5, seed=4))
    assert torch.cat([batch for (batch,) in loader]).tolist() == seen


@pytest.mark.parametrize("n", [10, 100, 1000, 5000])
def test_batches_of_similar_length_need_less_padding(n):
    lengths = np.random.default_rng(0).integers(1, 500, n)
    order = SimilarLengthBatches(lengths, 8, seed=1)
    batches = list(order)
    assert len(batches) == n // 8
    plain = list(ShuffledBatches(n, 8, seed=1))
    drawn = [i for batch in batches for i in batch]
    assert sorted(drawn) == sorted(i for batch in plain for i in batch)  # the same epoch

    def spread(batches):
        return sum(np.ptp(lengths[batch]) for batch in batches)

    assert spread(batches) <= spread(plain)
    if n >= 1000:
        assert spread(batches) < spread(plain) / 10
        longest = [lengths[batch].max() for batch in batches]
        assert longest != sorted(longest)  # the order of lengths is random
    order.position = 3 * 8
    if n > 24:
        assert list(order) == batches[3:]
    ranks = [SimilarLengthBatches(lengths, 8, 1, rank=r, world_size=2) for r in range(2)]
    assert [a + b for a, b in zip(*ranks)] == batches
    assert list(SimilarLengthBatches(lengths.tolist(), 8, seed=1)) == batches


@pytest.mark.parametrize("form", ["items", "windows"])
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_resumes_twice(workers, form):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")

    def loader():
        order = ShuffledBatches(60, 5, seed=7)
        if form == "items":
            data = torch.utils.data.TensorDataset(torch.arange(60))
            options = {"batch_sampler": order}
        else:
            data = TextDataset(np.arange(64), 4)
            options = {"sampler": order, "batch_size": None}
        return stateful.StatefulDataLoader(data, num_workers=workers, **options)

    whole = [batch[0].tolist() for batch in loader()]
    assert len(whole) == 12
    state = None
    for start, stop in ((0, 2), (2, 5)):
        part = loader()
        if state:
            part.load_state_dict(state)
        batches = iter(part)
        used = [next(batches)[0].tolist() for _ in range(stop - start)]
        assert used == whole[start:stop]
        state = part.state_dict()
    last = loader()
    last.load_state_dict(state)
    assert [batch[0].tolist() for batch in last] == whole[5:]


def test_the_order_equals_that_of_older_versions():
    """A run must resume with the same order: commit 58944c1 wrote these indices."""
    assert next_batches(ShuffledBatches(1000, 8, seed=7, stride=4), 3) == [
        [138, 74, 510, 558, 234, 690, 702, 846],
        [286, 550, 430, 210, 506, 126, 870, 798],
        [398, 982, 38, 682, 130, 186, 282, 934],
    ]
    assert next_batches(ShuffledBatches(11, 4, seed=1), 6) == [
        [1, 5, 4, 8], [9, 3, 10, 2], [0, 6, 7, 2], [9, 8, 3, 5], [7, 10, 6, 0], [4, 1, 10, 2],
    ]  # fmt: skip
    ranks = list(ShuffledIndices(20, seed=4, rank=1, world_size=2))
    assert ranks == [18, 6, 5, 14, 16, 15, 9, 12, 4, 8]
    lengths = np.random.default_rng(0).integers(1, 500, 1000)
    similar = next_batches(SimilarLengthBatches(lengths, 8, seed=1), 130)
    assert similar[0] == [565, 800, 207, 701, 174, 536, 143, 181]
    assert similar[64] == [670, 698, 932, 16, 837, 451, 138, 1]
    assert sha256(similar) == "fd60cc359ecd928b"
    assert sha256(next_batches(ShuffledBatches(301_000, 8, 1337, 256), 3000)) == "037454781514ef1d"


def sha256(batches):
    return hashlib.sha256(np.array(batches, "<i8").tobytes()).hexdigest()[:16]


def test_wrong_arguments_are_value_errors():
    for make in (
        lambda **options: ShuffledBatches(9, 6, **options),
        lambda **options: ShuffledIndices(9, **options),
        lambda **options: SimilarLengthBatches(range(9), 6, **options),
    ):
        for rank, world_size in ((2, 2), (3, 2), (-1, 2), (1, 1), (0, 0)):
            with pytest.raises(ValueError, match=f"rank must be from 0 .*, not {rank}"):
                make(rank=rank, world_size=world_size)
    for batch_size in (0, -4):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, not {batch_size}"):
            ShuffledBatches(9, batch_size)
    for empty in (lambda: ShuffledBatches(0, 4), lambda: SimilarLengthBatches([], 4)):
        with pytest.raises(ValueError, match="the dataset is empty"):
            empty()
    for lengths in ([[1, 2], [3, 4]], ["a", "b"], None):
        with pytest.raises(ValueError, match="lengths must be one number per item"):
            SimilarLengthBatches(lengths, 1)
    with pytest.raises(ValueError, match=r"stride \(0\) must be at least 1"):
        ShuffledOrder(9, stride=0)
