"""Raw text to windows, without preparing anything: for more text than the disk has room for.

data = StreamingTextDataset("raw/*.jsonl.gz", get_tokenizer("gpt2"), 256, shuffle_buffer=10_000)
x, y = next(iter(DataLoader(data, batch_size=32)))    # (32, 256) int64 each
"""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from batches.tokens import Tokens
from corpus.files import find
from corpus.inputs import Corpus
from corpus.planning import refuse_long_text
from corpus.reader import divide, read
from corpus.sources import InvalidDocument

SPAN_BYTES = 8 << 20  # of a file, read by one worker
GROUP = 256  # documents of a generator that are tokenized together


class StreamingTextDataset(IterableDataset):
    """Windows of sequence_length tokens, one behind the other, as pairs (x, y) of int64 tensors,
    y shifted by one; each document is followed by an end of text.

    source: a file, folder or glob, or a list of them, as prepare_data.py's --input takes them, with
    `documents` and `text_field` as there; or documents: an iterable of strings, or a function that
    gives one anew for every pass. Ranks and DataLoader workers share it out, by spans of files or
    document by document, and none comes twice.

    shuffle_buffer: windows among which the next is drawn at random, by `seed` and `epoch`, which
    counts finished passes (set it yourself where workers iterate). state_dict() is exact between
    any two items, the buffer included: after load_state_dict() the next pass goes on from there.
    With workers, torchdata's StatefulDataLoader calls both. Raises ValueError for what is no
    document.
    """

    def __init__(
        self, source, tokenizer, sequence_length: int, *, documents="", text_field="",
        shuffle_buffer=0, seed=0, rank=None, world_size=None,
    ):  # fmt: skip
        joined = dist.is_available() and dist.is_initialized()
        self.rank = rank if rank is not None else dist.get_rank() if joined else 0
        self.world_size = world_size or (dist.get_world_size() if joined else 1)
        self.tokenizer, self.sequence_length = tokenizer, sequence_length
        self.shuffle_buffer, self.seed, self.epoch = shuffle_buffer, seed, 0
        self.source, self.spans = source, None
        if isinstance(source, (str, Path, list)):
            inputs = source if isinstance(source, list) else [source]
            sources = [s for item in inputs for s in find(str(item), documents, text_field)]
            for s in sources:
                if s.format == "text" and not s.documents:
                    refuse_long_text(s, tokenizer)
            if not tokenizer.divisible:  # a running text is one piece
                sources = [replace(s, documents=s.documents or "file") for s in sources]
            self.spans = [span for s in sources for span, _ in divide(s, SPAN_BYTES)]
            self.documents = Corpus("", {}, sources).documents
        self.loaded, self.state = None, {}

    def state_dict(self) -> dict:
        return self.state | {"buffer": list(self.state.get("buffer", []))}

    def load_state_dict(self, state: dict) -> None:
        self.loaded = state | {"buffer": list(state.get("buffer", []))}
        self.epoch = state.get("epoch", self.epoch)

    def account(self) -> dict[str, int]:
        """trained + left (the first token, and the last that fill no window) = tokens read, by this
        process, of a pass that is over."""
        return {"trained": self.state["windows"] * self.sequence_length, "left": self.state["left"]}

    def __iter__(self):
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        shard, shards = self.rank * workers + number, self.world_size * workers
        # place: where the documents begin that are being read; carry: ids before them that no
        # window has begun with; used: windows made from there on; windows: made in all
        start = dict(epoch=self.epoch, place=(0, 0), carry=torch.empty(0, dtype=torch.int64),
                     used=0, windows=0, drawn=0, buffer=[])  # fmt: skip
        state, self.loaded = start | (self.loaded or {}), None
        self.state, buffer = state, state["buffer"]

        def draw(window=None):
            """A window of the buffer, and `window` in its place."""
            state["drawn"] += 1
            random = np.random.default_rng((self.seed, self.epoch, shard, state["drawn"]))
            i = int(random.integers(len(buffer)))
            drawn, buffer[i] = buffer[i], buffer[-1] if window is None else window
            if window is None:
                buffer.pop()
            return drawn

        for window in self.windows(state, shard, shards):
            if len(buffer) < self.shuffle_buffer:
                buffer.append(window)
                continue
            window = draw(window) if buffer else window
            yield window[:-1], window[1:]
        while buffer:
            window = draw()
            yield window[:-1], window[1:]
        self.epoch += 1

    def windows(self, state, shard, shards):
        """(sequence_length + 1,) int64 tensors, `state` following them."""
        T, carry, skip = self.sequence_length, state["carry"], state["used"]
        for place, texts in self.groups(state["place"], shard, shards):
            if not skip:
                state |= dict(place=place, carry=carry, used=0)
            ids = torch.cat([carry, torch.from_numpy(self.encode(texts).astype(np.int64))])
            count = max(0, (len(ids) - 1) // T)
            for i in range(min(skip, count), count):
                state["used"], state["windows"] = state["used"] + 1, state["windows"] + 1
                yield ids[i * T : i * T + T + 1]
            carry, skip = ids[count * T :], max(0, skip - count)
        state["left"] = len(carry)

    def encode(self, texts):
        if self.spans and not self.documents:
            return np.concatenate([self.tokenizer.encode(text) for text in texts])
        return self.tokenizer.encode_documents(texts)

    def groups(self, place, shard, shards):
        """(place, texts) of this shard, from a place that it gave before, or (0, 0)."""
        number, start = place
        if self.spans is None:
            source = self.source() if callable(self.source) else self.source
            own = itertools.islice(source, shard + start * shards, None, shards)
            while texts := list(itertools.islice(own, GROUP)):
                yield (0, start), texts
                start += len(texts)
            return
        for i, span in list(enumerate(self.spans[shard::shards]))[number:]:
            span = replace(span, start=start or span.start)
            start = 0
            for positions, texts in read(span):
                for text in texts:
                    if isinstance(text, InvalidDocument):
                        raise ValueError(str(text))
                yield (i, positions[0]), texts


def tokenize(source, tokenizer, documents="", text_field="") -> Tokens:
    """The ids of raw text, all in memory, for TextDataset and DocumentDataset: small data that is
    not worth preparing. Arguments as StreamingTextDataset's; raises what it raises."""
    data = StreamingTextDataset(
        source, tokenizer, 1, documents=documents, text_field=text_field, rank=0, world_size=1
    )
    ids = [data.encode(texts) for _, texts in data.groups((0, 0), 0, 1)]
    tokens = Tokens(np.concatenate(ids), eot_token=tokenizer.eot_token)
    tokens.vocab_size = tokenizer.vocab_size
    return tokens
