import pytest
from conftest import assert_one_line_error, run_script


@pytest.fixture
def run(rhyme, tmp_path):
    """A folder with a run that has learnt the rhyme."""
    flags = "--n_layer 2 --n_head 2 --n_embd 32 --sequence_length 32 --max_steps 150 --device cpu"
    result = run_script("train_gpt2.py", *flags.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return tmp_path


def test_samples(run):
    flags = [
        "--prompt",
        "one for sorrow, ",
        "--temperature",
        "0",
        "--max_new_tokens",
        "14",
    ]  # the last is a line end
    result = run_script("sample.py", *flags, cwd=run)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "one for sorrow, two for mirth\n\n\n"
    # longer than the window, several, and the same again for the same seed
    flags = ["--num_samples", "2", "--max_new_tokens", "100", "--prompt", "t"]
    first, again = (run_script("sample.py", *flags, cwd=run).stdout for _ in range(2))
    assert first == again
    assert first.count("\n---\n") == 2
    other = run_script("sample.py", *flags, "--seed", "1", "--temperature", "2", cwd=run).stdout
    assert other != first
    named = run_script("sample.py", "--run", "out/rhyme-tiny-1", "--prompt", "", cwd=run)
    assert named.returncode == 0, named.stderr

    (run / "prompt.txt").write_text("one for sorrow, ")
    greedy = ["--temperature", "0", "--max_new_tokens", "14"]
    expected = "one for sorrow, two for mirth\n\n\n"
    for prompt, typed in (
        (["--prompt_file", "prompt.txt"], ""),
        (["--prompt", "-"], "one for sorrow, "),
    ):
        result = run_script("sample.py", *greedy, *prompt, cwd=run, input=typed)
        assert result.stdout == expected, result.stderr
    asked = run_script(
        "sample.py", *greedy, "--interactive", cwd=run, input="one for sorrow, \none for sorrow, \n"
    )
    assert asked.returncode == 0 and asked.stdout == f"> {expected}> {expected}> \n"

    wrong = run_script("sample.py", "--num_samples", "0", cwd=run)
    assert_one_line_error(wrong, "num_samples must be at least 1")
    assert_one_line_error(run_script("sample.py", "--temperature", "-1", cwd=run), "temperature")
    assert_one_line_error(run_script("sample.py", "--run", "out/x", cwd=run), "out/x/last.pt")


def test_nothing_trained(tmp_path):
    result = run_script("sample.py", cwd=tmp_path)
    assert_one_line_error(result, "out/ has no trained model", "python train_gpt2.py")
