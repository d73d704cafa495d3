"""The size of a block bounds the memory for every format and every script."""

# ruff: noqa: RUF001  (the test needs Chinese punctuation)

import os
import random
import sys

import pytest
from conftest import DEAD_PROXY, ROOT

from bench.report import whole_process

CHARACTERS = {
    "Georgian": "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებით. ",
    "Chinese with CRLF": "人人生而自由，在尊严和权利上一律平等。\r\n\r\n",
}


def peak_mib(path, *flags) -> float:
    """Return the peak memory of prepare_data.py with one worker, in MiB."""
    command = [sys.executable, ROOT / "prepare_data.py", "--input", path, "--workers", "1", *flags]
    return whole_process(command, cwd=path.parent, env=os.environ | DEAD_PROXY)[1]


@pytest.mark.parametrize("script", CHARACTERS)
def test_a_running_text_of_any_script_needs_little_memory(tmp_path, script, gpt2_tokenizer):
    line = CHARACTERS[script].encode()
    (tmp_path / "my.txt").write_bytes(line * (20_000_000 // len(line)))
    assert peak_mib(tmp_path / "my.txt") < 150  # 270 if the text is one chunk


def test_a_table_with_long_rows_needs_little_memory(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is in requirements-dev.txt")
    import pyarrow.parquet as pq

    noise = random.Random(0)
    texts = [noise.randbytes(150_000).hex() for _ in range(150)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "my.parquet", row_group_size=50)
    assert peak_mib(tmp_path / "my.parquet", "--tokenizer", "bytes") < 220  # not 550
