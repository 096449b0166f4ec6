"""What this machine allows: its measured ceilings, and the time no engine can beat for a given model on it.

A step is two phases that run one after the other: the matrix products read every weight once, attention reads the KV
cache. Each takes at least the longer of bytes / bandwidth and operations / peak; the floor is their sum. Norms,
activations and sampling count as nothing, so a floor is a bound and not a forecast. The model: Williams, Waterman and
Patterson, "Roofline", CACM 2009.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from powertrain.config import physical_cores
from powertrain.kernels import native
from powertrain.model.families import ModelConfig, model_config
from powertrain.types import PowertrainError

if TYPE_CHECKING:
    from rich.console import Group

Bound = Literal["memory", "compute"]

# Larger than any last-level cache in use, so that a second pass over it cannot be served from there.
_CPU_BUFFER_BYTES = 384 * 2**20
_CUDA_BUFFER_BYTES = 4 * 2**30
_DTYPE_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}

# Bits per weight of a linear matrix, scales apart; None is the compute dtype itself.
_FORMAT_BITS = {"none": None, "int8": 8, "int4": 4}
_INT4_GROUP = 64


class Costs(Protocol):
    """What a model says of itself. `Decoder` does when loaded, `ConfigCosts` from a config alone."""

    @property
    def config(self) -> ModelConfig: ...

    def step_bytes(self) -> int:
        """Bytes of weights one step reads, whatever its batch: all products, not the embedding table's other rows."""
        ...

    def kv_bytes_per_token(self) -> int:
        """KV cache bytes of one token over all layers."""
        ...

    def flops_per_token(self, context: int) -> float:
        """Operations (2 per multiply-add) for one token that attends to `context` tokens, head included."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigCosts:
    """Costs of a model that is not loaded, its linear matrices in `weight_format`, the rest in `dtype_bytes` each.

    "int8" has one 2-byte scale a row, "int4" one a group of 64; the head stays dense, as checkpoints usually keep it.
    `stored_bytes` replaces the estimate of the weights where a file tells.
    """

    config: ModelConfig
    weight_format: str
    dtype_bytes: int
    stored_bytes: int | None = None

    def step_bytes(self) -> int:
        if self.stored_bytes is not None:
            return self.stored_bytes
        bits = _FORMAT_BITS[self.weight_format]
        layer = 0.0
        for num_rows, row_length in self.config.linear_shapes().values():
            num_scales = 0 if bits is None else 1 if bits == 8 else -(-row_length // _INT4_GROUP)
            layer += num_rows * (row_length * (bits or 8 * self.dtype_bytes) / 8 + 2 * num_scales)
        head = self.config.vocab_size * self.config.hidden_size * self.dtype_bytes
        return round(self.config.num_layers * layer) + head

    def kv_bytes_per_token(self) -> int:
        return self.config.kv_bytes_per_token(self.dtype_bytes)

    def flops_per_token(self, context: int) -> int:
        return self.config.flops_per_token(context)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of one device. Bytes per second read from memory, operations per second of a large product."""

    read_bytes_per_s: float
    matmul_flops_per_s: float
    device: str
    dtype: str
    threads: int | None


@dataclass(frozen=True, slots=True)
class Floor:
    """A lower bound on the time of one step, in ms, and which resource sets it."""

    ms: float
    bound: Bound


