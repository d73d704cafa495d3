"""Tasks and engines: the same bytes for any number of workers, stopped anywhere and resumed."""

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
from conftest import DEAD_PROXY, ROOT, assert_one_line_error, make_corpus, run_script

from corpus import engines, pipeline, shards, tasks
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer

ADVERSARIAL = [
    "", "<|endoftext|>", "a<|endoftext|>b" * 3, "a" * 300_000, "^" * 100_000, " " * 50_000,
    "nospaces" * 130_000, "\0\0 \0", "line\r\nline\r\n\r\nline\r", "\ufeffBOM", "don't I'LL 123456",
    "".join(chr(plane * 0x10000 + 0x1234) for plane in range(17)),
    "\ud800", "\udc00x\ud83d", "\ud83d\ude00", "e\u0301", "\u2028\u3000\x85", "\U0001d54f" * 1000,
    "x" * 3_000_000 + " y", "",
]  # fmt: skip


def output(folder) -> dict:
    """Every file of a prepared corpus."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def jsonl(path, count=20_000, seed=0, width=80):
    """A file of `count` documents, 20 bytes and `width` each."""
    random = np.random.default_rng(seed)
    with open(path, "w") as f:
        for i, row in enumerate(random.integers(97, 123, (count, width), np.uint8)):
            f.write(json.dumps({"text": f"{i} {row.tobytes().decode()}"}) + "\n")


def test_ids_are_tiktokens_on_every_document(tmp_path, gpt2_tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "TASK_BYTES", (100_000, 100_000))
    texts = ADVERSARIAL
    make_corpus(tmp_path / "c", texts, documents=True, tokenizer="gpt2", train_split_ratio=0.7)
    metadata = json.loads((tmp_path / "c" / "metadata.json").read_text())
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    expected = [tuple(encode(text)) for text in texts]
    found = []
    for name in ("train", "val"):
        ids = np.fromfile(tmp_path / "c" / f"{name}.bin", np.uint16)
        ends = np.flatnonzero(ids == 50256)
        assert len(ends) == metadata["splits"][name]["documents"]
        found += [tuple(d[:-1].tolist()) for d in np.split(ids, ends + 1)[:-1]]
    assert sorted(found) == sorted(expected)
    decoded = sum(len(gpt2_tokenizer.decode_bytes(ids)) for ids in found)
    assert sum(split["bytes"] for split in metadata["splits"].values()) == decoded


@pytest.mark.parametrize("documents", ["jsonl", "blank-line", "running text"])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, documents):
    (tmp_path / "raw").mkdir()
    for i in range(2):  # of two pieces each
        jsonl(tmp_path / "raw" / f"{i}.jsonl", count=3_000, seed=i, width=500)
    flags = ["--tokenizer", "bytes"]
    if documents != "jsonl":
        for path in list((tmp_path / "raw").iterdir()):
            text = path.read_text().replace("\n", "\n\n").replace(" ", " word ")
            path.with_suffix(".txt").write_text(text)
            path.unlink()
        flags += ["--documents", documents] if documents == "blank-line" else []
    found = []
    for workers in (1, 3):
        flags_now = [*flags, "--input", "raw", "--corpus", "c", "--workers", workers]
        result = run_script("prepare_data.py", *flags_now, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        found.append(output(tmp_path / "data" / "c"))
        shutil.rmtree(tmp_path / "data")
    assert found[0] == found[1]
    assert found[0].keys() == {"train.bin", "val.bin", "metadata.json"}
    metadata = json.loads(found[0]["metadata.json"])
    files = list((tmp_path / "raw").iterdir())
    if documents == "jsonl":  # the account adds up
        assert sum(split["documents"] for split in metadata["splits"].values()) == 6_000
        texts = [json.loads(line)["text"] for path in files for line in path.open()]
        size = sum(map(len, texts))
        assert sum(split["tokens"] for split in metadata["splits"].values()) == size + 6_000
    elif documents == "running text":
        size = sum(path.stat().st_size for path in files)
        assert metadata["splits"]["train"]["tokens"] == int(0.9 * size)
        assert sum(split["bytes"] for split in metadata["splits"].values()) == size


def test_no_more_workers_than_the_machine_can_use(monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 1)
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)  # then they would be spawned
    with open_engine("processes", workers=1000) as run_tasks:
        assert len(multiprocessing.active_children()) == 4
        assert sorted(run_tasks(abs, [(-1,), (-2,)])) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("piece", [10_000, 70_000, 1 << 30])
def test_neither_pieces_nor_shards_change_the_stream(tmp_path, monkeypatch, piece):
    texts = [f"document {i} " * (i % 50) for i in range(2000)]
    monkeypatch.setattr(pipeline, "TASK_BYTES", (piece, piece))
    monkeypatch.setattr(shards, "SHARD_BYTES", 200_000)
    metadata = make_corpus(tmp_path / "c", texts, documents=True)
    files = metadata["splits"]["train"]["files"]
    assert (len(files) > 3) == (piece < 1 << 30)
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
    every = sum(len(gpt2_tokenizer.encode(text)) + 1 for text in texts)
    assert metadata["dropped"] == every - total["tokens"] > 0


def test_what_is_no_document_stops_or_is_skipped_counted_and_listed(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(200)]
    lines[20], lines[150] = '{"text": 3}', "{broken"
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    flags = ["--input", "my.jsonl", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert_one_line_error(result, "my.jsonl, line 21", "is not text, but int", "--on_error skip")
    assert not (tmp_path / "data").exists()
    result = run_script("prepare_data.py", *flags, "--on_error", "skip", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (
        "2 documents skipped" in result.stdout and "my.jsonl, line 151: not JSON" in result.stdout
    )
    listed = (tmp_path / "data/my/skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == ["my.jsonl, line 21", "my.jsonl, line 151"]
    metadata = json.loads((tmp_path / "data/my/metadata.json").read_text())
    assert metadata["skipped"] == 2
    assert sum(split["documents"] for split in metadata["splits"].values()) == 198


def start(tmp_path, *flags):
    command = [sys.executable, ROOT / "prepare_data.py", "--input", "my.jsonl", *flags]
    return subprocess.Popen(
        [*command, "--tokenizer", "bytes"], cwd=tmp_path, env=os.environ | DEAD_PROXY,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def start_a_while(tmp_path, pieces=1):
    """prepare_data.py at work on a dozen pieces, with some done; and the folder of those."""
    jsonl(tmp_path / "my.jsonl", count=120_000)
    process, work = start(tmp_path, "--workers", "2"), tmp_path / "data" / "my" / ".work"
    while len(list(work.glob("*/*.json"))) < pieces:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process, work


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path):
    process, work = start_a_while(tmp_path, pieces=3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "data" / "my" / "metadata.json").exists()
    done = {path: path.stat().st_mtime_ns for path in work.glob("*/*.json")}
    victim = min(done)
    content = victim.read_bytes()
    account = json.loads(content)
    victim.write_text(json.dumps(account | {"seconds": 12345.0}))  # known again: it isn't redone
    process = start(tmp_path, "--workers", "2")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert f"resuming: {len(done)} of 12 tasks" in out
    first = output(tmp_path / "data" / "my")
    assert first.keys() == {"train.bin", "val.bin", "metadata.json"}
    assert float(out.split(" MB/s per core")[0].split()[-1]) < 1  # by the 12,345 seconds
    again = start(tmp_path)
    assert "is prepared already" in again.communicate()[0]
    shutil.rmtree(tmp_path / "data")
    start(tmp_path, "--workers", "1").communicate()
    assert output(tmp_path / "data" / "my") == first


def test_one_worker_killed_is_one_line_and_its_work_is_kept(tmp_path):
    process, work = start_a_while(tmp_path)
    workers = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.startswith("error: a worker process was killed") and error.count("\n") == 1
    assert list(work.glob("*/*.json"))
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)
    process = start(tmp_path, "--workers", "1")
    assert "resuming" in process.communicate()[0]
    assert not work.exists()


def test_workers_end_with_their_parent(tmp_path):
    process, _ = start_a_while(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # until nobody holds its output any more
    process = start(tmp_path, "--workers", "1")  # nobody else is at it
    assert process.wait() == 0


def test_ctrl_c_is_no_traceback(tmp_path):
    process, _ = start_a_while(tmp_path)
    for _ in range(3):  # impatiently: a second one hung it
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        time.sleep(0.1)
    assert process.communicate(timeout=30)[1] == "\nstopping when the running tasks are finished\n"
    assert process.returncode == 130


def test_parts_are_joined_by_the_last(tmp_path):
    jsonl(tmp_path / "my.jsonl", count=30_000)
    outs = [start(tmp_path, "--part", f"{i}/3").communicate()[0] for i in (2, 0)]
    assert "part 2/3 is done; 2 tasks are left" in outs[0]
    assert "part 0/3 is done; 1 tasks are left" in outs[1]
    assert not (tmp_path / "data/my/metadata.json").exists()
    assert "done in" in start(tmp_path, "--part", "1/3").communicate()[0]
    first = output(tmp_path / "data" / "my")
    assert "is prepared already" in start(tmp_path, "--part", "1/3").communicate()[0]
    shutil.rmtree(tmp_path / "data")
    processes = [start(tmp_path, "--part", f"{i}/3") for i in range(3)]  # all at once
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert output(tmp_path / "data" / "my") == first


def test_two_at_once_do_not_meet(tmp_path):
    jsonl(tmp_path / "my.jsonl", count=150_000)
    first = start(tmp_path)
    while not (tmp_path / "data" / "my" / ".lock").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.005)
    second = start(tmp_path, "--seed", "1")
    _, error = second.communicate()
    assert second.returncode == 1 and "is being prepared by another process" in error
    assert first.wait() == 0
    assert json.loads((tmp_path / "data/my/metadata.json").read_text())["seed"] == 0


def test_too_full_a_disk_is_told_before_the_start(tmp_path):
    with open(tmp_path / "my.txt", "wb") as f:
        f.truncate(1 << 43)  # eight terabytes, on paper
    result = run_script(
        "prepare_data.py", "--input", "my.txt", "--documents", "file", "--tokenizer", "bytes",
        cwd=tmp_path,
    )  # fmt: skip
    assert_one_line_error(result, "needs about", "GB free")
    assert not (tmp_path / "data").exists()


def test_a_full_disk_while_joining_keeps_the_pieces(tmp_path):
    """A limit on file sizes stands in for the disk: pieces fit, the shard doesn't."""
    jsonl(tmp_path / "my.jsonl", count=60_000)
    flags = ["--input", "my.jsonl", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path, max_file_bytes=4_000_000)
    assert_one_line_error(result, "train.bin: File too large; make room")
    assert not (tmp_path / "data" / "my" / "metadata.json").exists()
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert "resuming: 6 of 6 tasks are finished" in result.stdout


