"""Raw text to windows without preparing it, for more text than the disk has room for.

data = StreamingTextDataset("raw/*.jsonl.gz", get_tokenizer("gpt2"), 256, shuffle_buffer=10_000)
x, y = next(iter(DataLoader(data, batch_size=32)))    # (32, 256) int64 each
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from batches.order import check_rank
from batches.tokens import Tokens
from corpus.files import find
from corpus.inputs import Corpus
from corpus.planning import refuse_long_text
from corpus.reader import divide, read
from corpus.sources import InvalidDocument, Source

SPAN_BYTES = 8 << 20  # of a file, read by one worker
SPANS_PER_SHARD = 4  # at least, where the files can be divided, so that shards are about equal
GROUP_DOCUMENTS = 256  # documents of an iterable that are tokenized together

Place = tuple[int, int]  # span of a shard, and document (byte or row) in the span


class StreamingTextDataset(IterableDataset):
    """Windows of raw text, one after another: pairs (x, y) of (T,) int64 tensors.

    - y is x shifted by one; an end-of-text token follows each document.
    - Ranks and DataLoader workers (together: shards) divide the source, by spans of files or
      document by document. No document comes twice, and a shard that gets no window is an error.
      Shards differ in their number of windows: in distributed training, stop all ranks at the same
      step.
    - The state is the place where reading continues (two numbers) and a small buffer: the ids that
      are read and not used, and the windows of the shuffle buffer. It is exact between any two
      items. With workers, torchdata's StatefulDataLoader saves and loads it.

    Example: the documents "ab" and "c" with the bytes tokenizer and sequence_length 2 are the ids
    [97, 98, 256, 99, 256] and the items ([97, 98], [98, 256]) and ([256, 99], [99, 256]).

    Args:
        source: A file, folder or glob, or a list of them, as for prepare_data.py --input; or the
            documents: an iterable of strings, or a function that returns a new one for each pass.
        tokenizer: From get_tokenizer.
        sequence_length: T, tokens of x and of y.
        documents: How files are divided into documents, as for prepare_data.py --documents.
        text_field: Field or column with the text, as for prepare_data.py --text_field.
        shuffle_buffer: Number of windows among which the next one is drawn; 0: in order.
        seed: Seed of the draws, together with `epoch`. `epoch` counts finished passes; set it
            yourself if workers iterate.
        rank: Number of this process; None: from torch.distributed.
        world_size: Number of processes; None: from torch.distributed.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If the source is none of the above; on reading, if a document is invalid, the
            source cannot be divided into a span per shard, a shard has no window, or a loaded
            state belongs to another division.
    """

    def __init__(
        self,
        source,
        tokenizer,
        sequence_length: int,
        *,
        documents: str = "",
        text_field: str = "",
        shuffle_buffer: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        distributed = dist.is_available() and dist.is_initialized()
        if rank is None:
            rank = dist.get_rank() if distributed else 0
        if world_size is None:
            world_size = dist.get_world_size() if distributed else 1
        check_rank(rank, world_size)
        if sequence_length < 1 or shuffle_buffer < 0:
            raise ValueError(
                f"sequence_length ({sequence_length}) must be at least 1 and shuffle_buffer "
                f"({shuffle_buffer}) at least 0"
            )
        self.rank = rank
        self.world_size = world_size
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.epoch = 0
        self.source = source
        self.sources: list[Source] | None = None  # the files; None: `source` gives documents
        self.has_documents = True
        paths = _paths(source)
        if paths is not None:
            self.sources = [s for path in paths for s in find(path, documents, text_field)]
            for source_file in self.sources:
                if source_file.format == "text" and not source_file.documents:
                    refuse_long_text(source_file, tokenizer)
            if not tokenizer.divisible:  # a running text has to be tokenized at once
                self.sources = [replace(s, documents=s.documents or "file") for s in self.sources]
            self.has_documents = bool(Corpus("", {}, self.sources).has_documents)
        self._iterator_used = False
        self._loaded: dict[str, Any] | None = None
        self._state: dict[str, Any] = {}

    def state_dict(self) -> dict:
        """Return the state after the last item, for load_state_dict; {} before the first.

        It holds numbers and two int32 tensors: `ids` (n,) and `buffer` (k, T + 1).
        """
        if not self._state:
            return {}
        tensors = {
            "ids": torch.from_numpy(self._state["ids"].astype(np.int32)),
            "buffer": torch.empty(0, self.sequence_length + 1, dtype=torch.int32),
        }
        if self._state["buffer"]:
            windows = np.stack(self._state["buffer"])
            tensors["buffer"] = torch.from_numpy(windows.astype(np.int32))
        return self._state | tensors

    def load_state_dict(self, state: dict) -> None:
        """Continue with the item after the last one before state_dict."""
        if state:
            self.epoch = state["epoch"]
            arrays = {
                "ids": state["ids"].numpy().astype(np.int64),
                "buffer": list(state["buffer"].numpy().astype(np.int64)),
            }
            self._loaded = state | arrays

    def count_tokens(self) -> dict[str, int]:
        """Return how many tokens are "trained" on and "left_out", of a pass that has ended.

        Together they are the tokens that this process has read. The first token and the last ones,
        which fill no window, are left out.
        """
        trained = self._state["windows"] * self.sequence_length
        return {"trained": trained, "left_out": len(self._state["ids"])}

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if isinstance(self.source, Iterator):
            if self._iterator_used:
                raise ValueError(
                    "a generator of documents gives one pass only: pass a function that returns a "
                    "new one (StreamingTextDataset(make_documents, ...))"
                )
            self._iterator_used = True
        state = self._first_state()
        self._state = state
        for window in self._shuffled_windows(state):
            state["windows"] += 1
            ids = torch.from_numpy(window)
            yield ids[:-1], ids[1:]
        if not state["windows"]:
            shard, num_shards = state["shard"]
            raise ValueError(
                f"shard {shard} of {num_shards} (processes x workers) has no window of "
                f"{self.sequence_length} tokens: lower sequence_length, use fewer processes or "
                f"workers, or add text"
            )
        self.epoch += 1

    def _first_state(self) -> dict:
        """The state that the pass begins with."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        state = {
            "epoch": self.epoch,
            "shard": (self.rank * workers + number, self.world_size * workers),
            "sequence_length": self.sequence_length,
            "place": (0, 0),  # where reading continues
            "ids": np.empty(0, np.int64),  # read, but not used by a window
            "buffer": [],  # windows of the shuffle buffer
            "windows": 0,  # given in this pass
        }
        if self._loaded is None:
            return state
        loaded = self._loaded
        self._loaded = None
        for name in ("shard", "sequence_length"):
            if loaded[name] != state[name]:
                raise ValueError(
                    f"the state was saved with {name} {loaded[name]}, which is now {state[name]}: "
                    f"continue with the same numbers of processes and workers, and the same "
                    f"sequence_length"
                )
        return state | loaded

    def _shuffled_windows(self, state: dict) -> Iterator[np.ndarray]:
        """The windows, each drawn from the shuffle buffer if there is one."""
        buffer = state["buffer"]

        def draw_index() -> int:
            draw = (self.seed, state["epoch"], state["shard"][0], state["windows"] + 1)
            return int(np.random.default_rng(draw).integers(len(buffer)))

        for window in self._windows(state):
            if not self.shuffle_buffer:
                yield window
            elif len(buffer) < self.shuffle_buffer:
                buffer.append(window.copy())  # a view would keep its whole chunk in memory
            else:
                i = draw_index()
                drawn = buffer[i]
                buffer[i] = window.copy()
                yield drawn
        while buffer:
            i = draw_index()
            drawn = buffer[i]
            buffer[i] = buffer[-1]
            buffer.pop()
            yield drawn

    def _windows(self, state: dict) -> Iterator[np.ndarray]:
        """(T + 1,) int64 ids, each beginning with the last id of the one before."""
        T = self.sequence_length
        chunks = self._chunks(state["place"], *state["shard"])
        while True:
            while len(state["ids"]) > T:
                window = state["ids"][: T + 1]
                state["ids"] = state["ids"][T:]
                yield window
            place, ids = next(chunks, (None, None))
            if place is None:
                return
            state["place"] = place
            state["ids"] = np.concatenate([state["ids"], ids])

    def _chunks(self, place: Place, shard: int, num_shards: int):
        """(place after it, its ids) of about a megabyte of text of this shard, from a place on."""
        groups = self._groups(place, shard, num_shards)
        end = (1 << 62, 0)  # no span comes after it
        for (_, texts), (next_place, _) in itertools.pairwise(itertools.chain(groups, [(end, [])])):
            if self.has_documents:
                ids = self.tokenizer.encode_documents(texts)
            else:
                ids = np.concatenate([self.tokenizer.encode(text) for text in texts])
            yield next_place, ids

    def _groups(self, place: Place, shard: int, num_shards: int):
        """(place, texts) of this shard, from a place on."""
        if self.sources is None:
            yield from self._document_groups(place, shard, num_shards)
        else:
            yield from self._file_groups(self.sources, place, shard, num_shards)

    def _file_groups(self, sources: list[Source], place: Place, shard: int, num_shards: int):
        """(place, texts) of files."""
        spans = self._spans(sources, num_shards)[shard::num_shards]
        first_span, position = place
        for i in range(first_span, len(spans)):
            span = spans[i]
            if position:
                span = replace(span, start=position)
                position = 0
            for positions, texts in read(span):
                _check_texts(texts)
                yield (i, positions[0]), texts

    def _document_groups(self, place: Place, shard: int, num_shards: int):
        """(place, texts) of an iterable; a place is (0, number of the document in the shard)."""
        end, number = place
        if end:
            return
        source = self.source() if callable(self.source) else self.source
        documents = itertools.islice(source, shard + number * num_shards, None, num_shards)
        while texts := list(itertools.islice(documents, GROUP_DOCUMENTS)):
            for i, text in enumerate(texts, number):
                if not isinstance(text, str):
                    raise ValueError(
                        f"document {shard + i * num_shards} of the iterable is of type "
                        f"{type(text).__name__}, not str (give files as a list of paths)"
                    )
            yield (0, number), texts
            number += len(texts)

    def _spans(self, sources: list[Source], num_shards: int) -> list[Source]:
        """The files divided into spans, at least one for each shard."""
        wanted = num_shards * SPANS_PER_SHARD if num_shards > 1 else 1
        span_bytes = SPAN_BYTES
        while True:
            spans = [span for source in sources for span, _ in divide(source, span_bytes)]
            if len(spans) >= wanted or span_bytes == 1:
                break
            span_bytes = max(1, span_bytes // 4)
        if len(spans) < num_shards:
            raise ValueError(
                f"{self.source} can be divided into {len(spans)} spans only, for {num_shards} "
                f"processes x workers: use fewer, or more files, or files that are not compressed"
            )
        return spans


def _paths(source) -> list[str] | None:
    """The paths that `source` names; None if it gives documents."""
    if isinstance(source, (str, Path)):
        return [str(source)]
    if isinstance(source, (list, tuple)):
        if source and all(isinstance(item, (str, Path)) for item in source):
            return [str(item) for item in source]
    elif not isinstance(source, (bytes, bytearray)) and (
        callable(source) or isinstance(source, Iterable)
    ):
        return None
    raise ValueError(
        f"{source!r:.60} is not a source of text: give a path, a list of paths, a generator of "
        f"strings, or a function that returns one"
    )


def _check_texts(texts) -> None:
    """Raise ValueError for an invalid document."""
    for text in texts:
        if isinstance(text, InvalidDocument):
            raise ValueError(str(text))


def tokenize(source, tokenizer, documents: str = "", text_field: str = "") -> Tokens:
    """Tokenize raw text in memory, for TextDataset and DocumentDataset.

    For text that is too small to be worth preparing.

    Example: tokenize(lambda: ["ab", "c"], get_tokenizer("bytes")) holds [97, 98, 256, 99, 256].

    Args:
        source: Files or documents, as for StreamingTextDataset.
        tokenizer: From get_tokenizer.
        documents: How files are divided into documents.
        text_field: Field or column with the text.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a document is invalid, or there is no text.
    """
    data = StreamingTextDataset(
        source, tokenizer, 1, documents=documents, text_field=text_field, rank=0, world_size=1
    )
    chunks = [ids for _, ids in data._chunks((0, 0), 0, 1)]
    if not sum(map(len, chunks)):
        raise ValueError(f"there is no text in {source!r:.60}")
    return Tokens(
        np.concatenate(chunks),
        eot_token=tokenizer.eot_token,
        vocab_size=tokenizer.vocab_size,
        has_documents=data.has_documents,
    )
