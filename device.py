"""What the machine can do: device, number type, compiler, other processes."""

import contextlib
import os
import shutil

import torch
import torch.distributed as dist


def choose_device(name: str) -> str:
    """ "auto" is cuda when there, else cpu. Raises ValueError for a device that isn't there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return name


def choose_dtype(name: str, device: str) -> str:
    """ "auto" is bfloat16 where the processor multiplies in it, and float32 elsewhere, where it
    would be emulated, a hundred times slower."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 can't tell: float32
    bfloat16 = features.get("avx512_bf16") or features.get("amx_bf16")
    return "bfloat16" if device == "cpu" and bfloat16 else "float32"


def choose_compile(name: str, device: str, flops: float) -> bool:
    """ "auto" compiles on cuda, and on a CPU that has a C++ compiler and a training run of so many
    FLOPs before it that half a minute of compiling is repaid."""
    if name != "auto":
        return name == "true"
    if device == "cpu":
        return flops > 2e14 and shutil.which(os.environ.get("CXX", "c++")) is not None
    return device.startswith("cuda")


@contextlib.contextmanager
def join_processes(device: str):
    """(rank, world_size, device); under torchrun, joined to the other processes, each on a GPU of
    its own where device is cuda."""
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield rank, world_size, torch.device(device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # gloo carries what lies in main memory, such as a flag that no one should wait on a GPU for
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    yield rank, world_size, torch.device(device)
    dist.barrier()  # leave together: gloo aborts a process that leaves while another is still busy
    dist.destroy_process_group()
