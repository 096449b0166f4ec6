"""How many KV blocks fit: from the device's memory, after the weights and the largest step have taken theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from powertrain.config import EngineConfig
from powertrain.kernels.attention import AttentionStep
from powertrain.model.decoder import Decoder
from powertrain.model.gpu_memory import must_fit
from powertrain.types import PowertrainError

_CPU_SHARE = 0.25
_CPU_LIMIT = 2 * 1024**3

# What may not fit on a GPU, and the settings that make it fit.
LARGEST_STEP = (
    "the largest step beside the weights",
    "lower --max-num-batched-tokens or --max-num-seqs, or take a smaller weight format",
)
POOL = (
    "the KV pool",
    "lower --gpu-memory-utilization (or --num-blocks or --kv-cache-memory-bytes where given), or take "
    "--kv-cache-dtype fp8 or a smaller weight format",
)
GRAPHS = (
    "the graphs of decode steps",
    "lower --gpu-memory-utilization, so that the KV pool leaves more, or --max-num-seqs",
)
STEP = (
    "this step",
    "start the engine with a lower --gpu-memory-utilization, so that the KV pool leaves more, or a lower "
    "--max-num-batched-tokens or --max-num-seqs",
)


def num_cache_blocks(model: Decoder, config: EngineConfig, max_model_len: int) -> int:
    """Blocks for the pool: as many as memory allows, at most what all slots at full length could use.

    CPU: a quarter of the available memory, at most 2 GiB, unless `kv_cache_memory_bytes` says otherwise.
    CUDA: `gpu_memory_utilization` of the device less what weights and the largest step hold at their peak.
    """
    block_bytes = model.kv_bytes_per_token() * config.cache.block_size
    budget = config.cache.kv_cache_memory_bytes
    if budget is None:
        budget = _cuda_budget(model, config, max_model_len) if model.device.type == "cuda" else _cpu_budget()
    blocks_per_seq = -(-max_model_len // config.cache.block_size)
    num_blocks = min(budget // block_bytes, blocks_per_seq * config.scheduler.max_num_seqs)
    if num_blocks < 1:
        raise PowertrainError(
            f"no memory for the KV cache: one block takes {block_bytes} bytes and {budget} are left; "
            "raise gpu_memory_utilization or kv_cache_memory_bytes, or take a smaller model"
        )
    return int(num_blocks)


def _cpu_budget() -> int:
    available = 4 * 1024**3
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return int(min(available * _CPU_SHARE, _CPU_LIMIT))


@must_fit(*LARGEST_STEP)
def _cuda_budget(model: Decoder, config: EngineConfig, max_model_len: int) -> int:
    """Measure the peak of a step of prompts that fill the token budget, with logits for every slot."""
    torch.cuda.reset_peak_memory_stats(model.device)
    num_tokens, block_size = config.scheduler.max_num_batched_tokens, config.cache.block_size
    num_full, rest = divmod(num_tokens, max_model_len)
    lens = [rest] * (rest > 0) + [max_model_len] * num_full
    width = -(-max(lens) // block_size)
    tables = np.arange(len(lens) * width).reshape(len(lens), width)
    cache = model.new_cache(tables.size, block_size)
    step = AttentionStep(lens, lens, tables, block_size, model.device)
    hidden = model.forward(torch.zeros_like(step.positions), step, cache)
    model.logits(hidden[: config.scheduler.max_num_seqs])
    torch.cuda.synchronize(model.device)
    peak = torch.cuda.max_memory_allocated(model.device)
    del cache, hidden
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    others = total - free - torch.cuda.memory_reserved(model.device)
    return int(total * config.cache.gpu_memory_utilization) - peak - others
