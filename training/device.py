"""What the machine can do: device, number type, compiler, other processes, signals."""

import contextlib
import importlib.util
import math
import os
import re
import shutil
import signal

import torch
import torch.distributed as dist


def choose_device(name: str) -> str:
    """ "auto" is cuda when there, else cpu. Under torchrun each process has a GPU of its own.

    Raises ValueError for a device that isn't there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:  # whichever rank 0 had and saved
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        there = {
            "cpu": 1,
            "cuda": torch.cuda.device_count(),
            "mps": int(torch.backends.mps.is_available()),
        }.get(device.type, 0)
    except RuntimeError:
        there, device = 0, torch.device("cpu")
    if (device.index or 0) >= there:
        raise ValueError(f"there is no device {name!r} here; --device auto takes what there is")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return name


def choose_dtype(name: str, device: str) -> str:
    """ "auto" is bfloat16 where the processor multiplies in it, and float32 elsewhere, where it
    would be emulated, a hundred times slower."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features = torch.cpu.get_capabilities()
    bfloat16 = features.get("avx512_bf16") or features.get("amx_bf16")
    return "bfloat16" if device == "cpu" and bfloat16 else "float32"


def choose_compile(name: str, device: str, flops: float) -> bool:
    """ "auto" compiles on cuda where Triton is installed, and on a CPU that has a C++ compiler and
    so many FLOPs of training before it that half a minute of compiling is repaid."""
    if name != "auto":
        return name == "true"
    if device == "cpu":
        return flops > 2e14 and shutil.which(os.environ.get("CXX", "c++")) is not None
    return device.startswith("cuda") and importlib.util.find_spec("triton") is not None


# FLOP/s of dense bfloat16 matrix products, by the makers' data sheets. (Some sheets count zeros of
# sparse matrices: twice as much.) The first name that is part of the device's own counts.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A6000": 155e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def peak_flops(device: str, dtype: str) -> float | None:
    """Of one device, FLOP/s; None where it isn't known, or numbers aren't bfloat16."""
    if not device.startswith("cuda") or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    known = (of for of in PEAKS if re.search(rf"\b{of}\b(?! (Ti|Laptop))", name))
    return PEAKS.get(next(known, None))


def memory(device: str) -> float:
    """Bytes of it, taken and free; math.inf where that can't be asked for."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return math.inf


@contextlib.contextmanager
def memory_errors(flags: str):
    """Around a function: to run out of memory is a ValueError that names the flags to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not told and "can't allocate memory" not in str(error):  # the CPU's has no type
            raise
        raise ValueError(f"out of memory: lower {flags}") from None


@contextlib.contextmanager
def join_processes(device: str):
    """(rank, world_size); under torchrun, joined to the other processes."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield rank, world_size
        return
    if device.startswith("cuda"):
        # gloo carries what lies in main memory, such as a flag no one should wait on a GPU for
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    yield rank, world_size
    dist.barrier()  # leave together
    dist.destroy_process_group()


class StopSignal:
    """Within its block, a SIGINT, SIGTERM or SIGUSR1 is only kept, in `signum`. A second SIGINT,
    which a person sends, acts as if there were no block; schedulers and torchrun repeat theirs, to
    the same process, and have SIGKILL for what is urgent."""

    def __enter__(self):
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self.signum = 0
        self.before = {s: signal.signal(s, self.keep) for s in (getattr(signal, n) for n in names)}
        return self

    def __exit__(self, *error):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def keep(self, signum, frame):
        again = b"; once more stops at once" if signum == signal.SIGINT else b""
        if not self.signum and os.environ.get("RANK", "0") == "0":
            # not print, which a signal may find in the middle of another print
            os.write(2, b"\nstopping after this step" + again + b"\n")
        if again:
            signal.signal(signum, self.before[signum])
        self.signum = signum
