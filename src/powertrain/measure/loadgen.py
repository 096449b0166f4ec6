"""`bench serve`: load on a running server over HTTP, and what its clients saw.

Closed loop: `concurrency` clients, each with one request at a time. Open loop: requests leave at `rate` per second with
Poisson gaps, whatever the server does. Latency counts from the time a request was meant to leave, so that a generator
which falls behind shows up as latency and as send lag instead of hiding the queue. Failures are counted apart and never
enter a latency. Time per output token is (end - first token) / (tokens - 1), from the server's own token count.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from powertrain.measure import record
from powertrain.types import PowertrainError

Progress = Callable[[str, float, float | None], None]

_WORDS = ("river", "house", "light", "time", "hand", "day", "a", "of", "the", "and", "in", "was", "that", "had", "on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. Exactly one of `concurrency` (closed loop) and `rate` per second (open loop).

    Ends after `num_requests`, or with `duration_s` when that is given (requests in flight finish). Prompts are
    `prompt_words` random words, seeded; answers run to `max_tokens`. `cancel_share` of the requests is closed by the
    client after the first token.
    """

    url: str
    concurrency: int | None = None
    rate: float | None = None
    num_requests: int = 64
    duration_s: float | None = None
    prompt_words: int = 128
    max_tokens: int = 64
    cancel_share: float = 0.0
    model: str | None = None
    api_key: str | None = None
    seed: int = 0
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise PowertrainError("give one of --concurrency (closed loop) and --rate (open loop)")
        intensity = self.rate if self.rate is not None else self.concurrency or 0
        if not intensity > 0 or self.num_requests < 1:
            raise PowertrainError("--concurrency, --rate and --num-requests must be positive")
        if self.prompt_words < 1 or self.max_tokens < 1 or not 0 <= self.cancel_share <= 1:
            raise PowertrainError("--prompt and --output must be at least 1, --cancel-share in [0, 1]")


@dataclass(slots=True)
class _Seen:
    """What one client saw. Times in seconds of one monotonic clock."""

    due: float
    sent: float
    first: float | None = None
    end: float = 0.0
    num_tokens: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    failure: str | None = None
    is_cancelled: bool = False


