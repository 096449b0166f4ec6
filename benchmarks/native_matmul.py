"""The native kernels' matrix products alone: rate by rows, format and instruction set, on the default model's shapes.

Each case is checked against the float product of the unpacked weights before it is timed; the weights of all copies of
a case are larger than the last cache, so that few rows show the memory and many rows the arithmetic.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import parser, write

from powertrain.config import physical_cores
from powertrain.kernels import native
from powertrain.measure import record
from powertrain.measure.roofline import read_bandwidth
from powertrain.model.packed import Grid, PackedMatrix, Part, pack
from powertrain.types import PowertrainError

SHAPES = {"gate_up": (3072, 576), "down": (576, 1536)}
ROWS = (1, 2, 3, 4, 8, 16, 64, 512)
COPIES_BYTES = 96 * 2**20
ROUNDS = 5


def parts(out: int, inner: int) -> dict[str, Part]:
    """One random matrix [out, inner] in every format that runs as stored."""
    generator = torch.Generator().manual_seed(0)
    blocks = inner // 32
    scale = (torch.rand(out, blocks, generator=generator) * 0.01 + 0.001).half()
    nibbles = torch.randint(0, 256, (out, blocks, 16), dtype=torch.uint8, generator=generator)
    octets = torch.randint(0, 256, (out, blocks, 32), dtype=torch.uint8, generator=generator)
    dense = torch.randn(out, inner, generator=generator) * 0.02
    return {
        "q4_1, int8 activations": Grid("u4", inner, nibbles, scale, -8 * scale, True),
        "q8_0, int8 activations": Grid("s8", inner, octets, scale, None, True),
        "int4 g32, float activations": Grid("u4", inner, nibbles, scale, None, False),
        "float32": dense,
        "bfloat16": dense.bfloat16(),
    }


def main() -> None:
    arguments = parser(__doc__, "native_matmul.json")
    arguments.add_argument("--threads", type=int, default=physical_cores())
    given = arguments.parse_args()
    module = native.load()
    if module is None:
        raise PowertrainError(f"nothing to measure: {native.unavailable()}")
    torch.set_num_threads(given.threads)
    results: list[dict[str, Any]] = []
    bandwidth = read_bandwidth("cpu")
    for level in module.levels():
        team = module.Team(given.threads, level)
        for shape, (out, inner) in SHAPES.items():
            for name, part in parts(out, inner).items():
                results += _measure(module, team, shape, name, part)
    made = record.new_record(
        "native_matmul", git=given.git, threads=given.threads, read_bytes_per_s=bandwidth, results=results
    )
    write(given.json, made)


def _measure(module: Any, team: Any, shape: str, name: str, part: Part) -> list[dict[str, Any]]:
    stream, layout = pack([part])
    num_copies = max(1, COPIES_BYTES // layout.num_bytes)
    matrices = [PackedMatrix(stream.clone(), layout, module, team) for _ in range(num_copies)]
    rows_found = []
    for rows in ROWS if team.level != "portable" else ROWS[:6]:
        x = torch.randn(rows, layout.in_features, generator=torch.Generator().manual_seed(rows))
        out = torch.empty(rows, layout.out_features)
        exact = x @ matrices[0].unpack().t()
        error = float((matrices[0].matmul(x) - exact).norm() / exact.norm())
        if error > (0.02 if layout.quantizes_activations else 1e-5):
            raise PowertrainError(f"{name} at {rows} rows is off by {error:.2e}: nothing is timed before it is right")
        used = matrices[: max(1, min(num_copies, 4096 // rows))]
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for matrix in used:
                module.matmul(team, matrix.matrix, x, out)
            best = min(best, (time.perf_counter() - start) / len(used))
        macs = rows * layout.in_features * layout.out_features
        found = {
            "level": team.level,
            "shape": shape,
            "format": name,
            "rows": rows,
            "ms": 1e3 * best,
            "giga_macs_per_s": macs / best / 1e9,
            "weight_gigabytes_per_s": layout.num_bytes / best / 1e9,
            "relative_error": error,
        }
        print(
            f"{team.level:<9} {shape:<8} {name:<28} {rows:>4} rows {found['ms']:8.3f} ms "
            f"{found['giga_macs_per_s']:7.1f} GMAC/s {found['weight_gigabytes_per_s']:6.1f} GB/s"
        )
        rows_found.append(found)
    return rows_found


if __name__ == "__main__":
    main()
