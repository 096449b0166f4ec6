"""What is measured, how contenders take turns, and what their rounds say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

from peers.contender import Worker

TRIAL_STEPS = 6
WARM_UP_PROMPT = 16
SPARE = 8
"""Room beyond the timed tokens: where prompts fill several steps, the first sequences are ahead when `step` starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`batch` sequences of `prompt` ids in.

    decode: time of `output` steps after the first token, prompts afresh each round. context: the same for a prompt too
    long for that: computed once, each round goes on where the last one ended. prefill: time to the first token.
    requests: from handing all prompts in to the last of `output` tokens of each.
    """

    name: str
    kind: Literal["decode", "context", "prefill", "requests"]
    batch: int
    prompt: int
    output: int

    @property
    def num_tokens(self) -> int:
        """The tokens whose rate is stated."""
        return self.batch * (self.prompt if self.kind == "prefill" else self.output)

    def bytes_per_step(self, weight_bytes: int, kv_bytes_per_token: int, rounds: int) -> int | None:
        """Bytes one decode step reads, the KV cache at the mean length it has over all rounds; None for prefill."""
        if self.kind == "prefill":
            return None
        num_timed = self.output * rounds if self.kind == "context" else self.output
        return round(weight_bytes + self.batch * kv_bytes_per_token * (self.prompt + num_timed / 2))


def _decode(batch: int, output: int) -> Work:
    return Work(name=f"decode-{batch}", kind="decode", batch=batch, prompt=128, output=output)


WORKS = (
    *(_decode(batch, output) for batch, output in ((1, 64), (4, 64), (8, 48), (16, 32), (32, 32))),
    Work(name="prefill-128", kind="prefill", batch=1, prompt=128, output=1),
    Work(name="prefill-512", kind="prefill", batch=1, prompt=512, output=1),
    Work(name="context-4096", kind="context", batch=1, prompt=4096, output=32),
    Work(name="requests-16", kind="requests", batch=16, prompt=128, output=128),
)


def quick(work: Work) -> Work:
    """The same with few tokens, to see that everything runs."""
    return replace(work, output=min(work.output, 8), prompt=min(work.prompt, 512))


Turn = Callable[[], float]
"""Do the work once; returns tokens per second."""


def turn_of(stack: ExitStack, worker: Worker, work: Work, settings: Mapping[str, Any], rounds: int) -> Turn:
    """What `worker` does in each round. A batch that stays open over the rounds is closed with `stack`."""
    shape = {"batch": work.batch, "prompt": work.prompt, "settings": settings}

    def seconds_of(do: str, **arguments: Any) -> float:
        return float(worker.ask(do, **arguments)["seconds"])

    def decode() -> float:
        worker.ask("open", room=work.output + SPARE, **shape)
        seconds = seconds_of("step", count=work.output)
        worker.ask("close")
        return work.num_tokens / seconds

    def prefill() -> float:
        seconds = seconds_of("open", room=SPARE, **shape)
        worker.ask("close")
        return work.num_tokens / seconds

    def context() -> float:
        return work.num_tokens / seconds_of("step", count=work.output)

    def requests() -> float:
        return work.num_tokens / seconds_of("run", output=work.output, **shape)

    if work.kind == "context":
        worker.ask("open", room=work.output * rounds + SPARE, **shape)
        stack.callback(worker.ask, "close")
    return {"decode": decode, "prefill": prefill, "context": context, "requests": requests}[work.kind]


def fastest_settings(worker: Worker, work: Work) -> dict[str, Any]:
    """Of the settings a contender offers for such a batch, those with which a short trial of `work` is fastest."""
    choices: list[dict[str, Any]] = worker.ask("choices", batch=work.batch)["choices"]
    if len(choices) == 1:
        return choices[0]

    def trial(settings: dict[str, Any], prompt: int) -> float:
        first = worker.ask("open", batch=work.batch, prompt=prompt, room=2 * TRIAL_STEPS + SPARE, settings=settings)
        steps = min(float(worker.ask("step", count=TRIAL_STEPS)["seconds"]) for _ in range(2))
        worker.ask("close")
        if work.kind in ("decode", "context"):
            return steps
        rest = steps * work.output / TRIAL_STEPS if work.kind == "requests" else 0.0
        return float(first["seconds"]) + rest

    for settings in choices:  # the first use of anything is slow, and a short prompt shows that as well as a long one
        trial(settings, WARM_UP_PROMPT)
    return min(choices, key=lambda settings: trial(settings, work.prompt))


def take_turns(turns: Mapping[str, Turn], rounds: int, before_round: Callable[[], None]) -> dict[str, list[float]]:
    """Each turn once a round, so that a machine's drift meets all; who begins moves on from round to round."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        before_round()
        for name in _from(list(turns), number):
            rates[name].append(turns[name]())
    return rates


def _from(names: Sequence[str], first: int) -> Iterator[str]:
    for at in range(len(names)):
        yield names[(first + at) % len(names)]


def ratios_to_best(rates: Mapping[str, Sequence[float]], name: str, peers: Sequence[str]) -> list[float]:
    """Per round: the rate of `name` over the best of `peers` in that very round."""
    best = [max(round_rates) for round_rates in zip(*(rates[peer] for peer in peers), strict=True)]
    return [own / other for own, other in zip(rates[name], best, strict=True)]


def best_peer(rates: Mapping[str, Sequence[float]], peers: Sequence[str]) -> str:
    """The peer with the highest median."""
    return max(peers, key=lambda peer: statistics.median(rates[peer]))
