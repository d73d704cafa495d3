"""Flags become settings, and settings are checked."""

from dataclasses import dataclass
from typing import Literal

import pytest

from common.settings import check_conflicts, check_ranges, near, parse_settings, print_settings


@dataclass
class Settings:
    corpus: str = ""  # name; "": the newest, 100% of it
    n_layer: int | None = None  # blocks
    split: Literal["train", "val", ""] = "train"  # part of the corpus
    rate: float = 0.5  # peak
    plot: bool = False  # draw a picture
    quiet: bool = True  # print nothing
    input: tuple[str, ...] = ()  # files
    sizes: tuple[int, ...] = (1, 2)  # in MB


@pytest.fixture
def parse(monkeypatch):
    def parse(*flags, **options):
        monkeypatch.setattr("sys.argv", ["script.py", *flags])
        return parse_settings(Settings, "What it does.\n\n    python script.py\n", **options)

    return parse


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {}),
        ("--corpus my --rate 2", {"corpus": "my", "rate": 2.0}),
        ("--corpus=my --rate=2e-3", {"corpus": "my", "rate": 2e-3}),
        ("--corpus=-x", {"corpus": "-x"}),
        ("--corpus=--rate", {"corpus": "--rate"}),
        ("--corpus= --split=", {"corpus": "", "split": ""}),
        ("--n_layer 3 --n_layer 4", {"n_layer": 4}),
        ("--rate -1", {"rate": -1.0}),
        ("--plot --no_quiet", {"plot": True, "quiet": False}),
        ("--plot --no_plot", {}),
        ("--split val", {"split": "val"}),
        ("--input a b --plot", {"input": ("a", "b"), "plot": True}),
        ("--input a --input=b c --rate 1 --input d", {"input": ("a", "b", "c", "d"), "rate": 1.0}),
        ("--input=-a b", {"input": ("-a", "b")}),
        ("--sizes 3", {"sizes": (3,)}),
    ],
)
def test_flags_give_settings(parse, flags, expected):
    assert parse(*flags.split()) == Settings(**expected)


def test_a_missing_flag_keeps_its_default(parse):
    defaults = Settings("my", 3, "val", 0.1, True, False, ("a", "b"), (7,))
    assert parse(defaults=defaults) == defaults
    assert parse("--input", "c", "--no_plot", defaults=defaults) == Settings(
        "my", 3, "val", 0.1, False, False, ("c",), (7,)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--corpux my", "unknown --corpux; did you mean --corpus?"),
        ("--corpux=my", "unknown --corpux=my; did you mean --corpus?"),
        ("--corp my", "unknown --corp; did you mean --corpus?"),
        ("--zzz", "unknown --zzz"),
        ("my", "unexpected value 'my'"),
        ("my.txt", "unexpected value 'my.txt'; did you mean --input my.txt?"),
        ("--corpus my yours", "unexpected value 'yours'"),
        ("--plot=true", "unexpected value 'true'"),
        ("--corpus", "--corpus needs a value; write --corpus=VALUE if the value begins with"),
        ("--corpus --plot", "--corpus needs a value; write --corpus=VALUE if the value begins"),
        ("--input --plot", "--input needs at least one value"),
        ("--n_layer 1.5", "--n_layer must be a whole number, not '1.5'"),
        ("--n_layer None", "--n_layer must be a whole number, not 'None'"),
        (f"--n_layer {'9' * 400}", f"--n_layer must be a whole number, not '{'9' * 400}'"),
        ("--rate x", "--rate must be a finite number, not 'x'"),
        ("--rate nan", "--rate must be a finite number, not 'nan'"),
        ("--rate -inf", "--rate must be a finite number, not '-inf'"),
        ("--sizes 1 x", "--sizes has a value of the wrong type"),
        ("--split vall", "--split must be one of train, val, \"\", not 'vall'; did you mean val?"),
    ],
)
def test_a_wrong_flag_ends_the_program_with_one_line(parse, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        parse(*flags.split())
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.endswith(" (python script.py --help lists the flags)\n")
    assert printed.err.count("\n") == 1


def test_help_has_the_docstring_and_each_setting_with_its_comment_and_default(
    parse, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text and "\n    python script.py" in text
    lines = [" ".join(line.strip(" │").split()) for line in text.splitlines()]
    for line in (
        "--corpus STR name; \"\": the newest, 100% of it (default: '')",
        "--n_layer INT blocks (default: None)",
        "--split {train,val,} part of the corpus (default: train)",
        "--rate FLOAT peak (default: 0.5)",
        "--plot, --no_plot draw a picture (default: False)",
        "--sizes [INT [INT ...]] in MB (default: 1 2)",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rate", -0.5, "rate must be at least 0, not -0.5"),
        ("rate", 1e30, None),
        ("n_layer", 2**31, f"n_layer must be at most {2**31 - 1}, not {2**31}"),
        ("n_layer", 0, "n_layer must be at least 1, not 0"),
        ("n_layer", 9, "n_layer must be at most 8, not 9"),
        ("n_layer", 8, None),
    ],
)
def test_a_value_outside_its_range_is_an_error(name, value, message):
    ranges = {"n_layer": (1, 8)} if value in (0, 8, 9) else None
    if message is None:
        check_ranges(Settings(**{name: value}), ranges)
        return
    with pytest.raises(ValueError) as error:
        check_ranges(Settings(**{name: value}), ranges)
    assert str(error.value) == message


def test_conflicting_settings_are_an_error():
    excludes, requires = {"plot": ("rate",)}, {"corpus": "split val", "input": "plot"}
    check_conflicts(Settings(rate=1.0))
    check_conflicts(Settings(plot=True, input=("a",)), excludes, requires)
    check_conflicts(Settings(corpus="my", split="val"), excludes, requires)
    with pytest.raises(ValueError, match="--rate has no effect beside --plot: leave one out"):
        check_conflicts(Settings(rate=1.0, plot=True), excludes)
    with pytest.raises(ValueError, match="--corpus has no effect without --split val"):
        check_conflicts(Settings(corpus="my"), excludes, requires)


def test_near_suggests_the_nearest_name():
    assert near("gtp2", ["gpt2", "bytes"]) == "; did you mean gpt2?"
    assert near("zzz", ["gpt2", "bytes"]) == ""


def test_print_settings_leaves_out_empty_values(capsys):
    print_settings(Settings(corpus="my", rate=1e-4, quiet=False, input=("a", "b")))
    assert capsys.readouterr().out == "corpus=my split=train rate=0.0001 input=a b sizes=1 2\n"
