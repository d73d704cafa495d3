"""README's commands run in separate processes, on a real GPU and without a network."""

import os
import subprocess
import sys

import pytest
from conftest import DEAD_PROXY, ROOT

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(900)]
TEXT = "one for sorrow, two for mirth\n" * 2000
SMALL = ["--size", "tiny", "--max_steps", "20", "--eval_every", "10", "--log_every", "1"]


@pytest.fixture
def command(tmp_path, device):
    """A function command("train_gpt2.py", ...) that runs a script and returns its output."""

    def command(*arguments, start=(sys.executable,)) -> str:
        script = ROOT / arguments[0]
        result = subprocess.run(
            [*start, str(script), *map(str, arguments[1:])], cwd=tmp_path, text=True,
            capture_output=True, env=os.environ | DEAD_PROXY,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout

    return command


def test_preparing_training_and_sampling_succeed(command, device, tmp_path):
    """The test also resumes the run, scores its text and exports it for --init_from."""
    (tmp_path / "my.txt").write_text(TEXT)
    command("prepare_data.py", "--input", "my.txt", "--tokenizer", "bytes")
    on_device = (
        ["--device", "cpu"] if device.type == "cpu" else []
    )  # the default auto takes the GPU
    printed = command("train_gpt2.py", *SMALL, "--run_name", "mine", "--stop_at", 10, *on_device)
    assert f"device {device}" in printed
    assert "best validation" in command("train_gpt2.py", "--resume", "out/mine")
    sampling = ["--run", "out/mine", "--prompt", "one for", "--max_new_tokens", 50, *on_device]
    text = command("sample.py", *sampling)
    assert text.startswith("one for")
    assert command("sample.py", *sampling) == text  # the same seed
    page = (tmp_path / "out/mine/report.html").read_text()
    assert "cannot be scored" not in page and "<h3>Step 20</h3>" in page
    scored = command("sample.py", "--score", "my.txt", "--show", "--run", "out/mine", *on_device)
    assert "bits per byte" in scored
    assert (tmp_path / "out/mine/score.html").exists()
    command("sample.py", "--run", "out/mine", "--export", "exported", *on_device)
    tuning = ["--init_from", "exported", "--max_steps", 4, "--sequence_length", 32]
    assert "best validation" in command("train_gpt2.py", *tuning, *on_device)


def test_torchrun_with_one_process_trains(command, device, tmp_path):
    """The launcher's variables choose the GPU. One process joins no process group."""
    (tmp_path / "my.txt").write_text(TEXT)
    command("prepare_data.py", "--input", "my.txt", "--tokenizer", "bytes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "1"]
    on_device = ["--device", "cpu"] if device.type == "cpu" else []
    printed = command("train_gpt2.py", *SMALL, *on_device, start=torchrun)
    assert "best validation" in printed
