"""The load generator, calibrated on a server whose times and faults are known."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from powertrain.measure.loadgen import Load, bench_serve, quantiles, text_table
from powertrain.types import PowertrainError

TOKEN_S = 0.02


class KnownServer:
    """First token after 5 token times, then one each; every `fail_every`-th request fails, in turn in three ways."""

    def __init__(self) -> None:
        self.fail_every = 0
        self.key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.num_active = self.most_active = 0
        self._count = itertools.count(1)
        routes = [Route("/v1/models", self.models), Route("/v1/completions", self.complete, methods=["POST"])]
        self.server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        deadline = time.monotonic() + 20
        while not self.server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    async def models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({}, 401)
        return JSONResponse({"data": [{"id": "known"}]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        number = next(self._count)
        fault = (number // self.fail_every) % 3 if self.fail_every and number % self.fail_every == 0 else None
        if fault == 0:
            return JSONResponse({"error": {}}, 503)
        return StreamingResponse(self.events(body, fault), media_type="text/event-stream")

    async def events(self, body: dict[str, Any], fault: int | None) -> AsyncIterator[str]:
        self.num_active += 1
        self.most_active = max(self.most_active, self.num_active)
        try:
            await asyncio.sleep(4 * TOKEN_S)
            for number in range(body["max_tokens"]):
                await asyncio.sleep(TOKEN_S)
                yield f"data: {json.dumps({'choices': [{'text': 'x'}], 'usage': None})}\n\n"
                if fault == 1 and number == 1:
                    yield f"data: {json.dumps({'error': {'message': 'broke'}})}\n\n"
                    return
                if fault == 2 and number == 1:
                    raise RuntimeError("breaks the connection")
            words = len(body["prompt"].split())
            usage = {"completion_tokens": body["max_tokens"], "prompt_tokens": words}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        finally:
            self.num_active -= 1

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture
def server() -> Iterator[KnownServer]:
    made = KnownServer()
    yield made
    made.close()


def test_a_closed_loop_keeps_its_concurrency_and_finds_the_known_times(server: KnownServer) -> None:
    load = Load(url=server.url, concurrency=3, num_requests=9, prompt_words=7, max_tokens=5)
    progress: list[tuple[str, float, float | None]] = []
    made = bench_serve(load, git="abc", progress=lambda *given: progress.append(given))
    row = made["results"][0]
    assert (made["kind"], made["model"], made["git"]["commit"]) == ("serve", "known", "abc")
    assert (row["completed"], row["failed"], row["cancelled"]) == (9, 0, 0)
    assert server.most_active == 3
    assert row["prompt_tokens"] == 63
    # A clock can only be late: the known times are lower bounds, and the mean is of the same kind as them.
    assert row["ttft_ms"]["mean"] >= 5 * TOKEN_S * 1000
    assert row["tpot_ms"]["mean"] >= 0.9 * TOKEN_S * 1000
    assert row["e2e_ms"]["mean"] >= row["ttft_ms"]["mean"] + 3.9 * TOKEN_S * 1000
    assert progress[-1] == ("requests", 9, 9)
    assert all(body["ignore_eos"] and body["stream"] for body in server.bodies)
    assert "9 completed, 0 failed" in text_table(made)
    json.dumps(made, allow_nan=False)


def test_an_open_loop_does_not_wait_for_answers(server: KnownServer) -> None:
    load = Load(url=server.url, rate=100.0, num_requests=20, prompt_words=3, max_tokens=10)
    row = bench_serve(load)["results"][0]
    assert row["completed"] == 20
    # 20 requests leave in about 0.2 s and each takes 0.3 s: most must have been there at once.
    assert server.most_active >= 8


def test_failures_are_counted_apart(server: KnownServer) -> None:
    server.fail_every = 2
    row = bench_serve(Load(url=server.url, concurrency=1, num_requests=12, prompt_words=2, max_tokens=4))["results"][0]
    assert (row["completed"], row["failed"]) == (6, 6)
    assert row["failures"]["status 503"] == 2
    assert row["failures"]["error event"] == 2
    assert row["failures"]["RemoteProtocolError"] == 2


def test_cancelled_requests_close_early_and_stay_out_of_the_latencies(server: KnownServer) -> None:
    load = Load(url=server.url, concurrency=2, num_requests=6, prompt_words=2, max_tokens=400, cancel_share=1.0)
    row = bench_serve(load)["results"][0]
    assert (row["completed"], row["cancelled"], row["failed"]) == (0, 6, 0)
    assert row["ttft_ms"] is None
    deadline = time.monotonic() + 10
    while server.num_active and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.num_active == 0


def test_the_same_seed_sends_the_same_prompts(server: KnownServer) -> None:
    load = Load(url=server.url, concurrency=1, num_requests=3, prompt_words=5, max_tokens=2, seed=4)
    bench_serve(load)
    bench_serve(load)
    prompts = [body["prompt"] for body in server.bodies]
    assert prompts[:3] == prompts[3:]
    assert len(set(prompts)) == 3


def test_a_duration_ends_the_run(server: KnownServer) -> None:
    row = bench_serve(Load(url=server.url, concurrency=2, duration_s=0.5, prompt_words=2, max_tokens=2))["results"][0]
    assert row["completed"] >= 2
    assert row["failed"] == 0


def test_the_key_is_sent_and_never_recorded(server: KnownServer) -> None:
    server.key = "secret"
    with pytest.raises(PowertrainError, match="answers 401; give --api-key"):
        bench_serve(Load(url=server.url, concurrency=1, num_requests=1, max_tokens=1))
    made = bench_serve(Load(url=server.url, concurrency=1, num_requests=1, max_tokens=1, api_key="secret"))
    assert made["results"][0]["completed"] == 1
    assert "secret" not in json.dumps(made)


def test_quantiles_are_nearest_rank() -> None:
    assert quantiles([]) is None
    assert quantiles([0.001]) == {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0, "max": 1.0}
    found = quantiles([i / 1000 for i in range(1, 101)])
    assert found is not None
    assert [round(found[key]) for key in ("p50", "p90", "p99", "max")] == [50, 90, 99, 100]


@pytest.mark.parametrize(
    "settings",
    [{}, {"concurrency": 1, "rate": 1.0}, {"concurrency": 0}, {"rate": 0.0}, {"concurrency": 1, "max_tokens": 0}],
)
def test_bad_loads_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PowertrainError):
        Load(url="http://x", **settings)
