"""download.download against a real server on this machine that misbehaves on purpose."""

import contextlib
import hashlib
import http.server
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import ROOT, assert_one_line_error

from corpus import download, inputs

BODY = bytes(i % 251 for i in range(300_000))
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """Serves what `server.answer(handler, n)` writes for its n-th request; `server.ranges` keeps
    their Range headers; `server.stall()` waits for the end of the test."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.ranges.append(self.headers.get("Range"))
            server.answer(self, len(server.ranges))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges, over = [], threading.Event()
    server.stall = over.wait
    server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def reply(handler, status=200, body=BODY, sent=None, **headers):
    """Promises `body` and sends its first `sent` bytes. A header that is None isn't sent."""
    handler.send_response(status)
    for name, value in ({"Content_Length": len(body)} | headers).items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body[:sent])


def rest(handler, body=BODY, **options):
    """What is asked for of `body`, by a server that knows ranges."""
    start = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    reply(handler, 206 if start else 200, body[start:], **options)


def fetch(server, tmp_path, **options):
    path = tmp_path / "corpus" / "input.txt"
    options = {"size": len(BODY), "sha256": SHA256, "pause": 0.01} | options
    download.download([server.url], path, **options)
    return path


def refused(server, tmp_path, match, **options):
    """It fails with those words and leaves nothing behind."""
    with pytest.raises(ConnectionError, match=match):
        fetch(server, tmp_path, **options)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_whole(server, tmp_path):
    server.answer = lambda handler, n: reply(handler)
    path = fetch(server, tmp_path)
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["input.txt"]


def test_broken_connection_goes_on_where_it_broke(server, tmp_path):
    # in whole blocks of the reader
    server.answer = lambda handler, n: rest(handler, sent=(6 if n == 1 else 9) << 14)
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={6 << 14}-", f"bytes={15 << 14}-"]


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, sent=1000 if n == 1 else None)
    assert fetch(server, tmp_path).read_bytes() == BODY


