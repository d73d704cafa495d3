"""The commands of README.md and docs/ run, their flags exist, and their links have targets.

The commands of PAGES and of the docstring of each script run in order, in a copy of the repository
and without a network. For a command that needs a network, a GPU or Slurm, the tests check that its
script and its flags exist.
"""

import ast
import doctest
import glob
import os
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, run_script

PAGES = ("README.md", "docs/training.md", "docs/weights.md", "docs/cluster.md")
SCRIPTS = ("train_gpt2.py", "sample.py", "prepare_data.py", "compare.py")
TOUR = ROOT / "docs" / "tour.md"


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    """Return the lines of all shell blocks and the commands in the docstrings of scripts."""
    lines = []
    for name in (*PAGES, "docs/tour.md"):
        for block in code_blocks(read_page(name), "sh"):
            lines += block.splitlines()
    for script in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(read_page(script)))
        lines += re.findall(r"^ *((?:python |torchrun --).*)", docstring, re.MULTILINE)
    return lines


def split_commands(lines) -> list[str]:
    """Return the distinct single commands, without comments."""
    commands = []
    for line in lines:
        commands += [part.strip() for part in line.split("  #")[0].split("&&") if part.strip()]
    return list(dict.fromkeys(commands))


COMMANDS = split_commands(command_lines())
# the last value of a repeated flag counts
QUICK_FLAGS = "--max_steps 2 --eval_every 2 --device cpu --compile false"
TINY_FLAGS = "--n_layer 1 --n_head 1 --n_embd 8 --batch_size 16 --sequence_length 16"


def shortened(command: str) -> str | None:
    """Return the command with flags that make it quick, or None if another test runs it."""
    if command.startswith(("pip install", "pytest")):
        return None  # .ci/run runs these
    if command.startswith("docker"):
        return None  # test_packaging.py compares these with the Dockerfile
    if command.startswith(("source cluster/", "sbatch")):
        return None  # test_slurm.py runs these
    if command.startswith("torchrun --") and "--standalone" not in command:
        return None  # these need two machines, or wait for a signal
    if command == "torchrun --standalone --nproc_per_node 2 train_gpt2.py":
        return None  # README.md has the same command with one more flag
    if "--init_from gpt2" in command:
        return None  # test_huggingface.py runs these with a local hub
    if "--engine ray" in command or "--prefetch" in command or "--data_dir folder" in command:
        return None  # test_slurm.py and tests/corpus run these
    if "opening.txt" in command:
        return None  # test_tour runs this
    if "train_gpt2.py" in command:
        has_shape = "--resume out/" in command or "--init_from" in command
        return f"{command} {QUICK_FLAGS}" + ("" if has_shape else f" {TINY_FLAGS}")
    return re.sub("bpe:[0-9]+", "bpe:270", command)  # my.txt gives no more


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's files, with what the README expects a reader to have."""
    folder = tmp_path_factory.mktemp("readme")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    if not files:
        pytest.skip("not a git checkout: which files belong to it is not known")
    for name in files.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "my.txt").write_text("some text of my own, line by line\n" * 100)
    text = os.environ.get("TINYSHAKESPEARE")
    if text:  # in place of a download
        (folder / "data" / "tinyshakespeare").mkdir(parents=True)
        shutil.copy(text, folder / "data" / "tinyshakespeare" / "input.txt")
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if shortened(c)])
def test_command(copy, command):
    trains_vocabulary = "bpe:" in command
    needs_vocabulary = "--input" in command and "bytes" not in command and not trains_vocabulary
    needs_text = ("bytes" in command or trains_vocabulary) and "--input" not in command
    if (needs_vocabulary or needs_text) and "TINYSHAKESPEARE" not in os.environ:
        pytest.skip("TINYSHAKESPEARE and TIKTOKEN_CACHE_DIR are not set, and there is no network")
    program, *argv = shlex.split(shortened(command))
    script = copy / argv.pop(0) if program == "python" else "torch.distributed.run"
    # a trained vocabulary is kept in the copy, not where the real vocabulary is
    env = {"TIKTOKEN_CACHE_DIR": ""} if trains_vocabulary else {}
    result = run_script(script, *argv, cwd=copy, env=env)
    assert result.returncode == 0, result.stderr


def test_the_exported_run_loads_in_transformers(copy):
    pytest.importorskip("transformers")
    if not (copy / "exported").exists():
        pytest.skip("the command that exports did not run")
    (block,) = code_blocks(read_page("docs/weights.md"), "python")
    names: dict = {}
    exec(block.replace('"exported"', repr(str(copy / "exported"))), names)
    vocab_size = names["model"].config.vocab_size
    assert len(names["tokenizer"]) == vocab_size


