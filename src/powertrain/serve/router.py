"""`powertrain route`: several servers behind one address. Its own process: no torch, no tokenizer, no model.

Requests go where `routing` says; answers pass through as they come, event by event. A request is tried again on another
replica only while its client has not seen a byte; a stream that breaks later ends with an error event. All replicas are
taken to serve the same model.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from powertrain import __version__
from powertrain.config import ServerConfig
from powertrain.serve.http_guard import HttpLimits, guarded_protocol
from powertrain.serve.replica_health import HealthConfig, ReplicaMonitor, mark
from powertrain.serve.routing import Decision, PromptWork, Replica, RoutingConfig, RoutingPolicy, prompt_work
from powertrain.types import PowertrainError

_PASSED_PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
# RFC 9110 section 7.6.1, and those that describe our own connections.
_HOP_HEADERS = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
    *(b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length", b"expect", b"accept-encoding"),
}
_MAX_EVENT_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Limits of the router. `max_tries` bounds how many replicas one request may reach, so that none can kill all."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_active_requests: int = 1024
    max_tries: int = 2
    send_timeout_s: float = 60.0
    response_timeout_s: float = 600.0
    shutdown_timeout_s: float = 30.0
    limits: HttpLimits = field(default_factory=lambda: HttpLimits.from_config(ServerConfig()))
    health: HealthConfig = field(default_factory=HealthConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)


class RouterMetrics:
    """What the router did, on its own /metrics. No label comes from a client."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, label: str) -> Counter:
            return Counter(f"powertrain_router_{name}", text, [label], registry=self.registry)

        self.requests = counter("requests", "Requests sent to a replica.", "replica")
        self.answers = counter("answers", "Answers to clients by what became of them.", "outcome")
        self.retries = counter("retries", "Requests sent again, before their first byte.", "reason")
        self.prompt_chunks = counter("prompt_chunks", "Prompt chunks routed.", "replica")
        self.cached_chunks = counter("predicted_cached_chunks", "Prompt chunks expected in the cache.", "replica")
        self._is_healthy = self._gauge("replica_healthy", "1 while the replica is in rotation.")
        self._active = self._gauge("active_requests", "Requests in flight.")
        self._replicas = replicas

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"powertrain_router_{name}", text, ["replica"], registry=self.registry)

    def render(self) -> bytes:
        """The Prometheus page."""
        for replica in self._replicas:
            self._is_healthy.labels(replica.url).set(replica.is_healthy)
            self._active.labels(replica.url).set(replica.num_active)
        return generate_latest(self.registry)


class _ReplicaBusyError(Exception):
    """The replica answered 503 before anything was sent on: another may have room."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response


class _ClientGoneError(Exception):
    """The client has closed its side, or reads nothing."""


@dataclass(slots=True)
class _Exchange:
    """One client's request on its way through: what to send on, and what was sent back."""

    scope: Scope
    send: Send
    body: bytes
    work: PromptWork
    has_started: bool = False
    is_event_stream: bool = False
    held: bytes = b""


