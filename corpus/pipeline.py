"""The pipeline: a corpus to data/NAME/, in steps that can be interrupted anywhere.

    with open_engine("processes") as run:
        metadata = prepare(corpus, tokenizer, Path("data/mine"), run)

1. fingerprint: sources, tokenizer and settings, in one hash. A corpus with this hash is up to date.
2. plan: which chunks of which sources make up each task (planning.py).
3. tokenize: tasks in any order, by any number of workers (tasks.py). Finished tasks are kept in
   data/NAME/.work/FINGERPRINT/, so that a restart skips them.
4. join: the files of all tasks to shards (shards.py).
5. publish: shards, and metadata.json last.

One process at a time does this for a corpus: it holds a lock. Parts of one corpus (--part I/N) do
step 3 without a lock; whoever then finds all tasks finished takes the lock for steps 4 and 5.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.files import exclusive_lock, read_json
from corpus.engines import Run
from corpus.inputs import Corpus
from corpus.metadata import fingerprint, read_metadata, with_checksum
from corpus.planning import check_room, plan
from corpus.shards import SHARD_NAME, join_shards, publish
from corpus.sources import Source
from corpus.tasks import Job, chunk_ids, tokenize_task
from corpus.token_files import open_tokens
from corpus.tokenizer import Tokenizer

TASK_BYTES = 1 << 20, 64 << 20  # least and most source text per task

Task = tuple[list[Source], int]  # chunks, and their size in bytes


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    run,
    *,
    train_split_ratio: float = 0.9,
    seed: int = 0,
    max_length: int = 0,
    on_error: str = "stop",
    part: str = "",
) -> dict | None:
    """Tokenize a corpus into a folder.

    Args:
        corpus: The sources.
        tokenizer: Turns text to ids.
        folder: data/NAME; created if it does not exist.
        run: Of an engine (engines.open_engine).
        train_split_ratio: Share for train, where the corpus is not split already.
        seed: Decides which documents go to train.
        max_length: Tokens kept of a document; 0 keeps all.
        on_error: "stop" or "skip", at an invalid document.
        part: "I/N" does every N-th task only, from the I-th.

    Returns:
        The metadata, or None if tasks are left to other parts.

    Raises:
        ValueError: A document is invalid, a split would be empty, or a source has changed
            meanwhile.
        OSError: Another process prepares this corpus, the folder holds other files, or the disk is
            too full.
    """
    began = time.perf_counter()
    header = {
        "format_version": 1,
        "corpus": corpus.name,
        "source": corpus.origin | {"files": [_listed(source, folder) for source in corpus.sources]},
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "vocab_size": tokenizer.vocab_size,
        "eot_token": tokenizer.eot_token,
        "eot_per_document": corpus.has_documents,
        "dtype": tokenizer.dtype.name,
        "train_split_ratio": train_split_ratio,
        "seed": seed,
        "max_length": max_length,
    }
    header["fingerprint"] = fingerprint(header, folder)
    refuse_other_files(folder, header)
    work = folder / ".work" / header["fingerprint"][:16]
    for path in (work.parent, work):
        if path.is_symlink():  # it is emptied at the end
            raise ValueError(f"{path} is a link: remove it")
    if not work.exists() and not (folder / ".lock").exists():
        metadata = up_to_date(folder, header)
        if metadata:
            return metadata
    tasks = plan(corpus, tokenizer, train_split_ratio, *TASK_BYTES)
    check_room(folder, tokenizer, tasks)
    job = Job(
        str(work),
        tokenizer.name,
        corpus.has_documents,
        max_length,
        train_split_ratio,
        seed,
        on_error,
    )
    preparation = _Preparation(
        corpus=corpus, folder=folder, work=work, header=header, tasks=tasks, job=job, run=run,
        began=began,
    )  # fmt: skip
    try:
        return preparation.do_part(part) if part else preparation.do_all()
    finally:
        preparation.remove_empty_folders()


@dataclass(frozen=True)
class _Preparation:
    """One call of prepare: what its steps share."""

    corpus: Corpus
    folder: Path
    work: Path  # folder of finished tasks
    header: dict  # the fields of metadata.json that are known before the start
    tasks: list[Task]
    job: Job
    run: Run
    began: float  # time.perf_counter()

    def do_all(self) -> dict:
        """Do every task that is not finished, then join and publish."""
        with self.lock(wait=False):
            self.make_work_folder()
            with self.cleaned_up_after_errors():
                metadata = self.prepared()  # by a process that was killed before it had cleaned up
                if metadata:
                    return metadata
                self.discard_other_work()
                self.tokenize(range(len(self.tasks)))
                return self.finish()

    def do_part(self, part: str) -> dict | None:
        """Do every N-th task that is not finished; join and publish if no task is left.

        Without the lock a part removes nothing: other parts may be using the folder.
        """
        first, step = map(int, part.split("/"))
        self.make_work_folder()
        if not up_to_date(self.folder, self.header, quiet=True):
            self.tokenize_part(range(first, len(self.tasks), step))
            left = len(self.tasks) - len(self.finished())
            if left and not up_to_date(self.folder, self.header, quiet=True):
                print(f"part {part} is done; {left:,} tasks are left to other parts")
                return None
        with self.lock(wait=True), self.cleaned_up_after_errors():
            metadata = self.prepared()  # by another part, while this one waited
            if metadata:
                return metadata
            if len(self.finished()) < len(self.tasks):
                raise self.removed_by_others()
            self.discard_other_work()
            return self.finish()

    def tokenize_part(self, numbers: range) -> None:
        """Do the tasks of a part. No error if another process publishes them meanwhile."""
        try:
            self.tokenize(numbers)
        except FileNotFoundError:
            if up_to_date(self.folder, self.header, quiet=True):
                return
            if not self.work.exists():
                raise self.removed_by_others() from None
            raise

    def removed_by_others(self) -> OSError:
        """Return the error of a part whose finished tasks another run has thrown away."""
        return OSError(
            f"finished tasks were removed from {self.work} by another run: let it end, then run "
            f"this again"
        )

    def prepared(self) -> dict | None:
        """Clean up and return the metadata if the corpus is up to date, else None."""
        metadata = up_to_date(self.folder, self.header)
        if metadata:
            self.clean_up()
        return metadata

    def make_work_folder(self) -> None:
        """Make the folder of finished tasks."""
        self.work.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def cleaned_up_after_errors(self) -> Iterator[None]:
        """Remove the finished tasks after an error, unless a restart can use them."""
        try:
            yield
        except ValueError:  # of a document, or of the whole: then a restart fails the same way
            if len(self.finished()) == len(self.tasks):
                self.clean_up()
            raise
        finally:
            if not any(self.work.glob("*.json")):
                self.clean_up()

    def lock(self, wait: bool):
        """Hold the lock of this corpus."""
        self.folder.mkdir(parents=True, exist_ok=True)
        message = (
            f"{self.folder} is being prepared by another process: wait for it, or choose another "
            f"--corpus NAME"
        )
        return exclusive_lock(self.folder / ".lock", message, wait)

    def discard_other_work(self) -> None:
        """Remove the finished tasks of other sources or settings."""
        for path in self.work.parent.iterdir():
            if path == self.work:
                continue
            count = len(list(path.glob("*.json")))
            if count:
                print(f"{count:,} finished tasks of other files or flags are thrown away")
            remove_tasks(path)

    def finished(self) -> dict[int, dict]:
        """Return the counts of finished tasks by number, of those that can be used."""
        finished = {}
        for i, (chunks, _) in enumerate(self.tasks):
            with contextlib.suppress(FileNotFoundError, ValueError):  # none, or a damaged one
                counts = json.loads((self.work / f"{i:06}.json").read_bytes())
                usable = self.job.on_error == "skip" or not counts["skipped"]
                if usable and counts["chunks"] == chunk_ids(chunks):
                    finished[i] = counts
        return finished

    def tokenize(self, numbers: range) -> None:
        """Do the tasks of these numbers that are not finished, and show how far they are.

        On a terminal the line moves; elsewhere, as in the output of Slurm, there is one a minute.
        """
        finished = self.finished()
        if finished:
            print(f"resuming: {len(finished):,} of {len(self.tasks):,} tasks are finished")
        todo = [i for i in numbers if i not in finished]
        interval = 0.2 if sys.stderr.isatty() else 60  # seconds
        tokens = 0
        with tqdm(
            total=sum(self.tasks[i][1] for i in todo), unit="B", unit_scale=True,
            mininterval=interval, delay=interval, leave=False,
        ) as bar:  # fmt: skip
            calls = [(self.job, i, self.tasks[i][0]) for i in todo]
            for index, counts in self.run(tokenize_task, calls):
                tokens += sum(split["tokens"] for split in counts["splits"].values())
                speed = tokens / max(1e-9, time.time() - bar.start_t)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                bar.update(self.tasks[todo[index]][1])
        if fingerprint(self.header, self.folder) != self.header["fingerprint"]:
            raise ValueError(
                f"the text of {self.corpus.name} has changed while it was read: run this again"
            )

    def finish(self) -> dict:
        """Join all tasks to shards and publish them; return the metadata."""
        finished = self.finished()
        counts = [finished[i] for i in range(len(self.tasks))]
        skipped = [place for task_counts in counts for place in task_counts["skipped"]]
        splits = join_shards(self.work, counts, [size for _, size in self.tasks], self.run)
        refuse_empty_splits(self.corpus, splits, skipped)
        if not self.corpus.has_documents:
            for split in splits.values():
                split["documents"] = 1
        metadata = with_checksum(
            self.header
            | {"dropped": sum(task_counts["dropped"] for task_counts in counts)}
            | {"skipped": len(skipped), "splits": splits}
        )
        publish(self.work, self.folder, metadata, skipped)
        self.clean_up()
        seconds = time.perf_counter() - self.began
        core_seconds = sum(task_counts["seconds"] for task_counts in counts)
        print_report(self.folder, metadata, skipped, seconds, core_seconds)
        return metadata

    def clean_up(self) -> None:
        """Remove the finished tasks."""
        remove_tasks(self.work)

    def remove_empty_folders(self) -> None:
        """Remove the folders of work, corpus and data, if they are empty."""
        with contextlib.suppress(OSError):  # not empty
            self.work.parent.rmdir()
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            self.folder.parent.rmdir()


def remove_tasks(path: Path) -> None:
    """Remove a folder of finished tasks.

    The counts go first: a task whose tokens are gone must not count as finished if this is killed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for counts in path.glob("*.json"):
        counts.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def up_to_date(folder: Path, header: dict, quiet: bool = False) -> dict | None:
    """Return the metadata of a prepared corpus with this fingerprint, else None."""
    path = folder / "metadata.json"
    try:
        metadata = read_metadata(folder)
        if metadata.get("fingerprint") != header["fingerprint"]:
            return None
        for name in metadata["splits"]:
            open_tokens(folder / name)  # checks that each file is there, at its full length
    except (OSError, ValueError):  # there is none, or a damaged one
        return None
    if not quiet:
        with contextlib.suppress(OSError):  # a corpus of someone else
            os.utime(path)  # train_gpt2.py takes the corpus prepared last
        print(f"{folder} is prepared already, from the same files in the same way")
    return metadata


