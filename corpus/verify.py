"""Is a prepared corpus what it says it is? (python prepare_data.py --verify CORPUS)"""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np

from corpus.metadata import read_metadata
from corpus.planning import split_text
from corpus.reader import read
from corpus.sources import InvalidDocument, Source
from corpus.tasks import assign_split
from corpus.token_files import blocks, open_tokens
from corpus.tokenizer import get_tokenizer

FORMATS = "text", "jsonl", "parquet", "arrow"
DOCUMENTS = "", "line", "blank-line", "file", "article"
SAMPLE = 1000  # documents that are compared with the source, about


def verify(folder: Path) -> None:
    """Reads every file of `folder`: checksums, ids, the number of documents; then decodes a sample
    of its documents and compares it with the source, where that is still there.

    Raises ValueError that names the file and what to do.
    """
    metadata = read_metadata(folder)
    again = "remove its metadata.json and run python prepare_data.py again, with the same flags"
    tokenizer = get_tokenizer(metadata["tokenizer"]["name"])
    if tokenizer.sha256 != metadata["tokenizer"]["sha256"]:
        raise ValueError(f"{folder} was made with another vocabulary of {tokenizer.name}: {again}")
    for name, split in metadata["splits"].items():
        shards, ends = open_tokens(folder / name)[0], 0
        for file, ids in zip(split["files"], shards):
            digest, largest = hashlib.sha256(), 0
            for block in blocks([ids]):
                digest.update(block.tobytes())
                largest = max(largest, int(block.max()))
                ends += np.count_nonzero(block == metadata["eot_token"])
            if digest.hexdigest() != file["sha256"]:
                raise ValueError(f"{folder / file['name']}: its sha256 is another: {again}")
            if largest >= metadata["vocab_size"]:
                raise ValueError(
                    f"{folder / file['name']}: id {largest} lies beyond the vocabulary of "
                    f"{metadata['vocab_size']:,}: {again}"
                )
        if ends != split["documents"] * metadata["eot_per_document"]:
            raise ValueError(f"{folder} {name}: {ends:,} ends of text: {again}")
        print(f"{name:5} {split['tokens']:>14,} tokens: checksums and ids are right")
    files = metadata["source"].get("files", [])
    sources = [source for file in files if (source := _source(folder, file))]
    if not sources or len(sources) < len(files):
        print("the source isn't there any more, or has changed: nothing was compared with it")
        return
    compare = _compare_documents if metadata["eot_per_document"] else _compare_text
    count = compare(folder, metadata, tokenizer, sources)
    print(f"{count} compared with the source: the same")


def _source(folder, file) -> Source | None:
    """What metadata.json lists as a source, where it is still as it was."""
    try:
        path = folder / file["path"]
        names = [file[name] for name in ("format", "documents", "field", "split")]
        sound = names[0] in FORMATS and names[1] in DOCUMENTS and {*map(type, names)} == {str}
        if sound and type(file["number"]) is int and file["number"] >= 0:
            there = path.is_file() and path.stat().st_size == file["bytes"]
            return Source(str(path), *names, file["number"]) if there else None
    except (KeyError, TypeError):
        pass
    raise ValueError(f"{folder / 'metadata.json'} is damaged: one of its sources is none")


def _differs(folder, name, where):
    return ValueError(
        f"{folder}: {name} differs from its source in {where}: one of them has changed since; run "
        f"python prepare_data.py again"
    )


def _compare_text(folder, metadata, tokenizer, sources) -> str:
    """All of a running text, as bytes; as ids where a tokenizer may change the text."""
    decode = tokenizer.lossless
    source_digest, digest = hashlib.sha256(), hashlib.sha256()
    for source in split_text(sources, metadata["train_split_ratio"], tokenizer):
        for text in itertools.chain.from_iterable(texts for _, texts in read(source)):
            if isinstance(text, InvalidDocument):
                raise _differs(folder, "the text", text.place)
            source_digest.update(text.encode() if decode else tokenizer.encode(text).tobytes())
    for name in metadata["splits"]:
        for ids in blocks(open_tokens(folder / name)[0]):
            ids = tokenizer.decode_bytes(ids) if decode else ids.astype(np.uint32).tobytes()
            digest.update(ids)
    if digest.digest() != source_digest.digest():
        raise _differs(folder, "the text", ", ".join(source.path for source in sources))
    return "the whole text was decoded and" if decode else "the whole text was"


def _compare_documents(folder, metadata, tokenizer, sources) -> str:
    """Every n-th document of each split."""
    splits, eot = metadata["splits"], metadata["eot_token"]
    step = max(1, sum(split["documents"] for split in splits.values()) // SAMPLE)
    prepared = {name: _documents(open_tokens(folder / name)[0], eot) for name in splits}
    seen, compared = Counter(), 0
    for source in sources:
        for text, name in _split_of_each(metadata, source):
            if isinstance(text, InvalidDocument):
                continue  # skipped when it was prepared, too
            if metadata.get("skipped") and not tokenizer.can_encode(text):
                continue
            ids = next(prepared.get(name, iter(())), None)
            seen[name] += 1
            if ids is None or seen[name] % step == 0:
                compared += 1
                expected = tokenizer.encode(text)[: metadata["max_length"] or None]
                if ids is None or not np.array_equal(ids, expected):
                    raise _differs(folder, f"document {seen[name]} of {name}", source.path)
    for name, rest in prepared.items():
        if next(rest, None) is not None:
            raise _differs(folder, f"the number of documents of {name}", sources[0].path)
    return f"{compared:,} of {sum(seen.values()):,} documents were"


def _split_of_each(metadata, source):
    """(text, name of its split) of every document."""
    for positions, texts in read(source):
        split = assign_split(source, positions, metadata["train_split_ratio"], metadata["seed"])
        for name, own in split.items():
            yield from ((text, name) for text in itertools.compress(texts, own))


def _documents(shards, eot):
    """The ids of one document after another, without the end of text."""
    rest = np.empty(0, np.uint32)
    for block in blocks(shards):
        block = np.concatenate([rest, block])
        ends = np.flatnonzero(block == eot)
        yield from (part[:-1] for part in np.split(block, ends + 1)[:-1])
        rest = block[ends[-1] + 1 :] if len(ends) else block
