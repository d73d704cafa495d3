"""bench/gpu.py runs at toy size on the CPU; tests/cuda/ needs real hardware."""

import pytest
from conftest import ROOT, run_script

from bench import gpu, train


def forked_process(command, cwd=ROOT):
    """Replace whole_process(): fork the measured process, which saves its imports."""
    result = run_script(*command[1:], cwd=cwd)
    assert result.returncode == 0, result.stderr
    return 1.0, 1, result.stdout


@pytest.mark.timeout(300)
def test_gpu_writes_its_section_at_toy_size(tmp_path, monkeypatch):
    text = tmp_path / "input.txt"
    text.write_text("to be, or not to be:\n\nthat is the question\n" * 200)
    for module in (gpu, train):
        monkeypatch.setattr(module, "whole_process", forked_process)
    results = tmp_path / "RESULTS.md"
    flags = ["--text", text, "--device", "cpu", "--toy", "--results", results]
    monkeypatch.setattr("sys.argv", ["gpu", *map(str, flags)])
    assert gpu.main() == 0
    section = results.read_text()
    assert "## One GPU, toy size" in section
    assert "| 2/2/16, 4 x 16, bytes | ours |" in section
    assert "1.47" in section
    assert "best validation, nats per byte" in section


def test_without_a_gpu_the_benchmark_is_an_error(driver, monkeypatch):
    driver(gpus=0)
    monkeypatch.setattr("sys.argv", ["gpu", "--text", "x"])
    with pytest.raises(ValueError, match="there is no NVIDIA GPU on this machine"):
        gpu.main()


def test_a_cpu_needs_the_flag_toy(monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--text", "x"])
    with pytest.raises(ValueError, match="--device cpu needs --toy"):
        gpu.main()
