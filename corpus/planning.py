"""Planning: which chunks of which sources make up each task, and whether the disk has room."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.grouping import in_groups
from corpus.inputs import Corpus
from corpus.opening import DamagedFile, UnreadableFile, open_text
from corpus.reader import divide
from corpus.sources import BLOCK, Source
from corpus.tasks import Task
from corpus.tokenizer import CHARACTERS_AT_ONCE, Tokenizer

MAX_SMALL_TASKS = 64  # a corpus has more tasks only if they would be too large: 64 workers
COMPRESSION = 4  # estimated bytes of text per byte of a compressed file
TOKENS_PER_BYTE = 0.4  # high estimate for vocabularies of more than single bytes


def plan(
    corpus: Corpus,
    tokenizer: Tokenizer,
    train_split_ratio: float,
    smallest_bytes: int,
    largest_bytes: int,
    on_error: str = "stop",
) -> list[Task]:
    """Divide a corpus into tasks.

    Args:
        corpus: Corpus with its sources.
        tokenizer: Tokenizer that will encode the corpus.
        train_split_ratio: Share of a running text for train.
        smallest_bytes: Smallest size of a task, where the corpus is large enough.
        largest_bytes: Largest size of a task, where the sources can be divided.
        on_error: "stop" or "skip", at a file of documents that cannot be read.

    Returns:
        The tasks, in the order of the corpus.

    Raises:
        OSError: A source cannot be read.
        ValueError: A file cannot be read, or a running text is too long for the tokenizer.
    """
    sources = corpus.sources
    total_bytes = sum(os.path.getsize(source.path) for source in sources)
    task_bytes = min(max(total_bytes // MAX_SMALL_TASKS, smallest_bytes), largest_bytes)
    if not corpus.has_documents:
        for source in sources:
            refuse_long_text(source, tokenizer)
        sources = split_text(sources, train_split_ratio, tokenizer)
    sized_chunks = []
    for source in sources:
        try:
            sized_chunks += divide(source, task_bytes)
        except UnreadableFile as error:
            if not corpus.has_documents:
                raise
            if on_error != "skip":
                raise ValueError(f"{error}; --on_error skip leaves it out") from None
            sized_chunks.append((source, 0))  # reading it gives one invalid document
    tasks = []
    for group in in_groups(sized_chunks, task_bytes, lambda sized: sized[1]):
        chunks = [chunk for chunk, _ in group]
        tasks.append(Task(chunks, num_bytes=sum(size for _, size in group)))
    return tasks


def split_text(
    sources: list[Source], train_split_ratio: float, tokenizer: Tokenizer
) -> list[Source]:
    """Split a running text of n characters: the first int(n * train_split_ratio) are for train.

    Sources that have a split keep it, and their characters do not count.

    Args:
        sources: Files of the text, in order.
        train_split_ratio: Share of the characters for train.
        tokenizer: Tokenizer that will encode the text. If the tokenizer is not `divisible`, the
            sources are marked to be read as one text each.

    Returns:
        The sources with their splits. A source that holds the end of train comes twice, once for
        each split.

    Raises:
        OSError: A source cannot be read.
    """
    counts = [0 if source.split else _count_characters(source) for source in sources]
    if not tokenizer.divisible:
        sources = [replace(source, division="file") for source in sources]
    left_for_train = int(sum(counts) * train_split_ratio)
    split_sources = []
    for source, count in zip(sources, counts):
        if source.split:
            split_sources.append(source)
        elif left_for_train >= count:
            if left_for_train > 0:
                split_sources.append(replace(source, split="train"))
        elif left_for_train <= 0:
            split_sources.append(replace(source, split="val"))
        else:
            offset = _byte_of_character(source, left_for_train)
            split_sources.append(replace(source, split="train", stop=offset))
            split_sources.append(replace(source, split="val", start=offset))
        left_for_train -= count
    return split_sources


def refuse_long_text(source: Source, tokenizer: Tokenizer) -> None:
    """Refuse a running text that would take too much memory to encode.

    Args:
        source: Source of a running text.
        tokenizer: Tokenizer that will encode the text, in one call unless it is `divisible`.

    Raises:
        ValueError: The text is too long for one call.
        OSError: The source cannot be read.
    """
    if tokenizer.divisible:
        return
    count = _count_characters(source)
    if count > CHARACTERS_AT_ONCE:
        raise ValueError(
            f"{source.path} is one running text of {count:,} characters, and {tokenizer.name} "
            f"cannot encode it in parts: divide it into documents with --documents line or "
            f"blank-line, into files of at most {CHARACTERS_AT_ONCE:,} characters, or choose "
            f"another --tokenizer"
        )


def _character_starts(source: Source) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (offset, bool array) for each block of a source: which bytes begin a character."""
    offset = source.start
    with contextlib.suppress(DamagedFile), open_text(source.path) as f:  # the reader reports damage
        f.seek(offset)
        while block := f.read(BLOCK):
            yield offset, (np.frombuffer(block, np.uint8) & 0xC0) != 0x80
            offset += len(block)


def _count_characters(source: Source) -> int:
    """Return how many characters a UTF-8 source has."""
    return sum(int(np.count_nonzero(starts)) for _, starts in _character_starts(source))


def _byte_of_character(source: Source, number: int) -> int:
    """Return the byte offset in its file of character `number` of a UTF-8 source, from 0."""
    count = 0
    for offset, starts in _character_starts(source):
        num_starts = int(np.count_nonzero(starts))
        if count + num_starts > number:
            return offset + int(np.flatnonzero(starts)[number - count])
        count += num_starts
    raise ValueError(f"{source.path} has changed while it was read: run this again")


def check_room(corpus_dir: Path, tokenizer: Tokenizer, tasks: list[Task]) -> None:
    """Check that the disk has room for the files of all tasks and for the shards.

    The sizes are estimates. The space of finished tasks counts as free, because these tasks need
    no more room.

    Args:
        corpus_dir: Folder of the corpus, data/NAME.
        tokenizer: Tokenizer that will encode the corpus.
        tasks: All tasks of the corpus.

    Raises:
        OSError: The disk is too full.
    """
    text_bytes = 0
    for task in tasks:
        compressed = any(chunk.compressed and not chunk.is_table for chunk in task.chunks)
        text_bytes += task.num_bytes * COMPRESSION if compressed else task.num_bytes
    tokens_per_byte = 1 if tokenizer.vocab_size < 1000 else TOKENS_PER_BYTE
    needed = int(2 * text_bytes * tokens_per_byte * tokenizer.dtype.itemsize)
    folders = (corpus_dir, *corpus_dir.absolute().parents)
    existing = next(path for path in folders if path.exists())
    free = shutil.disk_usage(existing).free
    with contextlib.suppress(FileNotFoundError):  # another process removed a file
        paths = (path for path in (corpus_dir / ".work").rglob("*") if path.is_file())
        free += sum(path.stat().st_size for path in paths)
    if free < needed:
        raise OSError(
            f"{corpus_dir} needs about {needed / 1e9:,.1f} GB and has {free / 1e9:,.1f} GB free: "
            f"make room there, or choose another --data_dir"
        )
