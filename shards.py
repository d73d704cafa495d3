"""A corpus to data/CORPUS/: its plan, what is left to do of it, shards and metadata.json.

with engine("processes") as run:
    metadata = prepare(corpus, tokenizer, Path("data/mine"), run)
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import atomic_write, fcntl, lock, read_json
from corpora import Corpus
from pieces import Job, join_pieces, tokenize_piece
from reader import cut
from source import BLOCK, Source, damage, open_file
from tokens import open_tokens, read_metadata, sealed

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
    pieces = plan(corpus, train_split_ratio, tokenizer)
    _check_room(folder, tokenizer, pieces)
    key = hashlib.sha256(json.dumps([header, changed]).encode()).hexdigest()
    job = Job(
        str(work), tokenizer.name, corpus.documents, max_length, train_split_ratio, seed, on_error
    )
    with _working_folder(work, key, len(pieces), shared=bool(part)) as alone:
        # by another part in the meantime, or by a call that was killed before it had cleaned up
        if metadata := _finished(folder, header, changed):
            return metadata
        start, step = map(int, part.split("/")) if part else (0, 1)
        done = _accounts(work, len(pieces), on_error)
        todo = [i for i in range(start, len(pieces), step) if i not in done]
        if done:
            print(f"going on: {len(done):,} of {len(pieces):,} pieces were done before")
        with _live_line(sum(pieces[i][1] for i in todo)) as line:
            tokens = 0
            for i, account in run(tokenize_piece, [(job, i, pieces[i][0]) for i in todo]):
                tokens += sum(split["tokens"] for split in account["splits"].values())
                speed = tokens / max(1e-9, time.time() - line.start_t)
                line.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                line.update(pieces[todo[i]][1])
        if changed != _times(corpus):
            raise ValueError(f"the text of {corpus.name} has changed meanwhile: run this again")
        if part and not alone():
            return print(f"part {part} is done; the last one that is still at work joins them")
        done = _accounts(work, len(pieces), on_error)
        if len(done) < len(pieces):
            return print(f"part {part} is done; {len(pieces) - len(done):,} pieces are left")
        accounts = [done[i] for i in range(len(pieces))]
        splits = _join(work, accounts, [size for _, size in pieces], run)
        skipped = [place for account in accounts for place in account["skipped"]]
        for name in ("train", "val"):
            if not splits.get(name, {}).get("tokens"):
                count = sum(split["documents"] for split in splits.values())
                why = f"{count} documents" if corpus.documents else "running text"
                why += f", {len(skipped):,} skipped, first {skipped[0]}" if skipped else ""
                raise ValueError(
                    f"{corpus.name} has too little text ({why}): nothing is left for {name}"
                )
        for split in splits.values():
            split["documents"] = split["documents"] if corpus.documents else 1
        counts = {"dropped": sum(account["dropped"] for account in accounts)}
        metadata = sealed(header | counts | {"skipped": len(skipped), "splits": splits})
        _publish(work, folder, metadata, skipped)
    _report(folder, metadata, skipped, accounts, time.perf_counter() - began)
    return metadata


def _times(corpus) -> list[int]:
    """When each source was last changed."""
    return [os.stat(source.path).st_mtime_ns for source in corpus.sources]


def _live_line(total: int) -> tqdm:
    """Share done, time left, MB/s; on a terminal, or, as in Slurm's output, a line a minute."""
    every = 0.2 if sys.stderr.isatty() else 60  # seconds
    return tqdm(total=total, unit="B", unit_scale=True, mininterval=every, delay=every, leave=False)


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


def plan(corpus: Corpus, train_split_ratio: float, tokenizer) -> list[tuple[list[Source], int]]:
    """(parts of sources, their bytes) of each piece, in the corpus's order."""
    sources = corpus.sources
    size = sum(os.path.getsize(source.path) for source in sources) // 64  # enough for every core
    least, most = PIECE_BYTES
    piece_bytes = min(max(size, least), most)
    if not corpus.documents:
        sources = split_text(sources, train_split_ratio)
        if not tokenizer.divisible:
            sources = [replace(source, documents="file") for source in sources]
    pieces = []
    for source in sources:
        for part, size in cut(source, piece_bytes):
            if not pieces or pieces[-1][1] + size > piece_bytes:
                pieces.append(([], 0))
            parts, filled = pieces[-1]
            pieces[-1] = ([*parts, part], filled + size)
    return pieces


def split_text(sources, train_split_ratio):
    """A running text is cut once, by character: int(n * train_split_ratio) of all n train."""
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


