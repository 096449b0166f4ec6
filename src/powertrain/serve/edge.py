"""What every request passes first: its id, its key, and the promise that no failure leaves as anything but JSON."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from powertrain.serve.errors import ApiError, error_response

logger = logging.getLogger("powertrain.serve")

OPEN_PATHS = frozenset({"/health", "/live", "/metrics"})
"""Probes and scrapers carry no key; everything else needs one, unknown paths too."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class KeyCheck:
    """Bearer keys, compared in constant time: by digest, and with every key whichever matches."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return not matches or (scheme.lower() == "bearer" and any(matches))


class Edge:
    """ASGI middleware: echoes or makes `x-request-id`, checks the key, turns an unforeseen exception into a 500."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] = ()) -> None:
        self._app = app
        self._keys = KeyCheck(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if scope["path"] not in OPEN_PATHS and not self._keys.allows(headers):
            error = ApiError(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", request_id)
            if is_started:
                raise
            await error_response(error)(scope, receive, send_with_id)
