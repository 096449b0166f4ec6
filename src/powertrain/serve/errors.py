"""Failures as OpenAI error bodies: one table from our exceptions to status, type and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from powertrain.serve.bridge import EngineDeadError, EngineFaultError
from powertrain.types import InvalidRequest, PowertrainError

RETRY_AFTER_S = 1


class ApiError(PowertrainError):
    """An answer other than 200, with everything its body and headers need."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unavailable(message: str, code: str) -> ApiError:
    """503 that asks the client to come back."""
    return ApiError(503, message, code=code, headers={"retry-after": str(RETRY_AFTER_S)})


def api_error(error: Exception) -> ApiError:
    """The answer for any exception; the text of one we did not foresee stays in the log."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, error.message, param=error.param)
        case EngineDeadError():
            return unavailable(f"the engine is gone: {error}", "engine_dead")
        case EngineFaultError():
            return ApiError(500, str(error), code="engine_fault")
        case _:
            return ApiError(500, "internal error; the server's log has the details", code="internal_error")


def error_response(error: Exception) -> Response:
    answer = api_error(error)
    return json_response(answer.body(), answer.status, answer.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers=dict(headers or {}), media_type="application/json")
