"""Shards: the .bin files of a corpus, joined from the files of its tasks."""

import hashlib
import json
import os
import re
from pathlib import Path

from common.files import atomic_write
from common.grouping import in_groups
from corpus.sources import BLOCK

SHARD_BYTES = 2 << 30  # of source text per shard; about a gigabyte of tokens
SPLITS = ("train", "val", "test")
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})(-\d+-of-\d+)?\.bin")


def join_shards(work: Path, counts: list[dict], task_bytes: list[int], run) -> dict:
    """Join the files of finished tasks to shards, which lie in `work` until they are published.

    Args:
        work: Folder of the finished tasks.
        counts: What tokenize_task returned for each task.
        task_bytes: Size of the source text of each task.
        run: Of an engine.

    Returns:
        Name of a split -> its entry in metadata.json: files (name, tokens, sha256), tokens,
        documents, bytes.
    """
    splits = {}
    joins = []
    for name in SPLITS:
        tasks = [i for i, task_counts in enumerate(counts) if name in task_counts["splits"]]
        if not tasks:
            continue
        split_counts = {i: counts[i]["splits"][name] for i in tasks}
        groups = in_groups(tasks, SHARD_BYTES, task_bytes.__getitem__)
        files = []
        for number, group in enumerate(groups):
            suffix = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
            file = f"{name}{suffix}.bin"
            files.append({"name": file, "tokens": sum(split_counts[i]["tokens"] for i in group)})
            paths = [str(work / f"{i:06}.{name}.bin") for i in group]
            joins.append((paths, str(work / file)))
        splits[name] = {"files": files}
        for field in ("tokens", "documents", "bytes"):
            splits[name][field] = sum(task_counts[field] for task_counts in split_counts.values())
    all_files = [file for split in splits.values() for file in split["files"]]
    for i, sha256 in run(join_files, joins):
        all_files[i]["sha256"] = sha256
    return splits


def join_files(paths: list[str], shard: str) -> str:
    """Write files, one after another, to `shard`; return its sha256."""
    digest = hashlib.sha256()
    with atomic_write(Path(shard), clean=False) as out:
        for path in paths:
            with open(path, "rb") as f:
                while block := f.read(BLOCK):
                    digest.update(block)
                    out.write(block)
    return digest.hexdigest()


def publish(work: Path, folder: Path, metadata: dict, skipped: list[str]) -> None:
    """Move the shards of `work` into the corpus's folder, in place of older ones.

    Until metadata.json is written, last, there is no prepared corpus.

    Raises:
        OSError: A file cannot be moved or written.
    """
    (folder / "metadata.json").unlink(missing_ok=True)
    for path in folder.glob("*.bin"):
        if SHARD_NAME.fullmatch(path.name):
            path.unlink()
    for split in metadata["splits"].values():
        for file in split["files"]:
            os.replace(work / file["name"], folder / file["name"])
    (folder / "skipped.txt").unlink(missing_ok=True)
    if skipped:
        with atomic_write(folder / "skipped.txt") as f:
            lines = "".join(f"{place}\n" for place in skipped)
            f.write(lines.encode(errors="surrogateescape"))
    with atomic_write(folder / "metadata.json") as f:
        f.write(json.dumps(metadata, indent=2).encode() + b"\n")
