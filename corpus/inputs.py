"""Inputs: a corpus as a list of sources on this machine.

    corpus = load_corpus("wikitext-2", folder=Path("data/wikitext-2"))
    corpus.sources    # files, and how to read them (sources.py)

A corpus is one of the following:
- a corpus of the catalog, which is downloaded (catalog.py, download.py, archives.py);
- the files that --input names (files.py, hub.py, descriptions.py);
- Python's own documentation.
"""

import json
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.files import atomic_write
from common.settings import near
from corpus.archives import unpack
from corpus.catalog import CATALOG, CatalogEntry, DownloadFile
from corpus.download import download, download_lock, sha256_of
from corpus.files import find
from corpus.metadata import read_metadata, source_path
from corpus.sources import Source

BUILT_IN = "python-docs"


@dataclass
class Corpus:
    """A named text collection.

    Attributes:
        name: Name of the corpus and of its folder.
        origin: Addresses and licence of the text, for metadata.json.
        sources: Sources of the corpus, in order.
    """

    name: str
    origin: dict
    sources: list[Source]

    @property
    def has_documents(self) -> bool:
        """Whether the corpus has documents; otherwise it is one running text.

        Raises:
            ValueError: Some files have documents and others do not.
        """
        running = [source for source in self.sources if source.is_running_text]
        if running and len(running) < len(self.sources):
            raise ValueError(
                f"{running[0].path} is one running text beside files of documents: "
                f"choose with --documents how to divide it"
            )
        return not running


