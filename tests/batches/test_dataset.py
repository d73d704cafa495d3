"""TextDataset, its loaders, views and token noise, and the preview of dataset.py."""

import functools
import json
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, make_corpus, run_script

from corpus.tokenizer import get_tokenizer
from dataset import (
    NoisyTextDataset,
    ShuffledBatches,
    TextDataset,
    Tokens,
    add_token_noise,
    collate_documents,
    collate_huggingface,
    create_dataloaders,
    newest_corpus,
    tokenize,
)


def write_corpus(folder, shards, dtype="uint16", vocab_size=50_257):
    """Write a split "train" with one file per array in `shards`, and return its path."""
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


def test_the_docstring_examples():
    dataset = TextDataset(np.arange(7), sequence_length=3, stride=2)
    assert [(x.tolist(), y.tolist()) for x, y in (dataset[0], dataset[1])] == [
        ([0, 1, 2], [1, 2, 3]),
        ([2, 3, 4], [3, 4, 5]),
    ]
    assert len(dataset) == 2
    assert TextDataset(np.arange(13), 3, 2).window_starts([0, 3, -1]).tolist() == [0, 6, 8]
    assert TextDataset(np.arange(10), 4, 4).count_tokens() == {"trained": 8, "left_out": 2}
    assert [view.num_tokens() for view in TextDataset(np.arange(100), 4).split(0.1)] == [90, 10]
    tokens = Tokens([1, 2, 256, 3, 256, 4], eot_token=256)
    assert tokens.document_end(1) == 3 and tokens.document_ends().tolist() == [3, 5, 6]
    tokens = Tokens([5, 6, 7, 8, 9])
    assert tokens.read([0, 2], 3).tolist() == [[5, 6, 7], [7, 8, 9]]
    assert tokens.view(1, 3).read([0], 2).tolist() == [[6, 7]]


@pytest.mark.parametrize("stride", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("n", [9, 10, 16, 17, 40])
def test_windows_equal_slices_of_the_tokens(n, stride):
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
def test_shards_give_the_windows_of_one_file(tmp_path, dtype):
    tokens = np.arange(100)
    whole = TextDataset(write_corpus(tmp_path / "whole", [tokens], dtype), 10)
    shards = [tokens[:3], tokens[3:3], tokens[3:40], tokens[40:99], tokens[99:]]
    sharded = TextDataset(write_corpus(tmp_path / "sharded", shards, dtype), 10)
    assert len(whole) == len(sharded) == 90
    for expected, found in zip(whole[range(90)], sharded[range(90)]):
        assert torch.equal(expected, found)


def test_a_list_of_indices_gives_the_stacked_items(tmp_path):
    dataset = TextDataset(write_corpus(tmp_path / "c", [np.arange(50) ** 2]), 6, 2)
    indices = [3, 0, 3, len(dataset) - 1]
    x, y = dataset[indices]
    assert torch.equal(x, torch.stack([dataset[i][0] for i in indices]))
    assert torch.equal(y, torch.stack([dataset[i][1] for i in indices]))
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_plain_dataloaders_give_the_same_batches():
    """PyTorch loads single items, batches of items, or batches of indices."""
    dataset = TextDataset(np.arange(50), 6)
    expected_x, expected_y = dataset[range(32)]
    batches_of_indices = torch.utils.data.BatchSampler(range(44), 32, drop_last=False)
    for options in (
        {"batch_size": 32},
        {"sampler": batches_of_indices, "batch_size": None},
        {"batch_sampler": batches_of_indices},
    ):
        batch = next(iter(torch.utils.data.DataLoader(dataset, **options)))
        assert isinstance(batch, list)
        x, y = batch
        assert x.shape == (32, 6) and x.dtype == torch.int64
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)
    single = list(torch.utils.data.DataLoader(dataset, batch_size=None))
    assert torch.equal(torch.stack([x for x, _ in single])[:32], expected_x)
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)
    x, y = (torch.cat(tensors) for tensors in zip(*loader))
    assert sorted(x[:, 0].tolist()) == list(range(44)) != x[:, 0].tolist()
    assert torch.equal(x + 1, y)


