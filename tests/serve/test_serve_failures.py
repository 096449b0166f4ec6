"""What may break while serving: the engine, the client's connection, the queue's limit, the server's own end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_worker
import httpx
import pytest
from serving import ServerProcess, Start, events, is_running, metric, wait_until

KEYS = ("first-key", "second-key")
LONG = {"prompt": [70], "max_tokens": 50_000, "stream": True}
SHORT = {"prompt": [70], "max_tokens": 3}


def post(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/completions", json=body)


def open_stream(server: ServerProcess, **body: Any) -> tuple[socket.socket, bytes]:
    """A request on a raw socket, and what has come once its first event is there."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(content) + content)
    received = b""
    while body.get("stream") and b"data: " not in received:
        received += connection.recv(65536)
    return connection, received


def read_to_end(connection: socket.socket) -> str:
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        piece = connection.recv(65536)
        if not piece:
            break
        received += piece
    return received.decode()


def test_engine_process_killed(start: Start) -> None:
    """Every stream ends with an error event, /health says so, new work gets 503, /live stays."""
    server = start(step_ms=10).wait_ready()
    with server.client() as client:
        streams = [open_stream(server, **LONG)[0] for _ in range(3)]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, client, **{**LONG, "stream": False})
            wait_until(lambda: metric(client, "num_requests_running") == 4)
            os.kill(server.engine_pid, signal.SIGKILL)
            for stream in streams:
                text = read_to_end(stream)
                assert '"code":"engine_dead"' in text
                assert text.rstrip().endswith("data: [DONE]\n\n\r\n0") or "data: [DONE]" in text
                stream.close()
            answer = waiting.result(10)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
        health = client.get("/health")
        assert health.status_code == 503
        assert health.headers["retry-after"]
        assert client.get("/live").status_code == 200
        assert post(client, **SHORT).status_code == 503
        assert metric(client, "num_requests_running") == 0
        assert metric(client, "kv_cache_usage_perc") == 0
    assert server.stop() == 0


def test_step_raises(start: Start) -> None:
    """An exception of the whole engine: the request learns why, the process is gone, health is 503."""
    server = start().wait_ready()
    with server.client() as client:
        answer = post(client, prompt=[fake_worker.CRASH], max_tokens=3)
        assert answer.status_code == 503
        assert "the step failed" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 503
    wait_until(lambda: any("the step failed" in line for line in server.stderr), what="the log has the traceback")


def test_faults_of_one_request_stay_with_it(start: Start) -> None:
    server = start().wait_ready()
    with server.client() as client:
        for prompt, text in ((fake_worker.FAULT, "NaN"), (fake_worker.BAD_ADD, "cannot take")):
            answer = post(client, prompt=[prompt], max_tokens=3)
            assert answer.status_code == 500
            assert text in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "server_error"
        batch = post(client, prompt=[[70], [fake_worker.FAULT]], max_tokens=20_000, stream=True)
        assert batch.status_code in (200, 500)
        wait_until(lambda: metric(client, "num_requests_running") == 0, what="the rest of the batch is aborted")
        assert post(client, **SHORT).status_code == 200
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_what_only_the_engine_can_refuse_is_a_400(start: Start, stream: bool) -> None:
    server = start().wait_ready()
    with server.client() as client:
        answer = post(client, prompt=[[70], [fake_worker.TOO_LARGE]], max_tokens=50_000, stream=stream)
        if answer.status_code == 200:  # the first prompt's token was out already: then an event tells
            assert stream
            error = events(answer.text)[-1]["error"]
        else:
            assert answer.status_code == 400
            error = answer.json()["error"]
        assert "KV cache" in error["message"]
        assert error["param"] == "prompt"
        wait_until(lambda: metric(client, "num_requests_running") == 0, what="the rest of the batch is aborted")


@pytest.mark.parametrize("prompt", [fake_worker.HANG, fake_worker.STARVE])
def test_health_means_progress(start: Start, prompt: int) -> None:
    """A step that never returns, and an engine that beats its heart while its request waits for ever."""
    server = start(progress_timeout_s=1.5).wait_ready()
    with server.client() as client:
        assert client.get("/health").status_code == 200
        connection, _ = open_stream(server, prompt=[prompt], max_tokens=3)
        wait_until(lambda: client.get("/health").status_code == 503, what="health notices")
        assert client.get("/health").json()["error"]["code"] == "stalled"
        assert client.get("/live").status_code == 200
        connection.close()
        if prompt == fake_worker.STARVE:  # with its request aborted, the engine is as good as before
            wait_until(lambda: client.get("/health").status_code == 200, what="health recovers")
    server.stop()
    assert not is_running(server.process.pid)


