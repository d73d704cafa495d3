"""Which parts of which files make up each piece of the work, and has the disk room for it?"""

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from corpus.inputs import Corpus
from corpus.reader import cut
from corpus.sources import BLOCK, Source, damage, open_file


def plan(
    corpus: Corpus, tokenizer, train_split_ratio: float, least: int, most: int
) -> list[tuple[list[Source], int]]:
    """(parts of sources, their bytes) of each piece, in the corpus's order; a piece has about
    a 64th of all, `least` to `most` bytes, where the sources can be cut."""
    sources = corpus.sources
    size = sum(os.path.getsize(source.path) for source in sources) // 64  # for up to 64 workers
    piece_bytes = min(max(size, least), most)
    if not corpus.documents:
        sources = split_text(sources, train_split_ratio, tokenizer)
    parts = [part for source in sources for part in cut(source, piece_bytes)]
    pieces = in_groups(parts, piece_bytes, lambda part: part[1])
    return [([part for part, _ in piece], sum(size for _, size in piece)) for piece in pieces]


def in_groups(items, most: int, size) -> list[list]:
    """Items in order, as many to a group as have `most` of size(item) together, at least one."""
    groups, filled = [], 0
    for item in items:
        if not groups or filled + size(item) > most:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size(item)
    return groups


def split_text(sources: list[Source], train_split_ratio: float, tokenizer) -> list[Source]:
    """A running text is cut once, by character: int(n * train_split_ratio) of all n train. What a
    tokenizer can't take in parts stays whole otherwise."""
    documents = "" if tokenizer.divisible else "file"
    sources = [replace(source, documents=documents) for source in sources]
    counts = [_characters(source.path) for source in sources]
    left, cut_up = int(sum(counts) * train_split_ratio), []
    for source, count in zip(sources, counts):
        here = _characters(source.path, left) if 0 < left < count else None
        if left > 0:
            cut_up.append(replace(source, split="train", stop=here))
        if left < count:
            cut_up.append(replace(source, split="val", start=here or 0))
        left -= count
    return cut_up


def _characters(path, wanted=None) -> int:
    """How many characters a UTF-8 file has; or the byte at which character `wanted` starts."""
    count = offset = 0
    with contextlib.suppress(*damage(path)), open_file(path) as f:  # it is read again, and told
        while block := f.read(BLOCK):
            starts = (np.frombuffer(block, np.uint8) & 0xC0) != 0x80
            here = int(np.count_nonzero(starts))
            if wanted is not None and count + here > wanted:
                return offset + int(np.flatnonzero(starts)[wanted - count])
            count, offset = count + here, offset + len(block)
    return count


def check_room(folder: Path, tokenizer, pieces) -> None:
    """Raises OSError where the disk is too full: a token a byte, or a token in two and a half
    where the vocabulary has more than bytes; compressed text is taken for a fourth of its size;
    pieces, some of which may be there already, and the shards that they are joined to lie there at
    the same time."""
    text = sum(
        size * (4 if any(part.compressed for part in parts) else 1) for parts, size in pieces
    )
    per_byte = 1 if tokenizer.vocab_size < 1000 else 0.4
    needed = int(2 * text * per_byte * tokenizer.dtype.itemsize)
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    with contextlib.suppress(FileNotFoundError):
        free += sum(path.stat().st_size for path in (folder / ".work").iterdir())
    if free < needed:
        raise OSError(
            f"{folder} needs about {needed / 1e9:,.1f} GB and has {free / 1e9:,.1f} GB free: make "
            f"room there, or choose another --data_dir"
        )
