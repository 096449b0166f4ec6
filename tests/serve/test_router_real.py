"""Real servers behind a real router; one of them dies in the middle of its answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import ServerProcess, wait_until

Start = Callable[..., ServerProcess]

NUM_STREAMS = 8


@pytest.fixture(scope="module")
def replicas(tiny_model_dir: Callable[[str], Path]) -> Iterator[list[ServerProcess]]:
    """Two with the real engine; the last test of this file kills one."""
    engine = {"device": "cpu", "dtype": "float32", "num_blocks": 512, "max_num_seqs": 8, "threads": 1}
    names = {"served_model_name": "tiny"}
    started = [ServerProcess(tiny_model_dir("llama"), engine, names) for _ in range(2)]
    try:
        yield [process.wait_ready() for process in started]
    finally:
        for process in started:
            process.stop()


@contextmanager
def routing(replicas: list[ServerProcess]) -> Iterator[str]:
    urls = [word for replica in replicas for word in ("--replica", replica.url)]
    command = [sys.executable, "-m", "powertrain", "route", *urls, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split()[1]
        threading.Thread(target=process.stderr.read, daemon=True).start()
        wait_until(lambda: is_up(url), 20, "the router's start")
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def router(replicas: list[ServerProcess]) -> Iterator[str]:
    with routing(replicas) as url:
        yield url


def states(url: str) -> dict[str, str]:
    replicas: dict[str, str] = httpx.get(url + "/health", timeout=5).json()["replicas"]
    return replicas


def is_up(url: str) -> bool:
    try:
        return list(states(url).values()) == ["ok", "ok"]
    except httpx.HTTPError:
        return False


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def stream(client: openai.OpenAI, model: str, number: int, barrier: threading.Barrier) -> str:
    messages: Any = [{"role": "user", "content": f"{number} stories"}]
    chunks = client.chat.completions.create(
        model=model, messages=messages, max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    finish = None
    try:
        for count, chunk in enumerate(chunks):
            if count == 0:
                barrier.wait(60)
            if chunk.choices:
                finish = chunk.choices[0].finish_reason or finish
    except openai.APIError as error:
        return f"error: {error.message}"
    return f"finished: {finish}"


def check_survival(url: str, model: str, victim: ServerProcess, other: ServerProcess, kill: Callable[[], None]) -> None:
    """Half of the streams are on the victim: those end with an error event, the others whole; new requests succeed."""
    barrier = threading.Barrier(NUM_STREAMS + 1)
    with client_of(url) as client, ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(stream, client, model, number, barrier) for number in range(NUM_STREAMS)]
        barrier.wait(60)
        kill()
        ends = [future.result(60) for future in streams]
        assert ends.count("finished: length") == NUM_STREAMS / 2, ends
        assert sum(end.startswith("error: ") for end in ends) == NUM_STREAMS / 2, ends
        for number in range(10):
            answer = client.completions.create(model=model, prompt=f"again {number}", max_tokens=3)
            assert answer.usage is not None
            assert answer.usage.completion_tokens <= 3
    wait_until(lambda: states(url)[victim.url] != "ok")
    assert states(url)[other.url] == "ok"


def test_the_kill_of_an_engine_is_survived(start: Start) -> None:
    """The web process lives on and says 503: the engines are the fake ones, a token each 10 ms."""
    victim, other = [process.wait_ready() for process in [start(step_ms=10, max_num_seqs=8) for _ in range(2)]]
    with routing([victim, other]) as url:
        check_survival(url, "fake", victim, other, lambda: os.kill(victim.engine_pid, signal.SIGKILL))


def test_the_router_looks_like_the_server_it_stands_for(replicas: list[ServerProcess], router: str) -> None:
    with client_of(router) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        messages: Any = [{"role": "user", "content": "hello"}]
        texts = set()
        for url in (router, router, *(replica.url for replica in replicas)):
            with client_of(url) as one:
                answer = one.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
                texts.add(answer.choices[0].message.content)
        assert len(texts) == 1
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=-1)
    tokens = httpx.post(router + "/tokenize", json={"model": "tiny", "prompt": "hello"}, timeout=10).json()["tokens"]
    text = httpx.post(router + "/detokenize", json={"model": "tiny", "tokens": tokens}, timeout=10).json()["prompt"]
    assert "hello" in text


def test_the_kill_of_a_server_is_survived(replicas: list[ServerProcess], router: str) -> None:
    victim, other = replicas
    check_survival(router, "tiny", victim, other, victim.kill)
