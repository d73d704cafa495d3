"""The tokens of a split: memory-mapped files, read as one sequence.

tokens = Tokens("data/tinyshakespeare/train")
tokens.read([0, 100], length=65)        # (2, 65) int64
"""

import numbers
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, DTypeLike

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
    """The token ids of a split, or a view of some of them, as one sequence over all shards.

    - Files are memory-mapped: opening takes the same time for any size.
    - A pickled copy (for a DataLoader worker) holds the path, not the ids, and maps the files
      again.
    - Views and pickled copies keep vocabulary size and end-of-text token.

    Example: ids=[5, 6, 7, 8, 9], read([0, 2], length=3) -> [[5, 6, 7], [7, 8, 9]].

    Args:
        path: A split of a prepared corpus (data/NAME/train); or a bare .bin file, which needs a
            dtype; or a one-dimensional array of ids.
        dtype: Type of the ids of a bare file, "uint16" or "uint32".
        eot_token: Id that ends a document. A metadata.json takes precedence.
        vocab_size: Ids are below this number. A metadata.json takes precedence.
        has_documents: Whether documents end with eot_token; False: the ids are a running text;
            None: unknown. A metadata.json takes precedence.
        start: Position of the first token of the view.
        stop: Position after the last token of the view; None: all tokens.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: `path` is not one of the above, or a file does not match metadata.json.
    """

    def __init__(
        self,
        path: str | Path | ArrayLike,
        dtype: DTypeLike | None = None,
        eot_token: int | None = None,
        vocab_size: int | None = None,
        has_documents: bool | None = None,
        start: int = 0,
        stop: int | None = None,
    ):
        self._arguments: dict[str, Any] = {
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
        self._num_documents = None  # documents of the whole split, from metadata.json
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

    def _open(self, path: Path, dtype: DTypeLike | None) -> None:
        """Map the files of a split and take what its metadata.json says."""
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

    def view(self, start: int, stop: int) -> "Tokens":
        """Return a view of the tokens from position `start` to `stop` - 1.

        Example: ids=[5, 6, 7, 8, 9], view(1, 3) -> [6, 7].
        """
        bounds = {"start": self.start + start, "stop": self.start + stop}
        return Tokens(**(self._arguments | bounds))

    def read(self, starts: ArrayLike, length: int) -> np.ndarray:
        """Return (B, length) int64 ids: `length` ids from each of the (B,) positions `starts`."""
        return self.gather(starts, length).astype(np.int64)

    def gather(self, starts: ArrayLike, length: int) -> np.ndarray:
        """Return the same ids as read(), in the dtype of the file.

        Args:
            starts: (B,) positions in this view.
            length: Number of ids from each position.

        Returns:
            (B, length) ids.

        Raises:
            ValueError: An id is outside the vocabulary, or a file was cut while in use.
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
        """Return the ids as gather() does, from several files; positions count from the first."""
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
                found = self.shards[i][begin : begin + length - done]
                ids[row, done : done + len(found)] = found
                done += len(found)
        return ids

    def num_documents(self) -> int:
        """Return the number of documents.

        The number for a whole split is in metadata.json. The documents of a view, a bare file or
        an array are counted.

        Raises:
            ValueError: The documents have to be counted, and eot_token is unknown or the ids are a
                running text.
        """
        if self._num_documents is not None and len(self) == self._shard_ends[-1]:
            return self._num_documents
        return len(self.document_ends())

    def document_end(self, position: int) -> int:
        """Return the position after the document that `position` is in.

        A running text has no documents: the result is `position`.

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
        """Return the position after each document's end-of-text token, (n,) int64.

        The last document may lack an end-of-text token: its end is the number of tokens. Every
        token is read once, at about 1 GB/s.

        Example: ids=[1, 2, EOT, 3, EOT, 4] -> [3, 5, 6].

        Raises:
            ValueError: The eot_token is unknown, or the corpus is one running text.
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
        all_ends = [np.empty(0, np.int64)]
        position = 0
        advise_kernel(self.shards, "NORMAL")
        for ids in blocks(self.shards):
            next_position = position + len(ids)
            if next_position > self.start and position < self.stop:
                all_ends.append(np.flatnonzero(ids == self.eot_token) + (position + 1))
            position = next_position
        advise_kernel(self.shards, "RANDOM")
        ends = np.concatenate(all_ends) - self.start
        ends = ends[(ends > 0) & (ends <= len(self))]
        if len(self) > (ends[-1] if len(ends) else 0):
            ends = np.append(ends, len(self))
        return ends.astype(np.int64)


def _from_arguments(arguments: dict) -> Tokens:
    """Return a copy of the Tokens that were made with these arguments, when unpickling."""
    return Tokens(**arguments)


def check_split_size(size: float | int) -> None:
    """Check that `size` is a share between 0 and 1 or a positive whole number.

    Raises:
        ValueError: The size is neither.
    """
    whole = isinstance(size, numbers.Integral) and size >= 1
    share = isinstance(size, numbers.Real) and 0 < size < 1
    if isinstance(size, bool) or not (whole or share):
        raise ValueError(
            f"can't be split by {size}: give a share between 0 and 1 (0.1), or a whole number of "
            f"items (10)"
        )


def _as_ids(array: ArrayLike) -> np.ndarray:
    """Return a list or array of ids as a NumPy array.

    Raises:
        ValueError: The array is not one-dimensional, or not of integers.
    """
    ids = np.asarray(array)
    if ids.ndim == 1 and not len(ids):
        return np.empty(0, np.uint16)  # NumPy turns an empty list into floats
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{array!r:.60} is not a split of a prepared corpus (data/NAME/train), a .bin file, or "
            f"a one-dimensional array of token ids"
        )
    return ids


def _check_dtype(dtype: DTypeLike) -> None:
    """Raise ValueError unless `dtype` is an integer type."""
    try:
        is_integer = np.dtype(dtype).kind in "iu"
    except TypeError:
        is_integer = False
    if not is_integer:
        raise ValueError(f'dtype must be an integer type such as "uint16", not {dtype!r}')
