import json
import pickle

import numpy as np
import pytest
import torch
from conftest import make_corpus

from dataset import ShuffledBatches, TextDataset, create_dataloaders, newest_corpus, permute


def write_corpus(folder, shards, dtype="uint16", vocab_size=50_257):
    """A split "train" of one file per array in `shards`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, tokens in enumerate(shards):
        name = f"train-{i:05}-of-{len(shards):05}.bin"
        np.asarray(tokens, dtype=dtype).tofile(folder / name)
        files.append({"name": name, "tokens": len(tokens)})
    tokens = sum(len(shard) for shard in shards)
    metadata = {
        "format_version": 1,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer": {"name": "made", "sha256": "by a test"},
        "splits": {"train": {"files": files, "tokens": tokens, "bytes": tokens}},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder / "train"


def test_the_docstrings_example():
    dataset = TextDataset(np.arange(7), sequence_length=3, stride=2)
    assert [(x.tolist(), y.tolist()) for x, y in (dataset[0], dataset[1])] == [
        ([0, 1, 2], [1, 2, 3]),
        ([2, 3, 4], [3, 4, 5]),
    ]
    assert len(dataset) == 2


@pytest.mark.parametrize("stride", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("n", [9, 10, 16, 17, 40])
def test_windows_by_arithmetic(n, stride):
    T = 8
    dataset = TextDataset(np.arange(n), T, stride)
    assert len(dataset) == sum(start + T + 1 <= n for start in range(0, n, stride))
    if stride == 1:
        assert len(dataset) == n - T
    for i in range(len(dataset)):
        x, y = dataset[i]
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == list(range(i * stride, i * stride + T))
        assert y.tolist() == list(range(i * stride + 1, i * stride + T + 1))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_are_one_stream(tmp_path, dtype):
    tokens = np.arange(100)
    whole = TextDataset(write_corpus(tmp_path / "whole", [tokens], dtype), 10)
    pieces = [tokens[:3], tokens[3:3], tokens[3:40], tokens[40:99], tokens[99:]]
    split = TextDataset(write_corpus(tmp_path / "split", pieces, dtype), 10)
    assert len(whole) == len(split) == 90
    for a, b in zip(whole.__getitems__(range(90)), split.__getitems__(range(90))):
        assert torch.equal(a, b)


def test_a_batch_is_its_items(tmp_path):
    dataset = TextDataset(write_corpus(tmp_path / "c", [np.arange(50) ** 2]), 6, 2)
    indices = [3, 0, 3, len(dataset) - 1]
    x, y = dataset.__getitems__(indices)
    assert torch.equal(x, torch.stack([dataset[i][0] for i in indices]))
    assert torch.equal(y, torch.stack([dataset[i][1] for i in indices]))
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_a_plain_dataloader_gives_the_same_batches():
    dataset = TextDataset(np.arange(50), 6)
    x, y = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert torch.equal(x, dataset.__getitems__(range(4))[0])
    assert torch.equal(y, dataset.__getitems__(range(4))[1])


def test_a_bare_file_needs_its_dtype(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(20, dtype=np.uint32).tofile(path)
    assert TextDataset(path, 4, dtype="uint32")[15][1].tolist() == [16, 17, 18, 19]
    with pytest.raises(ValueError, match="which dtype"):
        TextDataset(path, 4)
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match="no whole number"):
        TextDataset(path, 4, dtype="uint16")


def test_index_out_of_range(tmp_path):
    dataset = TextDataset(write_corpus(tmp_path / "c", [np.arange(20)]), 4)
    assert dataset[-1][1].tolist() == [16, 17, 18, 19]
    for index in (16, -17, 10**12):
        with pytest.raises(IndexError, match=f"window {index} of .*train.*16"):
            dataset[index]


def test_errors_name_the_file_and_the_remedy(tmp_path):
    path = write_corpus(tmp_path / "c", [np.arange(20)])
    with pytest.raises(ValueError, match=r"20 tokens.*lower sequence_length"):
        TextDataset(path, 20)
    with pytest.raises(ValueError, match=r"no split 'test'.*train"):
        TextDataset(tmp_path / "c" / "test", 4)
    file = tmp_path / "c" / "train-00000-of-00001.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"00001.bin has 38 bytes.* 40.*prepare_data.py"):
        TextDataset(path, 4)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001.bin is missing.*prepare_data.py"):
        TextDataset(path, 4)
    with pytest.raises(FileNotFoundError, match=r"nope is no prepared corpus.*there: c"):
        TextDataset(tmp_path / "nope" / "train", 4)


DAMAGE = [
    lambda m: [m],
    lambda m: m | {"format_version": 2},
    lambda m: m | {"dtype": "float64"},
    lambda m: m | {"vocab_size": "many"},
    lambda m: m | {"splits": {}},
    lambda m: m | {"splits": {"train": m["splits"]["train"] | {"files": []}}},
    lambda m: m | {"splits": {"train": m["splits"]["train"] | {"files": [{"name": "../x"}]}}},
    lambda m: {key: value for key, value in m.items() if key != "tokenizer"},
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metadata(tmp_path, damage):
    path = write_corpus(tmp_path / "c", [np.arange(20)])
    file = tmp_path / "c" / "metadata.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=r"c/metadata.json is damaged|no split"):
        TextDataset(path, 4)
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ValueError, match=r"c/metadata.json is damaged"):
        TextDataset(path, 4)


def test_workers_map_the_file_themselves(tmp_path):
    dataset = TextDataset(write_corpus(tmp_path / "c", [np.arange(50_000)]), 4, 3)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    assert torch.equal(pickle.loads(pickled)[7][0], dataset[7][0])


def test_an_id_outside_the_vocabulary(tmp_path):
    tokens = np.arange(20)
    dataset = TextDataset(write_corpus(tmp_path / "c", [tokens], vocab_size=19), 4)
    assert dataset[14][1].tolist() == [15, 16, 17, 18]
    with pytest.raises(ValueError, match=r"train.*id 19.*prepare"):
        dataset[15]


def test_the_permutation_is_one():
    keys = np.random.SeedSequence(0).generate_state(4, np.uint64)
    for n in [*range(1, 300), 1000, 4096, 4097]:
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


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloaders(tmp_path, workers):
    make_corpus(tmp_path / "c", ["".join(chr(33 + i % 90) for i in range(1000))])
    train, val = create_dataloaders(tmp_path / "c", 16, batch_size=8, num_workers=workers)
    tokens = np.fromfile(tmp_path / "c" / "train.bin", np.uint16)
    batches = list(train)
    assert len(batches) == len(train) == 55 // 8  # (900 - 1 - 15) // 16 = 55 blocks
    seen = []
    for x, y in batches:
        assert x.shape == y.shape == (8, 16)
        assert torch.equal(x[:, 1:], y[:, :-1])
        seen += [row.tolist() for row in x]
    text = tokens.tolist()
    assert all(any(text[i : i + 16] == row for i in range(len(text))) for row in seen[:10])
    again = [x for x, _ in create_dataloaders(tmp_path / "c", 16, batch_size=8)[0]]
    assert all(torch.equal(a, b) for a, (b, _) in zip(again, batches))
    val_x = torch.cat([x for x, _ in val])
    assert (
        val_x.flatten().tolist() == np.fromfile(tmp_path / "c" / "val.bin", np.uint16)[:96].tolist()
    )


def test_ranks_share_the_validation_split(tmp_path):
    make_corpus(tmp_path / "c", ["".join(chr(33 + i % 90) for i in range(1000))])
    whole = torch.cat([x for x, _ in create_dataloaders(tmp_path / "c", 4, 2)[1]])
    parts = []
    for rank in range(2):
        _, val = create_dataloaders(tmp_path / "c", 4, 2, rank=rank, world_size=2)
        parts.append(torch.cat([x for x, _ in val]))
    assert sorted(whole.tolist()) == sorted(torch.cat(parts).tolist())


def test_the_newest_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared corpus.*prepare_data.py"):
        newest_corpus(tmp_path)
    (tmp_path / "b").mkdir()  # not complete: no metadata.json
    write_corpus(tmp_path / "a", [np.arange(9)])
    assert newest_corpus(tmp_path).name == "a"
