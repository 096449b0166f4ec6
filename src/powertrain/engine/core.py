"""The engine: add requests, abort them, step. Token ids in, token ids out."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from powertrain.config import EngineConfig, resolve
from powertrain.engine.blocks import BlockPool
from powertrain.engine.gpu_runner import GpuRunner, Launched, is_plain
from powertrain.engine.memory import GRAPHS, POOL, STEP, num_cache_blocks
from powertrain.engine.runner import Runner, StepResult
from powertrain.engine.scheduler import Plan, Scheduler, Sequence
from powertrain.engine.speculate import NgramProposer
from powertrain.kernels import gpu_provider, native
from powertrain.kernels.op import recorded_choices
from powertrain.model.decoder import Decoder
from powertrain.model.gpu_memory import must_fit, out_of_memory
from powertrain.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    InvalidRequest,
    PowertrainError,
    Request,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching (Orca, Yu et al. 2022) over a paged cache. One thread calls it; it does no I/O.

    `add` refuses what can never run (`InvalidRequest`); `step` computes one plan and returns what it gave; a fault in
    a step ends the sequences of that step with `FinishReason.ERROR` and leaves the engine alive, unless the device
    itself is lost (`torch.AcceleratorError`).
    """

    def __init__(self, model: Decoder, config: EngineConfig, name: str) -> None:
        """`config` is as the user gave it and resolved here; `model` must live on its device in its dtype."""
        config = resolve(config, has_cuda=model.device.type == "cuda", model_dtype=model.config.dtype)
        model = model.with_kv_cache_dtype(config.cache.kv_cache_dtype)
        block_size = config.cache.block_size
        max_model_len = config.max_model_len or model.config.max_position
        if max_model_len > model.config.max_position:
            raise PowertrainError(
                f"max_model_len {max_model_len} exceeds the {model.config.max_position} positions of the model"
            )
        num_blocks = config.cache.num_blocks or num_cache_blocks(model, config, max_model_len)
        max_model_len = min(max_model_len, num_blocks * block_size)
        spec = config.speculation
        self.config = config
        self.model = model
        self.pool = BlockPool(num_blocks, config.cache.enable_prefix_caching)
        self.scheduler = Scheduler(
            config.scheduler,
            self.pool,
            block_size,
            NgramProposer(spec) if spec else None,
            spec.num_speculative_tokens if spec else 0,
        )
        with must_fit(*POOL):
            self.runner = _runner(model, num_blocks, config, max_model_len)
        self._in_flight: tuple[Plan, Launched] | None = None
        self.info = EngineInfo(
            model=name,
            vocab_size=model.config.vocab_size,
            max_model_len=max_model_len,
            block_size=block_size,
            num_blocks=num_blocks,
            max_num_seqs=config.scheduler.max_num_seqs,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            kernels=kernels_text(model, config),
        )
        self._seeds = random.Random(config.seed)
        self._stats = EngineStats(num_blocks=num_blocks)
        self._prompt_logprobs: dict[Sequence, list[TokenLogprob]] = {}

    @classmethod
    def from_checkpoint(
        cls, path: Path, config: EngineConfig, on_progress: Callable[[int, int], None] | None = None
    ) -> Engine:
        """Load a model folder or GGUF file and make it ready. `on_progress(done, total)` counts layers."""
        from powertrain.checkpoint.load import load_decoder
        from powertrain.checkpoint.source import open_checkpoint

        start = time.perf_counter()
        checkpoint = open_checkpoint(path)
        model_dtype = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
        settled = resolve(config, has_cuda=torch.cuda.is_available(), model_dtype=model_dtype)
        set_torch_threads(settled)
        model = load_decoder(checkpoint, settled, on_progress)
        set_torch_threads(settled, model)
        engine = cls(model, config, Path(path).stem if Path(path).is_file() else Path(path).name)
        engine.warm_up()
        engine.info = replace(engine.info, startup_s=time.perf_counter() - start)
        return engine

    def warm_up(self) -> None:
        """One prompt and one decode step through the real path, so that the first request meets no first-time cost.

        What ran each op of them is logged, and why not the providers before it.
        """
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        length = min(8, self.info.max_model_len - 1)
        if isinstance(self.runner, GpuRunner):
            with must_fit(*GRAPHS):
                self.runner.compile()
        self.add(Request(request_id="warm-up", prompt_token_ids=(0,) * max(1, length), sampling=sampling))
        with recorded_choices() as choices:
            while self.has_work():
                self.step()
        # a CPU's reference says in one line, `EngineInfo.kernels`, why it runs
        level = logging.DEBUG if self.model.device.type == "cpu" else logging.INFO
        for choice in choices.values():
            logger.log(level, "%s", choice)
        if isinstance(self.runner, GpuRunner):
            with must_fit(*GRAPHS):
                self.runner.capture()
        self.pool.forget()
        self._stats = EngineStats(num_blocks=self.info.num_blocks)
        self.scheduler.prefix_queries = self.scheduler.prefix_hits = 0

    # -- requests ------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request's `n` sequences. Raises `InvalidRequest` naming the field if it can never run."""
        self._check(request)
        sampling = request.sampling
        prompt = request.prompt_token_ids
        limit = self.info.max_model_len
        if sampling.max_tokens is not None:
            limit = min(limit, len(prompt) + sampling.max_tokens)
        seed = sampling.seed if sampling.seed is not None else self._seeds.getrandbits(64)
        leader: Sequence | None = None
        for index in range(sampling.n):
            sequence = Sequence(request, index, limit, list(prompt), seed=seed, leader=leader)
            leader = leader or sequence
            self.scheduler.add(sequence)

    def _check(self, request: Request) -> None:
        vocab_size, limit = self.info.vocab_size, self.info.max_model_len
        prompt, sampling = request.prompt_token_ids, request.sampling
        if not prompt:
            raise InvalidRequest("the prompt is empty; give at least one token", "prompt")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise InvalidRequest(f"prompt token ids must be in 0..{vocab_size - 1}", "prompt")
        wants_tokens = sampling.max_tokens != 0
        if len(prompt) + wants_tokens > limit:
            capacity = self.info.num_blocks * self.info.block_size
            where = "the KV cache" if limit == capacity else "the model"
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens but {where} holds {limit} in all, prompt and output", "prompt"
            )
        for name in ("stop_token_ids", "logit_bias"):
            if any(token_id >= vocab_size for token_id in getattr(sampling, name)):
                raise InvalidRequest(f"{name} must hold token ids in 0..{vocab_size - 1}", name)
        if sampling.top_k > vocab_size:
            raise InvalidRequest(f"top_k {sampling.top_k} exceeds the vocabulary of {vocab_size}", "top_k")

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences, in any state. An unknown id is no error: it may just have ended."""
        for sequence in self.scheduler.abort(request_id, index):
            self._prompt_logprobs.pop(sequence, None)

    def has_work(self) -> bool:
        return self.scheduler.has_work() or self._in_flight is not None

    def step(self) -> list[TokenOutput]:
        """Schedule, execute, commit once. Empty when idle or when only part of a prompt was computed.

        On a GPU the step that is launched here gives its tokens in the next call, while the device computes that one:
        the host plans one step ahead. A sequence that turns out to have ended costs one row of the step under way.
        """
        outputs: list[TokenOutput] = []
        last, self._in_flight = self._in_flight, None
        if last is not None and not self._may_run_ahead():
            outputs += self._land(*last)
            last = None
        if self.scheduler.has_work():
            outputs += self._start()
        if last is not None:
            outputs += self._land(*last)
        if not self.has_work():
            self.scheduler.check()
        return outputs

    def _may_run_ahead(self) -> bool:
        """Whether a step can be planned while the tokens of the last one are on their way; drafts follow from them."""
        if not isinstance(self.runner, GpuRunner) or self.scheduler.proposer is not None:
            return False
        return all(is_plain(sequence) for sequence in (*self.scheduler.running, *self.scheduler.waiting))

    def _start(self) -> list[TokenOutput]:
        """Plan a step and launch it where that can be done ahead, else run it and commit it."""
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return []
        try:
            if isinstance(self.runner, GpuRunner) and self.runner.can_launch(plan):
                self._in_flight = (plan, self.runner.launch(plan))
                self.scheduler.advance(plan)
                return []
            result = self.runner.execute(plan)
        except torch.AcceleratorError:
            raise  # the device's context is lost: no later step can succeed, and whoever runs the engine must know
        except torch.OutOfMemoryError as error:
            logger.exception("a step of %d sequences, %d tokens did not fit", len(plan.chunks), plan.num_tokens)
            return self._fail([chunk.sequence for chunk in plan.chunks], out_of_memory(error, *STEP))
        except Exception as error:  # one bad step must not take the other requests' engine with it
            logger.exception("a step of %d sequences failed", len(plan.chunks))
            return self._fail([chunk.sequence for chunk in plan.chunks], f"{type(error).__name__}: {error}")
        return self._commit(plan, result)

    def _land(self, plan: Plan, launched: Launched) -> list[TokenOutput]:
        """Wait for a launched step and commit it."""
        return self._commit(plan, launched.collect(), is_advanced=True)

    def _fail(self, sequences: list[Sequence], message: str) -> list[TokenOutput]:
        self.scheduler.end(sequences, FinishReason.ERROR)
        for sequence in sequences:
            self._prompt_logprobs.pop(sequence, None)
        return [
            TokenOutput(
                request_id=sequence.request.request_id,
                index=sequence.index,
                token_ids=[],
                finish_reason=FinishReason.ERROR,
                error=message,
            )
            for sequence in sequences
        ]

    def _commit(self, plan: Plan, result: StepResult, *, is_advanced: bool = False) -> list[TokenOutput]:
        failed = [sequence for sequence in result.failed if not sequence.is_finished]
        outputs = self._fail(failed, "the model gave a NaN or infinite logit")
        for chunk in plan.chunks:
            if chunk.start == 0:
                self._prompt_logprobs.pop(chunk.sequence, None)
        for sequence, entries in result.prompt_logprobs.items():
            self._prompt_logprobs.setdefault(sequence, []).extend(entries)
        gained = self.scheduler.commit(plan, result.token_ids, is_advanced=is_advanced)
        self._count(plan, gained)
        return outputs + [self._output(sequence, tokens, result) for sequence, tokens in gained.items()]

    def _output(self, sequence: Sequence, tokens: list[int], result: StepResult) -> TokenOutput:
        logprobs = result.logprobs.get(sequence)
        if sequence.request.sampling.logprobs is not None and logprobs is None:
            logprobs = []
        prompt_logprobs: list[TokenLogprob | None] | None = None
        if sequence.wants_prompt_logprobs and sequence.num_output == len(tokens):
            prompt_logprobs = [None, *self._prompt_logprobs.pop(sequence, [])]
        return TokenOutput(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_ids=tokens,
            logprobs=logprobs[: len(tokens)] if logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            finish_reason=sequence.finish_reason,
            stop_token_id=sequence.stop_token_id,
            num_cached_tokens=sequence.num_cached or 0,
        )

    def _count(self, plan: Plan, gained: dict[Sequence, list[int]]) -> None:
        stats = self._stats
        stats.num_steps += 1
        stats.step_tokens = plan.num_tokens
        for chunk in plan.chunks:
            stats.prompt_tokens += max(0, min(chunk.start + chunk.count, chunk.sequence.num_prompt) - chunk.start)
            if chunk.drafts:
                stats.num_drafts += 1
                stats.draft_tokens += len(chunk.drafts)
                stats.accepted_draft_tokens += max(0, len(gained.get(chunk.sequence, ())) - 1)
        stats.generation_tokens += sum(len(tokens) for tokens in gained.values())

    def stats(self) -> EngineStats:
        """A snapshot; the object is the engine's own and changes with the next step."""
        stats, scheduler = self._stats, self.scheduler
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting)
        stats.num_blocks_in_use = self.pool.num_in_use
        stats.num_preemptions = scheduler.num_preemptions
        stats.prefix_cache_queries = scheduler.prefix_queries
        stats.prefix_cache_hits = scheduler.prefix_hits
        return stats

    def close(self) -> None:
        """End everything that is alive. The engine takes no request afterwards."""
        self._in_flight = None
        self.scheduler.end([*self.scheduler.running, *self.scheduler.waiting], FinishReason.ABORT)
        self._prompt_logprobs.clear()


def _runner(model: Decoder, num_blocks: int, config: EngineConfig, max_model_len: int) -> Runner:
    cache = model.new_cache(num_blocks, config.cache.block_size)
    if model.kernels != "triton" or gpu_provider.unsupported() is not None:
        return Runner(model, cache, config.scheduler.max_num_seqs, max_model_len)
    return GpuRunner(model, cache, config.scheduler.max_num_seqs, max_model_len)


def set_torch_threads(config: EngineConfig, model: Decoder | None = None) -> None:
    """Size torch's own pool of CPU threads for a resolved `config`: one beside the native kernels and their pool."""
    if config.device == "cpu" and config.threads:
        torch.set_num_threads(1 if model is not None and model.kernels == "native" else config.threads)


def kernels_text(model: Decoder, config: EngineConfig) -> str:
    """What runs the ops of `model`, for start lines."""
    if model.device.type != "cpu":
        return gpu_provider.describe() if model.kernels == "triton" else "reference kernels"
    if model.kernels == "native" or (config.kernels == "auto" and native.load() is None):
        return native.describe()
    return "reference kernels"
