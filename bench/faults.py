"""Kills at random moments, and long runs: what is lost, and what grows.

    python -m bench.faults                          # all of it: an hour or so of two cores
    python -m bench.faults --kills 20 --training_kills 10 --steps 2000 --gigabytes 0.2

A run is started, killed by SIGKILL at a moment drawn from the length of an undisturbed one, and
started again by the same line; then its files are compared with those of the undisturbed one.
Processes are forked from this one, which has imported all, and do what the scripts do. Of ten kills
in preparing, one takes Ray's driver and one a node of its two (pip install ray). Linux only.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib.backends.backend_agg
import torch
import torch._dynamo

import prepare_data
import train_gpt2
from bench.report import RESULTS, private_mib, table, write
from bench.tokenize import make_documents
from common.packages import optional
from common.script import run
from common.settings import parse_settings
from corpus import shards
from training.checkpoint import load_checkpoint
from training.metrics import read_metrics

PIECE_BYTES = shards.PIECE_BYTES
IMPORTED = matplotlib.backends.backend_agg, torch._dynamo  # or else by each process
HUNG = 120  # seconds, after which a run is taken for that
TEXT = dict(input="../text.jsonl", corpus="c", tokenizer="bytes")
LITTLE = TEXT | dict(input="../little.jsonl")
TRAINING = dict(
    data_dir="../corpus/data", run_name="mine", resume="auto", n_layer=2, n_head=2, n_embd=32,
    sequence_length=32, log_every=1,
)  # fmt: skip


@dataclass
class Settings:
    kills: int = 200  # in preparing
    training_kills: int = 100  # in training and saving checkpoints
    steps: int = 50_000  # of the long training run
    gigabytes: float = 5.0  # of text of the long preparing run, and five times that on the disk
    tokenizer: str = "bytes"  # of the long preparing run
    seed: int = 0  # of the moments
    folder: str = ""  # to work in; "": a temporary one
    results: str = RESULTS  # Markdown file to write into; "": none


def main():
    config = parse_settings(Settings, __doc__)
    results = config.results and os.path.abspath(config.results)
    torch.set_num_threads(1)
    home = os.getcwd()
    with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
        os.chdir(folder)
        make_corpus()
        killed = table(
            ["killed", "times", "ended by itself", "half-made, but readable",
             "restarts that finished", "the same bytes", "files left over"],
            list(kills(config)),
        )  # fmt: skip
        long = table(
            ["most that one process had", "minutes", "private MiB: first tenth of the time",
             "to the half", "second half", "open files: first tenth", "to the half", "second half"],
            list(long_runs(config)),
        )  # fmt: skip
        os.chdir(home)
    write(results, "Faults", f"{killed}\n\n{long}")


def make_corpus():
    """corpus/data/c, to train on: little, since a validation is a full pass."""
    make_documents(Path("little.jsonl"), 0.05, "")
    wait(start(prepare_data, Path("corpus"), LITTLE))


# ---- kills


def kills(config):
    """Rows of: what was killed, and the counts of count()."""
    choose, tenth = random.Random(config.seed), config.kills // 10
    make_documents(Path("text.jsonl"), 3, "")
    shards.PIECE_BYTES = 100_000, 100_000  # thirty pieces
    two = dict(TEXT, workers=2)
    times = config.kills - 6 * tenth
    yield count("preparing: all processes", times, prepare_data, two, kill_all, choose)
    yield count("preparing: a worker of two", 4 * tenth, prepare_data, two, kill_worker, choose)
    if tenth:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=ray_nodes, args=(there,))
        process.start()
        flags = dict(TEXT, engine="ray", ray_address=here.recv())

        def kill_node(pid, choose):
            here.send(True)
            return here.recv()

        try:
            for what, kill in (("the driver", kill_all), ("a node of two", kill_node)):
                what = f"preparing on Ray: {what}"
                yield count(what, tenth, prepare_data, flags, kill, choose)
        finally:
            here.send(False)
            process.join()
    flags = TRAINING | dict(max_steps=20, eval_every=10, checkpoint_minutes=0)  # one a step
    yield count("training", config.training_kills, train_gpt2, flags, kill_all, choose)


def ray_nodes(connection):
    """Two of them, in a process of their own, since what talks to Ray can't be forked: sends their
    address and then, whenever it is told to go on, kills one and sends True when there is another.
    """
    cluster = optional("ray.cluster_utils", "to kill under Ray").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1}
    )
    node = cluster.add_node(num_cpus=1)
    connection.send(cluster.address)
    while connection.recv():
        cluster.remove_node(node, allow_graceful=False)  # by SIGKILL
        node = cluster.add_node(num_cpus=1)
        connection.send(True)
    cluster.shutdown()


def count(what, times, script, flags, kill, choose):
    """Kills `script` that many times by kill(pid), starts it again, and looks at what there is.

    Returns (what, times, how often the killed run ended well all the same, how often something
    half-made could be read after the kill, restarts that finished, results that were the same as
    undisturbed, files that were left over).
    """
    if not times:
        return what, *[0] * 6
    result = prepared if script is prepare_data else trained
    whole, number = Path(f"{what}: undisturbed"), itertools.count()
    began = time.perf_counter()
    if wait(start(script, whole, flags)):
        raise ValueError((whole / "log.txt").read_text())
    seconds = time.perf_counter() - began
    expected, tally = result(whole), Counter()
    while tally["times"] < times:
        folder = Path(f"{what}: {next(number)}")
        pid = start(script, folder, flags)
        time.sleep(choose.uniform(0, seconds))
        if not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) and kill(pid, choose):
            tally["times"] += 1
            tally["ended"] += wait(pid) == 0
            tally["readable"] += not sound(folder, expected)
            tally["finished"] += wait(start(script, folder, flags)) == 0
            found = result(folder)
            tally["same"] += {name: found.get(name) for name in expected} == expected
            tally["left"] += len(found.keys() - expected.keys())
        else:  # too late, or too early: it has no workers yet
            kill_all(pid, choose)
            wait(pid)
        shutil.rmtree(folder)
    print(what, dict(tally), flush=True)
    return what, *(
        tally[name] for name in ("times", "ended", "readable", "finished", "same", "left")
    )


def prepared(folder) -> dict:
    """What each file of a prepared corpus holds."""
    files = (folder / "data").rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.is_file()}


def trained(folder) -> dict:
    """What each file of a run holds, but for speeds, names, samples and pictures. previous.pt is
    the one before, or, after a kill in the last save, the one before that."""
    found = {}
    for path in (folder / "out").rglob("*"):
        name, value = str(path.relative_to(folder)), ""
        if path.name == "metrics.jsonl":
            value = [line | {"tokens_per_second": 0} for line in read_metrics(path)]
        elif path.name in ("last.pt", "best.pt"):
            value = load_checkpoint(path)
            value = {part: value.get(part) for part in ("step", "best", "model", "optimizers")}
            value = plain(value)
        found[name] = value
    return found


def plain(value):
    """A checkpoint without tensors, which == doesn't compare."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def sound(folder, expected) -> bool:
    """Whether all that can be read of what a killed run has left is whole."""
    found = prepared(folder)
    if "data/c/metadata.json" in found:
        return expected.items() <= found.items()
    try:
        return all(load_checkpoint(path) for path in folder.glob("out/*/*.pt"))
    except ValueError:
        return False


