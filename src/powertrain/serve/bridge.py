"""The web process's end of the bridge: owns the engine process, hands requests in and gives outputs back by request.

The socket is a PAIR on `ipc://` inside a private directory (mode 0700), so that only this user can reach it, and it
takes one peer only. Messages are those of `powertrain.serve.messages`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from powertrain.checkpoint.unfinished import is_abandoned, locked
from powertrain.config import EngineConfig
from powertrain.serve import messages
from powertrain.serve.messages import FromEngine, Launch, Outputs, ToEngine
from powertrain.types import EngineInfo, EngineStats, InvalidRequest, PowertrainError, Request, TokenOutput

logger = logging.getLogger("powertrain.serve")

WORKER_COMMAND = (sys.executable, "-m", "powertrain.serve.worker")
PREFIX, LOCK = "powertrain-", "lock"
MAX_IPC_PATH = 100
"""Unix sockets allow about 107 bytes of path."""
MAX_BUFFERED_OUTPUTS = 8192
"""Outputs that may wait for a slow reader before its request is given up."""


class EngineDeadError(PowertrainError):
    """The engine process is gone or gave up; nothing more will come from it."""


class EngineFaultError(PowertrainError):
    """The engine failed at this one request; others go on."""


class OutputQueue:
    """The outputs of one client's requests, in order of arrival; several requests may share one queue."""

    def __init__(self, max_buffered: int = MAX_BUFFERED_OUTPUTS) -> None:
        self._queue: asyncio.Queue[TokenOutput | Exception] = asyncio.Queue()
        self._max_buffered = max_buffered

    def put(self, output: TokenOutput) -> bool:
        """False when the reader is so far behind that it must be given up."""
        if self._queue.qsize() >= self._max_buffered:
            self.fail(EngineFaultError("the client read too slowly; the request was aborted"))
            return False
        self._queue.put_nowait(output)
        return True

    def fail(self, error: Exception) -> None:
        self._queue.put_nowait(error)

    async def get(self) -> TokenOutput:
        """The next output; raises what the request failed with."""
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item


@dataclass(slots=True)
class _OpenRequest:
    """Where a request's outputs go, and which of its sequences have not ended."""

    queue: OutputQueue
    indexes: set[int]


