"""Is a replica moving? A process that answers its probe and generates nothing is as bad as a dead one.

Public servers have had health checks that said 200 while the scheduler was stuck; so this one also reads the replica's
counters: work in the engine and not one token, prompt or generated, for `progress_timeout_s` means stuck.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from powertrain.serve.routing import Replica

logger = logging.getLogger("powertrain.router")

_QUEUED = {"num_requests_running", "num_requests_waiting"}
_MOVED = {"prompt_tokens_total", "generation_tokens_total", "iteration_tokens_total_sum"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthConfig:
    """A refused connection takes a replica out at once, silence after `max_timeouts` polls, no progress later."""

    poll_interval_s: float = 0.5
    poll_timeout_s: float = 1.0
    max_timeouts: int = 2
    progress_timeout_s: float = 60.0


class ReplicaMonitor:
    """Polls one replica for ever, and calls `on_lost` when its open streams should be given up as well."""

    def __init__(self, replica: Replica, client: httpx.AsyncClient, config: HealthConfig, on_lost: Callable[[], None]):
        self._replica = replica
        self._client = client
        self._config = config
        self._on_lost = on_lost
        self._num_timeouts = 0
        self._moved = -1.0
        self._moved_at = 0.0

    async def run(self) -> None:
        while True:
            await self.poll()
            await asyncio.sleep(self._config.poll_interval_s)

    async def poll(self) -> None:
        """One look at /health, and at /metrics where they are open to us."""
        try:
            health = await self._get("/health")
        except httpx.TimeoutException:
            self._num_timeouts += 1
            if self._num_timeouts >= self._config.max_timeouts:
                self._lose("no answer")
            return
        except httpx.HTTPError as error:
            # Not lost: a draining server closes its door first and finishes its streams behind it.
            mark(self._replica, False, f"unreachable ({type(error).__name__})")
            return
        self._num_timeouts = 0
        if health.status_code != httpx.codes.OK:
            mark(self._replica, False, f"/health answers {health.status_code}")
        elif await self._is_stuck():
            self._lose("requests in the engine, but no token moves")
        else:
            mark(self._replica, True, "ok")

    async def _get(self, path: str) -> httpx.Response:
        return await self._client.get(self._replica.url + path, timeout=self._config.poll_timeout_s)

    async def _is_stuck(self) -> bool:
        try:
            metrics = await self._get("/metrics")
        except httpx.HTTPError:
            return False
        progress = read_progress(metrics.text) if metrics.status_code == httpx.codes.OK else None
        now = asyncio.get_running_loop().time()
        if progress is None or progress[0] == 0 or progress[1] != self._moved:
            self._moved, self._moved_at = (progress[1] if progress else -1.0), now
            return False
        return now - self._moved_at > self._config.progress_timeout_s

    def _lose(self, reason: str) -> None:
        mark(self._replica, False, reason)
        self._on_lost()


def mark(replica: Replica, is_healthy: bool, reason: str) -> None:
    """Put a replica in or out of rotation; its guessed cache is forgotten whenever it goes."""
    if is_healthy != replica.is_healthy:
        logger.warning("replica %s is %s: %s", replica.url, "in" if is_healthy else "out", reason)
        if not is_healthy:
            replica.forget()
    replica.is_healthy, replica.reason = is_healthy, reason


def read_progress(metrics: str) -> tuple[float, float] | None:
    """(requests in the engine, tokens it has moved so far) from a Prometheus page in vLLM's names, or None."""
    queued, moved = 0.0, 0.0
    seen = set()
    for line in metrics.splitlines():
        series, _, value = line.rpartition(" ")
        name = series.partition("{")[0].rpartition(":")[2]
        if line.startswith("#") or name not in _QUEUED | _MOVED:
            continue
        try:
            number = float(value)
        except ValueError:
            return None
        seen.add(name)
        if name in _QUEUED:
            queued += number
        else:
            moved += number
    return (queued, moved) if seen & _QUEUED and seen & _MOVED else None
