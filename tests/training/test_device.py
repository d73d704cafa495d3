"""Choices of device, dtype and compiler: the real functions above a fake of the driver."""

import platform
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, make_corpus, run_script

from model import GPT, GPTConfig
from training import device as device_module
from training.compute import why_no_flex_attention
from training.device import (
    choose_compile,
    choose_device,
    choose_dtype,
    compile_cache_failure,
    compile_failure,
    flex_attention_failure,
    move_to_device,
    peak_flops,
    total_memory,
)
from training.distributed import check_gpus_differ

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


def test_a_cuda_device_has_an_index(driver):
    """torch.cuda.set_device raises an error for torch.device("cuda")."""
    driver(gpus=2)
    for name in ("auto", "cuda"):
        choice = choose_device(name)
        assert choice.value == torch.device("cuda", 0)
    assert choose_device("cuda:1").value == torch.device("cuda", 1)
    assert driver.current == [0, 0, 1]
    assert str(choice) == "device cuda:0: asked for by --device (NVIDIA H100 80GB HBM3)"


@pytest.mark.parametrize(
    "gpus, local_rank, index",
    [(8, 3, 3), (4, 3, 3), (1, 3, 0), (1, 7, 0), (2, 3, 1)],
)
def test_each_process_of_a_node_takes_its_gpu(driver, monkeypatch, gpus, local_rank, index):
    """A Slurm task sees all GPUs of its node, or one GPU with --gpus-per-task=1."""
    driver(gpus=gpus)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    for name in ("auto", "cuda"):
        assert choose_device(name).value == torch.device("cuda", index)
    assert choose_device("cuda:0").value == torch.device("cuda", 0)  # by name
    assert driver.current == [index, index, 0]


def test_processes_that_share_a_gpu_are_refused():
    check_gpus_differ([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")])
    with pytest.raises(ValueError, match="processes 1, 2 share one GPU of b"):
        check_gpus_differ([("a", "1"), ("b", "1"), ("b", "1")])


def test_a_missing_device_is_an_error(driver):
    for name in ("cuda", "cuda:0", "mps", "abacus", "cpu:1", "xpu"):
        with pytest.raises(ValueError, match=f"--device {name}: this machine does not have it"):
            choose_device(name)
    driver(gpus=2)
    with pytest.raises(ValueError, match="one of cuda:0, cuda:1, cpu"):
        choose_device("cuda:2")


def test_auto_takes_cuda_then_mps_then_cpu(driver, monkeypatch):
    is_available = torch.backends.mps.is_available  # cached
    is_available.cache_clear()
    assert choose_device("auto").value == CPU
    is_available.cache_clear()
    # the question that PyTorch asks the C library, as on a Mac with an Apple GPU
    monkeypatch.setattr(torch._C, "_mps_is_available", lambda: True)
    assert choose_device("auto").value == torch.device("mps")
    driver(gpus=1)
    assert choose_device("auto").value == CUDA
    is_available.cache_clear()


@pytest.mark.parametrize(
    "name, capability, dtype",
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), torch.bfloat16),
        ("NVIDIA A100-SXM4-80GB", (8, 0), torch.bfloat16),
        ("Tesla T4", (7, 5), torch.float16),
        ("Tesla V100-SXM2-16GB", (7, 0), torch.float16),
        ("Tesla P100-PCIE-16GB", (6, 0), torch.float16),
    ],
)
def test_auto_takes_the_fastest_dtype_of_a_gpu(driver, name, capability, dtype):
    driver(gpus=1, name=name, capability=capability)
    assert choose_dtype("auto", CUDA).value == dtype
    assert choose_dtype("float32", CUDA).value == torch.float32  # by name
    assert choose_dtype("float16", CUDA).value == torch.float16


