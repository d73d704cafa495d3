"""Where text comes from: known corpora, one's own files, Python's own documentation.

    corpus = load_corpus("wikitext-2", folder=Path("data/wikitext-2"))
    corpus.sources    # files, and how to read them (source.py)

Downloads are checked against a size and a sha256; see data/README.md for what comes of them.
"""

import contextlib
import errno
import glob
import gzip
import json
import logging
import lzma
import os
import platform
import re
import shutil
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

from common.files import atomic_write
from common.packages import optional
from common.settings import near
from corpus.catalog import KNOWN, Known
from corpus.descriptions import described, folder_of
from corpus.download import download, sha256_of
from corpus.sources import BLOCK, Source, damage

BUILT_IN = "python-docs"
GROWTH = 100  # times its size that an archive may grow to
FORMATS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
NO_TEXT = (".json", ".csv", ".tsv")  # though a file that is named may have any other suffix


@dataclass
class Corpus:
    """name: of its folder. origin: where it came from, for metadata.json. sources: its files."""

    name: str
    origin: dict
    sources: list[Source]

    @property
    def documents(self) -> bool:
        """Whether it has documents. Raises ValueError where some files have and others don't."""
        streams = [s for s in self.sources if s.format == "text" and not s.documents]
        if streams and len(streams) < len(self.sources):
            raise ValueError(
                f"{streams[0].path} is one running text beside files of documents: "
                f"say by --documents how to cut it"
            )
        return not streams