def test_valid_and_invalid_types_of_an_index():
    dataset = TextDataset(np.arange(50), 6, stride=2)
    for index in (3, np.int64(3), torch.tensor(3), np.uint16(3)):
        assert dataset[index][0].tolist() == [6, 7, 8, 9, 10, 11]
    for indices in ([3, -1], (3, -1), np.array([3, -1]), torch.tensor([3, -1])):
        x, y = dataset[indices]
        assert x[:, 0].tolist() == [6, 42] and y.shape == (2, 6)
    x, y = dataset[[]]
    assert x.shape == y.shape == (0, 6) and x.dtype == torch.int64
    for index in (1.5, "3", [True, False], None, slice(3)):
        with pytest.raises(TypeError, match="an index must be an integer or a list of integers"):
            dataset[index]
    with pytest.raises(TypeError, match="one list"):
        dataset[[[1, 2]]]
    with pytest.raises(IndexError, match="window 22 is out of range: the array has 22"):
        dataset[[0, 22]]


def test_a_bare_file_needs_its_dtype(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(20, dtype=np.uint32).tofile(path)
    assert TextDataset(path, 4, dtype="uint32")[15][1].tolist() == [16, 17, 18, 19]
    with pytest.raises(ValueError, match="give the dtype"):
        TextDataset(path, 4)
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match="does not hold a whole number"):
        TextDataset(path, 4, dtype="uint16")


def test_an_index_out_of_range_is_an_error(tmp_path):
    dataset = TextDataset(write_corpus(tmp_path / "c", [np.arange(20)]), 4)
    assert dataset[-1][1].tolist() == [16, 17, 18, 19]
    for index in (16, -17, 10**12):
        with pytest.raises(IndexError, match=f"window {index} is out of range: .*train has 16"):
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
    with pytest.raises(FileNotFoundError, match=r"nope is not a prepared corpus.*prepared: c"):
        TextDataset(tmp_path / "nope" / "train", 4)