def test_changed_flags_start_anew(tmp_path):
    """Pieces of another plan aren't mixed in."""
    jsonl(tmp_path / "my.jsonl", count=30_000)
    start(tmp_path, "--part", "0/3").communicate()
    out, _ = start(tmp_path, "--max_length", "10").communicate()
    assert "resuming" not in out and "tokens beyond max_length" in out


def test_pieces_that_were_cut_otherwise_are_not_gone_on_with(tmp_path, monkeypatch):
    """TASK_BYTES is a constant, and such are there to be edited."""
    jsonl(tmp_path / "my.jsonl", count=100)
    corpus = Corpus("my", {}, [Source(str(tmp_path / "my.jsonl"), "jsonl")])
    for folder, part, size in ("c", "0/2", 2000), ("c", "", 3000), ("d", "", 3000):
        monkeypatch.setattr(pipeline, "TASK_BYTES", (size, size))
        with open_engine("processes", workers=1) as run_tasks:
            pipeline.prepare(
                corpus, get_tokenizer("bytes"), tmp_path / folder, run_tasks, part=part
            )
    assert output(tmp_path / "c") == output(tmp_path / "d")


def test_white_space_that_a_pattern_cannot_match_is_an_invalid_document(tmp_path, gpt2_tokenizer):
    """tiktoken gives up at a million characters; other documents go on."""
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
    class Full:
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
    writer = tasks._SplitWriter(job, get_tokenizer("bytes"), Full(), "000001.val.bin", [])
    writer.add(Source("a.jsonl", "jsonl"), [0], ["text"])
    with pytest.raises(OSError, match=r"No space left on device: '000001\.val\.bin'"):
        writer.flush()
