"""Tasks and engines write the same bytes for any number of workers and after any interruption."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
from conftest import (
    DEAD_PROXY,
    ROOT,
    assert_one_line_error,
    make_corpus,
    run_script,
)

from corpus import engines, pipeline, shards, tasks
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer

ADVERSARIAL_TEXTS = [
    "", "<|endoftext|>", "a<|endoftext|>b" * 3, "a" * 300_000, "^" * 100_000, " " * 50_000,
    "nospaces" * 130_000, "\0\0 \0", "line\r\nline\r\n\r\nline\r", "\ufeffBOM", "don't I'LL 123456",
    "".join(chr(plane * 0x10000 + 0x1234) for plane in range(17)),
    "\ud800", "\udc00x\ud83d", "\ud83d\ude00", "e\u0301", "\u2028\u3000\x85", "\U0001d54f" * 1000,
    "x" * 3_000_000 + " y", "",
]  # fmt: skip


def corpus_files(folder) -> dict[str, bytes]:
    """Return the content of each file of a prepared corpus, which has no subfolder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_jsonl(path, count=20_000, seed=0, width=80):
    """Write `count` documents of `width` random letters; a line is about 20 bytes longer."""
    random = np.random.default_rng(seed)
    with open(path, "w") as f:
        for i, row in enumerate(random.integers(97, 123, (count, width), np.uint8)):
            f.write(json.dumps({"text": f"{i} {row.tobytes().decode()}"}) + "\n")


def test_token_ids_equal_tiktoken_for_adversarial_documents(tmp_path, gpt2_tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "TASK_BYTES", (100_000, 100_000))
    texts = ADVERSARIAL_TEXTS
    make_corpus(tmp_path / "c", texts, documents=True, tokenizer="gpt2", train_split_ratio=0.7)
    metadata = json.loads((tmp_path / "c" / "metadata.json").read_text())
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    expected = [tuple(encode(text)) for text in texts]
    found = []
    for name in ("train", "val"):
        ids = np.fromfile(tmp_path / "c" / f"{name}.bin", np.uint16)
        ends = np.flatnonzero(ids == 50256)
        assert len(ends) == metadata["splits"][name]["documents"]
        found += [tuple(document[:-1].tolist()) for document in np.split(ids, ends + 1)[:-1]]
    assert sorted(found) == sorted(expected)
    num_bytes = sum(len(gpt2_tokenizer.decode_bytes(ids)) for ids in found)
    assert sum(split["bytes"] for split in metadata["splits"].values()) == num_bytes


@pytest.mark.parametrize("documents", ["jsonl", "blank-line", "running text"])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, documents):
    (tmp_path / "raw").mkdir()
    for i in range(2):  # two chunks each
        write_jsonl(tmp_path / "raw" / f"{i}.jsonl", count=3_000, seed=i, width=500)
    flags = ["--tokenizer", "bytes"]
    if documents != "jsonl":
        for path in list((tmp_path / "raw").iterdir()):
            text = path.read_text().replace("\n", "\n\n").replace(" ", " word ")
            path.with_suffix(".txt").write_text(text)
            path.unlink()
        if documents == "blank-line":
            flags += ["--documents", "blank-line"]
    outputs = []
    for workers in (1, 3):
        corpus_flags = ["--input", "raw", "--corpus", "c", "--workers", workers]
        result = run_script("prepare_data.py", *flags, *corpus_flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        outputs.append(corpus_files(tmp_path / "data" / "c"))
        shutil.rmtree(tmp_path / "data")
    assert outputs[0] == outputs[1]
    assert outputs[0].keys() == {"train.bin", "val.bin", "metadata.json"}
    metadata = json.loads(outputs[0]["metadata.json"])
    sources = list((tmp_path / "raw").iterdir())
    if documents == "jsonl":  # the counts in metadata.json are exact
        assert sum(split["documents"] for split in metadata["splits"].values()) == 6_000
        texts = [json.loads(line)["text"] for path in sources for line in path.open()]
        num_bytes = sum(map(len, texts))
        assert sum(split["tokens"] for split in metadata["splits"].values()) == num_bytes + 6_000
    elif documents == "running text":
        num_bytes = sum(path.stat().st_size for path in sources)
        assert metadata["splits"]["train"]["tokens"] == int(0.9 * num_bytes)
        assert sum(split["bytes"] for split in metadata["splits"].values()) == num_bytes


def test_no_more_workers_than_the_machine_can_use(monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 1)
    # the engine would spawn its workers instead of forking them if pyarrow were imported
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)
    with open_engine("processes", workers=1000) as run_tasks:
        assert len(multiprocessing.active_children()) == 4
        assert sorted(run_tasks(abs, [(-1,), (-2,)])) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("task_bytes", [10_000, 70_000, 1 << 30])
