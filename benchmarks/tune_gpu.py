"""Measure the launch settings of the GPU's products and write the table that the kernels read.

Every candidate is compiled first, by many processes at once: what compiling leaves behind is found again by the one
that measures. A time is that of a call within a CUDA graph which cycles over more weights than the cache holds, the
median of its replays. A dense "tile" and what is "rounded" are kept only where they are faster than what runs without
them: the product of few rows with its settings in the table, or the library. Entries of other shapes and products stay
in the file.

    python benchmarks/tune_gpu.py --shape llama-3.1-8b --products int4,fp8
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from powertrain.kernels.gpu import conversions, fused, int4_matmul, matmul, quantized, rounded_matmul, tuned_table
from powertrain.kernels.gpu.matmul import SkinnyConfig
from powertrain.kernels.gpu.quantized import QuantizedConfig
from powertrain.kernels.gpu.rounded_matmul import RoundedConfig
from powertrain.kernels.gpu.row_matmul import RowConfig, row_int4_product, row_product
from powertrain.kernels.gpu.sliced_matmul import SlicedConfig, sliced_int4_product, sliced_product
from powertrain.kernels.model_cases import MODEL_SHAPES
from powertrain.kernels.quantized import MAX_UNROUNDED_ROWS, Int4Blocks

CACHE_BYTES = 512 * 2**20
"""Of weights, so that none is found in the cache: what is read once leaves it first, so that of fewer many would stay.
"""
PROGRAMS = (96, 1100)
"""Of a product with several splits."""
ROUNDED = {"fp8 rounded": torch.float8_e4m3fn, "int8 rounded": torch.int8}
OF_ROW = ("row dense_linear", "row int4", "row fp8", "row int8")
"""Products of a single row, kept where they are faster than those of few rows: `--rows 1`."""
SLICED = ("sliced dense_linear", "sliced int4")
"""Products of up to 64 rows, kept where they are faster than the others."""
SHARED_BYTES = 100 * 2**10
"""Of a sliced product's program: two or more are to fit on a processor."""
PRODUCTS = ("dense_linear", "tile", "int4", "fp8", "fp8 blocks", "int8", *ROUNDED, *OF_ROW, *SLICED)
ROUNDED_LAYOUTS = (
    RoundedConfig(256, 64, 2, 128, 1, True, 8, 3),
    RoundedConfig(256, 64, 2, 128, 1, True, 8, 4),
    RoundedConfig(128, 128, 2, 128, 1, True, 8, 3),
    RoundedConfig(128, 128, 2, 128, 1, False, 8, 4),
    RoundedConfig(128, 64, 2, 128, 1, True, 4, 2),
    RoundedConfig(128, 64, 2, 128, 1, True, 4, 3),
    RoundedConfig(128, 64, 2, 128, 1, True, 8, 3),
    RoundedConfig(256, 64, 1, 128, 1, True, 8, 5),
    RoundedConfig(128, 128, 1, 128, 1, True, 8, 4),
    RoundedConfig(128, 64, 1, 128, 1, True, 4, 3),
    RoundedConfig(128, 64, 1, 128, 1, True, 4, 4),
    RoundedConfig(128, 128, 1, 256, 1, True, 8, 3),
    RoundedConfig(128, 64, 1, 256, 1, True, 4, 2),
    RoundedConfig(64, 64, 1, 128, 1, True, 4, 4),
    RoundedConfig(64, 64, 1, 256, 1, True, 4, 4),
    RoundedConfig(64, 128, 1, 128, 1, True, 8, 4),
    RoundedConfig(64, 128, 1, 256, 1, True, 8, 3),
    RoundedConfig(64, 64, 2, 128, 1, True, 4, 4),
    RoundedConfig(64, 64, 2, 256, 1, True, 4, 3),
    RoundedConfig(64, 128, 2, 128, 1, True, 8, 4),
)
"""What registers hold with either type, but for a few words of some with splits, which come with the shape."""
ROUNDED_PROGRAMS = (64, 400)
"""Of a product with several splits."""
Config = SkinnyConfig | QuantizedConfig | RoundedConfig | RowConfig | SlicedConfig
Call = Callable[[int], torch.Tensor]
Weight = tuple[torch.Tensor, Any]
"""A matrix and its scales, if it has any."""


