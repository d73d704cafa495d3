"""Shards: the .bin files of a corpus, joined from the files of its tasks."""

import hashlib
import json
import os
import re
from pathlib import Path

from common.files import atomic_write
from common.grouping import in_groups
from corpus.engines import RunTasks
from corpus.sources import BLOCK
from corpus.tasks import Task
from corpus.vocabulary_files import copy_beside_corpus

SHARD_BYTES = 2 << 30  # of source text per shard; about a gigabyte of tokens
SPLITS = ("train", "val", "test")
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})(-\d+-of-\d+)?\.bin")


def join_shards(
    tasks_dir: Path, tasks: list[Task], all_counts: list[dict], run_tasks: RunTasks
) -> dict:
    """Join the files of finished tasks to shards, which stay in `tasks_dir` until `publish`.

    Args:
        tasks_dir: Folder of the finished tasks.
        tasks: All tasks of the corpus.
        all_counts: Counts that tokenize_task returned for each task.
        run_tasks: Function that engines.open_engine yields.

    Returns:
        Split name -> entry of the split in metadata.json: files (name, tokens, sha256), tokens,
        documents, bytes.

    Raises:
        OSError: A file cannot be read or written.
    """
    splits = {}
    joins = []
    for split in SPLITS:
        split_counts = {
            i: counts["splits"][split]
            for i, counts in enumerate(all_counts)
            if split in counts["splits"]
        }
        if not split_counts:
            continue
        shard_tasks = in_groups(split_counts, SHARD_BYTES, lambda i: tasks[i].num_bytes)
        shards = []
        for shard_number, numbers in enumerate(shard_tasks):
            suffix = f"-{shard_number:05}-of-{len(shard_tasks):05}" if len(shard_tasks) > 1 else ""
            shard = {
                "name": f"{split}{suffix}.bin",
                "tokens": sum(split_counts[i]["tokens"] for i in numbers),
            }
            shards.append(shard)
            task_files = [str(tasks_dir / f"{i:06}.{split}.bin") for i in numbers]
            joins.append((task_files, str(tasks_dir / shard["name"])))
        splits[split] = {"files": shards}
        for field in ("tokens", "documents", "bytes"):
            splits[split][field] = sum(counts[field] for counts in split_counts.values())
    all_shards = [shard for split in splits.values() for shard in split["files"]]
    for i, sha256 in run_tasks(join_files, joins):
        all_shards[i]["sha256"] = sha256
    return splits


def join_files(paths: list[str], joined: str) -> str:
    """Write files, one after another, to one file.

    Args:
        paths: Files to read, in order.
        joined: File to write.

    Returns:
        The sha256 of the written file.

    Raises:
        OSError: A file cannot be read or written.
    """
    digest = hashlib.sha256()
    with atomic_write(Path(joined), clean=False) as out:
        for path in paths:
            with open(path, "rb") as f:
                while block := f.read(BLOCK):
                    digest.update(block)
                    out.write(block)
    return digest.hexdigest()


def publish(tasks_dir: Path, corpus_dir: Path, metadata: dict, skipped: list[str]) -> None:
    """Move shards into the corpus's folder, in place of older shards.

    metadata.json is removed first and written last: between these moments the corpus counts as not
    prepared.

    Args:
        tasks_dir: Folder in which join_shards left the shards.
        corpus_dir: Folder of the corpus, data/NAME.
        metadata: Content of metadata.json.
        skipped: Place and reason of each skipped document, for skipped.txt.

    Raises:
        OSError: A file cannot be moved or written.
    """
    (corpus_dir / "metadata.json").unlink(missing_ok=True)
    for path in corpus_dir.glob("*.bin"):
        if SHARD_NAME.fullmatch(path.name):
            path.unlink()
    for split in metadata["splits"].values():
        for shard in split["files"]:
            os.replace(tasks_dir / shard["name"], corpus_dir / shard["name"])
    copy_beside_corpus(metadata["tokenizer"]["name"], corpus_dir)
    (corpus_dir / "skipped.txt").unlink(missing_ok=True)
    if skipped:
        with atomic_write(corpus_dir / "skipped.txt") as f:
            lines = "".join(f"{document}\n" for document in skipped)
            f.write(lines.encode(errors="surrogateescape"))
    with atomic_write(corpus_dir / "metadata.json") as f:
        f.write(json.dumps(metadata, indent=2).encode() + b"\n")