def test_stopped_engine_process_is_noticed_while_idle(start: Start) -> None:
    server = start(progress_timeout_s=1.5).wait_ready()
    with server.client() as client:
        pid = server.engine_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: client.get("/health").status_code == 503, what="health notices")
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: client.get("/health").status_code == 200, what="health recovers")


def test_overload_answers_at_once(start: Start) -> None:
    """4 run, 4 queue; the ninth is refused with Retry-After while the others go on."""
    server = start(step_ms=10, max_num_seqs=4, max_queued_requests=4).wait_ready()
    with server.client() as client:
        streams = [open_stream(server, **LONG)[0] for _ in range(4)]
        queued = [open_stream(server, **{**LONG, "stream": False})[0] for _ in range(4)]
        wait_until(lambda: metric(client, "num_requests_waiting") == 4)
        for body in (SHORT, {**SHORT, "stream": True}):
            answer = post(client, **body)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "queue_full"
        assert metric(client, "admission_rejections_total") == 2
        assert client.get("/health").status_code == 200
        for connection in (*streams, *queued):
            connection.close()
        wait_until(lambda: metric(client, "num_requests_running") == 0, what="all are aborted")
        assert post(client, **SHORT).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_aborts_in_every_state(start: Start, stream: bool) -> None:
    server = start(step_ms=20, max_num_seqs=2).wait_ready()
    with server.client() as client:
        running = [open_stream(server, **LONG)[0] for _ in range(2)]
        waiting = open_stream(server, **{**LONG, "stream": False})[0]
        wait_until(lambda: metric(client, "num_requests_waiting") == 1)
        waiting.close()
        wait_until(lambda: metric(client, "num_requests_waiting") == 0, what="the queued one is gone")
        running[0].close()
        wait_until(lambda: metric(client, "num_requests_running") == 1, what="the running one is gone")
        other = open_stream(server, **{**LONG, "stream": stream, "n": 1})[0]
        wait_until(lambda: metric(client, "num_requests_running") == 2)
        other.close()
        wait_until(lambda: metric(client, "num_requests_running") == 1)
        running[1].close()
        wait_until(lambda: metric(client, "kv_cache_usage_perc") == 0, what="all blocks free")


