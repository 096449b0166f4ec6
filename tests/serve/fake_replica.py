"""A replica without a model: streams numbered tokens, counts what it sees, misbehaves on command. Prints its port."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

state: dict[str, Any] = {
    **{"requests": 0, "active": 0, "abandoned": 0, "tokens": 0, "authorization": None, "bodies": []},
    **{"health": 200, "answer": 200, "is_stuck": False, "is_reset_before_answer": False},
}


async def complete(request: Request) -> Response:
    body = json.loads(await request.body())
    state["requests"] += 1
    state["authorization"] = request.headers.get("authorization")
    state["bodies"].append(body)
    if state["answer"] != 200:
        return JSONResponse({"error": {"message": "busy"}}, state["answer"], {"retry-after": "7"})
    if state["is_reset_before_answer"]:
        raise RuntimeError("breaks off")
    num_tokens, delay = body.get("max_tokens", 4), body.get("delay", 0.0)
    if body.get("stream"):
        return StreamingResponse(events(num_tokens, delay), media_type="text/event-stream")
    state["active"] += 1
    try:
        for _ in range(num_tokens):
            if await request.is_disconnected():
                state["abandoned"] += 1
                return Response()
            await token(delay)
    finally:
        state["active"] -= 1
    return JSONResponse({"text": "x" * num_tokens, "port": port})


async def token(delay: float) -> None:
    await asyncio.sleep(delay)
    while state["is_stuck"]:
        await asyncio.sleep(0.02)
    state["tokens"] += 1


async def events(num_tokens: int, delay: float) -> AsyncIterator[bytes]:
    state["active"] += 1
    is_done = False
    try:
        for number in range(num_tokens):
            await token(delay)
            event = f"data: {json.dumps({'token': number, 'port': port})}\n\n".encode()
            # Torn events: half of one at the end of each piece, so that a break falls inside an event.
            yield event[: len(event) // 2]
            yield event[len(event) // 2 :]
            yield b"data: "
            yield b'{"empty": true}\n\n'
        yield b"data: [DONE]\n\n"
        is_done = True
    finally:
        state["active"] -= 1
        state["abandoned"] += not is_done


async def health(_request: Request) -> Response:
    return PlainTextResponse("", state["health"])


async def metrics(_request: Request) -> Response:
    return PlainTextResponse(
        f'# HELP vllm:num_requests_running x\nvllm:num_requests_running{{model_name="m"}} {float(state["active"])}\n'
        f'vllm:prompt_tokens_total{{model_name="m"}} 5.0\nvllm:generation_tokens_total {float(state["tokens"])}\n'
    )


async def models(_request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model"}, {"id": f"only-{port}"}]})


async def control(request: Request) -> Response:
    state.update(json.loads(await request.body()))
    return JSONResponse(state)


routes = [
    Route("/v1/chat/completions", complete, methods=["POST"]),
    Route("/v1/completions", complete, methods=["POST"]),
    Route("/health", health),
    Route("/metrics", metrics),
    Route("/v1/models", models),
    Route("/control", control, methods=["POST"]),
]


async def gone(_request: Request, _error: Exception) -> Response:
    return Response()


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    print(port, flush=True)
    app = Starlette(routes=routes, exception_handlers={ClientDisconnect: gone})
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listener])