class Problem(NamedTuple):
    """A product whose settings are wanted; `out_features` are those of its result.

    `keeps_pieces`: the model's next step sums the result of several splits.
    """

    product: str
    out_features: int
    in_features: int
    rows: int
    is_gated: bool
    keeps_pieces: bool = False

    @property
    def matrix_rows(self) -> int:
        return self.out_features * (2 if self.is_gated else 1)

    @property
    def kind(self) -> str:
        """The product, whatever its rows."""
        return self.product.removeprefix("row ").removeprefix("sliced ")

    def weight_bytes(self) -> float:
        element = {"dense_linear": 2.0, "tile": 2.0, "int4": 0.5}.get(self.kind, 1.0)
        return self.matrix_rows * self.in_features * element


def problems(shape: str, products: list[str], rows: list[int]) -> list[Problem]:
    """The products of a model: the head stays dense, gate and up are one for few rows, tiles are for many."""
    own = MODEL_SHAPES[shape]
    heads = own.num_heads * own.head_dim
    plain = [
        (heads + 2 * own.num_kv_heads * own.head_dim, own.hidden_size),
        (own.hidden_size, heads),
        (own.hidden_size, own.intermediate_size),
    ]
    made = []
    for product, count in itertools.product(products, rows):
        is_dense = product in ("dense_linear", "tile", "row dense_linear", "sliced dense_linear")
        if (product in OF_ROW) != (count == 1):
            continue
        if product in ("dense_linear", *SLICED) and count > quantized.MAX_GATED_ROWS:
            continue
        if product == "int4" and count > int4_matmul.TILE_ROWS:
            continue  # in tiles of fewer
        if product in ROUNDED and count <= MAX_UNROUNDED_ROWS[ROUNDED[product]]:
            continue
        gates = count <= quantized.MAX_GATED_ROWS
        made += [Problem(product, out, inner, count, False, True) for out, inner in plain]
        made.append(Problem(product, own.intermediate_size * (1 if gates else 2), own.hidden_size, count, gates))
        if product in ("tile", *ROUNDED):
            made.append(Problem(product, own.intermediate_size, own.hidden_size, count, True))
        if is_dense:
            made.append(Problem(product, own.vocab_size, own.hidden_size, count, False))
    return list(dict.fromkeys(made))