DAMAGES = [
    lambda m: [m],
    lambda m: m | {"format_version": 2},
    lambda m: m | {"dtype": "float64"},
    lambda m: m | {"vocab_size": "many"},
    lambda m: m | {"splits": {}},
    lambda m: m | {"splits": {"train": m["splits"]["train"] | {"files": []}}},
    lambda m: m | {"splits": {"train": m["splits"]["train"] | {"files": [{"name": "../x"}]}}},
    lambda m: {key: value for key, value in m.items() if key != "tokenizer"},
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metadata_is_an_error(tmp_path, damage):
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


def test_an_id_outside_the_vocabulary_is_an_error(tmp_path):
    tokens = np.arange(20)
    dataset = TextDataset(write_corpus(tmp_path / "c", [tokens], vocab_size=19), 4)
    assert dataset[14][1].tolist() == [15, 16, 17, 18]
    with pytest.raises(ValueError, match=r"train.*id 19.*prepare"):
        dataset[15]


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloaders_shuffle_train_and_keep_the_order_of_val(tmp_path, workers):
    make_corpus(tmp_path / "c", ["".join(chr(33 + i % 90) for i in range(1000))])
    train, val = create_dataloaders(tmp_path / "c", 16, batch_size=8, num_workers=workers)
    tokens = np.fromfile(tmp_path / "c" / "train.bin", np.uint16)
    batches = list(train)
    assert len(batches) == len(train) == 55 // 8  # (900 - 1 - 15) // 16 = 55 windows
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
    val_of_ranks = []
    for rank in range(2):
        _, val = create_dataloaders(tmp_path / "c", 4, 2, rank=rank, world_size=2)
        val_of_ranks.append(torch.cat([x for x, _ in val]))
    assert sorted(whole.tolist()) == sorted(torch.cat(val_of_ranks).tolist())


def test_newest_corpus_ignores_an_incomplete_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared corpus.*prepare_data.py"):
        newest_corpus(tmp_path)
    (tmp_path / "b").mkdir()  # incomplete: metadata.json is missing
    write_corpus(tmp_path / "a", [np.arange(9)])
    assert newest_corpus(tmp_path).name == "a"


def test_the_counts_of_a_split_equal_its_metadata(tmp_path):
    texts = [f"text number {i}" for i in range(300)]
    metadata = make_corpus(tmp_path / "c", texts, documents=True)
    splits = {name: TextDataset(tmp_path / "c" / name, 8) for name in ("train", "val")}
    assert sum(data.num_documents() for data in splits.values()) == 300
    assert sum(data.num_tokens() for data in splits.values()) == sum(len(t) + 1 for t in texts)
    assert splits["val"].vocab_size == metadata["vocab_size"] == 257
    shards = TextDataset(write_corpus(tmp_path / "d", [np.arange(9), np.arange(4)]), 2)
    assert (shards.num_files(), shards.num_tokens()) == (2, 13)
    with pytest.raises(ValueError, match="eot_token"):
        shards.num_documents()


@pytest.mark.parametrize("stride", [1, 3, 8, 11])
@pytest.mark.parametrize("size", [0.1, 0.5, 1, 7])
def test_views_divide_the_tokens_of_a_split(tmp_path, size, stride):
    whole = TextDataset(
        write_corpus(tmp_path / "c", [np.arange(50), np.arange(50, 103)]), 8, stride
    )
    first, last = whole.split(size)
    assert first.num_tokens() + last.num_tokens() == 103
    if len(first):
        assert max(ids.max() for ids in first[len(first) - 1]) < first.num_tokens()
    assert last[0][0].tolist() == list(range(first.num_tokens(), first.num_tokens() + 8))
    if size < 1:
        assert last.num_tokens() == round(103 * size)
    else:
        assert len(last) == size
    assert torch.equal(pickle.loads(pickle.dumps(last))[-1][1], last[-1][1])


def test_a_view_begins_with_a_document(tmp_path):
    make_corpus(tmp_path / "c", ["abcdefghi"] * 100, documents=True)
    first, last = TextDataset(tmp_path / "c" / "train", 8).split(0.25)
    assert last[0][0].tolist() == list(b"abcdefgh")
    assert first.num_documents() == first.num_tokens() // 10
    assert last.num_documents() == last.num_tokens() // 10
    shorter, rest = last.split(0.5)  # a view of a view
    assert shorter.num_documents() + rest.num_documents() == last.num_documents()
    assert rest[0][0].tolist() == list(b"abcdefgh")
    with pytest.raises(ValueError, match="can't be split by 0"):
        last.split(0)
    with pytest.raises(ValueError, match="can't be split by 100000"):
        last.split(100_000)


@pytest.mark.parametrize("T, stride, n", [(8, 8, 100), (8, 1, 100), (8, 3, 101), (8, 20, 117)])
def test_count_tokens_counts_distinct_targets(T, stride, n):
    data = TextDataset(np.arange(n), T, stride)
    targets = {int(t) for _, y in (data[i] for i in range(len(data))) for t in y}
    assert data.count_tokens() == {"trained": len(targets), "left_out": n - len(targets)}


def test_collate_functions_return_dicts(tmp_path):
    make_corpus(tmp_path / "c", ["abc", "de", "fghij"] * 30, documents=True)
    data = TextDataset(tmp_path / "c" / "train", 16, 16)
    x, _ = data[[0, 1, 2]]
    loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collate_huggingface)
    batch = next(iter(loader))
    assert batch.keys() == {"input_ids", "labels"}
    assert torch.equal(batch["input_ids"], x) and torch.equal(batch["labels"], x)
    collate = functools.partial(collate_documents, eot_token=data.tokens.eot_token)
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collate)))
    assert batch.keys() == {"token_ids", "document_ids", "document_mask"}
    assert torch.equal(batch["token_ids"], x)
    rows = zip(x, batch["document_ids"].tolist(), batch["document_mask"].tolist())
    for row, doc_ids, mask in rows:
        assert doc_ids == [row[: i + 1].tolist().count(256) for i in range(16)]
        assert mask == [[doc_ids[i] == doc_ids[j] and j <= i for j in range(16)] for i in range(16)]


