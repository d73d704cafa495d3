"""Files: the sources that --input names."""

import contextlib
import os
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

from corpus.descriptions import Description, read_description
from corpus.folders import list_files, name_some
from corpus.hub import hugging_face
from corpus.opening import UnreadableFile, open_text, start_of_text
from corpus.reader import why_not_json_lines
from corpus.sources import BLOCK, Source, compression_of
from corpus.split_names import Report, keep_named_splits, split_of_name

FORMAT_OF_SUFFIX = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".jl": "jsonl",
    ".json": "jsonl",  # if it holds one object per line
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TABLE_SUFFIXES = (".csv", ".tsv")  # a named file with any other suffix is taken for text
NO_READER = "because no reader takes the format"
NOT_JSON_LINES = "because it does not have one JSON object per line"


@dataclass(frozen=True)
class _Input:
    """The sources of one value of --input.

    Attributes:
        root: Folder below which paths name splits, or the only file; None for a data set, whose
            sources have their splits already.
        sources: Sources, in order.
    """

    root: Path | None
    sources: list[Source]


@dataclass(frozen=True)
class _Options:
    """How files are read: the arguments of `find` for each of its items."""

    division: str
    text_field: str
    split_names: str
    report: Report


def find(
    items: str | Sequence[str],
    division: str = "",
    text_field: str = "",
    split_names: str = "keep",
    report: Report = print,
) -> list[Source]:
    """Return the sources that the values of --input name.

    Each file is taken once, whatever names lead to it. Files whose paths name a split (train, val,
    test and the like, below the folder that all items have in common) keep this split.

    Args:
        items: One or several of these: a file, a folder, a glob, hf:NAME[/CONFIG], or a described
            folder DIR[:SUB-CORPUS].
        division: How a .txt file is divided into documents, one of DIVISIONS in sources.py.
        text_field: Field that holds the text; "" for the field that the folder's description
            names, or "text".
        split_names: "keep", or "ignore": divide all text into train and val, whatever the names.
        report: Function that takes the lines about files that are left out, named twice, of a
            split, or joined to one text.

    Raises:
        FileNotFoundError: There is no such file or folder, and no match of the glob.
        ValueError: An item names no file of a format that can be read, or the splits that the
            paths name do not give a corpus.
    """
    options = _Options(division, text_field, split_names, report)
    items = [items] if isinstance(items, str) else items
    inputs = [_find_item(item, options) for item in items]
    if split_names == "keep":
        inputs = _named_by_paths(inputs)
    inputs = _each_file_once(inputs, report)
    files = [source for found in inputs if found.root for source in found.sources]
    if split_names == "keep":
        files = keep_named_splits(files, report)
    report_joined_texts(files, report)
    resolved = iter(files)
    sources = []
    for found in inputs:
        for source in found.sources:
            sources.append(next(resolved) if found.root else source)
    return sources


def _find_item(item: str, options: _Options) -> _Input:
    """Return the sources of one value of --input."""
    if item.startswith("hf:"):
        return _Input(None, _find_data_set(item[3:], None, options))
    for folder, corpus in _folders_and_corpora(item):
        description = read_description(Path(folder))
        if description:
            return _find_described(folder, description, corpus, options)
        if corpus:
            raise ValueError(
                f"{folder} has no description, so it has no sub-corpus {corpus!r}: write one with "
                f"python prepare_data.py --describe {shlex.quote(folder)}"
            )
    return _find_files(item, options)


