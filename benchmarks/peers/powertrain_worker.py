"""Powertrain as a contender: MODEL THREADS OPTIONS (a JSON object of further engine options).

Drives the engine in this process, greedy and without prefix cache; a step is one `Engine.step()`, sampling included.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from wire import random_prompts, serve

from powertrain import __version__
from powertrain.checkpoint.hub import resolve_model
from powertrain.config import EngineConfig
from powertrain.engine.core import Engine
from powertrain.types import FinishReason, PowertrainError, Request, SamplingParams

MAX_SEQUENCES = 64
KV_BLOCKS = 2048


class Powertrain:
    def __init__(self, model: str, num_threads: int, options: dict[str, Any]) -> None:
        settings = {"device": "cpu", "threads": num_threads, "enable_prefix_caching": False}
        settings |= {"max_num_seqs": MAX_SEQUENCES, "num_blocks": KV_BLOCKS}
        self.options = {**settings, **options}
        self.engine = Engine.from_checkpoint(resolve_model(model), EngineConfig.from_options(**self.options))
        self.batch = 0

    def about(self) -> dict[str, Any]:
        decoder = self.engine.model
        return {
            "version": f"powertrain {__version__}",
            "settings": self.options,
            "format": "+".join(decoder.formats()),
            "weight_bytes": decoder.step_bytes(),
            "kv_bytes_per_token": decoder.kv_bytes_per_token(),
        }

    def choices(self, batch: int) -> dict[str, Any]:
        return {"choices": [{}]}

    def open(self, batch: int, prompt: int, room: int, settings: dict[str, Any]) -> dict[str, Any]:
        prompts = random_prompts(batch, prompt, self.engine.info.vocab_size)
        start = time.perf_counter()
        self._add(prompts, room + 1)
        begun: set[str] = set()
        while len(begun) < batch:
            begun |= self._step().keys()
        return {"seconds": time.perf_counter() - start}

    def step(self, count: int) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(count):
            if len(self._step()) != self.batch:
                raise PowertrainError(f"a step gave tokens to fewer than {self.batch} sequences")
        return {"seconds": time.perf_counter() - start}

    def run(self, batch: int, prompt: int, output: int, settings: dict[str, Any]) -> dict[str, Any]:
        prompts = random_prompts(batch, prompt, self.engine.info.vocab_size)
        num_tokens = 0
        start = time.perf_counter()
        self._add(prompts, output)
        while self.engine.has_work():
            num_tokens += sum(self._step().values())
        seconds = time.perf_counter() - start
        if num_tokens != batch * output:
            raise PowertrainError(f"the engine made {num_tokens} tokens, {batch * output} were asked for")
        return {"seconds": seconds}

    def _add(self, prompts: list[list[int]], num_tokens: int) -> None:
        self.batch = len(prompts)
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for row, ids in enumerate(prompts):
            self.engine.add(Request(request_id=str(row), prompt_token_ids=tuple(ids), sampling=sampling))

    def _step(self) -> dict[str, int]:
        """Requests that got tokens, and how many."""
        outputs = self.engine.step()
        for output in outputs:
            if output.finish_reason is FinishReason.ERROR:
                raise PowertrainError(f"the engine failed: {output.error}")
        return {output.request_id: len(output.token_ids) for output in outputs if output.token_ids}

    def close(self) -> dict[str, Any]:
        for row in range(self.batch):
            self.engine.abort(str(row))
        while self.engine.has_work():
            self.engine.step()
        return {}

    def logits(self, ids: str, out: str) -> dict[str, Any]:
        np.save(out, self.engine.model.score(torch.from_numpy(np.load(ids))).numpy())
        return {}


if __name__ == "__main__":
    name, threads, extra = sys.argv[1:]
    serve(Powertrain, name, int(threads), json.loads(extra))
