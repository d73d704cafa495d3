"""Kills at random moments: what is lost. Long runs: whether memory and open files grow.

    python -m bench.faults                          # everything: about an hour on two cores
    python -m bench.faults --kills 20 --training_kills 10 --steps 2000 --gigabytes 0.2

A run is started, killed by SIGKILL at a random moment of its length, and started again by the same
command. Then its files are compared with the files of an undisturbed run. The runs are forks of
this process, which has imported everything, and call main() of the scripts. Of ten kills while
preparing, one hits Ray's driver and one hits one of two Ray nodes (pip install ray). Linux only.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.backends.backend_agg
import torch
import torch._dynamo

import prepare_data
import train_gpt2
from bench.report import RESULTS, as_flags, private_mib, table, write
from bench.tokenize import make_documents
from common.packages import optional
from common.script import run_script
from common.settings import parse_settings
from corpus import pipeline
from training.checkpoint import load_checkpoint
from training.json_lines import read_lines

TASK_BYTES = pipeline.TASK_BYTES
SMALL_TASK_BYTES = 100_000, 100_000  # thirty tasks of three megabytes
IMPORTED = (
    matplotlib.backends.backend_agg,
    torch._dynamo,
)  # without this, each fork would import them
HANGS_AFTER = 120  # seconds after which a run counts as hanging
SAMPLE_SECONDS = 0.1  # time between two samples of memory and open files
PREPARE_FLAGS = dict(input="../text.jsonl", corpus="c", tokenizer="bytes")
TRAIN_FLAGS = dict(
    data_dir="../corpus/data", run_name="mine", resume="auto", n_layer=2, n_head=2, n_embd=32,
    sequence_length=32, log_every=1,
)  # fmt: skip
KILLS_HEAD = [
    "killed", "kills", "still succeeded", "incomplete but readable", "restarts that finished",
    "identical results", "files left over",
]  # fmt: skip
LONG_HEAD = [
    "largest process", "minutes", "private MiB: first tenth of the time", "up to half",
    "second half", "open files: first tenth", "up to half", "second half",
]  # fmt: skip

Kill = Callable[[int, random.Random], bool]  # (pid, generator) -> whether something was killed


@dataclass
class Settings:
    kills: int = 200  # kills while preparing
    training_kills: int = 100  # kills while training and saving checkpoints
    steps: int = 50_000  # steps of the long training run
    gigabytes: float = 5.0  # text of the long preparing run; the disk needs five times as much
    tokenizer: str = "bytes"  # tokenizer of the long preparing run
    seed: int = 0  # seed of the moments of the kills
    folder: str = ""  # folder for the files of the runs; "": a temporary folder
    results: str = RESULTS  # Markdown file to write into; "": none


def main() -> None:
    settings = parse_settings(Settings, __doc__)
    results = settings.results and os.path.abspath(settings.results)
    torch.set_num_threads(1)
    home = os.getcwd()
    with tempfile.TemporaryDirectory(dir=settings.folder or None) as folder:
        os.chdir(folder)
        make_training_corpus()
        kills_table = table(KILLS_HEAD, list(kill_runs(settings)))
        long_table = table(LONG_HEAD, list(long_runs(settings)))
        os.chdir(home)
    write(results, "Faults", f"{kills_table}\n\n{long_table}")


def make_training_corpus() -> None:
    """Prepare corpus/data/c, on which the runs train: small, since a validation reads all of it."""
    make_documents(Path("little.jsonl"), 0.05, "")
    wait(start(prepare_data, Path("corpus"), PREPARE_FLAGS | dict(input="../little.jsonl")))


# ---- kills


def kill_runs(settings: Settings) -> Iterator[tuple]:
    """Yield the rows of the table of kills."""
    generator = random.Random(settings.seed)
    tenth = settings.kills // 10
    make_documents(Path("text.jsonl"), 3, "")
    pipeline.TASK_BYTES = SMALL_TASK_BYTES
    flags = PREPARE_FLAGS | dict(workers=2)
    num_kills = settings.kills - 6 * tenth
    yield count_kills(
        "preparing: all processes", num_kills, prepare_data, flags, kill_all, generator
    )
    yield count_kills(
        "preparing: a worker of two", 4 * tenth, prepare_data, flags, kill_worker, generator
    )
    if tenth:
        yield from kill_under_ray(tenth, generator)
    flags = TRAIN_FLAGS | dict(max_steps=20, eval_every=10, checkpoint_minutes=0)  # saves each step
    yield count_kills("training", settings.training_kills, train_gpt2, flags, kill_all, generator)


def kill_under_ray(num_kills: int, generator: random.Random) -> Iterator[tuple]:
    """Yield the rows of the table of kills for preparing on a Ray cluster of two nodes."""
    connection, child_connection = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_ray_nodes, args=(child_connection,))
    process.start()
    flags = PREPARE_FLAGS | dict(engine="ray", ray_address=connection.recv())

    def kill_node(pid: int, generator: random.Random) -> bool:
        connection.send(True)
        return connection.recv()

    try:
        for name, kill in (("the driver", kill_all), ("a node of two", kill_node)):
            description = f"preparing on Ray: {name}"
            yield count_kills(description, num_kills, prepare_data, flags, kill, generator)
    finally:
        connection.send(False)
        process.join()


def run_ray_nodes(connection) -> None:
    """Run two Ray nodes in a separate process, since a process that uses Ray cannot be forked.

    The function sends the address of the cluster. For each True that it receives, it kills a node,
    starts another node, and sends True. False ends the function.
    """
    cluster = optional("ray.cluster_utils", "killing under Ray").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1}
    )
    node = cluster.add_node(num_cpus=1)
    connection.send(cluster.address)
    while connection.recv():
        cluster.remove_node(node, allow_graceful=False)  # by SIGKILL
        node = cluster.add_node(num_cpus=1)
        connection.send(True)
    cluster.shutdown()


def count_kills(
    description: str,
    num_kills: int,
    script: ModuleType,
    flags: dict,
    kill: Kill,
    generator: random.Random,
) -> tuple:
    """Kill a script many times, restart it after each kill, and compare its files.

    Args:
        description: First cell of the row.
        num_kills: Number of kills.
        script: The module prepare_data or train_gpt2.
        flags: Flags of the script.
        kill: Function that kills the run or one of its processes.
        generator: Random generator that draws the moments.

    Returns:
        A row of the table of kills.

    Raises:
        ValueError: The undisturbed run fails.
    """
    if not num_kills:
        return (description, *[0] * (len(KILLS_HEAD) - 1))
    read_result = prepared_files if script is prepare_data else trained_files
    undisturbed = Path(f"{description}: undisturbed")
    began = time.perf_counter()
    if wait(start(script, undisturbed, flags)):
        raise ValueError((undisturbed / "log.txt").read_text())
    seconds = time.perf_counter() - began
    expected = read_result(undisturbed)
    counts: Counter = Counter()
    for number in itertools.count():
        if counts["kills"] == num_kills:
            break
        folder = Path(f"{description}: {number}")
        pid = start(script, folder, flags)
        time.sleep(generator.uniform(0, seconds))
        if is_running(pid) and kill(pid, generator):
            counts["kills"] += 1
            counts["succeeded"] += wait(pid) == 0
            counts["incomplete"] += not is_complete(folder, expected)
            counts["finished"] += wait(start(script, folder, flags)) == 0
            found = read_result(folder)
            counts["identical"] += {name: found.get(name) for name in expected} == expected
            counts["left over"] += len(found.keys() - expected.keys())
        else:  # the run has ended, or has no workers yet
            kill_all(pid, generator)
            wait(pid)
        shutil.rmtree(folder)
    print(description, dict(counts), flush=True)
    names = ("kills", "succeeded", "incomplete", "finished", "identical", "left over")
    return (description, *(counts[name] for name in names))


def prepared_files(folder: Path) -> dict[str, bytes]:
    """Return name -> content of the files of a prepared corpus."""
    paths = [path for path in (folder / "data").rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def trained_files(folder: Path) -> dict[str, Any]:
    """Return name -> content of the files of a run, without the content that may differ.

    Speeds, the name of the run, samples and pictures differ between runs. The content of
    previous.pt differs after a kill during the last save: it is an earlier checkpoint.
    """
    files: dict[str, Any] = {}
    for path in (folder / "out").rglob("*"):
        content: Any = ""
        if path.name == "metrics.jsonl":
            content = [line | {"tokens_per_second": 0} for line in read_lines(path)]
        elif path.name in ("last.pt", "best.pt"):
            checkpoint = load_checkpoint(path)
            names = ("step", "best", "model", "optimizers")
            content = without_tensors({name: checkpoint.get(name) for name in names})
        files[str(path.relative_to(folder))] = content
    return files


def without_tensors(value: Any) -> Any:
    """Return a value with bytes in place of tensors, so that == can compare two values."""
    if isinstance(value, dict):
        return {name: without_tensors(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_tensors(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return value


def is_complete(folder: Path, expected: dict) -> bool:
    """Return whether every readable corpus and checkpoint is complete after a kill."""
    files = prepared_files(folder)
    if "data/c/metadata.json" in files:
        return expected.items() <= files.items()
    try:
        return all(load_checkpoint(path) for path in folder.glob("out/*/*.pt"))
    except ValueError:
        return False


# ---- processes


def start(script: ModuleType, folder: Path, flags: dict) -> int:
    """Run `python SCRIPT.py --FLAG VALUE ...` in `folder`, as a process group; return its pid."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for stream in (1, 2):
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, stream)
        sys.argv = [f"{script.__name__}.py", *as_flags(flags)]
        run_script(script.main)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os._exit(code)


