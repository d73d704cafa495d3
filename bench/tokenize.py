"""From a .jsonl of short documents to finished shards: ours beside the peers, whole processes.

    python -m bench.tokenize --text data/tinyshakespeare/input.txt

All see the same documents (seeded runs of the text's words, about 150 characters each) and must
give the same ids, each document's followed by the end of text. Needs GPT-2's vocabulary in
TIKTOKEN_CACHE_DIR, and bench/requirements.txt.
"""

import functools
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.report import RESULTS, ROOT, bars, contest, contest_table, whole_process, write
from common.script import run
from common.settings import parse_settings

EOT = 50256


@dataclass
class Settings:
    text: str = ""  # file whose words the documents are made of; "": numbers
    megabytes: tuple[int, ...] = (20, 200)  # of documents
    workers: int = 2  # processes, or threads where that is all a contestant has
    rounds: int = 3  # of each contestant, in turn, after one that warms up
    results: str = RESULTS  # Markdown file to write into; "": none


def main():
    if len(sys.argv) > 1 and sys.argv[1] in PEERS:
        return PEERS[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
    config = parse_settings(Settings, __doc__)
    groups, unit = {}, "MB/s"
    for megabytes in config.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus.jsonl"
            count = make(corpus, megabytes, config.text)
            groups[f"{megabytes} MB, {count:,} documents"] = compare(corpus, config)
    text = (
        f"Documents of about 150 bytes, GPT-2's vocabulary, from a .jsonl to finished shards, from "
        f"the start of a process to its end; {config.workers} workers (tiktoken: threads) where "
        "nothing else is said. All gave the same ids. MiB: the largest process at its peak.\n\n"
        + contest_table("corpus", unit, groups)
    )
    write(config.results, "Tokenizing", text, bars(unit, groups))


def make(path: Path, megabytes: int, text: str) -> int:
    """Writes a .jsonl of documents of 27 words; returns how many."""
    words = (
        Path(text).read_text(encoding="utf-8").split() if text else [f"w{i}" for i in range(9999)]
    )
    choose, size, count = random.Random(0), 0, 0
    with open(path, "w") as f:
        while size < megabytes * 1e6:
            start = choose.randrange(len(words) - 27)
            line = json.dumps({"text": " ".join(words[start : start + 27])}) + "\n"
            size += f.write(line)
            count += 1
    return count


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

    from corpus.tokenizer import _HOST, VOCABULARY_FILES, vocabulary_folder

    paths = []
    for url in VOCABULARY_FILES["gpt2"]:
        paths.append(Path(folder) / Path(url).name)
        name = hashlib.sha1(f"{_HOST}/{url}".encode()).hexdigest()
        paths[-1].write_bytes((vocabulary_folder() / name).read_bytes())
    return str(paths[1]), str(paths[0])


PEERS = {"datasets.map": _datasets, "tiktoken.encode_ordinary_batch": _tiktoken}
GOALS = {"ours, 1 worker": 1.7, "datasets.map": 6, "tiktoken.encode_ordinary_batch": 4}

# ----


def tokenized(name, corpus, workers) -> tuple[float, float, np.ndarray]:
    """(seconds, peak MiB, ids of the documents in order of their first ids)."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "bench.tokenize", name, str(corpus), out, str(workers)]
        if name == "ours":
            command = ours(str(corpus), out, workers)
        env = os.environ | {"HF_HOME": out, "HF_HUB_OFFLINE": "1"}
        env["TOKENIZERS_PARALLELISM"] = "false"
        seconds, mib, _ = whole_process(command, cwd=ROOT, env=env)
        files = sorted(Path(out).rglob("*.bin"))
        return seconds, mib, np.concatenate([np.fromfile(file, "<u2") for file in files])


def compare(corpus, config) -> list[tuple]:
    size, expected = corpus.stat().st_size / 1e6, []

    def measure(name, workers):
        seconds, mib, ids = tokenized(name, corpus, workers)
        # as a set, which doesn't depend on the split between train and val
        documents = np.split(ids, np.flatnonzero(ids == EOT) + 1)[:-1]
        digest = sum(hash(document.tobytes()) for document in documents), len(documents)
        expected[:] = expected or [digest]
        assert expected == [digest], f"{name} gives other ids"
        return size / seconds, mib

    contestants = {"ours": functools.partial(measure, "ours", config.workers)}
    contestants["ours, 1 worker"] = functools.partial(measure, "ours", 1)
    contestants |= {peer: functools.partial(measure, peer, config.workers) for peer in PEERS}
    return contest(contestants, config.rounds, GOALS)


if __name__ == "__main__":
    run(main)