def test_goes_on_with_what_a_killed_run_left(server, tmp_path):
    part = tmp_path / "corpus" / "input.txt.part"
    part.parent.mkdir()
    part.write_bytes(BODY[:1000])
    server.answer = lambda handler, n: reply(handler, 206, BODY[1000:])
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.ranges == ["bytes=1000-"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    part = tmp_path / "corpus" / "input.txt.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 1000)
    server.answer = lambda h, n: reply(h, 206, BODY[1000:]) if n == 1 else reply(h)
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.ranges == ["bytes=1000-", None]


def test_leftovers_of_another_file_are_thrown_away(server, tmp_path):
    part = tmp_path / "corpus" / "input.txt.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 400_000)  # longer than the file
    server.answer = lambda handler, n: reply(handler, 416 if n == 1 else 200)
    assert fetch(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("sha256", [SHA256, ""])
def test_a_file_that_changes_between_two_ranges(server, tmp_path, sha256):
    """What came in two parts is of one file by its sha256, or it is fetched anew."""

    def answer(handler, n):
        rest(handler, BODY if n > 1 else BODY[::-1], sent=6 << 14 if n == 1 else None)

    server.answer = answer
    assert fetch(server, tmp_path, size=None, sha256=sha256).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={6 << 14}-", None]


def test_a_file_that_never_stays_the_same(server, tmp_path):
    server.answer = lambda h, n: rest(h, bytes([n]) * len(BODY), sent=6 << 14 if n % 2 else None)
    refused(server, tmp_path, "the file changes while it is downloaded")
    refused(server, tmp_path, "no sha256 can prove", size=None, sha256="")


@pytest.mark.parametrize("asked", [None, "1", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 5000])
def test_busy_then_well(server, tmp_path, asked):
    server.answer = lambda h, n: reply(h, {1: 503, 2: 429}.get(n, 200), Retry_After=asked)
    began = time.monotonic()
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert len(server.ranges) == 3
    assert time.monotonic() - began >= (2 if asked == "1" else 0)


def test_always_busy(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 503)
    refused(server, tmp_path, "503 Service Unavailable", tries=3)
    assert len(server.ranges) == 3


def test_busy_for_an_hour_is_not_waited_for(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 429, Retry_After=3600)
    refused(server, tmp_path, "429 Too Many Requests.*try again in 3,600 s")
    assert len(server.ranges) == 1


def test_a_stalled_server_is_left_and_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (10, 0.5))

    def answer(handler, n):  # before the first byte, then in the middle, then not at all
        if n == 1:
            server.stall()
        elif handler.headers["Range"]:
            rest(handler)
        else:
            reply(handler, sent=6 << 14)
            server.stall()

    server.answer = answer
    assert fetch(server, tmp_path, tries=20).read_bytes() == BODY
    assert server.ranges[:2] == [None, None]
    assert server.ranges[-1].startswith("bytes=")


def test_a_server_that_always_stalls(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (10, 0.2))
    server.answer = lambda handler, n: server.stall()
    refused(server, tmp_path, "no answer in time", tries=2)
    server.answer = lambda handler, n: (reply(handler, sent=1000), server.stall())
    refused(server, tmp_path, "no answer in time", tries=2)


def reset(handler):
    """Ends the connection as a firewall does."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()


def test_a_connection_that_is_reset(server, tmp_path):
    server.answer = lambda handler, n: reset(handler) if n < 3 else reply(handler)
    assert fetch(server, tmp_path).read_bytes() == BODY
    server.answer = lambda handler, n: reset(handler)
    (tmp_path / "corpus" / "input.txt").unlink()
    refused(server, tmp_path, "no connection")


def test_what_is_no_http(server, tmp_path):
    server.answer = lambda handler, n: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    refused(server, tmp_path, "no connection")


LENGTHS = {  # promised -> what a download says that knows its size, and one that doesn't
    len(BODY) + 1000: ("301,000 bytes where 300,000", "the connection broke"),
    len(BODY) - 1000: ("299,000 bytes where 300,000", "another file: its sha256"),
    "many": (None, None),  # as good as not told
    "-5": (None, None),
    None: (None, None),
    0: ("the connection broke after 0 of 300,000 bytes", "another file: its sha256"),
}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_server_that_lies_about_the_length(server, tmp_path, length):
    server.answer = lambda handler, n: reply(handler, Content_Length=length)
    for size, words in zip((len(BODY), None), LENGTHS[length]):
        if words:
            refused(server, tmp_path, words, size=size)
        else:
            path = fetch(server, tmp_path, size=size)
            assert path.read_bytes() == BODY
            path.unlink()


def test_without_length_and_sha256_there_is_no_telling_whether_it_is_whole(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, sent=1000, Content_Length=None)
    refused(server, tmp_path, "does not send the length", size=None, sha256="")
    chunks = b"3e8\r\n" + BODY[:1000] + b"\r\n0\r\n\r\n"  # their end is told
    server.answer = lambda handler, n: reply(
        handler, body=chunks, Content_Length=None, Transfer_Encoding="chunked"
    )
    path = fetch(server, tmp_path, size=None, sha256="")
    assert path.read_bytes() == BODY[:1000]
    path.unlink()
    server.answer = lambda handler, n: reply(
        handler, body=chunks, sent=500, Content_Length=None, Transfer_Encoding="chunked"
    )
    refused(server, tmp_path, "the connection broke", size=None, sha256="")


def test_an_answer_without_length_or_end_does_not_fill_the_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST_BYTES", 100_000)

    def answer(handler, n):
        reply(handler, body=b"", Content_Length=None, Transfer_Encoding="chunked")
        with contextlib.suppress(ConnectionError):
            while True:
                handler.wfile.write(b"3e8\r\n" + BODY[:1000] + b"\r\n")

    server.answer = answer
    refused(server, tmp_path, "sent more than 300,000 bytes")
    refused(server, tmp_path, "sent more than 100,000 bytes", size=None)
    assert len(server.ranges) == 2


@pytest.mark.parametrize("status", [202, 204, 206, 300, 304, 416])
def test_an_answer_that_is_not_the_file(server, tmp_path, status):
    """206 and 416 answer what wasn't asked."""
    server.answer = lambda handler, n: reply(handler, status)
    refused(server, tmp_path, f": {status} ")
    assert len(server.ranges) == 1


def test_not_found_is_not_tried_again(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 404)
    refused(server, tmp_path, "404 Not Found")
    assert len(server.ranges) == 1


def test_login_page(server, tmp_path):
    page = b"<html>Welcome to our hotel</html>"
    server.answer = lambda handler, n: reply(handler, body=page, Content_Type="text/html")
    refused(server, tmp_path, r"sent text/html of 33 bytes where 300,000 were.*login page")
    refused(server, tmp_path, "sent text/html; perhaps it is the login page", size=None, sha256="")
    server.answer = lambda handler, n: reply(handler, body=page.ljust(len(BODY)))  # no type told
    refused(server, tmp_path, "another file: its sha256")


def test_other_bytes_of_the_right_length(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, body=BODY[::-1])
    refused(server, tmp_path, "another file: its sha256")


def test_circle(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 302, b"", Location=f"{server.url}?{n % 2}")
    refused(server, tmp_path, "circle")


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "http://[", f"http://{'a' * 70}.test/", "http:///x", "\xff://"]
)
def test_redirected_to_nowhere(server, tmp_path, place):
    server.answer = lambda handler, n: reply(handler, 302, b"", Location=place)
    refused(server, tmp_path, "input.txt: (no connection|redirected in a circle)", tries=1)


def test_no_server(tmp_path):
    class Gone:
        url = "http://127.0.0.1:9/input.txt"

    refused(Gone, tmp_path, "127.0.0.1:9/input.txt: no connection")


def test_second_address_serves_when_the_first_does_not(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 404 if n == 1 else 200)
    path = tmp_path / "input.txt"
    download.download([server.url, server.url], path, len(BODY), SHA256, pause=0.01)
    assert path.read_bytes() == BODY


