"""python SCRIPT FLAGS, forked from a process that has torch and matplotlib: importing them takes
three seconds of a core, and these tests start a hundred scripts."""

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
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where it looks for them
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def start(script, *flags, cwd: Path, streams: Path, env=None, largest_file=None):
    """The multiprocessing.Process of python SCRIPT FLAGS <in.txt >out.txt 2>err.txt, those in
    the folder `streams`. script: a file's path, or a module's name, as after python -m. env: all
    of its environment. largest_file: bytes that one may have."""
    env = dict(os.environ if env is None else env)
    arguments = str(script), list(map(str, flags)), cwd, streams, env, largest_file
    process = _forkserver().Process(target=_script, args=arguments)
    process.start()
    return process


def _script(script, flags, cwd, streams, env, largest_file):
    gc.freeze()  # what was imported is no garbage: to look for some in it copies its pages
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    given = streams / "in.txt"
    os.dup2(os.open(given if given.exists() else os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(streams / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [script, *flags]
    if script.endswith(".py"):
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
    else:  # python -m
        runpy.run_module(script, run_name="__main__", alter_sys=True)