def refuse_other_files(folder: Path, header: dict) -> None:
    """Refuse to overwrite a corpus of other sources, or .bin files of another program.

    Raises:
        FileExistsError: The folder holds such files.
    """
    try:
        old = read_json(folder / "metadata.json")["source"]
        old_paths = {file["path"] for file in old["files"]}
    except FileNotFoundError:
        foreign = [path for path in folder.glob("*.bin") if SHARD_NAME.fullmatch(path.name)]
        if foreign and not (folder / ".work").exists():
            raise FileExistsError(
                f"{min(foreign)} has no metadata.json beside it, so another program may have "
                f"written it: choose another --corpus NAME, or remove the file"
            ) from None
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged one
        return
    new = header["source"]
    new_paths = {file["path"] for file in new["files"]}
    same_url = old.get("url") and old["url"] == new.get("url")
    if old_paths and not (old_paths & new_paths or same_url):
        raise FileExistsError(
            f"{folder} was made of other files ({min(old_paths)}): choose another --corpus NAME, "
            f"or remove {folder}"
        )


def refuse_empty_splits(corpus: Corpus, splits: dict, skipped: list[str]) -> None:
    """Raise ValueError if a split has no text; only test may be missing."""
    for name in dict.fromkeys(("train", "val", *splits)):
        if splits.get(name, {}).get("bytes"):
            continue
        count = sum(split["documents"] for split in splits.values())
        reason = f"{count} documents" if corpus.has_documents else "running text"
        if skipped:
            reason += f", {len(skipped):,} skipped, first {skipped[0]}"
        remedy = "add text"
        if corpus.has_documents and count > 1:
            remedy += ", or try another --seed or --train_split_ratio"
        raise ValueError(
            f"{corpus.name} has too little text ({reason}): nothing is left for {name}; {remedy}"
        )


