"""The work of preparing, in pieces that any worker on any node can do alone: documents to ids.

    with engine("processes", workers=2) as run:
        for result in run(tokenize_piece, [(job, 0, piece), ...]): ...

What a piece becomes depends on the job and the piece alone, so that the bytes on disk are the same
for any number of workers and either engine, and a piece that is done need not be done again.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import atomic_write
from common.hashing import mix
from common.packages import optional
from corpus.reader import read, where
from corpus.sources import BLOCK, Bad, Source
from corpus.tokenizer import encodable, get_tokenizer


@dataclass(frozen=True)
class Job:
    """What all pieces have in common. folder: for finished pieces. documents: whether an end of
    text follows each text; max_length: tokens a document keeps, 0 for all."""

    folder: str
    tokenizer: str
    documents: bool
    max_length: int
    train_split_ratio: float
    seed: int
    on_error: str


def share_out(source: Source, positions, train_split_ratio, seed) -> dict[str, np.ndarray]:
    """Which documents each split gets: its file's all, or else by a hash of the seed and the
    place, so that order, workers and what else is in the corpus make no difference."""
    if source.split:
        return {source.split: np.ones(len(positions), bool)}
    key = mix(np.array([source.number], np.uint64) ^ mix(np.array([seed], np.int64)))
    hashes = mix(np.array(positions, np.uint64) ^ key)
    train = hashes < np.uint64(min(int(train_split_ratio * 2**64), 2**64 - 1))
    return {"train": train, "val": ~train}


def tokenize_piece(job: Job, number: int, piece: list[Source]) -> dict:
    """Writes job.folder/NUMBER.SPLIT.bin of each split and returns the piece's account, which it
    also writes, last, to NUMBER.json.

    The account: splits (tokens, documents and bytes of UTF-8 text of each), dropped (tokens cut
    off by max_length), skipped (what was no document: where and why), seconds. Raises ValueError
    for what is no document, unless on_error is "skip".
    """
    tokenizer = get_tokenizer(job.tokenizer)
    start = time.perf_counter()
    account = {"splits": {}, "dropped": 0, "skipped": []}
    path = Path(job.folder) / f"{number:06}"
    with contextlib.ExitStack() as stack:
        writers = {}

        def write(split):
            if split not in writers:
                file = stack.enter_context(_whole(f"{path}.{split}.bin"))
                totals = account["splits"][split] = dict(tokens=0, documents=0, bytes=0)
                writers[split] = file, totals
            texts, size[split] = batches.pop(split), 0
            account["dropped"] += _write(job, tokenizer, texts, *writers[split])

        batches, size = collections.defaultdict(list), collections.Counter()
        for source in piece:
            for positions, texts in read(source):
                good = np.array([type(text) is not Bad for text in texts])
                for i in np.flatnonzero(~good):
                    account["skipped"].append(_complain(job, source, positions[i], texts[i]))
                own_of = share_out(source, positions, job.train_split_ratio, job.seed)
                for split, own in own_of.items():
                    batches[split] += (chosen := list(itertools.compress(texts, own & good)))
                    size[split] += sum(map(len, chosen))
                    if size[split] >= BLOCK:
                        write(split)
        for split in filter(batches.get, list(batches)):
            write(split)
    account["seconds"] = time.perf_counter() - start
    with _whole(f"{path}.json") as f:
        f.write(json.dumps(account).encode())
    return account


def _whole(path):
    """atomic_write, also where two do one piece: Ray does it again when it takes a node for dead
    that isn't, and a worker outlives a parent that was killed by a moment."""
    return atomic_write(Path(path), f".{platform.node()}-{os.getpid()}")


def _complain(job, source, position, bad) -> str:
    """Where and why there is no document. Raises it as a ValueError unless that may be skipped."""
    place = f"{where(source, position + bad.offset)}: {bad}"
    if job.documents and job.on_error == "skip":
        return place
    raise ValueError(place + ("; --on_error skip leaves it out" if job.documents else ""))


