"""The .bin files of a prepared split, memory-mapped."""

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from corpus.metadata import read_metadata

BLOCK_TOKENS = 1 << 20  # read at once
LARGE_FILE = 1 << 30  # bytes of a file that may not stay in memory


def open_tokens(
    path: Path, dtype: np.typing.DTypeLike | None = None
) -> tuple[list[np.ndarray], dict | None]:
    """Memory-map the files of a split.

    Args:
        path: A split of a prepared corpus (data/NAME/train), or a bare .bin file with its dtype.
        dtype: Of a bare file.

    Returns:
        (shards, metadata): an array of ids per file, in order; metadata is None for a bare file.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file does not have the length that metadata.json says.
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
    """Memory-map a file that has `num_tokens` ids, if that is known."""
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
    memory = getattr(shard.base, "obj", None)
    return memory if isinstance(memory, _MappedFile) else None


def check_length(shard: np.ndarray) -> None:
    """Check that a mapped file was not cut, in less than a microsecond.

    To read after the end of a cut file would end the process (SIGBUS) without a message.

    Raises:
        ValueError: It was cut.
    """
    file = _mapped_file(shard)
    if file is not None and file.size() < len(file):
        raise ValueError(
            f"{file.path} was cut from {len(file):,} bytes to {file.size():,} while it was in use: "
            f"run python prepare_data.py again, with the flags it was made with"
        )


def blocks(shards: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield all ids in order, a million at a time."""
    for shard in shards:
        for start in range(0, len(shard), BLOCK_TOKENS):
            check_length(shard)
            yield shard[start : start + BLOCK_TOKENS]


def advise_kernel(shards: Iterable[np.ndarray], order: str) -> None:
    """Tell the kernel how large files will be read.

    Args:
        shards: Arrays of open_tokens.
        order: "RANDOM", or it would read megabytes around each window; or "NORMAL".
    """
    for shard in shards:
        file = _mapped_file(shard)
        if file is not None and len(file) > LARGE_FILE and hasattr(mmap, "MADV_RANDOM"):
            file.madvise(getattr(mmap, f"MADV_{order}"))
