"""The HTTP layer over raw sockets: sizes, deadlines, lengths. Each refusal is answered, closed, and hurts nobody."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from serving import ServerProcess, Start, metric, wait_until

BODY = json.dumps({"prompt": [70, 71], "max_tokens": 2}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def guarded(fake_model_dir: object) -> Iterator[ServerProcess]:
    """Short deadlines and small limits, one server for the module."""
    limits = {"header_timeout_s": 0.4, "body_timeout_s": 0.6, "max_body_bytes": 100_000, "max_header_bytes": 8192}
    process = ServerProcess(fake_model_dir, {"seed": 1}, limits, fake=True)  # type: ignore[arg-type]
    try:
        yield process.wait_ready()
    finally:
        process.stop()


@pytest.fixture(autouse=True)
def still_good(guarded: ServerProcess) -> Iterator[None]:
    yield
    with guarded.client() as client:
        assert client.post("/v1/completions", content=BODY, headers={"content-type": "application/json"}).is_success


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def exchange(server: ServerProcess, *pieces: bytes) -> tuple[int, bytes]:
    """Send, then read until the server closes."""
    with connect(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 "), received
    return int(received.split()[1]), received


def assert_refused(server: ServerProcess, status: int, *pieces: bytes) -> None:
    got, received = exchange(server, *pieces)
    assert got == status, received
    assert b"connection: close" in received.lower()
    error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_too_many_headers(guarded: ServerProcess) -> None:
    many = b"".join(b"X-%d: y\r\n" % i for i in range(101))
    assert_refused(guarded, 431, HEAD + many + b"\r\n")


def test_one_header_too_large(guarded: ServerProcess) -> None:
    assert_refused(guarded, 431, HEAD + b"X: " + b"y" * 9000 + b"\r\n\r\n")
    assert_refused(guarded, 431, HEAD + b"X: " + b"y" * 3_000_000)
    assert_refused(guarded, 431, b"GET /" + b"y" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")


def test_body_above_limit_by_length(guarded: ServerProcess) -> None:
    assert_refused(guarded, 413, HEAD + b"Content-Length: 100001\r\n\r\n")
    assert_refused(guarded, 413, HEAD + b"Content-Length: 99999999999999999\r\n\r\n" + b" " * 200_000)


def test_body_above_limit_in_chunks(guarded: ServerProcess) -> None:
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    assert_refused(guarded, 413, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk * 11)


def test_millions_of_tiny_chunks(guarded: ServerProcess) -> None:
    assert_refused(guarded, 400, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 5000)


def test_large_upload_gets_its_answer(guarded: ServerProcess) -> None:
    """A client that is still sending must be able to read the refusal."""
    with guarded.client() as client:
        answer = client.post("/v1/completions", json={"prompt": "x" * 1_000_000})
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "lengths",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\ncontent-length: 5\r\n",
        b"Content-Length: 5, 6\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: five\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: chunked, gzip\r\n",
        b"Transfer-Encoding : chunked\r\n",
    ],
)
def test_conflicting_lengths(guarded: ServerProcess, lengths: bytes) -> None:
    status, received = exchange(
        guarded, HEAD + lengths + b"\r\n" + b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    assert status in (400, 501)
    assert received.count(b"HTTP/1.1") == 1, "a smuggled request was answered"


@pytest.mark.parametrize(
    "head", [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"garbage\r\n\r\n", b"\r\n" * 5000]
)
def test_garbage(guarded: ServerProcess, head: bytes) -> None:
    with connect(guarded) as connection:
        connection.sendall(head)
        received = read_all(connection)
    assert received == b"" or received.split()[1] in (b"400", b"408", b"431", b"505")


def test_bad_chunk_size(guarded: ServerProcess) -> None:
    assert_refused(guarded, 400, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n")


def test_slow_headers(guarded: ServerProcess) -> None:
    started = time.monotonic()
    assert_refused(guarded, 408, HEAD)
    assert time.monotonic() - started < 8


def test_silent_connection_is_closed(guarded: ServerProcess) -> None:
    with connect(guarded) as connection:
        assert read_all(connection) == b""


def test_dripping_headers(guarded: ServerProcess) -> None:
    """A byte now and then does not reset the deadline."""
    with connect(guarded) as connection:
        connection.settimeout(0.05)
        received, deadline = None, time.monotonic() + 8
        while received is None and time.monotonic() < deadline:
            connection.send(b"X")
            with contextlib.suppress(TimeoutError):
                received = connection.recv(65536)
        assert received is not None
        assert b" 408 " in received


def test_slow_body(guarded: ServerProcess) -> None:
    assert_refused(guarded, 408, HEAD + b"Content-Length: 40\r\n\r\n", b"{")


def test_two_requests_on_one_connection(guarded: ServerProcess) -> None:
    request = HEAD + b"Content-Length: %d\r\n" % len(BODY)
    with connect(guarded) as connection:
        connection.sendall(request + b"\r\n" + BODY)
        assert b"200 OK" in connection.recv(65536)
        connection.sendall(request + b"Connection: close\r\n\r\n" + BODY)
        assert b"200 OK" in read_all(connection)


def test_slow_clients_do_not_hold_up_others(guarded: ServerProcess) -> None:
    slow = [connect(guarded) for _ in range(50)]
    try:
        for connection in slow:
            connection.sendall(HEAD)
        with guarded.client() as client:
            assert client.get("/health").status_code == 200
    finally:
        for connection in slow:
            connection.close()


def test_client_that_never_reads(start: Start) -> None:
    """Its buffers fill, the deadline passes, its connection is reset and its sequences are aborted."""
    server = start(step_ms=0, body_timeout_s=0.5).wait_ready()
    body = json.dumps({"prompt": [70], "max_tokens": 90_000, "n": 4, "stream": True}).encode()
    with socket.socket() as connection, server.client() as client:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: metric(client, "num_requests_running") == 4, what="the stream runs")
        wait_until(lambda: metric(client, "num_requests_running") == 0, 20, "the stream was given up")
        wait_until(lambda: 'finished_reason="abort"' in client.get("/metrics").text, 20, "the connection was reset")
        assert metric(client, "request_success_total") == 4
        answer: httpx.Response = client.post("/v1/completions", json={"prompt": [70], "max_tokens": 2})
        assert answer.is_success
