"""The .bin files of a prepared split, memory-mapped."""

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from corpus.metadata import read_metadata

BLOCK_TOKENS = 1 << 20  # tokens read at once
LARGE_FILE = 1 << 30  # bytes; a larger file may not stay in memory


def open_tokens(
    path: Path, dtype: np.typing.DTypeLike | None = None
) -> tuple[list[np.ndarray], dict | None]:
    """Memory-map the files of a split.

    Args:
        path: Split of a prepared corpus (data/NAME/train), or a .bin file without metadata.json.
        dtype: Dtype of the ids, for a file without metadata.json only.

    Returns:
        (shards, metadata): Shards are arrays of ids, one per file, in order. For a file without
        metadata.json, metadata is None.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The corpus has no such split, or the length of a file differs from
            metadata.json.
    """
    if dtype is not None:
        return [_map(path, np.dtype(dtype).newbyteorder("<"))], None
    if path.suffix == ".bin" and not (path.parent / "metadata.json").exists():
        raise ValueError(f"{path} has no metadata.json beside it: give the dtype of its ids")
    metadata = read_metadata(path.parent)
    splits = metadata["splits"]
    name = split_name(path)
    if name not in splits:
        raise ValueError(f"{path.parent} has no split {name!r}, only {', '.join(splits)}")
    ids_type = np.dtype(metadata["dtype"]).newbyteorder("<")
    files = splits[name]["files"]
    shards = [_map(path.parent / file["name"], ids_type, file["tokens"]) for file in files]
    return shards, metadata


def split_name(path: str | Path) -> str:
    """Return the name of a split: data/NAME/train and data/NAME/train.bin are both "train"."""
    return Path(path).name.removesuffix(".bin")


def _map(path: Path, dtype: np.dtype, num_tokens: int | None = None) -> np.ndarray:
    """Memory-map a file, and check that it has `num_tokens` ids unless that is None."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run python prepare_data.py as before")
    size = path.stat().st_size
    if num_tokens is not None and size != num_tokens * dtype.itemsize:
        raise ValueError(
            f"{path} has {size:,} bytes, metadata.json says {num_tokens * dtype.itemsize:,}: run "
            f"python prepare_data.py again, with the flags it was made with"
        )
    if size % dtype.itemsize:
        raise ValueError(f"{path} does not hold a whole number of {dtype} ids: {size:,} bytes")
    if not size:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    with open(path, "rb") as f:
        memory = _MappedFile(f.fileno(), 0, access=mmap.ACCESS_READ)
    memory.path = path
    return np.frombuffer(memory, dtype)


class _MappedFile(mmap.mmap):
    """A memory-mapped file with its path."""

    path: Path


def _mapped_file(shard: np.ndarray) -> _MappedFile | None:
    """Return the mapped file of an array, or None if the array has no file."""
    memory = getattr(shard.base, "obj", None)
    return memory if isinstance(memory, _MappedFile) else None


def check_length(shard: np.ndarray) -> None:
    """Check that the file of a shard has not become shorter. This takes less than a microsecond.

    Reading beyond the new end of the file would kill the process (SIGBUS) without a message.

    Args:
        shard: Array of open_tokens.

    Raises:
        ValueError: The file is shorter than when it was mapped.
    """
    file = _mapped_file(shard)
    if file is not None and file.size() < len(file):
        raise ValueError(
            f"{file.path} was cut from {len(file):,} bytes to {file.size():,} while it was in use: "
            f"run python prepare_data.py again, with the flags it was made with"
        )


def blocks(shards: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield all ids in order, a million at a time.

    Args:
        shards: Arrays of open_tokens.

    Yields:
        (n,) arrays of ids.

    Raises:
        ValueError: A file was cut while it was in use.
    """
    for shard in shards:
        for start in range(0, len(shard), BLOCK_TOKENS):
            check_length(shard)
            yield shard[start : start + BLOCK_TOKENS]


def advise_kernel(shards: Iterable[np.ndarray], order: str) -> None:
    """Tell the kernel in which order large files will be read.

    Args:
        shards: Arrays of open_tokens.
        order: "RANDOM", so that the kernel does not read megabytes around each window, or "NORMAL".
    """
    for shard in shards:
        file = _mapped_file(shard)
        if file is not None and len(file) > LARGE_FILE and hasattr(mmap, "MADV_RANDOM"):
            file.madvise(getattr(mmap, f"MADV_{order}"))
