"""examples/tour.ipynb runs from the first cell to the last, and its model learns.

The run is shorter than a reader's: the test changes the settings, which are one cell.
"""

import os
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from conftest import DEAD_PROXY, ROOT

nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
pytest.importorskip("ipykernel", reason="needs ipykernel")

NOTEBOOK = ROOT / "examples" / "tour.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs_of(notebook) -> list:
    """Return the outputs of all cells: texts and images."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def change_settings(notebook, settings) -> None:
    """Change the values in the cell of settings."""
    (cell,) = (cell for cell in notebook.cells if re.search(r"^STEPS = ", cell.source, re.M))
    for name, value in settings.items():
        pattern = rf"^{name} = .*?(?=  #|$)"
        cell.source, count = re.subn(pattern, f"{name} = {value}", cell.source, flags=re.M)
        assert count == 1, name


def run(notebook, folder, settings) -> str:
    """Run all cells in a folder with other settings, and return what they print."""
    change_settings(notebook, settings)
    client = nbclient.NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return "".join(output.get("text", "") for output in outputs_of(notebook))


def find_root(notebook, monkeypatch) -> Path:
    """Run the first cell as far as it looks for the clone, and return what it found."""
    monkeypatch.setattr("sys.path", list(sys.path))
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    names: dict = {}
    exec(first.source.partition("requirements = ")[0], names)
    assert sys.path[0] == str(names["ROOT"])
    return names["ROOT"]


def test_the_notebook_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 10 <= len(cells) <= 14
    for cell in cells:
        assert cell.outputs == []
        assert cell.execution_count is None
        assert not re.search(r"^\s*!", cell.source, re.M)  # modules, not shell commands


@pytest.mark.slow
def test_the_notebook_runs_and_its_model_learns(notebook, tmp_path, monkeypatch):
    folders = {
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "run"),
    }
    for name, value in (DEAD_PROXY | folders | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    text = tmp_path / "my.txt"
    text.write_text("".join(topics.values())[:100_000])
    settings = {"TEXT": repr(str(text)), "DATA": f"Path({str(tmp_path / 'data')!r})", "STEPS": 20}
    printed = run(notebook, ROOT / "examples", settings)
    before, after = re.search(
        r"before the step ([\d.]+), after the step ([\d.]+)", printed
    ).groups()
    assert float(after) < float(before)
    losses = [float(loss) for loss in re.findall(r"validation ([\d.]+)", printed)]
    assert len(losses) == 5
    assert losses[-1] < 4 < 5.5  # ln(257) is 5.55
    assert len(re.findall(r"bits per byte: ", printed)) == 3
    images = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert len(images) == 2
    assert (tmp_path / "data" / "tour-my" / "metadata.json").exists()


@pytest.mark.parametrize("working_folder", ["clone", "clone/examples", "."])
def test_the_first_cell_finds_the_clone(notebook, tmp_path, monkeypatch, working_folder):
    """In the clone, below it, and beside it, as a notebook service opens it."""
    (tmp_path / "clone" / "examples").mkdir(parents=True)
    (tmp_path / "clone" / "train_gpt2.py").touch()
    monkeypatch.chdir(tmp_path / working_folder)
    assert find_root(notebook, monkeypatch) == tmp_path / "clone"


def test_a_folder_of_another_user_does_not_hide_the_clone(notebook, tmp_path, monkeypatch):
    """A home folder on a disk of its own has lost+found, which only root may read."""
    (tmp_path / "a").mkdir()
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "train_gpt2.py").touch()
    monkeypatch.chdir(tmp_path)
    stat = os.stat

    def stat_as_user(path, **options):
        if Path(path).parent == tmp_path / "a":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", stat_as_user)
    assert find_root(notebook, monkeypatch) == tmp_path / "clone"


def test_another_text_may_be_chosen_and_the_cells_run_again(notebook, tmp_path):
    """The corpus of the first text is not in the way of the second one."""
    names: dict = {"Path": Path, "ROOT": ROOT}
    for text in ("one for sorrow\n", "two for joy\n"):
        path = tmp_path / f"{text[:3]}.txt"
        path.write_text(text * 100)
        data = f"Path({str(tmp_path / 'data')!r})"
        change_settings(notebook, {"TEXT": repr(str(path)), "DATA": data})
        cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        for source in cells[1:6]:  # from the settings to the windows
            exec(source, names)
        assert names["tokenizer"].decode(names["x"]).startswith(text)


def test_without_a_clone_the_first_cell_says_what_to_do(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="clone the repository with git"):
        find_root(notebook, monkeypatch)
