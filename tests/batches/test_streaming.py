import itertools
import json
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from batches import streaming
from corpus.tokenizer import get_tokenizer
from dataset import DocumentDataset, StreamingTextDataset, TextDataset, tokenize

EOT = 256
TEXTS = [f"document {i} " + "word " * (i % 37) for i in range(400)]


def windows(data):
    return [x.tolist() + y[-1:].tolist() for x, y in data]


def blocks(texts, T):
    """What the windows must be: blocks of the documents' ids, an end of text behind each."""
    ids = [i for text in texts for i in (*text.encode(), EOT)]
    return [ids[k : k + T + 1] for k in range(0, len(ids) - T, T)]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The documents in two .jsonl files that are read in several spans."""
    monkeypatch.setattr(streaming, "SPAN_BYTES", 5000)
    for name, part in (("a", TEXTS[:250]), ("b", TEXTS[250:])):
        lines = [json.dumps({"text": text}) + "\n" for text in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return str(tmp_path / "*.jsonl")


def stream(source, T=32, **options):
    return StreamingTextDataset(source, get_tokenizer("bytes"), T, **options)


def test_windows_are_blocks_of_the_text(files):
    data = stream(files)
    assert len(data.spans) > 5
    assert windows(data) == blocks(TEXTS, 32) == windows(data)  # pass after pass
    assert windows(stream(lambda: TEXTS)) == blocks(TEXTS, 32)
    assert windows(stream(iter(TEXTS))) == blocks(TEXTS, 32)
    tokens = sum(len(text) + 1 for text in TEXTS)
    assert sum(data.account().values()) == tokens
    assert data.account()["trained"] == 32 * len(blocks(TEXTS, 32))


def test_they_are_the_windows_of_the_prepared_corpus(tmp_path, tinyshakespeare, gpt2_tokenizer):
    """A running text, in parts whose ids are the whole's."""
    text = tinyshakespeare.read_text(encoding="utf-8")[:300_000]
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    data = StreamingTextDataset(tmp_path / "my.txt", gpt2_tokenizer, 64)
    expected = TextDataset(gpt2_tokenizer.encode(text), 64, stride=64)
    found = list(data)
    assert len(found) == len(expected)
    for (x, y), (a, b) in zip(found, (expected[i] for i in range(len(expected)))):
        assert torch.equal(x, a) and torch.equal(y, b) and x.dtype == torch.int64


@pytest.mark.parametrize("world_size, workers", [(1, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize("by", ["files", "documents"])
def test_shards_have_each_document_once(files, by, world_size, workers):
    source = files if by == "files" else lambda: TEXTS
    seen = []
    for rank in range(world_size):
        data = stream(source, 1, rank=rank, world_size=world_size)
        for x, y in DataLoader(data, batch_size=256, num_workers=workers):
            seen += zip(x[:, 0].tolist(), y[:, 0].tolist())
    shards = world_size * max(1, workers)
    pairs = Counter(p for text in TEXTS for p in itertools.pairwise([EOT, *text.encode(), EOT]))
    pairs[EOT, ord("d")] -= shards  # before the first document of a shard there is none
    assert Counter(seen) == pairs


@pytest.mark.parametrize("by", ["files", "documents", "text"])
@pytest.mark.parametrize("shuffle_buffer", [0, 1, 50, 10_000])
def test_gone_on_with_at_any_item(tmp_path, files, by, shuffle_buffer):
    (tmp_path / "one.txt").write_text(" ".join(TEXTS))
    source = {"files": files, "documents": lambda: TEXTS, "text": str(tmp_path / "one.txt")}[by]
    options = dict(shuffle_buffer=shuffle_buffer, seed=3, T=64)
    whole = windows(stream(source, **options))
    plain = windows(stream(source, T=64))
    assert sorted(whole) == sorted(plain)
    assert (whole == plain) == (shuffle_buffer < 2)
    for stops in ([0], [1, 5], [40, 41], [len(whole) - 2], [len(whole)]):
        data, used = stream(source, **options), []
        for stop in stops:
            used += windows(itertools.islice(data, stop - len(used)))
            assert used == whole[:stop]
            state = data.state_dict()
            data = stream(source, **options)
            if used:
                data.load_state_dict(state)
        used += windows(data)
        assert used == whole


def test_each_pass_is_shuffled_anew(files):
    data = stream(files, shuffle_buffer=100)
    first, second = windows(data), windows(data)
    assert first != second and sorted(first) == sorted(second)
    again = stream(files, shuffle_buffer=100)
    again.epoch = 1
    assert windows(again) == second


def test_torchdatas_loader_goes_on_where_it_was(files):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    loader = lambda: stateful.StatefulDataLoader(  # noqa: E731
        stream(files, shuffle_buffer=20), batch_size=4, num_workers=2
    )
    whole = [x.tolist() for x, _ in loader()]
    first = loader()
    used = [x.tolist() for x, _ in itertools.islice(first, 7)]
    last = loader()
    last.load_state_dict(first.state_dict())
    assert used + [x.tolist() for x, _ in last] == whole


def test_small_raw_text_in_memory(files, tmp_path):
    tokens = tokenize(files, get_tokenizer("bytes"))
    data = TextDataset(tokens, 32, stride=32)
    assert [x.tolist() + y[-1:].tolist() for x, y in (data[i] for i in range(len(data)))] == blocks(
        TEXTS, 32
    )
    documents = DocumentDataset(tokens)
    assert [bytes(d.tolist()[:-1]).decode() for d in documents] == TEXTS
    (tmp_path / "my.txt").write_text(" one \n\ntwo\nlines\n\n\nthree")
    tokens = tokenize(tmp_path / "my.txt", get_tokenizer("bytes"), documents="blank-line")
    found = [bytes(d.tolist()[:-1]).decode() for d in DocumentDataset(tokens)]
    assert found == ["one", "two\nlines", "three"]


def test_what_is_no_document_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: the field 'text' is not text"):
        list(stream(str(tmp_path / "a.jsonl")))
    with pytest.raises((OSError, ValueError), match=r"b.jsonl"):
        stream(str(tmp_path / "b.jsonl"))
