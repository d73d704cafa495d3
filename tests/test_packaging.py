"""The pins agree and every supported Python can install them; the Dockerfile has what it needs.

A pin is a requirement with ==. No test here installs or downloads anything.
"""

import importlib.metadata
import json
import re
import sys

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import train_gpt2

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest requires it there

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CI = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PYTHONS = re.findall(r'"(3\.\d+)"', CI)
FILES = ["requirements.txt", "requirements-dev.txt", "bench/requirements.txt"]


def pins_of(name: str) -> list[Requirement]:
    """Return the requirements of a file, without the files that it includes."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def test_pyproject_has_the_pins_of_requirements_txt():
    """`uv run` and `pip install -r requirements.txt` install the same versions."""
    assert [Requirement(line) for line in PROJECT["dependencies"]] == pins_of("requirements.txt")


def test_ci_runs_the_oldest_python_that_pyproject_allows():
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert f"Python {PYTHONS[0]} or newer" in README


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_gets_one_exact_version_of_a_package(python, name):
    environment = {"python_version": python, "sys_platform": "linux"}
    applying = [
        pin.name for pin in pins_of(name) if not pin.marker or pin.marker.evaluate(environment)
    ]
    assert len(applying) == len(set(applying))
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins_of(name))
    if name == "requirements.txt":
        assert set(applying) == {pin.name for pin in pins_of(name)}


@pytest.mark.parametrize("name", FILES)
def test_the_pinned_versions_support_every_python_they_are_pinned_for(name):
    """Of the packages that are installed: their metadata says which Pythons they support."""
    checked = 0
    for pin in pins_of(name):
        try:
            metadata = importlib.metadata.metadata(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if metadata["Version"].partition("+")[0] not in pin.specifier:
            continue  # the pin for another Python
        supported = SpecifierSet(metadata.get("Requires-Python", ""))
        for python in PYTHONS:
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert f"{python}.99" in supported, f"{pin} does not support Python {python}"
                checked += 1
    assert checked


def test_the_dockerfile_has_the_commands_of_the_readme():
    commands = re.findall(r"^#   (docker .*)", DOCKERFILE, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert command in README
        # Python as process 1 would ignore the SIGTERM of `docker stop` where it has no handler
        assert command.split()[1] == "build" or " --init " in command


def test_the_dockerfile_pins_its_image_and_copies_what_exists():
    (image,) = re.findall(r"^FROM (.*)", DOCKERFILE, re.MULTILINE)
    name, tag = image.split(":")
    assert name == "python"
    assert any(tag.startswith(f"{python}.") for python in PYTHONS)
    for source in re.findall(r"^COPY (\S+)", DOCKERFILE, re.MULTILINE):
        assert (ROOT / source).exists()


def test_the_image_gets_no_corpora_and_no_runs():
    docker = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "uv.lock", "data/*", "!data/README.md", "out"} <= set(docker)


def test_the_folders_of_the_image_are_those_of_the_settings():
    """The volumes are the default data_dir and out_dir of a script in the working directory."""
    (folder,) = re.findall(r"^WORKDIR (.*)", DOCKERFILE, re.MULTILINE)
    volumes = re.search(r"^VOLUME (.*)", DOCKERFILE, re.MULTILINE)[1]
    settings = train_gpt2.Settings()
    assert json.loads(volumes) == [f"{folder}/{settings.data_dir}", f"{folder}/{settings.out_dir}"]
