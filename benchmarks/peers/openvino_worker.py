"""OpenVINO GenAI as a contender: FOLDER THREADS.

A batch runs in a ContinuousBatchingPipeline, the interface OpenVINO has for many requests at once, greedy and without
prefix cache; a step is one `step()` of it. What can be chosen: dynamic quantization of activations as the plugin likes
it, or none. Logits come from optimum-intel's model over the same exported folder.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]
from wire import random_prompts, serve

CACHE_GB = 1
MAX_SEQUENCES = 64
MAX_BATCHED_TOKENS = 2048
CHOICES: tuple[dict[str, Any], ...] = ({}, {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})


class OpenVINO:
    def __init__(self, folder: str, num_threads: int) -> None:
        self.folder = folder
        self.properties = {"INFERENCE_NUM_THREADS": num_threads, "PERFORMANCE_HINT": "LATENCY"}
        self.config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.pipelines: dict[str, Any] = {}
        self.pipeline = self._pipeline(CHOICES[0])
        self.handles: list[Any] = []
        self.scorer: Any = None

    def _pipeline(self, settings: dict[str, Any]) -> Any:
        key = json.dumps(settings)
        if key not in self.pipelines:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.cache_size = CACHE_GB
            scheduler.max_num_seqs = MAX_SEQUENCES
            scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
            scheduler.enable_prefix_caching = False
            scheduler.dynamic_split_fuse = True
            properties = {**self.properties, **settings}
            self.pipelines[key] = openvino_genai.ContinuousBatchingPipeline(self.folder, scheduler, "CPU", properties)
        return self.pipelines[key]

    def about(self) -> dict[str, Any]:
        kv_cache = self._kv_cache()
        values = self.config["head_dim"] * self.config["num_key_value_heads"] * self.config["num_hidden_layers"] * 2
        return {
            "version": f"openvino-genai {metadata.version('openvino-genai')}",
            "settings": {**self.properties, "max_num_batched_tokens": MAX_BATCHED_TOKENS, "kv_cache": kv_cache},
            "weight_bytes": (Path(self.folder) / "openvino_model.bin").stat().st_size,
            "kv_bytes_per_token": values * {"u8": 1, "f32": 4}.get(kv_cache, 2),
        }

    def _kv_cache(self) -> str:
        """The plugin's choice for this machine, as a compiled copy of the model states it."""
        core = openvino.Core()
        model = core.read_model(str(Path(self.folder) / "openvino_model.xml"))
        element = core.compile_model(model, "CPU", self.properties).get_property("KV_CACHE_PRECISION")
        return str(element.get_type_name())

    def choices(self, batch: int) -> dict[str, Any]:
        return {"choices": list(CHOICES)}

    def open(self, batch: int, prompt: int, room: int, settings: dict[str, Any]) -> dict[str, Any]:
        self.pipeline = self._pipeline(settings)
        tensors = self._prompts(batch, prompt)
        start = time.perf_counter()
        self._add(tensors, room + 1)
        while not all(handle.can_read() for handle in self.handles):
            self.pipeline.step()
        return {"seconds": time.perf_counter() - start}

    def step(self, count: int) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(count):
            self.pipeline.step()
        return {"seconds": time.perf_counter() - start}

    def close(self) -> dict[str, Any]:
        for handle in self.handles:
            handle.cancel()
        self._finish()
        return {}

    def run(self, batch: int, prompt: int, output: int, settings: dict[str, Any]) -> dict[str, Any]:
        self.pipeline = self._pipeline(settings)
        tensors = self._prompts(batch, prompt)
        start = time.perf_counter()
        self._add(tensors, output)
        handles = self.handles
        self._finish()
        seconds = time.perf_counter() - start
        tokens = [_tokens_so_far(handle) for handle in handles]
        if tokens != [output] * batch:
            raise RuntimeError(f"OpenVINO made {tokens} tokens, {output} each were asked for")
        return {"seconds": seconds}

    def _prompts(self, batch: int, prompt: int) -> list[Any]:
        prompts = random_prompts(batch, prompt, self.config["vocab_size"])
        return [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]

    def _add(self, tensors: list[Any], num_tokens: int) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        self.handles = [self.pipeline.add_request(row, ids, config) for row, ids in enumerate(tensors)]

    def _finish(self) -> None:
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        self.handles = []

    def logits(self, ids: str, out: str) -> dict[str, Any]:
        import torch
        from optimum.intel import OVModelForCausalLM  # type: ignore[import-not-found]

        if self.scorer is None:
            self.scorer = OVModelForCausalLM.from_pretrained(self.folder, device="CPU", ov_config=self.properties)
        tokens = torch.from_numpy(np.load(ids))[None]
        found = self.scorer(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        np.save(out, found[0].float().numpy())
        return {}


def _tokens_so_far(handle: Any) -> int:
    count = 0
    while handle.can_read():  # `read` without this would wait for more
        count += sum(len(output.generated_ids) for output in handle.read().values())
    return count


if __name__ == "__main__":
    model, threads = sys.argv[1:]
    serve(OpenVINO, model, int(threads))
