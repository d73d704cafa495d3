"""Verify a prepared corpus: python prepare_data.py --verify CORPUS."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
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
from corpus.sources import DIVISIONS, FORMATS, KEEPING_WHITE_SPACE, InvalidDocument, Source
from corpus.tasks import SPLIT_RULE, assign_split
from corpus.token_files import blocks, open_tokens
from corpus.tokenizer import Tokenizer
from corpus.vocabulary import tokenizer_of

NUM_COMPARED = 1000  # about the number of documents that are compared with the sources


def verify(corpus_dir: Path) -> None:
    """Check that a prepared corpus is as its metadata say, and print what was checked.

    1. Every shard: checksum, ids, number of end-of-text tokens.
    2. If the sources are unchanged: a sample of the documents, or the whole running text, is
       compared with the sources.

    Args:
        corpus_dir: Folder of the corpus, data/NAME.

    Raises:
        ValueError: The corpus differs from its metadata or sources, or a field of metadata.json is
            missing. The message names the file and the remedy.
        OSError: A file cannot be read.
    """
    metadata = read_metadata(corpus_dir)
    require_end_of_text(metadata, corpus_dir)
    tokenizer = tokenizer_of(metadata, corpus_dir)
    for split in metadata["splits"]:
        _verify_split(corpus_dir, split, metadata)
    sources = _read_sources(corpus_dir, metadata)
    if not sources or not _is_unchanged(corpus_dir, metadata, sources):
        print("the source is missing or has changed since: nothing was compared with it")
        return
    _require_fields(corpus_dir, metadata, ("train_split_ratio", "seed", "max_length"))
    compare = _compare_documents if metadata["eot_per_document"] else _compare_text
    compared = compare(corpus_dir, metadata, tokenizer, sources)
    print(f"{compared} compared with the source: the same")


def _require_fields(corpus_dir: Path, entry: dict, names: Iterable[str], owner: str = "it") -> None:
    """Raise ValueError if an entry of metadata.json lacks a field.

    Args:
        corpus_dir: Folder of the corpus, data/NAME.
        entry: The metadata, or a part of them.
        names: Names of the fields.
        owner: Name of the entry in the error message.
    """
    for name in names:
        if name not in entry:
            raise _damaged(corpus_dir, f"{owner} has no {name}")


def _damaged(corpus_dir: Path, reason: str) -> ValueError:
    """Return the error of a damaged metadata.json."""
    return ValueError(
        f"{corpus_dir / 'metadata.json'} is damaged: {reason}; run python prepare_data.py again, "
        f"with the flags it was made with"
    )


def _remedy(path: Path) -> str:
    return f"remove {path} and run python prepare_data.py again, with the same flags"


def _verify_split(corpus_dir: Path, split: str, metadata: dict) -> None:
    """Check the shards of a split."""
    entry = metadata["splits"][split]
    _require_fields(corpus_dir, entry, ["documents"], f"split {split}")
    shards, _ = open_tokens(corpus_dir / split)
    num_ends = 0
    for file, ids in zip(entry["files"], shards):
        _require_fields(corpus_dir, file, ["sha256"], file["name"])
        path = corpus_dir / file["name"]
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
    if num_ends != entry["documents"] * metadata["eot_per_document"]:
        raise ValueError(
            f"{corpus_dir} {split}: {num_ends:,} end-of-text tokens for {entry['documents']:,} "
            f"documents: {_remedy(corpus_dir / entry['files'][0]['name'])}"
        )
    print(f"{split:5} {entry['tokens']:>14,} tokens: checksums and ids are right")


def _read_sources(corpus_dir: Path, metadata: dict) -> list[Source]:
    """Return the sources that metadata.json lists."""
    required = FINGERPRINTED if "fingerprint" in metadata else ("source",)
    _require_fields(corpus_dir, metadata, required)
    if metadata.get("split_rule", SPLIT_RULE) != SPLIT_RULE:
        raise _damaged(corpus_dir, f"split_rule {metadata['split_rule']!r} is unknown")
    try:
        return [
            _read_source(corpus_dir, file, has_names="split_rule" in metadata)
            for file in metadata["source"].get("files", [])
        ]
    except (TypeError, AttributeError):
        raise _damaged(corpus_dir, "its list of source files is invalid") from None


def _read_source(corpus_dir: Path, file: dict, has_names: bool) -> Source:
    """Return a source that metadata.json lists, or raise TypeError if its entry is invalid."""
    names = ("path", "format", "documents", "field", "split", "number")
    _require_fields(corpus_dir, file, names, "a source file")
    if has_names and not file["split"]:
        _require_fields(corpus_dir, file, ["name"], "a source file")
    values = {name: file[name] for name in ("format", "field", "split")}
    values["division"] = file["documents"]
    valid = (
        values["format"] in FORMATS
        and values["division"] in DIVISIONS
        and all(type(value) is str for value in (file["path"], *values.values()))
        and type(file["number"]) is int
        and file["number"] >= 0
        and type(file.get("name", "")) is str
        and type(file.get("start", 0)) is int
        and file.get("start", 0) >= 0
    )
    if not valid:
        raise TypeError(f"not a source: {file}")
    path = str(source_path(corpus_dir, file))
    start = file.get("start", 0)
    return Source(path, **values, number=file["number"], start=start, name=file.get("name", ""))


def _is_unchanged(corpus_dir: Path, metadata: dict, sources: list[Source]) -> bool:
    """Return whether the sources are as they were when the corpus was prepared."""
    try:
        if "fingerprint" in metadata:
            return fingerprint(metadata, corpus_dir) == metadata["fingerprint"]
        # metadata of an older version have the sizes of the files only
        for source, file in zip(sources, metadata["source"]["files"]):
            _require_fields(corpus_dir, file, ["bytes"], "a source file")
            path = Path(source.path)
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                return False
        return True
    except OSError:
        return False


def _difference(corpus_dir: Path, subject: str, place: str) -> ValueError:
    """Return the error of a corpus that differs from its sources."""
    return ValueError(
        f"{corpus_dir}: {subject} differs from the source, {place}: one of them was changed; run "
        f"python prepare_data.py again"
    )


def _compare_text(
    corpus_dir: Path, metadata: dict, tokenizer: Tokenizer, sources: list[Source]
) -> str:
    """Compare a running text: as bytes, or as ids if the tokenizer may change the text."""
    decode = tokenizer.lossless
    expected = {split: hashlib.sha256() for split in metadata["splits"]}
    for source in split_text(sources, metadata["train_split_ratio"], tokenizer):
        for text in itertools.chain.from_iterable(texts for _, texts in read(source)):
            if isinstance(text, InvalidDocument):
                raise _difference(corpus_dir, "the text", text.place)
            data = text.encode() if decode else tokenizer.encode(text).tobytes()
            expected.setdefault(source.split, hashlib.sha256()).update(data)
    for split, digest in expected.items():
        found = hashlib.sha256()
        for ids in (
            blocks(open_tokens(corpus_dir / split)[0]) if split in metadata["splits"] else ()
        ):
            found.update(tokenizer.decode_bytes(ids) if decode else ids.astype(np.uint32).tobytes())
        if found.digest() != digest.digest():
            raise _difference(corpus_dir, "the text", ", ".join(s.path for s in sources))
    return "the whole text was decoded and" if decode else "the whole text was"


def _compare_documents(
    corpus_dir: Path, metadata: dict, tokenizer: Tokenizer, sources: list[Source]
) -> str:
    """Compare every n-th document of each split, and the number of documents."""
    splits = metadata["splits"]
    num_documents = sum(entry["documents"] for entry in splits.values())
    step = max(1, num_documents // NUM_COMPARED)
    prepared = {
        split: _ids_of_documents(open_tokens(corpus_dir / split)[0], metadata["eot_token"])
        for split in splits
    }
    stripped = _numbers_of_stripped_sources(metadata)
    num_seen: Counter[str] = Counter()
    num_compared = 0
    for source in sources:
        for text, split in _texts_with_splits(metadata, source):
            if isinstance(text, InvalidDocument):
                continue  # it was skipped
            if metadata.get("skipped") and not tokenizer.can_encode(text):
                continue
            if source.number in stripped:
                text = text.strip()
            ids = next(prepared.get(split, iter(())), None)
            num_seen[split] += 1
            if ids is not None and num_seen[split] % step:
                continue
            num_compared += 1
            expected = tokenizer.encode(text)[: metadata["max_length"] or None]
            if ids is None or not np.array_equal(ids, expected):
                raise _difference(corpus_dir, f"document {num_seen[split]} of {split}", source.path)
    for split, unseen in prepared.items():
        if next(unseen, None) is not None:
            raise _difference(corpus_dir, f"the number of documents of {split}", sources[0].path)
    return f"{num_compared:,} of {sum(num_seen.values()):,} documents were"


def _numbers_of_stripped_sources(metadata: dict) -> set[int]:
    """Return the numbers of the sources of an older corpus that lost white space on preparing."""
    return {
        file["number"]
        for file in metadata["source"]["files"]
        if file["documents"] in KEEPING_WHITE_SPACE and "white_space" not in file
    }


def _texts_with_splits(
    metadata: dict, source: Source
) -> Iterator[tuple[str | InvalidDocument, str]]:
    """Yield (text, name of its split) of every document of a source."""
    for positions, texts in read(source):
        masks = assign_split(source, positions, metadata["train_split_ratio"], metadata["seed"])
        for split, mask in masks.items():
            for text in itertools.compress(texts, mask):
                yield text, split


def _ids_of_documents(shards: Iterable[np.ndarray], eot_token: int) -> Iterator[np.ndarray]:
    """Yield the ids of one document after another, without end-of-text tokens."""
    incomplete = np.empty(0, np.uint32)  # ids of a document that ends in the next block
    for block in blocks(shards):
        block = np.concatenate([incomplete, block])
        ends = np.flatnonzero(block == eot_token) + 1
        for document in np.split(block, ends)[:-1]:
            yield document[:-1]
        incomplete = block[ends[-1] :] if len(ends) else block
