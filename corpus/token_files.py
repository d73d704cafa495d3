"""The .bin files of a prepared split, memory-mapped."""

import mmap
from pathlib import Path

import numpy as np

from corpus.metadata import read_metadata

BLOCK = 1 << 20  # tokens looked at together
LARGE = 1 << 30  # bytes of a file that may not stay in memory


def open_tokens(path: Path, dtype=None):
    """A split (data/NAME/train) or a bare .bin and its dtype -> its memory-mapped files, in order,
    and the corpus's metadata (None for a bare file). Raises FileNotFoundError and ValueError, with
    the remedy, for files that aren't there or aren't as they should be."""
    if dtype is not None:
        return [_map(path, np.dtype(dtype).newbyteorder("<"))], None
    if path.suffix == ".bin" and not (path.parent / "metadata.json").exists():
        raise ValueError(f"{path} has no metadata.json beside it: say which dtype its ids have")
    metadata, name = read_metadata(path.parent), split_name(path)
    splits, dtype = metadata["splits"], np.dtype(metadata["dtype"]).newbyteorder("<")
    if name not in splits:
        raise ValueError(f"{path.parent} has no split {name!r}, but {', '.join(splits)}")
    files = splits[name]["files"]
    shards = [_map(path.parent / file["name"], dtype, file["tokens"]) for file in files]
    return shards, metadata


def split_name(path) -> str:
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


def advise_kernel(shards, order: str) -> None:
    """Tells the kernel how large files will be read: at "RANDOM", or it would read megabytes around
    each window, or in "NORMAL" order."""
    for file in filter(None, map(_file, shards)):
        if len(file) > LARGE and hasattr(mmap, "MADV_RANDOM"):
            file.madvise(getattr(mmap, f"MADV_{order}"))