# ---- processes


def start(script, folder: Path, flags: dict) -> int:
    """`python SCRIPT.py --FLAG VALUE ...` in `folder`, in a process group of its own: its pid."""
    folder.mkdir(exist_ok=True)
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number in (1, 2):
            os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        sys.argv = [f"{script.__name__}.py", *argv]
        run(script.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os._exit(code)


def wait(pid) -> int:
    """Its exit code, or minus the number of the signal that ended it."""
    end = time.monotonic() + HUNG
    while not (status := os.waitpid(pid, os.WNOHANG))[0]:
        time.sleep(0.002)
        if time.monotonic() > end:
            kill_all(pid, None)
    return os.waitstatus_to_exitcode(status[1])


def children(pid) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def kill_all(pid, choose) -> bool:
    with contextlib.suppress(ProcessLookupError):  # not a group yet, or none any more
        os.killpg(pid, signal.SIGKILL)
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return False


def kill_worker(pid, choose) -> bool:
    """One of its workers; False where there is none."""
    with contextlib.suppress(IndexError, ProcessLookupError):
        os.kill(choose.choice(children(pid)), signal.SIGKILL)
        return True
    return False


# ---- long runs


def long_runs(config):
    """Rows of watch()."""
    block, text = Path("block.jsonl"), Path("long.jsonl")
    make_documents(block, min(20, 1000 * config.gigabytes), "")
    with open(text, "wb") as f:
        for _ in range(round(config.gigabytes * 1e9 / block.stat().st_size)):
            f.write(block.read_bytes())
    shards.PIECE_BYTES = PIECE_BYTES
    flags = dict(TEXT, input="../long.jsonl", tokenizer=config.tokenizer, workers=2)
    yield watch(f"preparing {config.gigabytes:g} GB", prepare_data, flags)
    text.unlink()
    flags = TRAINING | dict(
        max_steps=config.steps, eval_every=max(100, config.steps // 20),
        n_layer=1, sequence_length=16, batch_size=2, optimizer="adamw", log_every=10,
    )  # fmt: skip
    yield watch(f"training for {config.steps:,} steps", train_gpt2, flags)


def watch(what, script, flags):
    """Runs `script` and looks at its processes all the time: (what, minutes, and, for private
    memory in MiB and for open files, the most that one process had in the first tenth of the time,
    from there to the half, and in the second half)."""
    folder, seen, began = Path(what), [], time.monotonic()
    pid = start(script, folder, flags)
    seen.append((private_mib(pid), open_files(pid)))
    while not (status := os.waitpid(pid, os.WNOHANG))[0]:
        family = [pid, *children(pid)]
        seen.append((max(map(private_mib, family)), max(map(open_files, family))))
        time.sleep(0.1)
    if status[1]:
        raise ValueError((folder / "log.txt").read_text()[-2000:])
    shutil.rmtree(folder)
    tenth, half = -(-len(seen) // 10), -(-len(seen) // 2)
    spans = seen[:tenth], seen[tenth:half] or seen, seen[half:] or seen
    peaks = [[max(column) for column in zip(*span)] for span in spans]
    return what, (time.monotonic() - began) / 60, *(p[0] for p in peaks), *(p[1] for p in peaks)


def open_files(pid) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


if __name__ == "__main__":
    run(main)
