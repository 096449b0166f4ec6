"""Powertrain's quantization beside llm-compressor and AutoRound: the same source, calibration ids, scheme and judge.

Every row is a process of its own, one after the other: it loads the source, quantizes it and saves a folder, which is
then read back by this package and judged against the source. The same command again goes on with the rows that its
record lacks. docs/results/compression.md says how peers are installed and what is fair.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser
from peers.prepare import float32_folder
from peers.quantize_job import ask
from peers.quantizers import (
    AUTOROUND,
    LLM_COMPRESSOR,
    OURS,
    SCHEMES,
    WORKERS,
    Row,
    all_rows,
    comparisons,
    measured_rows,
    missing,
    put,
    wanted,
)

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress.calibrate import CalibrationSet, NgramFilter, calibration_set
from powertrain.compress.manifest import weights_sha256
from powertrain.config import cache_dir, physical_cores
from powertrain.measure import record
from powertrain.measure.evaluate import Reference
from powertrain.measure.scoring import Model, read_model
from powertrain.text_data import encode_texts, read_texts
from powertrain.types import PowertrainError

SHOWN = (
    *("kl_mean", "kl_p99", "top1_agreement", "ppl_reference", "ppl_candidate", "ppl_ratio"),
    *("bits_per_weight", "bytes", "intervals", "kl_windows"),
)


def main() -> None:
    given = _arguments()
    torch.set_num_threads(given.threads)
    try:
        pythons = _pythons(given)
        rows = wanted(all_rows(given.iterations), given.only, list(pythons))
        results = measured_rows(given.json, _settings(given))
        model = resolve_model(given.model)
        source = float32_folder(model, given.prepared.absolute() / f"{model.name}-{weights_sha256(model)[:12]}")
        seeds = [int(part) for part in given.seeds.split(",")]
        sets = {seed: _calibration(given, source, seed) for seed in seeds}
        reference = Reference(
            _judged(given, source, dtype="float32"),
            data=given.data,
            num_tokens=given.num_tokens,
            window=given.window,
        )
        for row, seed in missing(rows, seeds, results):
            found = _measure(given, row, seed, pythons[row.tool], source, sets[seed], reference)
            put(results, found)
            _show(found)
            # after each row: an interruption keeps what was measured
            content = {**_settings(given), "comparisons": comparisons(results), "results": results}
            record.write_record(given.json, record.new_record("compression_peers", git=given.git, **content))
    except PowertrainError as error:
        sys.exit(f"error: {error}")
    for pair in comparisons(results):
        _print_comparison(pair)
    print(f"wrote {given.json}")


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__, "compression_peers.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--calibration", type=Path, action="append", required=True, help="text, repeatable")
    arguments.add_argument("--data", type=Path, required=True, help="text that judges")
    arguments.add_argument("--llmcompressor-python", type=Path, help="python of an environment with llmcompressor")
    arguments.add_argument("--autoround-python", type=Path, help="python of one with auto-round, compressed-tensors")
    arguments.add_argument("--prepared", type=Path, default=cache_dir() / "peers", help="where the source is kept")
    arguments.add_argument("--num-samples", type=int, default=64)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument("--num-tokens", type=int, default=16384)
    arguments.add_argument("--window", type=int, default=512)
    arguments.add_argument("--iterations", type=int, default=200, help="of AutoRound, theirs and ours, in a row's name")
    arguments.add_argument("--threads", type=int, default=physical_cores())
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where all quantize and are judged")
    arguments.add_argument("--seeds", default="0", help="of the calibration windows")
    arguments.add_argument("--only", default="*", help="names of rows, commas between; `*` stands for anything")
    return arguments.parse_args()


def _pythons(given: argparse.Namespace) -> dict[str, Path]:
    """The python of each tool that is there. Raises `PowertrainError` for one that is named and is not."""
    named = {OURS: Path(sys.executable), LLM_COMPRESSOR: given.llmcompressor_python, AUTOROUND: given.autoround_python}
    found = {tool: python.absolute() for tool, python in named.items() if python}
    for tool, python in found.items():
        if not python.is_file():
            raise PowertrainError(f"{python}, named as the python of {tool}, is no file")
    return found


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """What the rows of one record have in common."""
    config = {key: getattr(given, key) for key in ("num_samples", "length", "num_tokens", "window", "threads")}
    if given.device != "cpu":
        config["device"] = given.device
    return {
        "model": Path(given.model).name,
        "data": given.data.name,
        "calibration": [path.name for path in given.calibration],
        "config": config,
    }


def _calibration(given: argparse.Namespace, source: Path, seed: int) -> CalibrationSet:
    """The windows all tools get. Raises `PowertrainError` if they share text with what judges."""
    how = {"num_samples": given.num_samples, "length": given.length, "seed": seed}
    found = calibration_set(given.calibration, open_checkpoint(source), **how)
    judging = encode_texts(read_texts(given.data), load_tokenizer(source))
    shared = NgramFilter(found.token_ids).num_shared([judging])
    if shared:
        raise PowertrainError(f"{shared} runs of 13 tokens of {given.data} are in the calibration text")
    return found


def _measure(
    given: argparse.Namespace,
    row: Row,
    seed: int,
    python: Path,
    source: Path,
    calibration: CalibrationSet,
    reference: Reference,
) -> dict[str, Any]:
    """Let the tool quantize, judge the folder it saved; `error` where either fails."""
    found: dict[str, Any] = {"name": row.name, "tool": row.tool, "scheme": row.scheme, "method": row.method}
    found |= {"seed": seed, "calibration_sha256": calibration.sha256, "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "ids.npy", calibration.token_ids.numpy())
        job: dict[str, Any] = {
            "source": str(source),
            "out": str(folder / "out"),
            "calibration": str(folder / "ids.npy"),
        }
        job |= {"scheme": SCHEMES[row.scheme], "method": row.options, "seed": seed}
        job |= {"threads": given.threads, "device": given.device}
        try:
            found |= ask(python, WORKERS[row.tool], job, folder)
        except RuntimeError as error:
            return {**found, "error": str(error)}
        try:
            judged = reference.compare(_judged(given, folder / "out")).to_dict()
        except PowertrainError as error:
            return {**found, "error": f"not readable here: {error}"}
    return {**found, **{key: judged[key] for key in SHOWN}}


def _judged(given: argparse.Namespace, model: Path, dtype: str = "auto") -> Model:
    """A model as it is judged: on a GPU in float32, on a CPU as the engine would serve it."""
    if given.device == "cuda":
        return read_model(model, device="cuda", dtype="float32", kernels="reference")
    return read_model(model, device="cpu", dtype=dtype)


def _show(row: dict[str, Any]) -> None:
    name = f"{row['name']:<48} seed {row['seed']}"
    if "error" in row:
        print(f"{name}  {row['error']}", flush=True)
        return
    peak = row["peak_rss_bytes"]
    print(
        f"{name}  KL {row['kl_mean']:.4f}  top-1 {row['top1_agreement']:.1%}  perplexity x {row['ppl_ratio']:.4f}  "
        f"{row['bits_per_weight']:.2f} bits  {row['seconds']:.0f} s of {row['process_seconds']:.0f} s  "
        f"{peak / 2**30 if peak else float('nan'):.1f} GiB",
        flush=True,
    )


def _print_comparison(pair: dict[str, Any]) -> None:
    interval = " [{:+.5f}, {:+.5f}]".format(*pair["interval"]) if pair["interval"] else ""
    difference = f"{pair['kl_mean_difference']:+.5f}{interval}"
    print(f"{pair['ours']}: {pair['ratio']:.3f} x the KL of {pair['peer']}, difference {difference}")


if __name__ == "__main__":
    main()
