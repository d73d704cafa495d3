"""From a file of short documents to finished shards: ours beside other tools, whole processes.

    python -m bench.tokenize --text data/tinyshakespeare/input.txt

All contestants read the same documents, and must give the same ids with an end-of-text token after
each document. A document is 27 words of the text, from a random position on. The documents are in
a .jsonl, and for one contestant in a Parquet file. The last contest is about a running text of the
same size. Needs GPT-2's vocabulary in TIKTOKEN_CACHE_DIR, and bench/requirements.txt.
"""

import functools
import hashlib
import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.report import RESULTS, ROOT, Row, bars, contest, contest_table, whole_process, write
from common.script import run_script
from common.settings import parse_settings

EOT = 50256
WORDS_PER_DOCUMENT = 27
BATCH_DOCUMENTS = 10_000  # documents that another tool tokenizes at once


@dataclass
class Settings:
    text: str = ""  # file whose words make the documents; "": numbered words
    megabytes: tuple[int, ...] = (60, 200)  # sizes of the .jsonl
    workers: int = 2  # processes, or threads of a contestant that has no processes
    rounds: int = 3  # measurements of each contestant, after one that warms up
    contestants: tuple[str, ...] = ()  # names, to print only their rows; (): all, into --results
    results: str = RESULTS  # Markdown file to write into; "": none


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in PEERS:  # this process is a contestant
        name, corpus, out, workers = sys.argv[1:5]
        PEERS[name](corpus, out, int(workers))
        return
    settings = parse_settings(Settings, __doc__)
    for name in settings.contestants:
        if name not in CONTESTANTS:
            raise ValueError(f"no contestant is called {name!r}: choose of {CONTESTANTS}")
    contests = {}
    for megabytes in settings.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus.jsonl"
            num_documents = make_documents(corpus, megabytes, settings.text)
            write_parquet(corpus)
            contests[f"{megabytes} MB, {num_documents:,} documents"] = compare(
                corpus, settings, chosen(CONTESTANTS, settings), TARGETS
            )
            names = chosen(CONTESTANTS_FOR_TEXT, settings)
            if names and megabytes == settings.megabytes[0]:
                text_file = write_running_text(corpus)
                contests[f"{megabytes} MB, a running text"] = compare(
                    text_file, settings, names, {}
                )
    text = (
        "Documents of about 150 bytes, GPT-2's vocabulary, from a .jsonl to finished shards, whole "
        f"processes; {settings.workers} workers (tiktoken: threads) unless the row says otherwise. "
        "All gave the same ids. MB/s are those of the .jsonl, also for Parquet. MiB: the largest "
        "process at its peak.\n\n" + contest_table("corpus", "MB/s", contests)
    )
    results = "" if settings.contestants else settings.results
    write(results, "Tokenizing", text, bars("MB/s", contests))


def chosen(names: list[str], settings: Settings) -> list[str]:
    """Return the contestants that the settings name, or all of them."""
    return [name for name in names if not settings.contestants or name in settings.contestants]


def make_documents(path: Path, megabytes: float, text: str) -> int:
    """Write a .jsonl of documents of 27 words each.

    Args:
        path: File to write.
        megabytes: Size of this file.
        text: File whose words make the documents; "": numbered words.

    Returns:
        The number of documents.
    """
    if text:
        words = Path(text).read_text(encoding="utf-8").split()
    else:
        words = [f"w{i}" for i in range(9999)]
    generator = random.Random(0)
    size = 0
    num_documents = 0
    with open(path, "w") as f:
        while size < megabytes * 1e6:
            start = generator.randrange(len(words) - WORDS_PER_DOCUMENT)
            document = " ".join(words[start : start + WORDS_PER_DOCUMENT])
            size += f.write(json.dumps({"text": document}) + "\n")
            num_documents += 1
    return num_documents


def write_parquet(corpus: Path) -> None:
    """Write the documents of a .jsonl to a .parquet beside it."""
    import pyarrow
    import pyarrow.parquet

    with open(corpus) as lines:
        texts = [json.loads(line)["text"] for line in lines]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, corpus.with_suffix(".parquet"), row_group_size=100_000)


def write_running_text(corpus: Path) -> Path:
    """Write the documents of a .jsonl to a .txt beside it, one per line, and return its path."""
    path = corpus.with_suffix(".txt")
    with open(corpus) as lines, open(path, "w") as f:
        for line in lines:
            f.write(json.loads(line)["text"] + "\n")
    return path


# ---- contestants: (corpus, folder for the result, workers)


def prepare_command(corpus: str, out: str, workers: int, *flags: str) -> list[str]:
    """Return the command of prepare_data.py."""
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--input", corpus]
    command += ["--data_dir", out, "--tokenizer", "gpt2", "--corpus", "c"]
    return [*command, "--workers", str(workers), *flags]


