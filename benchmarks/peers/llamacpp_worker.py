"""llama.cpp as a contender, through the C API that llama-cpp-python exposes: FILE THREADS.

What can be chosen per batch: flash attention, and one KV buffer for all sequences or one each. A step is one
`llama_decode` of a batch with one token a sequence; choosing the token is not in its time, which favours llama.cpp.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np
from wire import random_prompts, serve

BATCH = 2048
UBATCH = 512
Item = tuple[int, int, int, bool]
"""Token id, position, sequence, whether its logits are wanted."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(level: int, text: bytes, user_data: int) -> None:
    pass


class LlamaCpp:
    def __init__(self, path: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_say_nothing, None)
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.num_threads = num_threads
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.context: Any = None
        self.num_sequences = 0
        self.position = 0

    def about(self) -> dict[str, Any]:
        settings = {"threads": self.num_threads, "n_batch": BATCH, "n_ubatch": UBATCH, "kv_cache": "f16"}
        model = self.model
        head_dim = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
        num_values = 2 * llama_cpp.llama_model_n_layer(model) * llama_cpp.llama_model_n_head_kv(model) * head_dim
        return {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "system": llama_cpp.llama_print_system_info().decode().strip(),
            "settings": settings,
            "kv_bytes_per_token": 2 * num_values,
        }

    def choices(self, batch: int) -> dict[str, Any]:
        unified = (True,) if batch == 1 else (True, False)
        return {"choices": [{"flash_attention": f, "kv_unified": u} for f in (True, False) for u in unified]}

    def open(self, batch: int, prompt: int, room: int, settings: dict[str, Any]) -> dict[str, Any]:
        self.context = self._new_context(batch, batch * _padded(prompt + room + 1), **settings)
        self.num_sequences, self.position = batch, prompt
        prompts = random_prompts(batch, prompt, self.vocab_size)
        items = [(token, at, row, at == prompt - 1) for row, ids in enumerate(prompts) for at, token in enumerate(ids)]
        start = time.perf_counter()
        self._decode(items)
        return {"seconds": time.perf_counter() - start}

    def step(self, count: int) -> dict[str, Any]:
        rows = random_prompts(self.num_sequences, count, self.vocab_size)
        start = time.perf_counter()
        for number in range(count):
            self._decode([(ids[number], self.position, row, True) for row, ids in enumerate(rows)])
            self.position += 1
        return {"seconds": time.perf_counter() - start}

    def close(self) -> dict[str, Any]:
        llama_cpp.llama_free(self.context)
        self.context = None
        return {}

    def run(self, batch: int, prompt: int, output: int, settings: dict[str, Any]) -> dict[str, Any]:
        seconds = self.open(batch, prompt, output, settings)["seconds"] + self.step(output - 1)["seconds"]
        self.close()
        return {"seconds": seconds}

    def logits(self, ids: str, out: str) -> dict[str, Any]:
        tokens = np.load(ids).tolist()
        self.context = self._new_context(1, _padded(len(tokens)), flash_attention=True, kv_unified=True)
        parts = []
        for at, count in _pieces(len(tokens), UBATCH):
            self._decode([(token, at + index, 0, True) for index, token in enumerate(tokens[at : at + count])])
            rows = llama_cpp.llama_get_logits(self.context)
            parts.append(np.ctypeslib.as_array(rows, (count, self.vocab_size)).copy())
        np.save(out, np.concatenate(parts))
        return self.close()

    def _new_context(self, num_sequences: int, num_tokens: int, *, flash_attention: bool, kv_unified: bool) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = num_tokens
        parameters.n_batch, parameters.n_ubatch = BATCH, UBATCH
        parameters.n_threads = parameters.n_threads_batch = self.num_threads
        parameters.n_seq_max = num_sequences
        parameters.kv_unified = kv_unified
        parameters.flash_attn_type = int(flash_attention)
        context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not context:
            raise MemoryError(f"llama.cpp made no context for {num_tokens} tokens")
        return context

    def _decode(self, items: Sequence[Item]) -> None:
        batch = self.batch
        for at, count in _pieces(len(items), BATCH):
            batch.n_tokens = count
            for index, (token, position, row, has_logits) in enumerate(items[at : at + count]):
                batch.token[index] = token
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = row
                batch.logits[index] = has_logits
            status = llama_cpp.llama_decode(self.context, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")


def _padded(num_tokens: int) -> int:
    """llama.cpp divides the context among separate sequences and rounds each share to multiples of 256."""
    return -(-num_tokens // 256) * 256


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(0, total, size):
        yield at, min(size, total - at)


if __name__ == "__main__":
    file, threads = sys.argv[1:]
    serve(LlamaCpp, file, int(threads))
