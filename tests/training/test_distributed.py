"""Launchers, and what happens if the ranks of a run disagree or lose each other."""

import os
import re
import shutil
import signal
import socket
import time

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, losses, make_corpus, run_script
from processes import start_script

from training import distributed
from training.checkpoint import load_checkpoint
from training.distributed import Ranks, is_first_rank, join_processes, launched_ranks, local_rank
from training.json_lines import read_lines

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def launcher(monkeypatch):
    """launcher(RANK="0") sets the variables of a launcher, and no others."""

    def launcher(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launcher


@pytest.fixture
def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_without_a_launcher_there_is_one_process(launcher):
    for value in (None, "", " "):
        launcher(**({} if value is None else dict.fromkeys(VARIABLES, value)))
        assert launched_ranks() == Ranks(0, 1)
        assert local_rank() == 0
        assert is_first_rank()
    launcher(RANK="3")  # a leftover of another shell: without WORLD_SIZE, this process is alone
    assert launched_ranks() == Ranks(0, 1)
    assert is_first_rank()


def test_the_variables_of_a_launcher(launcher):
    launcher(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")
    assert launched_ranks() == Ranks(1, 4)
    assert local_rank() == 1
    assert not is_first_rank()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "1.5", "-1", "²"])
def test_a_value_that_is_not_a_number(launcher, name, value):
    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    launcher(**variables | {name: value})
    with pytest.raises(ValueError, match=f"environment variable {name} is '{value}', not a number"):
        local_rank()
        launched_ranks()


