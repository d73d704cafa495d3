"""Fuzzing that is led by coverage (atheris), of what reads strangers' bytes.

python -m bench.fuzz jsonl 120        # .jsonl files, for 120 seconds, against json.loads
python -m bench.fuzz metadata 120     # metadata.json and .yaml of prepared and described folders

Needs Linux and pip install atheris. It ends at the first fault, with a traceback and the bytes. In
its last lines: how many inputs were run (stat::number_of_executed_units), and how many edges of the
code they reached (cov).
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from common.packages import optional

try:
    atheris = optional("atheris", "to fuzz")
except ValueError as error:
    sys.exit(f"error: {error}")

with atheris.instrument_imports(include=["common", "describe", "json", "reader", "tokens", "yaml"]):
    import yaml  # noqa: F401  imported by describe where it is used, which would be too late

    from corpus import reader
    from corpus.descriptions import read_description
    from corpus.metadata import read_metadata
    from corpus.sources import InvalidDocument, Source

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
SEEDS = {
    "jsonl": ['{"text": "a\\ud83d\\n"}\r\n\n', '\ufeff{"text": 1, "text": "b", "n": [NaN, {}]}'],
    "metadata": [
        'j{"name": "n", "data_content": "text", "corpuses": ["a"], "dataset_path": "."}',
        "yname: n\ndata_content: text\ncorpuses: [a, 'b']\ndate: 2020-01-01\nx: !!int &a 1\n",
        'j{"format_version": 1, "dtype": "uint16", "vocab_size": 257, "eot_token": 256, "splits": '
        '{"train": {"files": [{"name": "train.bin", "tokens": 5}], "tokens": 5, "bytes": 5}}, '
        '"tokenizer": {"name": "bytes", "sha256": ""}}',
    ],
}


def jsonl(data: bytes) -> None:
    path = FOLDER / "a.jsonl"
    path.write_bytes(data)
    source = Source(str(path), "jsonl")
    found = [text for _, texts in reader.read(source) for text in texts]
    expected = [text_of(line) for line in data.split(b"\n") if line.strip()]
    assert [None if isinstance(text, InvalidDocument) else text for text in found] == expected


def text_of(line: bytes) -> str | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        text = row.get("text") if isinstance(row, dict) else None
        return text if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def metadata(data: bytes) -> None:
    name = "metadata.yaml" if data[:1] == b"y" else "metadata.json"
    (FOLDER / name).write_bytes(data[1:])
    for read in read_metadata, read_description:
        try:
            read(FOLDER)
        except (ValueError, OSError) as error:
            assert str(FOLDER) in str(error)
    (FOLDER / name).unlink()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SEEDS or not sys.argv[2].isdigit():
        sys.exit("error: say what to fuzz, jsonl or metadata, and for how many seconds")
    target, seconds = sys.argv[1:]
    reader.BLOCK = 64  # so that a line is longer
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    for number, seed in enumerate(SEEDS[target]):
        (seeds / str(number)).write_bytes(seed.encode())
    flags = [f"-max_total_time={seconds}", "-max_len=2048", "-timeout=20", "-print_final_stats=1"]
    atheris.Setup(
        [sys.argv[0], *flags, f"-artifact_prefix={FOLDER}/", str(seeds)], locals()[target]
    )
    atheris.Fuzz()
