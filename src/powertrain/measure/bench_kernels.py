"""`bench kernels`: each op at a model's shapes: who runs it, how far it is from its reference, how near to its floor.

Checked first: the op on copies of its arguments, against its reference in float32 where they are 16-bit, as
||out - reference|| / ||reference||, the result and what the op writes in place alike. Then timed, with its arguments
copied until they are larger than the cache, so that each call finds them in memory; the number of copies is limited,
so a few kilobytes do stay in the cache, as they would in a model, and so may those of a call that takes far longer
than its reading. Every copy is used once before: that compiles, and makes what the first layer of a step makes for all.

On CUDA one graph holds the calls, copy after copy; the time of a call is that between two events around a replay over
the number of calls, the median of the replays. On a CPU each call is timed alone, and the median taken.

The floor is the longer of bytes / read bandwidth and operations / matrix peak, both measured just before. Runs with
torch, numpy and the standard library alone: `python -m powertrain.measure.bench_kernels`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from powertrain.config import physical_cores
from powertrain.kernels import gpu_provider, native
from powertrain.kernels.attention import AttentionStep, attention_backends
from powertrain.kernels.cases import Case
from powertrain.kernels.model_cases import MODEL_CASES, MODEL_SHAPES, Workload
from powertrain.kernels.op import Op, choosing
from powertrain.kernels.quantized import Int4Blocks
from powertrain.measure import record, roofline
from powertrain.measure.native_cases import NATIVE_OP, native_cases
from powertrain.model.packed import PackedMatrix
from powertrain.types import PowertrainError

if TYPE_CHECKING:
    from rich.console import Group

ROWS = (1, 8, 32, 64, 256)
KNOWN_OPS = (*MODEL_CASES, NATIVE_OP)

# larger than any last cache in use; more copies than these would take longer to make than to measure
_COPIES_BYTES = {"cpu": 384 * 2**20, "cuda": 512 * 2**20}
_MAX_COPIES = {"cpu": 1024, "cuda": 256}
_BUDGET_S = 0.2
"""To use every copy once, and on a CPU to time calls."""
_MIN_CALLS = 5
_GRAPH_S = 2e-3
_GRAPH_CALLS = 64
_REPLAYS = 20

Progress = Callable[[str, float, float | None], None]


def bench_kernels(
    *,
    device: str = "auto",
    ops: Sequence[str] = (),
    shape: str | None = None,
    rows: Sequence[int] = ROWS,
    threads: int | None = None,
    git: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check and time `ops` (all if none; each may be a comma list) and return the JSON record of kind "kernels".

    `shape` is one of `MODEL_SHAPES`: by default llama-3.1-8b in bfloat16 on CUDA, smollm2-135m in float32 on a CPU. A
    wrong result is a row with `is_correct` false (see `num_wrong`). Raises `PowertrainError` for an unknown op or
    shape, rows below 1, and a device or kernels that are not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = threads or physical_cores()
    shape = shape or ("llama-3.1-8b" if device == "cuda" else "smollm2-135m")
    names = _op_names(ops, device)
    work = _workload(shape, device, rows)
    say = progress or (lambda what, done, total: None)
    say("measuring the machine", 0, None)
    ceilings = roofline.measure_ceilings(device, threads=threads)
    results = []
    with roofline.torch_threads(threads), torch.inference_mode(), attention_backends(torch.device(device)):
        cases = _cases(names, work, threads)
        for number, case in enumerate(cases):
            say("measuring kernels", number, len(cases))
            results.append(_row(case, device, ceilings))
        say("measuring kernels", len(cases), len(cases))
    config = {"device": device, "shape": shape, "ops": names, **asdict(work), "threads": ceilings.threads}
    return record.new_record(
        "kernels",
        git=git,
        kernels=gpu_provider.describe() if device == "cuda" else native.describe(),
        config={**config, "dtype": ceilings.dtype},
        ceilings=asdict(ceilings),
        results=results,
    )


def num_wrong(made: dict[str, Any]) -> int:
    """How many cases of a record differ from their reference by more than their tolerance, or failed."""
    return sum(not row["is_correct"] for row in made["results"])


def _op_names(ops: Sequence[str], device: str) -> list[str]:
    asked = [name for part in ops for name in part.split(",")]
    unknown = [name for name in asked if name not in KNOWN_OPS]
    if unknown:
        raise PowertrainError(f"--op: no op {', '.join(map(repr, unknown))}; known: {', '.join(KNOWN_OPS)}")
    if NATIVE_OP in asked and device != "cpu":
        raise PowertrainError(f"--op: {NATIVE_OP} runs on a CPU; use --device cpu")
    has_native = device == "cpu" and (NATIVE_OP in asked or native.load() is not None)
    return [name for name in KNOWN_OPS if (not asked or name in asked) and (name != NATIVE_OP or has_native)]


def _workload(shape: str, device: str, rows: Sequence[int]) -> Workload:
    if shape not in MODEL_SHAPES:
        raise PowertrainError(f"--shape: no shape {shape!r}; known: {', '.join(MODEL_SHAPES)}")
    if not rows or min(rows) < 1:
        raise PowertrainError(f"--rows must be positive numbers, got {list(rows)}")
    is_cuda = device == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    return Workload(MODEL_SHAPES[shape], dtype, tuple(rows), chunk=2048 if is_cuda else 512)


def _cases(names: Sequence[str], work: Workload, threads: int) -> list[Case]:
    made = [case for name in names if name != NATIVE_OP for case in MODEL_CASES[name](work)]
    return made + (native_cases(work, threads) if NATIVE_OP in names else [])


def _row(case: Case, device: str, ceilings: roofline.Ceilings) -> dict[str, Any]:
    """One result. A provider that raises is a finding like a wrong value: the other cases still run."""
    bounds = ceilings if case.has_float_peak else roofline.reading_alone(ceilings)
    memory_s, compute_s = case.num_bytes / bounds.read_bytes_per_s, case.num_flops / bounds.matmul_flops_per_s
    row: dict[str, Any] = {
        "name": f"{case.op.name} {case.label}",
        "op": case.op.name,
        "label": case.label,
        "tolerance": case.tolerance,
        "bytes": case.num_bytes,
        "gflop": case.num_flops / 1e9,
        "floor_us": 1e6 * max(memory_s, compute_s),
        "bound": "memory" if memory_s >= compute_s else "compute",
        **{"ran": None, "refusals": [], "error": None, "is_correct": False, "failure": None},
        **{"us": None, "fraction": None, "num_copies": None, "num_calls": None},
    }
    try:
        args = case.make(torch.Generator(device).manual_seed(0))
        row["ran"], row["refusals"] = case.op.choose(*args)
        error = _error(case, args)
        row.update(error=error if math.isfinite(error) else None, is_correct=error <= case.tolerance)
        copies = _copies(case, args, device)
        seconds = (_time_on_cuda if device == "cuda" else _time_on_cpu)(case.op, copies)
        us = 1e6 * statistics.median(seconds)
        row.update(us=us, fraction=row["floor_us"] / us, num_copies=len(copies), num_calls=len(seconds))
    except Exception as error:
        row.update(is_correct=False, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    if device == "cuda":
        torch.cuda.empty_cache()  # a graph's memory is its own until then
    return row


def _error(case: Case, args: tuple[Any, ...]) -> float:
    """The largest relative distance of the result and of each written argument; NaN and infinity stay what they are."""
    with choosing("reference"):
        expected = _outputs(case, case.op.reference, _copy(args, widens=True))
    found = _outputs(case, case.op, _copy(args))
    errors = [_distance(*pair) for pair in zip(found, expected, strict=True)]
    return next((error for error in errors if math.isnan(error)), max(errors))


def _outputs(case: Case, run: Callable[..., torch.Tensor], args: tuple[Any, ...]) -> list[torch.Tensor]:
    result = run(*args)
    return [result, *(args[place] for place in case.written)]


def _distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    if out.shape != expected.shape:
        return math.inf
    return float(torch.linalg.vector_norm(out.float() - expected) / torch.linalg.vector_norm(expected))


def _copy(value: Any, *, widens: bool = False) -> Any:
    """The same argument over memory of its own; `widens`: 16-bit floats as float32."""
    if isinstance(value, torch.Tensor):
        is_half = value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if widens and is_half else value.clone()
    if isinstance(value, tuple):
        parts = tuple(_copy(part, widens=widens) for part in value)
        return Int4Blocks(*parts) if isinstance(value, Int4Blocks) else parts
    if isinstance(value, AttentionStep):
        return replace(value)  # without what a call has left in it, which may be of another dtype
    return value.copy() if isinstance(value, PackedMatrix) else value


def _copies(case: Case, args: tuple[Any, ...], device: str) -> list[tuple[Any, ...]]:
    case.op(*args)  # compiles
    once = _pass_seconds(case.op, [args], device)
    wanted = -(-_COPIES_BYTES[device] // case.num_bytes)
    count = max(1, min(wanted, _MAX_COPIES[device], int(_BUDGET_S / once)))
    copies = [args, *(_copy(args) for _ in range(count - 1))]
    for own in copies:
        case.op(*own)
    return copies


def _pass_seconds(op: Op[Any, torch.Tensor], copies: list[tuple[Any, ...]], device: str) -> float:
    """Seconds of a call of each copy, what the host takes to launch them included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for args in copies:
        op(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _time_on_cpu(op: Op[Any, torch.Tensor], copies: list[tuple[Any, ...]]) -> list[float]:
    """Seconds of each call."""
    seconds: list[float] = []
    end = time.perf_counter() + _BUDGET_S
    while len(seconds) < _MIN_CALLS or time.perf_counter() < end:
        args = copies[len(seconds) % len(copies)]
        start = time.perf_counter()
        op(*args)
        seconds.append(time.perf_counter() - start)
    return seconds


def _time_on_cuda(op: Op[Any, torch.Tensor], copies: list[tuple[Any, ...]]) -> list[float]:
    """Seconds of a call in each replay of a graph of them."""
    rounds = max(1, min(_GRAPH_CALLS // len(copies), round(_GRAPH_S / _pass_seconds(op, copies, "cuda"))))
    num_calls = rounds * len(copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(num_calls):
            op(*copies[call % len(copies)])
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]  # type: ignore[no-untyped-call]
    graph.replay()  # the first mark then stands behind work, not behind an idle device
    for number, mark in enumerate(marks):
        if number:
            graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 / num_calls for before, after in pairwise(marks)]


COLUMNS = ("case", "ran", "error", "allowed", "µs", "MB", "GFLOP", "floor µs", "of floor")


def table(made: dict[str, Any]) -> Group:
    """The record for a terminal of 100 columns (a rich renderable); a wrong case is red and marked with `!`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(header_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for number, column in enumerate(COLUMNS):
        shown.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for op, rows in _by_op(made):
        shown.add_row(Text(op, "bold"))
        for row in rows:
            shown.add_row(*(Text(cell) for cell in cells(row)), style=None if row["is_correct"] else "red")
    return Group(Text(_head(made)), shown, *(Text(line, "red") for line in _wrong_lines(made)))


def text_table(made: dict[str, Any]) -> str:
    """The record in plain text, for machines without rich."""
    lines = [COLUMNS, *(cells(row) for row in made["results"])]
    widths = [max(len(line[at]) for line in lines) for at in range(len(COLUMNS))]

    def join(line: Sequence[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        return " ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in pairs).rstrip()

    shown = [_head(made), join(COLUMNS)]
    for op, rows in _by_op(made):
        shown += [op, *(join(cells(row)) for row in rows)]
    return "\n".join([*shown, *_wrong_lines(made)])


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One result in the order of `COLUMNS`."""
    return (
        f"{' ' if row['is_correct'] else '!'} {row['label']}",
        row["ran"] or "-",
        "-" if row["error"] is None else f"{row['error']:.1e}" if row["error"] else "0",
        f"{row['tolerance']:.1e}",
        _number(row["us"]),
        _number(row["bytes"] / 1e6),
        _number(row["gflop"]),
        _number(row["floor_us"]),
        "-" if row["fraction"] is None else f"{row['fraction']:.1%}",
    )


def explanations(made: dict[str, Any]) -> list[str]:
    """A line for each reason why a provider did not run, with the number of an op's cases it was given for."""
    lines = []
    for op, rows in _by_op(made):
        reasons = [reason for row in rows for reason in row["refusals"]]
        lines += [f"{op}: not {reason} ({reasons.count(reason)} of {len(rows)})" for reason in dict.fromkeys(reasons)]
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if 0 < value < 1e-3:
        return "<0.001"
    digits = 3 if value < 1 else 2 if value < 100 else 1 if value < 10000 else 0
    return f"{value:.{digits}f}"


def _by_op(made: dict[str, Any]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    for op in dict.fromkeys(row["op"] for row in made["results"]):
        yield op, [row for row in made["results"] if row["op"] == op]


def _head(made: dict[str, Any]) -> str:
    config, ceilings = made["config"], made["ceilings"]
    threads = f", {ceilings['threads']} threads" if ceilings["threads"] else ""
    return (
        f"{config['shape']}, {ceilings['dtype']}, {config['device']}{threads}: "
        f"{ceilings['read_bytes_per_s'] / 1e9:,.1f} GB/s, {ceilings['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s; "
        f"{made['kernels']}"
    )


def _wrong_lines(made: dict[str, Any]) -> list[str]:
    wrong = [row for row in made["results"] if not row["is_correct"]]
    lines = [f"! {row['name']}: {row['failure']}" for row in wrong if row["failure"]]
    return [*lines, f"{len(wrong)} of {len(made['results'])} cases are wrong"] if wrong else []


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m powertrain.measure.bench_kernels`: the flags of `powertrain bench kernels`, with torch alone."""
    parser = argparse.ArgumentParser(prog="powertrain.measure.bench_kernels", description="Check and time the kernels.")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--op", action="append", default=[], dest="ops", help=f"of {', '.join(KNOWN_OPS)}")
    parser.add_argument("--shape", help=f"one of {', '.join(MODEL_SHAPES)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows, separated by commas")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--verbose", action="store_true", help="say why a provider did not run")
    parser.add_argument("--git", metavar="COMMIT")
    parser.add_argument("--json", metavar="FILE")
    given = vars(parser.parse_args(arguments))
    file, rows, verbose = given.pop("json"), given.pop("rows"), given.pop("verbose")
    try:
        given["rows"] = [int(part) for part in rows.split(",")]
    except ValueError:
        parser.error(f"--rows must be numbers separated by commas, got {rows!r}")
    try:
        made = bench_kernels(**given)
        print("\n".join([text_table(made), *(explanations(made) if verbose else [])]))
        if file:
            record.write_record(file, made)
    except PowertrainError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if num_wrong(made) else 0)


if __name__ == "__main__":
    main()
