"""What a launcher sets in the environment, and what a leftover of it may not do."""

import socket

import pytest
from conftest import TINY, assert_one_line_error, run_script

from training import distributed
from training.distributed import Ranks, is_first_rank, join_processes, launched_ranks, local_rank

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
