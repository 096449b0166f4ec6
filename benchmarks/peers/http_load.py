"""The same requests to our own server: all at once over HTTP, prompts as token ids."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
from peers.wire import random_prompts
from peers.works import Work

from powertrain.types import PowertrainError


def http_rate(url: str, work: Work, vocab_size: int, *, is_streamed: bool) -> float:
    """Output tokens per second from the first request sent to the last answer complete.

    Raises `PowertrainError` for an answer with another number of tokens than asked for.
    """
    return asyncio.run(_rate(url, work, vocab_size, is_streamed))


async def _rate(url: str, work: Work, vocab_size: int, is_streamed: bool) -> float:
    prompts = random_prompts(work.batch, work.prompt, vocab_size)
    limits = httpx.Limits(max_connections=work.batch)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        start = time.perf_counter()
        counts = await asyncio.gather(*(_ask(client, ids, work.output, is_streamed) for ids in prompts))
        seconds = time.perf_counter() - start
    if any(count != work.output for count in counts):
        raise PowertrainError(f"the server made {counts} tokens, {work.output} each were asked for")
    return work.num_tokens / seconds


async def _ask(client: httpx.AsyncClient, ids: list[int], output: int, is_streamed: bool) -> int:
    """One completion; the server's own count of its tokens."""
    body = {"prompt": ids, "max_tokens": output, "temperature": 0, "ignore_eos": True}
    if not is_streamed:
        answer = await client.post("/v1/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    last = ""
    async with client.stream("POST", "/v1/completions", json=body) as stream:
        stream.raise_for_status()
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                last = line
    return int(json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"])
