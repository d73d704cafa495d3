"""Prepared tokens as they lie on disk: the list of files, and one memory-mapped sequence of them.

tokens = Tokens("data/tinyshakespeare/train")
tokens.read([0, 100], length=65)        # (2, 65) int64
"""

import hashlib
import json
import mmap
import os
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from common import folder_name, near, read_json

BLOCK = 1 << 20  # tokens looked at together
LARGE = 1 << 30  # bytes of a file that may not stay in memory


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
                self.documents = metadata["splits"][_split_name(path)].get("documents")
            _expect(self.shards, "RANDOM")
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
        _expect(self.shards, "NORMAL")
        for block in blocks(self.shards):
            ends.append(np.flatnonzero(block == self.eot_token) + (position + 1))
            position += len(block)
        _expect(self.shards, "RANDOM")
        ends = np.concatenate(ends) - self.start
        ends = ends[(ends > 0) & (ends <= len(self))]
        tail = [len(self)] if len(self) > (ends[-1] if len(ends) else 0) else []
        return np.append(ends, tail).astype(np.int64)


def read_metadata(corpus_dir) -> dict:
    """metadata.json of a prepared corpus (data/README.md says what it holds).

    Raises FileNotFoundError, or ValueError for one that is damaged, with the remedy.
    """
    path = Path(corpus_dir) / "metadata.json"
    try:
        metadata = read_json(path)
        sound = _sound(metadata)
    except FileNotFoundError:
        prepared = sorted(path.parent.parent.glob("*/metadata.json"))
        there = [other.parent.name for other in prepared]
        raise FileNotFoundError(
            f"{path.parent} is no prepared corpus: run python prepare_data.py, or choose "
            f"another (there: {', '.join(there) or 'none'}){near(path.parent.name, there)}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"{path} is damaged, or of another version: run python prepare_data.py again, with the "
            f"flags it was made with"
        )
    return metadata


def _sound(metadata) -> bool:
    """Whether it is what prepare_data.py writes; it may be damaged, or a stranger's."""
    splits, tokenizer = list(metadata["splits"].values()), metadata["tokenizer"]
    files = [file for split in splits for file in split["files"]]
    for name in (tokenizer["name"], *(file["name"] for file in files)):
        folder_name(name, "")  # or it would lead out of its folder
    vocab_size, eot = metadata["vocab_size"], metadata.get("eot_token", 0)
    sizes = [vocab_size, *(split[name] for split in splits for name in ("tokens", "bytes"))]
    counts = [eot, *(metadata.get(name, 0) for name in ("seed", "max_length"))]
    counts += [file["tokens"] for file in files] + [split.get("documents", 0) for split in splits]
    return (
        metadata["format_version"] == 1
        and metadata["dtype"] in ("uint16", "uint32")
        and type(tokenizer["sha256"]) is str
        and type(metadata.get("eot_per_document", True)) is bool
        and all(split["files"] for split in splits)
        and all(type(n) is int and n >= 0 for n in sizes + counts)
        and min(sizes) > 0
        and eot < vocab_size
        and metadata.get("sha256") in (None, sealed(metadata)["sha256"])
    )


def sealed(metadata: dict) -> dict:
    """metadata, and last the sha256 of all its other fields, by which damage is found."""
    rest = {name: value for name, value in metadata.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def newest_corpus(data_dir) -> Path:
    """The folder under `data_dir` that was prepared last."""
    prepared = sorted(Path(data_dir).glob("*/metadata.json"), key=os.path.getmtime)
    if not prepared:
        raise FileNotFoundError(
            f"{Path(data_dir).resolve()} has no prepared corpus: run python prepare_data.py, or "
            f"name its folder by --data_dir"
        )
    return prepared[-1].parent


def open_tokens(path: Path, dtype=None):
    """A split (data/NAME/train) or a bare .bin and its dtype -> its memory-mapped files, in order,
    and the corpus's metadata (None for a bare file). Raises FileNotFoundError and ValueError, with
    the remedy, for files that aren't there or aren't as they should be."""
    if dtype is not None:
        return [_map(path, np.dtype(dtype).newbyteorder("<"))], None
    if path.suffix == ".bin" and not (path.parent / "metadata.json").exists():
        raise ValueError(f"{path} has no metadata.json beside it: say which dtype its ids have")
    metadata, name = read_metadata(path.parent), _split_name(path)
    splits, dtype = metadata["splits"], np.dtype(metadata["dtype"]).newbyteorder("<")
    if name not in splits:
        raise ValueError(f"{path.parent} has no split {name!r}, but {', '.join(splits)}")
    files = splits[name]["files"]
    shards = [_map(path.parent / file["name"], dtype, file["tokens"]) for file in files]
    return shards, metadata


def _split_name(path) -> str:
    return Path(path).name.removesuffix(".bin")


def _map(path, dtype, tokens=None):
    """A memory map of a file that has as many `tokens` as it should, if that is known."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run python prepare_data.py as before")
    size = path.stat().st_size
    if tokens is not None and size != tokens * dtype.itemsize:
        raise ValueError(
            f"{path} has {size:,} bytes, metadata.json says {tokens * dtype.itemsize:,}: run "
            f"python prepare_data.py again, with the flags it was made with"
        )
    if size % dtype.itemsize:
        raise ValueError(f"{path} is no whole number of {dtype} ids: {size:,} bytes")
    if not size:
        return np.empty(0, dtype)  # can't be mapped
    with open(path, "rb") as f:
        memory = _File(f.fileno(), 0, access=mmap.ACCESS_READ)
    memory.path = path
    return np.frombuffer(memory, dtype)


class _File(mmap.mmap):
    """A mapped file that knows its path."""


def _file(shard) -> _File | None:
    memory = getattr(shard.base, "obj", None)
    return memory if isinstance(memory, _File) else None


def check_length(shard) -> None:
    """Raises ValueError where a mapped file has been cut: to read behind its end would be the end
    of the process (SIGBUS), without a word. Costs less than a microsecond."""
    if (file := _file(shard)) is not None and file.size() < len(file):
        raise ValueError(
            f"{file.path} was cut from {len(file):,} bytes to {file.size():,} while it was in use: "
            f"run python prepare_data.py again, with the flags it was made with"
        )


def blocks(shards):
    """All ids in order, a million at a time."""
    for shard in shards:
        for start in range(0, len(shard), BLOCK):
            check_length(shard)
            yield shard[start : start + BLOCK]


def _expect(shards, order: str) -> None:
    """Tells the kernel how large files will be read: at "RANDOM", or it would read megabytes around
    each window, or in "NORMAL" order."""
    for file in filter(None, map(_file, shards)):
        if len(file) > LARGE and hasattr(mmap, "MADV_RANDOM"):
            file.madvise(getattr(mmap, f"MADV_{order}"))
