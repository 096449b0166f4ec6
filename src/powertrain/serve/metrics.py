"""What `/metrics` shows, under vLLM's names, so that public dashboards and gateways read it unchanged.

Gauges and engine counters are copies of the engine's latest snapshot; times are taken in the web process, on the clock
that clients wait by. No label holds a user, a request id or a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from powertrain.serve.messages import Outputs
from powertrain.types import EngineInfo, EngineStats

PREFIX = "vllm:"
ENGINE_LABEL = "0"
LABELS = ("model_name", "engine")

# vLLM's steps, with finer ones below 10 ms: a small model gives a token in one or two.
_TTFT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
TTFT_BUCKETS = (*_TTFT, 40.0, 80.0, 160.0, 640.0, 2560.0)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
PER_TOKEN_BUCKETS = (*_PER_TOKEN, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0)
REQUEST_BUCKETS = (*_REQUEST, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
COUNT_BUCKETS = tuple(float(2**i) for i in range(18))
STEP_BUCKETS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


@dataclass(slots=True)
class SequenceTimes:
    """One sequence's life in seconds of the monotonic clock.

    `first_scheduled` is the start of the step that gave the first token: with chunked prefill, earlier chunks count
    as queueing.
    """

    arrival: float
    first_scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class EngineCollector:
    """Turns the engine's snapshot into metrics whenever Prometheus asks."""

    def __init__(self, labels: tuple[str, str], info: EngineInfo, stats: Callable[[], EngineStats]) -> None:
        self._labels = labels
        self._info = info
        self._stats = stats
        self.num_dropped_messages: Callable[[], int] = lambda: 0

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        usage = stats.num_blocks_in_use / stats.num_blocks if stats.num_blocks else 0.0
        for name, text, value in (
            ("num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("num_requests_waiting", "Sequences waiting for a place.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, text, value in (
            ("num_preemptions", "Sequences put back to be recomputed.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_cache_hits),
            ("prompt_tokens_cached", "Prompt tokens that were not computed again.", stats.prefix_cache_hits),
            ("spec_decode_num_drafts", "Drafts verified.", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Drafted tokens accepted.", stats.accepted_draft_tokens),
            ("bridge_dropped_messages", "Undecodable messages from the engine.", self.num_dropped_messages()),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        labels = (*LABELS, "block_size", "num_gpu_blocks", "dtype", "device")
        config = GaugeMetricFamily(PREFIX + "cache_config_info", "The KV cache's shape.", labels=labels)
        info = self._info
        config.add_metric([*self._labels, str(info.block_size), str(info.num_blocks), info.dtype, info.device], 1)
        yield config


class Metrics:
    """Counters and histograms of one server; `on_step` and the `observe_` methods feed them."""

    def __init__(self, model_name: str, info: EngineInfo, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model_name, ENGINE_LABEL)
        self.engine = EngineCollector(self._labels, info, stats)
        self.registry.register(self.engine)
        self._success = self._counter("request_success", "Sequences that ended.", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Requests refused for lack of room.", "reason")
        histogram = self._histogram
        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self._itl = histogram("inter_token_latency_seconds", "Between two outputs of a sequence.", PER_TOKEN_BUCKETS)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "(Last - first token) / (tokens - 1).", PER_TOKEN_BUCKETS
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Waiting for the engine.", REQUEST_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "Step to first token.", REQUEST_BUCKETS)
        self._decode = histogram("request_decode_time_seconds", "First to last token.", REQUEST_BUCKETS)
        self._inference = histogram("request_inference_time_seconds", "Prefill and decode.", REQUEST_BUCKETS)
        self._prompt = histogram("request_prompt_tokens", "Prompt length.", COUNT_BUCKETS)
        self._generated = histogram("request_generation_tokens", "Tokens per sequence.", COUNT_BUCKETS)
        self._n = histogram("request_params_n", "Sequences per prompt.", (1.0, 2.0, 4.0, 8.0, 16.0))
        self._max_tokens = histogram("request_params_max_tokens", "Token budget.", COUNT_BUCKETS)
        self._step_tokens = histogram("iteration_tokens", "Tokens per step.", STEP_BUCKETS, suffix="_total")

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(PREFIX + name, text, (*LABELS, label), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], suffix: str = "") -> Histogram:
        family = Histogram(PREFIX + name + suffix, text, LABELS, buckets=buckets, registry=self.registry)
        return family.labels(*self._labels)

    def on_step(self, message: Outputs) -> None:
        self._step_tokens.observe(message.stats.step_tokens)

    def observe_rejection(self, reason: str) -> None:
        self._rejections.labels(*self._labels, reason).inc()

    def observe_request(self, num_prompt_tokens: int, n: int, max_tokens: int) -> None:
        self._prompt.observe(num_prompt_tokens)
        self._n.observe(n)
        self._max_tokens.observe(max_tokens)

    def observe_output(self, times: SequenceTimes, step_started_at: float, now: float) -> None:
        """A sequence got tokens: its first ones, or more of them."""
        if times.first_token:
            self._itl.observe(now - times.last_token)
        else:
            times.first_scheduled = max(step_started_at, times.arrival)
            times.first_token = now
            self._ttft.observe(now - times.arrival)
            self._queue.observe(times.first_scheduled - times.arrival)
            self._prefill.observe(now - times.first_scheduled)
        times.last_token = now

    def observe_finish(self, times: SequenceTimes, num_tokens: int, reason: str) -> None:
        """A sequence ended, for whatever reason; only those that ended by themselves enter the histograms."""
        self._success.labels(*self._labels, reason).inc()
        if reason not in ("stop", "length") or not times.first_token:
            return
        self._e2e.observe(times.last_token - times.arrival)
        self._decode.observe(times.last_token - times.first_token)
        self._inference.observe(times.last_token - times.first_scheduled)
        self._generated.observe(num_tokens)
        if num_tokens > 1:
            self._tpot.observe((times.last_token - times.first_token) / (num_tokens - 1))

    def render(self) -> bytes:
        return generate_latest(self.registry)
