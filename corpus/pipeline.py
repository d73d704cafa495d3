"""The pipeline: a corpus to data/NAME/, in steps that can be interrupted anywhere.

    with open_engine("processes") as run_tasks:
        metadata = prepare(corpus, tokenizer, Path("data/mine"), run_tasks)

1. fingerprint: sources, tokenizer and settings, in one hash. A corpus with this hash is up to date
   (metadata.py, existing.py).
2. plan: which chunks of which sources make up each task (planning.py).
3. tokenize: tasks in any order, by any number of workers (tasks.py). Finished tasks are kept in
   data/NAME/.work/FINGERPRINT/, so that a restart skips them.
4. join: the files of all tasks to shards (shards.py).
5. publish: shards, and metadata.json last (shards.py).

One process at a time does this for a corpus: it holds a lock. Parts of one corpus (--part I/N) do
step 3 without this lock, but each holds one of its own, so that no run with other flags throws its
finished tasks away. The part that then finds all tasks finished takes the lock for steps 4 and 5.
"""

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.files import exclusive_lock
from corpus.encoders import REFERENCE, EncoderFailed, choose_encoder
from corpus.engines import RunTasks
from corpus.existing import has_unpublished_shards, refuse_other_files, up_to_date
from corpus.inputs import Corpus
from corpus.metadata import fingerprint, read_metadata, with_checksum
from corpus.planning import check_room, plan
from corpus.shards import join_shards, publish
from corpus.sources import Source
from corpus.tasks import SPLIT_RULE, Job, Task, chunk_ids, tokenize_task
from corpus.tokenizer import Tokenizer
from corpus.vocabulary_files import is_file_name

TASK_BYTES = 2 << 20, 64 << 20  # smallest and largest size of a task's source text
LONGEST_DEFAULT = 256  # default of train_gpt2.py's --sequence_length on a GPU
RUNNING = ".running"  # suffix of the lock file of a running part


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    corpus_dir: Path,
    run_tasks: RunTasks,
    *,
    train_split_ratio: float = 0.9,
    seed: int = 0,
    max_length: int = 0,
    on_error: str = "stop",
    part: str = "",
    encoder: str = "auto",
) -> dict | None:
    """Tokenize a corpus into a folder.

    Args:
        corpus: Corpus with its sources.
        tokenizer: Tokenizer that turns text to ids.
        corpus_dir: Folder of the corpus, data/NAME; created if it does not exist.
        run_tasks: Function that engines.open_engine yields.
        train_split_ratio: Share for train, where the corpus is not split already.
        seed: Seed of the hash that decides which documents go to train.
        max_length: Tokens kept of a document; 0 keeps all.
        on_error: "stop" or "skip", at an invalid document.
        part: "I/N" does every N-th task only, from the I-th; "" does all tasks.
        encoder: "auto", or "tiktoken" to leave a faster encoder unused. The result is the same.

    Returns:
        The metadata, or None if tasks are left to other parts.

    Raises:
        ValueError: A document is invalid, a split would be empty, or a source changes meanwhile.
        OSError: Another process prepares this corpus, the folder holds other files, or the disk is
            too full.
    """
    began = time.perf_counter()
    initial_metadata = {
        "format_version": 1,
        "corpus": corpus.name,
        "source": source_metadata(corpus, corpus_dir),
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "vocab_size": tokenizer.vocab_size,
        "eot_token": tokenizer.eot_token,
        "eot_per_document": corpus.has_documents,
        "dtype": tokenizer.dtype.name,
        "train_split_ratio": train_split_ratio,
        "seed": seed,
        "max_length": max_length,
    }
    if any(source.is_hashed_by_name for source in corpus.sources):
        initial_metadata["split_rule"] = SPLIT_RULE
    initial_metadata["fingerprint"] = fingerprint(initial_metadata, corpus_dir)
    refuse_other_files(corpus_dir, initial_metadata)
    tasks_dir = corpus_dir / ".work" / initial_metadata["fingerprint"][:16]
    for path in (tasks_dir.parent, tasks_dir):
        if path.is_symlink():  # the folder is emptied at the end
            raise ValueError(f"{path} is a link: remove it")
    if not _tasks_dirs(tasks_dir) and not (corpus_dir / ".lock").exists():
        metadata = up_to_date(corpus_dir, initial_metadata)
        if metadata:
            return metadata
    tasks = plan(corpus, tokenizer, train_split_ratio, *TASK_BYTES, on_error)
    check_room(corpus_dir, tokenizer, tasks)
    num_bytes = sum(task.num_bytes for task in tasks)
    encoder_name, encoder_line = choose_encoder(encoder, tokenizer, num_bytes)
    if encoder_line:
        print(encoder_line)
    job = Job(
        tasks_dir=str(tasks_dir),
        tokenizer=tokenizer.name,
        has_documents=corpus.has_documents,
        max_length=max_length,
        train_split_ratio=train_split_ratio,
        seed=seed,
        on_error=on_error,
        encoder=encoder_name,
    )
    preparation = _Preparation(
        corpus=corpus,
        corpus_dir=corpus_dir,
        tasks_dir=tasks_dir,
        initial_metadata=initial_metadata,
        tasks=tasks,
        job=job,
        run_tasks=run_tasks,
        began=began,
    )
    try:
        return preparation.do_part(part) if part else preparation.do_all()
    finally:
        preparation.remove_empty_folders()