def is_running(pid: int) -> bool:
    """Return whether a child has not ended."""
    return not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def wait(pid: int) -> int:
    """Wait for a child; return its exit code, or minus the number of the signal that ended it."""
    end = time.monotonic() + HANGS_AFTER
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        time.sleep(0.002)
        if time.monotonic() > end:
            kill_all(pid, random.Random())
    return os.waitstatus_to_exitcode(ended[1])


def children(pid: int) -> list[int]:
    """Return the pids of the children of a process."""
    with contextlib.suppress(OSError):
        return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def kill_all(pid: int, generator: random.Random) -> bool:
    """Kill the process group of `pid`; return False if it does not exist yet or has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
        return True
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return False


def kill_worker(pid: int, generator: random.Random) -> bool:
    """Kill one of the children of `pid`; return False if there are no children."""
    with contextlib.suppress(IndexError, ProcessLookupError):
        os.kill(generator.choice(children(pid)), signal.SIGKILL)
        return True
    return False


# ---- long runs


def long_runs(settings: Settings) -> Iterator[tuple]:
    """Yield the rows of the table of long runs."""
    sample = Path("sample.jsonl")
    text = Path("long.jsonl")
    make_documents(sample, min(20, 1000 * settings.gigabytes), "")
    with open(text, "wb") as f:
        for _ in range(round(settings.gigabytes * 1e9 / sample.stat().st_size)):
            f.write(sample.read_bytes())
    pipeline.TASK_BYTES = TASK_BYTES
    flags = PREPARE_FLAGS | dict(
        input="../long.jsonl", tokenizer=settings.tokenizer, workers=2
    )  # fmt: skip
    yield watch(f"preparing {settings.gigabytes:g} GB", prepare_data, flags)
    text.unlink()
    flags = TRAIN_FLAGS | dict(
        max_steps=settings.steps, eval_every=max(100, settings.steps // 20), n_layer=1,
        sequence_length=16, batch_size=2, optimizer="adamw", log_every=10,
    )  # fmt: skip
    yield watch(f"training for {settings.steps:,} steps", train_gpt2, flags)


def watch(description: str, script: ModuleType, flags: dict) -> tuple:
    """Run a script and sample the memory and the open files of its processes.

    Returns:
        A row of the table of long runs.

    Raises:
        ValueError: The run fails.
    """
    folder = Path(description)
    began = time.monotonic()
    pid = start(script, folder, flags)
    samples = [(private_mib(pid), open_files(pid))]
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        pids = [pid, *children(pid)]
        samples.append((max(map(private_mib, pids)), max(map(open_files, pids))))
        time.sleep(SAMPLE_SECONDS)
    if ended[1]:
        raise ValueError((folder / "log.txt").read_text()[-2000:])
    shutil.rmtree(folder)
    tenth = -(-len(samples) // 10)
    half = -(-len(samples) // 2)
    spans = (samples[:tenth], samples[tenth:half] or samples, samples[half:] or samples)
    memory = [max(mib for mib, _ in span) for span in spans]
    files = [max(count for _, count in span) for span in spans]
    return (description, (time.monotonic() - began) / 60, *memory, *files)


def open_files(pid: int) -> int:
    """Return the number of open files of a process; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


if __name__ == "__main__":
    run_script(main)
