"""The code blocks of docs/ run: commands, Python, and interactive examples with their results.

The blocks of a page run in order, in one folder, without a network. doctest compares the results in
a `pycon` block.
"""

import contextlib
import doctest
import io
import json
import re
import shlex
from pydoc_data.topics import topics

import pytest
from conftest import ROOT, run_script

from corpus.vocabulary_files import ALIASES, VOCABULARY_FILES

DOCS = ROOT / "docs"
PAGES = ["data.md", "batches.md", "design.md", "benchmarks.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")
ELSEWHERE = {  # beginning of a command -> the test that runs it
    "pip install": ".ci/run",
    "python -m bench.": "test_bench.py",
    "source cluster/": "test_slurm.py",
    "sbatch": "test_slurm.py",
    "python prepare_data.py --prefetch": "test_network.py",
}


def run_command(line: str, folder) -> None:
    """Run `python SCRIPT ARGUMENTS`, with the tokenizer bytes instead of a download."""
    command = line.partition("  #")[0].strip()
    if command.startswith(tuple(ELSEWHERE)):
        return
    program, script, *arguments = shlex.split(command)
    assert program == "python", line
    prepares = script == "prepare_data.py" and "--input" in arguments
    if prepares and "--tokenizer" not in arguments:
        arguments += ["--tokenizer", "bytes"]
    env = {}
    if "bpe" in command:  # keeps a file in the vocabulary folder
        env = {"TIKTOKEN_CACHE_DIR": str(folder / "tokenizers")}
    result = run_script(script, *arguments, cwd=folder, env=env)
    assert result.returncode == 0, f"{line}\n{result.stderr}"


def run_examples(text: str, number: int, page: str, namespace: dict) -> None:
    """Run the >>> lines of a block and compare their results."""
    # doctest empties its namespace, so the block gets a copy
    test = doctest.DocTestParser().get_doctest(text, namespace, f"{page} block {number}", page, 0)
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=report.write, clear_globs=False)
    namespace.update(test.globs)
    assert runner.failures == 0, report.getvalue()


def write_inputs(folder) -> None:
    """Write the raw text that data.md assumes."""
    (folder / "my.txt").write_text("one for sorrow, two for mirth\n" * 100)
    (folder / "book.txt").write_text("".join(topics.values()))
    posts = [json.dumps({"text": f"post {i}", "body": f"body {i}"}) for i in range(100)]
    (folder / "posts.jsonl").write_text("\n".join(posts))
    posts[6] = '{"text": 5}'
    (folder / "broken.jsonl").write_text("\n".join(posts))
    (folder / "notes").mkdir()
    for i in range(60):
        (folder / "notes" / f"{i}.txt").write_text(f"note {i} " * 50)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page == "data.md":
        write_inputs(tmp_path)
    namespace = {"__name__": "__main__"}
    text = (DOCS / page).read_text(encoding="utf-8")
    for number, (language, code) in enumerate(BLOCK.findall(text), 1):
        if language == "sh":
            for line in code.splitlines():
                run_command(line, tmp_path)
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, f"{page} block {number}", "exec"), namespace)
        elif language == "pycon":
            run_examples(code, number, page, namespace)
        else:
            raise AssertionError(f"{page}: a block of {language!r} that nothing runs")


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_have_targets(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for target, section in LINK.findall(text):
        path = DOCS / target if target else DOCS / page
        assert path.exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert section in anchors, f"{target}#{section}"


def test_the_error_that_data_md_shows(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "posts.jsonl").write_bytes((tmp_path / "broken.jsonl").read_bytes())
    flags = ["--input", "posts.jsonl", "--tokenizer", "bytes"]
    result = run_script("prepare_data.py", *flags, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr in (DOCS / "data.md").read_text().replace("    error: ", "error: ")


def test_data_md_names_every_tokenizer():
    names = {"bytes", *ALIASES, *VOCABULARY_FILES}
    assert names <= set(re.findall(r"`([\w]+)`", (DOCS / "data.md").read_text()))
