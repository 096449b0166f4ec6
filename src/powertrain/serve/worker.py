"""The engine process: `python -m powertrain.serve.worker`, told what to load by one JSON line on standard input.

One thread: drain the inbox, take a step, send what it gave. A second one only watches the parent, so that an engine
whose web process was killed never stays behind with the machine's memory.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from powertrain.config import EngineConfig
from powertrain.serve import messages
from powertrain.serve.messages import HEARTBEAT_INTERVAL_S, FromEngine, Launch, ToEngine
from powertrain.types import EngineInfo, EngineStats, InvalidRequest, PowertrainError, Request, TokenOutput

logger = logging.getLogger("powertrain.serve")

STUCK_PAUSE_S = 0.002
"""Wait after a step that neither advanced nor gave anything, so that a stuck engine does not also burn a core."""


class EngineLike(Protocol):
    """What the worker asks of an engine; `powertrain.engine.core.Engine` in production."""

    info: EngineInfo

    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str, index: int | None = None) -> None: ...
    def step(self) -> list[TokenOutput]: ...
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


EngineFactory = Callable[[Path, EngineConfig], EngineLike]


class Link:
    """The engine's end of the bridge: a PAIR socket that never blocks for ever."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(address)
        self._inbox = messages.engine_inbox()

    @property
    def num_dropped(self) -> int:
        return self._inbox.num_dropped

    def send(self, message: FromEngine) -> None:
        """Hand over one message; waits while the web process is behind (its death ends this process)."""
        self._socket.send(messages.encode(message))

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """Everything that has arrived, after waiting at most `timeout_s` for the first."""
        received: list[ToEngine] = []
        if not self._socket.poll(int(timeout_s * 1000)):
            return received
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return received
            if (message := self._inbox.decode(frame)) is not None:
                received.append(message)

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def serve_engine(engine: EngineLike, link: Link) -> None:
    """Run the engine for the web process until `Shutdown`. An exception of `step` is the caller's to report."""
    link.send(messages.Ready(engine.info))
    last_sent = time.monotonic()
    while True:
        wait_s = 0.0 if engine.has_work() else HEARTBEAT_INTERVAL_S
        for message in link.receive(wait_s):
            if isinstance(message, messages.Shutdown):
                return
            _apply(engine, link, message)
        if engine.has_work():
            num_steps = engine.stats().num_steps
            started_at = time.monotonic()
            outputs = engine.step()
            stats = engine.stats()
            if outputs or stats.num_steps != num_steps:
                link.send(messages.Outputs(outputs, stats, started_at))
                last_sent = time.monotonic()
                continue
            time.sleep(STUCK_PAUSE_S)
        if time.monotonic() - last_sent >= HEARTBEAT_INTERVAL_S:
            link.send(messages.Heartbeat(engine.stats()))
            last_sent = time.monotonic()


def _apply(engine: EngineLike, link: Link, message: messages.Add | messages.Abort) -> None:
    if isinstance(message, messages.Abort):
        engine.abort(message.request_id, message.index)
        # The gauges must show the freed blocks at once, not at the next heartbeat.
        link.send(messages.Heartbeat(engine.stats()))
        return
    request_id = message.request.request_id
    try:
        engine.add(message.request)
    except InvalidRequest as error:
        link.send(messages.Rejected(request_id, error.message, error.param))
    except Exception as error:  # one request must never end the engine of all the others
        logger.exception("the engine failed to take a request")
        link.send(messages.Rejected(request_id, f"{type(error).__name__}: {error}", is_fault=True))


def watch_parent(parent_pid: int, interval_s: float = 0.5) -> None:
    """End this process, from a thread of its own, when `parent_pid` is no longer its parent."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(interval_s)
        os._exit(1)  # the main thread may be deep in a step or blocked in a send

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def run(launch: Launch, engine_factory: EngineFactory) -> int:
    """Load the engine and serve it; returns the process's exit status. Every failure is told to the web process."""
    link = Link(launch.address)
    try:
        engine = engine_factory(Path(launch.model), launch.engine_config)
        try:
            serve_engine(engine, link)
        finally:
            engine.close()
        return 0
    except PowertrainError as error:
        link.send(messages.Fatal(str(error)))
    except Exception as error:
        logger.exception("the engine failed")
        link.send(messages.Fatal(f"{type(error).__name__}: {error}"))
    finally:
        link.close()
    return 1


def main(engine_factory: EngineFactory | None = None) -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s engine: %(message)s")
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    watch_parent(launch.parent_pid)
    return run(launch, engine_factory or _load_engine)


def _load_engine(path: Path, config: EngineConfig) -> EngineLike:
    from powertrain.engine.core import Engine  # here, so that a parent that is already gone ends us before torch loads

    return Engine.from_checkpoint(path, config)


if __name__ == "__main__":
    sys.exit(main())