def _folders_and_corpora(item: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to read DIR[:SUB-CORPUS]: (folder, name of the sub-corpus or "")."""
    if os.path.exists(item):
        yield item, ""
        return
    for i, character in enumerate(item):
        if character == ":" and os.path.isdir(item[:i]):
            yield item[:i], item[i + 1 :]


def _find_described(
    folder: str, description: Description, corpus: str, options: _Options
) -> _Input:
    """Return the sources of a described folder, or of one of its sub-corpora."""
    options = replace(options, text_field=options.text_field or description.field)
    if corpus and corpus not in description.corpora:
        names = ", ".join(description.corpora) or "none"
        raise ValueError(f"{folder} has no sub-corpus {corpus!r}; its sub-corpora: {names}")
    corpora = (corpus,) if corpus else description.corpora
    sources = []
    if description.configs:
        for config in corpora or (None,):
            sources += _find_data_set(str(description.root), config, options)
        return _Input(None, sources)
    folders = [description.folder_of(name) for name in corpora] or [description.root]
    for path in folders:
        sources += _find_files(str(path), options).sources
    for source in sources:
        if not Path(source.path).resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{source.path} is a link out of {folder}: put a copy in its place")
    sources = [replace(source, name=name_below(folder, source.path)) for source in sources]
    return _Input(folders[0] if corpus else description.root, sources)


def _find_data_set(name: str, config: str | None, options: _Options) -> list[Source]:
    """Return the sources of a data set of the `datasets` library, in their final splits."""
    return hugging_face(name, options.text_field, config, options.split_names, options.report)


def _find_files(item: str, options: _Options) -> _Input:
    """Return the sources that a file, a folder or a glob names."""
    if not item:
        raise ValueError("--input is empty: name a file, a folder or a glob")
    is_file = os.path.isfile(item)
    if is_file and _suffix(Path(item)) in TABLE_SUFFIXES:
        raise ValueError(
            f"{item} is a table, not plain text: convert it to .jsonl, one object per line, or "
            f"to .parquet"
        )
    listing = list_files(item)
    if not listing.paths and not listing.left_out and not os.path.isdir(item):
        raise FileNotFoundError(f"{item}: no such file or folder, and no glob that matches one")
    default = "text" if is_file else None  # a file that was named is always read
    sources = []
    for path in listing.paths:
        file_format = FORMAT_OF_SUFFIX.get(_suffix(path), default)
        if file_format is None:
            listing.leave_out(path, NO_READER)
            continue
        if _suffix(path) == ".json":
            reason = why_not_json_lines(str(path))
            if reason and is_file:
                raise ValueError(reason)
            if reason:
                listing.leave_out(path, NOT_JSON_LINES)
                continue
        division = options.division if file_format == "text" else ""
        field = options.text_field or "text"
        name = name_below(listing.root, str(path))
        start = start_of_text(str(path)) if file_format == "text" else 0
        sources.append(Source(str(path), file_format, division, field, start=start, name=name))
    left_out = [
        f"{len(paths):,} {reason} ({name_some(paths)})"
        for reason, paths in listing.left_out.items()
    ]
    if not sources:
        reasons = "".join(f"; left out: {line}" for line in left_out)
        raise ValueError(f"{item} has no .txt, .jsonl or .parquet file (see docs/data.md){reasons}")
    for line in left_out:
        options.report(f"left out of {item}: {line}")
    return _Input(listing.root, sources)


def name_below(root: str | Path, path: str) -> str:
    """Return the name of a file in an input: its path relative to `root`, with slashes.

    Example: ("raw", "raw/sub/a.jsonl") gives "sub/a.jsonl", and ("raw/a.jsonl", "raw/a.jsonl")
    gives "a.jsonl".

    Args:
        root: Folder of the input, or the file itself.
        path: Path of the file.
    """
    relative = Path(os.path.relpath(path, root))
    return relative.as_posix() if relative.parts else Path(path).name


def _named_by_paths(inputs: list[_Input]) -> list[_Input]:
    """Return the sources with the splits that their paths name.

    Only the part of a path below the folder that all items have in common counts. So the name of
    a single file that is named itself does not count.
    """
    roots = [os.path.abspath(found.root) for found in inputs if found.root]
    common = os.path.commonpath(roots) if roots else ""
    named = []
    for found in inputs:
        if found.root:
            sources = [
                replace(source, split=split_of_name(os.path.relpath(source.path, common)))
                for source in found.sources
            ]
            found = replace(found, sources=sources)
        named.append(found)
    return named


def _each_file_once(inputs: list[_Input], report: Report) -> list[_Input]:
    """Return the sources without those of a file that an earlier item, or a shorter path, names.

    Raises:
        ValueError: The names of one file say different splits.
    """
    names = defaultdict(list)  # file -> (number of the item, length of the path, path, source)
    for i, found in enumerate(inputs):
        for source in found.sources:
            length = len(Path(source.path).parts)
            names[_file_id(source)].append((i, length, source.path, source))
    chosen: list[list[Source]] = [[] for _ in inputs]
    repeated = []
    for entries in names.values():
        i, _, path, source = min(entries, key=itemgetter(0, 1, 2))
        splits = {other.split: other.path for *_, other in entries if other.split}
        if len(splits) > 1:
            raise ValueError(
                f"{' and '.join(splits.values())} are one file, for {' and '.join(splits)}: "
                f"remove all but one of its names"
            )
        chosen[i].append(replace(source, split=max(splits, default="")))
        if len(entries) > 1:
            repeated.append(path)
    if repeated:
        report(
            f"named more than once, and read once: {len(repeated):,} files ({name_some(repeated)})"
        )
    once = []
    for found, chosen_sources in zip(inputs, chosen):
        by_path = {source.path: source for source in chosen_sources}
        paths = dict.fromkeys(source.path for source in found.sources)  # in their order
        sources = [by_path[path] for path in paths if path in by_path]
        once.append(replace(found, sources=sources))
    return once


def _file_id(source: Source) -> tuple:
    """Return what all names of one file have in common, links and hard links included."""
    state = os.stat(source.path)
    if not state.st_ino:  # a file system without numbers
        return (os.path.realpath(source.path),)
    # the number alone may be wrong: some network file systems make it of a hash
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def report_joined_texts(sources: Sequence[Source], report: Report) -> None:
    """Report the files of a running text that end within a line, before another file."""
    if any(source.format != "text" or source.division for source in sources):
        return
    joined = []
    for split in {source.split for source in sources}:
        texts = [source for source in sources if source.split == split]
        joined += [source.path for source in texts[:-1] if not _ends_a_line(source)]
    if joined:
        report(
            f"{len(joined):,} files do not end with a line feed ({name_some(sorted(joined))}), so "
            f"the last word of each and the first word of the next file become one; --documents "
            f"file makes a document of each file"
        )


def _ends_a_line(source: Source) -> bool:
    """Return whether a text is empty or its last byte is a line feed."""
    last = b""
    with contextlib.suppress(UnreadableFile), open_text(source.path) as file:
        if not source.compressed:
            file.seek(max(0, os.path.getsize(source.path) - 1))
        while block := file.read(BLOCK):
            last = block[-1:]
    return last in (b"", b"\n")


def _suffix(path: Path) -> str:
    """Return the suffix of a path before that of its compression, in lower case."""
    name = path.name.lower()
    return Path(name.removesuffix(compression_of(name))).suffix


def name_without_suffixes(path: Path) -> str:
    """Return the name of a file without the suffixes of its format and of its compression.

    Example: my.jsonl.gz gives my, and notes.md stays notes.md.
    """
    name = path.name[: len(path.name) - len(compression_of(path.name))]
    return Path(name).stem if _suffix(path) in FORMAT_OF_SUFFIX else name
