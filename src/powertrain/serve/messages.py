"""What the web process and the engine process say to each other: msgspec-tagged unions in MessagePack, never pickle.

Anything that does not decode to one of these types is garbage: the reader counts it, logs it and goes on.
"""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

import msgspec

from powertrain.config import EngineConfig
from powertrain.types import EngineInfo, EngineStats, PowertrainError, Request, TokenOutput

logger = logging.getLogger("powertrain.serve")

HEARTBEAT_INTERVAL_S = 1.0
"""How often an idle engine process says that it is alive, in seconds."""


class Launch(msgspec.Struct, kw_only=True):
    """Everything an engine process needs to start, one JSON line on its standard input."""

    model: str
    address: str
    parent_pid: int
    engine_config: EngineConfig


class Add(msgspec.Struct, tag="add"):
    request: Request


class Abort(msgspec.Struct, tag="abort"):
    """Stop one sequence (`index`) or all of a request. Unknown ids are no error: the sequence may just have ended."""

    request_id: str
    index: int | None = None


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Leave now; what still runs is dropped."""


class Ready(msgspec.Struct, tag="ready"):
    info: EngineInfo


class Outputs(msgspec.Struct, tag="outputs"):
    """One step: what it gave each sequence (perhaps nothing), and the engine's state after it.

    `started_at` is when the step began, in seconds of the machine's monotonic clock, which both processes read.
    """

    outputs: list[TokenOutput]
    stats: EngineStats
    started_at: float


class Rejected(msgspec.Struct, tag="rejected"):
    """`Add` was refused. `param` None with `is_fault` True is the engine's own failure, not the client's."""

    request_id: str
    message: str
    param: str | None = None
    is_fault: bool = False


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    stats: EngineStats


class Fatal(msgspec.Struct, tag="fatal"):
    """The engine cannot go on; its process ends after this message."""

    message: str


ToEngine = Add | Abort | Shutdown
FromEngine = Ready | Outputs | Rejected | Heartbeat | Fatal

T = TypeVar("T")


class Inbox(Generic[T]):
    """Decodes one direction of the bridge. `num_dropped` counts the frames that were not valid messages."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self.num_dropped = 0

    def decode(self, frame: bytes) -> T | None:
        """The message in `frame`, or None when it is garbage."""
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, PowertrainError, UnicodeDecodeError, RecursionError) as error:
            self.num_dropped += 1
            if self.num_dropped & (self.num_dropped - 1) == 0:  # 1, 2, 4, 8 …: a flood must not flood the log too
                logger.warning(
                    "dropped %d undecodable bridge messages so far (last: %d bytes, %s)",
                    self.num_dropped,
                    len(frame),
                    type(error).__name__,
                )
            return None


def engine_inbox() -> Inbox[ToEngine]:
    return Inbox(msgspec.msgpack.Decoder(ToEngine))


def web_inbox() -> Inbox[FromEngine]:
    return Inbox(msgspec.msgpack.Decoder(FromEngine))


encode = msgspec.msgpack.Encoder().encode
