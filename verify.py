"""Is a prepared corpus what it says it is? (python prepare_data.py --verify CORPUS)"""

import hashlib
import itertools
from pathlib import Path

import numpy as np

from pieces import Job
from reader import BLOCK, Bad, Source, read
from tokenizer import get_tokenizer

SAMPLE = 1000  # documents that are compared with the source, about


def verify(folder: Path) -> None:
    """Reads every file of `folder`: checksums, ids, the number of documents; then decodes a sample
    of its documents and compares it with the source, where that is still there.

    Raises ValueError that names the file and what to do.
    """
    from dataset import open_tokens, read_metadata  # imported here: only this needs torch

    metadata = read_metadata(folder)
    again = "run python prepare_data.py again, with the flags it was made with"
    tokenizer = get_tokenizer(metadata["tokenizer"]["name"])
    if tokenizer.sha256 != metadata["tokenizer"]["sha256"]:
        raise ValueError(f"{folder} was made with another vocabulary of {tokenizer.name}: {again}")
    for name, split in metadata["splits"].items():
        shards, ends = open_tokens(folder / name)[0], 0
        for file, ids in zip(split["files"], shards):
            digest = hashlib.sha256()
            for start in range(0, len(ids), BLOCK):
                block = ids[start : start + BLOCK]
                digest.update(block.tobytes())
                if block.max() >= metadata["vocab_size"]:
                    raise ValueError(
                        f"{folder / file['name']}: id {block.max()} lies beyond the vocabulary of "
                        f"{metadata['vocab_size']:,}: {again}"
                    )
                ends += np.count_nonzero(block == metadata["eot_token"])
            if digest.hexdigest() != file["sha256"]:
                raise ValueError(f"{folder / file['name']}: its sha256 is another: {again}")
        if ends != split["documents"] * metadata["eot_per_document"]:
            raise ValueError(f"{folder} {name}: {ends:,} ends of text: {again}")
        print(f"{name:5} {split['tokens']:>14,} tokens: checksums and ids are right")
    sources = [
        Source(**{k: v for k, v in file.items() if k != "bytes"} | {"path": str(path)})
        for file in metadata["source"].get("files", [])
        if (path := folder / file["path"]).is_file() and path.stat().st_size == file["bytes"]
    ]
    if not sources or len(sources) < len(metadata["source"]["files"]):
        print("the source isn't there any more, so nothing was compared with it")
        return
    compare = _compare_documents if metadata["eot_per_document"] else _compare_text
    count = compare(folder, metadata, tokenizer, sources, open_tokens)
    print(f"{count} decoded and compared with the source: the same")


def _differs(folder, name, where):
    return ValueError(
        f"{folder}: {name} differs from its source at {where}: the source has changed, or the "
        f"files have; run python prepare_data.py again"
    )


def _compare_text(folder, metadata, tokenizer, sources, open_tokens) -> str:
    """All of a running text, as bytes."""
    digests = [hashlib.sha256(), hashlib.sha256()]
    for source in sources:
        for _, texts in read(source):
            digests[0].update("".join(texts).encode())
    for name in metadata["splits"]:
        for ids in open_tokens(folder / name)[0]:
            for start in range(0, len(ids), BLOCK):
                digests[1].update(tokenizer.decode_bytes(ids[start : start + BLOCK]))
    if digests[0].digest() != digests[1].digest():
        raise _differs(folder, "the text", "some place")
    return "the whole text was"


def _compare_documents(folder, metadata, tokenizer, sources, open_tokens) -> str:
    """Every n-th document of each split."""
    splits, eot = metadata["splits"], metadata["eot_token"]
    job = Job("", "", True, 0, metadata["train_split_ratio"], metadata["seed"], "skip")
    step = max(1, sum(split["documents"] for split in splits.values()) // SAMPLE)
    prepared = {name: _documents(open_tokens(folder / name)[0], eot) for name in splits}
    seen, compared = dict.fromkeys(splits, 0), 0
    for source in sources:
        documents = (zip(texts, job.splits_of(source, places)) for places, texts in read(source))
        for text, name in itertools.chain.from_iterable(documents):
            if isinstance(text, Bad):
                continue  # skipped when it was prepared, too
            ids = next(prepared[name], None)
            seen[name] += 1
            if ids is None or seen[name] % step == 0:
                compared += 1
                expected = tokenizer.encode(text)[: metadata["max_length"] or None]
                if ids is None or not np.array_equal(ids, expected):
                    raise _differs(folder, f"document {seen[name]} of {name}", source.path)
    return f"{compared:,} documents were"


def _documents(shards, eot):
    """The ids of one document after another, without the end of text."""
    rest = np.empty(0, np.uint32)
    for ids in shards:
        for start in range(0, len(ids), BLOCK):
            block = np.concatenate([rest, ids[start : start + BLOCK]])
            ends = np.flatnonzero(block == eot)
            yield from (part[:-1] for part in np.split(block, ends + 1)[:-1])
            rest = block[ends[-1] + 1 :] if len(ends) else block
