"""From a .jsonl of short documents to finished shards: ours beside the peers, whole processes.

    python -m bench.tokenize --text input.txt                  # 20 MB, 2 workers, three rounds
    python -m bench.tokenize --text input.txt --memory true    # peak memory at 200 MB and 2 GB

All see the same documents (seeded runs of the text's words, about 150 characters each) and must
give the same ids, each document's followed by the end of text. Needs GPT-2's vocabulary in
TIKTOKEN_CACHE_DIR, and bench/requirements.txt.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import parse_flags, run

ROOT = Path(__file__).resolve().parent.parent
EOT = 50256


@dataclass
class Config:
    text: str = ""  # file whose words the documents are made of; "": numbers
    megabytes: int = 20  # of documents
    workers: int = 2  # processes, or threads where that is all a contestant has
    rounds: int = 3  # of each contestant, alternating
    memory: str = "false"  # true: measure peak memory instead


def main():
    if len(sys.argv) > 1 and sys.argv[1] in PEERS:
        return PEERS[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
    config = parse_flags(Config, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        (measure_memory if config.memory == "true" else compare)(config, Path(folder))


def make(path: Path, megabytes: int, text: str) -> None:
    """Writes a .jsonl of documents of 27 words."""
    words = (
        Path(text).read_text(encoding="utf-8").split() if text else [f"w{i}" for i in range(9999)]
    )
    choose, size = random.Random(0), 0
    with open(path, "w") as f:
        while size < megabytes * 1e6:
            start = choose.randrange(len(words) - 27)
            line = json.dumps({"text": " ".join(words[start : start + 27])}) + "\n"
            size += f.write(line)


# ---- contestants: (corpus, folder for the result, workers)


def ours(corpus, out, workers):
    flags = ["--input", corpus, "--data_dir", out, "--tokenizer", "gpt2", "--corpus", "c"]
    script = str(ROOT / "prepare_data.py")
    return [sys.executable, script, *flags, "--workers", str(workers)]


def _datasets(corpus, out, workers):
    """datasets.map, in batches, with the fast GPT-2 tokenizer of transformers."""
    import datasets
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast(*gpt2_files(out))

    def tokenize(batch):
        return {"ids": [[*ids, EOT] for ids in tokenizer(batch["text"])["input_ids"]]}

    data = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=f"{out}/cache")
    data = data.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    with open(f"{out}/train.bin", "wb") as f:
        for batch in data.with_format("arrow").iter(10_000):
            f.write(batch["ids"].combine_chunks().flatten().to_numpy().astype("<u2").tobytes())


def _tiktoken(corpus, out, workers):
    """tiktoken.encode_ordinary_batch."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    with open(corpus) as lines, open(f"{out}/train.bin", "wb") as f:
        texts = [json.loads(line)["text"] for line in lines]
        for start in range(0, len(texts), 10_000):
            batch = encoding.encode_ordinary_batch(
                texts[start : start + 10_000], num_threads=workers
            )
            f.write(np.array([i for ids in batch for i in (*ids, EOT)], "<u2").tobytes())


def gpt2_files(folder):
    """OpenAI's two files, under the names that they had."""
    import hashlib

    from tokenizer import _HOST, VOCABULARY_FILES, vocabulary_folder

    paths = []
    for url in VOCABULARY_FILES["gpt2"]:
        paths.append(Path(folder) / Path(url).name)
        name = hashlib.sha1(f"{_HOST}/{url}".encode()).hexdigest()
        paths[-1].write_bytes((vocabulary_folder() / name).read_bytes())
    return str(paths[1]), str(paths[0])


PEERS = {"datasets.map": _datasets, "tiktoken.encode_ordinary_batch": _tiktoken}

# ----


def timed(name, corpus, workers):
    """(seconds, ids of the documents in order of their first ids) of one whole process."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "bench.tokenize", name, str(corpus), out, str(workers)]
        if name == "ours":
            command = ours(str(corpus), out, workers)
        env = os.environ | {
            "HF_HOME": out,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        start = time.perf_counter()
        subprocess.run(command, check=True, cwd=ROOT, env=env, capture_output=True)
        seconds = time.perf_counter() - start
        files = sorted(Path(out).rglob("*.bin"))
        return seconds, np.concatenate([np.fromfile(file, "<u2") for file in files])


def documents(ids):
    """A set of documents that doesn't depend on the split between train and val."""
    return sorted(part.tobytes() for part in np.split(ids, np.flatnonzero(ids == EOT) + 1)[:-1])


def compare(config, folder):
    corpus = folder / "corpus.jsonl"
    make(corpus, config.megabytes, config.text)
    contestants = [("ours", config.workers), ("ours", 1), *((p, config.workers) for p in PEERS)]
    expected, seconds = None, {contestant: [] for contestant in contestants}
    for number in range(config.rounds + 1):
        for name, workers in contestants:
            took, ids = timed(name, corpus, workers)
            if number == 0:  # a warm-up, and the same work
                found = documents(ids)
                assert expected in (None, found), f"{name} gives other ids"
                expected = found
            else:
                seconds[name, workers].append(took)
    size = corpus.stat().st_size / 1e6
    base = statistics.median(seconds["ours", config.workers])
    print(f"{size:.0f} MB, {len(expected):,} documents, the same ids from all\n")
    print("| | workers | seconds (median) | least to most | MB/s | ours is faster by |")
    print("|---|---|---|---|---|---|")
    for (name, workers), times in seconds.items():
        median = statistics.median(times)
        print(
            f"| {name} | {workers} | {median:.2f} | {min(times):.2f} to {max(times):.2f} | "
            f"{size / median:.1f} | {median / base:.2f} |"
        )


def measure_memory(config, folder):
    """Peak memory of each process, by the kernel (VmHWM), at 200 MB and ten times that."""
    peaks = []
    for megabytes in (200, 2000):
        corpus, peak = folder / "corpus.jsonl", {}
        make(corpus, megabytes, config.text)
        process = subprocess.Popen(ours(str(corpus), str(folder), config.workers), cwd=ROOT)
        while process.poll() is None:
            tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for pid in [process.pid, *(tasks.read_text().split() if tasks.exists() else [])]:
                status = Path(f"/proc/{pid}/status")
                if status.exists() and "VmHWM" in (text := status.read_text()):
                    peak[int(pid)] = int(text.split("VmHWM:")[1].split()[0]) / 1024
            time.sleep(0.1)
        assert process.returncode == 0
        peaks.append(max(peak.values()))
        print(
            f"{megabytes} MB: {', '.join(f'{p:.0f}' for p in peak.values())} MiB at most a process"
        )
    print(f"ratio of the largest: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    run(main)
