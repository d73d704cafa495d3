"""Where text comes from: known corpora, local files, Python's own documentation.

    corpus = load_corpus("tinyshakespeare", folder=Path("data/tinyshakespeare"))
    for text in corpus.texts: ...

Downloads are checked against a size and a sha256; see data/README.md for what comes of them.
"""

import hashlib
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm import tqdm

BUILT_IN = "python-docs"


@dataclass(frozen=True)
class Download:
    """A corpus on the network: one file of running text, at each of its addresses."""

    urls: tuple[str, ...]
    size: int  # bytes
    sha256: str
    licence: str


KNOWN = {
    "tinyshakespeare": Download(
        urls=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/"
            "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        ),
        size=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        licence="public domain",
    ),
}


@dataclass
class Corpus:
    """name: of its folder. source: where it came from, for metadata.json. texts: one running text,
    or, where `documents` is true, one text a document."""

    name: str
    source: dict
    documents: bool
    texts: list[str]


def load_corpus(name: str, folder: Path, file: Path | None = None) -> Corpus:
    """The corpus `name`: known, or built in, or a local `file`; downloads are kept in `folder`.

    Raises ValueError for an unknown name or a file that isn't what it should be, OSError
    (ConnectionError, from the network) where a file can't be had.
    """
    known = KNOWN.get(name)
    if name == BUILT_IN and file is None:
        return python_documentation()
    if known is None and file is None:
        names = ", ".join([*KNOWN, BUILT_IN])
        raise ValueError(
            f"no corpus is called {name!r}; there are {names}, and --input for a file of yours"
        )
    if file is None:
        file = folder / "input.txt"
        if not (file.exists() and sha256_of(file) == known.sha256):
            try:
                download(known.urls, file, known.size, known.sha256)
            except ConnectionError as error:
                raise ConnectionError(
                    f"{error}; try again later, or fetch it elsewhere and add --input FILE"
                ) from None
    elif known and (found := sha256_of(file)) != known.sha256:
        raise ValueError(
            f"{file} is not {name}: its sha256 is {found[:16]}..., not {known.sha256[:16]}...; "
            f"for a text of your own give --corpus another name"
        )
    source = {"file": file.name, "sha256": sha256_of(file)}
    if known:
        source |= {"url": known.urls[0], "licence": known.licence}
    return Corpus(name, source, documents=False, texts=[read_text(file)])


def python_documentation() -> Corpus:
    """The language reference that help() shows: 79 documents, half a megabyte, in every CPython."""
    from pydoc_data.topics import topics  # imported here: a table of half a megabyte

    source = {
        "module": "pydoc_data.topics",
        "python": platform.python_version(),
        "licence": "PSF-2.0",
    }
    return Corpus(BUILT_IN, source, documents=True, texts=[topics[key] for key in sorted(topics)])


def read_text(path: Path) -> str:
    """A whole UTF-8 file, line ends as they are. Raises ValueError naming the line that isn't."""
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        likely = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise ValueError(
            f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); convert it first, "
            f"say with iconv -f {likely} -t utf-8"
        ) from None


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _TryAgain(Exception):
    """A fault that may pass: of the line, or of a busy server."""


def download(
    urls, path: Path, size: int | None = None, sha256: str = "", pause=0.5, tries=4
) -> None:
    """Fetches a file from the first of `urls` that has it; `path` appears whole and checked.

    A fault that may pass is tried again after `pause` seconds, then twice as long, up to `tries`
    times without a new byte, going on where it broke off. Raises ConnectionError where no address
    works, OSError where `path` can't be written. Leaves nothing but `path`.
    """
    part = path.with_name(path.name + ".part")  # left by a killed run: gone on with
    try:
        for url in urls:
            try:
                _fetch(url, part, size, sha256, pause, tries)
                os.replace(part, path)
                return
            except ConnectionError as error:
                reason = error
                part.unlink(missing_ok=True)
        raise ConnectionError(f"can't download {reason}")
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a failed write doesn't know it
        part.unlink(missing_ok=True)
        raise


def _fetch(url, part, size, sha256, pause, tries) -> None:
    """Makes `part` whole and checked. Raises ConnectionError."""
    failures, restarted = 0, False
    while True:
        done = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part, done, size)
            found = sha256_of(part)
            if not sha256 or found == sha256:
                return
            part.unlink()
            if not done:  # one answer, and the wrong one
                raise ConnectionError(
                    f"{url} sent something else: sha256 {found[:16]}..., not {sha256[:16]}..."
                )
            if restarted:
                raise ConnectionError(f"{url} changes while it is being fetched")
            restarted = True  # what a killed run left may be of another file: from the start
        except _TryAgain as error:
            grown = part.exists() and part.stat().st_size > done
            failures = 1 if grown else failures + 1
            if failures == tries:
                raise ConnectionError(f"{url}: {error}") from None
            time.sleep(pause * 2 ** (failures - 1))


def _fetch_rest(url, part, done, size) -> None:
    """Appends to `part`, `done` bytes long, what is missing, or starts it anew."""
    headers = {
        "Accept-Encoding": "identity",  # so that lengths and ranges count the file's own bytes
        "User-Agent": "Mozilla/5.0 (GPT-2 training repo)",  # some hosts refuse the default
    }
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as response:
            if response.status_code == 416:  # nothing lies beyond `done`: it is whole, or not it
                part.unlink()
                raise _TryAgain("the server refused to go on where the file broke off")
            if response.status_code in (408, 429) or response.status_code >= 500:
                raise _TryAgain(f"{response.status_code} {response.reason}")
            if not response.ok:
                raise ConnectionError(f"{url}: {response.status_code} {response.reason}")
            if response.status_code != 206:
                done = 0
            length = int(response.headers.get("Content-Length", 0))
            total = done + length if length else size
            if size and total != size:
                kind = response.headers.get("Content-Type", "something else")
                raise ConnectionError(
                    f"{url} sent {total:,} bytes ({kind}) where {size:,} were expected: a login "
                    f"page of this network, perhaps"
                )
            part.parent.mkdir(parents=True, exist_ok=True)
            with (
                open(part, "ab" if done else "wb") as f,
                tqdm(
                    desc=part.stem,
                    total=total,
                    initial=done,
                    unit="B",
                    unit_scale=True,
                    disable=None,
                ) as bar,
            ):
                for block in response.iter_content(1 << 14):
                    f.write(block)
                    bar.update(len(block))
                    done += len(block)
                    if total and done > total:
                        raise ConnectionError(
                            f"{url} sent more than the {total:,} bytes it promised"
                        )
                f.flush()
                os.fsync(f.fileno())
            if total and done < total:
                raise _TryAgain(f"the connection broke after {done:,} of {total:,} bytes")
    except requests.TooManyRedirects:
        raise ConnectionError(f"{url}: redirected in a circle") from None
    except requests.RequestException as error:
        raise _TryAgain(_reason(error)) from None


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate can't be trusted: a login page of this network, perhaps"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    return "no connection"