def test_neither_task_size_nor_shard_size_changes_the_stream(tmp_path, monkeypatch, task_bytes):
    texts = [f"document {i} " * (i % 50) for i in range(2000)]
    monkeypatch.setattr(pipeline, "TASK_BYTES", (task_bytes, task_bytes))
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    metadata = make_corpus(tmp_path / "c", texts, documents=True)
    files = metadata["splits"]["train"]["files"]
    assert (len(files) > 3) == (task_bytes < 1 << 30)
    if len(files) > 1:
        assert files[1]["name"] == f"train-00001-of-{len(files):05}.bin"
    stream = b"".join((tmp_path / "c" / file["name"]).read_bytes() for file in files)
    monkeypatch.undo()
    make_corpus(tmp_path / "d", texts, documents=True)
    assert stream == (tmp_path / "d" / "train.bin").read_bytes()


def test_max_length_drops_tokens_and_counts_them(tmp_path, gpt2_tokenizer):
    texts = ["one two three four five"] * 50 + ["漢字"] * 50 + ["short"] * 50 + [""]
    metadata = make_corpus(tmp_path / "c", texts, documents=True, tokenizer="gpt2", max_length=3)
    kept = {text: gpt2_tokenizer.encode(text)[:3].tolist() for text in set(texts)}
    total = {"tokens": 0, "bytes": 0}
    for name, split in metadata["splits"].items():
        ids = np.fromfile(tmp_path / "c" / f"{name}.bin", np.uint16)
        parts = np.split(ids, np.flatnonzero(ids == 50256) + 1)[:-1]
        assert all(part[:-1].tolist() in kept.values() for part in parts)
        total = {field: total[field] + split[field] for field in total}
    assert total["tokens"] == sum(len(kept[text]) + 1 for text in texts)
    assert total["bytes"] == sum(len(gpt2_tokenizer.decode_bytes(kept[t])) for t in texts)
    num_tokens_before = sum(len(gpt2_tokenizer.encode(text)) + 1 for text in texts)
    assert metadata["dropped"] == num_tokens_before - total["tokens"] > 0


