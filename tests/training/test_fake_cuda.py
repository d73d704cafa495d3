"""Run fake_cuda_cases.py in a separate process, whose torch finds a fake GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

HERE = Path(__file__).parent


@pytest.fixture
def cuda_stub(tmp_path) -> Path:
    """The path of the library that the test compiles from cuda_stub.cpp."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        pytest.skip("the backend of the fake GPU needs a C++ compiler")
    torch_folder = Path(torch.__file__).parent
    library = tmp_path / "cuda_stub.so"
    include = torch_folder / "include"
    libraries = torch_folder / "lib"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{include}", HERE / "cuda_stub.cpp"]
    command += ["-o", library, f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.timeout(400)  # 25 seconds of a core, on a busy machine several times as long
@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library with LD_PRELOAD")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build runs tests/cuda instead")
def test_the_whole_training_step_on_a_fake_gpu(cuda_stub):
    command = [sys.executable, "-m", "pytest", "-n", "0", "--tb=short", HERE / "fake_cuda_cases.py"]
    env = os.environ | {"LD_PRELOAD": str(cuda_stub), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    assert int(re.search(r"\d+(?= passed)", result.stdout)[0]) >= 15
