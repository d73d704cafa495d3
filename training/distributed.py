"""Several processes of one run: one process per GPU, or several on CPUs (torchrun, srun).

The launcher describes the run to each process in environment variables: RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT. No other module reads them. Values on the CPU travel by
gloo, gradients on CUDA by nccl.

If a rank fails, ends or does not answer, each other rank ends with one line that names the rank.
The ranks write to one key-value store (torch's TCPStore), whose keys are:

    started/RANK    the rank has started
    failed/RANK     the rank ends, because of the error that is the value
    waiting/RANK    the rank has lost another one, and looks for the reason
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from common.script import end_without_shutdown

SECONDS_TO_START = 600  # from the first process of a run to its last; a cluster starts them slowly
SECONDS_TO_WAIT = 1800  # for another rank; rank 0 may compile, or write a large checkpoint
SECONDS_TO_EXPLAIN = 5  # that ranks which lost another one wait for each other's reason
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run: 0 <= rank < world_size."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks."""
        if self.world_size == 1:
            return tensor
        with self.waiting():  # also for gradients that a GPU still waits for
            total = tensor.detach().cpu().clone()  # cpu() alone may return the tensor itself
            dist.all_reduce(total)
        return total

    def max(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.world_size == 1:
            return number
        largest = torch.tensor(number)
        with self.waiting():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value (any object that can be pickled) on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        with self.waiting():
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks (objects that can be pickled), in order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with self.waiting():
                dist.all_gather_object(values, value)
        return values

    def on_first(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 alone, and return its value on every rank.

        Args:
            function: Returns an object that can be pickled.

        Raises:
            ValueError: The function raised this error; every rank raises it.
            OSError: The same.
        """
        value: Any = None
        failure: ValueError | OSError | None = None
        if self.is_first:
            try:
                value = function()
            except (ValueError, OSError) as error:
                failure = error
        value, failure = self.broadcast((value, failure))
        if failure:
            raise failure
        return value

    def on_each(self, function: Callable[[], Value]) -> Value:
        """Call a function on every rank, and return its value if no rank fails.

        Args:
            function: Raises ValueError or OSError if it fails.

        Raises:
            ValueError: The function failed on a rank; every rank raises this error, which names
                the rank.
        """
        if self.world_size == 1:
            return function()
        value: Any = None
        failure = ""
        try:
            value = function()
        except (ValueError, OSError) as error:
            failure = str(error)
        for rank, reason in enumerate(self.gather(failure)):
            if reason:
                raise ValueError(f"rank {rank}: {reason}")
        return value

    def check_equal(self, **values: object) -> None:
        """Check that all ranks have the same values.

        Args:
            **values: Values of this rank, by name.

        Raises:
            ValueError: A rank has another value than rank 0; every rank raises this error.
        """
        first, *others = self.gather(values)
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(
                        f"rank {rank} has {name} {other[name]!s:.40}, and rank 0 has "
                        f"{value!s:.40}: give all ranks the same files and flags"
                    )

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which this process may wait for other ranks.

        A process that has got a signal does not wait for long (signals.py).
        """
        return contextlib.nullcontext() if self.world_size == 1 else _note_waiting()

    def gradient_group(self, device: torch.device) -> Any:
        """Return the process group that averages the gradients, for DistributedDataParallel.

        nccl uses the current device of the process, which choose_device has set.

        Args:
            device: Device of this rank, from choose_device.

        Raises:
            ValueError: Two ranks share one GPU.
        """
        if device.type != "cuda":
            return dist.group.WORLD
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        check_gpus_differ(self.gather((socket.gethostname(), uuid)))
        return dist.new_group(backend="nccl", timeout=timedelta(seconds=SECONDS_TO_WAIT))


_waiting_since: float | None = None  # by time.monotonic(), None while this process does not wait


@contextlib.contextmanager
def _note_waiting() -> Iterator[None]:
    global _waiting_since
    _waiting_since = time.monotonic()
    try:
        yield
    finally:
        _waiting_since = None


def waiting_seconds() -> float:
    """Return for how long this process has been waiting for other ranks, 0 if it is not waiting."""
    since = _waiting_since
    return 0.0 if since is None else time.monotonic() - since


def local_rank() -> int:
    """Return the number of this process among those on its machine, 0 without a launcher.

    Raises:
        ValueError: LOCAL_RANK is not a number.
    """
    return _number_from_launcher("LOCAL_RANK", 0)


def is_first_rank() -> bool:
    """Return whether this process is rank 0, or the only process.

    Raises:
        ValueError: RANK or WORLD_SIZE is not a number.
    """
    is_alone = _number_from_launcher("WORLD_SIZE", 1) == 1
    return is_alone or _number_from_launcher("RANK", 0) == 0


def launched_ranks() -> Ranks:
    """Return the rank of this process, as its launcher has set it.

    Raises:
        ValueError: The launcher's variables are incomplete or not numbers.
    """
    world_size = _number_from_launcher("WORLD_SIZE", 1)
    if world_size == 1:
        return Ranks()
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"the environment variable WORLD_SIZE is {world_size}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: unset WORLD_SIZE to train in one "
            f"process, or start the processes with torchrun"
        )
    rank = _number_from_launcher("RANK", 0)
    if rank >= world_size:
        raise ValueError(
            f"the environment variable RANK is {rank}, but WORLD_SIZE is {world_size}: ranks are "
            f"numbered from 0, so set RANK below WORLD_SIZE"
        )
    return Ranks(rank, world_size)


def _number_from_launcher(name: str, default: int) -> int:
    """Return an environment variable as a number; a variable that is empty counts as unset."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(
            f"the environment variable {name} is {text!r:.40}, not a number: unset it, or start "
            f"the processes with torchrun"
        )
    return max(int(text), 1) if name == "WORLD_SIZE" else int(text)


@contextlib.contextmanager
def join_processes() -> Iterator[Ranks]:
    """Join the processes that a launcher has started, if it has.

    Yields:
        The Ranks of this process.

    Raises:
        ValueError: The launcher's variables are incomplete or not numbers.
        TimeoutError: A process of the run does not start; the message names its rank.
        ConnectionError: Another rank has failed, has ended or does not answer; the message names
            the rank. Or another run has the port.
    """
    ranks = launched_ranks()
    if ranks.world_size == 1:
        _warn_of_copies()
        yield ranks
        return
    store = _meet(ranks)
    # gloo's threads may hold the last tensors and abort when the interpreter releases them
    # (pytorch/pytorch#179291)
    end_without_shutdown()
    dist.init_process_group(
        "gloo", store=store, rank=ranks.rank, world_size=ranks.world_size,
        timeout=timedelta(seconds=SECONDS_TO_WAIT),
    )  # fmt: skip
    try:
        yield ranks
        dist.barrier()  # leave together
    except Exception as error:
        if _lost_a_rank(error):
            raise ConnectionError(_who_is_lost(ranks, store, error)) from None
        with contextlib.suppress(dist.DistError):
            store.set(f"failed/{ranks.rank}", str(error) or type(error).__name__)
        raise
    dist.destroy_process_group()  # of nccl, too


def _warn_of_copies() -> None:
    """Print a warning if srun has started several tasks, and each would train a run of its own."""
    num_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if num_tasks == "1" or os.environ.get("WORLD_SIZE"):
        return
    print(
        f"warning: srun has started {num_tasks} tasks, and each trains a run of its own: "
        f"start them with cluster/train_gpt2.sbatch to train one run, or set WORLD_SIZE=1 to train "
        f"several",
        file=sys.stderr,
        flush=True,
    )


def _lost_a_rank(error: Exception) -> bool:
    """Return whether an error of a collective operation says that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    # gloo's errors have no type of their own
    return type(error) is RuntimeError and "gloo" in str(error)


def _who_is_lost(ranks: Ranks, store: dist.Store, error: Exception) -> str:
    """Return one line that says which rank has failed, or does not answer."""
    remedy = "end all processes of the run, and resume it"
    others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
    end = time.monotonic() + SECONDS_TO_EXPLAIN
    failed: dict[int, str] = {}
    silent = others
    try:
        while silent and time.monotonic() < end:
            for rank in others:
                if rank not in failed and store.check([f"failed/{rank}"]):
                    failed[rank] = store.get(f"failed/{rank}").decode().splitlines()[0]
            # set after the reasons are read: the process with the store stays until then
            store.set(f"waiting/{ranks.rank}", "")
            silent = [
                rank
                for rank in others
                if rank not in failed and not store.check([f"waiting/{rank}"])
            ]
            time.sleep(0.1)
    except dist.DistError:  # rank 0 had the store
        silent = silent if failed else [0]
    if failed:
        rank, reason = min(failed.items())
        return f"rank {rank} has failed ({reason:.200}): {remedy}"
    if silent:
        numbers = ", ".join(map(str, silent))
        return f"rank {numbers} of {ranks.world_size} has ended or does not answer: {remedy}"
    reason = str(error).splitlines()[0]
    return f"the ranks have lost their connections to each other ({reason:.200}): {remedy}"


def _meet(ranks: Ranks) -> dist.Store:
    """Wait until all ranks have started; return the store through which they find each other."""
    address = os.environ["MASTER_ADDR"]
    port = _number_from_launcher("MASTER_PORT", 0)
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=SECONDS_TO_START)
    remedy = "start all processes of the run, or unset WORLD_SIZE to train in one"
    try:
        store: dist.Store = dist.TCPStore(
            address, port, ranks.world_size, timeout=timeout,
            is_master=ranks.is_first and not by_torchrun,  # torchrun has a store of its own
            wait_for_workers=False,  # the wait below names the missing rank
        )  # fmt: skip
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if "failed to listen" in reason:
            raise ConnectionError(
                f"rank 0 cannot listen at {address}:{port}, because another program does: choose "
                f"another MASTER_PORT"
            ) from None
        raise TimeoutError(
            f"rank {ranks.rank} does not reach rank 0 at {address}:{port} ({reason:.80}): {remedy}"
        ) from None
    # after a failure torchrun starts all processes again, with the same store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"train_gpt2/{attempt}", store)
    # torchrun may start a rank again under the same attempt
    if store.add(f"started/{ranks.rank}", 1) > 1 and not by_torchrun:
        raise ConnectionError(
            f"the run at {address}:{port} has a rank {ranks.rank} already: end its processes, or "
            f"choose another MASTER_PORT"
        )
    try:
        store.wait([f"started/{rank}" for rank in range(ranks.world_size)], timeout)
    except dist.DistError:
        missing = [
            str(rank) for rank in range(ranks.world_size) if not store.check([f"started/{rank}"])
        ]
        raise TimeoutError(
            f"rank {', '.join(missing)} of {ranks.world_size} (WORLD_SIZE) has not started within "
            f"{SECONDS_TO_START} seconds: {remedy}"
        ) from None
    return store


def check_gpus_differ(gpus: list[tuple[str, str]]) -> None:
    """Check that each rank has a GPU of its own: nccl would fail or hang.

    Args:
        gpus: Host name and GPU of each rank.

    Raises:
        ValueError: Two ranks share one GPU.
    """
    ranks_of_gpu: dict[tuple[str, str], list[int]] = {}
    for rank, gpu in enumerate(gpus):
        ranks_of_gpu.setdefault(gpu, []).append(rank)
    for (host, _), ranks in ranks_of_gpu.items():
        if len(ranks) > 1:
            raise ValueError(
                f"processes {', '.join(map(str, ranks))} share one GPU of {host}: start one "
                f"process per GPU, and leave the index out of --device"
            )
