"""A corpus to data/CORPUS/: what is left to do of it, its shards and metadata.json.

with engine("processes") as run:
    metadata = prepare(corpus, tokenizer, Path("data/mine"), run)
"""

import hashlib
import json
import os
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from common.files import atomic_write, read_json
from corpus.inputs import Corpus
from corpus.metadata import read_metadata, sealed
from corpus.planning import check_room, in_groups, plan
from corpus.tasks import Job, join_pieces, tokenize_task
from corpus.token_files import open_tokens
from corpus.work import read_accounts, working_folder

PIECE_BYTES = 1 << 20, 64 << 20  # of source, that one task reads: the least and the most
SHARD_BYTES = 2 << 30  # of source; about a gigabyte of tokens
SPLITS = ("train", "val", "test")


def prepare(
    corpus: Corpus, tokenizer, folder: Path, run, train_split_ratio=0.9, seed=0, max_length=0,
    on_error="stop", part="",
) -> dict | None:  # fmt: skip
    """Tokenizes `corpus` into `folder`; returns its metadata, or None where others go on.

    run: of pieces.engine. part: "I/N" does every N-th piece only. Finished pieces are kept in
    folder/.work, and the next call goes on from there. Raises ValueError where a document is none
    or a split would be empty, OSError where another process prepares the same corpus, it was
    prepared from other files, or the disk hasn't room.
    """
    began, work = time.perf_counter(), folder / ".work"
    header = {
        "format_version": 1,
        "corpus": corpus.name,
        "source": corpus.origin | {"files": [_listed(source, folder) for source in corpus.sources]},
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "vocab_size": tokenizer.vocab_size,
        "eot_token": tokenizer.eot_token,
        "eot_per_document": corpus.documents,
        "dtype": tokenizer.dtype.name,
        "train_split_ratio": train_split_ratio,
        "seed": seed,
        "max_length": max_length,
    }
    _refuse_others(folder, header["source"])
    changed = _times(corpus)
    if not work.exists() and (metadata := _finished(folder, header, changed)):
        return metadata
    pieces = plan(corpus, tokenizer, train_split_ratio, *PIECE_BYTES)
    check_room(folder, tokenizer, pieces)
    spans = [[(part.start, part.stop) for part in parts] for parts, _ in pieces]
    key = hashlib.sha256(json.dumps([header, changed, spans]).encode()).hexdigest()
    job = Job(
        str(work), tokenizer.name, corpus.documents, max_length, train_split_ratio, seed, on_error
    )
    with working_folder(work, key, len(pieces), shared=bool(part)) as alone:
        # by another part in the meantime, or by a call that was killed before it had cleaned up
        if metadata := _finished(folder, header, changed):
            return metadata
        start, step = map(int, part.split("/")) if part else (0, 1)
        done = read_accounts(work, len(pieces), on_error)
        if done:
            print(f"going on: {len(done):,} of {len(pieces):,} pieces were done before")
        _tokenize(job, pieces, [i for i in range(start, len(pieces), step) if i not in done], run)
        if changed != _times(corpus):
            raise ValueError(f"the text of {corpus.name} has changed meanwhile: run this again")
        if part and not alone():
            return print(f"part {part} is done; the last one that is still at work joins them")
        done = read_accounts(work, len(pieces), on_error)
        if len(done) < len(pieces):
            return print(f"part {part} is done; {len(pieces) - len(done):,} pieces are left")
        accounts = [done[i] for i in range(len(pieces))]
        skipped = [place for account in accounts for place in account["skipped"]]
        splits = _join(work, accounts, [size for _, size in pieces], run)
        _refuse_too_little(corpus, splits, skipped)
        for split in splits.values():
            split["documents"] = split["documents"] if corpus.documents else 1
        counts = {"dropped": sum(account["dropped"] for account in accounts)}
        metadata = sealed(header | counts | {"skipped": len(skipped), "splits": splits})
        _publish(work, folder, metadata, skipped)
    _report(folder, metadata, skipped, accounts, time.perf_counter() - began)
    return metadata


def _tokenize(job, pieces, todo, run) -> None:
    """Shows share done, time left, MB/s, tokens/s; on a terminal, or, as in Slurm's output, a line
    a minute."""
    every, tokens = 0.2 if sys.stderr.isatty() else 60, 0  # seconds
    total = sum(pieces[i][1] for i in todo)
    with tqdm(
        total=total, unit="B", unit_scale=True, mininterval=every, delay=every, leave=False
    ) as line:
        for i, account in run(tokenize_task, [(job, i, pieces[i][0]) for i in todo]):
            tokens += sum(split["tokens"] for split in account["splits"].values())
            speed = tokens / max(1e-9, time.time() - line.start_t)
            line.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            line.update(pieces[todo[i]][1])


