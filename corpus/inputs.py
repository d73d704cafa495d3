"""Inputs: where the text of a corpus comes from.

    corpus = load_corpus("wikitext-2", folder=Path("data/wikitext-2"))
    corpus.sources    # files, and how to read them (sources.py)

A corpus is downloaded if the catalog knows it (catalog.py, download.py, archives.py), or it is made
of files that --input names (files.py, hub.py, descriptions.py), or of Python's own documentation.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.files import atomic_write
from common.settings import near
from corpus.archives import unpack
from corpus.catalog import CATALOG, CatalogEntry
from corpus.download import download, sha256_of
from corpus.files import find
from corpus.sources import Source

BUILT_IN = "python-docs"


@dataclass
class Corpus:
    """A named text collection.

    Attributes:
        name: its name, which is the name of its folder.
        origin: where it came from, for metadata.json.
        sources: its files, in order.
    """

    name: str
    origin: dict
    sources: list[Source]

    @property
    def has_documents(self) -> bool:
        """Whether the corpus has documents; otherwise it is one running text.

        Raises:
            ValueError: if some files have documents and others do not.
        """
        running = [s for s in self.sources if s.format == "text" and not s.documents]
        if running and len(running) < len(self.sources):
            raise ValueError(
                f"{running[0].path} is one running text beside files of documents: "
                f"choose with --documents how to divide it"
            )
        return not running


def list_corpora() -> str:
    """Return a table of the corpora that are known by name: size to download, licence, source."""
    rows = [("name", "download", "licence", "source")]
    for name, entry in CATALOG.items():
        size = entry.size or f"{sum(part.size or 0 for part in entry.downloads) / 1e6:.1f} MB"
        rows.append((name, size, entry.licence, entry.home))
    rows.append((BUILT_IN, "nothing", "PSF-2.0", "Python's own documentation, in every Python"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def load_corpus(
    name: str,
    folder: Path,
    inputs: Sequence[str] = (),
    documents: str = "",
    text_field: str = "",
) -> Corpus:
    """Return a corpus whose files are on this machine, downloaded into `folder` if necessary.

    Args:
        name: name of the corpus.
        folder: folder for downloads.
        inputs: what --input names; none for a corpus that is known by name.
        documents: how a .txt is divided into documents, as in Source.
        text_field: field that holds the text in the other formats; "" for "text".

    Raises:
        ValueError: for an unknown name, or a file that is not what it should be.
        ConnectionError: if a file cannot be downloaded.
        OSError: if a file cannot be read or written.
    """
    entry = CATALOG.get(name)
    if inputs:
        if entry and len(entry.downloads) == 1 and not entry.downloads[0].members:
            return _copy_of_known(name, entry, inputs)
        sources = [source for item in inputs for source in find(item, documents, text_field)]
        return Corpus(name, {}, _numbered(sources))
    if name == BUILT_IN:
        return python_documentation(folder)
    if entry is None:
        names = [*CATALOG, BUILT_IN]
        raise ValueError(
            f"no corpus is called {name!r}: choose one of {', '.join(names)}, or name files of "
            f"yours with --input" + near(name, names)
        )
    try:
        _fetch(entry, folder)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}; try again later, or download it on another machine (--prefetch DIR, and "
            f"--data_dir DIR on this one), or add --input FILE"
        ) from None
    sources = [replace(source, path=str(folder / source.path)) for source in entry.sources]
    origin = {"url": [part.urls[0] for part in entry.downloads], "licence": entry.licence}
    return Corpus(name, origin, _numbered(sources))


def _numbered(sources) -> list[Source]:
    return [replace(source, number=i) for i, source in enumerate(sources)]


def _copy_of_known(name, entry, inputs) -> Corpus:
    """Return a known corpus of one file, made of a copy of the file."""
    (part,) = entry.downloads
    (source,) = entry.sources
    path = Path(inputs[0])
    if len(inputs) > 1:
        raise ValueError(f"{name} is one file: to use several, choose another --corpus NAME")
    found = sha256_of(path)
    if found != part.sha256:
        raise ValueError(
            f"{path} is not {name}: its sha256 is {found[:16]}..., not {part.sha256[:16]}...; "
            f"for a text of your own choose another --corpus NAME"
        )
    origin = {"url": [part.urls[0]], "licence": entry.licence, "sha256": found}
    return Corpus(name, origin, [replace(source, path=str(path))])


def _fetch(entry: CatalogEntry, folder: Path) -> None:
    """Download and unpack what is not in `folder`."""
    for part, source in zip(entry.downloads, entry.sources):
        targets = [name for _, name in part.members] or [source.path]
        if part.members and all((folder / name).exists() for name in targets):
            continue  # they were written whole, from a checked archive
        name = part.urls[0].rsplit("/", 1)[1] if part.members else source.path
        path = folder / name
        right = path.exists() and part.sha256 in ("", sha256_of(path))
        if path.exists() and not right:
            print(f"{path} is not the known file: it is downloaded again")
        if not right:
            download(part.urls, path, part.size, part.sha256)
        if part.members:
            unpack(path, folder, dict(part.members))
            path.unlink()


def python_documentation(folder: Path) -> Corpus:
    """Return the language reference that help() shows, as a corpus.

    It has 79 documents and half a megabyte, in every CPython.

    Args:
        folder: folder for the .jsonl file.
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
