import os
import signal

import pytest
import torch

from training.device import StopSignal, choose_compile, choose_device, choose_dtype, peak_flops


def test_under_torchrun_each_process_has_a_gpu_of_its_own(monkeypatch):
    """Also where a run is resumed whose rank 0 has saved its own cuda:0."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("cuda", "cuda:0"):
        assert choose_device(name) == "cuda:3"
    assert [str(device) for device in chosen] == ["cuda:3", "cuda:3"]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="no device 'cuda:4'"):
        choose_device("cuda")


def test_choices_by_flag_win():
    assert choose_device("cpu") == "cpu"
    assert choose_dtype("float32", "cuda") == "float32"
    assert choose_compile("true", "cpu", 0) and not choose_compile("false", "cuda", 1e20)
    assert not choose_compile("auto", "cpu", 1e12)  # a short run doesn't repay it


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_peak_is_that_of_the_very_device(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda", "bfloat16") == peak


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_is_kept_however_often_it_comes(signum):
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        assert stop.signum == 0
        for _ in range(3):
            os.kill(os.getpid(), signum)
        assert stop.signum == signum
    assert signal.getsignal(signum) is before


def test_a_persons_second_signal_acts_at_once(capfd):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        assert "once more stops at once" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
