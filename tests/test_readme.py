"""Every command in the README, then those at the top of each script, run in their order, in a copy
of the repository and without a network."""

import ast
import os
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, run_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
for script in ("train_gpt2.py", "sample.py", "prepare_data.py"):  # and those at the top of a file
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8")))
    LINES += re.findall(r"^ *(python .*|torchrun --.*)", docstring, re.MULTILINE)
COMMANDS = [c.strip() for line in LINES for c in line.split("  #")[0].split("&&") if c.strip()]
COMMANDS = list(dict.fromkeys(COMMANDS))  # what is shown twice is run once
QUICK = "--max_steps 2 --eval_every 2 --device cpu --compile false"  # of two values the last counts
TINY = "--n_layer 1 --n_head 1 --n_embd 8 --batch_size 16 --sequence_length 16"


def shortened(command: str) -> str | None:
    """The command with flags that make it quick; None where something else runs it."""
    if command.startswith(("pip install", "pytest", "git clone", "cd ")):
        return None  # .ci/run has them; they made this copy
    if command.startswith(("source cluster/", "sbatch")):
        return None  # test_slurm.py has them
    if command.startswith("python -m bench."):
        return None  # test_bench.py has them
    if command == "torchrun --standalone --nproc_per_node 2 train_gpt2.py":
        return None  # the README has it with one flag more
    if "--init_from gpt2" in command:
        return None  # test_pretrained.py has a hub for them
    if "train_gpt2.py" in command:
        return f"{command} {QUICK}" + (f" {TINY}" if "--resume" not in command else "")
    return command


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files, with what the README supposes a reader to have."""
    folder = tmp_path_factory.mktemp("readme")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    if not files:
        pytest.skip("not a git checkout: which files belong to it is not known")
    for name in files.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "my.txt").write_text("some text of my own, line by line\n" * 100)
    text = os.environ.get("TINYSHAKESPEARE")
    if text:  # as if downloaded
        (folder / "data" / "tinyshakespeare").mkdir(parents=True)
        shutil.copy(text, folder / "data" / "tinyshakespeare" / "input.txt")
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if shortened(c)])
def test_command(copy, command):
    needs_vocabulary = "--input" in command and "bytes" not in command
    needs_text = "bytes" in command and "--input" not in command
    if (needs_vocabulary or needs_text) and "TINYSHAKESPEARE" not in os.environ:
        pytest.skip("TINYSHAKESPEARE and TIKTOKEN_CACHE_DIR are not set, and there is no network")
    program, *argv = shlex.split(shortened(command))
    script = copy / argv.pop(0) if program == "python" else "torch.distributed.run"
    result = run_script(script, *argv, cwd=copy)
    assert result.returncode == 0, result.stderr


def test_the_files_it_names_are_there():
    names = re.findall(r"\]\(([^)#:]+)\)|`([\w/.]+\.(?:py|md|txt|toml|sbatch))`", README)
    for name in {a or b for a, b in names} - {"my.txt", "sample.txt"}:
        assert (ROOT / name).exists(), name