def setting_names(script: str) -> set[str]:
    """Return the names of the settings of a script: the fields of its dataclass."""
    for node in ast.parse(read_page(script)).body:
        if isinstance(node, ast.ClassDef) and node.name in ("Settings", "Config"):
            return {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
    raise AssertionError(f"{script} has no settings")


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"\.(py|sbatch)\b", c)])
def test_scripts_and_flags_of_a_command_exist(command):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.(py|sbatch)", word))
    script = words[place]
    assert (ROOT / script).is_file()
    if script.endswith(".sbatch"):
        stem = "prepare_data" if "prepare_data" in script else "train_gpt2"
        script = f"{stem}.py"
    given = {word[2:].split("=")[0] for word in words[place + 1 :] if word.startswith("--")}
    assert given <= setting_names(script)


def test_settings_named_in_a_table_exist():
    """In docs/training.md every setting of train_gpt2.py has a row, or a column of a size."""
    page = read_page("docs/training.md")
    first_cells = re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE)
    named = set(re.findall(r"`(?:--)?(\w+)`", " ".join(first_cells)))
    assert setting_names("train_gpt2.py") <= named
    page = read_page("docs/weights.md")
    first_cells = re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(first_cells)))
    assert named <= setting_names("sample.py")


def test_the_table_of_sizes_equals_the_code():
    import train_gpt2

    rows = re.findall(r"^\|(.*)\|$", read_page("docs/training.md"), re.MULTILINE)
    table = [[cell.strip("` ") for cell in row.split("|")] for row in rows]
    header = next(row for row in table if row[1:3] == ["tiny", "small"])
    for row in table[table.index(header) + 2 : table.index(header) + 13]:
        for size, cell in zip(header[1:], row[1:], strict=True):
            value = train_gpt2.SIZES[size].get(row[0])
            if cell in ("all", "of the weights"):
                assert value is None, (size, row[0])
            else:
                assert float(cell) == value, (size, row[0])


@pytest.mark.parametrize("page", [*PAGES, "docs/tour.md"])
def test_the_files_a_page_names_exist(page):
    text = read_page(page)
    folder = (ROOT / page).parent
    for name in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (folder / name).exists(), name
    of_a_reader = {"my.txt", "sample.txt", "opening.txt", "merges.txt"}
    for name in set(re.findall(r"`([\w/.]+\.(?:py|md|txt|toml|sbatch|sh))`", text)) - of_a_reader:
        found = (ROOT / name).exists() or glob.glob(str(ROOT / "*" / name))
        assert found, name


@pytest.mark.parametrize("interface, expected", [("", "unset"), ("ib0", "ib0")])
def test_the_network_interface_reaches_gloo(interface, expected, tmp_path):
    assert "GLOO_SOCKET_IFNAME" in read_page("docs/cluster.md")
    settings = read_page("cluster/settings.sh")
    assert settings.count('interface=""') == 1
    path = tmp_path / "settings.sh"
    path.write_text(settings.replace('interface=""', f'interface="{interface}"'))
    script = f"set -euo pipefail; source {path}; echo ${{GLOO_SOCKET_IFNAME-unset}}"
    env = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    result = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert result.stdout == f"{expected}\n", result.stderr


def test_tour(tmp_path, monkeypatch):
    """The code gives every value in the tour."""
    text = TOUR.read_text(encoding="utf-8")
    (opening,) = code_blocks(text, "text")
    (tmp_path / "opening.txt").write_text(opening)
    if "TINYSHAKESPEARE" in os.environ:
        with open(os.environ["TINYSHAKESPEARE"]) as f:
            assert f.read(len(opening)) == opening
    (command,) = split_commands("".join(code_blocks(text, "sh")).splitlines())
    script, *argv = shlex.split(command)[1:]
    result = run_script(script, *argv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    session = "\n".join(block for block in code_blocks(text, "python") if block.startswith(">>>"))
    test = doctest.DocTestParser().get_doctest(session, {}, "docs/tour.md", "docs/tour.md", 0)
    report = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)


def quotes() -> list[tuple[str, str, str]]:
    """Return (file, function, line) for every line that the tour quotes."""
    found = []
    for block in code_blocks(TOUR.read_text(encoding="utf-8"), "python"):
        if match := re.match(r"# ([\w/]+\.py), ([\w.]+)\n", block):
            lines = block[match.end() :].splitlines()
            found += [(match[1], match[2], line.strip()) for line in lines]
    return found


@pytest.mark.parametrize("file, function, line", quotes())
def test_the_tour_quotes_the_code(file, function, line):
    source = read_page(file)
    scope = ast.parse(source)
    for name in function.split("."):
        scope = next(node for node in scope.body if getattr(node, "name", None) == name)
    code = ast.get_source_segment(source, scope)
    assert line in [code_line.strip() for code_line in code.splitlines()]