def _check_room(folder, tokenizer, pieces) -> None:
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


@contextlib.contextmanager
def _working_folder(work: Path, key: str, count: int, shared: bool):
    """The folder of finished pieces, locked, so that no two processes prepare one corpus unless
    each does a part (shared). Pieces of another plan (key) are thrown away. Yields alone(), which
    is true once no other part is at work. On leaving, the folder goes, unless there are pieces left
    to do and an error or another part stands in the way."""
    if work.is_symlink():  # in a stranger's folder; it is emptied at the end
        raise ValueError(f"{work} is a link: remove it")
    work.mkdir(parents=True, exist_ok=True)
    with _lock(work / "lock", shared) as (alone, share):
        told = work / "key"
        if not told.exists() or told.read_text() != key:
            if not alone():
                raise OSError(f"{work.parent} is being prepared by others, with other flags")
            if told.exists() and (done := len(list(work.glob("*.json")))):
                print(f"{done:,} finished pieces are of other files or flags: they are thrown away")
            for path in work.iterdir():
                if path.name != "lock":
                    path.unlink()
            with atomic_write(told) as f:
                f.write(key.encode())
        if shared:
            share()  # whoever came first lets the others in
        stopped = True
        try:
            yield alone
            stopped = False
        except ValueError:  # in what a piece holds, or in the whole
            stopped = False
            raise
        finally:
            done = len(list(work.glob("*.json")))
            if (done == 0 or (done == count and not stopped)) and alone():
                told.unlink(missing_ok=True)  # first: without it, what a kill leaves isn't trusted
                shutil.rmtree(work, ignore_errors=True)  # another part may have been quicker
                with contextlib.suppress(OSError):  # not empty: it stays
                    work.parent.rmdir()
                    work.parent.parent.rmdir()


@contextlib.contextmanager
def _lock(path: Path, shared: bool):
    """Yields alone(), which makes the lock exclusive where it can, and share(), the opposite.
    Raises BlockingIOError (OSError) where another has it."""
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "ab"))  # "w" would empty what a link leads to
            if not lock(file):
                if not shared:
                    raise BlockingIOError(
                        f"{path.parent.parent} is being prepared by another process: wait for it, "
                        f"or choose another --corpus NAME"
                    )
                fcntl.flock(file, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break  # else whoever had it has removed it since
            path.parent.mkdir(parents=True, exist_ok=True)
        yield lambda: lock(file), lambda: fcntl and fcntl.flock(file, fcntl.LOCK_SH)


def _accounts(work, count, on_error):
    """The accounts of finished pieces, by number; of pieces with skips only where that is asked."""
    accounts = {}
    for i in range(count):
        with contextlib.suppress(FileNotFoundError):
            account = json.loads((work / f"{i:06}.json").read_bytes())
            if on_error == "skip" or not account["skipped"]:
                accounts[i] = account
    return accounts


def _join(work, accounts, sizes, run) -> dict:
    """Joins pieces to shards in `work`; returns the splits for metadata.json."""
    splits, tasks, files = {}, [], []
    for name in SPLITS:
        shards, filled = [], 0
        for i, account in enumerate(accounts):
            if name in account["splits"]:
                if not shards or filled + sizes[i] > SHARD_BYTES:
                    shards, filled = [*shards, []], 0
                shards[-1].append(i)
                filled += sizes[i]
        if not shards:
            continue
        every = [accounts[i]["splits"][name] for shard in shards for i in shard]
        totals = {field: sum(e[field] for e in every) for field in ("tokens", "documents", "bytes")}
        splits[name] = {"files": []} | totals
        for number, shard in enumerate(shards):
            of = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            tokens = sum(accounts[i]["splits"][name]["tokens"] for i in shard)
            splits[name]["files"].append({"name": f"{name}{of}.bin", "tokens": tokens})
            files.append(splits[name]["files"][-1])
            paths = [str(work / f"{i:06}.{name}.bin") for i in shard]
            tasks.append((paths, str(work / files[-1]["name"])))
    for i, sha256 in run(join_pieces, tasks):
        files[i]["sha256"] = sha256
    return splits


def _publish(work, folder, metadata, skipped) -> None:
    """Puts the shards where they belong; until metadata.json is there, last, nothing is."""
    (folder / "metadata.json").unlink(missing_ok=True)
    names = [file["name"] for split in metadata["splits"].values() for file in split["files"]]
    for old in (path for split in SPLITS for path in folder.glob(f"{split}*.bin")):
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
