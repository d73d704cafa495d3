"""cluster/*.sbatch run as jobs of a real Slurm, and --engine ray and --part run without Slurm.

Tests that need Slurm skip without it; .ci/run starts Slurm on one machine.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_line_error, run_script

import prepare_data
from training.checkpoint import load_checkpoint
from training.json_lines import read_lines

pytestmark = pytest.mark.timeout(300)
NUM_TASKS = 6
FILES = ("train.bin", "val.bin", "metadata.json")


@pytest.fixture(scope="session")
def slurm():
    """The environment of jobs; the test skips without Slurm."""
    if not shutil.which("sbatch"):
        pytest.skip("sbatch is not installed")
    nodes = subprocess.run(["sinfo", "-h", "-o", "%D %t"], capture_output=True, text=True)
    if nodes.returncode:
        pytest.skip(f"no Slurm answers: {nodes.stderr.splitlines()[-1:]}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    """The path of 11 MB of short documents: 6 tasks, three seconds of work for one core."""
    path = tmp_path_factory.mktemp("raw") / "raw.jsonl"
    path.write_text("".join(f'{{"text":"{i}"}}\n' for i in range(600_000)))
    return path


@pytest.fixture(scope="session")
def expected(raw) -> dict:
    """The files of the corpus that one process prepares from `raw`."""
    prepare(raw, "--workers", 1)
    return files(raw)


def flags(raw, *more):
    """Return flags for the corpus data/c beside `raw`; metadata.json has relative paths."""
    common = ["--input", raw, "--tokenizer", "bytes", "--data_dir", raw.parent / "data"]
    return [str(flag) for flag in [*common, "--corpus", "c", *more]]


def prepare(raw, *more):
    """Run prepare_data.py and return its output."""
    result = run_script("prepare_data.py", *flags(raw, *more), cwd=raw.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def files(raw) -> dict:
    return {name: (raw.parent / "data" / "c" / name).read_bytes() for name in FILES}


@pytest.fixture
def sbatch(slurm, tmp_path):
    """A function sbatch(OPTION..., SCRIPT, FLAG...) that submits a job and returns its id.

    The output of the job goes to tmp_path.
    """
    ids = []

    def submit(*command, out="%j"):
        script = "source cluster/settings.sh && exec sbatch --parsable " + '"$@"'
        result = subprocess.run(
            ["bash", "-c", script, "bash", "-o", tmp_path / out, *map(str, command)],
            cwd=ROOT, env=slurm, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        ids.append(result.stdout.strip())
        return ids[-1]

    yield submit
    subprocess.run(["scancel", *ids], capture_output=True)


@pytest.fixture
def job(sbatch, raw, tmp_path):
    """A function job(OPTION..., SCRIPT) that submits a job for a copy of `raw`."""
    copy = tmp_path / "raw.jsonl"
    shutil.copy2(raw, copy)  # with its modification time, which metadata.json contains

    def submit(*command, out="%j"):
        return sbatch(*command, *flags(copy), out=out)

    submit.raw = copy
    return submit


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_end(job_id) -> str:
    """Wait for the end of a job; return its state and exit code."""

    def states():
        shown = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True)
        return set(re.findall(r"JobState=(\w+)(?:.*\n)*?.* ExitCode=(\S+)", shown.stdout))

    under_way = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}
    wait_for(lambda: states() and not under_way & {state for state, _ in states()})
    return ", ".join(" ".join(state) for state in sorted(states()))


@pytest.mark.slow
@pytest.mark.slurm
def test_ray_on_two_nodes_writes_the_bytes_of_one_process(job, expected, tmp_path):
    state = wait_for_end(job("-N", "2", "-c", "2", "cluster/prepare_data.sbatch", out="out"))
    assert state == "COMPLETED 0:0", (tmp_path / "out").read_text()
    assert files(job.raw) == expected


@pytest.mark.slow
@pytest.mark.slurm
def test_an_error_under_ray_fails_the_job(job, tmp_path):
    job.raw.write_text('{"text":"a"}\n{"text":1}\n')
    job_id = job("-N", "1", "-c", "1", "cluster/prepare_data.sbatch", out="out")
    assert wait_for_end(job_id) == "FAILED 1:0"
    assert f"error: {job.raw}" in (tmp_path / "out").read_text()
    assert not list(Path("/tmp").glob(f"ray-{job_id}*"))


@pytest.mark.parametrize(
    ("numbers", "step", "parts"),
    [
        ([], 1, ["0/1"]),
        ([0, 1, 2], 1, ["0/3", "1/3", "2/3"]),
        ([4, 6, 8], 2, ["0/3", "1/3", "2/3"]),
        ([3, 7, 8], 1, [None, None, None]),  # only the jobs that failed, submitted again
        ([3, 7, 8], 4, [None, None, None]),
        ([3, 7, 9, 15], 4, ["0/4", "1/4", None, "3/4"]),
    ],
)
def test_the_jobs_of_an_array_have_different_parts_or_fail(tmp_path, numbers, step, parts):
    """Without Slurm: a job that cannot know its part would do that of another, or none."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$3"\n')  # python prepare_data.py --part PART
    python.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    if numbers:
        names = ("MIN", "MAX", "STEP", "COUNT")
        values = (min(numbers), max(numbers), step, len(numbers))
        env |= {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, values)}
    for number, part in zip(numbers or [None], parts):
        if number is not None:
            env["SLURM_ARRAY_TASK_ID"] = str(number)
        script = ["bash", "cluster/prepare_data_array.sbatch"]
        job = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True)
        assert job.stdout.strip() == (part or "")
        assert job.returncode == (part is None)
        assert ("submit --array=0-" in job.stderr) == (part is None)