def test_a_rank_beyond_the_number_of_processes(launcher):
    launcher(RANK="2", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1")
    with pytest.raises(ValueError, match="RANK is 2, but WORLD_SIZE is 2"):
        launched_ranks()


def test_a_leftover_world_size_is_one_line(rhyme, tmp_path):
    flags = [str(part) for name, value in TINY.items() for part in (f"--{name}", value)]
    leftover = dict.fromkeys(VARIABLES, "") | {"WORLD_SIZE": "2"}
    result = run_script("train_gpt2.py", *flags, cwd=tmp_path, env=leftover)
    assert_one_line_error(
        result, "WORLD_SIZE is 2", "RANK and MASTER_ADDR and MASTER_PORT are not set", "unset"
    )
    assert not (tmp_path / "out").exists()


def test_a_missing_rank_is_named(launcher, free_port, monkeypatch):
    monkeypatch.setattr(distributed, "SECONDS_TO_START", 1)
    address = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    launcher(RANK="0", **address)
    with pytest.raises(TimeoutError, match=r"rank 1, 2 of 3 \(WORLD_SIZE\) has not started"):
        join_processes().__enter__()
    launcher(RANK="1", **address)
    with pytest.raises(TimeoutError, match=f"rank 1 does not reach rank 0 at .*:{free_port}"):
        join_processes().__enter__()


def test_a_port_in_use_and_a_second_process_of_a_rank_are_refused(launcher, monkeypatch):
    """Two runs with one port: the second run neither waits nor disturbs the first one."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    launcher(RANK="0", **address)
    with pytest.raises(ConnectionError, match=r"cannot listen at .*choose another MASTER_PORT"):
        join_processes().__enter__()
    torch.distributed.PrefixStore("train_gpt2/0", store).add("started/1", 1)
    launcher(RANK="1", **address)
    with pytest.raises(ConnectionError, match=r"has a rank 1 already: .* another MASTER_PORT"):
        join_processes().__enter__()


def test_tasks_of_srun_that_train_a_run_each_print_a_warning(launcher, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    launcher()
    with join_processes() as ranks:
        assert ranks == Ranks(0, 1)
    assert "srun has started 4 tasks, and each trains a run of its own" in capsys.readouterr().err
    launcher(WORLD_SIZE="1")  # several runs are meant
    with join_processes():
        assert capsys.readouterr().err == ""


def start_ranks(folder, script, *argv, separate=False) -> list:
    """Start two processes of one run, each with its streams in rank-0/ or rank-1/.

    Args:
        folder: Working directory, unless `separate`.
        script: Path of the script.
        *argv: Flags of the script.
        separate: Whether each rank works in its rank-N/, as if on a disk of its own.

    Returns:
        The processes, each with `store`, the store of the launcher.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": 2}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    processes = []
    for rank in range(2):
        streams = folder / f"rank-{rank}"
        streams.mkdir(exist_ok=True)
        variables |= {"RANK": rank, "LOCAL_RANK": rank}
        env = os.environ | {name: str(value) for name, value in variables.items()}
        cwd = streams if separate else folder
        process = start_script(script, *argv, cwd=cwd, streams=streams, env=env)
        process.store = store
        processes.append(process)
    return processes


def errors_of(folder, processes) -> list[str]:
    """Wait for the ranks; return the last line of each one's standard error, or ""."""
    lines = []
    for rank, process in enumerate(processes):
        process.join(60)
        assert process.exitcode is not None, f"rank {rank} waits for ever"
        err = (folder / f"rank-{rank}" / "err.txt").read_text()
        assert "Traceback" not in err, err
        # torch's warning about a machine that has no name resolution
        err = re.sub(r"\[W.*hostname of the client socket cannot be retrieved.*\n", "", err)
        lines.append((err.splitlines() or [""])[-1])
    return lines


@pytest.fixture
def two_disks(train, tmp_path):
    """The folders rank-0/ and rank-1/, each with the corpus and a run, saved at steps 2 and 4."""
    train(max_steps=6, run_name="run", stop_at=2)
    train(resume="out/run", stop_at=4)
    for rank in range(2):
        for name in ("data", "out"):
            shutil.copytree(tmp_path / name, tmp_path / f"rank-{rank}" / name)
    return [tmp_path / f"rank-{rank}" for rank in range(2)]


def damage(disk):
    path = disk / "out/run/last.pt"
    path.write_bytes(path.read_bytes()[:-100])


DISAGREEMENTS = {  # case -> how the disk of rank 1 becomes another one, the error of both ranks
    "damaged": (damage, "error: rank 1: out/run/last.pt is not a readable checkpoint"),
    "missing": (
        lambda disk: shutil.rmtree(disk / "out/run"),
        "error: rank 1: out/run/last.pt does not exist: there is no folder out/run",
    ),
    "older": (
        lambda disk: os.replace(disk / "out/run/previous.pt", disk / "out/run/last.pt"),
        "error: rank 1: out/run/last.pt differs from the checkpoint of rank 0: copy",
    ),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_ranks_with_different_checkpoints_do_not_start(two_disks, tmp_path, case):
    change, expected = DISAGREEMENTS[case]
    change(two_disks[1])
    flags = ["--resume", "auto", "--run_name", "run"]
    ranks = start_ranks(tmp_path, ROOT / "train_gpt2.py", *flags, separate=True)
    for line in errors_of(tmp_path, ranks):
        assert line.startswith(expected)
    assert [rank.exitcode for rank in ranks] == [1, 1]


def test_all_ranks_load_the_checkpoint_that_rank_0_chooses(two_disks, tmp_path):
    damage(two_disks[0])
    flags = ["--resume", "out/run", "--stop_at", "5"]
    ranks = start_ranks(tmp_path, ROOT / "train_gpt2.py", *flags, separate=True)
    assert errors_of(tmp_path, ranks) == ["", ""]
    assert "continuing from the checkpoint before it" in (two_disks[0] / "out.txt").read_text()
    assert list(losses(two_disks[0] / "out/run")) == [1, 2, 3, 4, 5]
    assert load_checkpoint(two_disks[1] / "out/run/last.pt")["step"] == 4  # rank 0 alone writes


def test_ranks_with_different_corpora_do_not_start(two_disks, tmp_path):
    make_corpus(two_disks[1] / "data/rhyme", ["one for silver, two for gold\n" * 180])
    flags = [str(part) for name, value in TINY.items() for part in (f"--{name}", value)]
    ranks = start_ranks(tmp_path, ROOT / "train_gpt2.py", *flags, separate=True)
    for line in errors_of(tmp_path, ranks):
        assert line.startswith("error: rank 1 has corpus_checksum ")


def test_ranks_with_different_flags_do_not_start(rhyme, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import os, runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.argv += ['--learning_rate', '0.0' + os.environ['RANK'] + '1']\n"
        f"runpy.run_path({str(ROOT / 'train_gpt2.py')!r}, run_name='__main__')"
    )
    flags = [str(part) for name, value in TINY.items() for part in (f"--{name}", value)]
    for line in errors_of(tmp_path, start_ranks(tmp_path, script, *flags)):
        assert line.startswith("error: rank 1 has learning_rate 0.011, and rank 0 has 0.001: ")
    assert not list(tmp_path.glob("out/*"))


LOOP = """
import os, signal, sys
sys.path.insert(0, ROOT)
from common.script import run_script
from training import distributed, signals
from training.signals import StopSignal

signals.SECONDS_TO_END = 1
distributed.SECONDS_TO_EXPLAIN = 1
distributed.SECONDS_TO_WAIT = float(os.environ.get("SECONDS_TO_WAIT", "60"))

def main():
    with distributed.join_processes() as ranks, StopSignal() as stop:
        for step in range(3):
            ranks.max(step)
        if not ranks.is_first:
            fault = sys.argv[1]
            if fault == "error":
                raise ValueError("no room for its numbers")
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        open("waits", "w").close()
        ranks.max(3)

run_script(main)
"""


@pytest.fixture
def loop(tmp_path):
    path = tmp_path / "loop.py"
    path.write_text(f"ROOT = {str(ROOT)!r}\n" + LOOP)
    return path


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("error", "rank 1 has failed (no room for its numbers): end all"),
        ("kill", "rank 1 of 2 has ended or does not answer: end all"),
        ("stop", "rank 1 of 2 has ended or does not answer: end all"),
    ],
)
def test_a_rank_that_is_lost_is_named(loop, tmp_path, monkeypatch, fault, reason):
    monkeypatch.setenv("SECONDS_TO_WAIT", "2")
    first, second = start_ranks(tmp_path, loop, fault)
    assert errors_of(tmp_path, [first])[0].startswith(f"error: {reason}")
    assert first.exitcode == 1
    second.kill()
    second.join()