def candidates(problem: Problem) -> Iterator[Config]:
    """Settings worth a try, of those that a program's registers and shared memory hold."""
    if problem.product in ROUNDED:
        yield from rounded_candidates(problem)
        return
    if problem.product in OF_ROW:
        yield from row_candidates(problem)
        return
    if problem.product in SLICED:
        yield from sliced_candidates(problem)
        return
    if problem.product == "dense_linear":
        for outputs, inputs, splits, stages in itertools.product((16, 32, 64), (128, 256), (1, 2, 4), (3, 4, 5)):
            if not (problem.is_gated and splits > 1):
                yield SkinnyConfig(outputs, inputs, splits, 4, stages)
        return
    # too few programs leave processors idle, too many read the activations again and again
    if problem.rows <= 32:
        layouts = [(32, False, 1), (32, False, 2), (64, False, 2), (64, False, 4), (128, False, 4), (64, True, 4)]
        layouts += [(16, False, 1), (16, False, 2), (32, False, 4), (64, False, 8), (128, False, 8)]
        stages = (3, 5)
    elif problem.rows <= 64:
        layouts, stages = [(64, False, 4), (64, True, 4), (128, True, 4), (128, True, 8)], (3, 4, 5)
    elif problem.rows <= 128:
        layouts, stages = [(64, True, 4), (64, True, 8), (128, True, 8), (128, True, 4), (256, True, 8)], (3, 4, 5)
    else:
        layouts, stages = [(64, True, 8), (64, True, 4), (128, True, 8), (128, False, 8)], (2, 3, 4)
    for (outputs, swaps, warps), count, splits in itertools.product(layouts, stages, (1, 2, 4, 8)):
        programs = -(-problem.out_features // outputs) * splits
        if splits == 1 or (not problem.is_gated and PROGRAMS[0] <= programs <= PROGRAMS[1]):
            yield QuantizedConfig(outputs, splits, swaps, warps, count)


def row_candidates(problem: Problem) -> Iterator[RowConfig]:
    """From a few warps a program, whose loads of x come in the weights' layout, to turns that a long row has few of."""
    of_load = {"dense_linear": 2, "int4": 8}.get(problem.kind, 4)
    for outputs, inputs, warps in itertools.product((4, 8, 16, 32), (256, 512, 1024, 2048), (2, 4, 8, 16)):
        of_thread = outputs * inputs / of_load / (32 * warps)
        if inputs <= problem.in_features and 4 <= of_thread <= (8 if problem.is_gated else 16):
            yield RowConfig(outputs, inputs, warps)


def sliced_candidates(problem: Problem) -> Iterator[SlicedConfig]:
    """What leaves room for other programs beside it, with a few turns of weights on their way."""
    element, slice_inputs, least = (0.5, (128,), 8) if problem.kind == "int4" else (2.0, (64, 128), 16)
    of_x, all_outputs = 2 * max(least, problem.rows), (16, 32, 64) if problem.kind == "int4" else (8, 16, 32)
    for outputs, slices, inputs, stages in itertools.product(all_outputs, (2, 4, 8), slice_inputs, (2, 3, 4)):
        of_weights = outputs * (2 if problem.is_gated else 1) * element
        fits = stages * slices * inputs * (of_x + of_weights) <= SHARED_BYTES
        if fits and slices * inputs <= problem.in_features and stages * slices * inputs * of_weights >= 2**13:
            yield SlicedConfig(outputs, slices, inputs, stages)


def rounded_candidates(problem: Problem) -> Iterator[RoundedConfig]:
    """The layouts that fit the rows, with splits where there would be few programs."""
    for layout, splits in itertools.product(ROUNDED_LAYOUTS, (1, 2, 4)):
        columns = layout.outputs * layout.tiles
        programs = -(-problem.matrix_rows // columns) * -(-problem.rows // layout.tile_rows) * splits
        fits = layout.tile_rows == 64 if problem.rows <= 64 else 64 < layout.tile_rows <= problem.rows
        fits = fits and (layout.tiles == 2 or not problem.is_gated)
        is_worth = not problem.is_gated and ROUNDED_PROGRAMS[0] <= programs <= ROUNDED_PROGRAMS[1]
        if fits and (splits == 1 or is_worth):
            yield layout._replace(splits=splits)


def operands(problem: Problem, device: torch.device, copies: int) -> list[Weight]:
    """As many random matrices of the problem's format."""
    generator = torch.Generator(device).manual_seed(0)
    out, inner = problem.matrix_rows, problem.in_features
    made: list[Weight] = []
    for _ in range(copies):
        if problem.product in ROUNDED:
            made.append(rounded(out, inner, problem, generator))
        elif problem.kind in ("dense_linear", "tile"):
            made.append((torch.randn(out, inner, device=device, generator=generator).to(_dtype(device)), None))
        elif problem.kind == "int4":
            packed = torch.randint(-(2**15), 2**15, (inner // 128, out, 32), dtype=torch.int16, device=device)
            made.append((packed, torch.rand(inner // 128, out, device=device).to(_dtype(device))))
        else:
            kind = torch.int8 if problem.kind == "int8" else torch.float8_e4m3fn
            scales = (-(-out // 128), inner // 128) if problem.product == "fp8 blocks" else (out,)
            values = (torch.randn(out, inner, device=device, generator=generator) * 20).to(kind)
            made.append((values, torch.rand(scales, device=device)))
    return made


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def caller(problem: Problem, config: Config | None, weights: list[Weight]) -> Call:
    """Multiplies by one of the matrices; without a config as a dense product runs without a tile, a row among few."""
    if problem.product in ROUNDED:
        assert config is None or isinstance(config, RoundedConfig)
        return rounded_caller(problem, config, weights)
    device = weights[0][0].device
    x = torch.randn(problem.rows, problem.in_features, device=device).to(_dtype(device))
    if isinstance(config, RowConfig) and problem.kind == "int4":
        return lambda at: row_int4_product(x, Int4Blocks(*weights[at], None), config, problem.is_gated)
    if isinstance(config, RowConfig):
        return lambda at: row_product(x, *weights[at], config, problem.is_gated)
    if isinstance(config, SlicedConfig) and problem.kind == "int4":
        return lambda at: sliced_int4_product(x, Int4Blocks(*weights[at], None), config, problem.is_gated)
    if isinstance(config, SlicedConfig):
        return lambda at: sliced_product(x, weights[at][0], config, problem.is_gated)
    if config is None and problem.kind not in ("dense_linear", "tile"):
        turns = problem.in_features // 128
        config = quantized.config_for(problem.kind, x, problem.out_features, turns, problem.is_gated)
    if config is None and problem.rows > matmul.MAX_SKINNY_ROWS:
        linear, silu_mul = torch.nn.functional.linear, fused.silu_mul
        return lambda at: silu_mul(linear(x, weights[at][0])) if problem.is_gated else linear(x, weights[at][0])
    if config is None:
        config = matmul.config_for(x, problem.out_features, gated=problem.is_gated)
    if isinstance(config, SkinnyConfig):
        return lambda at: matmul.skinny_linear(
            x, weights[at][0], config, gated=problem.is_gated, keeps_pieces=problem.keeps_pieces
        )
    how = (config, problem.is_gated, problem.keeps_pieces)
    if problem.kind == "int4":
        return lambda at: int4_matmul.int4_product(x, Int4Blocks(*weights[at], None), *how)
    return lambda at: quantized.matrix_product(x, *weights[at], *how)


def rounded(rows: int, width: int, problem: Problem, generator: torch.Generator) -> Weight:
    """Random rows of 8 bits and their scales."""
    kind = torch.int8 if problem.product == "int8 rounded" else torch.float8_e4m3fn
    values = torch.randn(rows, width, device=generator.device, generator=generator) * 20
    return values.to(kind), torch.rand(rows, device=generator.device, generator=generator) / 1000


def rounded_caller(problem: Problem, config: RoundedConfig | None, weights: list[Weight]) -> Call:
    """As `caller`; a gated product with the rounding of its result, which by the library gates too."""
    generator = torch.Generator(weights[0][0].device).manual_seed(1)
    x, kind = rounded(problem.rows, problem.in_features, problem, generator), weights[0][0].dtype
    if config is None:
        library = rounded_matmul.library_product
        if problem.is_gated:
            return lambda at: fused.silu_mul_rounded(library(*x, *weights[at], torch.bfloat16), kind)[0]
        return lambda at: library(*x, *weights[at], torch.bfloat16)
    how = (torch.bfloat16, config, problem.is_gated, problem.keeps_pieces)
    if problem.is_gated:
        return lambda at: conversions.quantize_rows(rounded_matmul.rounded_product(*x, *weights[at], *how), kind)[0]
    return lambda at: rounded_matmul.rounded_product(*x, *weights[at], *how)


def compile_one(task: tuple[Problem, Config, str]) -> None:
    """Compile a candidate by a run of it over small matrices; one that does not fit is left to fail when measured."""
    problem, config, device = task
    small = problem._replace(out_features=256, in_features=2048)
    try:
        caller(small, config, operands(small, torch.device(device), 1))(0)
    except Exception as error:
        print(f"not compiled: {problem.product} {problem.rows} rows {config}: {type(error).__name__}", flush=True)


def _code_of(config: Config) -> Config:
    """A product of byte or 4-bit weights is the same code for any splits."""
    return config._replace(splits=1) if isinstance(config, QuantizedConfig) else config


def compile_all(wanted: list[Problem], device: str, processes: int) -> None:
    """Settings are compiled once for all shapes: the sizes are no part of the code."""
    tasks = {
        (problem.product, problem.rows, problem.is_gated, _code_of(config)): (problem, config, device)
        for problem in wanted
        for config in candidates(problem)
    }
    if processes < 2:
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(compile_one, tasks.values(), chunksize=2):
            pass


def seconds(call: Call, copies: int, device: torch.device, limit: float) -> float:
    """Of one call; the first measurement alone where that is beyond `limit`."""
    for at in range(copies):
        call(at)
    if device.type != "cuda":
        start = time.perf_counter()
        call(0)
        return time.perf_counter() - start
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 16 // copies)
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for at in range(copies):
                call(at)
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / (repeats * copies))
        if len(times) > 1 and times[-1] > limit:
            break
    return statistics.median(times[1:])


def ranked(problem: Problem, device: torch.device) -> list[tuple[float, Config | None]]:
    """Seconds of each of the settings, the fastest first; None is what runs without them, where that may be."""
    copies = 1 if device.type != "cuda" else int(max(2, min(64, CACHE_BYTES // problem.weight_bytes() + 1)))
    weights = operands(problem, device, copies)
    found: list[tuple[float, Config | None]] = []
    tried: list[Config | None] = [*candidates(problem)]
    if problem.product in ("tile", *ROUNDED, *OF_ROW, *SLICED):
        tried.append(None)
    for config in tried:
        try:
            limit = 1.2 * min((one[0] for one in found), default=1.0)
            found.append((seconds(caller(problem, config, weights), copies, device, limit), config))
        except Exception as error:
            if "out of resource" not in str(error) and not isinstance(error, RuntimeError):
                print(f"failed: {problem} {config}: {error}", flush=True)
    return sorted(found, key=lambda one: one[0])


def line_of(problem: Problem, found: list[tuple[float, Config | None]]) -> str:
    """What to print of a ranking."""
    time_s, config = found[0]
    rate = problem.weight_bytes() / time_s / 1e12
    without = next((one for one, config in found if config is None), None)
    beside = "" if without is None else f", without {1e6 * without:.1f} us"
    return f"{' '.join(map(str, problem)):<48} {1e6 * time_s:8.1f} us  {rate:5.2f} TB/s  {config}{beside}"


def entry_of(problem: Problem, config: Config) -> dict[str, Any]:
    """A line of the table."""
    key = {"out": problem.out_features, "in": problem.in_features, "rows": problem.rows, "gated": problem.is_gated}
    return {**key, **config._asdict()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--shape", default="llama-3.1-8b", choices=sorted(MODEL_SHAPES))
    arguments.add_argument("--products", default=",".join(PRODUCTS), help=f"of {', '.join(PRODUCTS)}")
    arguments.add_argument("--rows", default=",".join(map(str, tuned_table.ROWS)))
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile")
    arguments.add_argument("--seconds", type=float, default=480.0, help="stop starting new problems after this long")
    arguments.add_argument("--out", type=Path, help="default: the package's own table of this device")
    given = arguments.parse_args()
    start, device = time.perf_counter(), torch.device(given.device)
    own = tuned_table.FOLDER / (tuned_table.file_name(device) if device.type == "cuda" else "cpu.json")
    out = given.out or own
    table = tuned_table.read(own) if own.exists() else {}
    wanted = problems(given.shape, given.products.split(","), [int(part) for part in given.rows.split(",")])
    compile_all(wanted, given.device, given.processes)
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    for problem in wanted:
        if time.perf_counter() - start > given.seconds:
            print("out of time", flush=True)
            break
        found = ranked(problem, device)
        print(line_of(problem, found), flush=True)
        time_s, config = found[0]
        name = f"{problem.product} bfloat16"
        key = (problem.out_features, problem.in_features, problem.rows, problem.is_gated)
        table.setdefault(name, {}).pop(key, None)
        if config is not None:
            table[name][key] = {**entry_of(problem, config), "us": round(1e6 * time_s, 2)}
        out.parent.mkdir(parents=True, exist_ok=True)
        tuned_table.write(out, table)


if __name__ == "__main__":
    main()
