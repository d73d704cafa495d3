"""Split names: which files and splits are for train, val or test by their names.

split_of_name("train-00000-of-00002.parquet")    # "train"
split_of_name("validation_matched")              # "val"
split_of_name("contest.txt")                     # ""
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from corpus.sources import Source

WORDS = {  # in the order in which they count, so that text for tests is never trained on
    "test": {"test", "testing"},
    "val": {"val", "valid", "validation", "dev", "eval", "evaluation"},
    "train": {"train", "training"},
}

Report = Callable[[str], object]  # takes one line for the user


def report_nothing(line: str) -> None:
    """Drop a line for the user: a Report like `print`."""


def split_of_name(name: str) -> str:
    """Return train, val or test if a whole word of the name says so, else "".

    Words end at everything that is not a letter.

    Example: test_hard and wiki.test.txt give "test", dev.jsonl gives "val", latest gives "".
    """
    words = set(re.findall(r"[^\W\d_]+", name.lower()))
    for split, names in WORDS.items():
        if words & names:
            return split
    return ""


def keep_named_splits(sources: Sequence[Source], report: Report, item: str = "") -> list[Source]:
    """Return the sources with their final splits.

    - Without any split name, all sources are divided into train and val ("").
    - Without a source for val, train is divided into train and val.
    - Without a source for train, the sources without a split name are for train.

    Args:
        sources: Sources with the splits that their names say, or "".
        report: Function that takes the line which says what was found.
        item: Name of the data set, or "" for files.

    Raises:
        ValueError: A source without a split name is beside sources for train, or nothing is for
            train.
    """
    counts = Counter(source.split for source in sources)
    if not counts.keys() - {""}:
        return list(sources)
    subject = f"--input {item}" if item else "the files"
    if counts["train"] and counts[""]:
        unnamed = next(source for source in sources if not source.split)
        train = next(source for source in sources if source.split == "train")
        raise ValueError(
            f"{unnamed.path} has no split in its name, but {train.path} has: put train, val or "
            f"test into its name, or give the names no meaning with --split_names ignore"
        )
    if not counts["train"] and not counts[""]:
        raise ValueError(
            f"{subject} have names of val or test only (first: {sources[0].path}), and such text "
            f"is never trained on: add text for train, or give the names no meaning with "
            f"--split_names ignore"
        )
    train_split = "train" if counts["val"] else ""
    numbers = [f"{split} {counts[split]}" for split in ("train", "val", "test") if counts[split]]
    if counts[""]:
        numbers.append(f"without a name {counts['']}, for {train_split or 'train and val'}")
    elif not train_split:
        numbers.append("val is taken from train")
    report(
        f"splits by the names of {subject} (number of files): {'; '.join(numbers)}; --split_names "
        f"ignore gives the names no meaning"
    )
    return [
        replace(source, split=train_split) if source.split in ("", "train") else source
        for source in sources
    ]