def _write(job, tokenizer, texts, file, totals) -> int:
    """Tokenizes texts into `file` and adds to `totals`; returns how many tokens were cut off."""
    dropped = 0
    if job.documents:
        ids = tokenizer.encode_documents(texts)
    else:
        ids = np.concatenate([tokenizer.encode(text) for text in texts])
    totals["documents"] += len(texts)
    totals["bytes"] += sum(len(encodable(text).encode()) for text in texts)
    if job.max_length:
        ends = np.flatnonzero(ids == tokenizer.eot_token)
        lengths = np.diff(ends, prepend=-1)  # with the end of text
        place = np.arange(len(ids)) - np.repeat(ends - lengths + 1, lengths)
        keep = (place < job.max_length) | (ids == tokenizer.eot_token)
        totals["bytes"] -= len(tokenizer.decode_bytes(ids[~keep]))
        dropped = int((~keep).sum())
        ids = ids[keep]
    if len(ids) and ids.max() >= tokenizer.vocab_size:  # before narrowing: 65,536 would become 0
        raise ValueError(f"{tokenizer.name} gave the id {ids.max()}, beyond its own vocabulary")
    file.write(ids.astype(tokenizer.dtype).tobytes())
    totals["tokens"] += len(ids)
    return dropped


def join_pieces(paths: list[str], shard: str) -> str:
    """Writes the pieces' ids, one after another, to `shard`; returns its sha256."""
    digest = hashlib.sha256()
    with _whole(shard) as out:
        for path in paths:
            with open(path, "rb") as f:
                while block := f.read(BLOCK):
                    digest.update(block)
                    out.write(block)
    return digest.hexdigest()


def cores() -> int:
    """That this process may use; what Slurm gave it, say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows


@contextlib.contextmanager
def engine(name: str, workers: int = 0, ray_address: str = ""):
    """Yields run(function, tasks): (index, result) of function(*task), in the order they finish.

    name: "processes" of this machine, or "ray": of the cluster at ray_address, or of one that is
    started here. workers: how many at once, on this machine at most four a core; 0: one a core.
    Raises what a task raises, and OSError where a worker dies.
    """
    if not ray_address:
        workers = min(workers, 4 * cores())  # more would only take memory
    if name == "ray":
        yield from _ray(workers, ray_address)
        return
    workers = workers or cores()
    # a fork has the vocabulary and the imports already, but one of Arrow's threads may hang
    fork = sys.platform == "linux" and "pyarrow" not in sys.modules
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _worker, (os.getpid(),))
    if fork and workers > 1:
        pool.submit(int)  # forks all workers here and now, before a lock or a thread is there

    def run(function, tasks):
        if workers == 1 or len(tasks) <= 1:
            yield from ((i, function(*task)) for i, task in enumerate(tasks))
            return
        try:  # a worker may die while the rest is still handed out
            futures = {pool.submit(function, *task): i for i, task in enumerate(tasks)}
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise OSError(
                "a worker process was killed, perhaps for want of memory: run this again, with "
                "fewer --workers; finished pieces are kept"
            ) from None

    try:
        yield run
    except KeyboardInterrupt:  # a second one, while workers finish what they have, would hang us
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\nstopping when the pieces at hand are done", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _worker(parent: int) -> None:
    """A worker leaves Ctrl-C to its parent, and goes when that goes, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ray(workers, address):
    """A Ray task a piece; all nodes see the same files."""
    ray = optional("ray", "--engine ray")
    if there := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address):
        try:  # Ray itself would try for minutes
            socket.create_connection(there.groups(), 10).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from None
    here, code = os.getcwd(), str(Path(__file__).resolve().parent.parent)
    variables = {"PYTHONPATH": os.pathsep.join([code, os.environ.get("PYTHONPATH", "")])}
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        variables["TIKTOKEN_CACHE_DIR"] = os.path.abspath(os.environ["TIKTOKEN_CACHE_DIR"])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address or "local",  # not whatever cluster this machine may have already
            num_cpus=None if address else workers or cores(),
            runtime_env={"env_vars": variables},
            logging_level="ERROR",
            log_to_driver=False,
        )
    except (ConnectionError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at {address or 'work'}: {error}") from None
    try:
        at_once = workers or 2 * int(ray.cluster_resources().get("CPU", 1))

        def run(function, tasks):
            @ray.remote(num_cpus=1, max_retries=5)
            def remote(*task):
                os.chdir(here)  # a node may have been started elsewhere
                return function(*task)

            following, running = enumerate(tasks), {}
            while True:
                for i, task in itertools.islice(following, at_once - len(running)):
                    running[remote.remote(*task)] = i
                if not running:
                    return
                (future,), _ = ray.wait(list(running))
                try:
                    yield running.pop(future), ray.get(future)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    raise OSError(f"Ray lost a piece, run this again: {error}") from None

        yield run
    finally:
        ray.shutdown()
