"""Fixtures and helpers of all tests: no network, one thread per process, small corpora."""

import base64
import functools
import http.server
import io
import json
import os
import signal
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
from processes import start_script

import train_gpt2
from corpus import pipeline
from corpus.engines import open_engine
from corpus.inputs import Corpus
from corpus.reader import read
from corpus.sources import Source
from corpus.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from training.json_lines import read_lines
from training.run_folder import newest_run

ROOT = Path(__file__).resolve().parent.parent
DEAD_PROXY = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}

torch.set_num_threads(1)  # every test gets the same sums, and two workers share two cores

# A shell starts jobs in the background with SIGINT ignored, and child processes would inherit this.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest-xdist hands out whole files in this order. A long file at the end would leave one worker
# without work.
LONGEST_FILES = [
    "test_slurm", "test_train_gpt2", "test_bench", "test_readme", "test_tasks", "test_use",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Order the tests: the longest files first, the CUDA tests last."""

    def position(item) -> int:
        if item.get_closest_marker("cuda"):  # no process may fork once CUDA is initialized
            return len(LONGEST_FILES) + 1
        if item.path.stem in LONGEST_FILES:
            return LONGEST_FILES.index(item.path.stem)
        return len(LONGEST_FILES)

    items.sort(key=position)


@pytest.fixture(autouse=True)
def restore_ctrl_c():
    """Restore the handler of Ctrl-C: an engine ignores Ctrl-C after the first one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def make_tar(members) -> bytes:
    """Return a .tar.gz file.

    Args:
        members: Maps a name to a text, or to the type and the target of a link or a device.
    """
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                data = content.encode()
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def path_from_environment(variable: str) -> Path:
    """Return the path in an environment variable, or skip the test if the variable is not set."""
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set (.ci/run sets it if the files exist)")
    return Path(path)


@pytest.fixture
def memory_folder(tmp_path):
    """A temporary folder in memory if the machine has /dev/shm: fsync costs nothing in memory."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


@pytest.fixture
def tinyshakespeare() -> Path:
    """The path of the real TinyShakespeare text."""
    return path_from_environment("TINYSHAKESPEARE")


@pytest.fixture
def gpt2_tokenizer():
    """The tokenizer with GPT-2's real vocabulary."""
    path_from_environment("TIKTOKEN_CACHE_DIR")
    return get_tokenizer("gpt2")


@pytest.fixture
def tiktoken_file(tmp_path, monkeypatch) -> Path:
    """The path of a small vocabulary for tests that do not need GPT-2's ids.

    The vocabulary has all 256 bytes and 64 merges. Copies of tokenizers go to a folder of the
    test, not to data/ in the checkout.
    """
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tokenizers"))
    token_bytes = [bytes([i]) for i in range(256)]
    token_bytes += [b"%c%c" % (first, second) for first in b" etaonis" for second in b"aeiohtsr"]
    lines = [b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(token_bytes)]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def server(tmp_path):
    """An HTTP server for the files in server.folder.

    server.url is its address, and server.requested_paths lists the paths of all requests.
    """
    folder = tmp_path / "server"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            server.requested_paths.append(self.path)
            super().do_GET()

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.requested_paths = []
    server.folder = folder
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def make_corpus(folder: Path, texts, documents=False, tokenizer="bytes", **options) -> dict:
    """Prepare a corpus in `folder` and return its metadata.

    Args:
        folder: Folder of the corpus; the source lies beside it.
        texts: Documents, or the parts of one running text.
        documents: Whether `texts` are documents.
        tokenizer: Name of the tokenizer.
        **options: Options of pipeline.prepare.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if documents:
        source = Source(str(folder.parent / f"{folder.name}.jsonl"), "jsonl")
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    else:
        source = Source(str(folder.parent / f"{folder.name}.txt"), "text")
        content = "".join(texts)
    Path(source.path).write_bytes(content.encode())
    corpus = Corpus(folder.name, {"made": "by a test"}, [source])
    with open_engine("processes", workers=1) as run_tasks:
        return pipeline.prepare(corpus, get_tokenizer(tokenizer), folder, run_tasks, **options)


@pytest.fixture
def rhyme(tmp_path) -> Path:
    """The folder data/rhyme: a corpus of 5,400 bytes that a model learns in a few steps."""
    make_corpus(tmp_path / "data" / "rhyme", ["one for sorrow, two for mirth\n" * 180])
    return tmp_path / "data" / "rhyme"


TINY = {  # a model of 10,000 parameters
    "n_layer": 2, "n_head": 2, "n_embd": 16, "sequence_length": 16, "batch_size": 4,
    "eval_every": 8, "log_every": 1, "warmup_steps": 2, "device": "cpu", "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def train(rhyme, tmp_path, monkeypatch):
    """A function that trains a tiny model and returns the folder of the run.

    train(max_steps=8) is `python train_gpt2.py --max_steps 8`, without loss.png and report.html.
    """
    monkeypatch.chdir(tmp_path)
    for module in ("metrics", "report"):
        monkeypatch.setattr(f"training.{module}.plot_losses", lambda folder: None)
    monkeypatch.setattr("training.report.write_report_page", lambda *arguments: None)
    monkeypatch.setattr("training.metrics.VALIDATION_SAMPLE", 10)  # tokens, for speed

    def train(**flags):
        if "resume" not in flags:
            flags = TINY | flags
        argv = ["train_gpt2.py"]
        for name, value in flags.items():
            argv.append(f"--{name}")
            if value is not True:
                argv += map(str, value if isinstance(value, tuple) else (value,))
        monkeypatch.setattr(sys, "argv", argv)
        assert train_gpt2.main() == 0
        return newest_run("out")

    return train


def tiny_checkpoint(step: int) -> dict:
    """Return the checkpoint of a run with the smallest model."""
    config = GPTConfig(vocab_size=2, n_positions=2, n_layer=1, n_head=1, n_embd=2)
    return {
        "step": step,
        "position": step,
        "best": {"step": 1, "val_loss": 1.0},
        "config": {},
        "model_config": asdict(config),
        "metadata": {"vocab_size": 2, "tokenizer": {"name": "bytes", "sha256": ""}, "splits": {}},
        "model": GPT(config).state_dict(),
        "optimizers": [],
    }


@pytest.fixture
def device() -> torch.device:
    """The GPU that tests/cuda uses, or the CPU in a rehearsal (see CONTRIBUTING.md)."""
    if os.environ.get("CUDA_TESTS_ON_CPU") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU (CUDA_TESTS_ON_CPU=1 rehearses these tests on the CPU)")
    return torch.device("cuda", 0)


@pytest.fixture
def gpu(device) -> torch.device:
    """The GPU, for tests that prove nothing on a CPU; these tests skip in a rehearsal."""
    if device.type != "cuda":
        pytest.skip("the test needs a GPU: the rehearsal leaves it out")
    return device


@pytest.fixture
def driver(monkeypatch):
    """A fake CUDA driver: driver(gpus=2, name=..., capability=...) makes torch.cuda find such GPUs.

    The fake replaces functions of torch's C library only; torch.cuda itself is real.
    driver.current lists each index that became the current device. driver.initialized counts the
    initializations of the driver.
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
        # the C functions by which PyTorch reaches the driver: a CPU build does not have them
        for function, fake in fakes.items():
            monkeypatch.setattr(torch._C, function, fake, raising=False)
        # What torch.cuda keeps from the C library, which a CPU build cannot make: the library
        # itself, a generator for each GPU, and the properties of a GPU.
        monkeypatch.setattr(torch.cuda, "_cudart", object(), raising=False)
        generators = tuple(torch.Generator() for _ in range(gpus))
        monkeypatch.setattr(torch.cuda, "default_generators", generators)
        monkeypatch.setattr(
            torch.cuda, "_get_device_properties", lambda index: properties, raising=False
        )
        # What an initialization changes in torch.cuda: it starts again here, and monkeypatch
        # restores it, so that the next test finds no GPU.
        monkeypatch.setattr(torch.cuda, "_initialized", False)
        monkeypatch.setattr(torch.cuda, "_queued_calls", [])
        monkeypatch.setattr(torch.cuda, "_cached_device_count", None)

    driver.current = []
    driver.initialized = 0
    return driver


@pytest.fixture
def processor():
    """Return a function that makes this processor have some instructions: processor("avx2").

    The fake replaces the function of torch's C library that asks the processor.
    """

    def processor(*instructions):
        capabilities = dict.fromkeys(instructions, True)
        patch.setattr(torch._C._cpu, "_get_cpu_capability", lambda: capabilities)
        torch.cpu.get_capabilities.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        yield processor
    torch.cpu.get_capabilities.cache_clear()


def losses(folder, name="train_loss"):
    """Return {step: value} of one metric of a run."""
    lines = read_lines(folder / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if name in line}


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_documents(source):
    """Return the (position, text) pair of each document of a source."""
    return [pair for positions, texts in read(source) for pair in zip(positions, texts)]


def run_script(script, *flags, cwd: Path, env=None, input="", **options):
    """Run `python SCRIPT FLAGS` offline and return a CompletedProcess.

    Args:
        script: Path relative to the repository, or name of a module, as in `python -m`.
        *flags: Flags of the script.
        cwd: Working directory of the script.
        env: Additional environment variables.
        input: Text for standard input.
        **options: Options of start_script.
    """
    env = os.environ | DEAD_PROXY | (env or {})
    path = ROOT / script if str(script).endswith(".py") else script
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder)
        (streams / "in.txt").write_text(input)
        process = start_script(path, *flags, cwd=cwd, streams=streams, env=env, **options)
        process.join()
        out = (streams / "out.txt").read_text()
        err = (streams / "err.txt").read_text()
    return subprocess.CompletedProcess([script, *flags], process.exitcode, out, err)


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a script fails with exit code 1 or 2 and a short error with all `words`."""
    assert result.returncode in (1, 2), result.stderr
    assert result.stderr.startswith("error: "), result.stderr
    assert len(result.stderr.splitlines()) <= 2, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)
