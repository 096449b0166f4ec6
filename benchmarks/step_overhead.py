"""What a decode step costs besides the model: schedule, inputs, sampling, commit, outputs, the message to the server.

The model is a stand-in of the default model's sizes that always gives the same tokens. Its forward pass reads as many
bytes as the default model's weights, so that the engine's own Python finds the caches as cold as in real steps; its
time is taken off. Whole steps are timed with clocks on the model alone; the parts in further steps with all clocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import parser, write

from powertrain.config import EngineConfig
from powertrain.engine.core import Engine
from powertrain.kernels.attention import AttentionStep
from powertrain.measure import record
from powertrain.model.decoder import Decoder, KVCache
from powertrain.model.families import ModelConfig
from powertrain.serve import messages
from powertrain.types import Request, SamplingParams

SMOLLM2 = ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    windows=(None,) * 30,
    ties_embeddings=True,
)


WEIGHT_BYTES = 96_400_000
"""What a step of the default model reads."""


class NullDecoder(Decoder):
    """Computes nothing: the hidden state is always the same, and so are the largest logits."""

    def __init__(self, config: ModelConfig) -> None:
        norm: Any = SimpleNamespace(weight=torch.ones(config.hidden_size))
        none: Any = None
        super().__init__(config, none, [], norm, none, none)
        self._weights = torch.ones(WEIGHT_BYTES // 4)
        self._hidden = torch.zeros(4096, config.hidden_size)
        self._values = torch.arange(256.0, 0.0, -1.0).expand(256, 256).contiguous()
        self._ids = torch.arange(1000, 1256).expand(256, 256).contiguous()
        self._finite = torch.ones(256, dtype=torch.bool)

    def forward(self, token_ids: torch.Tensor, step: AttentionStep, cache: KVCache) -> torch.Tensor:
        self._weights.sum()
        # what a native decoder reads of a step
        np.array(step.query_lens, dtype=np.int32), np.array(step.context_lens, dtype=np.int32)
        return self._hidden[: token_ids.shape[0]]

    def top_logits(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = hidden.shape[0]
        return self._values[:rows, :k], self._ids[:rows, :k], self._finite[:rows]


class Clock:
    """Seconds of each wrapped call, without those of the wrapped calls inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._inner = [0.0]

    def wrap(self, owner: Any, method: str, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds.setdefault(name, []).append(spent - self._inner.pop())
                self._inner[-1] += spent

        setattr(owner, method, timed)


def ready_engine(batch: int, num_steps: int, prompt: int, sampling: dict[str, Any]) -> Engine:
    """An engine whose `batch` sequences have all left their prompts behind."""
    config = EngineConfig.from_options(device="cpu", max_num_seqs=batch, num_blocks=batch * (-(-8192 // 16) + 1))
    engine = Engine(NullDecoder(SMOLLM2), config, "null")
    for number in range(batch):
        ids = tuple((7 * number + at) % 49000 for at in range(prompt))
        params = SamplingParams(max_tokens=3 * num_steps + 100, ignore_eos=True, seed=number, **sampling)
        engine.add(Request(request_id=f"request-{number}", prompt_token_ids=ids, sampling=params))
    while engine.scheduler.waiting or any(sequence.num_output < 3 for sequence in engine.scheduler.running):
        engine.step()
    return engine


def measure(batch: int, num_steps: int, prompt: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of whole steps, of their parts, and of the server's share: encode and decode of the message."""
    engine = ready_engine(batch, num_steps, prompt, sampling)
    clock = Clock()
    clock.wrap(engine.model, "forward", "model")
    clock.wrap(engine.model, "top_logits", "top_logits")
    wholes = [_seconds(engine.step) for _ in range(num_steps)]
    model = map(sum, zip(clock.seconds["model"], clock.seconds["top_logits"], strict=True))
    times = [whole - inside for whole, inside in zip(wholes, model, strict=True)]
    clock.seconds.clear()
    clock.wrap(engine, "step", "step itself")
    clock.wrap(engine.scheduler, "schedule", "schedule")
    clock.wrap(engine.runner, "execute", "execute itself")
    clock.wrap(engine.runner, "_inputs", "inputs")
    clock.wrap(engine.runner, "_sample", "sample")
    clock.wrap(engine, "_commit", "outputs")
    clock.wrap(engine.scheduler, "commit", "commit")
    outputs = []
    for _ in range(num_steps):
        outputs.append(engine.step())
    inbox = messages.web_inbox()
    made = [messages.Outputs(given, engine.stats(), 0.0) for given in outputs]
    encode = [_seconds(lambda message=message: messages.encode(message)) for message in made]
    frames = [messages.encode(message) for message in made]
    decode = [_seconds(lambda frame=frame: inbox.decode(frame)) for frame in frames]
    return {
        "name": "greedy" if not sampling["temperature"] else "top_k",
        "batch": batch,
        "prompt": prompt,
        "step_us": 1e6 * statistics.median(times),
        "step_min_us": 1e6 * min(times),
        "parts_us": {name: 1e6 * statistics.median(seconds) for name, seconds in clock.seconds.items()},
        "encode_us": 1e6 * statistics.median(encode),
        "decode_us": 1e6 * statistics.median(decode),
        "message_bytes": statistics.median(len(frame) for frame in frames),
    }


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    arguments = parser(__doc__, "step_overhead.json")
    arguments.add_argument("--batch", default="1,8,32")
    arguments.add_argument("--prompt", type=int, default=128)
    arguments.add_argument("--steps", type=int, default=300)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    results = []
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95}):
        for batch in map(int, given.batch.split(",")):
            row = measure(batch, given.steps, given.prompt, sampling)
            results.append(row)
            print(
                f"{row['name']}, batch {batch}: step {row['step_us']:.0f} us (least {row['step_min_us']:.0f})", end="; "
            )
            print(f"message {row['encode_us']:.1f} + {row['decode_us']:.1f} us, {row['message_bytes']:.0f} bytes")
            print("   " + ", ".join(f"{name} {us:.1f}" for name, us in row["parts_us"].items()))
    config = {"steps": given.steps, "threads": 1}
    write(given.json, record.new_record("step_overhead", git=given.git, model="null", config=config, results=results))


if __name__ == "__main__":
    main()