def test_token_noise_replaces_a_share_of_the_input_tokens(tmp_path):
    make_corpus(tmp_path / "c", ["abcdefghi"] * 2000, documents=True)
    plain = TextDataset(tmp_path / "c" / "train", 64)
    noisy = NoisyTextDataset(plain, 0.25, seed=1)
    assert len(noisy) == len(plain)
    all_windows = np.arange(len(plain))
    x, y = plain[all_windows]
    noisy_x, noisy_y = noisy[all_windows]
    assert torch.equal(y, noisy_y)  # the targets stay unchanged
    changed = x != noisy_x
    text = x != 256
    assert not changed[~text].any() and not (noisy_x == 256)[text].any()  # ends of text stay
    # 1 in 256 draws gives the old id; the tolerance is 5 sigma of a binomial distribution
    n, p = int(text.sum()), 0.25 * 255 / 256
    assert abs(int(changed.sum()) - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    assert noisy_x[changed].unique().numel() == 256  # any id but the end of text
    indices = [17, 3, 17, -1]  # the noise is a function of the position: equal in every batch
    assert torch.equal(noisy[indices][0], noisy_x[indices])
    assert torch.equal(noisy[-1][0], noisy_x[-1])
    batch = next(iter(torch.utils.data.DataLoader(noisy, batch_size=4)))
    assert torch.equal(batch[0], noisy_x[:4]) and torch.equal(batch[1], y[:4])
    assert not torch.equal(NoisyTextDataset(plain, 0.25, seed=2)[17][0], noisy_x[17])
    collated = collate_huggingface([noisy[17]])
    assert torch.equal(collated["input_ids"][0], noisy_x[17])
    assert torch.equal(collated["labels"][0, 1:], x[17, 1:])
    with pytest.raises(ValueError, match="from 0 to 1"):
        NoisyTextDataset(plain, 1.5)
    with pytest.raises(ValueError, match="vocabulary"):
        NoisyTextDataset(TextDataset(np.arange(9), 4), 0.1)


def test_token_noise_equals_that_of_older_versions():
    """A run must resume with the same noise: commit 58944c1 wrote these ids."""
    tokens = Tokens(np.arange(200) % 257, eot_token=256, vocab_size=257)
    noisy = NoisyTextDataset(TextDataset(tokens, 12, 3), 0.5, seed=5)
    assert noisy[[0, 7, -1]][0].tolist() == [
        [0, 1, 21, 3, 55, 5, 148, 149, 8, 9, 10, 11],
        [21, 249, 23, 24, 25, 18, 202, 28, 39, 123, 31, 229],
        [136, 211, 74, 189, 148, 191, 119, 193, 156, 195, 26, 197],
    ]
    x = torch.arange(12)
    assert add_token_noise(x, 0, 0.5, 5, 257, 256).tolist() == noisy[0][0].tolist()
    assert torch.equal(add_token_noise(x, 0, 0.0, 5, 257), x)
    assert int(add_token_noise(x, 0, 1.0, 5, 257).max()) < 257


def test_dataloaders_add_token_noise_to_train_only(tmp_path):
    make_corpus(tmp_path / "c", ["".join(chr(33 + i % 90) for i in range(1000))])
    options = {"sequence_length": 16, "batch_size": 8}
    plain, plain_val = create_dataloaders(tmp_path / "c", **options)
    noisy, noisy_val = create_dataloaders(tmp_path / "c", **options, token_noise=0.5)
    for (x, y), (noisy_x, noisy_y) in zip(plain, noisy):
        assert torch.equal(y, noisy_y) and 0.2 < (x != noisy_x).double().mean() < 0.8
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plain_val, noisy_val))


