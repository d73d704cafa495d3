"""Shared by the tests: no network, one thread a process, small corpora made by formula."""

import base64
import functools
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from processes import start

import train_gpt2
from corpus import pipeline
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.reader import read
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from training.metrics import read_metrics
from training.run_folder import newest_run

ROOT = Path(__file__).resolve().parent.parent
DEAD_PROXY = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}

torch.set_num_threads(1)  # the same sums in every test, and no fight for two cores


LONGEST = ["test_slurm", "test_train_gpt2", "test_bench", "test_readme", "test_tasks", "test_use"]


def pytest_collection_modifyitems(items):
    """Whole files are shared out, in this order: none of the long ones may be left for the end."""

    def rank(item) -> int:
        if item.get_closest_marker("cuda"):  # no process may be forked once CUDA is initialized
            return len(LONGEST) + 1
        stem = item.path.stem
        return LONGEST.index(stem) if stem in LONGEST else len(LONGEST)

    items.sort(key=rank)


def tar_of(members) -> bytes:
    """A .tar.gz; members: name -> text, or (type, target) of a link or a device."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(text, tuple):
                info.type, info.linkname = text
                archive.addfile(info)
            else:
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
    return file.getvalue()


def _shared(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set (.ci/run sets it where the files lie)")
    return Path(path)


@pytest.fixture
def in_memory(tmp_path):
    """A folder in memory, where there is such a place: there, fsync costs nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def tinyshakespeare() -> Path:
    """The real text."""
    return _shared("TINYSHAKESPEARE")


@pytest.fixture
def gpt2_tokenizer():
    """The real vocabulary."""
    _shared("TIKTOKEN_CACHE_DIR")
    return get_tokenizer("gpt2")


