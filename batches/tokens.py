"""The tokens of a split: memory-mapped files, read as one sequence.

tokens = Tokens("data/tinyshakespeare/train")
tokens.read([0, 100], length=65)        # (2, 65) int64
"""

import numbers
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from corpus.metadata import read_metadata
from corpus.token_files import (
    BLOCK_TOKENS,
    advise_kernel,
    blocks,
    check_length,
    open_tokens,
    split_name,
)


class Tokens:
    """The token ids of a split, or of a part of it, as one sequence over all shards.

    - Files are memory-mapped: opening takes the same time for any size.
    - Pickling (for DataLoader workers) keeps the path, not the ids of files; the copy maps the
      files itself.
    - Parts and pickled copies keep vocabulary size and end-of-text token.

    Example: ids=[5, 6, 7, 8, 9], read([0, 2], length=3) -> [[5, 6, 7], [7, 8, 9]].

    Args:
        path: A split of a prepared corpus (data/NAME/train); or a bare .bin file with its dtype;
            or a one-dimensional array of ids.
        dtype: "uint16" or "uint32", for a bare file.
        eot_token: Id that ends a document, where there is no metadata.json.
        vocab_size: Ids are below this number, where there is no metadata.json.
        has_documents: Whether documents end with eot_token, where there is no metadata.json; None
            if not known. False for a running text.
        start: First token of the part.
        stop: Token after the last one of the part; None: all tokens.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If `path` is not one of the above, or a file does not match metadata.json.
    """

    def __init__(
        self,
        path,
        dtype: str | None = None,
        eot_token: int | None = None,
        vocab_size: int | None = None,
        has_documents: bool | None = None,
        start: int = 0,
        stop: int | None = None,
    ):
        self._arguments = {
            "path": path,
            "dtype": dtype,
            "eot_token": eot_token,
            "vocab_size": vocab_size,
            "has_documents": has_documents,
            "start": start,
            "stop": stop,
        }
        self.eot_token = eot_token
        self.vocab_size = vocab_size
        self.has_documents = has_documents
        self._num_documents = None  # of the whole split, as metadata.json says
        if isinstance(path, (str, Path)):
            self.path = path
            self._open(Path(path), dtype)
        else:
            self.path = "the array"
            self.shards = [_as_ids(path)]
        self._windows: dict[int, np.ndarray] = {}  # length -> a view of all windows of this length
        self._shard_ends = np.cumsum([len(shard) for shard in self.shards])
        self.start = start
        self.stop = int(self._shard_ends[-1]) if stop is None else stop

    def _open(self, path: Path, dtype) -> None:
        if (path / "metadata.json").is_file():
            names = ", ".join(str(path / name) for name in read_metadata(path)["splits"])
            raise ValueError(f"{path} is a corpus: choose one of its splits ({names})")
        if dtype is not None:
            _check_dtype(dtype)
        self.shards, metadata = open_tokens(path, dtype)
        if metadata:
            self.eot_token = metadata.get("eot_token")
            self.vocab_size = metadata["vocab_size"]
            self.has_documents = metadata.get("eot_per_document")
            self._num_documents = metadata["splits"][split_name(path)].get("documents")
        advise_kernel(self.shards, "RANDOM")

    def __reduce__(self):
        return _from_arguments, (self._arguments,)

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Tokens":
        """Return tokens `start` to `stop` - 1 of these, as a view."""
        bounds = {"start": self.start + start, "stop": self.start + stop}
        return Tokens(**(self._arguments | bounds))

    def read(self, starts, length: int) -> np.ndarray:
        """Return the (B, length) int64 ids from each of (B,) positions on."""
        return self.gather(starts, length).astype(np.int64)

    def gather(self, starts, length: int) -> np.ndarray:
        """Return the (B, length) ids from each of (B,) positions on, in the dtype of the file.

        Raises:
            ValueError: If an id is outside the vocabulary, or a file was cut while in use.
        """
        starts = np.asarray(starts, dtype=np.int64) + self.start
        if len(self.shards) == 1:
            check_length(self.shards[0])
            if length not in self._windows:  # making a view takes longer than reading a batch
                self._windows[length] = sliding_window_view(self.shards[0], length)
            ids = self._windows[length][starts]
        else:
            ids = self._gather_from_shards(starts, length)
        if self.vocab_size and ids.max(initial=0) >= self.vocab_size:
            raise ValueError(
                f"{self.path} holds the id {ids.max()}, but its vocabulary has "
                f"{self.vocab_size}: the file is damaged; prepare it again"
            )
        return ids

    def _gather_from_shards(self, starts: np.ndarray, length: int) -> np.ndarray:
        first = np.searchsorted(self._shard_ends, starts, side="right")  # shard of the first token
        last = np.searchsorted(self._shard_ends, starts + length - 1, side="right")
        ids = np.empty((len(starts), length), dtype=self.shards[0].dtype)
        for i in np.union1d(first, last):
            check_length(self.shards[i])
        for i in np.unique(first[first == last]):
            rows = (first == i) & (last == i)
            shard_start = self._shard_ends[i] - len(self.shards[i])
            ids[rows] = sliding_window_view(self.shards[i], length)[starts[rows] - shard_start]
        for row in np.flatnonzero(first != last):  # rows that reach over the end of a shard
            done = 0
            for i in range(first[row], last[row] + 1):
                shard_start = self._shard_ends[i] - len(self.shards[i])
                begin = starts[row] + done - shard_start
                part = self.shards[i][begin : begin + length - done]
                ids[row, done : done + len(part)] = part
                done += len(part)
        return ids

    def num_documents(self) -> int:
        """Return the number of documents.

        For a whole split it is in metadata.json; in a part or a bare file they are counted.

        Raises:
            ValueError: If they have to be counted and eot_token is not known.
        """
        if self._num_documents is not None and len(self) == self._shard_ends[-1]:
            return self._num_documents
        return len(self.document_ends())

    def document_end(self, position: int) -> int:
        """Return where the document at `position` ends.

        In a running text, where documents have no end, this is `position`.

        Example: ids=[1, 2, EOT, 3, EOT], position=1 -> 3.
        """
        if self.eot_token is None or self.has_documents is False:
            return position
        for start in range(position, len(self), BLOCK_TOKENS):
            ids = self.read([start], min(BLOCK_TOKENS, len(self) - start))[0]
            ends = np.flatnonzero(ids == self.eot_token)
            if len(ends):
                return start + int(ends[0]) + 1
        return position

    def document_ends(self) -> np.ndarray:
        """Return where each document ends, (n,) int64: the position after its end-of-text token.

        The last document may lack this token. Reads every token once, about 1 GB/s.

        Example: ids=[1, 2, EOT, 3, EOT, 4] -> [3, 5, 6].

        Raises:
            ValueError: If eot_token is not known, or the corpus is one running text.
        """
        if self.has_documents is False:
            raise ValueError(
                f"{self.path} is one running text without documents: read it as windows "
                f"(TextDataset), or prepare it again with --documents"
            )
        if self.eot_token is None:
            raise ValueError(
                f"the id that ends a document of {self.path} is unknown: set eot_token"
            )
        ends_by_block = [np.empty(0, np.int64)]
        position = 0
        advise_kernel(self.shards, "NORMAL")
        for block in blocks(self.shards):
            block_end = position + len(block)
            if block_end > self.start and position < self.stop:
                ends_by_block.append(np.flatnonzero(block == self.eot_token) + (position + 1))
            position = block_end
        advise_kernel(self.shards, "RANDOM")
        ends = np.concatenate(ends_by_block) - self.start
        ends = ends[(ends > 0) & (ends <= len(self))]
        if len(self) > (ends[-1] if len(ends) else 0):
            ends = np.append(ends, len(self))
        return ends.astype(np.int64)


def _from_arguments(arguments: dict) -> Tokens:
    return Tokens(**arguments)


def check_split_size(size: float | int) -> None:
    """Raise ValueError unless `size` is a share between 0 and 1 or a positive whole number."""
    whole = isinstance(size, numbers.Integral) and size >= 1
    share = isinstance(size, numbers.Real) and 0 < size < 1
    if isinstance(size, bool) or not (whole or share):
        raise ValueError(
            f"can't be split by {size}: give a share between 0 and 1 (0.1), or a whole number of "
            f"items (10)"
        )


def _as_ids(array) -> np.ndarray:
    ids = np.asarray(array)
    if ids.ndim == 1 and not len(ids):
        return np.empty(0, np.uint16)  # of an empty list, NumPy makes floats
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{array!r:.60} is not a split of a prepared corpus (data/NAME/train), a .bin file, or "
            f"a one-dimensional array of token ids"
        )
    return ids


def _check_dtype(dtype) -> None:
    try:
        kind = np.dtype(dtype).kind
    except TypeError:
        kind = ""
    if kind not in ("i", "u"):
        raise ValueError(f'dtype must be an integer type such as "uint16", not {dtype!r}')
