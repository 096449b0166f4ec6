"""Which replica should take a request: the policy of the router, without I/O or clocks of its own.

cost(replica) = prompt work its prefix cache lacks + work it was sent lately / 8 + a little per request in flight

and the lowest cost wins. Longest prefix alone sends everything to one replica as soon as all prompts share a system
message; the load terms spread such a prefix over as many replicas as the traffic needs (Preble, ICLR 2025, makes the
same trade between saved and queued work). What each replica has cached is not asked but guessed, from what was sent
there before.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from powertrain.types import PowertrainError


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """Work is counted in chunks of `chunk_bytes` of prompt (about 32 tokens of English)."""

    chunk_bytes: int = 128
    max_chunks_per_prompt: int = 4096
    max_chunks_per_replica: int = 65_536
    recent_work_weight: float = 1 / 8
    recent_work_s: float = 60.0
    active_request_cost: float = 2.0


@dataclass(frozen=True, slots=True)
class PromptWork:
    """A prompt as the router sees it: hashes of its leading chunks (each covers all before it), and its size."""

    hashes: tuple[bytes, ...] = ()
    num_chunks: int = 1


@dataclass(slots=True, eq=False)
class Replica:
    """One server behind the router: whether it may take work, how much it has, what it has probably cached."""

    url: str
    is_healthy: bool = False
    reason: str = "not polled yet"
    num_active: int = 0
    recent_work: float = 0.0
    recent_at: float = 0.0
    last_chosen: int = 0
    chunks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def num_cached(self, hashes: Sequence[bytes]) -> int:
        """Leading chunks of a prompt that this replica was sent before and has probably not evicted."""
        for count, chunk in enumerate(hashes):
            if chunk not in self.chunks:
                return count
        return len(hashes)

    def remember(self, hashes: Sequence[bytes], limit: int) -> None:
        """Note that these chunks are there now; last first, so that a prompt's end is forgotten before its start."""
        for chunk in reversed(hashes):
            self.chunks[chunk] = None
            self.chunks.move_to_end(chunk)
        while len(self.chunks) > limit:
            self.chunks.popitem(last=False)

    def forget(self) -> None:
        """Its process may have gone, and its cache with it."""
        self.chunks.clear()
        self.recent_work = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and what that was expected to save."""

    replica: Replica
    num_cached: int
    num_chunks: int


class RoutingPolicy:
    """Chooses replicas and keeps their books. `start` and `finish` come in pairs; `now` is any monotonic seconds."""

    def __init__(self, urls: Sequence[str], config: RoutingConfig | None = None) -> None:
        self.config = config or RoutingConfig()
        if not urls:
            raise PowertrainError("give at least one --replica URL")
        if len(set(urls)) != len(urls):
            raise PowertrainError("the same --replica is given twice")
        self.replicas = [Replica(url) for url in urls]
        self._num_decisions = 0

    def choose(self, work: PromptWork, now: float, exclude: Collection[str] = ()) -> Decision | None:
        """The healthy replica of lowest cost; among equals the one idle longest. None if there is none."""
        best: tuple[tuple[float, int], Decision] | None = None
        for replica in self.replicas:
            if not replica.is_healthy or replica.url in exclude:
                continue
            num_cached = replica.num_cached(work.hashes)
            cost = work.num_chunks - num_cached + self._load(replica, now)
            key = (cost, replica.last_chosen)
            if best is None or key < best[0]:
                best = key, Decision(replica, num_cached, work.num_chunks)
        return best[1] if best else None

    def start(self, decision: Decision, work: PromptWork, now: float) -> None:
        """Book a request to the replica that was chosen."""
        replica, self._num_decisions = decision.replica, self._num_decisions + 1
        replica.recent_work = self._recent(replica, now) + decision.num_chunks - decision.num_cached
        replica.recent_at = now
        replica.num_active += 1
        replica.last_chosen = self._num_decisions
        replica.remember(work.hashes, self.config.max_chunks_per_replica)

    def finish(self, decision: Decision) -> None:
        """The request has ended, however it ended."""
        decision.replica.num_active -= 1

    def _recent(self, replica: Replica, now: float) -> float:
        return replica.recent_work * math.exp((replica.recent_at - now) / self.config.recent_work_s)

    def _load(self, replica: Replica, now: float) -> float:
        recent = self.config.recent_work_weight * self._recent(replica, now)
        return recent + self.config.active_request_cost * replica.num_active


def prompt_work(body: Any, config: RoutingConfig) -> PromptWork:
    """Chunk hashes and size of a chat or completion body: parsed JSON of any shape, for the replica will judge it."""
    if not isinstance(body, dict):
        return PromptWork()
    salt = json.dumps([body.get(key) for key in ("model", "cache_salt", "tools")], sort_keys=True).encode()
    messages, prompt = body.get("messages"), body.get("prompt")
    if isinstance(messages, list):
        data = b"".join(json.dumps(message, sort_keys=True).encode() for message in messages)
        num_bytes = len(data)
    else:
        is_batch = isinstance(prompt, list) and len(prompt) > 0 and not isinstance(prompt[0], int)
        prompts: list[Any] = list(prompt or []) if is_batch else [prompt]
        data = _prompt_bytes(prompts[0])
        num_bytes = sum(len(_prompt_bytes(one)) for one in prompts)
    hashes = []
    chunk_hash = hashlib.blake2b(salt, digest_size=16).digest()
    last = min(len(data) // config.chunk_bytes, config.max_chunks_per_prompt)
    for start in range(0, last * config.chunk_bytes, config.chunk_bytes):
        chunk_hash = hashlib.blake2b(chunk_hash + data[start : start + config.chunk_bytes], digest_size=16).digest()
        hashes.append(chunk_hash)
    return PromptWork(tuple(hashes), max(1, math.ceil(num_bytes / config.chunk_bytes)))


def _prompt_bytes(prompt: Any) -> bytes:
    if isinstance(prompt, str):
        return prompt.encode("utf-8", "surrogatepass")
    try:
        return array("i", prompt).tobytes()
    except (TypeError, OverflowError):
        return json.dumps(prompt).encode()
