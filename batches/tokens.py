"""Prepared tokens as they lie on disk: the list of files, and one memory-mapped sequence of them.

tokens = Tokens("data/tinyshakespeare/train")
tokens.read([0, 100], length=65)        # (2, 65) int64
"""

from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from corpus.token_files import BLOCK, advise_kernel, blocks, check_length, open_tokens, split_name


class Tokens:
    """The ids of a split, all its shards as one sequence, or a part of it.

    path: a split of a prepared corpus (data/NAME/train), or a bare .bin file together with its
    dtype ("uint16", "uint32"), or a one-dimensional array of ids. start, stop: of the part.
    eot_token: that ends a document, where metadata.json doesn't tell it. Raises what open_tokens
    raises.
    """

    def __init__(self, path, dtype=None, eot_token=None, start=0, stop=None):
        self.path, self.dtype, self.start = path, dtype, start
        self.vocab_size, self.eot_token, self.documents = None, eot_token, None
        if isinstance(path, (str, Path)):
            self.shards, metadata = open_tokens(Path(path), dtype)
            if metadata:
                self.vocab_size, self.eot_token = metadata["vocab_size"], metadata.get("eot_token")
                self.documents = metadata["splits"][split_name(path)].get("documents")
            advise_kernel(self.shards, "RANDOM")
        else:
            self.path, self.shards = "the array", [np.asarray(path)]
        self.windows = {}  # length -> a view of all windows
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.stop = int(self.ends[-1]) if stop is None else stop
        self.arguments = path, dtype, eot_token, start, stop

    def __reduce__(self):  # a worker process maps the files itself: pickle would copy them whole
        return type(self), self.arguments

    def __len__(self):
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Tokens":
        """Tokens start to stop - 1 of these."""
        return Tokens(*self.arguments[:3], self.start + start, self.start + stop)

    def read(self, starts, length: int) -> np.ndarray:
        """(B,) positions -> (B, length) int64 ids from there on."""
        return self.gather(starts, length).astype(np.int64)

    def gather(self, starts, length: int) -> np.ndarray:
        """As read, in the file's dtype. Raises ValueError for an id outside the vocabulary, or a
        file that was cut."""
        starts = np.asarray(starts, dtype=np.int64) + self.start
        if len(self.shards) == 1:
            check_length(self.shards[0])
            if length not in self.windows:  # making a view takes longer than reading a batch
                self.windows[length] = sliding_window_view(self.shards[0], length)
            ids = self.windows[length][starts]
        else:
            ids = self._read_shards(starts, length)
        if self.vocab_size and ids.max(initial=0) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds the id {ids.max()}, but its vocabulary has "
                f"{self.vocab_size}: the file is damaged; prepare it again"
            )
        return ids

    def _read_shards(self, starts, length):
        first = np.searchsorted(self.ends, starts, side="right")  # the shard of the first token
        last = np.searchsorted(self.ends, starts + length - 1, side="right")
        ids = np.empty((len(starts), length), dtype=self.shards[0].dtype)
        for i in np.union1d(first, last):
            check_length(self.shards[i])
        for i in np.unique(first[first == last]):
            here, begin = (first == i) & (last == i), self.ends[i] - len(self.shards[i])
            ids[here] = sliding_window_view(self.shards[i], length)[starts[here] - begin]
        for row in np.flatnonzero(first != last):  # over an edge between shards
            done = 0
            for i in range(first[row], last[row] + 1):
                begin = starts[row] + done - self.ends[i] + len(self.shards[i])
                part = self.shards[i][begin : begin + length - done]
                ids[row, done : done + len(part)] = part
                done += len(part)
        return ids

    def num_documents(self) -> int:
        """As metadata.json tells it; in a part of a split, or a bare file, they are counted."""
        if self.documents is not None and len(self) == self.ends[-1]:
            return self.documents
        return len(self.document_ends())

    def document_end(self, position: int) -> int:
        """The end of the document that `position` lies in; `position` itself in a running text."""
        for start in range(position, len(self) if self.eot_token is not None else 0, BLOCK):
            ids = self.read([start], min(BLOCK, len(self) - start))[0]
            if len(found := np.flatnonzero(ids == self.eot_token)):
                return start + int(found[0]) + 1
        return position

    def document_ends(self) -> np.ndarray:
        """Where documents end, (n,) int64: behind each end of text, and at the end of all. Reads
        every token once, a gigabyte or so a second. Raises ValueError where eot_token is unknown.
        """
        if self.eot_token is None:
            raise ValueError(f"which id ends a document of {self.path}? Name it by eot_token")
        ends, position = [], 0
        advise_kernel(self.shards, "NORMAL")
        for block in blocks(self.shards):
            ends.append(np.flatnonzero(block == self.eot_token) + (position + 1))
            position += len(block)
        advise_kernel(self.shards, "RANDOM")
        ends = np.concatenate(ends) - self.start
        ends = ends[(ends > 0) & (ends <= len(self))]
        tail = [len(self)] if len(self) > (ends[-1] if len(ends) else 0) else []
        return np.append(ends, tail).astype(np.int64)
