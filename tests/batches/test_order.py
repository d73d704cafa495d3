import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from batches.order import permute
from dataset import ShuffledBatches, TextDataset


def test_the_permutation_is_one():
    keys = np.random.SeedSequence(0).generate_state(4, np.uint64)
    for n in [*range(1, 2500), 4095, 4096, 4097]:
        assert sorted(permute(np.arange(n), n, keys).tolist()) == list(range(n))
    big = permute(np.arange(1000), 10**10, keys)
    assert len(set(big.tolist())) == 1000 and big.min() >= 0 and big.max() < 10**10


def test_the_permutation_looks_random():
    """Chi-squared over 16 x 16 cells of (i, permute(i)), for 20 keys: 225 degrees of freedom each,
    so the mean of 20 lies within 225 +- 5 * sqrt(2 * 225 / 20) all but surely."""
    n, statistics = 16 * 1000, []
    for seed in range(20):
        keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
        i = np.arange(n)
        cells = np.histogram2d(i, permute(i, n, keys), bins=16)[0]
        statistics.append(((cells - n / 256) ** 2 / (n / 256)).sum())
    assert abs(np.mean(statistics) - 225) < 24


def drain(order, batches):
    """The next `batches` batches, over as many iterations as that takes."""
    out = []
    while len(out) < batches:
        out += list(order)
    return out[:batches]


def test_an_epoch_reads_every_token_once():
    T, n = 8, 1003
    data = TextDataset(np.arange(n), T)
    order = ShuffledBatches(len(data), batch_size=1, seed=3, stride=T)
    blocks = order.num_items
    assert blocks == (n - 1 - (T - 1)) // T  # whole blocks behind any offset
    offsets = set()
    for epoch in range(3):
        starts = order.order(np.arange(epoch * blocks, (epoch + 1) * blocks))
        offsets.add(starts[0] % T)
        assert len(np.unique(starts)) == blocks
        assert (starts % T == starts[0] % T).all()
        assert starts.min() >= 0 and starts.max() < len(data)
    assert len(offsets) > 1  # cut elsewhere each time


def test_batches_reach_over_epochs():
    order = ShuffledBatches(10, batch_size=4, seed=1)
    drawn = [i for batch in drain(order, 5) for i in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_order_can_be_resumed_anywhere_on_any_number_of_ranks():
    whole = drain(ShuffledBatches(37, batch_size=4, seed=5), 40)
    for step in (0, 1, 7, 8, 9, 31):
        for world_size in (1, 2, 4):
            ranks = []
            for rank in range(world_size):
                order = ShuffledBatches(37, 4, 5, rank=rank, world_size=world_size)
                order.position = step * 4
                ranks.append(drain(order, 5))
            resumed = [[i for part in parts for i in part] for parts in zip(*ranks)]
            assert resumed == whole[step : step + 5]
    assert whole != drain(ShuffledBatches(37, batch_size=4, seed=6), 40)
    with pytest.raises(ValueError, match="4 is not a multiple of 3"):
        ShuffledBatches(37, 4, world_size=3)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**61), st.integers(0, 2**32), st.data())
def test_the_permutation_sends_no_two_to_one_place(n, seed, data):
    keys = np.random.SeedSequence(seed).generate_state(4, np.uint64)
    some = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=50))
    out = permute(np.array(sorted(some)), n, keys)
    assert len({*out.tolist()}) == len(some) and out.min() >= 0 and out.max() < n


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resumed_twice_in_an_epoch_with_workers():
    """Loaders whose workers draw ahead, one a rank, stopped and gone on with by the windows that
    were used: the same global batches."""
    data = TextDataset(np.arange(300), 4)  # 296 windows, 37 batches of 8
    whole = drain(ShuffledBatches(len(data), 8, seed=2), 21)
    for world_size, workers in itertools.product((1, 2, 4), (0, 1, 4)):
        used = []
        for steps in (5, 7, 9):
            ranks = []
            for rank in range(world_size):
                order = ShuffledBatches(len(data), 8, seed=2, rank=rank, world_size=world_size)
                order.position = 8 * len(used)
                loader = DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=list)
                ranks.append([x[:, 0].tolist() for x, _ in itertools.islice(loader, steps)])
            used += [[i for part in parts for i in part] for parts in zip(*ranks)]
        assert used == whole


def test_a_pass_ends_where_it_would_have():
    order = ShuffledBatches(37, batch_size=4)
    order.position = 5 * 4
    assert len(list(order)) == 9 - 5 and len(list(order)) == 9
    order.load_state_dict({"position": 12 * 4})
    assert len(list(order)) == 18 - 12 and order.state_dict() == {"position": 18 * 4}


def test_a_plain_sampler_of_anyones_dataset():
    data = torch.utils.data.TensorDataset(torch.arange(50))
    loader = DataLoader(data, batch_size=7, sampler=ShuffledBatches(50, seed=4))
    seen = torch.cat([batch for (batch,) in loader]).tolist()
    assert sorted(seen) == list(range(50)) != seen
    ranks = [list(ShuffledBatches(50, seed=4, rank=r, world_size=2)) for r in range(2)]
    assert [i for pair in zip(*ranks) for i in pair] == seen
    loader = DataLoader(data, batch_sampler=ShuffledBatches(50, 5, seed=4))
    assert torch.cat([batch for (batch,) in loader]).tolist() == seen


@pytest.mark.parametrize("n", [10, 100, 1000, 5000])
def test_batches_of_similar_length(n):
    lengths = np.random.default_rng(0).integers(1, 500, n)
    order = ShuffledBatches(n, 8, seed=1, lengths=lengths)
    batches = list(order)
    assert len(batches) == n // 8
    plain = list(ShuffledBatches(n, 8, seed=1))
    drawn = [i for batch in batches for i in batch]
    assert sorted(drawn) == sorted(i for batch in plain for i in batch)  # the same epoch
    spread = lambda batches: sum(np.ptp(lengths[batch]) for batch in batches)  # noqa: E731
    assert spread(batches) <= spread(plain)
    if n >= 1000:
        assert spread(batches) < spread(plain) / 10
        longest = [lengths[batch].max() for batch in batches]
        assert longest != sorted(longest)  # short and long ones mixed
    order.position = 3 * 8
    assert list(order) == batches[3:] if n > 24 else True
    ranks = [ShuffledBatches(n, 8, 1, rank=r, world_size=2, lengths=lengths) for r in range(2)]
    assert [a + b for a, b in zip(*ranks)] == batches


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_goes_on_where_it_was(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    data = torch.utils.data.TensorDataset(torch.arange(60))

    def loader():
        order = ShuffledBatches(60, 5, seed=7)
        return stateful.StatefulDataLoader(data, batch_sampler=order, num_workers=workers)

    whole = [batch.tolist() for (batch,) in loader()]
    first, state = loader(), None
    for step in (2, 5):  # stopped twice
        if state:
            first = loader()
            first.load_state_dict(state)
        batches, done = iter(first), 0 if step == 2 else 2
        used = [next(batches)[0].tolist() for _ in range(step - done)]
        assert used == whole[done:step]
        state = first.state_dict()
    last = loader()
    last.load_state_dict(state)
    assert [batch.tolist() for (batch,) in last] == whole[5:]