class Router:
    """Holds the policy, the connections to replicas, and the requests in flight."""

    def __init__(self, replicas: Sequence[str], config: RouterConfig | None = None) -> None:
        self.config = config or RouterConfig()
        self.policy = RoutingPolicy([_checked_url(url) for url in replicas], self.config.routing)
        self.metrics = RouterMetrics(self.policy.replicas)
        self._num_active = 0
        # What to cancel when a replica is lost: the streams that wait for it would wait for ever.
        self._waiting: dict[str, set[anyio.CancelScope]] = {r.url: set() for r in self.policy.replicas}
        # Idle connections are dropped before uvicorn's own 5 s, so that none is reused as it is being closed.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        timeout = httpx.Timeout(self.config.response_timeout_s, connect=2.0)
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)

    @asynccontextmanager
    async def run(self, _app: Starlette) -> AsyncIterator[None]:
        """Lifespan: look at every replica once, then keep looking until the end."""
        monitors = [
            ReplicaMonitor(r, self._client, self.config.health, lambda r=r: self._give_up(r))  # type: ignore[misc]
            for r in self.policy.replicas
        ]
        await asyncio.gather(*(monitor.poll() for monitor in monitors))
        tasks = [asyncio.create_task(monitor.run()) for monitor in monitors]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.aclose()

    def _give_up(self, replica: Replica) -> None:
        for scope in self._waiting[replica.url]:
            scope.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: answer one proxied request."""
        if self._num_active >= self.config.max_active_requests:
            await _error(503, "the router is full; try again", "overloaded", retry_after=1)(scope, receive, send)
            return
        self._num_active += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._num_active -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = "client_gone"
        with suppress(_ClientGoneError):
            body = await _read_body(receive)
            exchange = _Exchange(scope, send, body, self._work(body))
            async with anyio.create_task_group() as group:
                group.start_soon(_cancel_when_gone, receive, group.cancel_scope)
                with suppress(_ClientGoneError):
                    outcome = await self._send_on(exchange)
                group.cancel_scope.cancel()
        self.metrics.answers.labels(outcome).inc()

    def _work(self, body: bytes) -> PromptWork:
        try:
            return prompt_work(json.loads(body), self.config.routing) if body else PromptWork()
        except (ValueError, RecursionError):
            return PromptWork()  # the replica will say what is wrong with it

    async def _send_on(self, exchange: _Exchange) -> str:
        """Try replicas until one has answered; returns the outcome for the metrics."""
        tried: set[str] = set()
        busy: httpx.Response | None = None
        num_broken = 0
        while decision := self.policy.choose(exchange.work, time.monotonic(), tried):
            tried.add(decision.replica.url)
            self._count(decision)
            try:
                await self._try(exchange, decision)
                return "ok"
            except _ReplicaBusyError as answer:
                busy, reason = answer.response, "busy"
            except httpx.ConnectError as error:
                mark(decision.replica, False, f"unreachable ({type(error).__name__})")
                reason = "unreachable"
            except httpx.HTTPError as error:
                reason = "broken"
                num_broken += 1
                if exchange.has_started:
                    await self._end_broken(exchange, error)
                    return "broken_stream"
                if num_broken >= self.config.max_tries:
                    break
            self.metrics.retries.labels(reason).inc()
        if busy is not None:
            await self._start(exchange, busy)
            await self._pass(exchange, busy.content, more=False)
            return "busy"
        message = "the replica broke off" if num_broken else "no replica is healthy; see /health"
        await self._fail(exchange, 502 if num_broken else 503, message)
        return "broken" if num_broken else "no_replica"

    def _count(self, decision: Decision) -> None:
        url = decision.replica.url
        self.metrics.requests.labels(url).inc()
        self.metrics.prompt_chunks.labels(url).inc(decision.num_chunks)
        self.metrics.cached_chunks.labels(url).inc(decision.num_cached)

    async def _try(self, exchange: _Exchange, decision: Decision) -> None:
        """One replica: raises `httpx.HTTPError` if it breaks off, also when the health check gives it up."""
        self.policy.start(decision, exchange.work, time.monotonic())
        waiting = self._waiting[decision.replica.url]
        try:
            with anyio.CancelScope() as scope:
                waiting.add(scope)
                await self._relay(exchange, decision.replica)
            if scope.cancelled_caught:
                raise httpx.ReadError(f"replica given up: {decision.replica.reason}")
        finally:
            waiting.discard(scope)
            self.policy.finish(decision)

    async def _relay(self, exchange: _Exchange, replica: Replica) -> None:
        scope = exchange.scope
        query = scope["query_string"].decode("latin-1")
        url = replica.url + scope["path"] + (f"?{query}" if query else "")
        headers = [(k, v) for k, v in scope["headers"] if k not in _HOP_HEADERS]
        headers.append((b"accept-encoding", b"identity"))
        async with self._client.stream(scope["method"], url, headers=headers, content=exchange.body) as response:
            if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                await response.aread()
                raise _ReplicaBusyError(response)
            kind = response.headers.get("content-type", "")
            exchange.is_event_stream = kind.startswith("text/event-stream")
            # The head waits for the first bytes of the body: until then another replica can still take over.
            async for data in response.aiter_raw():
                if not exchange.has_started:
                    await self._start(exchange, response)
                await self._pass(exchange, data)
            if not exchange.has_started:
                await self._start(exchange, response)
            await self._pass(exchange, b"", more=False)

    async def _start(self, exchange: _Exchange, response: httpx.Response) -> None:
        headers = [
            (k.lower(), v) for k, v in response.headers.raw if k.lower() not in _HOP_HEADERS - {b"content-length"}
        ]
        exchange.has_started = True
        await self._emit(exchange, {"type": "http.response.start", "status": response.status_code, "headers": headers})

    async def _pass(self, exchange: _Exchange, data: bytes, *, more: bool = True) -> None:
        """Send bytes on; of an event stream only whole events, so that an error event can follow a break anywhere."""
        data = exchange.held + data
        exchange.held = b""
        if exchange.is_event_stream and more:
            end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0)
            end = end if end > 1 else 0
            if len(data) - end > _MAX_EVENT_BYTES:
                raise httpx.RemoteProtocolError("an event without end")
            data, exchange.held = data[:end], data[end:]
        if data or not more:
            await self._emit(exchange, {"type": "http.response.body", "body": data, "more_body": more})

    async def _end_broken(self, exchange: _Exchange, error: Exception) -> None:
        """A client that has read half an answer must not take it for a whole one."""
        if not exchange.is_event_stream:
            # The announced length stays short: uvicorn closes the connection and the client sees a broken body.
            raise _ClientGoneError from error
        event = {"error": {"message": "the replica broke off", "type": "replica_lost", "param": None, "code": 502}}
        exchange.held = b""
        body = b"data: " + json.dumps(event).encode() + b"\n\n"
        await self._emit(exchange, {"type": "http.response.body", "body": body, "more_body": False})

    async def _fail(self, exchange: _Exchange, status: int, message: str) -> None:
        response = _error(status, message, "no_replica", retry_after=1)
        await response(exchange.scope, _no_receive, exchange.send)

    async def _emit(self, exchange: _Exchange, message: dict[str, Any]) -> None:
        try:
            with anyio.fail_after(self.config.send_timeout_s):
                await exchange.send(message)
        except (TimeoutError, OSError) as error:
            raise _ClientGoneError from error

    async def health(self, _request: Request) -> Response:
        """200 while at least one replica is in rotation."""
        replicas = {r.url: r.reason for r in self.policy.replicas}
        is_up = any(r.is_healthy for r in self.policy.replicas)
        body = {"status": "ok" if is_up else "no healthy replica", "replicas": replicas}
        return JSONResponse(body, 200 if is_up else 503)

    async def show_metrics(self, _request: Request) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The models of all healthy replicas, once each."""
        path = request.url.path
        headers = {k: v for k, v in request.headers.items() if k == "authorization"}
        healthy = [r for r in self.policy.replicas if r.is_healthy]
        got = await asyncio.gather(
            *(self._client.get(r.url + path, headers=headers, timeout=5.0) for r in healthy), return_exceptions=True
        )
        answers = [answer for answer in got if isinstance(answer, httpx.Response)]
        good = [answer.json() for answer in answers if answer.status_code == httpx.codes.OK]
        if not good and not answers:
            return _error(503, "no replica is healthy; see /health", "no_replica", retry_after=1)
        if not good or path != "/v1/models":
            first = next((a for a in answers if a.status_code == httpx.codes.OK), answers[0])
            return Response(first.content, first.status_code, media_type="application/json")
        merged = {model["id"]: model for body in good for model in body["data"]}
        return JSONResponse({"object": "list", "data": list(merged.values())})