def run_download(server, tmp_path, **options):
    """What a script's user sees: (exit code, error), and that no file is left."""
    code = (
        "import sys, pathlib\n"
        "from common.script import run_script\n"
        "from corpus.download import download\n"
        "path = pathlib.Path('input.txt')\n"
        "run_script(lambda: download([sys.argv[1]], path, pause=0.01))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, server.url],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        **options,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    return result


def test_what_a_person_sees(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 404)
    assert_one_line_error(run_download(server, tmp_path), "input.txt: 404 Not Found")
    server.answer = lambda handler, n: reply(handler, sent=1000)  # always cut there
    result = run_download(server, tmp_path)
    assert_one_line_error(result, "the connection broke")


def test_full_disk(server, tmp_path):
    """A limit on file sizes stands in for the disk."""
    server.answer = lambda handler, n: reply(handler)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    result = run_download(server, tmp_path, preexec_fn=limit)
    assert_one_line_error(result, "input.txt: File too large; make room")


def test_folder_that_cannot_be_made(server, tmp_path):
    server.answer = lambda handler, n: reply(handler)
    (tmp_path / "corpus").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="corpus"):
        fetch(server, tmp_path)


def test_a_file_of_the_right_length_is_looked_at(server, tmp_path, monkeypatch, capsys):
    """What lies in a corpus's folder is the download, or it is fetched again."""
    entry = inputs.CATALOG["tinyshakespeare"]
    made = replace(entry.downloads[0], urls=(server.url,), size=len(BODY), sha256=SHA256)
    monkeypatch.setitem(inputs.CATALOG, "tinyshakespeare", replace(entry, downloads=(made,)))
    server.answer = lambda handler, n: reply(handler)
    path = tmp_path / "input.txt"
    path.write_bytes(BODY[::-1])
    for _ in range(2):
        inputs.load_corpus("tinyshakespeare", tmp_path)
        assert path.read_bytes() == BODY
    assert len(server.ranges) == 1
    assert (
        f"{path} differs from the file in the catalog: it is downloaded again"
        in capsys.readouterr().out
    )
    path.write_bytes(BODY[::-1])
    server.answer = lambda handler, n: reply(handler, 404)
    with pytest.raises(ConnectionError, match="404"):  # and until then it stays
        inputs.load_corpus("tinyshakespeare", tmp_path)
    assert path.read_bytes() == BODY[::-1]


def start_download(server, folder) -> subprocess.Popen:
    """Start a process that downloads folder/input.txt; return it when it is about to begin."""
    code = (
        "import pathlib, sys\n"
        "import requests\n"
        "from corpus.download import download\n"
        "print('begins', flush=True)\n"
        "download([sys.argv[1]], pathlib.Path('input.txt'), sha256=sys.argv[2], pause=0.01)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url, SHA256],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "begins\n"
    return process


@pytest.fixture
def held_back(server):
    """The server sends half of the file, and the other half when `held_back.release` is set."""
    server.half_sent = threading.Event()
    server.release = threading.Event()

    def answer(handler, n):
        if n > 1:
            rest(handler)
            return
        reply(handler, sent=9 << 14)
        handler.wfile.flush()
        server.half_sent.set()
        server.release.wait(60)
        with contextlib.suppress(OSError):  # the process may have been killed
            handler.wfile.write(BODY[9 << 14 :])

    server.answer = answer
    yield server
    server.release.set()


def test_processes_that_want_one_file_download_it_once(held_back, tmp_path):
    first = start_download(held_back, tmp_path)
    assert held_back.half_sent.wait(60)
    others = [start_download(held_back, tmp_path) for _ in range(2)]
    with pytest.raises(subprocess.TimeoutExpired):
        others[0].wait(0.5)  # it waits for the first process
    held_back.release.set()
    assert [process.wait(60) for process in (first, *others)] == [0, 0, 0]
    assert held_back.ranges == [None]
    assert (tmp_path / "input.txt").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]


def test_a_process_resumes_what_a_killed_one_began(held_back, tmp_path):
    first = start_download(held_back, tmp_path)
    assert held_back.half_sent.wait(60)
    part = tmp_path / "input.txt.part"
    while not part.exists() or part.stat().st_size < 9 << 14:
        assert first.poll() is None
        time.sleep(0.01)
    second = start_download(held_back, tmp_path)
    first.kill()
    assert second.wait(60) == 0
    assert first.wait(60) != 0
    assert held_back.ranges == [None, f"bytes={9 << 14}-"]
    assert (tmp_path / "input.txt").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]


def test_an_interrupted_process_leaves_what_another_one_downloads(held_back, tmp_path):
    first = start_download(held_back, tmp_path)
    assert held_back.half_sent.wait(60)
    second = start_download(held_back, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    second.send_signal(signal.SIGINT)
    assert second.wait(60) != 0
    held_back.release.set()
    assert first.wait(60) == 0
    assert held_back.ranges == [None]
    assert (tmp_path / "input.txt").read_bytes() == BODY
