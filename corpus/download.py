"""Files from the network: whole, checked and gone on with, or an error that says why not.

download(urls, Path("data/tinyshakespeare/input.txt"), size, sha256)
"""

import hashlib
import os
import re
import time
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 10, 30  # seconds: to connect, and without a byte
LONGEST_PAUSE = 60  # seconds that a busy server may ask for
UNTOLD = 1 << 30  # bytes that a file may have whose length nobody tells


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _TryAgain(Exception):
    """A fault that may pass: of the line, or of a busy server. pause: seconds that it asks for."""

    def __init__(self, reason, pause=0):
        super().__init__(reason)
        self.pause = pause


def download(
    urls, path: Path, size: int | None = None, sha256: str = "", pause=0.5, tries=4
) -> None:
    """Fetches a file from the first of `urls` that has it; `path` appears whole and checked.

    A fault that may pass is tried again after `pause` seconds, then twice as long, up to `tries`
    times without a new byte, going on where it broke off; what came in several parts is kept only
    where a sha256 tells that they belong together. Raises ConnectionError where no address
    works, OSError where `path` can't be written. Leaves nothing but `path`.
    """
    part = path.with_name(path.name + ".part")  # left by a killed run: gone on with
    try:
        for url in urls:
            try:
                # there is another to turn to: of a machine without a network each takes its time
                _fetch(url, part, size, sha256, pause, tries if url == urls[-1] else 2)
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
    failures = most = 0
    while True:
        done = part.stat().st_size if part.exists() else 0
        try:
            expected = _fetch_rest(url, part, done, size, sha256)
            found = sha256_of(part)
            if expected in (None, found):
                return
            part.unlink()
            if done:  # what a killed run left may be of another file: from the start
                raise _TryAgain("it changes while it is being fetched")
            raise ConnectionError(
                f"{url} sent something else: sha256 {found[:16]}..., not {expected[:16]}..."
            )
        except _TryAgain as error:
            here = part.stat().st_size if part.exists() else 0
            failures, most = 1 if here > most else failures + 1, max(here, most)
            if failures == tries:
                raise ConnectionError(f"{url}: {error}") from None
            time.sleep(max(error.pause, pause * 2 ** (failures - 1)))


def _fetch_rest(url, part, done, size, sha256) -> str | None:
    """Appends to `part`, `done` bytes long, what is missing, or starts it anew. Returns its sha256,
    where it is given or the Hugging Face hub tells it."""
    import requests  # takes 0.1 s, which a run that downloads nothing need not wait

    headers = {
        "Accept-Encoding": "identity",  # so that lengths and ranges count the file's own bytes
        "User-Agent": "Mozilla/5.0 (GPT-2 training repo)",  # some hosts refuse the default
    }
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            status, reason = response.status_code, f"{response.status_code} {response.reason}"
            if status in (408, 429) or status >= 500:
                asked = _number(response, "Retry-After")
                if asked > LONGEST_PAUSE:
                    raise ConnectionError(f"{url}: {reason}, try again in {asked:,} s")
                raise _TryAgain(reason, asked)
            if done and status == 416:  # nothing lies beyond `done`: it is whole, or not it
                part.unlink()
                raise _TryAgain("the server refused to go on where the file broke off")
            if status != 200 and not (done and status == 206):
                raise ConnectionError(f"{url}: {reason}")
            # the hub names a large file's sha256 in the answer that redirects to it
            tags = [r.headers.get("X-Linked-Etag", "") for r in (*response.history, response)]
            told = [tag.strip('"') for tag in tags if re.fullmatch('"?[0-9a-f]{64}"?', tag)]
            sha256 = sha256 or (told[0] if told else None)
            if status == 206 and not sha256:
                part.unlink()
                raise _TryAgain("it broke off, and no sha256 tells if the rest is of the same file")
            done = done if status == 206 else 0
            length = _number(response, "Content-Length")
            total = done + length if length else size
            kind = response.headers.get("Content-Type", "something else")
            if (size and total != size) or kind.startswith("text/html"):
                expected = f" of {total:,} bytes where {size:,} were expected" if size else ""
                raise ConnectionError(
                    f"{url} sent {kind}{expected}: a login page of this network, perhaps"
                )
            if not (total or sha256 or "Transfer-Encoding" in response.headers):
                raise ConnectionError(f"{url} tells no length: all of it may not have come")
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
                    if done > (most := total or UNTOLD):
                        raise ConnectionError(f"{url} sent more than the {most:,} bytes it may")
                f.flush()
                os.fsync(f.fileno())
            if total and done < total:
                raise _TryAgain(f"the connection broke after {done:,} of {total:,} bytes")
            return sha256
    except requests.TooManyRedirects:
        raise ConnectionError(f"{url}: redirected in a circle") from None
    except (requests.RequestException, ValueError) as error:  # a redirection may be no address
        raise _TryAgain(_reason(error)) from None


def _number(response, header) -> int:
    """0 where the header is missing, or no number."""
    value = response.headers.get(header, "")
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else 0


def _reason(error) -> str:
    import requests

    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate can't be trusted: a login page of this network, perhaps"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    return "no connection"