def list_corpora() -> str:
    """A table of the known corpora: name, size to download, licence, source."""
    rows = [("name", "download", "licence", "source")]
    for name, known in KNOWN.items():
        size = known.size or f"{sum(part.size for part in known.downloads) / 1e6:.1f} MB"
        rows.append((name, size, known.licence, known.home))
    rows.append((BUILT_IN, "nothing", "PSF-2.0", "Python's own documentation, in every Python"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def load_corpus(name: str, folder: Path, inputs=(), documents="", text_field="") -> Corpus:
    """The corpus `name`: known or built in, downloaded into `folder` where it isn't there yet, or
    made of the files that `inputs` name.

    Raises ValueError for an unknown name or a file that isn't what it should be, OSError
    (ConnectionError, from the network) where a file can't be had.
    """
    known = KNOWN.get(name)
    if inputs and known and len(known.downloads) == 1 and not known.downloads[0].members:
        return _own_copy(name, known, inputs)
    if inputs:
        sources = _numbered([s for item in inputs for s in find(item, documents, text_field)])
        return Corpus(name, {}, sources)
    if name == BUILT_IN:
        return python_documentation(folder)
    if known is None:
        names = ", ".join([*KNOWN, BUILT_IN])
        raise ValueError(
            f"no corpus is called {name!r}; there are {names}, and --input for files of yours"
            + near(name, [*KNOWN, BUILT_IN])
        )
    try:
        _fetch(known, folder)
    except ConnectionError as error:
        raise ConnectionError(
            f"{error}; try again later, or fetch it elsewhere (--prefetch DIR, and here --data_dir "
            f"DIR), or add --input FILE"
        ) from None
    sources = _numbered([replace(s, path=str(folder / s.path)) for s in known.sources])
    origin = {"url": [part.urls[0] for part in known.downloads], "licence": known.licence}
    return Corpus(name, origin, sources)


def _numbered(sources):
    return [replace(source, number=i) for i, source in enumerate(sources)]


def _own_copy(name, known, inputs) -> Corpus:
    """A file that is said to be a known one."""
    (part,), path = known.downloads, Path(inputs[0])
    if len(inputs) > 1:
        raise ValueError(f"{name} is one file: for several give --corpus another name")
    if (found := sha256_of(path)) != part.sha256:
        raise ValueError(
            f"{path} is not {name}: its sha256 is {found[:16]}..., not {part.sha256[:16]}...; "
            f"for a text of your own give --corpus another name"
        )
    origin = {"url": [part.urls[0]], "licence": known.licence, "sha256": found}
    (source,) = known.sources
    return Corpus(name, origin, [replace(source, path=str(path))])


def _fetch(known: Known, folder: Path) -> None:
    """Downloads and unpacks what isn't in `folder`."""
    for part, source in zip(known.downloads, known.sources):
        names = [name for _, name in part.members] or [source.path]
        if part.members and all((folder / name).exists() for name in names):
            continue  # written whole, once checked
        path = folder / (part.urls[0].rsplit("/", 1)[1] if part.members else source.path)
        right = path.exists() and part.sha256 in ("", sha256_of(path))
        if path.exists() and not right:
            print(f"{path} isn't the file that is known: fetched again")
        if not right:
            download(part.urls, path, part.size, part.sha256)
        if part.members:
            unpack(path, folder, dict(part.members))
            path.unlink()


def unpack(archive: Path, folder: Path, members: dict[str, str]) -> None:
    """Writes the members of a zip or tar archive whose names match a pattern into `folder`, under
    the name that goes with the pattern; many small ones become the lines of a .jsonl file.

    No name in the archive is ever used as a path, links and devices are no files, and what is
    damaged or grows to more than a hundred times the archive is refused (ValueError).
    """
    with _open_archive(archive) as (sizes, open_member):
        if sum(sizes.values()) > GROWTH * archive.stat().st_size:
            raise ValueError(f"{archive} grows beyond all measure")
        for pattern, target in members.items():
            chosen = [name for name in sizes if re.fullmatch(pattern, name)]
            if not chosen:
                raise ValueError(
                    f"{archive} holds nothing for {target}: it isn't what it should be"
                )
            with atomic_write(folder / target) as out:
                for name in chosen:
                    with open_member(name) as f:
                        if target.endswith(".jsonl"):
                            row = {"text": f.read().decode(), "file": name}
                            out.write(json.dumps(row).encode() + b"\n")
                        else:
                            shutil.copyfileobj(f, out, BLOCK)


@contextlib.contextmanager
def _open_archive(path):
    """Yields name -> size of each file in an archive, in its own order, and what opens one."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield {info.filename: info.file_size for info in archive.infolist()}, archive.open
            return
        with gzip.open(path) as unpacked:
            most = GROWTH * path.stat().st_size
            if unpacked.seek(most + 1) > most:  # before a header says how much to read at once
                raise ValueError(f"{path} grows beyond all measure")
            unpacked.seek(0)
            with tarfile.open(fileobj=unpacked) as archive:
                files = {member.name: member for member in archive if member.isfile()}
                sizes = {name: member.size for name, member in files.items()}
                yield sizes, lambda name: archive.extractfile(files[name])
    except (
        zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, UnicodeDecodeError, RuntimeError,
        OSError, *damage(""),
    ) as error:  # fmt: skip
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # where it says to seek
            raise  # of the disk
        raise ValueError(f"{path} is a damaged archive: {' '.join(str(error).split())}") from None


def find(item: str, documents: str = "", text_field: str = "") -> list[Source]:
    """What --input names: a file, a folder, a glob, hf:NAME[/CONFIG], or a described folder
    DIR[:SUB-CORPUS]. Raises ValueError or FileNotFoundError where it names nothing."""
    if item.startswith("hf:"):
        return hugging_face(item[3:], text_field)
    folder, _, corpus = item.rpartition(":") if not Path(item).exists() else (item, "", "")
    if folder and (told := described(Path(folder))):
        text_field = text_field or told["field"]
        if corpus and corpus not in told["corpuses"]:
            there = ", ".join(told["corpuses"]) or "none"
            raise ValueError(f"{folder} has no sub-corpus {corpus!r}; there are {there}")
        corpora = [corpus] if corpus else told["corpuses"]
        if told["configs"]:
            root = str(told["root"])
            found = [hugging_face(root, text_field, config) for config in corpora or [None]]
        else:
            folders = [folder_of(told, name) for name in corpora] or [told["root"]]
            found = [_files(str(path), documents, text_field) for path in folders]
            for path in (source.path for sources in found for source in sources):
                if not Path(path).resolve().is_relative_to(Path(folder).resolve()):
                    raise ValueError(f"{path} is a link out of {folder}: put a copy in its place")
        return [source for sources in found for source in sources]
    if folder and Path(folder).is_dir() and corpus:
        raise ValueError(
            f"{folder} has no description, so no sub-corpus {corpus!r}: write one with "
            f"python prepare_data.py --describe {folder}"
        )
    return _files(item, documents, text_field)


def _files(item, documents, text_field):
    if not item:
        raise ValueError("--input is empty: name a file, a folder or a glob")
    path = Path(item)
    pattern = f"{glob.escape(item)}/**" if path.is_dir() else item  # leaves hidden ones out
    paths = [path] if path.is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
    paths.sort(key=lambda p: -len(p.parts))
    paths = sorted({os.path.realpath(p): p for p in paths}.values())  # links may go in a circle
    if not paths:
        raise FileNotFoundError(f"{item}: no such file or folder, and no glob that finds one")
    if path.is_file() and _suffix(path) in NO_TEXT:
        raise ValueError(
            f"{item} is a table, not plain text: make it .jsonl, an object a line, or .parquet"
        )
    other = "text" if path.is_file() else None  # what a file is that was named, whatever its suffix
    sources = [
        Source(str(p), kind, documents if kind == "text" else "", text_field or "text")
        for p in paths
        if p.is_file() and (kind := FORMATS.get(_suffix(p), other))
    ]
    if not sources:
        raise ValueError(f"{item} has no .txt, .jsonl or .parquet file (also .gz, .zst)")
    return sources


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def hugging_face(name: str, text_field: str, config: str | None = None) -> list[Source]:
    """The Arrow files that the `datasets` library makes of NAME or NAME/CONFIG, on the hub or in a
    local folder; its splits validation and test are val and test here."""
    datasets = optional("datasets", f"--input hf:{name}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # no line for each attempt
    folder, _, last = name.rpartition("/")
    attempts = [(name, config)]
    if config is None and folder and not Path(name).exists():
        attempts.append((folder, last))
    if Path(folder or name).exists() or name.count("/") == 2:
        attempts.reverse()  # FOLDER/CONFIG, ORGANISATION/NAME/CONFIG: the likelier one first
    reasons = []
    for path, config in attempts:
        try:
            splits = datasets.load_dataset(path, config)
            break
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            lost = "; is there a network?" if isinstance(error, ConnectionError) else ""
            reasons.append(" ".join(str(error.__cause__ or error).split()) + lost)
    else:
        raise ValueError(f"--input hf:{name}: {reasons[0]}")
    known = {"train": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
    official = {"train", "val"} <= {known.get(split) for split in splits}
    sources = []
    for split, data in splits.items():
        # what isn't training text stays out of it; without a validation split there, one is made
        side = known.get(split, "train") if official else "test" if split == "test" else ""
        side = side if len(splits) > 1 else ""
        sources += [
            Source(file["filename"], "arrow", field=text_field or "text", split=side)
            for file in data.cache_files
        ]
    if not sources:
        raise ValueError(f"--input hf:{name}: it has no rows")
    return sources


def python_documentation(folder: Path) -> Corpus:
    """The language reference that help() shows: 79 documents, half a megabyte, in every CPython."""
    from pydoc_data.topics import topics  # imported here: a table of half a megabyte

    path = folder / "topics.jsonl"
    rows = (json.dumps({"text": topics[key], "topic": key}) + "\n" for key in sorted(topics))
    data = "".join(rows).encode()
    if not path.exists() or path.read_bytes() != data:  # else as old as what was made of it
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as f:
            f.write(data)
    sources = [Source(str(path), "jsonl")]
    origin = {
        "module": "pydoc_data.topics",
        "python": platform.python_version(),
        "licence": "PSF-2.0",
    }
    return Corpus(BUILT_IN, origin, sources)
