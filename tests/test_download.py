"""download.download against a real server on this machine that misbehaves on purpose."""

import hashlib
import http.server
import os
import resource
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, assert_one_line_error

import download

BODY = bytes(i % 251 for i in range(300_000))
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """Serves what `server.answer(handler, n)` writes for its n-th request; `server.ranges` keeps
    their Range headers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.ranges.append(self.headers.get("Range"))
            server.answer(self, len(server.ranges))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges = []
    server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def reply(handler, status=200, body=BODY, sent=None, **headers):
    """Promises `body` and sends its first `sent` bytes."""
    handler.send_response(status)
    for name, value in ({"Content-Length": len(body)} | headers).items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body[:sent])


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
    def answer(handler, n):
        if n == 1:
            reply(handler, sent=6 << 14)  # in whole blocks of the reader
        else:
            done = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
            reply(handler, 206, BODY[done:], sent=9 << 14)

    server.answer = answer
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


def test_busy_then_well(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, {1: 503, 2: 429}.get(n, 200))
    assert fetch(server, tmp_path).read_bytes() == BODY
    assert len(server.ranges) == 3


def test_always_busy(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 503)
    refused(server, tmp_path, "503 Service Unavailable", tries=3)
    assert len(server.ranges) == 3


def test_not_found_is_not_tried_again(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 404)
    refused(server, tmp_path, "404 Not Found")
    assert len(server.ranges) == 1


def test_login_page(server, tmp_path):
    page = b"<html>Welcome to our hotel</html>"
    server.answer = lambda handler, n: reply(handler, body=page, Content_Type="text/html")
    refused(server, tmp_path, r"sent 33 bytes \(text/html\).*login page")
    refused(server, tmp_path, "something else: sha256", size=None)


def test_other_bytes_of_the_right_length(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, body=BODY[::-1])
    refused(server, tmp_path, "something else: sha256")


def test_circle(server, tmp_path):
    server.answer = lambda handler, n: reply(handler, 302, b"", Location=server.url)
    refused(server, tmp_path, "circle")


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
        "import sys, pathlib, common, download\n"
        "path = pathlib.Path('input.txt')\n"
        "common.run(lambda: download.download([sys.argv[1]], path, pause=0.01))"
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
