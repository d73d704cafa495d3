"""Verifies a prepared corpus: python prepare_data.py --verify CORPUS."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from corpus.metadata import (
    FINGERPRINTED,
    fingerprint,
    read_metadata,
    require_end_of_text,
    source_path,
)
from corpus.planning import split_text
from corpus.reader import read
from corpus.sources import DIVISIONS, FORMATS, InvalidDocument, Source
from corpus.tasks import assign_split
from corpus.token_files import blocks, open_tokens
from corpus.tokenizer import Tokenizer, get_tokenizer

NUM_COMPARED = 1000  # documents that are compared with the source, about


def verify(folder: Path) -> None:
    """Check that a prepared corpus is what its metadata say, and print what was checked.

    1. Every file: checksum, ids, number of end-of-text tokens.
    2. If the sources are as they were: a sample of the documents, or the whole running text, is
       compared with them.

    Raises:
        ValueError: Something differs; the message names the file and what to do.
        OSError: A file cannot be read.
    """
    metadata = read_metadata(folder)
    require_end_of_text(metadata, folder)
    tokenizer = get_tokenizer(metadata["tokenizer"]["name"])
    if tokenizer.sha256 != metadata["tokenizer"]["sha256"]:
        raise ValueError(
            f"{folder} was made with another vocabulary of the name {tokenizer.name}: "
            f"run python prepare_data.py again, with the same flags"
        )
    for name in metadata["splits"]:
        _verify_split(folder, name, metadata)
    sources = _sources(folder, metadata)
    if not sources or not _is_unchanged(folder, metadata, sources):
        print("the source is missing or has changed since: nothing was compared with it")
        return
    compare = _compare_documents if metadata["eot_per_document"] else _compare_text
    compared = compare(folder, metadata, tokenizer, sources)
    print(f"{compared} compared with the source: the same")


def _remedy(path: Path) -> str:
    return f"remove {path} and run python prepare_data.py again, with the same flags"


def _verify_split(folder: Path, name: str, metadata: dict) -> None:
    split = metadata["splits"][name]
    shards, _ = open_tokens(folder / name)
    num_ends = 0
    for file, ids in zip(split["files"], shards):
        path = folder / file["name"]
        digest = hashlib.sha256()
        largest = 0
        for block in blocks([ids]):
            digest.update(block.tobytes())
            largest = max(largest, int(block.max()))
            num_ends += np.count_nonzero(block == metadata["eot_token"])
        if digest.hexdigest() != file["sha256"]:
            raise ValueError(f"{path}: its sha256 differs from metadata.json: {_remedy(path)}")
        if largest >= metadata["vocab_size"]:
            raise ValueError(
                f"{path}: id {largest} is outside the vocabulary of {metadata['vocab_size']:,}: "
                f"{_remedy(path)}"
            )
    if num_ends != split["documents"] * metadata["eot_per_document"]:
        raise ValueError(
            f"{folder} {name}: {num_ends:,} end-of-text tokens for {split['documents']:,} "
            f"documents: {_remedy(folder / split['files'][0]['name'])}"
        )
    print(f"{name:5} {split['tokens']:>14,} tokens: checksums and ids are right")


def _sources(folder: Path, metadata: dict) -> list[Source]:
    """Return the sources that metadata.json lists."""
    try:
        needed = FINGERPRINTED if "fingerprint" in metadata else ("source",)
        if all(name in metadata for name in needed):
            return [_source(folder, file) for file in metadata["source"].get("files", [])]
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError(
        f"{folder / 'metadata.json'} is damaged: run python prepare_data.py again, with the flags "
        f"it was made with"
    )


def _source(folder: Path, file: dict) -> Source:
    """A source that metadata.json lists; TypeError or KeyError if it is invalid."""
    values = {name: file[name] for name in ("format", "field", "split")}
    values["division"] = file["documents"]
    sound = (
        values["format"] in FORMATS
        and values["division"] in DIVISIONS
        and all(type(value) is str for value in (file["path"], *values.values()))
        and type(file["number"]) is int
        and file["number"] >= 0
    )
    if not sound:
        raise TypeError(f"not a source: {file}")
    return Source(str(source_path(folder, file)), **values, number=file["number"])


def _is_unchanged(folder: Path, metadata: dict, sources: list[Source]) -> bool:
    """Whether the sources are as they were when the corpus was prepared."""
    try:
        if "fingerprint" in metadata:
            return fingerprint(metadata, folder) == metadata["fingerprint"]
        # an older corpus: the sizes are all that is known
        files = metadata["source"]["files"]
        paths = [Path(source.path) for source in sources]
        return all(p.is_file() and p.stat().st_size == f["bytes"] for p, f in zip(paths, files))
    except OSError:
        return False


def _difference(folder: Path, what: str, place: str) -> ValueError:
    return ValueError(
        f"{folder}: {what} differs from the source, {place}: one of them was changed; run python "
        f"prepare_data.py again"
    )


def _compare_text(folder, metadata, tokenizer: Tokenizer, sources) -> str:
    """Compare a running text, as bytes; as ids if the tokenizer may change the text."""
    decode = tokenizer.lossless
    expected = hashlib.sha256()
    for source in split_text(sources, metadata["train_split_ratio"], tokenizer):
        for text in itertools.chain.from_iterable(texts for _, texts in read(source)):
            if isinstance(text, InvalidDocument):
                raise _difference(folder, "the text", text.place)
            expected.update(text.encode() if decode else tokenizer.encode(text).tobytes())
    found = hashlib.sha256()
    for name in metadata["splits"]:
        for ids in blocks(open_tokens(folder / name)[0]):
            found.update(tokenizer.decode_bytes(ids) if decode else ids.astype(np.uint32).tobytes())
    if found.digest() != expected.digest():
        raise _difference(folder, "the text", ", ".join(source.path for source in sources))
    return "the whole text was decoded and" if decode else "the whole text was"


def _compare_documents(folder, metadata, tokenizer: Tokenizer, sources) -> str:
    """Compare every n-th document of each split, and their numbers."""
    splits = metadata["splits"]
    num_documents = sum(split["documents"] for split in splits.values())
    step = max(1, num_documents // NUM_COMPARED)
    prepared = {
        name: _documents(open_tokens(folder / name)[0], metadata["eot_token"]) for name in splits
    }
    seen: Counter[str] = Counter()
    compared = 0
    for source in sources:
        for text, name in _texts_with_splits(metadata, source):
            if isinstance(text, InvalidDocument):
                continue  # it was skipped
            if metadata.get("skipped") and not tokenizer.can_encode(text):
                continue
            ids = next(prepared.get(name, iter(())), None)
            seen[name] += 1
            if ids is not None and seen[name] % step:
                continue
            compared += 1
            expected = tokenizer.encode(text)[: metadata["max_length"] or None]
            if ids is None or not np.array_equal(ids, expected):
                raise _difference(folder, f"document {seen[name]} of {name}", source.path)
    for name, rest in prepared.items():
        if next(rest, None) is not None:
            raise _difference(folder, f"the number of documents of {name}", sources[0].path)
    return f"{compared:,} of {sum(seen.values()):,} documents were"


def _texts_with_splits(metadata, source: Source) -> Iterator[tuple]:
    """Yield (text, name of its split) of every document of a source."""
    for positions, texts in read(source):
        masks = assign_split(source, positions, metadata["train_split_ratio"], metadata["seed"])
        for name, mask in masks.items():
            for text in itertools.compress(texts, mask):
                yield text, name


def _documents(shards, eot_token: int) -> Iterator[np.ndarray]:
    """Yield the ids of one document after another, without end-of-text tokens."""
    rest = np.empty(0, np.uint32)
    for block in blocks(shards):
        block = np.concatenate([rest, block])
        ends = np.flatnonzero(block == eot_token) + 1
        for document in np.split(block, ends)[:-1]:
            yield document[:-1]
        rest = block[ends[-1] :] if len(ends) else block