class EngineClient:
    """One engine process. `start` it once, then `add` and `abort`; `error` tells why it died, when it has."""

    def __init__(
        self,
        model: Path,
        engine_config: EngineConfig,
        command: Sequence[str] = WORKER_COMMAND,
        on_step: Callable[[Outputs], None] | None = None,
    ) -> None:
        self._model = model
        self._engine_config = engine_config
        self._command = tuple(command)
        self.on_step = on_step
        self.stats = EngineStats()
        self.error: str | None = None
        self.last_progress = time.monotonic()
        self._info: EngineInfo | None = None
        self._inbox = messages.web_inbox()
        self._open: dict[str, _OpenRequest] = {}
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._stack = contextlib.AsyncExitStack()
        self._directory: str | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDeadError("the engine has not started")
        return self._info

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def num_dropped_messages(self) -> int:
        return self._inbox.num_dropped

    def is_stalled(self, timeout_s: float) -> bool:
        """True when the engine has shown no progress for `timeout_s`: no step while it has work, no word while idle."""
        return time.monotonic() - self.last_progress > timeout_s

    async def start(self) -> EngineInfo:
        """Start the process and wait until its engine is ready. Raises `PowertrainError` with the reason it is not."""
        directory = self._directory = self._stack.enter_context(_private_directory())
        address = f"ipc://{directory}/engine"
        context = zmq.asyncio.Context()
        self._stack.callback(context.term)
        self._socket = context.socket(zmq.PAIR)
        self._stack.callback(self._socket.close, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by admission; a long step must not block the event loop
        self._socket.bind(address)
        launch = Launch(
            model=str(self._model), address=address, parent_pid=os.getpid(), engine_config=self._engine_config
        )
        self._ready = asyncio.get_running_loop().create_future()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=2,  # what it prints belongs to the log
            process_group=0,  # Ctrl-C is for the web process, which drains first
        )
        self._stack.push_async_callback(self._stop_process)
        for work in (self._read(), self._watch_process()):
            task = asyncio.create_task(work)
            self._stack.push_async_callback(_cancel, task)
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(ConnectionError):  # it died at once: `_watch_process` tells
            stdin.write(msgspec.json.encode(launch) + b"\n")
            await stdin.drain()
        self._info = await self._ready
        return self._info

    async def close(self) -> None:
        """Tell the process to leave, kill it if it does not, and remove the socket."""
        if self.error is None:
            self._end("the server has stopped")
        await self._stack.aclose()

    def kill(self) -> None:
        """End the engine process and remove the socket without waiting for anything; for a second signal."""
        if self._process and self._process.returncode is None:
            self._process.kill()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def add(self, request: Request, queue: OutputQueue) -> None:
        """Send one request; its outputs, or the error that ends it, go to `queue`. Raises `EngineDeadError`."""
        if self.error is not None:
            raise EngineDeadError(self.error)
        if not self._open:
            self.last_progress = time.monotonic()
        self._open[request.request_id] = _OpenRequest(queue, set(range(request.sampling.n)))
        self._send(messages.Add(request))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a sequence or, with `index` None, a whole request. What has ended already is left alone."""
        if request_id not in self._open:
            return
        self._send(messages.Abort(request_id, index))
        if index is None:
            del self._open[request_id]
        else:
            self._close_sequence(request_id, index)

    def _close_sequence(self, request_id: str, index: int) -> None:
        still_open = self._open[request_id].indexes
        still_open.discard(index)
        if not still_open:
            del self._open[request_id]

    def _send(self, message: ToEngine) -> None:
        assert self._socket is not None
        # Without a high-water mark the send finishes at once; the future carries only errors.
        future = asyncio.ensure_future(self._socket.send(messages.encode(message)))
        future.add_done_callback(_log_failure)

    async def _read(self) -> None:
        assert self._socket is not None
        while True:
            frame = await self._socket.recv()
            message = self._inbox.decode(frame)
            if message is not None:
                self._handle(message)

    def _handle(self, message: FromEngine) -> None:
        match message:
            case messages.Outputs(outputs, stats):
                self._take_stats(stats)
                if self.on_step is not None:
                    self.on_step(message)
                for output in outputs:
                    self._deliver(output)
            case messages.Heartbeat(stats):
                self._take_stats(stats)
            case messages.Rejected(request_id, text, param, is_fault):
                if (rejected := self._open.pop(request_id, None)) is not None:
                    rejected.queue.fail(EngineFaultError(text) if is_fault else InvalidRequest(text, param))
            case messages.Ready(info):
                self.last_progress = time.monotonic()
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(info)
            case messages.Fatal(text):
                self.fail(text)

    def _deliver(self, output: TokenOutput) -> None:
        open_request = self._open.get(output.request_id)
        if open_request is None or output.index not in open_request.indexes:
            return  # aborted while this output was under way
        if not open_request.queue.put(output):
            self.abort(output.request_id)
        elif output.finish_reason is not None:
            self._close_sequence(output.request_id, output.index)

    def _take_stats(self, stats: EngineStats) -> None:
        # A heartbeat of a busy engine shows that its process lives, not that it gets anywhere.
        if stats.num_steps != self.stats.num_steps or not self._open:
            self.last_progress = time.monotonic()
        self.stats = stats

    async def _watch_process(self) -> None:
        assert self._process is not None
        status = await self._process.wait()
        await asyncio.sleep(0.05)  # a last Fatal message may still be in the socket, and says more
        self.fail(f"the engine process ended (status {status})")

    def fail(self, message: str) -> None:
        """Give the engine up: every request that is open ends with this error, and no more are taken."""
        if self.error is not None:
            return
        if self._info is not None:
            logger.error("engine: %s", message)
        self._end(message)

    def _end(self, message: str) -> None:
        self.error = message
        self.stats = dataclasses.replace(self.stats, num_running=0, num_waiting=0, num_blocks_in_use=0)
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(EngineDeadError(message))
        queues = {open_request.queue for open_request in self._open.values()}
        self._open.clear()
        for queue in queues:
            queue.fail(EngineDeadError(message))

    async def _stop_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._send(messages.Shutdown())
        try:
            await asyncio.wait_for(process.wait(), 3.0)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@contextlib.contextmanager
def _private_directory() -> Iterator[str]:
    """A new directory that only this user may enter, with a path short enough for a socket; removed afterwards."""
    base = tempfile.gettempdir()
    base = base if len(base) < MAX_IPC_PATH - 40 else "/tmp"
    _remove_abandoned(Path(base))
    directory = tempfile.mkdtemp(prefix=PREFIX, dir=base)
    try:
        unlocked = Path(directory) / "unlocked"
        unlocked.touch()
        with locked(unlocked):
            unlocked.rename(Path(directory) / LOCK)
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_abandoned(base: Path) -> None:
    """Remove the directories of servers that were killed: their locks went with them."""
    for lock in base.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError):  # another start may be at it
            if lock.stat().st_uid == os.getuid() and is_abandoned(lock):
                shutil.rmtree(lock.parent, ignore_errors=True)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _log_failure(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.error("bridge send failed: %s", error)