def measure_ceilings(device: str = "cpu", dtype: torch.dtype | None = None, threads: int | None = None) -> Ceilings:
    """Measure read bandwidth and the matrix peak: float32 on a CPU, bfloat16 on CUDA unless `dtype` is given.

    Takes about a second. On CUDA it wants 4 GiB for a moment (less if less is free): run it before the KV pool exists.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise PowertrainError("device cuda: torch sees no CUDA device; use --device cpu")
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    threads = None if device == "cuda" else threads or physical_cores()
    name = str(dtype).removeprefix("torch.")
    with torch_threads(threads), torch.inference_mode():
        ceilings = Ceilings(read_bandwidth(device), matmul_peak(device, dtype), device, name, threads)
    if device == "cuda":
        torch.cuda.empty_cache()  # the buffers are gone; the KV pool that comes next is sized by what is free
    return ceilings


def read_bandwidth(device: str, buffer_bytes: int | None = None, repeats: int = 5) -> float:
    """Bytes per second of the fastest of three reductions over one float32 buffer, best of `repeats` each.

    Three, because which of them saturates the memory depends on the machine, and a ceiling must not be too low.
    """
    if buffer_bytes is None:
        buffer_bytes = _CPU_BUFFER_BYTES
        if device == "cuda":
            buffer_bytes = min(_CUDA_BUFFER_BYTES, torch.cuda.mem_get_info()[0] // 2)
    width = 4096
    matrix = torch.ones(max(1, buffer_bytes // (4 * width)), width, device=device)
    vector = torch.ones(width, device=device)
    reductions: tuple[Callable[[], torch.Tensor], ...] = (matrix.sum, matrix.max, lambda: torch.mv(matrix, vector))
    return matrix.numel() * 4 / min(_best_seconds(reduce, device, repeats) for reduce in reductions)


def matmul_peak(device: str, dtype: torch.dtype, size: int | None = None, repeats: int = 3) -> float:
    """Operations per second of a square product in `dtype`, best of `repeats` (1536 on a CPU, 8192 on CUDA)."""
    size = size or (8192 if device == "cuda" else 1536)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    seconds = _best_seconds(lambda: left @ right, device, repeats if device == "cpu" else 10 * repeats)
    return 2.0 * size**3 / seconds


def reading_alone(ceilings: Ceilings) -> Ceilings:
    """The same machine without a bound on arithmetic: for products of 8-bit integers, which outrun the float peak."""
    return replace(ceilings, matmul_flops_per_s=math.inf)


def decode_floor(costs: Costs, ceilings: Ceilings, batch: int, context: float) -> Floor:
    """Floor of one step that gives each of `batch` sequences, `context` tokens long, its next token."""
    linear_flops = costs.flops_per_token(0)
    attention_flops = costs.flops_per_token(round(context)) - linear_flops
    kv_bytes = costs.kv_bytes_per_token() * context
    return _sum_of_phases(
        ceilings, (costs.step_bytes(), batch * linear_flops), (batch * kv_bytes, batch * attention_flops)
    )


def prefill_floor(costs: Costs, ceilings: Ceilings, num_tokens: int) -> Floor:
    """Floor of computing a prompt of `num_tokens`: token t attends to t tokens, the head runs for the last one only."""
    linear_flops = costs.flops_per_token(0)
    attention_flops = costs.flops_per_token(num_tokens // 2) - linear_flops
    head_flops = 2 * costs.config.vocab_size * costs.config.hidden_size
    all_linear = num_tokens * (linear_flops - head_flops) + head_flops
    kv_bytes = costs.kv_bytes_per_token() * num_tokens
    return _sum_of_phases(ceilings, (costs.step_bytes(), all_linear), (kv_bytes, num_tokens * attention_flops))


def compute_bound_batch(costs: Costs, ceilings: Ceilings) -> int:
    """The batch from which the matrix products of a step, no longer the reading of weights, set its time."""
    balance = ceilings.matmul_flops_per_s / ceilings.read_bytes_per_s
    return max(1, round(costs.step_bytes() * balance / costs.flops_per_token(0)))


@dataclass(frozen=True, slots=True)
class RooflineCard:
    """Ceilings of the machine and floors of one model on it, per weight format. JSON-ready through `to_dict`."""

    model: str
    ceilings: Ceilings
    context: int
    kv_bytes_per_token: int
    kernels: str
    """Which native kernels this machine has, or why none; empty on a GPU."""
    formats: tuple[dict[str, Any], ...]
    """One row a weight format: `name, weight_bytes, compute_bound_batch, decode, prefill`, where `decode` has a row a
    batch (`batch, floor_ms, output_tokens_per_s, bound`) and `prefill` is `tokens, floor_ms, tokens_per_s, bound`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for `record.new_record("roofline", **card.to_dict())`."""
        return {
            "model": self.model,
            "ceilings": asdict(self.ceilings),
            "context": self.context,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kernels": self.kernels,
            "results": list(self.formats),
        }

    def table(self) -> Group:
        """The card for a terminal (a rich renderable)."""
        return _render(self)


def card(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    batches: Sequence[int] = (1, 8, 32),
    context: int = 1024,
    ceilings: Ceilings | None = None,
) -> RooflineCard:
    """Measure the machine (unless `ceilings` are given) and state the floors of `model` on it.

    `model` is a name, a checkpoint, or a folder with only a `config.json`; no weight is read. `context` is the tokens
    each sequence holds at decode and the length of the prompt at prefill.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    path, raw_config = _find(model)
    config = model_config(raw_config)
    context = max(1, min(context, config.max_position))
    ceilings = ceilings or measure_ceilings(device, threads=threads)
    size = _DTYPE_BYTES[dtype]
    variants = {name: ConfigCosts(config=config, weight_format=name, dtype_bytes=size) for name in _FORMAT_BITS}
    if raw_config.get("quantization_config"):
        stored = ConfigCosts(config=config, weight_format="none", dtype_bytes=size, stored_bytes=_stored_bytes(path))
        variants = {"as stored": stored, **variants}
    rows = tuple(_format_row(name, costs, ceilings, batches, context) for name, costs in variants.items())
    kernels = native.describe() if device == "cpu" else ""
    return RooflineCard(str(model), ceilings, context, config.kv_bytes_per_token(size), kernels, rows)