def _refuse_too_little(corpus, splits, skipped) -> None:
    """Raises ValueError where nothing is left for training or validation."""
    for name in ("train", "val"):
        if not splits.get(name, {}).get("tokens"):
            count = sum(split["documents"] for split in splits.values())
            why = f"{count} documents" if corpus.documents else "running text"
            why += f", {len(skipped):,} skipped, first {skipped[0]}" if skipped else ""
            raise ValueError(
                f"{corpus.name} has too little text ({why}): nothing is left for {name}"
            )


def _times(corpus) -> list[int]:
    """When each source was last changed."""
    return [os.stat(source.path).st_mtime_ns for source in corpus.sources]


def _listed(source, folder):
    """A source for metadata.json: relative to the corpus's folder, with its size."""
    path = os.path.relpath(source.path, folder)
    return asdict(replace(source, path=path)) | {"bytes": os.path.getsize(source.path)}


def _refuse_others(folder, source) -> None:
    """Raises FileExistsError where `folder` holds a corpus of none of these files."""
    try:
        old = read_json(folder / "metadata.json")["source"]
        was, now = ({file["path"] for file in of["files"]} for of in (old, source))
        same = was & now or not was or (old.get("url") and old["url"] == source.get("url"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # none, or a damaged one
    if not same:
        raise FileExistsError(
            f"{folder} was made of other files ({min(was)}): choose another --corpus NAME, or "
            f"remove its metadata.json"
        )


def _finished(folder, header, changed):
    """The metadata of a corpus that is as it would become, from sources that are no newer."""
    path = folder / "metadata.json"
    try:
        metadata = read_metadata(folder)
        for name in metadata["splits"]:
            open_tokens(folder / name)  # of the right length
        same = all(metadata.get(name) == value for name, value in header.items())
        if not (same and max(changed) < path.stat().st_mtime_ns):
            return None
    except (OSError, ValueError):
        return None  # none, or a damaged one
    os.utime(path)  # train_gpt2.py takes the corpus prepared last
    print(f"{folder} is prepared already, from the same files in the same way")
    return metadata


def _join(work, accounts, sizes, run) -> dict:
    """Joins pieces to shards in `work`; returns the splits for metadata.json."""
    splits, tasks = {}, []
    for name in SPLITS:
        numbers = [i for i, account in enumerate(accounts) if name in account["splits"]]
        own = {i: accounts[i]["splits"][name] for i in numbers}
        shards = in_groups(numbers, SHARD_BYTES, sizes.__getitem__)
        files = []
        for number, shard in enumerate(shards):
            of = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            file = {"name": f"{name}{of}.bin", "tokens": sum(own[i]["tokens"] for i in shard)}
            files.append(file)
            paths = [str(work / f"{i:06}.{name}.bin") for i in shard]
            tasks.append((paths, str(work / file["name"])))
        if files:
            fields = ("tokens", "documents", "bytes")
            totals = {field: sum(of[field] for of in own.values()) for field in fields}
            splits[name] = {"files": files} | totals
    files = [file for split in splits.values() for file in split["files"]]
    for i, sha256 in run(join_pieces, tasks):
        files[i]["sha256"] = sha256
    return splits


def _publish(work, folder, metadata, skipped) -> None:
    """Puts the shards where they belong; until metadata.json is there, last, nothing is."""
    (folder / "metadata.json").unlink(missing_ok=True)
    names = [file["name"] for split in metadata["splits"].values() for file in split["files"]]
    for old in folder.glob("*.bin"):
        if re.fullmatch(rf"({'|'.join(SPLITS)})(-\d+-of-\d+)?\.bin", old.name):
            old.unlink()
    for name in names:
        os.replace(work / name, folder / name)
    (folder / "skipped.txt").unlink(missing_ok=True)
    if skipped:
        with atomic_write(folder / "skipped.txt") as f:
            f.write("".join(f"{place}\n" for place in skipped).encode(errors="surrogateescape"))
    with atomic_write(folder / "metadata.json") as f:
        f.write(json.dumps(metadata, indent=2).encode() + b"\n")


def _report(folder, metadata, skipped, accounts, seconds) -> None:
    """The account of what was read and what became of it."""
    for place in skipped[:10]:
        print(f"skipped: {place}")
    if len(skipped) > 10:
        print(f"skipped: {len(skipped) - 10:,} more, in {folder / 'skipped.txt'}")
    for name, split in metadata["splits"].items():
        line = f"{name:5} {split['tokens']:>14,} tokens {split['bytes']:>14,} bytes of text"
        documents = f" {split['documents']:>12,} documents" if metadata["eot_per_document"] else ""
        print(line + documents)
    if metadata["dropped"] or skipped:
        print(
            f"left out: {metadata['dropped']:,} tokens beyond max_length, "
            f"{len(skipped):,} documents skipped"
        )
    size = sum(split["bytes"] for split in metadata["splits"].values())
    speed = size / 1e6 / max(1e-9, sum(account["seconds"] for account in accounts))
    where = "" if folder.parent == Path("data") else f" --data_dir {folder.parent}"
    print(
        f"{folder}: done in {seconds:.1f} s, {speed:.1f} MB/s per core. "
        f"Next: python train_gpt2.py{where}"
    )