def make_app(router: Router) -> Starlette:
    """The router's routes: what is proxied, and its own pages."""

    async def live(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def version(_request: Request) -> Response:
        return JSONResponse({"version": __version__})

    own: list[tuple[str, Callable[[Request], Any]]] = [
        ("/health", router.health),
        ("/live", live),
        ("/version", version),
        ("/metrics", router.show_metrics),
        ("/v1/models", router.models),
        ("/v1/models/{model:path}", router.models),
    ]
    routes = [Route(path, endpoint) for path, endpoint in own]
    routes += [Route(path, router, methods=["POST"]) for path in _PASSED_PATHS]

    async def refuse(_request: Request, error: Any) -> Response:
        return _error(error.status_code, error.detail, "not_found" if error.status_code == 404 else "bad_request")

    return Starlette(routes=routes, lifespan=router.run, exception_handlers={404: refuse, 405: refuse})


async def _read_body(receive: Receive) -> bytes:
    """The whole body; its size and the time it may take are the protocol's business (`http_guard`)."""
    chunks, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGoneError
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(chunks)


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _no_receive() -> Any:
    return {"type": "http.disconnect"}


def _error(status: int, message: str, kind: str, retry_after: int | None = None) -> JSONResponse:
    error = {"message": message, "type": kind, "param": None, "code": status}
    headers = None if retry_after is None else {"retry-after": str(retry_after)}
    return JSONResponse({"error": error}, status, headers)


def route(replicas: Sequence[str], config: RouterConfig | None = None) -> None:
    """Route until SIGTERM or Ctrl-C; streams in flight may then finish for `shutdown_timeout_s`.

    Raises `PowertrainError` for a replica that is no URL and for a port that is taken.
    """
    config = config or RouterConfig()
    app = make_app(Router(replicas, config))
    listener = _listen(config.host, config.port)
    settings = uvicorn.Config(
        app,
        http=guarded_protocol(config.limits),
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(config.shutdown_timeout_s),
    )
    # uvicorn drains at SIGTERM and then raises it again: a drained router has ended as it should.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    host, port = listener.getsockname()[:2]
    print(f"routing http://{host}:{port} to {len(replicas)} replicas", file=sys.stderr, flush=True)
    uvicorn.Server(settings).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise PowertrainError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None


def _checked_url(url: str) -> str:
    parsed = httpx.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise PowertrainError(f"--replica {url}: give a full address such as http://127.0.0.1:8001")
    return url.rstrip("/")