def _stored_bytes(path: Path) -> int:
    """Bytes of a checkpoint's tensors as stored, less an embedding table that has a head of its own beside it."""
    from powertrain.checkpoint.source import open_checkpoint

    checkpoint = open_checkpoint(path)
    names = checkpoint.names()
    has_head = any(name.startswith("lm_head.") for name in names)
    return sum(checkpoint.nbytes(n) for n in names if not (has_head and n.startswith("model.embed_tokens.")))


def _find(model: str | Path) -> tuple[Path, dict[str, Any]]:
    """The local path of `model` and its config in Hugging Face keys. A bare `config.json` is enough."""
    path = Path(model)
    if (path / "config.json").is_file() and not any(path.glob("*.safetensors")):
        return path, dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    from powertrain.checkpoint.hub import resolve_model
    from powertrain.checkpoint.source import open_checkpoint

    path = resolve_model(str(model))
    return path, open_checkpoint(path).config


def _format_row(name: str, costs: Costs, ceilings: Ceilings, batches: Sequence[int], context: int) -> dict[str, Any]:
    decode = []
    for batch in batches:
        floor = decode_floor(costs, ceilings, batch, context)
        rate = 1000 * batch / floor.ms
        decode.append({"batch": batch, "floor_ms": floor.ms, "output_tokens_per_s": rate, "bound": floor.bound})
    prefill = prefill_floor(costs, ceilings, context)
    return {
        "name": name,
        "weight_bytes": costs.step_bytes(),
        "compute_bound_batch": compute_bound_batch(costs, ceilings),
        "decode": decode,
        "prefill": {
            "tokens": context,
            "floor_ms": prefill.ms,
            "tokens_per_s": 1000 * context / prefill.ms,
            "bound": prefill.bound,
        },
    }


def _render(shown: RooflineCard) -> Group:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    ceilings = shown.ceilings
    where = ceilings.device + (f", {ceilings.threads} threads" if ceilings.threads else "")
    head = Text.assemble(
        (shown.model, "bold"),
        f" on this machine ({where}; measured)\n",
        f"  memory read      {ceilings.read_bytes_per_s / 1e9:,.1f} GB/s\n",
        f"  {ceilings.dtype} product  {ceilings.matmul_flops_per_s / 1e9:,.0f} GFLOP/s\n",
        f"  KV cache         {shown.kv_bytes_per_token / 1024:,.1f} KiB per token\n",
        f"  {shown.kernels}\n" if shown.kernels else "",
        f"Floors at {shown.context} tokens of context: no engine on this machine can be faster.",
    )
    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
    for column in ("weights", "MB a step", "phase", "floor ms", "tokens/s", "bound by"):
        is_text = column in ("weights", "phase", "bound by")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for row in shown.formats:
        prefill = row["prefill"]
        phases = [(f"prefill {prefill['tokens']}", prefill["floor_ms"], prefill["tokens_per_s"], prefill["bound"])]
        for decode in row["decode"]:
            name = f"decode, batch {decode['batch']}"
            phases.append((name, decode["floor_ms"], decode["output_tokens_per_s"], decode["bound"]))
        for number, (phase, floor_ms, rate, bound) in enumerate(phases):
            is_last = number == len(phases) - 1
            weights = f"{row['weight_bytes'] / 1e6:,.1f}" if number == 0 else ""
            label = row["name"] if number == 0 else ""
            table.add_row(label, weights, phase, f"{floor_ms:,.2f}", f"{rate:,.0f}", bound, end_section=is_last)
    ends = ", ".join(f"{row['name']} {row['compute_bound_batch']:,}" for row in shown.formats)
    return Group(head, table, Text(f"Reading weights no longer sets the step time from batch: {ends}."))


def _sum_of_phases(ceilings: Ceilings, *phases: tuple[float, float]) -> Floor:
    total = memory_total = compute_total = 0.0
    for num_bytes, flops in phases:
        memory = num_bytes / ceilings.read_bytes_per_s
        compute = flops / ceilings.matmul_flops_per_s
        total += max(memory, compute)
        if memory >= compute:
            memory_total += memory
        else:
            compute_total += compute
    return Floor(1000 * total, "memory" if memory_total >= compute_total else "compute")


def _best_seconds(run: Callable[[], torch.Tensor], device: str, repeats: int) -> float:
    run()
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run a block with torch on `threads` threads: the ceiling must be of the setting that is then measured."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