@pytest.fixture
def tiktoken_file(tmp_path, monkeypatch) -> Path:
    """A small vocabulary for tests that GPT-2's ids don't matter to: all bytes and 64 merges.

    Tokenizers that the test makes are kept in a folder of the test, not in the checkout's data/.
    """
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tokenizers"))
    pieces = [bytes([i]) for i in range(256)]
    pieces += [b"%c%c" % (first, second) for first in b" etaonis" for second in b"aeiohtsr"]
    lines = [b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def server(tmp_path):
    """Serves the files of tmp_path/server; server.asked: the paths of all requests."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            server.asked.append(self.path)
            super().do_GET()

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked, server.folder = [], folder
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def make_corpus(folder: Path, texts, documents=False, tokenizer="bytes", **options) -> dict:
    """Prepares `texts` (one, unless they are documents) in `folder`; returns the metadata."""
    path = folder.parent / f"{folder.name}.{'jsonl' if documents else 'txt'}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts] if documents else texts
    path.write_bytes("".join(lines).encode())
    source = Source(str(path), "jsonl" if documents else "text")
    corpus = Corpus(folder.name, {"made": "by a test"}, [source])
    with open_engine("processes", workers=1) as run_tasks:
        return pipeline.prepare(corpus, get_tokenizer(tokenizer), folder, run_tasks, **options)


@pytest.fixture
def rhyme(tmp_path) -> Path:
    """data/rhyme: 5,400 bytes that a model learns in a few steps."""
    make_corpus(tmp_path / "data" / "rhyme", ["one for sorrow, two for mirth\n" * 180])
    return tmp_path / "data" / "rhyme"


TINY = {  # a model of 10,000 parameters
    "n_layer": 2, "n_head": 2, "n_embd": 16, "sequence_length": 16, "batch_size": 4,
    "eval_every": 8, "log_every": 1, "warmup_steps": 2, "device": "cpu", "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def train(rhyme, tmp_path, monkeypatch):
    """train(max_steps=8, ...) is `python train_gpt2.py --max_steps 8 ...` on a tiny model; returns
    the folder of the run. It draws no loss.png."""
    monkeypatch.chdir(tmp_path)
    for module in ("metrics", "report"):
        monkeypatch.setattr(f"training.{module}.plot_losses", lambda folder: None)

    def train(**flags):
        flags = flags if "resume" in flags else TINY | flags
        argv = [str(part) for name, value in flags.items()
                for part in ([f"--{name}"] if value is True else [f"--{name}", value])]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *argv])
        assert train_gpt2.main() == 0
        return newest_run("out")

    return train


def tiny_checkpoint(step: int) -> dict:
    """What a run of the smallest model saves."""
    config = GPTConfig(vocab_size=2, n_positions=2, n_layer=1, n_head=1, n_embd=2)
    known = {"step": step, "position": step, "best": {"step": 1, "val_loss": 1.0}, "config": {}}
    metadata = {"vocab_size": config.vocab_size, "tokenizer": {"name": "bytes"}, "splits": {}}
    shape = {"model_config": asdict(config), "metadata": metadata}
    return known | shape | {"model": GPT(config).state_dict(), "optimizers": []}


@pytest.fixture
def device() -> torch.device:
    """The GPU that tests/cuda runs on, or the CPU in a rehearsal (CONTRIBUTING.md)."""
    if os.environ.get("CUDA_TESTS_ON_CPU") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU (CUDA_TESTS_ON_CPU=1 rehearses these tests on the CPU)")
    return torch.device("cuda", 0)


@pytest.fixture
def gpu(device) -> torch.device:
    """The same for tests that prove nothing on a CPU, where they skip in a rehearsal, too."""
    if device.type != "cuda":
        pytest.skip("only a GPU can do this: left out of the rehearsal")
    return device


@pytest.fixture
def driver(monkeypatch):
    """driver(gpus=2, name=..., capability=...) makes torch.cuda find such GPUs.

    Only what torch.cuda asks the C library is replaced; torch.cuda itself is the real one.
    driver.current: the indices that were made the current device; driver.initialized: how often
    the driver was initialized.
    """
    properties = types.SimpleNamespace(uuid="GPU-0", total_memory=int(80e9))

    def driver(gpus=1, name="NVIDIA H100 80GB HBM3", capability=(9, 0)):
        def set_device(index):
            assert type(index) is int and 0 <= index < gpus
            driver.current.append(index)

        def init():
            driver.initialized += 1

        properties.name = name
        properties.major, properties.minor = capability
        fakes = {
            "_cuda_getDeviceCount": lambda: gpus,
            "_cuda_setDevice": set_device,
            "_cuda_getDevice": lambda: driver.current[-1] if driver.current else 0,
            "_cuda_init": init,
            "_cuda_isInBadFork": lambda: False,
        }
        for function, fake in fakes.items():
            monkeypatch.setattr(torch._C, function, fake, raising=False)
        # what torch.cuda keeps of the C library: a CPU build has none of it
        monkeypatch.setattr(torch.cuda, "_cudart", object(), raising=False)
        monkeypatch.setattr(torch.cuda, "_initialized", False)
        generators = tuple(torch.Generator() for _ in range(gpus))
        monkeypatch.setattr(torch.cuda, "default_generators", generators)
        monkeypatch.setattr(torch.cuda, "_queued_calls", [])
        monkeypatch.setattr(torch.cuda, "_cached_device_count", None)
        monkeypatch.setattr(
            torch.cuda, "_get_device_properties", lambda index: properties, raising=False
        )

    driver.current, driver.initialized = [], 0
    return driver


def losses(folder, name="train_loss"):
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if name in line}


def files(folder: Path) -> dict[str, bytes]:
    """What all the files in a folder hold."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flat(source):
    """(position, text) of each document of a source."""
    return [pair for positions, texts in read(source) for pair in zip(positions, texts)]


def run_script(script, *flags, cwd: Path, env=None, input="", **options):
    """python SCRIPT FLAGS in `cwd`, offline, to its end: a CompletedProcess. options: of start."""
    env = os.environ | DEAD_PROXY | (env or {})
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder)
        (streams / "in.txt").write_text(input)
        path = ROOT / script if str(script).endswith(".py") else script  # or python -m
        process = start(path, *flags, cwd=cwd, streams=streams, env=env, **options)
        process.join()
        out, err = ((streams / name).read_text() for name in ("out.txt", "err.txt"))
    return subprocess.CompletedProcess([script, *flags], process.exitcode, out, err)


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 1 or 2 and an error of one or two lines that has all the `words`."""
    assert result.returncode in (1, 2), result.stderr
    assert result.stderr.startswith("error: "), result.stderr
    assert len(result.stderr.splitlines()) <= 2, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)