def list_corpora() -> str:
    """Return a table of the corpora that need no --input: download size, licence, home page."""
    rows = [("name", "download", "licence", "home")]
    for name, entry in CATALOG.items():
        num_bytes = sum(download_file.size or 0 for download_file in entry.downloads)
        size = entry.size or f"{num_bytes / 1e6:.1f} MB"
        rows.append((name, size, entry.licence, entry.home))
    rows.append((BUILT_IN, "nothing", "PSF-2.0", "Python's own documentation, in every Python"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def load_corpus(
    name: str,
    folder: Path,
    inputs: Sequence[str] = (),
    division: str = "",
    text_field: str = "",
    split_names: str = "keep",
) -> Corpus:
    """Return a corpus whose files are on this machine, downloaded into `folder` if necessary.

    Args:
        name: Name of the corpus.
        folder: Folder for downloads.
        inputs: Values of --input; none for a corpus of the catalog.
        division: How a .txt file is divided into documents, one of DIVISIONS in sources.py.
        text_field: Field that holds the text in the other formats; "" for "text".
        split_names: "keep" the splits that paths of inputs name, or "ignore" the names.

    Raises:
        ValueError: The name is unknown, or a file is damaged or of another kind.
        ConnectionError: A file cannot be downloaded.
        OSError: A file cannot be read or written.
    """
    entry = CATALOG.get(name)
    if inputs:
        if entry and len(entry.downloads) == 1 and not entry.downloads[0].members:
            return _copy_of_download(name, entry, inputs)
        sources = find(inputs, division, text_field, split_names)
        return Corpus(name, _origin(inputs, sources, folder), _numbered(sources))
    if name == BUILT_IN:
        return python_documentation(folder)
    if entry is None:
        _refuse_missing_input(folder)
        names = [*CATALOG, BUILT_IN]
        raise ValueError(
            f"no corpus is called {name!r}: choose one of {', '.join(names)}, or name files of "
            f"yours with --input" + near(name, names)
        )
    try:
        _download_missing(entry, folder)
    except ConnectionError as error:
        place = ""
        if len(entry.downloads) == 1 and not entry.downloads[0].members:
            place = f", or put the file at {folder / entry.sources[0].path}"
        raise ConnectionError(
            f"{error}; try again later, or download it on another machine (--prefetch DIR, and "
            f"--data_dir DIR on this one), or add --input FILE{place}"
        ) from None
    sources = [replace(source, path=str(folder / source.path)) for source in entry.sources]
    urls = [download_file.urls[0] for download_file in entry.downloads]
    origin = {"url": urls, "licence": entry.licence}
    return Corpus(name, origin, _numbered(sources))


def _refuse_missing_input(folder: Path) -> None:
    """Raise ValueError if the corpus was prepared from files that --input must name again."""
    try:
        source = read_metadata(folder)["source"]
        paths = [os.path.relpath(source_path(folder, file)) for file in source["files"]]
    except (OSError, ValueError, KeyError, TypeError):  # not prepared, or metadata.json is damaged
        return
    if source.get("url"):
        paths = [url for url in source["url"] if url.startswith("hf:")]
    if not paths:
        return
    made_of = shlex.join(paths[:3])
    if len(paths) > 3:
        remedy = f"{made_of} and {len(paths) - 3:,} more: name them with --input"
    else:
        remedy = f"{made_of}: add --input {made_of}"
    raise ValueError(f"{folder} was made from {remedy}")


def _numbered(sources) -> list[Source]:
    """Return the sources with numbers from 0."""
    return [replace(source, number=i) for i, source in enumerate(sources)]


def _origin(inputs: Sequence[str], sources: Sequence[Source], folder: Path) -> dict:
    """Return the origin of a corpus whose files the `datasets` library made.

    The library gives its files new names when a data set changes, so only the inputs tell that a
    corpus was made of the same data set. Local paths are relative to the folder of the corpus.
    """
    if any(source.format != "arrow" for source in sources):
        return {}
    urls = []
    for item in inputs:
        name = item.removeprefix("hf:")
        on_hub = name != item and not os.path.exists(name)
        urls.append(item if on_hub else f"hf:{os.path.relpath(name, folder)}")
    return {"url": urls}


def _copy_of_download(name, entry, inputs) -> Corpus:
    """Return a corpus of the catalog that is made of a copy of its only file."""
    (download_file,) = entry.downloads
    (source,) = entry.sources
    path = Path(inputs[0])
    if len(inputs) > 1:
        raise ValueError(f"{name} is one file: to use several, choose another --corpus NAME")
    if not path.is_file():
        raise ValueError(
            f"{name} is the name of a corpus of one known file, and {path} is not a file: name the "
            f"file, or choose another --corpus NAME for a text of your own"
        )
    found = sha256_of(path)
    expected = download_file.sha256
    if found != expected:
        raise ValueError(
            f"{path} is not {name}: its sha256 is {found[:16]}..., not {expected[:16]}...; "
            f"for a text of your own choose another --corpus NAME"
        )
    origin = {"url": [download_file.urls[0]], "licence": entry.licence, "sha256": found}
    return Corpus(name, origin, [replace(source, path=str(path))])


def _download_missing(entry: CatalogEntry, folder: Path) -> None:
    """Download and unpack the files of a corpus that are not in `folder`."""
    pairs = list(zip(entry.downloads, entry.sources))
    if all(_is_downloaded(*pair, folder) for pair in pairs):
        return
    with download_lock(folder / ".download"):  # also for the time of unpacking
        for download_file, source in pairs:
            if _is_downloaded(download_file, source, folder):
                continue  # perhaps by the process that this one waited for
            sha256 = download_file.sha256
            archive_name = download_file.urls[0].rsplit("/", 1)[1]
            path = folder / (archive_name if download_file.members else source.path)
            if path.exists() and sha256 not in ("", sha256_of(path)):
                print(f"{path} differs from the file in the catalog: it is downloaded again")
            download(download_file.urls, path, download_file.size, sha256)
            if download_file.members:
                unpack(path, folder, dict(download_file.members))
                path.unlink()


def _is_downloaded(download_file: DownloadFile, source: Source, folder: Path) -> bool:
    """Return whether the files that a download gives are in `folder`."""
    if download_file.members:  # their files were written whole, from a checked archive
        return all((folder / name).exists() for _, name in download_file.members)
    path = folder / source.path
    return path.exists() and download_file.sha256 in ("", sha256_of(path))


def python_documentation(folder: Path) -> Corpus:
    """Return the texts that Python's help() shows about the language, as a corpus.

    Every CPython has these 79 documents of half a megabyte.

    Args:
        folder: Folder for the .jsonl file.

    Raises:
        OSError: The .jsonl file cannot be written.
    """
    from pydoc_data.topics import topics  # not above: half a megabyte

    path = folder / "topics.jsonl"
    rows = (json.dumps({"text": topics[key], "topic": key}) + "\n" for key in sorted(topics))
    data = "".join(rows).encode()
    if not path.exists() or path.read_bytes() != data:  # an equal file keeps its date
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            f.write(data)
    origin = {
        "module": "pydoc_data.topics",
        "python": platform.python_version(),
        "licence": "PSF-2.0",
    }
    return Corpus(BUILT_IN, origin, [Source(str(path), "jsonl")])
