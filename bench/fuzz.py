"""Fuzzing guided by coverage (atheris), for the code that reads other people's files.

python -m bench.fuzz jsonl 120        # .jsonl files, for 120 seconds, compared with json.loads
python -m bench.fuzz metadata 120     # metadata.json and .yaml of prepared and described folders

Needs Linux and pip install atheris. The run ends at the first fault, with a traceback and the
input. The last lines give the number of inputs (stat::number_of_executed_units) and the number of
edges of the code that they reached (cov).
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from common.packages import optional

try:
    atheris = optional("atheris", "bench.fuzz")
except ValueError as error:
    sys.exit(f"error: {error}")

with atheris.instrument_imports(include=["common", "corpus", "json", "yaml"]):
    import yaml  # noqa: F401  corpus.descriptions imports it when it reads: too late for atheris

    from corpus import reader
    from corpus.descriptions import read_description
    from corpus.metadata import read_metadata
    from corpus.sources import InvalidDocument, Source

MEMORY = "/dev/shm"  # a folder in memory, if the machine has it
FOLDER = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
SMALL_BLOCK = 64  # bytes read at once, fewer than a short line has
SEEDS = {  # target -> first inputs; the inputs of metadata begin with j (.json) or y (.yaml)
    "jsonl": ['{"text": "a\\ud83d\\n"}\r\n\n', '\ufeff{"text": 1, "text": "b", "n": [NaN, {}]}'],
    "metadata": [
        'j{"name": "n", "data_content": "text", "corpuses": ["a"], "dataset_path": "."}',
        "yname: n\ndata_content: text\ncorpuses: [a, 'b']\ndate: 2020-01-01\nx: !!int &a 1\n",
        'j{"format_version": 1, "dtype": "uint16", "vocab_size": 257, "eot_token": 256, '
        '"eot_per_document": true, "splits": {"train": {"files": [{"name": "train.bin", '
        '"tokens": 5}], "tokens": 5, "bytes": 5}}, '
        '"tokenizer": {"name": "bytes", "sha256": ""}}',
    ],
}


def fuzz_jsonl(data: bytes) -> None:
    """Compare the texts that the reader finds in a .jsonl with those that json.loads finds."""
    path = FOLDER / "a.jsonl"
    path.write_bytes(data)
    source = Source(str(path), "jsonl")
    found = [text for _, texts in reader.read(source) for text in texts]
    found = [None if isinstance(text, InvalidDocument) else text for text in found]
    expected = [text_of_line(line) for line in data.split(b"\n") if line.strip()]
    if found != expected:
        raise AssertionError(f"{found} are not {expected}")


def text_of_line(line: bytes) -> str | None:
    """Return the text of a line, or None for an invalid document."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        text = row.get("text") if isinstance(row, dict) else None
        return text if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def fuzz_metadata(data: bytes) -> None:
    """Check that an error of reading metadata.json or metadata.yaml names the folder."""
    name = "metadata.yaml" if data[:1] == b"y" else "metadata.json"
    (FOLDER / name).write_bytes(data[1:])
    for read in read_metadata, read_description:
        try:
            read(FOLDER)
        except (ValueError, OSError) as error:
            if str(FOLDER) not in str(error):
                raise AssertionError("the error does not name the folder") from error
    (FOLDER / name).unlink()


TARGETS = {"jsonl": fuzz_jsonl, "metadata": fuzz_metadata}


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in TARGETS or not sys.argv[2].isdigit():
        sys.exit("error: name what to fuzz (jsonl or metadata) and for how many seconds")
    target, seconds = sys.argv[1:]
    reader.BLOCK = SMALL_BLOCK
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(SEEDS[target]):
        (seeds / str(number)).write_bytes(seed.encode())
    flags = [f"-max_total_time={seconds}", "-max_len=2048", "-timeout=20", "-print_final_stats=1"]
    flags += [f"-artifact_prefix={FOLDER}/", str(seeds)]
    atheris.Setup([sys.argv[0], *flags], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
