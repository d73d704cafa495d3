"""Planning: which chunks of which sources make up each task, and whether the disk has room."""

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.grouping import in_groups
from corpus.inputs import Corpus
from corpus.reader import divide
from corpus.sources import BLOCK, Source, damage, open_file
from corpus.tokenizer import Tokenizer

MOST_TASKS = 64  # of a corpus whose tasks may have any size: enough for 64 workers
LONGEST_UNDIVIDED = 8 << 20  # characters that a tokenizer encodes at once: a gigabyte of memory
COMPRESSION = 4  # uncompressed bytes per byte of a compressed text, about
TOKENS_PER_BYTE = 0.4  # of a vocabulary with more than the 256 bytes, at most, about


def plan(
    corpus: Corpus,
    tokenizer: Tokenizer,
    train_split_ratio: float,
    least_bytes: int,
    most_bytes: int,
) -> list[tuple[list[Source], int]]:
    """Divide a corpus into tasks.

    Args:
        corpus: the corpus.
        tokenizer: the tokenizer that will encode it.
        train_split_ratio: share of a running text for train.
        least_bytes: least size of a task, where the sources can be divided.
        most_bytes: size at which a task is full.

    Returns:
        (chunks, their size in bytes) of each task, in the order of the corpus.

    Raises:
        OSError: if a source cannot be read.
        ValueError: if a table is damaged, or a running text is too long for the tokenizer.
    """
    sources = corpus.sources
    total_bytes = sum(os.path.getsize(source.path) for source in sources)
    task_bytes = min(max(total_bytes // MOST_TASKS, least_bytes), most_bytes)
    if not corpus.has_documents:
        for source in sources:
            refuse_long_text(source, tokenizer)
        sources = split_text(sources, train_split_ratio, tokenizer)
    chunks = [chunk for source in sources for chunk in divide(source, task_bytes)]
    tasks = []
    for group in in_groups(chunks, task_bytes, lambda chunk: chunk[1]):
        tasks.append(([chunk for chunk, _ in group], sum(size for _, size in group)))
    return tasks


def split_text(
    sources: list[Source], train_split_ratio: float, tokenizer: Tokenizer
) -> list[Source]:
    """Split a running text of n characters: the first int(n * train_split_ratio) are for train.

    Args:
        sources: files of the text, in order.
        train_split_ratio: share of the characters for train.
        tokenizer: the tokenizer that will encode the text. If it has to encode a text at once, the
            sources are marked as such.

    Returns:
        The sources with their splits; the one that is divided comes twice.

    Raises:
        OSError: if a source cannot be read.
    """
    counts = [_count_characters(source.path) for source in sources]
    if not tokenizer.divisible:
        sources = [replace(source, documents="file") for source in sources]
    left_for_train = int(sum(counts) * train_split_ratio)
    parts = []
    for source, count in zip(sources, counts):
        if left_for_train >= count:
            if left_for_train > 0:
                parts.append(replace(source, split="train"))
        elif left_for_train <= 0:
            parts.append(replace(source, split="val"))
        else:
            place = _byte_of_character(source.path, left_for_train)
            parts.append(replace(source, split="train", stop=place))
            parts.append(replace(source, split="val", start=place))
        left_for_train -= count
    return parts


def refuse_long_text(source: Source, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a running text that would take too much memory to encode.

    Args:
        source: a running text.
        tokenizer: the tokenizer that will encode the text, at once unless it is `divisible`.
    """
    if tokenizer.divisible:
        return
    count = _count_characters(source.path)
    if count > LONGEST_UNDIVIDED:
        raise ValueError(
            f"{source.path} is one running text of {count:,} characters, and {tokenizer.name} "
            f"cannot encode it in parts: divide it into documents with --documents line or "
            f"blank-line, into files of at most {LONGEST_UNDIVIDED:,} characters, or choose "
            f"another --tokenizer"
        )


def _character_starts(path):
    """Yield (offset, bool array) for each block of a file: which bytes begin a character."""
    offset = 0
    with contextlib.suppress(*damage(path)), open_file(path) as f:  # the reader reports damage
        while block := f.read(BLOCK):
            yield offset, (np.frombuffer(block, np.uint8) & 0xC0) != 0x80
            offset += len(block)


def _count_characters(path) -> int:
    """Return how many characters a UTF-8 file has."""
    return sum(int(np.count_nonzero(starts)) for _, starts in _character_starts(path))


def _byte_of_character(path, number: int) -> int:
    """Return the offset of a character, counted from 0, in a UTF-8 file."""
    count = 0
    for offset, starts in _character_starts(path):
        more = int(np.count_nonzero(starts))
        if count + more > number:
            return offset + int(np.flatnonzero(starts)[number - count])
        count += more
    raise ValueError(f"{path} has changed while it was read: run this again")


def check_room(folder: Path, tokenizer: Tokenizer, tasks: list[tuple[list[Source], int]]) -> None:
    """Check that the disk has room for the files of tasks and for the shards joined from them.

    The sizes are estimates. Files of finished tasks are there already and count as free.

    Args:
        folder: folder of the prepared corpus.
        tokenizer: the tokenizer.
        tasks: what `plan` returns.

    Raises:
        OSError: if the disk is too full.
    """
    text_bytes = 0
    for chunks, size in tasks:
        compressed = any(chunk.compressed and not chunk.is_table for chunk in chunks)
        text_bytes += size * COMPRESSION if compressed else size
    per_byte = 1 if tokenizer.vocab_size < 1000 else TOKENS_PER_BYTE
    needed = int(2 * text_bytes * per_byte * tokenizer.dtype.itemsize)
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    with contextlib.suppress(FileNotFoundError):
        files = (path for path in (folder / ".work").rglob("*") if path.is_file())
        free += sum(path.stat().st_size for path in files)
    if free < needed:
        raise OSError(
            f"{folder} needs about {needed / 1e9:,.1f} GB and has {free / 1e9:,.1f} GB free: make "
            f"room there, or choose another --data_dir"
        )
