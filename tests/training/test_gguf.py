"""An exported run becomes a GGUF file, and llama.cpp predicts what our model predicts.

The tests run the command of docs/weights.md. They need a clone of llama.cpp in LLAMA_CPP, and the
package llama-cpp-python, which compiles for minutes, so that requirements-dev.txt does not have it.
"""

import os
import re
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_corpus, run_script

from model import GPT


def llama_cpp_clone() -> Path:
    """Return the folder in LLAMA_CPP, or skip the test."""
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP is not set to a clone of llama.cpp, which has the converter")
    return Path(os.environ["LLAMA_CPP"])


def convert(folder) -> subprocess.CompletedProcess:
    """Run the command of docs/weights.md in a folder that has a model in exported/."""
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    command = re.search(r"^    python (llama\.cpp/convert_hf_to_gguf\.py exported .*)", page, re.M)[
        1
    ]
    script, *arguments = shlex.split(command)
    script = llama_cpp_clone() / script.removeprefix("llama.cpp/")
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, capture_output=True, text=True
    )


def export_run(folder, tokenizer: str) -> None:
    """Train a small run in a folder, and export it to exported/."""
    make_corpus(
        folder / "data" / "c", ["one for sorrow, two for mirth\n" * 200], tokenizer=tokenizer
    )
    flags = "--run_name r --device cpu --dtype float32 --compile false --max_steps 120"
    shape = "--n_layer 2 --n_head 2 --n_embd 32 --sequence_length 32 --batch_size 4"
    rate = "--learning_rate 0.03"
    for command in (
        ["train_gpt2.py", *flags.split(), *shape.split(), *rate.split()],
        ["sample.py", "--run", "out/r", "--export", "exported"],
    ):
        result = run_script(*command, cwd=folder)
        assert result.returncode == 0, result.stderr


def test_llama_cpp_predicts_what_our_model_predicts(tmp_path, gpt2_tokenizer):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    llama_cpp_clone()
    export_run(tmp_path, "gpt2")
    result = convert(tmp_path)
    assert result.returncode == 0, result.stderr
    model = GPT.from_pretrained(tmp_path / "exported").eval()
    path = str(tmp_path / "mine.gguf")
    with closing(
        llama_cpp.Llama(path, n_ctx=32, n_threads=1, logits_all=True, verbose=False)
    ) as llama:
        for text in ("one for", "It's 1234 £, naïve\n\n  Ὀδυσσεύς 🙂"):
            ids = gpt2_tokenizer.encode(text).tolist()
            assert llama.tokenize(text.encode(), add_bos=False) == ids
        marked = llama.tokenize(b"<|endoftext|>one", add_bos=False, special=True)
        assert marked == [50256, *gpt2_tokenizer.encode("one").tolist()]

        prompt = gpt2_tokenizer.encode("one for").tolist()
        greedy = [int(token) for token in model.generate(torch.tensor([prompt]), 20, temperature=0)]
        completion = llama.create_completion("one for", max_tokens=20, temperature=0)
        assert completion["choices"][0]["text"] == gpt2_tokenizer.decode(greedy)
        assert len(set(greedy)) > 4

        ids = [*prompt, *greedy]
        llama.reset()
        llama.eval(ids)
        logits = np.array(llama.scores[: len(ids)])
        # llama.cpp looks the GELU up in a table of 16-bit numbers
        with torch.no_grad():
            expected, _ = model(torch.tensor([ids]))
        np.testing.assert_allclose(logits, expected[0].numpy(), atol=1e-2)


def test_the_converter_refuses_bytes(tmp_path):
    """docs/weights.md says so. If this fails, llama.cpp has learned more."""
    llama_cpp_clone()
    export_run(tmp_path, "bytes")
    result = convert(tmp_path)
    assert result.returncode != 0
    assert "pre-tokenizer was not recognized" in result.stderr
