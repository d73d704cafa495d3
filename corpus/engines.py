"""Engines: a map over tasks, by the processes of this machine or by a Ray cluster.

with open_engine("processes", workers=2) as run_tasks:
for index, result in run_tasks(pow, [(2, 3), (5, 2)]): ...    # (0, 8) and (1, 25)
"""

import concurrent.futures
import contextlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from common.packages import optional

# run_tasks(function, calls) yields (index of a call, result) as the calls end
RunTasks = Callable[[Callable, Sequence[tuple]], Iterator[tuple[int, Any]]]
RAY_TIMEOUT = 10  # seconds to reach a cluster
MAX_WORKERS_PER_CORE = 4  # more would take memory and gain no time


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use.

    Under Slurm, these are the cores of its job. In a container, a quota of processor time counts,
    too (docker run --cpus 2, or the limit of a Kubernetes pod): a quota of 2.5 cores gives 3.

    Args:
        root: Folder that has proc/ and sys/; for tests.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1  # macOS, Windows
    return math.ceil(min(allowed, _quota(root)))


def _quota(root: Path) -> float:
    """Return how many cores the control groups of this process may keep busy; inf for any number.

    A group has a quota of its own, and shares those of the groups that contain it.
    """
    quotas = [math.inf]
    for folder in _control_groups(root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # no file, or no quota
            if (folder / "cpu.max").exists():  # version 2: "250000 100000" or "max 100000"
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            if int(quota) > 0:  # version 1 writes -1 if there is no quota
                quotas.append(int(quota) / int(period))
    return min(quotas)


def _control_groups(root: Path) -> Iterator[Path]:
    """Yield the folders that may hold the quotas of this process, in version 2 or 1 of cgroups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        yield mount  # within a container, this is the folder of the container's group
        group = Path(path.lstrip("/"))
        if ".." not in group.parts:
            yield from (mount / folder for folder in (group, *group.parents))


@contextlib.contextmanager
def open_engine(name: str, workers: int = 0, ray_address: str = "") -> Iterator[RunTasks]:
    """Start an engine, and stop it at the end of the block.

    Args:
        name: "processes" or "ray".
        workers: Number of tasks at once, on this machine at most four per core; 0 is one per core.
        ray_address: HOST:PORT of a Ray cluster, or "auto"; "" starts Ray on this machine.

    Yields:
        A function run_tasks(function, calls). A call is a tuple of arguments. The function yields
        (index of the call, function(*call)) in the order in which the calls end. It raises the
        exception of a call that fails, and OSError if a worker dies.

    Raises:
        ConnectionError: No Ray cluster answers.
        OSError: The path of Ray's temporary folder is too long.
        ValueError: Ray is not installed.
    """
    if not ray_address:
        workers = min(workers, MAX_WORKERS_PER_CORE * cores())
    if name == "ray":
        yield from _ray_engine(workers, ray_address)
    else:
        yield from _process_engine(workers or cores())


def _process_engine(workers: int) -> Iterator[RunTasks]:
    """Yield a run_tasks that uses a pool of processes on this machine."""
    # a fork has the vocabulary and the imports already, but a fork with Arrow's threads may hang
    fork = sys.platform == "linux" and "pyarrow" not in sys.modules
    context = multiprocessing.get_context("fork" if fork else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),))
    if fork and workers > 1:
        pool.submit(int)  # forks all workers now, before there is a lock or a thread

    def run_tasks(function, calls):
        if workers == 1 or len(calls) <= 1:
            for i, call in enumerate(calls):
                yield i, function(*call)
            return
        try:  # a worker may die while calls are still being submitted
            futures = {pool.submit(function, *call): i for i, call in enumerate(calls)}
            for future in concurrent.futures.as_completed(futures):
                try:
                    result = future.result()
                except Exception:  # no call runs on, so that the caller may call again
                    for other in futures:
                        other.cancel()
                    concurrent.futures.wait(futures)
                    raise
                yield futures[future], result
        except BrokenProcessPool:
            raise OSError(
                "a worker process was killed, perhaps because memory ran out: run this again with "
                "fewer --workers; finished tasks are kept"
            ) from None

    try:
        yield run_tasks
    except KeyboardInterrupt:
        # A second Ctrl-C, while workers finish their tasks, would hang us; a third one, at the exit
        # of Python, would end the process without its exit code. So the rest of the process
        # ignores them.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\nstopping when the running tasks are finished", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end when the parent ends, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _ray_engine(workers: int, address: str) -> Iterator[RunTasks]:
    """Yield a run_tasks that makes a Ray task of each call. All nodes must see the same files."""
    ray = optional("ray", "--engine ray")
    _connect_ray(ray, workers, address)
    try:
        max_running = workers or 2 * int(ray.cluster_resources().get("CPU", 1))
        working_dir = os.getcwd()

        def run_tasks(function, calls):
            @ray.remote(num_cpus=1, max_retries=5)
            def call_on_node(*arguments):
                os.chdir(working_dir)  # a node may have been started elsewhere
                return function(*arguments)

            waiting = enumerate(calls)
            running = {}
            while True:
                for i, call in itertools.islice(waiting, max_running - len(running)):
                    running[call_on_node.remote(*call)] = i
                if not running:
                    return
                (future,), _ = ray.wait(list(running))
                try:
                    result = ray.get(future)
                except ray.exceptions.RayTaskError as error:
                    # no call runs on, so that the caller may call again
                    ray.wait(list(running), num_returns=len(running))
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    raise OSError(f"Ray lost a task, run this again: {error}") from None
                yield running.pop(future), result

        yield run_tasks
    finally:
        ray.shutdown()


def _connect_ray(ray, workers: int, address: str) -> None:
    """Connect to a Ray cluster, or start one on this machine."""
    match = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if match:
        try:  # Ray itself would try for minutes
            host, port = match.groups()
            socket.create_connection((host, int(port)), RAY_TIMEOUT).close()
        except OSError as error:
            raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from None
    root = str(Path(__file__).resolve().parent.parent)
    variables = {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        variables["TIKTOKEN_CACHE_DIR"] = os.path.abspath(os.environ["TIKTOKEN_CACHE_DIR"])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address or "local",  # not a cluster that this machine may have already
            num_cpus=None if address else workers or cores(),
            runtime_env={"env_vars": variables},
            logging_level="ERROR",
            log_to_driver=False,
        )
    except (ConnectionError, ValueError) as error:
        location = f"at {address}" if address else "on this machine"
        raise ConnectionError(f"no Ray cluster {location}: {error}") from None
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        raise OSError(
            f"the path of Ray's temporary folder is too long for sockets ({error}): "
            f"set RAY_TMPDIR to a short one, for example RAY_TMPDIR=/tmp"
        ) from None
