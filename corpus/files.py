"""Files: the sources that --input names."""

import glob
import os
from pathlib import Path

from corpus.descriptions import read_description
from corpus.hub import hugging_face
from corpus.sources import Source

FORMAT_OF_SUFFIX = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
TABLE_SUFFIXES = (".json", ".csv", ".tsv")  # a named file with any other suffix is taken for text


def find(item: str, division: str = "", text_field: str = "") -> list[Source]:
    """Return the sources that an --input names.

    Args:
        item: A file, a folder, a glob, hf:NAME[/CONFIG], or a described folder DIR[:SUB-CORPUS].
        division: How a .txt file is divided into documents, one of DIVISIONS in sources.py.
        text_field: Field that holds the text; "" for the field that the folder's description
            names, or "text".

    Raises:
        FileNotFoundError: There is no such file or folder, and no match of the glob.
        ValueError: The item names no file of a format that can be read.
    """
    if item.startswith("hf:"):
        return hugging_face(item[3:], text_field)
    folder, _, corpus = item.rpartition(":") if not Path(item).exists() else (item, "", "")
    description = read_description(Path(folder)) if folder else None
    if description:
        return _find_described(folder, description, corpus, division, text_field)
    if corpus and folder and Path(folder).is_dir():
        raise ValueError(
            f"{folder} has no description, so it has no sub-corpus {corpus!r}: write one with "
            f"python prepare_data.py --describe {folder}"
        )
    return _find_files(item, division, text_field)


def _find_described(folder, description, corpus, division, text_field):
    """Return the sources of a described folder, or of one of its sub-corpora."""
    text_field = text_field or description.field
    if corpus and corpus not in description.corpora:
        names = ", ".join(description.corpora) or "none"
        raise ValueError(f"{folder} has no sub-corpus {corpus!r}; its sub-corpora: {names}")
    corpora = [corpus] if corpus else description.corpora
    if description.configs:
        root = str(description.root)
        found = [hugging_face(root, text_field, config) for config in corpora or [None]]
        return [source for sources in found for source in sources]
    folders = [description.folder_of(name) for name in corpora] or [description.root]
    found = [_find_files(str(path), division, text_field) for path in folders]
    sources = [source for sources in found for source in sources]
    for source in sources:
        if not Path(source.path).resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"{source.path} is a link out of {folder}: put a copy in its place")
    return sources


def _find_files(item, division, text_field):
    """Return the sources that a file, a folder or a glob names."""
    if not item:
        raise ValueError("--input is empty: name a file, a folder or a glob")
    path = Path(item)
    if path.is_file():
        paths = [path]
        if _suffix(path) in TABLE_SUFFIXES:
            raise ValueError(
                f"{item} is a table, not plain text: convert it to .jsonl, one object per line, or "
                f"to .parquet"
            )
    else:
        paths = _expand(f"{glob.escape(item)}/**" if path.is_dir() else item)
    if not paths:
        raise FileNotFoundError(f"{item}: no such file or folder, and no glob that matches one")
    default = "text" if path.is_file() else None  # a file that was named is always read
    sources = []
    for found in paths:
        file_format = FORMAT_OF_SUFFIX.get(_suffix(found), default)
        if file_format and found.is_file():
            file_division = division if file_format == "text" else ""
            sources.append(Source(str(found), file_format, file_division, text_field or "text"))
    if not sources:
        raise ValueError(f"{item} has no .txt, .jsonl or .parquet file (also .gz, .zst)")
    return sources


def _expand(pattern) -> list[Path]:
    """Return the paths that match a glob, sorted and without hidden files.

    Links may lead in a circle, so only the shortest of several paths to one file is kept.
    """
    paths = sorted(map(Path, glob.glob(pattern, recursive=True)))
    paths.sort(key=lambda path: -len(path.parts))
    return sorted({os.path.realpath(path): path for path in paths}.values())


def _suffix(path: Path) -> str:
    """Return the suffix of a path without .gz or .zst, in lower case."""
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()