def print_report(
    folder: Path, metadata: dict, skipped: list[str], seconds: float, core_seconds: float
) -> None:
    """Print what was read, what became of it, and what to do next."""
    for place in skipped[:10]:
        print(f"skipped: {place}")
    if len(skipped) > 10:
        print(f"skipped: {len(skipped) - 10:,} more, in {folder / 'skipped.txt'}")
    for name, split in metadata["splits"].items():
        line = f"{name:5} {split['tokens']:>14,} tokens {split['bytes']:>14,} bytes of text"
        if metadata["eot_per_document"]:
            line += f" {split['documents']:>12,} documents"
        print(line)
    if metadata["dropped"] or skipped:
        print(
            f"left out: {metadata['dropped']:,} tokens beyond max_length, "
            f"{len(skipped):,} documents skipped"
        )
    num_bytes = sum(split["bytes"] for split in metadata["splits"].values())
    speed = num_bytes / 1e6 / max(1e-9, core_seconds)
    flag = "" if folder.parent == Path("data") else f" --data_dir {folder.parent}"
    print(
        f"{folder}: done in {seconds:.1f} s, {speed:.1f} MB/s per core. "
        f"Next: python train_gpt2.py{flag}"
    )


def _listed(source: Source, folder: Path) -> dict:
    """A source as metadata.json lists it: relative to the corpus's folder, with its size."""
    path = os.path.relpath(source.path, folder)
    return asdict(replace(source, path=path)) | {"bytes": os.path.getsize(source.path)}
