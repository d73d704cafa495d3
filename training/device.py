"""Chooses what a run computes with: device, number type, compiler.

    device = choose_device("auto")              # cuda:0, else mps, else cpu
    dtype = choose_dtype("auto", device.value)  # bfloat16, float16 or float32
    print(device)                               # one line, with the reason

A choice that the user makes by name is kept or refused, never replaced.
"""

import contextlib
import functools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from common.malloc import M_MMAP_MAX, M_TRIM_THRESHOLD, set_malloc
from training.distributed import local_rank


@dataclass(frozen=True)
class Choice:
    """A value and, for people, why it was chosen: str() is one line."""

    name: str  # of the setting
    value: Any
    reason: str

    def __str__(self) -> str:
        value = str(self.value).removeprefix("torch.").lower()
        return f"{self.name} {value}: {self.reason}"


def choose_device(name: str) -> Choice:
    """Choose the device of this process and, for CUDA, make it the current one.

    A CUDA device always carries an index. A process takes GPU number local_rank() modulo the number
    of visible GPUs: under Slurm a task may see all GPUs of its node, or only its own.

    Args:
        name: "auto" (cuda, then mps, then cpu), "cpu", "mps", "cuda" or "cuda:N".

    Returns:
        A Choice whose value is a torch.device.

    Raises:
        ValueError: The machine does not have the device.
    """
    reason = "asked for by --device"
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        if num_gpus:
            name = "cuda"
            reason = "auto takes a CUDA GPU where there is one"
        elif has_mps:
            name = "mps"
            reason = "auto takes the Apple GPU where there is no CUDA GPU"
        else:
            name = "cpu"
            reason = "auto found neither a CUDA GPU nor an Apple GPU"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # an unknown name, refused below
    available = {"cpu": 1, "mps": int(has_mps), "cuda": num_gpus}.get(device.type, 0)
    if device.type == "cuda" and device.index is None and num_gpus:
        device = torch.device("cuda", local_rank() % num_gpus)
    if (device.index or 0) >= available:
        raise ValueError(
            f"--device {name}: this machine does not have it. Use --device auto, or one of "
            f"{', '.join(_available_devices(num_gpus, has_mps))}."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        reason += f" ({torch.cuda.get_device_name(device)})"
    return Choice("device", device, reason)


def _available_devices(num_gpus: int, has_mps: bool) -> list[str]:
    gpus = [f"cuda:{index}" for index in range(num_gpus)]
    return gpus + ["mps"] * has_mps + ["cpu"]


def choose_dtype(name: str, device: torch.device) -> Choice:
    """Choose the number type of matrix products; parameters are always float32.

    Args:
        name: "auto", "float32", "bfloat16" or "float16". "auto" is bfloat16 where the hardware has
            units for it, float16 on older CUDA GPUs, and float32 elsewhere. float16 needs a
            gradient scaler, which PyTorch has for CUDA and CPU.
        device: Device of the run.

    Returns:
        A Choice whose value is a torch.dtype.

    Raises:
        ValueError: The device has no gradient scaler for float16.
    """
    if name == "float16" and device.type == "mps":
        raise ValueError(
            "--dtype float16: PyTorch has no gradient scaler for mps. Use --dtype float32."
        )
    if name != "auto":
        dtype = getattr(torch, name)
        return Choice("dtype", dtype, "asked for by --dtype" + slow_dtype_remark(dtype, device))
    if device.type == "cuda":
        if has_bfloat16_units(device):
            return Choice("dtype", torch.bfloat16, "this GPU has bfloat16 units")
        reason = "this GPU has no bfloat16 units; gradients are scaled"
        return Choice("dtype", torch.float16, reason)
    if device.type == "cpu":
        if has_bfloat16_units(device):
            return Choice("dtype", torch.bfloat16, "this processor has bfloat16 instructions")
        reason = "this processor has no AVX-512 or AMX instructions for bfloat16"
        return Choice("dtype", torch.float32, reason)
    return Choice("dtype", torch.float32, "the number type that works on every Apple GPU")


def has_bfloat16_units(device: torch.device) -> bool:
    """Return whether a device has bfloat16 units: NVIDIA since Ampere, AMD GPUs, some CPUs."""
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _has_instructions(torch.bfloat16)


CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def _has_instructions(dtype: torch.dtype) -> bool:
    """Return whether this processor has instructions for products of a 16-bit type."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in CPU_INSTRUCTIONS[dtype])


def slow_dtype_remark(dtype: torch.dtype, device: torch.device) -> str:
    """Return what to add to a reason where a processor is slow with a number type, else ""."""
    if device.type != "cpu" or dtype not in CPU_INSTRUCTIONS or _has_instructions(dtype):
        return ""
    return (
        "; this processor has no AVX-512 or AMX instructions for it, and float32 can be ten times "
        "as fast"
    )


def choose_compile(name: str, device: torch.device, train_flops: float) -> Choice:
    """Choose whether torch.compile compiles the model.

    "auto" compiles on CUDA, and on a CPU for runs of more than 2e14 FLOPs: a shorter run does not
    save the half minute that compiling takes. Where a tiny function does not compile (no C
    compiler, no Triton, a GPU that Triton does not support, a cache folder that cannot be written),
    "auto" runs uncompiled.

    Args:
        name: "auto", "true" or "false".
        device: Device of the run.
        train_flops: FLOPs of the whole run.

    Returns:
        A Choice whose value is a bool.

    Raises:
        ValueError: `name` is "true", and a tiny function does not compile.
    """
    cache_failure = compile_cache_failure()
    if name == "false":
        return Choice("compile", False, "asked for by --compile")
    if name == "auto" and device.type == "mps":
        return Choice("compile", False, "torch.compile is not used on Apple GPUs")
    if name == "auto" and device.type == "cpu" and train_flops <= 2e14:
        return Choice("compile", False, "compiling takes longer than it saves on a short CPU run")
    failure = cache_failure or compile_failure(device)
    if failure and name == "true":
        raise ValueError(
            f"--compile true: torch.compile does not work here ({failure}). Leave out --compile to "
            f"train without it."
        )
    if failure:
        return Choice("compile", False, f"torch.compile does not work here ({failure})")
    reason = "asked for by --compile" if name == "true" else "a test function compiled"
    return Choice("compile", True, reason)


def compile_failure(device: torch.device) -> str:
    """Compile and run a tiny function, forward and backward.

    Returns:
        "" if the function compiles, else the reason in a few words.
    """
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        return "no C++ compiler was found"
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: (x.sin() * x).sum())(x).backward()
    except Exception as error:  # the compiler raises whatever it meets
        return _first_words(error)
    return ""


@functools.cache
def compile_cache_failure() -> str:
    """Return why the folder TORCHINDUCTOR_CACHE_DIR cannot be used, or "".

    PyTorch makes this folder whenever an optimizer is created, even if nothing is compiled, and
    fails if it cannot. A folder that cannot be used is therefore taken out of the environment.
    """
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not folder:
        return ""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        return f"TORCHINDUCTOR_CACHE_DIR {folder} cannot be written: {error.strerror}"


def flex_attention_failure(device: torch.device, head_size: int, dtype: torch.dtype) -> str:
    """Compile and run flex_attention once, forward and backward, on one block of tokens.

    Args:
        device: A CUDA device.
        head_size: Channels of an attention head.
        dtype: Number type of queries, keys and values.

    Returns:
        "" if flex_attention compiles, else the reason in a few words.
    """
    from torch.nn.attention.flex_attention import flex_attention

    from batches.block_mask import document_block_mask

    if head_size < 16:
        return "it needs heads of at least 16 channels"
    try:
        q = torch.ones(1, 1, 128, head_size, device=device, dtype=dtype, requires_grad=True)
        mask = document_block_mask(torch.zeros(1, 128, dtype=torch.int64, device=device))
        torch.compile(flex_attention)(q, q, q, block_mask=mask).sum().backward()
    except Exception as error:  # the compiler raises whatever it meets
        return _first_words(error)
    return ""


def _first_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]


# FLOP/s of dense bfloat16 matrix products, by the makers' data sheets. (Some sheets count zeros of
# sparse matrices: twice as much.) The first name that is part of the device's name counts.
PEAKS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A6000": 155e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "Tesla T4": 65e12, "Tesla V100-PCIE": 112e12, "Tesla V100": 125e12,
    "Tesla P100-PCIE": 18.7e12, "Tesla P100": 21.2e12,
}  # fmt: skip
NO_BFLOAT16 = ("Tesla T4", "Tesla V100", "Tesla P100")  # their peak is that of float16


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return a device's peak in FLOP/s, or None if the peak is unknown.

    PEAKS has the peaks of whole GPUs in their 16-bit type. The peak of a MIG slice is unknown: its
    name does not say reliably which part of the GPU it is.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name.split():
        return None
    for gpu_name, peak in PEAKS.items():
        if re.search(rf"\b{gpu_name}\b(?! (Ti|Laptop|D)\b)", name):
            half_types = {torch.float16, torch.bfloat16}
            if gpu_name.startswith(NO_BFLOAT16):
                half_types = {torch.float16}
            return peak if dtype in half_types else None
    return None


def total_memory(device: torch.device) -> float:
    """Return the bytes of memory of a device, used and free; math.inf if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return math.inf


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, to use it again.

    By default, glibc returns each large block to the kernel, which provides it again page by page
    in the next step. With GPT-2's vocabulary that is half of a step's time on a CPU
    (docs/design.md). Only glibc has these settings; other systems are left as they are.
    """
    set_malloc(M_MMAP_MAX, 0)  # a high M_MMAP_THRESHOLD would do, but older glibc refuses it
    set_malloc(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def memory_errors(flags: str) -> Iterator[None]:
    """Turn an out-of-memory error of the decorated function into a ValueError.

    Args:
        flags: The flags to lower, for the message.

    Raises:
        ValueError: The memory is not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        has_type = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        # the errors of CPU and mps have no type of their own
        messages = ("can't allocate memory", "MPS backend out of memory")
        if not has_type and not any(message in str(error) for message in messages):
            raise
        raise ValueError(f"out of memory: lower {flags}") from None


def move_to_device(tensors: tuple[torch.Tensor, ...], device: torch.device) -> tuple:
    """Return copies of CPU tensors on a device.

    Only copies from pinned memory to CUDA are asynchronous. From pageable memory to an Apple GPU,
    an asynchronous copy can silently give other values (pytorch#189690).
    """
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)
