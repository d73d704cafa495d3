"""Compare how long documents of a .jsonl take to be read, with msgspec and without, and encoded.

python -m bench.reading               # 60 MB of documents of about 150 bytes
python -m bench.reading my.jsonl

Prints seconds of one core, the least of five rounds. Needs pip install msgspec fastokens, in the
versions that corpus/fast_json.py and corpus/encoders.py name.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from bench.tokenize import make_documents
from common.script import run_script
from corpus import fast_json
from corpus.encoders import FAST, open_encoder
from corpus.reader import read
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer

MEGABYTES = 60
ROUNDS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "documents.jsonl"
        if len(sys.argv) == 1:
            make_documents(path, MEGABYTES, "")
        source = Source(str(path), "jsonl")
        batches = [texts for _, texts in read(source)]
        encoder = open_encoder(FAST, get_tokenizer("gpt2"))
        without_msgspec = mock.patch.object(fast_json, "_decoder", lambda field: None)
        for name, block, function in (
            ("reading by json", without_msgspec, lambda: sum(1 for _ in read(source))),
            ("reading by msgspec", contextlib.nullcontext(), lambda: sum(1 for _ in read(source))),
            (f"encoding by {FAST}", contextlib.nullcontext(), lambda: encode(encoder, batches)),
        ):
            with block:
                print(f"{name:22} {least_seconds(function):.2f} s")


def encode(encoder, batches: list[list[str]]) -> None:
    for texts in batches:
        encoder.encode_documents(texts)


def least_seconds(function: Callable) -> float:
    """Return the seconds of one core that a call takes, the least of some rounds."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        function()
        rounds.append(time.process_time() - start)
    return min(rounds)


if __name__ == "__main__":
    run_script(main)