@dataclass(slots=True)
class _Run:
    """State of one run: the connection, the seeded choices, what was seen so far."""

    load: Load
    client: httpx.AsyncClient
    model: str
    random: random.Random
    progress: Progress | None
    started: float
    seen: list[_Seen] = field(default_factory=list)
    num_sent: int = 0

    def may_send(self, now: float) -> bool:
        if self.load.duration_s is not None:
            return now - self.started < self.load.duration_s
        return self.num_sent < self.load.num_requests

    def body(self) -> dict[str, Any]:
        self.num_sent += 1
        return {
            "model": self.model,
            "prompt": " ".join(self.random.choices(_WORDS, k=self.load.prompt_words)),
            "max_tokens": self.load.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def note(self, seen: _Seen) -> None:
        self.seen.append(seen)
        if self.progress is None:
            return
        if self.load.duration_s is None:
            self.progress("requests", len(self.seen), self.load.num_requests)
        else:
            self.progress("seconds", min(time.monotonic() - self.started, self.load.duration_s), self.load.duration_s)


def bench_serve(load: Load, *, git: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Put `load` on the server and return the JSON record of kind "serve".

    Raises `PowertrainError` if the server cannot be reached or refuses the key before the load starts; what fails
    later is counted in the record.
    """
    run = asyncio.run(_run(load, progress))
    shown = {key: value for key, value in asdict(load).items() if key != "api_key"}
    return record.new_record("serve", git=git, model=run.model, config=shown, results=[summarize(run.seen)])


def summarize(seen: Sequence[_Seen]) -> dict[str, Any]:
    """Counts, rates and latency quantiles. Times in ms; rates over the time from the first send to the last end."""
    good = [s for s in seen if s.failure is None and not s.is_cancelled]
    span = max((s.end for s in seen), default=0.0) - min((s.sent for s in seen), default=0.0)
    first = [s.first - s.due for s in good if s.first is not None]
    per_token = [(s.end - s.first) / (s.num_tokens - 1) for s in good if s.first is not None and s.num_tokens > 1]
    return {
        "completed": len(good),
        "cancelled": sum(s.is_cancelled for s in seen),
        "failed": sum(s.failure is not None for s in seen),
        "failures": dict(Counter(s.failure for s in seen if s.failure is not None)),
        "seconds": span,
        "requests_per_s": len(good) / span if span > 0 else 0.0,
        "output_tokens_per_s": sum(s.num_tokens for s in good) / span if span > 0 else 0.0,
        "prompt_tokens": sum(s.prompt_tokens for s in good),
        "cached_tokens": sum(s.cached_tokens for s in good),
        "ttft_ms": quantiles(first),
        "tpot_ms": quantiles(per_token),
        "e2e_ms": quantiles([s.end - s.due for s in good]),
        "send_lag_ms": quantiles([s.sent - s.due for s in seen]),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """mean, p50, p90, p99 (nearest rank) and max, in ms; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(1000 * s for s in seconds)
    rank = {f"p{q}": ordered[max(0, -(-q * len(ordered) // 100) - 1)] for q in (50, 90, 99)}
    return {"mean": sum(ordered) / len(ordered), **rank, "max": ordered[-1]}


def text_table(made: dict[str, Any]) -> str:
    """The record for a terminal."""
    row = made["results"][0]
    lines = [
        f"{made['model']}: {row['completed']} completed, {row['failed']} failed, {row['cancelled']} cancelled "
        f"in {row['seconds']:.1f} s",
        f"{row['requests_per_s']:.2f} requests/s, {row['output_tokens_per_s']:,.1f} output tokens/s",
        f"{'ms':>12} {'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9}",
    ]
    for name in ("ttft_ms", "tpot_ms", "e2e_ms", "send_lag_ms"):
        if (values := row[name]) is not None:
            numbers = " ".join(f"{values[key]:>9.1f}" for key in ("mean", "p50", "p90", "p99"))
            lines.append(f"{name.removesuffix('_ms'):>12} {numbers}")
    lines += [f"failed {count} times: {reason}" for reason, count in row["failures"].items()]
    return "\n".join(lines)


async def _run(load: Load, progress: Progress | None) -> _Run:
    headers = {"authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    limits = httpx.Limits(max_connections=None)
    # Without trust_env a proxy meant for the internet would stand between us and a server on loopback.
    async with httpx.AsyncClient(timeout=load.timeout_s, headers=headers, limits=limits, trust_env=False) as client:
        model = load.model or await _first_model(client, load.url)
        run = _Run(load, client, model, random.Random(load.seed), progress, time.monotonic())
        await (_closed_loop(run, load.concurrency) if load.concurrency is not None else _open_loop(run))
        return run


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    try:
        answer = await client.get(f"{url}/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        hint = "; give --api-key" if error.response.status_code == httpx.codes.UNAUTHORIZED else ""
        raise PowertrainError(f"{url}/v1/models answers {error.response.status_code}{hint}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise PowertrainError(f"no server at {url} ({reason}); start one with `powertrain serve MODEL`") from None


async def _closed_loop(run: _Run, concurrency: int) -> None:
    async def client() -> None:
        while run.may_send(time.monotonic()):
            await _send(run, run.body(), time.monotonic())

    await asyncio.gather(*(client() for _ in range(concurrency)))


async def _open_loop(run: _Run) -> None:
    rate = run.load.rate or 1.0
    due = time.monotonic()
    tasks = []
    while run.may_send(due):
        await asyncio.sleep(due - time.monotonic())
        tasks.append(asyncio.create_task(_send(run, run.body(), due)))
        due += run.random.expovariate(rate)
    await asyncio.gather(*tasks)


async def _send(run: _Run, body: dict[str, Any], due: float) -> None:
    seen = _Seen(due, time.monotonic())
    is_to_cancel = run.random.random() < run.load.cancel_share
    try:
        async with run.client.stream("POST", f"{run.load.url}/v1/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                seen.failure = f"status {answer.status_code}"
            else:
                await _read(seen, _events(answer), is_to_cancel)
    except httpx.HTTPError as error:
        seen.failure = type(error).__name__
    seen.end = time.monotonic()
    run.note(seen)


async def _read(seen: _Seen, events: AsyncIterator[dict[str, Any]], is_to_cancel: bool) -> None:
    async for event in events:
        if "error" in event:
            seen.failure = "error event"
            return
        if event.get("choices") and seen.first is None:
            seen.first = time.monotonic()
            if is_to_cancel:
                seen.is_cancelled = True
                return
        if usage := event.get("usage"):
            seen.num_tokens = usage["completion_tokens"]
            seen.prompt_tokens = usage["prompt_tokens"]
            seen.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if seen.num_tokens == 0:
        seen.failure = "no token"


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
