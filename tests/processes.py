"""Scripts as processes: each one forks from a process that has torch and matplotlib.

Importing torch and matplotlib takes three seconds of a core, and the tests start a hundred scripts.
"""

import functools
import gc
import multiprocessing.forkserver
import os
import resource
import runpy
import sys
from pathlib import Path

import pytest

IMPORTED = [
    "processes", "requests", "safetensors.torch", "tiktoken", "tqdm", "matplotlib.figure",
    "torch._dynamo", "torch.distributed.run", "torch.nn.attention.flex_attention",
]  # fmt: skip


@functools.cache
def _forkserver():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server finds IMPORTED
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def start_script(script, *flags, cwd: Path, streams: Path, env=None, max_file_bytes=None):
    """Start `python SCRIPT FLAGS <in.txt >out.txt 2>err.txt` and return its Process.

    Args:
        script: Path of a file, or name of a module, as in `python -m`.
        *flags: Flags of the script.
        cwd: Working directory of the script.
        streams: Folder of in.txt, out.txt and err.txt; a missing in.txt means an empty input.
        env: The whole environment; the environment of the test if None.
        max_file_bytes: Largest size of a file that the script may write.
    """
    env = dict(os.environ if env is None else env)
    arguments = (str(script), list(map(str, flags)), cwd, streams, env, max_file_bytes)
    process = _forkserver().Process(target=_run_script, args=arguments)
    process.start()
    return process


def _run_script(script, flags, cwd, streams, env, max_file_bytes):
    # a collection would write to the pages of the imported modules, and so copy them
    gc.freeze()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    in_path = streams / "in.txt"
    os.dup2(os.open(in_path if in_path.exists() else os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(0)
    sys.stdout = open(1, "w")
    sys.stderr = open(2, "w", buffering=1)
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    sys.argv = [script, *flags]
    if script.endswith(".py"):
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
    else:  # python -m
        runpy.run_module(script, run_name="__main__", alter_sys=True)