def tokenize_with_datasets(corpus: str, out: str, workers: int) -> None:
    """Tokenize with datasets.map, in batches, and the fast GPT-2 tokenizer of transformers."""
    import datasets
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast(*gpt2_files(out))

    def tokenize(batch):
        return {"ids": [[*ids, EOT] for ids in tokenizer(batch["text"])["input_ids"]]}

    data = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=f"{out}/cache")
    data = data.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    with open(f"{out}/train.bin", "wb") as f:
        for batch in data.with_format("arrow").iter(BATCH_DOCUMENTS):
            f.write(batch["ids"].combine_chunks().flatten().to_numpy().astype("<u2").tobytes())


def tokenize_with_tiktoken(corpus: str, out: str, workers: int) -> None:
    """Tokenize with tiktoken.encode_ordinary_batch and `workers` threads."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    with open(corpus) as lines, open(f"{out}/train.bin", "wb") as f:
        texts = [json.loads(line)["text"] for line in lines]
        for start in range(0, len(texts), BATCH_DOCUMENTS):
            batch = texts[start : start + BATCH_DOCUMENTS]
            documents = encoding.encode_ordinary_batch(batch, num_threads=workers)
            f.write(np.array([i for ids in documents for i in (*ids, EOT)], "<u2").tobytes())


def gpt2_files(folder: str) -> tuple[str, str]:
    """Copy the two files of GPT-2's vocabulary to `folder`, under the names that OpenAI gave them.

    Returns:
        The paths of encoder.json and vocab.bpe.
    """
    from corpus.vocabulary_files import HOST, VOCABULARY_FILES, vocabulary_folder

    paths = {}
    for url in VOCABULARY_FILES["gpt2"]:
        name = Path(url).name
        paths[name] = Path(folder) / name
        cache_name = hashlib.sha1(f"{HOST}/{url}".encode()).hexdigest()
        paths[name].write_bytes((vocabulary_folder() / cache_name).read_bytes())
    return str(paths["encoder.json"]), str(paths["vocab.bpe"])


PEERS = {
    "datasets.map": tokenize_with_datasets,
    "tiktoken.encode_ordinary_batch": tokenize_with_tiktoken,
}
# name -> suffix of the corpus, workers (0: those of the settings), flags of prepare_data.py
OURS: dict[str, tuple[str, int, list[str]]] = {
    "ours": ("", 0, []),
    "ours, 1 worker": ("", 1, []),
    "ours, --encoder tiktoken": ("", 0, ["--encoder", "tiktoken"]),
    "ours, from Parquet": (".parquet", 0, []),
}
CONTESTANTS = [*OURS, *PEERS]
CONTESTANTS_FOR_TEXT = ["ours", "ours, 1 worker", "ours, --encoder tiktoken"]
TARGETS = {"ours, 1 worker": 1.8, "datasets.map": 25, "tiktoken.encode_ordinary_batch": 15}

# ---- the contest


def tokenized(name: str, corpus: Path, workers: int) -> tuple[float, float, np.ndarray]:
    """Run a contestant.

    Returns:
        (seconds, peak memory in MiB, ids of all its files, joined).
    """
    with tempfile.TemporaryDirectory() as out:
        if name in OURS:
            suffix, own_workers, flags = OURS[name]
            path = corpus.with_suffix(suffix or corpus.suffix)
            command = prepare_command(str(path), out, own_workers or workers, *flags)
        else:
            command = [sys.executable, "-m", "bench.tokenize", name, str(corpus), out, str(workers)]
        env = os.environ | {"HF_HOME": out, "HF_HUB_OFFLINE": "1"}
        env["TOKENIZERS_PARALLELISM"] = "false"
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # packages are compiled once, too
        seconds, mib, _ = whole_process(command, cwd=ROOT, env=env)
        paths = sorted(Path(out).rglob("*.bin"))
        return seconds, mib, np.concatenate([np.fromfile(path, "<u2") for path in paths])


def compare(
    corpus: Path, settings: Settings, contestants: list[str], targets: dict[str, float]
) -> list[Row]:
    """Return the rows of the contest on one corpus."""
    megabytes = corpus.stat().st_size / 1e6
    expected: list[tuple[int, int]] = []  # the digest of the first contestant's documents

    def measure(name: str) -> tuple[float, float]:
        seconds, mib, ids = tokenized(name, corpus, settings.workers)
        # A sum does not depend on the order of the documents, nor on the split of each.
        documents = np.split(ids, np.flatnonzero(ids == EOT) + 1)
        digest = (sum(hash(document.tobytes()) for document in documents), len(documents))
        if not expected:
            expected.append(digest)
        if digest != expected[0]:
            raise AssertionError(f"{name} gives other ids")
        return megabytes / seconds, mib

    measures = {name: functools.partial(measure, name) for name in contestants}
    return contest(measures, settings.rounds, targets)


if __name__ == "__main__":
    run_script(main)
