"""Downloads from a real HTTP server on this machine that misbehaves on purpose."""

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
    """An HTTP server whose answer to request n is server.answer(handler, n); n counts from 1.

    server.ranges lists the Range headers of all requests. server.stall() blocks until the end of
    the test.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.ranges.append(self.headers.get("Range"))
            server.answer(self, len(server.ranges))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges = []
    end_of_test = threading.Event()
    server.stall = end_of_test.wait
    server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    end_of_test.set()
    server.shutdown()
    thread.join()
    server.server_close()


def reply(handler, status=200, body=BODY, sent=None, **headers):
    """Send an answer.

    Args:
        handler: Handler of the request.
        status: Status code of the answer.
        body: Body whose length the answer announces.
        sent: Number of bytes of `body` to send; all of them if None.
        **headers: Additional headers; a header that is None is left out.
    """
    handler.send_response(status)
    for name, value in ({"Content_Length": len(body)} | headers).items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body[:sent])


def reply_with_range(handler, body=BODY, **options):
    """Send the part of `body` that the Range header of the request asks for."""
    start = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    reply(handler, 206 if start else 200, body[start:], **options)


def fetch(server, tmp_path, **options):
    """Download from the server to tmp_path/corpus/input.txt and return this path."""
    path = tmp_path / "corpus" / "input.txt"
    options = {"size": len(BODY), "sha256": SHA256, "pause": 0.01} | options
    download.download([server.url], path, **options)
    return path


def assert_fails(server, tmp_path, match, **options):
    """Assert that a download raises an error that matches `match` and leaves no file."""
    with pytest.raises(ConnectionError, match=match):
        fetch(server, tmp_path, **options)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_download_writes_the_file_alone(server, tmp_path):
    server.answer = lambda handler, n: reply(handler)
    path = fetch(server, tmp_path)
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["input.txt"]


def test_a_download_resumes_after_a_broken_connection(server, tmp_path):
    def answer(handler, n):  # sends whole blocks of the reader
        reply_with_range(handler, sent=(6 if n == 1 else 9) << 14)

    server.answer = answer
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={6 << 14}-", f"bytes={15 << 14}-"]


def test_a_download_starts_again_if_the_server_has_no_ranges(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, sent=1000 if n == 1 else None)
    assert fetch(server, tmp_path).read_bytes() == BODY


def test_a_download_resumes_the_part_of_a_killed_process(server, tmp_path):
    part = tmp_path / "corpus" / "input.txt.part"
    part.parent.mkdir()
    part.write_bytes(BODY[:1000])
    server.answer = lambda handler, n: reply(handler, 206, BODY[1000:])
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.ranges == ["bytes=1000-"]


def test_a_part_of_an_older_file_is_downloaded_again(server, tmp_path):
    part = tmp_path / "corpus" / "input.txt.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 1000)

    def answer(handler, n):
        if n == 1:
            reply(handler, 206, BODY[1000:])
        else:
            reply(handler)

    server.answer = answer
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert server.ranges == ["bytes=1000-", None]


def test_a_part_that_is_longer_than_the_file_is_downloaded_again(server, tmp_path):
    part = tmp_path / "corpus" / "input.txt.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 400_000)  # longer than the file
    server.answer = lambda handler, n: reply(handler, 416 if n == 1 else 200)
    assert fetch(server, tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("sha256", [SHA256, ""])
def test_a_file_that_changes_between_two_ranges_is_downloaded_again(server, tmp_path, sha256):
    """Without a sha256, no check proves that two ranges belong to one file."""

    def answer(handler, n):
        if n == 1:
            reply_with_range(handler, BODY[::-1], sent=6 << 14)
        else:
            reply_with_range(handler)

    server.answer = answer
    assert fetch(server, tmp_path, size=None, sha256=sha256).read_bytes() == BODY
    assert server.ranges == [None, f"bytes={6 << 14}-", None]


def test_a_file_that_changes_all_the_time_is_an_error(server, tmp_path):
    def answer(handler, n):
        sent = 6 << 14 if n % 2 else None
        reply_with_range(handler, bytes([n]) * len(BODY), sent=sent)

    server.answer = answer
    assert_fails(server, tmp_path, "the file changes while it is downloaded")
    assert_fails(server, tmp_path, "no sha256 can prove", size=None, sha256="")


@pytest.mark.parametrize(
    "retry_after", [None, "1", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 5000]
)
def test_a_busy_server_is_asked_again(server, tmp_path, retry_after):
    def answer(handler, n):
        status = {1: 503, 2: 429}.get(n, 200)
        reply(handler, status, Retry_After=retry_after)

    server.answer = answer
    start = time.monotonic()
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert len(server.ranges) == 3
    assert time.monotonic() - start >= (2 if retry_after == "1" else 0)


def test_a_server_that_is_always_busy_is_an_error(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 503)
    assert_fails(server, tmp_path, "503 Service Unavailable", tries=3)
    assert len(server.ranges) == 3


def test_a_download_does_not_wait_for_an_hour(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 429, Retry_After=3600)
    assert_fails(server, tmp_path, "429 Too Many Requests.*try again in 3,600 s")
    assert len(server.ranges) == 1


def test_a_stalled_server_is_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (10, 0.5))

    def answer(handler, n):
        if n == 1:  # stalls before the first byte
            server.stall()
        elif handler.headers["Range"]:  # does not stall
            reply_with_range(handler)
        else:  # stalls in the middle
            reply(handler, sent=6 << 14)
            server.stall()

    server.answer = answer
    assert fetch(server, tmp_path, tries=20).read_bytes() == BODY
    assert server.ranges[:2] == [None, None]
    assert server.ranges[-1].startswith("bytes=")


def test_a_server_that_always_stalls_is_an_error(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (10, 0.2))
    server.answer = lambda handler, n: server.stall()
    assert_fails(server, tmp_path, "no answer in time", tries=2)

    def answer(handler, n):
        reply(handler, sent=1000)
        server.stall()

    server.answer = answer
    assert_fails(server, tmp_path, "no answer in time", tries=2)


def reset_connection(handler):
    """End the connection with a TCP reset, which a firewall may send."""
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()


def test_a_reset_connection_is_tried_again(server, tmp_path):
    server.answer = lambda handler, n: reset_connection(handler) if n < 3 else reply(handler)
    assert fetch(server, tmp_path).read_bytes() == BODY
    server.answer = lambda handler, n: reset_connection(handler)
    (tmp_path / "corpus" / "input.txt").unlink()
    assert_fails(server, tmp_path, "no connection")


def test_an_answer_that_is_not_http_is_an_error(server, tmp_path):
    server.answer = lambda handler, n: handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    assert_fails(server, tmp_path, "no connection")


# announced length -> error of a download that knows the size, error of one that does not
LENGTHS = {
    len(BODY) + 1000: ("301,000 bytes where 300,000", "the connection broke"),
    len(BODY) - 1000: ("299,000 bytes where 300,000", "another file: its sha256"),
    "many": (None, None),  # an invalid length counts as no length
    "-5": (None, None),
    None: (None, None),
    0: ("the connection broke after 0 of 300,000 bytes", "another file: its sha256"),
}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_false_length_is_an_error_or_ignored(server, tmp_path, length):
    server.answer = lambda handler, n: reply(handler, Content_Length=length)
    for size, words in zip((len(BODY), None), LENGTHS[length]):
        if words:
            assert_fails(server, tmp_path, words, size=size)
        else:
            path = fetch(server, tmp_path, size=size)
            assert path.read_bytes() == BODY
            path.unlink()


def test_a_download_without_length_and_sha256_needs_a_marked_end(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, sent=1000, Content_Length=None)
    assert_fails(server, tmp_path, "does not send the length", size=None, sha256="")
    chunks = b"3e8\r\n" + BODY[:1000] + b"\r\n0\r\n\r\n"  # the last chunk marks the end
    server.answer = lambda handler, n: reply(
        handler, body=chunks, Content_Length=None, Transfer_Encoding="chunked"
    )
    path = fetch(server, tmp_path, size=None, sha256="")
    assert path.read_bytes() == BODY[:1000]
    path.unlink()
    server.answer = lambda handler, n: reply(
        handler, body=chunks, sent=500, Content_Length=None, Transfer_Encoding="chunked"
    )
    assert_fails(server, tmp_path, "the connection broke", size=None, sha256="")


def test_an_endless_answer_does_not_fill_the_disk(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST_BYTES", 100_000)

    def answer(handler, n):
        reply(handler, body=b"", Content_Length=None, Transfer_Encoding="chunked")
        with contextlib.suppress(ConnectionError):
            while True:
                handler.wfile.write(b"3e8\r\n" + BODY[:1000] + b"\r\n")

    server.answer = answer
    assert_fails(server, tmp_path, "sent more than 300,000 bytes")
    assert_fails(server, tmp_path, "sent more than 100,000 bytes", size=None)
    assert len(server.ranges) == 2


@pytest.mark.parametrize("status", [202, 204, 206, 300, 304, 416])
def test_an_unexpected_status_is_an_error(server, tmp_path, status):
    """206 and 416 are unexpected, because the request has no Range header."""
    server.answer = lambda handler, n: reply(handler, status)
    assert_fails(server, tmp_path, f": {status} ")
    assert len(server.ranges) == 1


def test_not_found_is_not_tried_again(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 404)
    assert_fails(server, tmp_path, "404 Not Found")
    assert len(server.ranges) == 1


def test_a_login_page_is_an_error(server, tmp_path):
    page = b"<html>Welcome to our hotel</html>"
    server.answer = lambda handler, n: reply(handler, body=page, Content_Type="text/html")
    assert_fails(server, tmp_path, r"sent text/html of 33 bytes where 300,000 were.*login page")
    assert_fails(
        server, tmp_path, "sent text/html; perhaps it is the login page", size=None, sha256=""
    )
    server.answer = lambda handler, n: reply(handler, body=page.ljust(len(BODY)))  # no type
    assert_fails(server, tmp_path, "another file: its sha256")


def test_another_file_of_the_same_length_is_an_error(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, body=BODY[::-1])
    assert_fails(server, tmp_path, "another file: its sha256")


def test_a_circle_of_redirects_is_an_error(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 302, b"", Location=f"{server.url}?{n % 2}")
    assert_fails(server, tmp_path, "circle")


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "http://[", f"http://{'a' * 70}.test/", "http:///x", "\xff://"],
)
def test_a_redirect_to_an_invalid_address_is_an_error(server, tmp_path, location):
    server.answer = lambda handler, n: reply(handler, 302, b"", Location=location)
    assert_fails(server, tmp_path, "input.txt: (no connection|redirected in a circle)", tries=1)


def test_an_unreachable_server_is_an_error(tmp_path):
    class UnreachableServer:
        url = "http://127.0.0.1:9/input.txt"

    assert_fails(UnreachableServer, tmp_path, "127.0.0.1:9/input.txt: no connection")


def test_the_second_address_is_used_if_the_first_fails(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 404 if n == 1 else 200)
    path = tmp_path / "input.txt"
    download.download([server.url, server.url], path, len(BODY), SHA256, pause=0.01)
    assert path.read_bytes() == BODY


def run_download(server, tmp_path, **options):
    """Download in a separate process, assert that no file stays, return the CompletedProcess."""
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


def test_a_failed_download_is_a_one_line_error(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 404)
    assert_one_line_error(run_download(server, tmp_path), "input.txt: 404 Not Found")
    server.answer = lambda handler, n: reply(handler, sent=1000)  # always breaks
    result = run_download(server, tmp_path)
    assert_one_line_error(result, "the connection broke")


def test_a_full_disk_is_a_one_line_error(server, tmp_path):
    """A limit on file sizes stands in for the disk."""
    server.answer = lambda handler, n: reply(handler)

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = run_download(server, tmp_path, preexec_fn=limit_file_size)
    assert_one_line_error(result, "input.txt: File too large; make room")


def test_a_file_in_place_of_the_folder_is_an_error(server, tmp_path):
    server.answer = lambda handler, n: reply(handler)
    (tmp_path / "corpus").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="corpus"):
        fetch(server, tmp_path)


def test_another_file_in_the_folder_of_a_corpus_is_downloaded_again(
    server, tmp_path, monkeypatch, capsys
):
    """The other file has the right length, and stays until the download is complete."""
    entry = inputs.CATALOG["tinyshakespeare"]
    download_file = replace(entry.downloads[0], urls=(server.url,), size=len(BODY), sha256=SHA256)
    entry = replace(entry, downloads=(download_file,))
    monkeypatch.setitem(inputs.CATALOG, "tinyshakespeare", entry)
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
    with pytest.raises(ConnectionError, match="404"):
        inputs.load_corpus("tinyshakespeare", tmp_path)
    assert path.read_bytes() == BODY[::-1]


def start_download(server, folder) -> subprocess.Popen:
    """Start a process that downloads folder/input.txt; return once the process has its imports."""
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
def slow_server(server):
    """The server, which sends the second half of the file when `release` is set."""
    server.half_sent = threading.Event()
    server.release = threading.Event()

    def answer(handler, n):
        if n > 1:
            reply_with_range(handler)
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


def test_several_processes_download_a_file_once(slow_server, tmp_path):
    first = start_download(slow_server, tmp_path)
    assert slow_server.half_sent.wait(60)
    others = [start_download(slow_server, tmp_path) for _ in range(2)]
    with pytest.raises(subprocess.TimeoutExpired):
        others[0].wait(0.5)  # the process waits for the first one
    slow_server.release.set()
    assert [process.wait(60) for process in (first, *others)] == [0, 0, 0]
    assert slow_server.ranges == [None]
    assert (tmp_path / "input.txt").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]


def test_a_waiting_process_resumes_the_part_of_a_killed_process(slow_server, tmp_path):
    first = start_download(slow_server, tmp_path)
    assert slow_server.half_sent.wait(60)
    part = tmp_path / "input.txt.part"
    while not part.exists() or part.stat().st_size < 9 << 14:
        assert first.poll() is None
        time.sleep(0.01)
    second = start_download(slow_server, tmp_path)
    first.kill()
    assert second.wait(60) == 0
    assert first.wait(60) != 0
    assert slow_server.ranges == [None, f"bytes={9 << 14}-"]
    assert (tmp_path / "input.txt").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]


def test_an_interrupted_process_keeps_the_part_of_another_process(slow_server, tmp_path):
    first = start_download(slow_server, tmp_path)
    assert slow_server.half_sent.wait(60)
    second = start_download(slow_server, tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    second.send_signal(signal.SIGINT)
    assert second.wait(60) != 0
    slow_server.release.set()
    assert first.wait(60) == 0
    assert slow_server.ranges == [None]
    assert (tmp_path / "input.txt").read_bytes() == BODY