@pytest.mark.slow
def test_a_long_temporary_folder_of_ray_is_a_one_line_error(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is in requirements-dev.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 20)
    folder = tmp_path / ("folder_of_a_job_" * 6)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    command = ["--input", "a.jsonl", "--tokenizer", "bytes", "--engine", "ray", "--workers", "1"]
    result = run_script("prepare_data.py", *command, cwd=tmp_path)
    # on a machine without a network, Ray itself warns that it finds no address
    result.stderr = re.sub(r"\[.*network_util\.cc.*\n", "", result.stderr)
    assert_one_line_error(result, "set RAY_TMPDIR to a short one")


@pytest.mark.slow
@pytest.mark.slurm
def test_an_array_job_writes_the_bytes_of_one_process(job, expected, tmp_path):
    array = "--array=4-8:2", "-c", "1", "cluster/prepare_data_array.sbatch"
    assert wait_for_end(job(*array, out="%a")) == "COMPLETED 0:0"
    assert files(job.raw) == expected
    outputs = [(tmp_path / str(i)).read_text() for i in (4, 6, 8)]
    assert sum("Next: python train_gpt2.py" in text for text in outputs) == 1, outputs
    assert wait_for_end(job("--array=0", *array[1:], out="again")) == "COMPLETED 0:0"
    assert "is prepared already" in (tmp_path / "again").read_text()


@pytest.mark.slow
@pytest.mark.slurm
def test_a_preempted_or_killed_job_resumes(job, expected, tmp_path):
    array = "--array=0", "-c", "1", "cluster/prepare_data_array.sbatch"
    work_folder = job.raw.parent / "data" / "c" / ".work"

    def finished_tasks():
        return {path.name: path.stat().st_mtime_ns for path in work_folder.glob("*/*.json")}

    job_id = job(*array, out="out")
    wait_for(lambda: len(finished_tasks()) >= 3)
    subprocess.run(["scontrol", "requeue", job_id], check=True)  # as preemption does
    wait_for(lambda: "resuming: " in (tmp_path / "out").read_text())
    done = finished_tasks()
    wait_for(lambda: len(finished_tasks()) > len(done))
    subprocess.run(["scancel", "--signal=KILL", job_id], check=True)
    assert wait_for_end(job_id).startswith(("CANCELLED", "FAILED"))
    assert finished_tasks().items() >= done.items()  # no task is repeated
    done = finished_tasks()
    assert len(done) < NUM_TASKS
    assert wait_for_end(job(*array, out="again")) == "COMPLETED 0:0"
    output = (tmp_path / "again").read_text()
    assert f"resuming: {len(done)} of {NUM_TASKS} tasks are finished" in output
    assert files(job.raw) == expected


TRAINING = [
    "--n_layer", "1", "--n_head", "1", "--n_embd", "16", "--sequence_length", "16",
    "--batch_size", "4", "--dropout", "0.1", "--log_every", "1", "--device", "cpu",
]  # fmt: skip


