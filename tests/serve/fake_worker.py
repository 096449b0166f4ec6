"""The real worker around a timed engine without a model. `seed` of the configuration is the step time in ms.

It gives printable tokens, one per sequence and step, and misbehaves when a prompt starts with one of the ids below.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from powertrain.config import EngineConfig
from powertrain.serve import worker
from powertrain.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    InvalidRequest,
    PowertrainError,
    Request,
    TokenOutput,
)

CRASH, HANG, FAULT, BAD_ADD, STARVE, TOO_LARGE = 300, 301, 302, 303, 304, 305
VOCAB = 320
FIRST_LETTER = 70  # ids from here on are single printable characters of the tiny tokenizer


class FakeEngine:
    def __init__(self, path: Path, config: EngineConfig) -> None:
        if (path / "refuse_to_load").exists():
            raise PowertrainError("the weights are absent; pull the model again")
        if (path / "load_slowly").exists():
            time.sleep(3600)
        self.info = EngineInfo(
            model=path.name,
            vocab_size=VOCAB,
            max_model_len=100_000,
            block_size=16,
            num_blocks=1000,
            max_num_seqs=config.scheduler.max_num_seqs,
            device="fake",
            dtype="none",
            kernels="native kernels: none (this engine is fake)",
        )
        self._step_s = config.seed / 1000
        self._requests: dict[tuple[str, int], Request] = {}
        self._num_done: dict[tuple[str, int], int] = {}
        self._num_steps = 0

    def add(self, request: Request) -> None:
        if request.prompt_token_ids[0] == BAD_ADD:
            raise RuntimeError("cannot take this one")
        if request.prompt_token_ids[0] == TOO_LARGE:
            raise InvalidRequest("the prompt has 1 tokens but the KV cache holds 0", "prompt")
        for index in range(request.sampling.n):
            self._requests[request.request_id, index] = request
            self._num_done[request.request_id, index] = 0

    def abort(self, request_id: str, index: int | None = None) -> None:
        for key in [k for k in self._requests if k[0] == request_id and index in (None, k[1])]:
            del self._requests[key]

    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[TokenOutput]:
        firsts = {request.prompt_token_ids[0] for request in self._requests.values()}
        if CRASH in firsts:
            raise RuntimeError("the step failed")
        if HANG in firsts:
            time.sleep(3600)
        if firsts == {STARVE}:
            return []
        time.sleep(self._step_s)
        self._num_steps += 1
        running = list(self._requests.items())[: self.info.max_num_seqs]
        return [self._token(key, request) for key, request in running if request.prompt_token_ids[0] != STARVE]

    def _token(self, key: tuple[str, int], request: Request) -> TokenOutput:
        output = TokenOutput(request_id=key[0], index=key[1], token_ids=[])
        if request.prompt_token_ids[0] == FAULT:
            output.finish_reason, output.error = FinishReason.ERROR, "the logits are NaN"
            del self._requests[key]
            return output
        position = self._num_done[key]
        output.token_ids = [FIRST_LETTER + (sum(request.prompt_token_ids) + key[1] + position) % 26]
        self._num_done[key] += 1
        if self._num_done[key] == request.sampling.max_tokens:
            output.finish_reason = FinishReason.LENGTH
            del self._requests[key]
        return output

    def stats(self) -> EngineStats:
        limit = self.info.max_num_seqs
        return EngineStats(
            num_running=min(len(self._requests), limit),
            num_waiting=max(len(self._requests) - limit, 0),
            num_blocks=1000,
            num_blocks_in_use=len(self._requests),
            num_steps=self._num_steps,
        )

    def close(self) -> None:
        self._requests.clear()


if __name__ == "__main__":
    sys.exit(worker.main(FakeEngine))