def source_metadata(corpus: Corpus, corpus_dir: Path) -> dict:
    """Return the field "source" of metadata.json: where a corpus comes from, and its files.

    Args:
        corpus: Corpus with its sources.
        corpus_dir: Folder of the corpus, data/NAME, to which the paths are relative.

    Raises:
        OSError: A source is missing.
    """
    return corpus.origin | {"files": [_listed(source, corpus_dir) for source in corpus.sources]}


def _listed(source: Source, corpus_dir: Path) -> dict:
    """Return a source as metadata.json lists it: with its size, relative to the corpus's folder."""
    path = os.path.relpath(source.path, corpus_dir)
    fields = replace(source, path=path).metadata_fields()
    return fields | {"bytes": os.path.getsize(source.path)}


@dataclass(frozen=True)
class _Preparation:
    """One call of prepare: the values that its steps share.

    Attributes:
        corpus: Corpus with its sources.
        corpus_dir: Folder of the corpus, data/NAME.
        tasks_dir: Folder of finished tasks, data/NAME/.work/FINGERPRINT.
        initial_metadata: Fields of metadata.json that are decided before the first task.
        tasks: All tasks of the corpus. A task is known by its index.
        job: Settings that all tasks share.
        run_tasks: Function that engines.open_engine yields.
        began: Time of the start, from time.perf_counter().
    """

    corpus: Corpus
    corpus_dir: Path
    tasks_dir: Path
    initial_metadata: dict
    tasks: list[Task]
    job: Job
    run_tasks: RunTasks
    began: float

    # the two ways through the steps

    def do_all(self) -> dict:
        """Do every task that is not finished, then join and publish."""
        with self.lock(wait=False):
            self.make_tasks_dir()
            with self.cleaned_up_after_errors():
                metadata = self.published_by_others()  # by a process killed before its clean-up
                if metadata:
                    return metadata
                self.discard_other_tasks()
                self.tokenize(range(len(self.tasks)))
                return self.join_and_publish()

    def do_part(self, part: str) -> dict | None:
        """Do every N-th task that is not finished; join and publish if no task is left.

        Without the lock a part removes nothing, because other parts may be using the folder.
        """
        first, step = map(int, part.split("/"))
        numbers = range(first, len(self.tasks), step)
        self.make_tasks_dir()
        with self.running_part_lock():
            if not self.is_up_to_date():
                self.tokenize_part(numbers)
                finished = self.finished_counts()
                if len(finished) < len(self.tasks) and not self.is_up_to_date():
                    if not finished.keys() >= set(numbers):
                        raise self.removed_by_others()
                    num_left = len(self.tasks) - len(finished)
                    print(f"part {part} is done; {num_left:,} tasks are left to other parts")
                    self.warn_of_other_flags()
                    return None
            with self.lock(wait=True), self.cleaned_up_after_errors():
                metadata = self.published_by_others()  # by another part, while this one waited
                if metadata:
                    return metadata
                if len(self.finished_counts()) < len(self.tasks):
                    raise self.removed_by_others()
                self.discard_other_tasks()
                return self.join_and_publish()

    # the steps

    def tokenize(self, numbers: range) -> None:
        """Do the tasks of these numbers that are not finished.

        If the fast encoder fails in one task, tiktoken does all tasks of the corpus: also those
        that are finished, those of other parts, and those that are left after a restart.
        """
        while True:
            finished = self.finished_counts()
            if finished:
                print(f"resuming: {len(finished):,} of {len(self.tasks):,} tasks are finished")
            reference_only = self.reference_only_path.exists()
            try:
                with self.unchanged_sources():
                    self.tokenize_tasks([i for i in numbers if i not in finished])
            except EncoderFailed as error:
                print(f"{error}; {REFERENCE} does all tasks, from the beginning")
                self.reference_only_path.touch()
                continue
            if reference_only or not self.reference_only_path.exists():
                return

    def tokenize_tasks(self, numbers: list[int]) -> None:
        """Do the tasks of these numbers, and show the progress."""
        job = self.job
        if self.reference_only_path.exists():
            job = replace(job, encoder=REFERENCE)
        num_tokens = 0
        with progress_bar([self.tasks[i] for i in numbers]) as progress:
            calls = [(job, i, self.tasks[i].chunks) for i in numbers]
            for index, counts in self.run_tasks(tokenize_task, calls):
                num_tokens += sum(split["tokens"] for split in counts["splits"].values())
                speed = num_tokens / max(1e-9, time.time() - progress.start_t)
                progress.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                progress.update(self.tasks[numbers[index]].num_bytes)

    @contextlib.contextmanager
    def unchanged_sources(self) -> Iterator[None]:
        """Raise ValueError if a source changes within the block, in place of any other error."""
        try:
            yield
        except (ValueError, OSError):  # perhaps because half of the new text was read
            with contextlib.suppress(OSError):
                self.refuse_changed_sources()
            raise
        except BaseException:  # Ctrl-C
            with contextlib.suppress(ValueError, OSError):
                self.refuse_changed_sources()
            raise
        self.refuse_changed_sources()

    def refuse_changed_sources(self) -> None:
        """Remove the finished tasks and raise ValueError if a source has changed.

        Otherwise a restart would join them, if the source got its former size and date again.
        """
        found = fingerprint(self.initial_metadata, self.corpus_dir)
        if found != self.initial_metadata["fingerprint"]:
            self.clean_up()
            raise ValueError(
                f"the text of {self.corpus.name} has changed while it was read: run this again"
            )

    def tokenize_part(self, numbers: range) -> None:
        """Do the tasks of a part. No error if another process publishes them meanwhile."""
        try:
            self.tokenize(numbers)
        except FileNotFoundError:
            if self.is_up_to_date():
                return
            if not self.tasks_dir.exists():
                raise self.removed_by_others() from None
            raise

    def join_and_publish(self) -> dict:
        """Join the files of all tasks to shards, publish the shards, and return the metadata."""
        finished = self.finished_counts()
        all_counts = [finished[i] for i in range(len(self.tasks))]
        skipped = [document for counts in all_counts for document in counts["skipped"]]
        splits = join_shards(self.tasks_dir, self.tasks, all_counts, self.run_tasks)
        _refuse_empty_splits(self.corpus, splits, skipped)
        if not self.corpus.has_documents:
            for split in splits.values():
                split["documents"] = 1
        metadata = with_checksum(
            self.initial_metadata
            | {"dropped": sum(counts["dropped"] for counts in all_counts)}
            | {"skipped": len(skipped), "splits": splits}
        )
        self.print_replaced()
        publish(self.tasks_dir, self.corpus_dir, metadata, skipped)
        self.clean_up()
        seconds = time.perf_counter() - self.began
        core_seconds = sum(counts["seconds"] for counts in all_counts)
        _print_report(self.corpus_dir, metadata, skipped, seconds, core_seconds)
        return metadata

    def print_replaced(self) -> None:
        """Print which prepared corpus is about to be replaced, if there is one."""
        with contextlib.suppress(OSError, ValueError):  # metadata.json is missing or damaged
            old = read_metadata(self.corpus_dir)
            print(f"replaces {self.corpus_dir} ({old['tokenizer']['name']})")

    # what other processes did

    def lock(self, wait: bool) -> contextlib.AbstractContextManager:
        """Hold the lock of this corpus."""
        self.corpus_dir.mkdir(parents=True, exist_ok=True)
        message = (
            f"{self.corpus_dir} is being prepared by another process: wait for it, or choose "
            f"another --corpus NAME"
        )
        return exclusive_lock(self.corpus_dir / ".lock", message, wait)

    def running_part_lock(self) -> contextlib.AbstractContextManager:
        """Hold a lock that shows other processes that a part is running."""
        return exclusive_lock(self.tasks_dir / f"{uuid.uuid4().hex}{RUNNING}", wait=True)

    def is_up_to_date(self) -> bool:
        """Return whether the corpus is published."""
        metadata = up_to_date(self.corpus_dir, self.initial_metadata, quiet=True)
        return metadata is not None

    def published_by_others(self) -> dict | None:
        """Clean up and return the metadata if the corpus is published, else None."""
        metadata = up_to_date(self.corpus_dir, self.initial_metadata)
        if metadata:
            self.clean_up()
        return metadata

    def removed_by_others(self) -> OSError:
        """Return the error of a part whose finished tasks another process has removed."""
        return OSError(
            f"finished tasks were removed from {self.tasks_dir} by another run: let it end, then "
            f"run this again"
        )

    # the folder of finished tasks

    def make_tasks_dir(self) -> None:
        """Make the folder of finished tasks."""
        self.tasks_dir.mkdir(parents=True, exist_ok=True)

    @property
    def reference_only_path(self) -> Path:
        """Path of the empty file that forbids the fast encoder for all tasks."""
        return self.tasks_dir / f"{REFERENCE}-only"

    def finished_counts(self) -> dict[int, dict]:
        """Return index -> counts of each finished task that these settings can use."""
        finished = self.all_finished_counts()
        if self.job.on_error != "skip":
            finished = {i: counts for i, counts in finished.items() if not counts["skipped"]}
        if self.reference_only_path.exists():
            finished = {i: c for i, c in finished.items() if c.get("encoder") == REFERENCE}
        return finished

    def all_finished_counts(self) -> dict[int, dict]:
        """Return index -> counts of each finished task, with those that skipped documents."""
        finished = {}
        for i, task in enumerate(self.tasks):
            with contextlib.suppress(FileNotFoundError, ValueError):  # unfinished, or damaged
                counts = json.loads((self.tasks_dir / f"{i:06}.json").read_bytes())
                if counts["chunks"] == chunk_ids(task.chunks):
                    finished[i] = counts
        return finished

    def other_tasks_dirs(self) -> list[Path]:
        """Return the folders of tasks of other sources or settings."""
        return [path for path in self.tasks_dir.parent.iterdir() if path != self.tasks_dir]

    def warn_of_other_flags(self) -> None:
        """Print a warning if other parts have flags with which no part can join all tasks."""
        others = [path for path in self.other_tasks_dirs() if any(path.glob("*.json"))]
        if others or len(self.all_finished_counts()) > len(self.finished_counts()):
            print(
                f"warning: {self.tasks_dir.parent} has finished tasks of other files or flags: "
                f"parts are joined only if all of them have the same files and flags",
                file=sys.stderr,
            )

    def discard_other_tasks(self) -> None:
        """Remove the finished tasks of other sources or settings.

        Raises:
            BlockingIOError: A part with other sources or settings is running.
        """
        paths = self.other_tasks_dirs()
        if any(_has_running_part(path) for path in paths):
            raise BlockingIOError(
                f"{self.corpus_dir} is being prepared by a --part with other files or flags: wait "
                f"for it and run this again, or choose another --corpus NAME"
            )
        for path in paths:
            num_finished = len(list(path.glob("*.json")))
            if num_finished:
                print(f"{num_finished:,} finished tasks of other files or flags are thrown away")
            _remove_tasks(path)

    @contextlib.contextmanager
    def cleaned_up_after_errors(self) -> Iterator[None]:
        """Remove the finished tasks after an error, unless a restart can use them."""
        try:
            yield
        except ValueError:  # if all tasks are finished, a restart would fail in the same way
            if len(self.finished_counts()) == len(self.tasks):
                self.clean_up()
            raise
        finally:
            if not any(self.tasks_dir.glob("*.json")):
                self.clean_up()

    def clean_up(self) -> None:
        """Remove the finished tasks."""
        for path in _tasks_dirs(self.tasks_dir):
            _remove_tasks(path)

    def remove_empty_folders(self) -> None:
        """Remove the folders .work, data/NAME and data, if they are empty.

        Beside shards that a killed process left unpublished, .work stays: it marks that they
        are not files of another program.
        """
        if not has_unpublished_shards(self.corpus_dir):
            with contextlib.suppress(OSError):  # not empty
                self.tasks_dir.parent.rmdir()
        with contextlib.suppress(OSError):
            self.corpus_dir.rmdir()
            self.corpus_dir.parent.rmdir()