def test_disconnect_frees_blocks_of_the_real_engine(server: ServerProcess, client: httpx.Client) -> None:
    before = post(client, prompt="Once upon a time", max_tokens=6, temperature=0).json()["choices"][0]["text"]
    connections = [
        open_stream(server, prompt=[9, i], max_tokens=500, ignore_eos=True, stream=i % 2 == 0, n=2)[0] for i in range(8)
    ]
    for connection in connections:
        connection.close()
    wait_until(lambda: metric(client, "kv_cache_usage_perc") == 0, 20, "all blocks free")
    wait_until(lambda: metric(client, "num_requests_running") + metric(client, "num_requests_waiting") == 0)
    after = post(client, prompt="Once upon a time", max_tokens=6, temperature=0).json()["choices"][0]["text"]
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_finishes_what_was_admitted(start: Start, number: int) -> None:
    server = start(step_ms=10).wait_ready()
    engine = server.engine_pid
    with server.client() as client:
        connection, received = open_stream(server, prompt=[70], max_tokens=150, stream=True)
        server.signal(number)
        wait_until(lambda: client.get("/health").status_code == 503, what="health says draining")
        assert client.get("/health").json()["error"]["code"] == "draining"
        assert client.get("/live").status_code == 200
        refused = post(client, **SHORT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        rest = received.decode() + read_to_end(connection)
    assert server.wait() == 0
    assert rest.count('"finish_reason":"length"') == 1
    assert "[DONE]" in rest
    assert "error" not in rest
    assert not is_running(engine)


def test_drain_gives_up_after_its_timeout(start: Start) -> None:
    server = start(step_ms=10, shutdown_timeout_s=0.5).wait_ready()
    connection, _ = open_stream(server, **LONG)
    server.signal(signal.SIGTERM)
    text = read_to_end(connection)
    assert "the server has shut down" in text
    assert "[DONE]" in text
    assert server.wait() == 0


def test_second_signal_leaves_at_once(start: Start) -> None:
    server = start(step_ms=10).wait_ready()
    engine = server.engine_pid
    connection, _ = open_stream(server, **LONG)
    with server.client() as client:
        server.signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health").status_code == 503)
    server.signal(signal.SIGTERM)
    assert server.wait(5) == 128 + signal.SIGTERM
    wait_until(lambda: not is_running(engine), what="the engine is gone")
    connection.close()


def test_engine_leaves_with_a_killed_server(start: Start) -> None:
    server = start(step_ms=10).wait_ready()
    engine = server.engine_pid
    server.kill()
    wait_until(lambda: not is_running(engine), what="the orphan is gone")


def test_busy_port_is_told_before_the_engine_loads(start: Start, fake_model_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = start(port=port)
        assert server.wait() == 1
        server.stop()
    message = "".join(server.stderr)
    assert message.startswith(f"error: port {port} ")
    assert "--port" in message
    assert message.count("\n") == 1


def test_model_that_does_not_load(start: Start, tmp_path: Path) -> None:
    from model_builders import write_tiny_tokenizer

    write_tiny_tokenizer(tmp_path)
    (tmp_path / "refuse_to_load").touch()
    server = start(model=tmp_path)
    assert server.wait() == 1
    server.stop()
    assert "error: the weights are absent; pull the model again" in "".join(server.stderr)


def test_signal_while_the_engine_loads(start: Start, tmp_path: Path) -> None:
    from model_builders import write_tiny_tokenizer

    write_tiny_tokenizer(tmp_path)
    (tmp_path / "load_slowly").touch()
    server = start(model=tmp_path)
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    wait_until(lambda: bool(children.read_text()), what="the engine process is there")
    engine = server.engine_pid
    server.signal(signal.SIGTERM)
    assert server.wait(10) == 0
    assert not is_running(engine)


def test_start_line_and_port_zero(start: Start) -> None:
    server = start().wait_ready()
    assert server.port > 0
    assert "serving fake at http://127.0.0.1:" in server.start_line
    assert "native kernels: none (this engine is fake)" in server.start_line
    assert "on fake" in server.start_line


def test_keys_open_what_they_should(start: Start) -> None:
    server = start(api_keys=KEYS).wait_ready()
    routes = [
        *[("GET", path, None) for path in ("/v1/models", "/v1/models/fake", "/version", "/openapi.json", "/nowhere")],
        ("POST", "/v1/completions", SHORT),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
        ("POST", "/tokenize", {"prompt": "x"}),
        ("POST", "/detokenize", {"tokens": [70]}),
    ]
    wrong = [None, "", "Bearer", "Bearer wrong", "Bearer first-ke", "Bearer first-keyy", "Basic first-key"]
    with server.client() as client:
        for method, path, body in routes:
            for value in [*wrong, "Bearer \u00e9"]:
                headers = {} if value is None else {"authorization": value.encode("latin-1")}
                answer = client.request(method, path, json=body, headers=headers)
                assert answer.status_code == 401, (method, path, value)
                assert answer.json()["error"]["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
            for key in KEYS:
                answer = client.request(method, path, json=body, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == (404 if path == "/nowhere" else 200), (method, path, answer.text)
        for path in ("/health", "/live", "/metrics"):
            assert client.get(path).status_code == 200
        assert not any(key in client.get("/metrics").text for key in KEYS)
    server.stop()
    assert not any(key in line for line in server.stderr for key in KEYS)


def test_streams_interleave_while_a_long_prompt_is_tokenized(start: Start) -> None:
    """Half a million characters take the tokenizer a second; a running stream must not stand still for it."""
    server = start(step_ms=5).wait_ready()
    with server.client() as client:
        thread = threading.Thread(target=post, args=(client,), kwargs={"prompt": "word " * 80_000, "max_tokens": 1})
        thread.start()
        for _ in range(10):
            assert events(post(client, **{**SHORT, "stream": True}).text)
            time.sleep(0.02)
        thread.join(20)
        assert not thread.is_alive()


def test_web_process_imports_no_torch() -> None:
    code = (
        "import sys, powertrain.serve.run, powertrain.serve.app, powertrain.serve.bridge\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.strip() == "[]"


def test_running_web_process_has_no_torch_mapped(server: ServerProcess) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{server.engine_pid}/maps").read_text()