def test_auto_takes_the_dtype_of_a_cpu_or_mps(processor):
    for instructions, dtype in (("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)):
        processor(instructions)
        assert choose_dtype("auto", CPU).value == dtype
    mps = torch.device("mps")
    assert choose_dtype("auto", mps).value == torch.float32
    with pytest.raises(ValueError, match="float16: PyTorch has no gradient scaler for mps"):
        choose_dtype("float16", mps)


def test_a_16_bit_type_that_a_processor_lacks_is_kept_with_a_remark(processor):
    remark = "no AVX-512 or AMX instructions for it, and float32 can be ten times as fast"
    for capability in ("avx2", "avx512_bf16", "avx512_fp16"):
        processor(capability)
        for name, instructions in (("bfloat16", "avx512_bf16"), ("float16", "avx512_fp16")):
            choice = choose_dtype(name, CPU)
            assert choice.value == getattr(torch, name)
            assert (remark in choice.reason) == (capability != instructions)
        assert choose_dtype("float32", CPU).reason == "asked for by --dtype"
    assert choose_dtype("bfloat16", CUDA).reason == "asked for by --dtype"


def test_a_run_resumed_on_an_older_processor_says_that_it_is_slow(train, processor, capsys):
    processor("avx512_bf16")
    train(max_steps=4, stop_at=2, dtype="auto", run_name="mine")
    processor("avx2")
    capsys.readouterr()
    train(resume="out/mine")
    assert "dtype bfloat16: as in the checkpoint; this processor has no" in capsys.readouterr().out


def test_auto_compiles_where_compilation_pays(monkeypatch):
    mps = torch.device("mps")
    assert not choose_compile("false", CUDA, 1e20).value
    assert not choose_compile(
        "auto", CPU, 1e12
    ).value  # compilation takes longer than a short run saves
    assert not choose_compile("auto", mps, 1e20).value
    monkeypatch.setattr(device_module, "compile_failure", lambda device: "")
    assert choose_compile("auto", CPU, 1e15).value
    assert choose_compile("true", CPU, 0).value


def test_without_a_working_compiler_auto_does_not_compile_and_true_is_an_error(
    monkeypatch, tmp_path
):
    """The compiler is missing or broken; the reason is one line."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    for compiler in ("no-such-compiler", str(broken)):
        code = (
            "import torch\n"
            "from training.device import choose_compile\n"
            "cpu = torch.device('cpu')\n"
            "print(choose_compile('auto', cpu, 1e20))\n"
            "try:\n"
            "    choose_compile('true', cpu, 0)\n"
            "except ValueError as error:\n"
            "    print(error)\n"
        )
        env = {"CXX": compiler, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        first, second = result.stdout.splitlines()
        assert first.startswith("compile false: torch.compile does not work here ("), first
        assert second.startswith("--compile true: torch.compile does not work here ("), second
        assert "Traceback" not in result.stderr


def test_a_compile_cache_that_cannot_be_written(rhyme, tmp_path):
    """A file, and a folder that nobody may write: auto trains uncompiled, true is refused."""
    taken = tmp_path / "taken"
    taken.write_text("")
    flags = [str(item) for name, value in TINY.items() for item in (f"--{name}", value)]
    flags += ["--max_steps", "2"]
    for folder in (taken, "/proc/self"):
        env = {"TORCHINDUCTOR_CACHE_DIR": str(folder)}
        result = run_script("train_gpt2.py", *flags, cwd=tmp_path, env=env)
        assert (result.returncode, result.stderr) == (0, "")
        assert "compile false: " in result.stdout
        result = run_script("train_gpt2.py", *flags, "--compile", "true", cwd=tmp_path, env=env)
        assert_one_line_error(result, f"TORCHINDUCTOR_CACHE_DIR {folder} cannot be written")


def test_a_compile_cache_of_a_long_run_is_reported(monkeypatch, tmp_path):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "taken"))
    compile_cache_failure.cache_clear()
    choice = choose_compile("auto", CPU, 1e20)
    compile_cache_failure.cache_clear()
    assert not choice.value
    assert "(TORCHINDUCTOR_CACHE_DIR" in str(choice) and "cannot be written" in str(choice)


def test_a_working_compiler_has_no_failure():
    if not shutil.which("c++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    assert compile_failure(CPU) == ""


def test_flex_attention_fails_for_small_heads():
    assert "at least 16 channels" in flex_attention_failure(CUDA, 8, torch.float32)


@pytest.mark.parametrize(
    "name, dtype, peak",
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H200 NVL", torch.bfloat16, 835e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", torch.bfloat16, None),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165e12),
        ("Tesla T4", torch.float16, 65e12),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("NVIDIA L40", torch.bfloat16, None),
        ("NVIDIA GB200", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16, None),
    ],
)
def test_the_peak_belongs_to_the_exact_name_of_a_gpu(driver, name, dtype, peak):
    driver(gpus=1, name=name)
    assert peak_flops(CUDA, dtype) == peak
    assert peak_flops(CPU, dtype) is None


def test_total_memory_of_a_gpu_and_a_cpu(driver):
    driver(gpus=1)
    assert total_memory(CUDA) == 80e9
    assert total_memory(CPU) > 1e8


def test_only_copies_to_cuda_are_pinned_and_non_blocking():
    copies = []

    class Recorded:
        pinned = False

        def pin_memory(self):
            other = Recorded()
            other.pinned = True
            return other

        def to(self, device, non_blocking=False):
            copies.append((device.type, self.pinned, non_blocking))

    for name in ("cuda:0", "mps", "cpu"):
        move_to_device((Recorded(),), torch.device(name))
    assert copies == [("cuda", True, True), ("mps", False, False), ("cpu", False, False)]


def test_a_cpu_run_on_a_machine_with_a_gpu_makes_no_cuda_context(driver, train):
    """No part of the run uses the driver, also not for pinned memory."""
    driver(gpus=1)
    train(max_steps=2)
    assert driver.current == []
    assert driver.initialized == 0


@pytest.mark.parametrize(
    "device, compiled, dropout, n_head, reason",
    [
        (CPU, True, 0.0, 2, "flex_attention does not train on cpu"),
        (torch.device("mps"), False, 0.0, 2, "flex_attention does not train on mps"),
        (CUDA, False, 0.0, 2, "nothing is compiled"),  # --compile false compiles nothing
        (CUDA, True, 0.1, 2, "flex_attention has no dropout"),
        (CUDA, True, 0.0, 4, "it needs heads of at least 16 channels"),
    ],
)
def test_the_reason_for_the_dense_mask(device, compiled, dropout, n_head, reason):
    model = GPT(GPTConfig(31, 16, 1, n_head, 32, dropout=dropout))
    found = why_no_flex_attention(device, torch.float32, compiled, model)
    assert found == reason


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_used_again():
    """The kernel provides the pages of a large tensor once, not each time it is created."""
    code = """
import resource
import torch
from training.device import keep_freed_memory

keep_freed_memory()
num_faults = []
for _ in range(40):
    torch.ones(25_000_000)  # 100 MB: 24,415 pages
    num_faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
assert num_faults[-1] - num_faults[19] < 20 * 1000, num_faults
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_memory_does_not_grow_with_the_batches_of_a_validation(tmp_path):
    """The logits of a batch lie where those of the batch before lay. They once took 7 GB."""
    make_corpus(tmp_path / "corpus", ["to be, or not to be\n" * 5200])  # 10,240 tokens in val
    code = """
import resource
import sys

import torch

from dataset import create_dataloaders
from train_gpt2 import evaluate
from training.compute import ComputeChoices
from training.device import keep_freed_memory
from training.distributed import Ranks


class LargeLogits(torch.nn.Module):
    # without weights or gradients: nothing but the losses lies between the logits

    def forward(self, x, y, reduction):
        logits = torch.ones(x.numel(), 50_000, dtype=torch.bfloat16)
        return None, torch.nn.functional.cross_entropy(logits.float(), y.flatten(), reduction="sum")


keep_freed_memory()
_, val_loader = create_dataloaders(sys.argv[1], sequence_length=64, batch_size=4)
compute = ComputeChoices(
    device=torch.device("cpu"), dtype=torch.bfloat16, compile=False, micro_batch_size=4,
    separate_documents=False, flex_attention=False, eot_token=256, flops_per_token=1, peak=None,
    lines=(),
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
evaluate(LargeLogits(), val_loader, compute, Ranks())
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 500_000, f"{grown} kB for batches with 51 MB of logits"
"""
    command = [sys.executable, "-c", code, tmp_path / "corpus"]
    subprocess.run(command, cwd=ROOT, check=True)
