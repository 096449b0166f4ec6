"""The router against small real servers in their own processes, which are killed, frozen, emptied and stuck."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from powertrain.serve.http_guard import HttpLimits, guarded_protocol
from powertrain.serve.replica_health import HealthConfig
from powertrain.serve.router import Router, RouterConfig, make_app
from powertrain.types import PowertrainError

CHAT = "/v1/chat/completions"
QUICK = HealthConfig(poll_interval_s=0.1, poll_timeout_s=0.5, max_timeouts=2, progress_timeout_s=1.0)


class FakeReplica:
    def __init__(self) -> None:
        script = Path(__file__).with_name("fake_replica.py")
        self.process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def control(self, **changes: Any) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.post(f"{self.url}/control", json=changes, timeout=5).json()
        return answer

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)


@pytest.fixture
def replicas() -> Iterator[list[FakeReplica]]:
    made = [FakeReplica(), FakeReplica()]
    yield made
    for replica in made:
        replica.kill()
        assert replica.process.stdout is not None
        replica.process.stdout.close()


@contextmanager
def serving(urls: list[str], **settings: Any) -> Iterator[str]:
    config = RouterConfig(health=QUICK, **settings)
    protocol = guarded_protocol(config.limits)
    app = make_app(Router(urls, config))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def router(replicas: list[FakeReplica]) -> Iterator[str]:
    with serving([r.url for r in replicas]) as url:
        yield url


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def ask(url: str, text: str = "hello", **body: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **body}
    return httpx.post(url + CHAT, json=body, timeout=30)


def states(url: str) -> dict[str, str]:
    replicas: dict[str, str] = httpx.get(url + "/health", timeout=10).json()["replicas"]
    return replicas


def events(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_answers_and_streams_pass_through_unchanged(replicas: list[FakeReplica], router: str) -> None:
    answer = httpx.post(router + CHAT, json={"max_tokens": 3}, headers={"authorization": "Bearer secret"}, timeout=30)
    assert answer.json()["text"] == "xxx"
    seen = [replica.control() for replica in replicas]
    assert [s["authorization"] for s in seen if s["requests"]] == ["Bearer secret"]
    with httpx.stream("POST", router + CHAT, json={"max_tokens": 3, "stream": True}, timeout=30) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        text = stream.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    assert [e["token"] for e in events(iter(text.splitlines())) if "token" in e] == [0, 1, 2]


def test_events_are_not_held_back(router: str) -> None:
    body = {"max_tokens": 10, "stream": True, "delay": 0.2}
    with httpx.stream("POST", router + CHAT, json=body, timeout=30) as stream:
        start = time.monotonic()
        first = next(events(stream.iter_lines()))
        assert first["token"] == 0
        # The whole answer takes 2 s: the first event did not wait for it.
        assert time.monotonic() - start < 1.5


def test_models_are_merged(replicas: list[FakeReplica], router: str) -> None:
    ids = [model["id"] for model in httpx.get(router + "/v1/models", timeout=10).json()["data"]]
    assert sorted(ids) == sorted(["m", *(f"only-{replica.port}" for replica in replicas)])


def test_new_requests_survive_a_kill_and_broken_streams_say_so(replicas: list[FakeReplica], router: str) -> None:
    client = openai.OpenAI(base_url=f"{router}/v1", api_key="none", max_retries=0, timeout=30)
    is_streaming = threading.Barrier(7, timeout=30)

    def stream(number: int) -> str:
        messages: Any = [{"role": "user", "content": f"{number}"}]
        got = client.chat.completions.create(
            model="m", messages=messages, stream=True, max_tokens=60, extra_body={"delay": 0.05}
        )
        next(iter(got))
        is_streaming.wait()
        try:
            for _ in got:
                pass
        except openai.APIError as error:
            return error.message
        return "whole"

    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(stream, number) for number in range(6)]
        is_streaming.wait()
        replicas[0].kill()
        killed_at = time.monotonic()
        for number in range(20):
            answer = ask(router, f"new {number}", max_tokens=1)
            assert answer.status_code == 200
            assert answer.json()["port"] == replicas[1].port
        wait_for(lambda: states(router)[replicas[0].url] != "ok", 2.0)
        assert time.monotonic() - killed_at < 10
        outcomes = sorted(future.result(30) for future in streams)
    client.close()
    assert outcomes == ["the replica broke off"] * 3 + ["whole"] * 3
    assert states(router)[replicas[1].url] == "ok"


def test_a_frozen_replica_is_out_and_its_streams_end(replicas: list[FakeReplica], router: str) -> None:
    body = {"max_tokens": 1000, "stream": True, "delay": 0.05}
    with httpx.stream("POST", router + CHAT, json=body, timeout=30) as stream:
        got = events(stream.iter_lines())
        port = next(got)["port"]
        victim = next(replica for replica in replicas if replica.port == port)
        os.kill(victim.process.pid, signal.SIGSTOP)
        last = None
        for last in got:  # noqa: B007
            pass
    assert last is not None
    assert last["error"]["type"] == "replica_lost"
    assert states(router)[victim.url] == "no answer"
    os.kill(victim.process.pid, signal.SIGCONT)
    wait_for(lambda: states(router)[victim.url] == "ok")


def test_health_is_progress_and_not_a_ping(replicas: list[FakeReplica], router: str) -> None:
    for replica in replicas:
        replica.control(is_stuck=True)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, router, max_tokens=2)
        wait_for(lambda: any("no token moves" in reason for reason in states(router).values()))
        stuck = next(r for r in replicas if "no token moves" in states(router)[r.url])
        assert httpx.get(stuck.url + "/health", timeout=5).status_code == 200
        other = next(r for r in replicas if r is not stuck)
        other.control(is_stuck=False)
        # Nothing had been sent to the client yet, so the other replica takes over.
        assert answer.result(30).json()["port"] == other.port
    stuck.control(is_stuck=False)
    wait_for(lambda: states(router)[stuck.url] == "ok")


def test_slow_is_not_stuck(replicas: list[FakeReplica], router: str) -> None:
    """Tokens that come slowly but come, for longer than the progress timeout."""
    assert ask(router, max_tokens=8, delay=0.4).status_code == 200
    assert set(states(router).values()) == {"ok"}


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_client_that_leaves_is_told_to_the_replica(
    replicas: list[FakeReplica], router: str, is_streaming: bool
) -> None:
    body = {"max_tokens": 500, "delay": 0.05, "stream": is_streaming}

    def total(field: str) -> int:
        return sum(replica.control()[field] for replica in replicas)

    if is_streaming:
        with httpx.stream("POST", router + CHAT, json=body, timeout=30) as stream:
            next(stream.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(router + CHAT, json=body, timeout=0.5)
    wait_for(lambda: total("abandoned") == 1)
    assert total("active") == 0
    page = httpx.get(router + "/metrics", timeout=10).text
    assert 'powertrain_router_answers_total{outcome="client_gone"} 1.0' in page


def test_a_busy_or_draining_replica_hands_over(replicas: list[FakeReplica], router: str) -> None:
    replicas[0].control(answer=503)
    assert {ask(router, str(i)).status_code for i in range(6)} == {200}
    replicas[1].control(answer=503)
    answer = ask(router)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "7"
    replicas[0].control(health=503)
    wait_for(lambda: "503" in states(router)[replicas[0].url])
    assert httpx.get(router + "/health", timeout=5).status_code == 200
    replicas[1].control(health=503)
    wait_for(lambda: httpx.get(router + "/health", timeout=5).status_code == 503)
    assert ask(router).status_code == 503
    assert httpx.get(router + "/live", timeout=5).status_code == 200


def test_a_request_that_kills_replicas_reaches_only_two() -> None:
    made = [FakeReplica() for _ in range(3)]
    try:
        with serving([r.url for r in made]) as url:
            for replica in made:
                replica.control(is_stuck=True)
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(ask, url, "poison", max_tokens=1)
                for _ in range(2):
                    wait_for(lambda: any(r.process.poll() is None and r.control()["active"] for r in made))
                    next(r for r in made if r.process.poll() is None and r.control()["active"]).kill()
                assert answer.result(30).status_code == 502
            alive = [r for r in made if r.process.poll() is None]
            assert len(alive) == 1
            assert alive[0].control()["requests"] == 0
    finally:
        for replica in made:
            replica.kill()
            assert replica.process.stdout is not None
            replica.process.stdout.close()


def test_shared_prefixes_stay_balanced_over_http(replicas: list[FakeReplica], router: str) -> None:
    """Longest-prefix routing would send all of these to one replica."""
    system = {"role": "system", "content": "be brief " * 100}
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"messages": [system, {"role": "user", "content": f"{i} " * 60}], "delay": 0.01} for i in range(60)]
        answers = list(pool.map(lambda body: httpx.post(router + CHAT, json=body, timeout=30), bodies))
    assert all(answer.status_code == 200 for answer in answers)
    counts = [replica.control()["requests"] for replica in replicas]
    assert sum(counts) == 60
    assert max(counts) / 30 <= 1.25


def test_bad_requests_reach_a_replica_or_are_refused_here(replicas: list[FakeReplica]) -> None:
    limits = HttpLimits(
        max_header_count=20, max_header_bytes=4096, max_body_bytes=10_000, header_timeout_s=5, body_timeout_s=5
    )
    with serving([r.url for r in replicas], limits=limits) as url:
        assert httpx.post(url + CHAT, content=b"x" * 10_001, timeout=5).status_code == 413
        assert httpx.get(url + "/v1/models", headers={"x": "y" * 8192}, timeout=5).status_code == 431
        missing = httpx.get(url + "/nowhere", timeout=5)
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found")
        assert httpx.get(url + CHAT, timeout=5).status_code == 405
        deep = b'{"messages": ' + b"[" * 4000 + b"]" * 4000 + b"}"
        assert httpx.post(url + CHAT, content=deep, timeout=5).status_code in (200, 500)
        assert ask(url).status_code == 200


def test_too_many_at_once_are_refused_at_once(replicas: list[FakeReplica]) -> None:
    with serving([r.url for r in replicas], max_active_requests=2) as url:
        with ThreadPoolExecutor(2) as pool:
            slow = [pool.submit(ask, url, max_tokens=4, delay=0.5) for _ in range(2)]
            wait_for(lambda: sum(replica.control()["active"] for replica in replicas) == 2)
            refused = ask(url)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert all(future.result(30).status_code == 200 for future in slow)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_a_replica_must_be_an_address(url: str) -> None:
    with pytest.raises(PowertrainError, match="give a full address"):
        Router([url])
