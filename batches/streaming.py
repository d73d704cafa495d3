"""Raw text to windows without preparing it: for more text than the disk has room for.

data = StreamingTextDataset("raw/*.jsonl.gz", get_tokenizer("gpt2"), 256, shuffle_buffer=10_000)
x, y = next(iter(DataLoader(data, batch_size=32)))    # (32, 256) int64 each
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from corpus.split_names import Report, report_nothing
from corpus.tokenizer import Tokenizer

SPAN_BYTES = 8 << 20  # size of the largest span of a file
SPANS_PER_READER = 4  # at least, if the files can be divided: then the shares are about equal
DOCUMENTS_AT_ONCE = 256  # documents of an iterable that are tokenized together

Paths = str | Path | Sequence[str | Path]
Documents = Iterable[str] | Callable[[], Iterable[str]]
Place = tuple[int, int]  # number of a reader's span, and position (byte or row) in the span
TextsAtPlace = tuple[Place, Sequence[str]]


class StreamingTextDataset(IterableDataset):
    """Windows of raw text, one after another: pairs (x, y) of (T,) int64 tensors.

    - y is x shifted by one; an end-of-text token follows each document.
    - The readers are the DataLoader workers of all ranks, or the ranks if there are no workers.
      They divide the text by spans of files, or document by document. No document is read twice,
      and a reader that gets no window raises an error.
    - Readers differ in their number of windows: in distributed training, stop all ranks at the
      same step.
    - The state is the place where reading continues (two numbers), the ids that are read and not
      yet used, and the windows of the shuffle buffer. The state is exact between any two items.
      With workers, torchdata's StatefulDataLoader saves and loads the state of each reader.

    Example: the documents "ab" and "c" with the bytes tokenizer and sequence_length 2 are the ids
    [97, 98, 256, 99, 256] and the items ([97, 98], [98, 256]) and ([256, 99], [99, 256]).

    Args:
        source: A file, folder or glob, or a list of these, as for prepare_data.py --input; or the
            documents: an iterable of strings, or a function that returns a new iterable for each
            pass.
        tokenizer: A tokenizer, from get_tokenizer.
        sequence_length: T, tokens of x and of y.
        documents: How files are divided into documents, as for prepare_data.py --documents.
        text_field: Field or column with the text, as for prepare_data.py --text_field.
        split_names: "keep": files whose paths name val or test are left out, as for prepare_data.py
            --split_names; "ignore": all files are read.
        shuffle_buffer: Number of windows among which the next one is drawn; 0: in order.
        seed: Seed of the draws, together with the attribute `epoch`, the number of finished passes.
            Set `epoch` before each pass if DataLoader workers iterate.
        rank: Number of this process; None: from torch.distributed.
        world_size: Number of processes; None: from torch.distributed.

    Raises:
        OSError: A file cannot be read.
        ValueError: The source is none of the above. On reading: a document is invalid, the source
            cannot be divided into a span per reader, a reader has no window, or a loaded state
            belongs to another division.
    """

    def __init__(
        self,
        source: Paths | Documents,
        tokenizer: Tokenizer,
        sequence_length: int,
        *,
        documents: str = "",
        text_field: str = "",
        split_names: str = "keep",
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
        self.source: Any = source  # _paths() checks its type
        self.sources: list[Source] | None = None  # None: `source` gives documents, not files
        self.has_documents = True
        paths = _paths(source)
        if paths is not None:
            report: Report = print if self.rank == 0 else report_nothing
            found = find(paths, documents, text_field, split_names, report)
            self.sources = [file for file in found if file.split in ("", "train")]
            if len(self.sources) < len(found):
                report("val and test are left out: a stream is for training")
            for source_file in self.sources:
                if source_file.format == "text" and not source_file.division:
                    refuse_long_text(source_file, tokenizer)
            if not tokenizer.divisible:  # a running text has to be tokenized at once
                self.sources = [replace(s, division=s.division or "file") for s in self.sources]
            self.has_documents = bool(Corpus("", {}, self.sources).has_documents)
        self._iterator_used = False
        self._loaded_state: dict[str, Any] | None = None
        self._state: dict[str, Any] = {}

    def state_dict(self) -> dict:
        """Return the state after the last item, for load_state_dict; {} before the first item.

        The state holds numbers and two int32 tensors: `ids` (n,) and `buffer` (k, T + 1).
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
            if "shard" in state:  # the name of `reader` in earlier versions
                state = {"reader": state["shard"]} | state
            self.epoch = state["epoch"]
            arrays = {
                "ids": state["ids"].numpy().astype(np.int64),
                "buffer": list(state["buffer"].numpy().astype(np.int64)),
            }
            self._loaded_state = state | arrays

    def count_tokens(self) -> dict[str, int]:
        """Return how many tokens of a finished pass are "trained" on and "left_out".

        The two numbers add up to the tokens that this process has read. The first token is left
        out, and so are the last ones, which fill no window.
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
            reader, num_readers = state["reader"]
            raise ValueError(
                f"reader {reader} of {num_readers} (processes x workers) has no window of "
                f"{self.sequence_length} tokens: lower sequence_length, use fewer processes or "
                f"workers, or add text"
            )
        self.epoch += 1

    def _first_state(self) -> dict:
        """Return the state that the pass begins with.

        Raises:
            ValueError: The loaded state belongs to other readers or another sequence_length.
        """
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        worker_id = worker.id if worker else 0
        reader = self.rank * num_workers + worker_id
        state = {
            "epoch": self.epoch,
            "reader": (reader, self.world_size * num_workers),
            "sequence_length": self.sequence_length,
            "place": (0, 0),  # where reading continues
            "ids": np.empty(0, np.int64),  # ids that are read and not yet in a window
            "buffer": [],  # windows of the shuffle buffer
            "windows": 0,  # number of windows of this pass so far
        }
        if self._loaded_state is None:
            return state
        loaded = self._loaded_state
        self._loaded_state = None
        for name in ("reader", "sequence_length"):
            if loaded[name] != state[name]:
                raise ValueError(
                    f"the state was saved with {name} {loaded[name]}, which is now {state[name]}: "
                    f"continue with the same numbers of processes and workers, and the same "
                    f"sequence_length"
                )
        return state | loaded

    def _shuffled_windows(self, state: dict) -> Iterator[np.ndarray]:
        """Yield the windows, each drawn from the shuffle buffer if there is one."""
        buffer = state["buffer"]

        def draw_index() -> int:
            seeds = (self.seed, state["epoch"], state["reader"][0], state["windows"] + 1)
            return int(np.random.default_rng(seeds).integers(len(buffer)))

        for window in self._windows(state):
            if not self.shuffle_buffer:
                yield window
            elif len(buffer) < self.shuffle_buffer:
                buffer.append(window.copy())  # a view would keep all ids read with it in memory
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
        """Yield windows of (T + 1,) int64 ids. The last id of a window begins the next one."""
        T = self.sequence_length
        arrays = self._token_ids(state["place"], *state["reader"])
        while True:
            while len(state["ids"]) > T:
                window = state["ids"][: T + 1]
                state["ids"] = state["ids"][T:]
                yield window
            place, ids = next(arrays, (None, None))
            if place is None:
                return
            state["place"] = place
            state["ids"] = np.concatenate([state["ids"], ids])

    def _token_ids(
        self, place: Place, reader: int, num_readers: int
    ) -> Iterator[tuple[Place, np.ndarray]]:
        """Yield (next place, ids) for a reader's text after `place`, about a megabyte at once."""
        texts_at_places = self._texts(place, reader, num_readers)
        end: TextsAtPlace = ((1 << 62, 0), [])  # no span has this number
        pairs = itertools.pairwise(itertools.chain(texts_at_places, [end]))
        for (_, texts), (next_place, _) in pairs:
            if self.has_documents:
                ids = self.tokenizer.encode_documents(texts)
            else:
                ids = np.concatenate([self.tokenizer.encode(text) for text in texts])
            yield next_place, ids

    def _texts(self, place: Place, reader: int, num_readers: int) -> Iterator[TextsAtPlace]:
        """Yield (place, texts at this place) for a reader, from `place` on."""
        if self.sources is None:
            yield from self._texts_of_documents(place, reader, num_readers)
        else:
            yield from self._texts_of_files(self.sources, place, reader, num_readers)

    def _texts_of_files(
        self, sources: list[Source], place: Place, reader: int, num_readers: int
    ) -> Iterator[TextsAtPlace]:
        """Yield what _texts() yields, from files."""
        spans = self._spans(sources, num_readers)[reader::num_readers]
        first_span, position = place
        for i in range(first_span, len(spans)):
            span = spans[i]
            if position:
                span = replace(span, start=position)
                position = 0
            for positions, texts in read(span):
                yield (i, positions[0]), _valid_texts(texts)

    def _texts_of_documents(
        self, place: Place, reader: int, num_readers: int
    ) -> Iterator[TextsAtPlace]:
        """Yield what _texts() yields, from an iterable of documents.

        A place is (0, number of the document among the documents of this reader).
        """
        span, number = place
        if span:  # the end of the pass
            return
        iterable: Iterable[Any] = self.source() if callable(self.source) else self.source
        first = reader + number * num_readers
        documents = itertools.islice(iterable, first, None, num_readers)
        while texts := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
            for i, text in enumerate(texts, number):
                if not isinstance(text, str):
                    raise ValueError(
                        f"document {reader + i * num_readers} of the iterable is of type "
                        f"{type(text).__name__}, not str (give files as a list of paths)"
                    )
            yield (0, number), texts
            number += len(texts)

    def _spans(self, sources: list[Source], num_readers: int) -> list[Source]:
        """Return the files divided into spans, at least one span for each reader.

        Raises:
            ValueError: The files cannot be divided into that many spans.
        """
        wanted = num_readers * SPANS_PER_READER if num_readers > 1 else 1
        span_bytes = SPAN_BYTES
        while True:
            spans = [span for source in sources for span, _ in divide(source, span_bytes)]
            if len(spans) >= wanted or span_bytes == 1:
                break
            span_bytes = max(1, span_bytes // 4)
        if len(spans) < num_readers:
            raise ValueError(
                f"{self.source} can be divided into {len(spans)} spans only, for {num_readers} "
                f"processes x workers: use fewer, or more files, or files that are not compressed"
            )
        return spans


def _paths(source: Paths | Documents) -> list[str] | None:
    """Return the paths that `source` names; None if `source` gives documents.

    Raises:
        ValueError: The source is neither a path, a list of paths, nor documents.
    """
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


def _valid_texts(texts: Iterable[str | InvalidDocument]) -> list[str]:
    """Return the texts.

    Raises:
        ValueError: A text is an invalid document.
    """
    valid = []
    for text in texts:
        if isinstance(text, InvalidDocument):
            raise ValueError(str(text))
        valid.append(text)
    return valid


def tokenize(
    source: Paths | Documents, tokenizer: Tokenizer, documents: str = "", text_field: str = ""
) -> Tokens:
    """Return the tokens of raw text, in memory, for TextDataset and DocumentDataset.

    Use it for text that is too small to be worth preparing.

    Example: tokenize(lambda: ["ab", "c"], get_tokenizer("bytes")) holds [97, 98, 256, 99, 256].

    Args:
        source: Files or documents, as for StreamingTextDataset.
        tokenizer: A tokenizer, from get_tokenizer.
        documents: How files are divided into documents.
        text_field: Field or column with the text.

    Raises:
        OSError: A file cannot be read.
        ValueError: A document is invalid, or there is no text.
    """
    stream = StreamingTextDataset(
        source, tokenizer, 1, documents=documents, text_field=text_field, rank=0, world_size=1
    )
    arrays = [ids for _, ids in stream._token_ids((0, 0), 0, 1)]
    if not sum(map(len, arrays)):
        raise ValueError(f"there is no text in {source!r:.60}")
    return Tokens(
        np.concatenate(arrays),
        eot_token=tokenizer.eot_token,
        vocab_size=tokenizer.vocab_size,
        has_documents=stream.has_documents,
    )
