"""The rows of the comparison of tools that quantize: which tool does what, and what was measured already."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from powertrain.measure.statistics import summarize_items
from powertrain.types import PowertrainError

OURS, LLM_COMPRESSOR, AUTOROUND = "powertrain", "llm-compressor", "autoround"
HERE = Path(__file__).resolve().parent
WORKERS = {
    OURS: HERE / "powertrain_quantizer.py",
    LLM_COMPRESSOR: HERE / "llmcompressor_worker.py",
    AUTOROUND: HERE / "autoround_worker.py",
}

Options = dict[str, Any]
SCHEMES: dict[str, Options] = {
    "W4 g64": {"num_bits": 4, "group_size": 64, "activation_bits": None},
    "W4 channel": {"num_bits": 4, "group_size": None, "activation_bits": None},
    "W3 g64": {"num_bits": 3, "group_size": 64, "activation_bits": None},
    "W2 g64": {"num_bits": 2, "group_size": 64, "activation_bits": None},
    "W8A8": {"num_bits": 8, "group_size": None, "activation_bits": 8},
}
"""All symmetric."""

RTN: Options = {"round": "rtn", "observer": "minmax"}
GPTQ: Options = {"round": "gptq", "observer": "minmax"}
BEST: Options = {"round": "gptq", "observer": "weighted", "correction": "asymmetric"}
AWQ: Options = {"transform": "awq"}
SMOOTHQUANT: Options = {"transform": "smoothquant"}
MSE: Options = {"observer": "mse"}

SHARED: dict[str, Options] = {"rtn": RTN, "gptq": GPTQ}
"""What both ours and llm-compressor do at any bits."""
WEIGHT_ONLY: dict[str, Options] = {
    "rtn mse": {**RTN, **MSE},
    "gptq mse": {**GPTQ, **MSE},
    "awq rtn": {**RTN, **AWQ},
    "awq gptq": {**GPTQ, **AWQ},
    "awq gptq mse": {**GPTQ, **AWQ, **MSE},
}
METHODS: dict[str, dict[str, Options]] = {
    OURS: {**WEIGHT_ONLY, "gptq weighted asymmetric": BEST, "awq gptq weighted asymmetric": {**BEST, **AWQ}},
    LLM_COMPRESSOR: {**WEIGHT_ONLY, "gptq imatrix": {**GPTQ, "observer": "imatrix"}},
}
WITH_ACTIVATIONS: dict[str, Options] = {
    "smoothquant rtn": {**RTN, **SMOOTHQUANT},
    "smoothquant gptq": {**GPTQ, **SMOOTHQUANT},
}
LEARNED_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tool, scheme and method, as `peers/quantize_job.py` words them."""

    tool: str
    scheme: str
    method: str
    options: Options

    @property
    def name(self) -> str:
        return f"{self.tool} {self.scheme} {self.method}"

    @property
    def is_calibrated(self) -> bool:
        """Whether another seed gives another result."""
        return self.options["round"] != "rtn" or "transform" in self.options


def all_rows(iterations: int) -> list[Row]:
    """Every row, scheme by scheme; `iterations` of what is learned."""
    return [
        Row(tool=tool, scheme=scheme, method=method, options=options)
        for scheme in SCHEMES
        for tool, methods in _methods(scheme, iterations).items()
        for method, options in methods.items()
    ]


def _methods(scheme: str, iterations: int) -> dict[str, dict[str, Options]]:
    if scheme == "W8A8":
        return {tool: {**SHARED, **WITH_ACTIVATIONS} for tool in METHODS}
    learned: Options = {"round": "autoround", "iterations": iterations, "batch_size": LEARNED_BATCH}
    name = f"{iterations} steps"
    rows = {tool: {**SHARED, **methods} for tool, methods in METHODS.items()}
    # each from its own first ranges: ours searches them, AutoRound takes them whole
    rows[OURS][f"autoround {name}"] = {**learned, **MSE}
    return {**rows, AUTOROUND: {name: {**learned, "observer": "minmax"}}}


def wanted(rows: Sequence[Row], only: str, tools: Sequence[str]) -> list[Row]:
    """Rows of the tools that are there, whose names fit one of the patterns. Raises `PowertrainError` if none does."""
    found = [row for row in rows if row.tool in tools and any(fnmatch(row.name, part) for part in only.split(","))]
    if not found:
        raise PowertrainError(f"--only {only}: no row of {', '.join(tools)} has such a name, e.g. {rows[0].name!r}")
    return found


def missing(
    rows: Sequence[Row], seeds: Sequence[int], measured: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Row, int]]:
    """(row, seed) that were not measured yet; a row that failed is tried again. Uncalibrated ones run once."""
    done = {(row["name"], row["seed"]) for row in measured if "error" not in row}
    for row in rows:
        for seed in seeds if row.is_calibrated else seeds[:1]:
            if (row.name, seed) not in done:
                yield row, seed


def put(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Add a measured row in place of what the same row and seed gave before."""
    rows[:] = [one for one in rows if (one["name"], one["seed"]) != (row["name"], row["seed"])]
    rows.append(row)


def measured_rows(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that earlier runs left in a record. Raises `PowertrainError` if those had other settings."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise PowertrainError(
                f"{path} holds rows of another {key} ({earlier.get(key)}, now {value}); give another --json"
            )
    rows: list[dict[str, Any]] = earlier["results"]
    return rows


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each scheme our method with the least KL beside each peer's, over the seeds that were measured.

    `kl_mean_difference` is ours less theirs, with its paired 95 % bootstrap interval over windows.
    """
    found = []
    for scheme in SCHEMES:
        best = {
            tool: _best([row for row in rows if (row["tool"], row["scheme"]) == (tool, scheme)]) for tool in WORKERS
        }
        for peer in (LLM_COMPRESSOR, AUTOROUND):
            ours, theirs = best[OURS], best[peer]
            if ours is None or theirs is None:
                continue
            (own, own_name), (other, other_name) = ours, theirs
            difference = summarize_items({"kl": own - other})
            interval = list(difference.intervals.get("kl", ()))
            pair = {"scheme": scheme, "ours": own_name, "peer": other_name, "ratio": float(own.mean() / other.mean())}
            found.append({**pair, "kl_mean_difference": difference.values["kl"], "interval": interval})
    return found


def _best(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, str] | None:
    """KL of each window, the mean over seeds, and the name of the rows where it is least."""
    by_name: dict[str, list[list[float]]] = {}
    for row in rows:
        if "error" not in row:
            by_name.setdefault(row["name"], []).append(row["kl_windows"])
    means = [(np.mean(windows, axis=0), name) for name, windows in by_name.items()]
    return min(means, key=lambda one: float(one[0].mean())) if means else None
