"""A list of requests run to their ends by an engine made for them: what judges and trainers ask of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from powertrain.config import EngineConfig
from powertrain.engine.core import Engine
from powertrain.model.decoder import Decoder
from powertrain.types import PowertrainError, Request

MAX_BATCH = 32
BLOCK_SIZE = 16

Watch = Callable[[int, int], None]
"""Called after each step as (tokens written, requests done)."""


def run_offline(
    decoder: Decoder, requests: Sequence[Request], max_model_len: int, *, watch: Watch | None = None
) -> list[list[int]]:
    """The tokens of each request (`n` = 1), in their order. They depend on the decoder and the requests alone.

    As little engine as does it: at most `MAX_BATCH` sequences at a time and a pool that just holds them. Raises
    `PowertrainError` where a request fails.
    """
    batch = min(MAX_BATCH, len(requests))
    config = EngineConfig.from_options(
        device=decoder.device.type,
        dtype=str(decoder.dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        max_num_seqs=batch,
        block_size=BLOCK_SIZE,
        num_blocks=batch * -(-max_model_len // BLOCK_SIZE),
    )
    engine = Engine(decoder, config, "offline")
    written: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    num_done = 0
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise PowertrainError(f"request {output.request_id} failed: {output.error}")
            written[output.request_id].extend(output.token_ids)
            num_done += output.finish_reason is not None
        if watch is not None:
            watch(sum(map(len, written.values())), num_done)
    return list(written.values())
