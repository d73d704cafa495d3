"""Downloads: a file from the network, whole and checked, or an error that says why not.

download(urls, Path("data/tinyshakespeare/input.txt"), size, sha256)
"""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common.files import exclusive_lock

TIMEOUT = 10, 30  # seconds to connect, and seconds without a byte
LONGEST_PAUSE = 60  # seconds that a busy server may ask for
MOST_BYTES = 1 << 30  # of a file whose length is unknown


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _TryAgain(Exception):
    """A fault that may pass, of the connection or of a busy server, which may ask for a pause."""

    def __init__(self, reason: str, pause: int = 0):
        super().__init__(reason)
        self.pause = pause  # seconds


def download(
    urls: Sequence[str],
    path: Path,
    size: int | None = None,
    sha256: str = "",
    pause: float = 0.5,
    tries: int = 4,
) -> None:
    """Download a file from the first address that has it; `path` appears whole and checked.

    A fault that may pass is tried again, and a broken download resumes where it broke off. A file
    that came in several parts is kept only if a sha256 proves that they belong together. No other
    file is left. Several processes may call this for one file: one of them downloads it, and the
    others wait. A file that is there already, with the expected sha256 if there is one, is not
    downloaded again.

    Args:
        urls: addresses of the file.
        path: file to write.
        size: expected size in bytes, if it is known.
        sha256: expected checksum, if it is known.
        pause: seconds before the second attempt; each later pause is twice as long.
        tries: most attempts in a row that bring no new byte.

    Raises:
        ConnectionError: if no address works.
        OSError: if `path` cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # one process downloads, and the others wait for it
    with exclusive_lock(path.with_name(path.name + ".lock"), wait=True):
        if path.exists() and sha256 in ("", sha256_of(path)):
            return
        _download(urls, path, size, sha256, pause, tries)


def _download(urls, path, size, sha256, pause, tries) -> None:
    """Download a file, while no other process downloads it."""
    part = path.with_name(path.name + ".part")  # a killed process leaves it to be resumed
    try:
        for url in urls:
            try:
                # fewer tries if there is another address: without a network, each takes its time
                _fetch(url, part, size, sha256, pause, tries if url == urls[-1] else 2)
                os.replace(part, path)
                return
            except ConnectionError as error:
                reason = error
                part.unlink(missing_ok=True)
        raise ConnectionError(f"cannot download {reason}")
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a failed write does not know it
        part.unlink(missing_ok=True)
        raise


def _fetch(url, part, size, sha256, pause, tries) -> None:
    """Make `part` whole and checked, or raise ConnectionError."""
    failures = 0
    most_bytes = 0
    while True:
        done = part.stat().st_size if part.exists() else 0
        try:
            expected = _fetch_rest(url, part, done, size, sha256)
            found = sha256_of(part)
            if expected in (None, found):
                return
            part.unlink()
            if done:  # what a killed process left may be of another file, so start anew
                raise _TryAgain("the file changes while it is downloaded")
            raise ConnectionError(
                f"{url} sent another file: its sha256 is {found[:16]}..., not {expected[:16]}..."
            )
        except _TryAgain as error:
            fetched = part.stat().st_size if part.exists() else 0
            failures = 1 if fetched > most_bytes else failures + 1
            most_bytes = max(fetched, most_bytes)
            if failures == tries:
                raise ConnectionError(f"{url}: {error}") from None
            time.sleep(max(error.pause, pause * 2 ** (failures - 1)))


def _fetch_rest(url, part, done, size, sha256) -> str | None:
    """Append what is missing to `part`, which has `done` bytes, or write it anew.

    Returns the expected sha256, as it is given or as the Hugging Face hub sends it.
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
            _check_status(url, response, part, done)
            sha256 = sha256 or _sha256_of_hub(response)
            resumed = response.status_code == 206
            if resumed and not sha256:
                part.unlink()
                raise _TryAgain("it broke off, and no sha256 can prove that the parts fit")
            done = done if resumed else 0
            length = _number(response, "Content-Length")
            total = done + length if length else size
            _check_headers(url, response, total, size, sha256)
            _save(url, response, part, done, total)
            return sha256
    except requests.TooManyRedirects:
        raise ConnectionError(f"{url}: redirected in a circle") from None
    except (requests.RequestException, ValueError) as error:  # a redirection may lead to no address
        raise _TryAgain(_reason(error)) from None


def _check_status(url, response, part, done) -> None:
    """Raise _TryAgain or ConnectionError unless the answer holds the bytes asked for."""
    status = response.status_code
    reason = f"{status} {response.reason}"
    if status in (408, 429) or status >= 500:
        pause = _number(response, "Retry-After")
        if pause > LONGEST_PAUSE:
            raise ConnectionError(f"{url}: {reason}, try again in {pause:,} s")
        raise _TryAgain(reason, pause)
    if done and status == 416:  # no bytes after `done`: it is whole, or another file
        part.unlink()
        raise _TryAgain("the server refused to resume the download")
    if status != 200 and not (done and status == 206):
        raise ConnectionError(f"{url}: {reason}")


def _sha256_of_hub(response) -> str | None:
    """Return the sha256 that the hub names in the answer that redirects to a large file."""
    for answer in (*response.history, response):
        tag = re.fullmatch('"?([0-9a-f]{64})"?', answer.headers.get("X-Linked-Etag", ""))
        if tag:
            return tag[1]
    return None


def _check_headers(url, response, total, size, sha256) -> None:
    """Raise ConnectionError if the answer is not the file, or its end cannot be told."""
    kind = response.headers.get("Content-Type", "something else")
    if (size and total != size) or kind.startswith("text/html"):
        expected = f" of {total:,} bytes where {size:,} were expected" if size else ""
        raise ConnectionError(
            f"{url} sent {kind}{expected}; perhaps it is the login page of this network"
        )
    if not (total or sha256 or "Transfer-Encoding" in response.headers):
        raise ConnectionError(f"{url} does not send the length of the file, so it may be cut off")


def _save(url, response, part, done, total) -> None:
    """Append an answer to the `done` bytes of `part`, with a progress bar."""
    most = total or MOST_BYTES
    bar = tqdm(desc=part.stem, total=total, initial=done, unit="B", unit_scale=True, disable=None)
    with open(part, "ab" if done else "wb") as f, bar:
        for block in response.iter_content(1 << 14):
            f.write(block)
            bar.update(len(block))
            done += len(block)
            if done > most:
                raise ConnectionError(f"{url} sent more than {most:,} bytes")
        f.flush()
        os.fsync(f.fileno())
    if total and done < total:
        raise _TryAgain(f"the connection broke after {done:,} of {total:,} bytes")


def _number(response, header) -> int:
    """Return the number in a header, or 0 if there is none."""
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
