"""The HTTP application: routes, probes and error bodies. Imports no torch; the engine is on the bridge's other side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from powertrain import __version__
from powertrain.config import ServerConfig
from powertrain.serve.edge import Edge
from powertrain.serve.endpoints import Endpoints
from powertrain.serve.errors import ApiError, error_response, json_response, unavailable
from powertrain.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from powertrain.serve.service import TextService
from powertrain.types import PowertrainError

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CLIENT_CLOSED = 499


def create_app(
    service: TextService, model_name: str, config: ServerConfig, sampling_defaults: Mapping[str, Any]
) -> FastAPI:
    """The application of one engine that is ready."""
    app = FastAPI(title="powertrain", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Edge, keys=config.api_keys)
    for kind in (PowertrainError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, _on_error)
    endpoints = Endpoints(service, model_name, sampling_defaults)
    for path, handler, body in (
        ("/v1/completions", endpoints.completions, CompletionBody),
        ("/v1/chat/completions", endpoints.chat, ChatBody),
        ("/tokenize", endpoints.tokenize, TokenizeBody),
        ("/detokenize", endpoints.detokenize, DetokenizeBody),
    ):
        schema = {"requestBody": {"content": {"application/json": {"schema": body.model_json_schema()}}}}
        app.add_api_route(path, _plain(handler), methods=["POST"], response_class=Response, openapi_extra=schema)
    _add_model_routes(app, service, model_name, endpoints)
    _add_probes(app, service, config)
    return app


def _plain(handler: Any) -> Any:
    """A route that takes the raw request: bodies are read by our own strict parser."""

    async def route(request: Request) -> Response:
        response: Response = await handler(request)
        return response

    route.__name__ = handler.__name__
    return route


def _add_model_routes(app: FastAPI, service: TextService, model_name: str, endpoints: Endpoints) -> None:
    card = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "powertrain",
        "root": service.engine.info.model,
        "max_model_len": service.engine.info.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card]})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        endpoints.check_model(model_id)
        return json_response(card)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})


def _add_probes(app: FastAPI, service: TextService, config: ServerConfig) -> None:
    @app.get("/live")
    async def live() -> Response:
        return json_response({"status": "alive"})

    @app.get("/health")
    async def health() -> Response:
        """Ready means getting somewhere: not draining, engine alive, and steps counted up while there is work."""
        engine = service.engine
        if engine.error is not None:
            raise unavailable(f"the engine is gone: {engine.error}", "engine_dead")
        if service.is_draining:
            raise unavailable("the server is shutting down", "draining")
        if engine.is_stalled(config.progress_timeout_s):
            raise unavailable(f"the engine has made no progress for {config.progress_timeout_s:g} s", "stalled")
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), headers={"content-type": METRICS_TYPE})


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED)  # nobody reads it
    if isinstance(error, HTTPException):
        texts = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
        return error_response(
            ApiError(error.status_code, texts.get(error.status_code, str(error.detail)), headers=error.headers)
        )
    return error_response(error)
