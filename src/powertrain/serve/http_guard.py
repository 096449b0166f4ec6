"""uvicorn's h11 protocol with limits: how many headers, how many bytes, how long a client may take, one body length.

Plain uvicorn accepts any number of headers, waits for ever for a slow client and buffers a body of any size. Every
refusal is an OpenAI error body and closes the connection.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from powertrain.config import ServerConfig

LINGER_S = 1.0
"""How long what a refused client still sends is read and dropped: closing at once would reset away our answer."""
MIN_BYTES_PER_CHUNK = 64
FREE_CHUNKS = 2048
"""Pieces a body may come in, beside one for each `MIN_BYTES_PER_CHUNK`: tiny chunks cost far more than their bytes."""

_CONTENT_LENGTH_LINE = re.compile(rb"^content-length[ \t]*:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    max_header_count: int
    max_header_bytes: int
    max_body_bytes: int
    header_timeout_s: float
    body_timeout_s: float

    @classmethod
    def from_config(cls, config: ServerConfig) -> HttpLimits:
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


class RefusedError(h11.RemoteProtocolError):
    """A request that breaks a limit; `error_status_hint` is the answer's status."""


class GuardedConnection(h11.Connection):
    """h11's server side that checks each head and counts each body before uvicorn sees them."""

    def __init__(self, limits: HttpLimits) -> None:
        super().__init__(h11.SERVER, limits.max_header_bytes)
        self._limits = limits
        self._head = bytearray()
        self._num_body_bytes = 0
        self._num_chunks = 0
        self.refusal: h11.RemoteProtocolError | None = None

    def receive_data(self, data: bytes) -> None:
        if self.their_state is h11.IDLE and len(self._head) <= self._limits.max_header_bytes:
            self._head += data
        super().receive_data(data)

    def next_event(self) -> Any:
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check_head(event)
            elif isinstance(event, h11.Data):
                self._check_body(len(event.data))
            return event
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise

    def _check_head(self, request: h11.Request) -> None:
        limits = self._limits
        head, _, _ = bytes(self._head).partition(b"\r\n\r\n")
        self._head.clear()
        self._num_body_bytes = self._num_chunks = 0
        headers = list(request.headers)
        num_bytes = len(request.target) + sum(len(name) + len(value) + 4 for name, value in headers)
        if request.http_version not in (b"1.0", b"1.1"):
            raise RefusedError("the HTTP version must be 1.0 or 1.1", 505)
        if len(headers) > limits.max_header_count:
            raise RefusedError(f"more than {limits.max_header_count} headers", 431)
        if num_bytes > limits.max_header_bytes:
            raise RefusedError(f"more than {limits.max_header_bytes} bytes of headers", 431)
        names = [name for name, _ in headers]
        # h11 folds equal lengths into one header and lets chunked win over a length: both are how smuggling starts.
        if names.count(b"content-length") > 1 or len(_CONTENT_LENGTH_LINE.findall(head)) > 1:
            raise RefusedError("more than one Content-Length header", 400)
        if b"content-length" in names and b"transfer-encoding" in names:
            raise RefusedError("both Content-Length and Transfer-Encoding", 400)
        for name, value in headers:
            if name == b"content-length" and int(value) > limits.max_body_bytes:
                raise RefusedError(f"the body is larger than {limits.max_body_bytes} bytes", 413)

    def _check_body(self, num_bytes: int) -> None:
        self._num_body_bytes += num_bytes
        self._num_chunks += 1
        if self._num_body_bytes > self._limits.max_body_bytes:
            raise RefusedError(f"the body is larger than {self._limits.max_body_bytes} bytes", 413)
        if self._num_chunks > FREE_CHUNKS + self._num_body_bytes // MIN_BYTES_PER_CHUNK:
            raise RefusedError("the body comes in too many tiny chunks", 400)


class GuardedProtocol(H11Protocol):
    """One connection. Subclasses made by `guarded_protocol` carry the limits, as uvicorn builds protocols itself."""

    limits: ClassVar[HttpLimits]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: GuardedConnection = GuardedConnection(self.limits)
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._is_refused = False
        self._has_data = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._set_deadline(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._clear_write_deadline()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client's side is full: it has `body_timeout_s` to read on, else the connection is reset."""
        super().pause_writing()
        self._clear_write_deadline()
        self._write_deadline = self.loop.call_later(self.limits.body_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._clear_write_deadline()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._has_data = True
        if self.conn.their_state is h11.IDLE and self._deadline is None:
            self._set_deadline(self.limits.header_timeout_s)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.conn.their_state
        super().handle_events()
        after = self.conn.their_state
        if self._is_refused or after is before:
            return
        self._clear_deadline()
        if after is h11.SEND_BODY:
            self._set_deadline(self.limits.body_timeout_s)

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for whatever h11 refuses; `conn.refusal` knows the right status and reason."""
        refusal = self.conn.refusal
        self._refuse(refusal.error_status_hint if refusal else 400, str(refusal) if refusal else msg)

    def _refuse(self, status: int, reason: str) -> None:
        """Answer (if no answer has begun), stop reading for the application, and close after a short linger."""
        self._is_refused = True
        self._clear_deadline()
        self._unset_keepalive_if_required()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            self._write_answer(status, reason)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.close)

    def _write_answer(self, status: int, reason: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = msgspec.json.encode({"error": {"message": reason, "type": kind, "param": None, "code": None}})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")

    def _set_deadline(self, seconds: float) -> None:
        self._clear_deadline()
        self._deadline = self.loop.call_later(seconds, self._on_deadline)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _clear_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._has_data:
            self._refuse(408, "the request did not arrive in time")
        else:
            self.transport.close()


def guarded_protocol(limits: HttpLimits) -> type[GuardedProtocol]:
    """The protocol class to hand to uvicorn as `http`."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})
