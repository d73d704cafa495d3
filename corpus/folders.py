"""Folders and globs to files: each folder is visited once, and what is left out is named."""

import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corpus.descriptions import DESCRIPTION_NAMES
from corpus.vocabulary_files import COPIES_BESIDE_CORPUS

NUM_NAMED = 3  # paths that a line about many paths names

DANGLING = "because the link leads nowhere"
NOT_REGULAR = "because it is not a regular file"
PREPARED = "because it is a prepared corpus"
WORKING = "because it holds no rows of the table, but Spark's log or unfinished work"
UNREADABLE = "because the folder cannot be read"

PREPARED_NAMES = ("skipped.txt", *COPIES_BESIDE_CORPUS)  # in a prepared corpus
WORKING_FOLDERS = ("_temporary", "_delta_log", "_spark_metadata")  # inside a table of many files


@dataclass
class Listing:
    """The files that a folder or a glob names. Hidden files and folders do not count.

    Attributes:
        root: Deepest folder without a pattern that holds all the files, or the only file.
        paths: Files, in sorted order.
        left_out: Reason -> paths that are not read for this reason.
    """

    root: Path
    paths: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def leave_out(self, path: Path, reason: str) -> None:
        """Note that a path is not read."""
        self.left_out.setdefault(reason, []).append(path)


def list_files(item: str) -> Listing:
    """Return the files that a file, a folder or a glob names.

    A name that exists is never a pattern, even if it has a bracket. A folder that a glob matches
    stands for the files in the folder and in its folders. Links are followed, and each folder is
    visited once.

    Example: "raw" and "raw/*" give raw/a.txt and raw/b/c.txt; "raw/*.txt" gives raw/a.txt.
    """
    root, pattern = _split_pattern(item)
    listing = Listing(root)
    visited: set[tuple[int, int]] = set()
    if "**" in pattern:
        i = pattern.index("**")
        for base in _glob(root, pattern[:i]):
            if base.is_dir():
                _walk(base, listing, visited, pattern[i:])
    else:
        for path in _glob(root, pattern):
            if path.is_dir() and pattern and path.name in WORKING_FOLDERS:
                listing.leave_out(path, WORKING)
            elif path.is_dir():
                _walk(path, listing, visited)
            elif not pattern or path.name not in DESCRIPTION_NAMES:
                _add(path, listing)
    listing.paths.sort()
    return listing


def name_some(paths: Sequence[object]) -> str:
    """Return the first few of many paths: "a.md, b.md, c.md, ..."."""
    names = ", ".join(map(str, paths[:NUM_NAMED]))
    return names + (", ..." if len(paths) > NUM_NAMED else "")


def _split_pattern(item: str) -> tuple[Path, tuple[str, ...]]:
    """Return the part of a path that is not a pattern, and the names and patterns after it."""
    root = Path()
    parts = Path(item).parts
    for i, part in enumerate(parts):
        if re.search(r"[*?[]", part) and not os.path.lexists(root / part):
            return root, parts[i:]
        root /= part
    return root, ()


def _glob(root: Path, pattern: Sequence[str]) -> list[Path]:
    """Return the paths below `root` that match a pattern without `**`."""
    if not pattern:
        return [root] if os.path.lexists(root) else []
    return sorted(map(Path, glob.glob(str(Path(glob.escape(str(root)), *pattern)))))


def _walk(
    top: Path, listing: Listing, visited: set[tuple[int, int]], pattern: Sequence[str] = ("**",)
) -> None:
    """Add the files in a folder and in its folders that match a pattern.

    Folders are visited level by level, so that the shortest of several paths to a folder counts.
    """
    folders = [top]
    for folder in folders:  # the list grows meanwhile
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in visited:
            continue
        visited.add((state.st_dev, state.st_ino))
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            listing.leave_out(folder, UNREADABLE)
            continue
        prepared = _is_prepared(names)
        if prepared and folder != top:
            listing.leave_out(folder, PREPARED)
            continue
        for name in names:
            path = folder / name
            if name.startswith(".") or name in DESCRIPTION_NAMES:
                continue
            if prepared and (name in PREPARED_NAMES or name.endswith(".bin")):
                continue
            if path.is_dir() and name in WORKING_FOLDERS:
                listing.leave_out(path, WORKING)
            elif path.is_dir():
                folders.append(path)
            elif _matches(path.relative_to(top).parts, pattern):
                _add(path, listing)


def _add(path: Path, listing: Listing) -> None:
    """Add a file, or leave it out if it cannot be read."""
    if path.is_file():
        listing.paths.append(path)
    elif path.is_symlink():
        listing.leave_out(path, DANGLING)
    else:
        listing.leave_out(path, NOT_REGULAR)  # a pipe would block


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a pattern matches a path below a folder, or a folder that holds the path."""
    if not pattern:
        return True
    if pattern[0] == "**" and _matches(parts, pattern[1:]):
        return True
    if not parts:
        return False
    if pattern[0] == "**":
        return _matches(parts[1:], pattern)
    return fnmatch.fnmatch(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _is_prepared(names: Sequence[str]) -> bool:
    """Return whether a folder with these names is a prepared corpus, or becomes one."""
    has_tokens = any(name.endswith(".bin") for name in names)
    return ".work" in names or (has_tokens and "metadata.json" in names)