def test_a_rank_that_is_killed_while_it_trains_is_named(rhyme, tmp_path):
    flags = TINY | {"max_steps": 100_000, "run_name": "run", "micro_batch_size": 1}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    first, second = start_ranks(tmp_path, ROOT / "train_gpt2.py", *argv)
    while len(read_lines(tmp_path / "out/run/metrics.jsonl")) < 3:
        assert first.is_alive()
        time.sleep(0.05)
    second.kill()
    line = errors_of(tmp_path, [first])[0]
    assert line.startswith("error: rank 1 of 2 has ended or does not answer: end all processes")
    assert first.exitcode == 1


@pytest.mark.parametrize("signums", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_a_signal_ends_a_rank_that_waits_for_another(loop, tmp_path, signums):
    first, second = start_ranks(tmp_path, loop, "stop")
    while not (tmp_path / "waits").exists():
        assert first.is_alive()
        time.sleep(0.05)
    time.sleep(1.5)  # a second Ctrl-C is for a rank that waits for more than a second
    for signum in signums:
        os.kill(first.pid, signum)
        time.sleep(0.2)
    line = errors_of(tmp_path, [first])[0]
    assert line == "error: another rank does not answer: ended without a checkpoint"
    assert first.exitcode == 128 + signums[0]
    second.kill()
    second.join()


def test_a_sum_leaves_its_tensor_as_it_is(loop, tmp_path):
    loop.write_text(
        loop.read_text()
        .replace("ranks.max(3)", "t = torch.ones(2); print(ranks.sum(t), t)")
        .replace("import os,", "import torch, os,")
        .replace("if not ranks.is_first", "if False")
    )
    ranks = start_ranks(tmp_path, loop, "none")
    assert errors_of(tmp_path, ranks) == ["", ""]
    out = (tmp_path / "rank-1" / "out.txt").read_text()
    assert out == "tensor([2., 2.]) tensor([1., 1.])\n"
