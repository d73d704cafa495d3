"""Downloads: a file from the network, whole and checked, or an error that gives the reason.

download(urls, Path("data/tinyshakespeare/input.txt"), size, sha256)
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from common.files import exclusive_lock

TIMEOUT = 10, 30  # seconds to connect, and seconds without a byte
LONGEST_PAUSE = 60  # seconds that a busy server may ask for
MOST_BYTES = 1 << 30  # most bytes of a file whose length is unknown


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _TryAgain(Exception):
    """A fault of the connection or of a busy server, which may be gone at the next attempt.

    Attributes:
        pause: Seconds that the server asks to wait.
    """

    def __init__(self, reason: str, pause: int = 0):
        super().__init__(reason)
        self.pause = pause


def download(
    urls: Sequence[str],
    path: Path,
    size: int | None = None,
    sha256: str = "",
    pause: float = 0.5,
    tries: int = 4,
) -> None:
    """Download a file from the first address that has it, unless `path` exists already.

    - `path` appears when the file is whole and checked. No other file is left.
    - A fault of the connection leads to another attempt, which resumes where the download broke
      off. A file that was downloaded in several attempts is kept only if its sha256 is right.
    - Several processes may call this function for one file: one of them downloads the file, and the
      others wait.
    - An existing `path` with another sha256 is replaced.

    Args:
        urls: Addresses of the file.
        path: File to write.
        size: Expected size in bytes; None if it is unknown.
        sha256: Expected checksum; "" if it is unknown.
        pause: Seconds before the second attempt; each later pause is twice as long.
        tries: Most attempts in a row that bring no new byte.

    Raises:
        ConnectionError: No address gives the file.
        OSError: `path` cannot be written.
    """
    with download_lock(path):
        if path.exists() and sha256 in ("", sha256_of(path)):
            return
        _download(urls, path, size, sha256, pause, tries)


@contextlib.contextmanager
def download_lock(path: Path) -> Iterator[None]:
    """Hold a lock on a download, so that one process downloads `path` and the others wait.

    The lock file is PATH.lock. Folders that were made for it are removed at the end if nothing was
    downloaded into them.

    Args:
        path: File to write; its folder need not exist.

    Raises:
        OSError: The folder or the lock file cannot be written.
    """
    new_folders = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(path.with_name(path.name + ".lock"), wait=True):
            yield
    finally:
        with contextlib.suppress(OSError):  # a folder is not empty
            for folder in new_folders:
                folder.rmdir()


def _download(urls, path, size, sha256, pause, tries) -> None:
    """Download a file, while no other process downloads it."""
    partial = path.with_name(path.name + ".part")  # a killed process leaves it to be resumed
    try:
        for url in urls:
            try:
                # fewer tries if there is another address: without a network, each try takes long
                _fetch(url, partial, size, sha256, pause, tries if url == urls[-1] else 2)
                os.replace(partial, path)
                return
            except ConnectionError as error:
                reason = error
                partial.unlink(missing_ok=True)
        raise ConnectionError(f"cannot download {reason}")
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a failed write does not name its file
        partial.unlink(missing_ok=True)
        raise


def _fetch(url, partial, size, sha256, pause, tries) -> None:
    """Complete and check the file `partial`, in several attempts if necessary.

    Raises:
        ConnectionError: The address does not give the file.
    """
    failures = 0
    most_bytes = 0
    while True:
        done = partial.stat().st_size if partial.exists() else 0
        try:
            expected = _fetch_rest(url, partial, done, size, sha256)
            found = sha256_of(partial)
            if expected in (None, found):
                return
            partial.unlink()
            if done:  # the bytes of a killed process may be of another file, so start anew
                raise _TryAgain("the file changes while it is downloaded")
            raise ConnectionError(
                f"{url} sent another file: its sha256 is {found[:16]}..., not {expected[:16]}..."
            )
        except _TryAgain as error:
            fetched = partial.stat().st_size if partial.exists() else 0
            failures = 1 if fetched > most_bytes else failures + 1
            most_bytes = max(fetched, most_bytes)
            if failures == tries:
                raise ConnectionError(f"{url}: {error}") from None
            time.sleep(max(error.pause, pause * 2 ** (failures - 1)))


def _fetch_rest(url, partial, done, size, sha256) -> str | None:
    """Append the missing bytes to `partial`, which has `done` bytes, or write `partial` anew.

    Returns:
        The expected sha256, either `sha256` or the one that the Hugging Face hub sends; None if
        neither is known.
    """
    import requests  # takes 0.1 s, which a run without a download does not spend

    headers = {
        "Accept-Encoding": "identity",  # so that lengths and ranges count the file's own bytes
        "User-Agent": "Mozilla/5.0 (GPT-2 training repo)",  # some hosts refuse the default
    }
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            _check_status(url, response, partial, done)
            sha256 = sha256 or _sha256_of_hub(response)
            resumed = response.status_code == 206
            if resumed and not sha256:
                partial.unlink()
                raise _TryAgain("it broke off, and no sha256 can prove that both halves fit")
            done = done if resumed else 0
            length = _number(response, "Content-Length")
            total = done + length if length else size
            _check_headers(url, response, total, size, sha256)
            _save(url, response, partial, done, total)
            return sha256
    except requests.TooManyRedirects:
        raise ConnectionError(f"{url}: redirected in a circle") from None
    except (requests.RequestException, ValueError) as error:  # a redirection may be no address
        raise _TryAgain(_reason(error)) from None


def _check_status(url, response, partial, done) -> None:
    """Check that the answer holds the file, or the bytes after the first `done` ones.

    Raises:
        _TryAgain: Another attempt may succeed.
        ConnectionError: No attempt can succeed.
    """
    status = response.status_code
    reason = f"{status} {response.reason}"
    if status in (408, 429) or status >= 500:
        pause = _number(response, "Retry-After")
        if pause > LONGEST_PAUSE:
            raise ConnectionError(f"{url}: {reason}, try again in {pause:,} s")
        raise _TryAgain(reason, pause)
    if done and status == 416:  # no bytes after `done`: `partial` is whole, or of another file
        partial.unlink()
        raise _TryAgain("the server refused to resume the download")
    if status != 200 and not (done and status == 206):
        raise ConnectionError(f"{url}: {reason}")


def _sha256_of_hub(response) -> str | None:
    """Return the sha256 in the header with which the hub redirects to a large file, or None."""
    for answer in (*response.history, response):
        tag = re.fullmatch('"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-Etag", ""))
        if tag:
            return tag[1]
    return None


def _check_headers(url, response, total, size, sha256) -> None:
    """Check type and length of the answer before the file is downloaded.

    Raises:
        ConnectionError: The answer is not the file, or its length is unknown.
    """
    content_type = response.headers.get("Content-Type", "something else")
    if (size and total != size) or content_type.startswith("text/html"):
        expected = f" of {total:,} bytes where {size:,} were expected" if size else ""
        raise ConnectionError(
            f"{url} sent {content_type}{expected}; perhaps it is the login page of this network"
        )
    if not (total or sha256 or "Transfer-Encoding" in response.headers):
        raise ConnectionError(f"{url} does not send the length of the file, so it may be cut off")


def _save(url, response, partial, done, total) -> None:
    """Append an answer to the `done` bytes of `partial`, with a progress bar.

    Raises:
        _TryAgain: The connection broke.
        ConnectionError: The answer is too long.
    """
    max_bytes = total or MOST_BYTES
    bar = tqdm(
        desc=partial.stem, total=total, initial=done, unit="B", unit_scale=True, disable=None
    )
    with open(partial, "ab" if done else "wb") as f, bar:
        for block in response.iter_content(1 << 14):
            f.write(block)
            bar.update(len(block))
            done += len(block)
            if done > max_bytes:
                raise ConnectionError(f"{url} sent more than {max_bytes:,} bytes")
        f.flush()
        os.fsync(f.fileno())
    if total and done < total:
        raise _TryAgain(f"the connection broke after {done:,} of {total:,} bytes")


def _number(response, header) -> int:
    """Return the number in a header, or 0 if the header has none."""
    value = response.headers.get(header, "")
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else 0


def _reason(error) -> str:
    """Return a short reason for an error of requests."""
    import requests

    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate cannot be trusted; perhaps it is the login page of this network"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    return "no connection"