def last_step(run) -> int:
    """Return the last step in metrics.jsonl, or 0 before the first step."""
    lines = read_lines(run / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def metrics_without_speed(run) -> list[dict]:
    """Return the lines of metrics.jsonl without tokens_per_second."""
    lines = read_lines(run / "metrics.jsonl")
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


@pytest.mark.slow
@pytest.mark.slurm
def test_training_on_two_nodes_resumes_exactly(sbatch, rhyme, tmp_path):
    """The job gets the signal of its time limit, and then a preemption.

    Its losses equal those of two processes without an interruption, bit for bit.
    """
    steps = ["--max_steps", "600", "--eval_every", "250"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [ROOT / "train_gpt2.py", *TRAINING, *steps, "--run_name", "whole"]
    subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True, capture_output=True,
    )  # fmt: skip
    folders = ["--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out"]
    script = ["-N", "2", "-c", "1", "cluster/train_gpt2.sbatch"]
    job_id = sbatch(*script, *TRAINING, *steps, *folders, out="log")
    run = tmp_path / "out" / f"job-{job_id}"
    log = tmp_path / "log"
    wait_for(lambda: last_step(run) > 50)
    subprocess.run(["scancel", "--signal=USR1", job_id], check=True)
    wait_for(lambda: "starts again" in log.read_text())
    stopped = last_step(run)
    wait_for(lambda: last_step(run) > stopped + 50)
    subprocess.run(["scontrol", "requeue", job_id], check=True)  # as preemption does
    assert wait_for_end(job_id) == "COMPLETED 0:0", log.read_text()
    output = log.read_text()
    assert output.count("2 processes") == 3, output
    assert output.count("continue with: ") == 2, output
    expected = metrics_without_speed(tmp_path / "out" / "whole")
    assert len(expected) == 600 + 3
    assert metrics_without_speed(run) == expected


@pytest.mark.slow
@pytest.mark.slurm
def test_a_run_continues_after_the_time_limit_of_its_job(sbatch, rhyme, tmp_path):
    """Slurm sends the signal up to half a minute early.

    A job with the same command line resumes the run of the old job.
    """
    script = ["--time=1", "--signal=USR1@5", "-N", "2", "-c", "1", "cluster/train_gpt2.sbatch"]
    more = ["--max_steps", "1000000", "--run_name", "mine"]
    more += ["--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out"]
    job_id = sbatch(*script, *TRAINING, *more, out="log")
    run = tmp_path / "out" / "mine"
    wait_for(lambda: (tmp_path / "log").exists())
    wait_for(lambda: f"job {job_id} starts again" in (tmp_path / "log").read_text())
    stopped = last_step(run)
    assert f"stopped at step {stopped}; " in (tmp_path / "log").read_text()
    wait_for(lambda: last_step(run) > stopped)
    subprocess.run(["scancel", job_id], check=True)
    assert wait_for_end(job_id).startswith("CANCELLED")
    stopped = load_checkpoint(run / "last.pt")["step"]
    job_id = sbatch(*script, *TRAINING, *more, "--stop_at", stopped + 9, out="again")
    assert wait_for_end(job_id) == "COMPLETED 0:0"
    assert load_checkpoint(run / "last.pt")["step"] == last_step(run) == stopped + 9
    assert wait_for_end(sbatch(*script, *TRAINING, *more, "--seed", 1, out="wrong")) == "FAILED 1:0"
    assert "cannot change it to 1" in (tmp_path / "wrong").read_text()


@pytest.mark.slow
@pytest.mark.slurm
def test_settings_reach_sbatch(slurm, tmp_path):
    text = (ROOT / "cluster" / "settings.sh").read_text()
    text = text.replace('partition=""', 'partition="nowhere"').replace(
        'environment=""', f'environment="{tmp_path}"'
    )
    (tmp_path / "settings.sh").write_text(text)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("export ACTIVATED=yes\n")
    script = f"source {tmp_path}/settings.sh && echo $ACTIVATED && sbatch --wrap true"
    result = subprocess.run(["bash", "-c", script], env=slurm, capture_output=True, text=True)
    assert result.stdout == "yes\n"
    assert "invalid partition" in result.stderr


@pytest.mark.slow
def test_ray_on_one_machine_gives_the_same_bytes_and_errors(raw, expected, tmp_path):
    pytest.importorskip("ray")
    shutil.copy2(raw, tmp_path)
    copy = tmp_path / "raw.jsonl"
    prepare(copy, "--engine", "ray", "--workers", 2)
    assert files(copy) == expected
    copy.write_text('{"text": "a"}\n{"text": 1}\n')
    errors = []
    for engine in ("processes", "ray"):
        more = flags(copy, "--engine", engine, "--workers", 2)
        result = run_script("prepare_data.py", *more, cwd=tmp_path)
        # without a network, Ray's C++ code warns on standard error at every log level
        result.stderr = re.sub(r"^\[.* network_util.cc:.*\n", "", result.stderr)
        assert_one_line_error(result, "raw.jsonl, line 2: ")
        errors.append(result.stderr)
    assert errors[0] == errors[1]


def test_a_missing_ray_is_an_error_with_the_remedy(raw, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # import ray fails
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *flags(raw, "--engine", "ray")])
    with pytest.raises(ValueError, match=r"--engine ray.*pip install ray"):
        prepare_data.main()


def test_parts_replace_an_older_corpus_one_after_another(tmp_path):
    path = tmp_path / "raw.jsonl"
    for start in (0, 1):
        path.write_text("".join(f'{{"text":"{i:0900}"}}\n' for i in range(start, start + 8000)))
        for part in range(3):
            done = "" if part == 0 else f"resuming: {[2, 3][part - 1]} of 4 tasks are finished"
            output = prepare(path, "--part", f"{part}/3")
            assert done in output
        assert "done in" in output
        metadata = json.loads((tmp_path / "data" / "c" / "metadata.json").read_text())
        assert sum(split["documents"] for split in metadata["splits"].values()) == 8000
        assert "is prepared already" in prepare(path, "--part", "0/3")
