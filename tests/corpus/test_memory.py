"""The size of a block bounds the memory for every format and every script."""

# ruff: noqa: RUF001  (the test needs Chinese punctuation)

import bz2
import lzma
import os
import random
import sys

import pytest
from conftest import DEAD_PROXY, ROOT
from test_tokenizer import make_json

from bench.report import whole_process

CHARACTERS = {
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებით. ",
    "Amharic": "የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው። ",
    "Chinese with indents": "　　人人生而自由，在尊严和权利上一律平等。\n",
    "Chinese with CRLF": "人人生而自由，在尊严和权利上一律平等。\r\n\r\n",
}


def peak_mib(path, *flags) -> float:
    """Return the peak memory of prepare_data.py with one worker, in MiB."""
    command = [sys.executable, ROOT / "prepare_data.py", "--input", path, "--workers", "1", *flags]
    return whole_process(command, cwd=path.parent, env=os.environ | DEAD_PROXY)[1]


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_a_compressed_text_needs_little_memory(tmp_path, compress):
    suffix = ".bz2" if compress is bz2.compress else ".xz"
    line = CHARACTERS["Chinese with CRLF"].encode()
    (tmp_path / f"my.txt{suffix}").write_bytes(compress(line * (5_000_000 // len(line))))
    assert peak_mib(tmp_path / f"my.txt{suffix}", "--tokenizer", "bytes") < 150


def test_a_tokenizer_json_needs_little_memory(tmp_path):
    make_json(tmp_path / "mine.json")
    (tmp_path / "my.txt").write_text("one for sorrow, two for mirth\n" * 100_000)
    tokenizer = str(tmp_path / "mine.json")
    assert (
        peak_mib(tmp_path / "my.txt", "--tokenizer", tokenizer) < 150
    )  # 238 in one call per block


@pytest.mark.parametrize("encoder, most", [("tiktoken", 150), ("auto", 200)])
@pytest.mark.parametrize("script", CHARACTERS)
def test_a_running_text_of_any_script_needs_little_memory(
    tmp_path, script, encoder, most, gpt2_tokenizer
):
    line = CHARACTERS[script].encode()
    (tmp_path / "my.txt").write_bytes(line * (20_000_000 // len(line)))
    flags = ["--encoder", encoder]  # the fast encoder has a cache of its own
    assert peak_mib(tmp_path / "my.txt", *flags) < most  # 270 if the text is one chunk


def test_a_table_with_long_rows_needs_little_memory(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    noise = random.Random(0)
    texts = [noise.randbytes(150_000).hex() for _ in range(150)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "my.parquet", row_group_size=50)
    assert peak_mib(tmp_path / "my.parquet", "--tokenizer", "bytes") < 220  # not 550