def test_ten_billion_tokens_are_read_at_any_position(tmp_path):
    """The file is sparse and needs little disk space."""
    path = tmp_path / "train.bin"
    n = 10**10
    with open(path, "wb") as f:
        for place in (0, n // 2, n - 4):
            f.seek(2 * place)
            f.write(np.array([1, 2, 3, 4], "<u2").tobytes())
    data = TextDataset(path, 3, dtype="uint16")
    assert len(data) == n - 3
    for place in (0, n // 2, n - 4):
        assert data[place][1].tolist() == [2, 3, 4]
    loader = torch.utils.data.DataLoader(
        data, sampler=ShuffledBatches(len(data), 32, stride=3), batch_size=None
    )
    x, y = next(iter(loader))
    assert x.shape == y.shape == (32, 3)


def test_torchs_distributed_sampler_covers_all_windows():
    data = TextDataset(np.arange(200), 4)
    seen = []
    for rank in range(2):
        sampler = torch.utils.data.DistributedSampler(data, 2, rank, shuffle=True, seed=3)
        for x, _ in torch.utils.data.DataLoader(data, batch_size=7, sampler=sampler):
            seen += x[:, 0].tolist()
    assert sorted(seen) == list(range(196))


@pytest.mark.parametrize("make", ["file", "array"])
def test_tokens_are_complete_in_views_and_copies(tmp_path, make):
    """Views, pickled copies and their views keep vocabulary and end of text."""
    if make == "file":
        make_corpus(tmp_path / "c", ["abcdefghi"] * 100, documents=True)
        tokens = Tokens(tmp_path / "c" / "train")
    else:
        ids = np.tile([*b"abcdefghi", 256], 90)
        tokens = Tokens(ids, eot_token=256, vocab_size=257, has_documents=True)
    copy = pickle.loads(pickle.dumps(tokens.view(10, 500)))
    for view in (tokens.view(10, 500), copy, pickle.loads(pickle.dumps(copy)).view(0, 490)):
        assert (view.vocab_size, view.eot_token, view.has_documents) == (257, 256, True)
        assert (view.path, view.start, len(view)) == (tokens.path, 10, 490)
        assert view.num_documents() == 49 and view.document_end(3) == 10
        assert np.array_equal(view.read([0], 490), tokens.read([10], 490))


def test_spawned_workers_read_text_in_memory():
    """spawn pickles the dataset, and noise needs the vocabulary of the pickled tokens."""
    tokens = tokenize(lambda: ["abcdefghi"] * 100, get_tokenizer("bytes"))
    first, last = TextDataset(tokens, 16).split(0.2)
    assert first.vocab_size == last.vocab_size == 257
    assert first.num_documents() + last.num_documents() == 100
    noisy = NoisyTextDataset(last, 0.5)
    options = {"sampler": ShuffledBatches(len(last), 4), "batch_size": None}
    loader = torch.utils.data.DataLoader(
        noisy, num_workers=1, multiprocessing_context="spawn", **options
    )
    options = {"sampler": ShuffledBatches(len(last), 4), "batch_size": None}
    expected = torch.utils.data.DataLoader(noisy, **options)
    for (x, y), (a, b) in zip(loader, expected):
        assert torch.equal(x, a) and torch.equal(y, b)


def test_wrong_arguments_are_value_errors(tmp_path):
    make_corpus(tmp_path / "c", ["one running text, " * 100])
    corpus = tmp_path / "c"
    split = corpus / "train"
    with pytest.raises(ValueError, match=r"c is a corpus: choose one of its splits \(.*c/train, "):
        TextDataset(corpus, 4)
    for array in (np.eye(3), np.arange(3.0), ["a", "b"], None, 5):
        with pytest.raises(ValueError, match="is not a split of a prepared corpus"):
            TextDataset(array, 4)
    with pytest.raises(ValueError, match="0 tokens"):
        TextDataset([], 4)
    with pytest.raises(ValueError, match="dtype must be an integer type"):
        TextDataset(split, 4, dtype="many")
    with pytest.raises(ValueError, match="must be at least 1"):
        TextDataset(split, 0)
    for size in (1.0, 0.0, -0.5, 2.5, 0, -3, True, float("nan"), "half"):
        with pytest.raises(ValueError, match=f"can't be split by {size}: give a share"):
            TextDataset(split, 4).split(size)
    for rank, world_size in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank must be from 0 to world_size - 1"):
            create_dataloaders(corpus, 4, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        create_dataloaders(corpus, 4, batch_size=0)


def test_loaders_pin_no_memory(tmp_path):
    """training.device.move_to_device pins memory, and only for CUDA."""
    make_corpus(tmp_path / "c", ["one two three " * 40])
    loaders = create_dataloaders(tmp_path / "c", 4)
    assert [loader.pin_memory for loader in loaders] == [False, False]


def test_the_preview_prints_batches_and_padding(tmp_path):
    make_corpus(tmp_path / "data" / "c", ["abc", "defghi", "jk"] * 100, documents=True)
    result = run_script("dataset.py", "c", "--sequence_length", "12", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "x (8, 12), y (8, 12), torch.int64" in result.stdout
    assert "aligned: y is x shifted by one in all 96 places" in result.stdout
    assert "<|endoftext|>║" in result.stdout and "░" in result.stdout
    shares = [float(share) for share in re.findall(r"([\d.]+)% padding (?:in|with)", result.stdout)]
    assert shares[0] > 20 > 5 > shares[1]  # batches in random order, then batches of similar length
    assert "million tokens/s" in result.stdout
    assert_one_line_error(
        run_script(
            "dataset.py", "c", "--batch_size", "4096", "--sequence_length", "8192", cwd=tmp_path
        ),
        "lower --batch_size or --sequence_length",
    )
    make_corpus(tmp_path / "data" / "book", ["one running text, " * 100])
    result = run_script("dataset.py", cwd=tmp_path)  # the newest
    assert "tokens (running text) 1.00 bytes per token" in result.stdout
    assert "documents" not in result.stdout and "padded" not in result.stdout
    assert_one_line_error(run_script("dataset.py", "d", cwd=tmp_path), "prepared: book, c")
