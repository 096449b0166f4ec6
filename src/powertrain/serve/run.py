"""`powertrain serve`: bind the port, start the engine, answer until a signal, drain, leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.config import EngineConfig, ServerConfig
from powertrain.serve.app import create_app
from powertrain.serve.bridge import WORKER_COMMAND, EngineClient
from powertrain.serve.http_guard import HttpLimits, guarded_protocol
from powertrain.serve.metrics import Metrics
from powertrain.serve.sampling import load_sampling_defaults
from powertrain.serve.service import TextService
from powertrain.types import EngineInfo, PowertrainError

logger = logging.getLogger("powertrain.serve")

CLOSE_TIMEOUT_S = 5
"""How long connections may take to close once nothing runs any more."""


def serve(
    model_path: Path,
    engine_config: EngineConfig,
    server_config: ServerConfig,
    *,
    worker_command: Sequence[str] = WORKER_COMMAND,
) -> int:
    """Serve the model at `model_path` until SIGTERM or SIGINT; returns the process's exit status.

    The first signal drains: new work gets 503, /health 503, /live 200, and what was admitted finishes within
    `shutdown_timeout_s`. A second signal leaves at once. Raises `PowertrainError` for a port that is taken (before the
    engine loads), a model that does not load, and the like.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    with bind(server_config.host, server_config.port) as listener:
        server = Server(model_path, engine_config, server_config, worker_command)
        return asyncio.run(server.run(listener))


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: who connects before the engine is ready is refused, not left hanging.

    Raises `PowertrainError` naming the port and what to do.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise PowertrainError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise PowertrainError(
            f"port {port} on {host} cannot be used: {reason.lower()}; "
            f"stop what uses it or give another one with --port (0 takes any free one)"
        ) from None
    return listener


def start_text(info: EngineInfo) -> str:
    """What an engine runs on, for the line that says that the server is ready."""
    text = f"{info.device} ({info.dtype}, {info.max_model_len} tokens)"
    return f"{text}; {info.kernels}" if info.kernels else text


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handling: it closes the door at the first signal, we keep it open to drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One run of `powertrain serve`."""

    def __init__(
        self, model: Path, engine_config: EngineConfig, config: ServerConfig, worker_command: Sequence[str]
    ) -> None:
        self._model = model
        self._config = config
        self._engine = EngineClient(model, engine_config, worker_command)
        self._stop = asyncio.Event()

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        name = self._config.served_model_name or self._model.name
        # The tokenizer is read first: it is quick, and its errors should not wait for the weights.
        tokenizer = await asyncio.to_thread(load_tokenizer, self._model)
        defaults = load_sampling_defaults(self._model)
        try:
            if not await self._start_engine():
                return 0
            info = self._engine.info
            metrics = Metrics(name, info, lambda: self._engine.stats)
            service = TextService(self._engine, tokenizer, metrics, self._config.max_queued_requests)
            web = self._web_server(create_app(service, name, self._config, defaults))
            serving = asyncio.create_task(web.serve(sockets=[listener]))
            while not (web.started or serving.done()):
                await asyncio.sleep(0.005)
            host, port = listener.getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"serving {name} at {url} on {start_text(info)}", flush=True)
            await self._wait_for_stop(serving)
            await self._drain(service)
            web.should_exit = True
            await serving
            return 0
        finally:
            await self._engine.close()

    async def _start_engine(self) -> bool:
        """False when a signal came while the engine was loading."""
        starting = asyncio.create_task(self._engine.start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if starting.done():
            starting.result()
            return True
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        return False

    def _web_server(self, app: object) -> _Uvicorn:
        config = self._config
        return _Uvicorn(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                http=guarded_protocol(HttpLimits.from_config(config)),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            )
        )

    async def _wait_for_stop(self, serving: asyncio.Task[None]) -> None:
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    async def _drain(self, service: TextService) -> None:
        service.is_draining = True
        num_active = service.num_active
        if num_active:
            timeout_s = self._config.shutdown_timeout_s
            logger.info("draining %d sequences, at most %g s; a second signal leaves at once", num_active, timeout_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.shutdown_timeout_s):
                while service.num_active and service.engine.error is None:
                    await asyncio.sleep(0.02)
        if service.num_active:
            logger.warning("gave up on %d sequences after the shutdown timeout", service.num_active)
            service.engine.fail("the server has shut down")

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            self._engine.kill()
            os._exit(128 + number)
        self._stop.set()