def test_an_invalid_document_stops_or_is_skipped_counted_and_listed(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(200)]
    lines[20] = '{"text": 3}'
    lines[150] = "{broken"
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    flags = ["--input", "my.jsonl", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert_one_line_error(result, "my.jsonl, line 21", "is not text, but int", "--on_error skip")
    assert not (tmp_path / "data").exists()
    result = run_script("prepare_data.py", *flags, "--on_error", "skip", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 documents skipped" in result.stdout
    assert "my.jsonl, line 151: not JSON" in result.stdout
    listed = (tmp_path / "data/my/skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == ["my.jsonl, line 21", "my.jsonl, line 151"]
    metadata = json.loads((tmp_path / "data/my/metadata.json").read_text())
    assert metadata["skipped"] == 2
    assert sum(split["documents"] for split in metadata["splits"].values()) == 198


def start_preparing(tmp_path, *flags):
    """Start prepare_data.py on my.jsonl in a process group of its own."""
    command = [sys.executable, ROOT / "prepare_data.py", "--input", "my.jsonl", *flags]
    return subprocess.Popen(
        [*command, "--tokenizer", "bytes"], cwd=tmp_path, env=os.environ | DEAD_PROXY,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def start_and_wait_for_tasks(tmp_path, num_tasks=1):
    """Start prepare_data.py on twelve tasks and wait until `num_tasks` of them are finished.

    Returns the process and the folder of the finished tasks.
    """
    write_jsonl(tmp_path / "my.jsonl", count=240_000)
    process = start_preparing(tmp_path, "--workers", "2")
    work_folder = tmp_path / "data" / "my" / ".work"
    while len(list(work_folder.glob("*/*.json"))) < num_tasks:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process, work_folder


def test_a_run_after_a_kill_resumes_and_writes_the_same_bytes(tmp_path):
    process, work_folder = start_and_wait_for_tasks(tmp_path, num_tasks=3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "data" / "my" / "metadata.json").exists()
    finished = sorted(work_folder.glob("*/*.json"))
    # a task that is not repeated keeps this false duration
    counts = json.loads(finished[0].read_bytes())
    finished[0].write_text(json.dumps(counts | {"seconds": 12345.0}))
    process = start_preparing(tmp_path, "--workers", "2")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert f"resuming: {len(finished)} of 12 tasks" in out
    resumed_files = corpus_files(tmp_path / "data" / "my")
    assert resumed_files.keys() == {"train.bin", "val.bin", "metadata.json"}
    assert float(out.split(" MB/s per core")[0].split()[-1]) < 1  # due to the 12,345 seconds
    process = start_preparing(tmp_path)
    assert "is prepared already" in process.communicate()[0]
    shutil.rmtree(tmp_path / "data")
    start_preparing(tmp_path, "--workers", "1").communicate()
    assert corpus_files(tmp_path / "data" / "my") == resumed_files


def test_a_killed_worker_is_a_one_line_error_and_finished_tasks_stay(tmp_path):
    process, work_folder = start_and_wait_for_tasks(tmp_path)
    workers = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.startswith("error: a worker process was killed") and error.count("\n") == 1
    assert list(work_folder.glob("*/*.json"))
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    process = start_preparing(tmp_path, "--workers", "1")
    assert "resuming" in process.communicate()[0]
    assert not work_folder.exists()


def test_workers_end_with_their_parent(tmp_path):
    process, _ = start_and_wait_for_tasks(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # returns when no process holds the output streams
    process = start_preparing(tmp_path, "--workers", "1")  # no other process holds the lock
    assert process.wait() == 0


def test_ctrl_c_stops_without_a_traceback(tmp_path):
    process, _ = start_and_wait_for_tasks(tmp_path)
    for _ in range(3):  # an impatient user presses Ctrl-C again; once, this caused a deadlock
        os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group, too
        time.sleep(0.1)
    assert process.communicate(timeout=30)[1] == "\nstopping when the running tasks are finished\n"
    assert process.returncode == 130


def test_the_last_part_joins_the_tasks_of_all_parts(tmp_path):
    write_jsonl(tmp_path / "my.jsonl", count=30_000)
    outs = [start_preparing(tmp_path, "--part", f"{i}/3").communicate()[0] for i in (2, 0)]
    assert "part 2/3 is done; 2 tasks are left" in outs[0]
    assert "part 0/3 is done; 1 tasks are left" in outs[1]
    assert not (tmp_path / "data/my/metadata.json").exists()
    assert "done in" in start_preparing(tmp_path, "--part", "1/3").communicate()[0]
    serial_files = corpus_files(tmp_path / "data" / "my")
    assert "is prepared already" in start_preparing(tmp_path, "--part", "1/3").communicate()[0]
    shutil.rmtree(tmp_path / "data")
    processes = [start_preparing(tmp_path, "--part", f"{i}/3") for i in range(3)]  # at once
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert corpus_files(tmp_path / "data" / "my") == serial_files


def test_a_second_process_for_the_same_corpus_is_refused(tmp_path):
    write_jsonl(tmp_path / "my.jsonl", count=150_000)
    first = start_preparing(tmp_path)
    while not (tmp_path / "data" / "my" / ".lock").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    second = start_preparing(tmp_path, "--seed", "1")
    _, error = second.communicate()
    assert second.returncode == 1 and "is being prepared by another process" in error
    assert first.wait() == 0
    assert json.loads((tmp_path / "data/my/metadata.json").read_text())["seed"] == 0


def test_too_little_free_space_is_an_error_before_the_start(tmp_path):
    with open(tmp_path / "my.txt", "wb") as f:
        f.truncate(1 << 43)  # a sparse file of eight terabytes
    result = run_script(
        "prepare_data.py", "--input", "my.txt", "--documents", "file", "--tokenizer", "bytes",
        cwd=tmp_path,
    )  # fmt: skip
    assert_one_line_error(result, "needs about", "GB free")
    assert not (tmp_path / "data").exists()


def test_a_full_disk_while_joining_keeps_the_finished_tasks(tmp_path):
    """A limit on file sizes stands in for the disk: the files of a task fit, the shard does not."""
    write_jsonl(tmp_path / "my.jsonl", count=120_000)
    flags = ["--input", "my.jsonl", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path, max_file_bytes=8_000_000)
    assert_one_line_error(result, "train.bin: File too large; make room")
    assert not (tmp_path / "data" / "my" / "metadata.json").exists()
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert "resuming: 6 of 6 tasks are finished" in result.stdout


def test_changed_flags_do_not_resume_old_tasks(tmp_path):
    write_jsonl(tmp_path / "my.jsonl", count=30_000)
    start_preparing(tmp_path, "--part", "0/3").communicate()
    out, _ = start_preparing(tmp_path, "--max_length", "10").communicate()
    assert "resuming" not in out and "tokens beyond max_length" in out


def test_a_changed_task_size_does_not_resume_old_tasks(tmp_path, monkeypatch):
    """A user may edit the constant TASK_BYTES."""
    write_jsonl(tmp_path / "my.jsonl", count=100)
    corpus = Corpus("my", {}, [Source(str(tmp_path / "my.jsonl"), "jsonl")])
    for folder, part, size in ("c", "0/2", 2000), ("c", "", 3000), ("d", "", 3000):
        monkeypatch.setattr(pipeline, "TASK_BYTES", (size, size))
        with open_engine("processes", workers=1) as run_tasks:
            pipeline.prepare(
                corpus, get_tokenizer("bytes"), tmp_path / folder, run_tasks, part=part
            )
    assert corpus_files(tmp_path / "c") == corpus_files(tmp_path / "d")


def test_white_space_that_tiktoken_cannot_match_is_an_invalid_document(tmp_path, gpt2_tokenizer):
    """tiktoken fails on a run of a million white-space characters; other documents are kept."""
    lines = [json.dumps({"text": f"document {i}"}) for i in range(50)]
    lines[30] = json.dumps({"text": "漢 a" + " " * 1_000_020 + "x"}, ensure_ascii=False)
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    flags = ["--input", "my.jsonl"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    reason = "gpt2 cannot encode a run of 1,000,020 white-space characters"
    assert_one_line_error(result, f"my.jsonl, line 31: {reason}", "--on_error skip")
    result = run_script("prepare_data.py", *flags, "--on_error", "skip", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"skipped: my.jsonl, line 31: {reason}" in result.stdout
    metadata = json.loads((tmp_path / "data/my/metadata.json").read_text())
    assert metadata["skipped"] == 1
    assert sum(split["documents"] for split in metadata["splits"].values()) == 49
    result = run_script("prepare_data.py", "--verify", "my", cwd=tmp_path)
    assert "49 of 49 documents were compared with the source" in result.stdout
    (tmp_path / "my.txt").write_text("漢 a b\n" * 300_000 + "\n" * 1_000_020 + "x" * 1_000_000)
    result = run_script("prepare_data.py", "--input", "my.txt", "--corpus", "b", cwd=tmp_path)
    assert_one_line_error(result, "my.txt, line 300000: gpt2 cannot encode a run of 1,000,021")


def test_a_failed_write_names_the_file_of_its_split(tmp_path):
    class FullDisk:
        def write(self, data):
            raise OSError(28, "No space left on device")

    job = tasks.Job(
        tasks_dir=str(tmp_path),
        tokenizer="bytes",
        has_documents=True,
        max_length=0,
        train_split_ratio=0.5,
        seed=0,
        on_error="stop",
    )
    tokenizer = get_tokenizer("bytes")
    writer = tasks._SplitWriter(job, tokenizer, tokenizer, FullDisk(), "000001.val.bin", [])
    writer.add(Source("a.jsonl", "jsonl"), [0], ["text"])
    with pytest.raises(OSError, match=r"No space left on device: '000001\.val\.bin'"):
        writer.flush()