def progress_bar(tasks: list[Task], description: str = "") -> tqdm:
    """Return a progress bar that counts the bytes of tasks.

    On a terminal its line moves; elsewhere, as in the output of Slurm, there is one line per
    minute.
    """
    interval = 0.2 if sys.stderr.isatty() else 60  # seconds
    return tqdm(
        desc=description,
        total=sum(task.num_bytes for task in tasks),
        unit="B",
        unit_scale=True,
        mininterval=interval,
        delay=interval,
        leave=False,
    )


def _has_running_part(path: Path) -> bool:
    """Return whether a part is running that keeps its finished tasks in this folder."""
    for lock in path.glob(f"*{RUNNING}"):
        try:
            with exclusive_lock(lock):
                pass  # the part was killed
        except BlockingIOError:
            return True
    return False


def _tasks_dirs(tasks_dir: Path) -> list[Path]:
    """Return the folder of finished tasks, and what a killed process left while it removed it."""
    return sorted(tasks_dir.parent.glob(f"{tasks_dir.name}*"))


def _remove_tasks(path: Path) -> None:
    """Remove a folder of finished tasks.

    The folder is renamed first, so that no worker finishes a task in it meanwhile. The .json files
    go next: a task without its tokens must not count as finished if this process is killed.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):  # Windows does not rename a folder with open files
        path = path.replace(path.with_name(f"{path.name}-removed"))
    for counts_path in path.glob("*.json"):
        counts_path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _refuse_empty_splits(corpus: Corpus, splits: dict, skipped: list[str]) -> None:
    """Raise ValueError if a split has no text; only test may be missing."""
    for name in dict.fromkeys(("train", "val", *splits)):
        if splits.get(name, {}).get("bytes"):
            continue
        num_documents = sum(split["documents"] for split in splits.values())
        reason = f"{num_documents} documents" if corpus.has_documents else "running text"
        if skipped:
            reason += f", {len(skipped):,} skipped, first {skipped[0]}"
        remedy = "add text"
        if corpus.has_documents and num_documents > 1:
            remedy += ", or try another --seed or --train_split_ratio"
        raise ValueError(
            f"{corpus.name} has too little text ({reason}): nothing is left for {name}; {remedy}"
        )


def _fitting_length(num_tokens: int) -> int:
    """Return a power of two below the tokens of a split: a window has one token more.

    At most 64, the default on a CPU. Example: 18 tokens give 16, and 16 tokens give 8.
    """
    return min(64, 1 << ((num_tokens - 1).bit_length() - 1))


def _describe_vocabulary(metadata: dict) -> str:
    """Return the line about a vocabulary of the user's own: its size, and how long its tokens are.

    End-of-text tokens do not count as tokens of the text.
    """
    lengths = []
    for name, split in metadata["splits"].items():
        num_tokens = split["tokens"]
        if metadata["eot_per_document"]:
            num_tokens -= split["documents"]
        lengths.append(f"{split['bytes'] / max(1, num_tokens):.3f} in {name}")
    return (
        f"vocabulary {metadata['tokenizer']['name']}: {metadata['vocab_size']:,} ids; bytes per "
        f"token: {', '.join(lengths)}"
    )


def _print_report(
    corpus_dir: Path, metadata: dict, skipped: list[str], seconds: float, core_seconds: float
) -> None:
    """Print the size of each split, the skipped documents, the speed, and the next command."""
    for document in skipped[:10]:
        print(f"skipped: {document}")
    if len(skipped) > 10:
        print(f"skipped: {len(skipped) - 10:,} more, in {corpus_dir / 'skipped.txt'}")
    for name, split in metadata["splits"].items():
        line = f"{name:5} {split['tokens']:>14,} tokens {split['bytes']:>14,} bytes of text"
        if metadata["eot_per_document"]:
            line += f" {split['documents']:>12,} documents"
        print(line)
    if is_file_name(metadata["tokenizer"]["name"]):
        print(_describe_vocabulary(metadata))
    if metadata["dropped"] or skipped:
        print(
            f"left out: {metadata['dropped']:,} tokens beyond max_length, "
            f"{len(skipped):,} documents skipped"
        )
    num_bytes = sum(split["bytes"] for split in metadata["splits"].values())
    speed = num_bytes / 1e6 / max(1e-9, core_seconds)
    data_dir = corpus_dir.parent
    flag = "" if data_dir == Path("data") else f" --data_dir {shlex.quote(str(data_dir))}"
    num_tokens = metadata["splits"]["val"]["tokens"]
    if 1 < num_tokens <= LONGEST_DEFAULT:
        flag += f" --sequence_length {_fitting_length(num_tokens)}"
    print(
        f"{corpus_dir}: done in {seconds:.1f} s, {speed:.1f} MB/s per core. "
        f"Next: python train_gpt2.py{flag}"
    )
