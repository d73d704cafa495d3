"""StreamingTextDataset and tokenize: raw text to windows without a prepared corpus."""

import gzip
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from batches import streaming
from corpus.tokenizer import get_tokenizer
from dataset import DocumentDataset, StreamingTextDataset, TextDataset, tokenize

EOT = 256
TEXTS = [f"document {i} " + "word " * (i % 37) for i in range(400)]


def windows(data):
    """Return the T + 1 token ids of each window."""
    return [x.tolist() + y[-1:].tolist() for x, y in data]


def expected_windows(texts, T):
    """Return the expected windows: blocks of the ids of all documents and their ends of text."""
    ids = [i for text in texts for i in (*text.encode(), EOT)]
    return [ids[k : k + T + 1] for k in range(0, len(ids) - T, T)]


WORKER = SimpleNamespace(id=0, num_workers=4)  # the first of four worker processes


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A glob of two .jsonl files with the documents, which are read in several spans."""
    monkeypatch.setattr(streaming, "SPAN_BYTES", 5000)
    for name, texts in (("a", TEXTS[:250]), ("b", TEXTS[250:])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return str(tmp_path / "*.jsonl")


def stream(source, T=32, **options):
    return StreamingTextDataset(source, get_tokenizer("bytes"), T, **options)


def test_windows_are_those_of_the_joined_documents(files):
    data = stream(files)
    assert len(data._spans(data.sources, 1)) > 5
    assert windows(data) == expected_windows(TEXTS, 32) == windows(data)  # every pass
    assert windows(stream(lambda: TEXTS)) == expected_windows(TEXTS, 32)
    assert windows(stream(iter(TEXTS))) == expected_windows(TEXTS, 32)
    tokens = sum(len(text) + 1 for text in TEXTS)
    assert sum(data.count_tokens().values()) == tokens
    assert data.count_tokens()["trained"] == 32 * len(expected_windows(TEXTS, 32))


def test_windows_equal_those_of_the_prepared_corpus(tmp_path, tinyshakespeare, gpt2_tokenizer):
    """A running text is read in parts, and the parts give the ids of the whole text."""
    text = tinyshakespeare.read_text(encoding="utf-8")[:300_000]
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    data = StreamingTextDataset(tmp_path / "my.txt", gpt2_tokenizer, 64)
    expected = TextDataset(gpt2_tokenizer.encode(text), 64, stride=64)
    found = list(data)
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(found):
        expected_x, expected_y = expected[i]
        assert x.dtype == torch.int64
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("world_size, workers", [(1, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize("by", ["files", "documents"])
def test_readers_have_each_document_once(files, by, world_size, workers):
    source = files if by == "files" else lambda: TEXTS
    seen = []
    for rank in range(world_size):
        data = stream(source, 1, rank=rank, world_size=world_size)
        for x, y in DataLoader(data, batch_size=256, num_workers=workers):
            seen += zip(x[:, 0].tolist(), y[:, 0].tolist())
    num_readers = world_size * max(1, workers)
    pairs = Counter(p for text in TEXTS for p in itertools.pairwise([EOT, *text.encode(), EOT]))
    pairs[EOT, ord("d")] -= num_readers  # no token precedes the first document of a reader
    assert Counter(seen) == pairs


@pytest.mark.parametrize("by", ["files", "documents", "text"])
@pytest.mark.parametrize("shuffle_buffer", [0, 1, 50, 10_000])
def test_a_stream_resumes_after_any_window(tmp_path, files, by, shuffle_buffer):
    (tmp_path / "one.txt").write_text(" ".join(TEXTS))
    source = {"files": files, "documents": lambda: TEXTS, "text": str(tmp_path / "one.txt")}[by]
    options = dict(shuffle_buffer=shuffle_buffer, seed=3, T=64)
    whole = windows(stream(source, **options))
    plain = windows(stream(source, T=64))
    assert sorted(whole) == sorted(plain)
    assert (whole == plain) == (shuffle_buffer < 2)
    for stops in ([0], [1, 5], [40, 41], [len(whole) - 2], [len(whole)]):
        data = stream(source, **options)
        used = []
        for stop in stops:
            used += windows(itertools.islice(data, stop - len(used)))
            assert used == whole[:stop]
            state = data.state_dict()
            data = stream(source, **options)
            if used:
                data.load_state_dict(state)
        used += windows(data)
        assert used == whole


def test_each_pass_has_another_order(files):
    data = stream(files, shuffle_buffer=100)
    first, second = windows(data), windows(data)
    assert first != second and sorted(first) == sorted(second)
    again = stream(files, shuffle_buffer=100)
    again.epoch = 1
    assert windows(again) == second


def test_torchdatas_loader_resumes(files):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")

    def loader():
        data = stream(files, shuffle_buffer=20)
        return stateful.StatefulDataLoader(data, batch_size=4, num_workers=2)

    whole = [x.tolist() for x, _ in loader()]
    first = loader()
    used = [x.tolist() for x, _ in itertools.islice(first, 7)]
    last = loader()
    last.load_state_dict(first.state_dict())
    assert used + [x.tolist() for x, _ in last] == whole


def test_tokenize_returns_the_tokens_of_raw_text(files, tmp_path):
    tokens = tokenize(files, get_tokenizer("bytes"))
    data = TextDataset(tokens, 32, stride=32)
    assert windows(data[i] for i in range(len(data))) == expected_windows(TEXTS, 32)
    documents = DocumentDataset(tokens)
    assert [bytes(d.tolist()[:-1]).decode() for d in documents] == TEXTS
    (tmp_path / "my.txt").write_text(" one \n\ntwo\nlines\n\n\nthree")
    tokens = tokenize(tmp_path / "my.txt", get_tokenizer("bytes"), documents="blank-line")
    found = [bytes(d.tolist()[:-1]).decode() for d in DocumentDataset(tokens)]
    assert found == [" one ", "two\nlines", "three"]


def test_an_invalid_document_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: the field 'text' is not text"):
        list(stream(str(tmp_path / "a.jsonl")))
    with pytest.raises((OSError, ValueError), match=r"b.jsonl"):
        stream(str(tmp_path / "b.jsonl"))


NUM_READERS = [(1, 2), (2, 0), (3, 0), (2, 2), (8, 0)]


def windows_of_ranks(make, world_size, workers):
    """Return the windows of each rank."""
    found = []
    for rank in range(world_size):
        data = make(rank=rank, world_size=world_size)
        batches = DataLoader(data, batch_size=16, num_workers=workers)
        found.append([row for x, _ in batches for row in x.tolist()])
    return found


@pytest.mark.parametrize("world_size, workers", NUM_READERS)
def test_every_rank_gets_a_share_of_a_small_file(tmp_path, world_size, workers):
    """A file that fits in one span is divided into smaller spans of about equal size."""
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    ranks = windows_of_ranks(
        lambda **ranks: stream(str(tmp_path / "a.jsonl"), 32, **ranks), world_size, workers
    )
    counts = [len(rank) for rank in ranks]
    assert min(counts) > 0.5 * max(counts)
    tokens = sum(len(text) + 1 for text in TEXTS)
    num_readers = world_size * max(1, workers)
    assert tokens - 33 * num_readers <= 32 * sum(counts) <= tokens


def test_a_rank_without_a_window_is_an_error(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write('{"text": "one compressed file can not be divided"}\n' * 1000)
    data = stream(str(tmp_path / "a.jsonl.gz"), 8, rank=1, world_size=2)
    with pytest.raises(ValueError, match=r"divided into 1 spans only, for 2 processes x workers"):
        next(iter(data))
    assert len(windows(stream(str(tmp_path / "a.jsonl.gz"), 8))) > 1000
    for source in (lambda: ["only one document"], lambda: ["ab", "cd"], lambda: []):
        with pytest.raises(ValueError, match=r"reader 1 of 2 .* has no window of 8 tokens"):
            list(stream(source, 8, rank=1, world_size=2))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match=r"reader 0 of 1 .* has no window of 8 tokens"):
        list(stream(str(tmp_path / "short.txt"), 8))


@pytest.mark.parametrize("by", ["files", "documents"])
def test_a_state_belongs_to_its_number_of_readers(files, by):
    """With another number of ranks or workers, some documents would be repeated."""
    source = files if by == "files" else lambda: TEXTS
    data = stream(source, rank=1, world_size=2)
    used = windows(itertools.islice(data, 3))
    state = data.state_dict()
    same = stream(source, rank=1, world_size=2)
    same.load_state_dict(state)
    assert used + windows(same) == windows(stream(source, rank=1, world_size=2))
    earlier = stream(source, rank=1, world_size=2)  # earlier versions said "shard" for "reader"
    shard = {"shard": state["reader"]}
    earlier.load_state_dict(shard | {name: state[name] for name in state if name != "reader"})
    assert used + windows(earlier) == windows(stream(source, rank=1, world_size=2))
    for other in (
        stream(source),
        stream(source, rank=0, world_size=2),
        stream(source, rank=1, world_size=3),
    ):
        other.load_state_dict(state)
        with pytest.raises(ValueError, match=r"saved with reader \(1, 2\), which is now"):
            next(iter(other))
    other = stream(source, 16, rank=1, world_size=2)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="saved with sequence_length 32, which is now 16"):
        next(iter(other))


def test_a_state_belongs_to_its_number_of_workers(files, monkeypatch):
    data = stream(files, rank=1, world_size=2)
    windows(itertools.islice(data, 3))
    workers = stream(files)
    workers.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match=r"saved with reader \(1, 2\), which is now \(0, 4\)"):
        monkeypatch.setattr(streaming, "get_worker_info", lambda: WORKER)
        next(iter(workers))


def test_the_state_is_small(files):
    """The state has numbers and the ids that are read but not used; torch.load accepts it."""
    for shuffle_buffer in (0, 20):
        data = stream(files, shuffle_buffer=shuffle_buffer)
        assert data.state_dict() == {}
        windows(itertools.islice(data, 30))
        file = io.BytesIO()
        torch.save(data.state_dict(), file)
        assert len(file.getvalue()) < 30_000
        file.seek(0)
        state = torch.load(file, weights_only=True)
        assert all(type(number) is int for number in state["place"])
        assert len(state["ids"]) < 5000 and state["buffer"].shape == (shuffle_buffer, 33)
        rest = stream(files, shuffle_buffer=shuffle_buffer)
        rest.load_state_dict(state)
        whole = windows(stream(files, shuffle_buffer=shuffle_buffer))
        assert windows(rest) == whole[30:]


def test_resuming_tokenizes_no_document_twice(files, monkeypatch):
    data = stream(files)
    windows(itertools.islice(data, 100))
    rest = stream(files)
    rest.load_state_dict(data.state_dict())
    tokenized = []
    encode_documents = rest.tokenizer.encode_documents

    def record(texts):
        tokenized.extend(texts)
        return encode_documents(texts)

    monkeypatch.setattr(rest.tokenizer, "encode_documents", record)
    used = windows(rest)
    assert used and sum(len(text) + 1 for text in tokenized) <= 32 * len(used) + 33
    assert tokenized == TEXTS[-len(tokenized) :]


def test_valid_and_invalid_types_of_a_source(files, tmp_path):
    a = str(tmp_path / "a.jsonl")
    b = str(tmp_path / "b.jsonl")
    expected = expected_windows(TEXTS, 32)
    for source in (
        (a, b),
        [a, b],
        (Path(a), b),
        [Path(a), Path(b)],
        Path(tmp_path) / "*.jsonl",
        (text for text in TEXTS),
        lambda: iter(TEXTS),
    ):
        assert windows(stream(source)) == expected
    for source in (None, b"text", 7, [], (), [1, 2], ["a", None], [b"text"]):
        with pytest.raises(ValueError, match="is not a source of text: give a path"):
            stream(source)
    for document, kind in ((b"text", "bytes"), (Path(a), "PosixPath"), (None, "NoneType")):
        source = iter(["text " * 20, document])
        with pytest.raises(ValueError, match=f"document 1 of the iterable is of type {kind}"):
            list(stream(source))


def test_a_generator_gives_one_pass_only():
    data = stream(text for text in TEXTS)
    assert windows(data) == expected_windows(TEXTS, 32)
    with pytest.raises(ValueError, match=r"one pass only: pass a function"):
        next(iter(data))


def test_wrong_arguments_are_value_errors(files):
    with pytest.raises(ValueError, match=r"sequence_length \(0\) must be at least 1"):
        stream(files, 0)
    with pytest.raises(ValueError, match=r"shuffle_buffer \(-1\) at least 0"):
        stream(files, shuffle_buffer=-1)
    for rank, world_size in ((1, None), (2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank must be from 0 to world_size - 1"):
            stream(files, rank=rank, world_size=world_size)
    for empty in (lambda: [], lambda: iter(())):
        with pytest.raises(ValueError, match="there is no text in"):
            tokenize(empty, get_tokenizer("bytes"))


def test_tokenized_text_has_a_vocabulary(tmp_path):
    tokens = tokenize(lambda: ["ab", "c"], get_tokenizer("bytes"))
    assert tokens.read([0], 5)[0].tolist() == [97, 98, EOT, 99, EOT]
    assert (tokens.vocab_size, tokens.eot_token, tokens.has_documents) == (257, EOT, True)
    first, last = DocumentDataset(tokens).split(1)
    assert first.tokens.vocab_size == last.tokens.vocab_size == 257
    (tmp_path / "one.txt").write_text("one running text")
    tokens = tokenize(tmp_path / "one.txt", get_tokenizer("bytes"))
    with pytest.raises(ValueError, match="one running text"):
        DocumentDataset(tokens)


def test_the_docstring_example():
    data = stream(lambda: ["ab", "c"], 2)
    assert windows(data) == [[97, 98, EOT], [EOT, 99, EOT]]
    assert data.count_tokens() == {"trained": 4, "left_out": 1}
