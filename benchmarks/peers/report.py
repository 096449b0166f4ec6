"""Rows of the record, and the tables people read (100 columns)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from peers.contender import Worker
from peers.works import Work, best_peer, ratios_to_best
from rich import box
from rich.console import Console, Group
from rich.table import Table

LIKE_FIDELITY = 1.5
"""A peer counts as equally faithful up to this many times our KL; those that lose most are a hundred times off."""

Fidelity = Mapping[str, Mapping[str, Any]]
"""Rows of the fidelity record by contender."""


def work_rows(
    work: Work,
    rates: Mapping[str, Sequence[float]],
    workers: Mapping[str, Worker],
    settings: Mapping[str, Mapping[str, Any]],
    read_bytes_per_s: float,
    fidelity: Fidelity,
) -> list[dict[str, Any]]:
    """One row a contender. `workers` names the process behind each name in `rates`; a server shares that of its engine.

    `floor_tokens_per_s` is what reading the weights (and, for decode, the KV cache) once a step allows at the
    bandwidth measured between the rounds; prefill is bound by arithmetic and has none.
    """
    peers = [name for name in rates if not workers[name].contender.is_ours]
    rows = []
    for name, own in rates.items():
        worker = workers[name]
        step_bytes = work.bytes_per_step(worker.weight_bytes, worker.about["kv_bytes_per_token"], len(own))
        median = statistics.median(own)
        row: dict[str, Any] = {"name": name, "workload": work.name, "batch": work.batch, "prompt": work.prompt}
        row |= {"output": work.output, "format": worker.contender.format, "settings": dict(settings.get(name, {}))}
        row |= {"median_tokens_per_s": median, "best_tokens_per_s": max(own), "tokens_per_s": list(own)}
        row["bytes_per_step"] = step_bytes
        if step_bytes is not None and work.kind != "requests":
            floor = work.batch * read_bytes_per_s / step_bytes
            row |= {"floor_tokens_per_s": floor, "fraction_of_floor": median / floor}
        if worker.contender.name in fidelity:
            row["kl_mean"] = fidelity[worker.contender.name]["kl_mean"]
        if worker.contender.is_ours and peers:
            ratios = ratios_to_best(rates, name, peers)
            row |= {"best_peer": best_peer(rates, peers), "ratios_to_best_peer": ratios}
            row["ratio_to_best_peer"] = statistics.median(ratios)
            if alike := _of_like_fidelity(worker.contender.name, peers, workers, fidelity):
                row["best_peer_of_like_fidelity"] = best_peer(rates, alike)
                row["ratio_to_best_of_like_fidelity"] = statistics.median(ratios_to_best(rates, name, alike))
        rows.append(row)
    return rows


def _of_like_fidelity(name: str, peers: Sequence[str], workers: Mapping[str, Worker], fidelity: Fidelity) -> list[str]:
    """The peers whose KL is at most `LIKE_FIDELITY` times that of `name`; none where KL is not known."""
    if name not in fidelity:
        return []
    limit = LIKE_FIDELITY * fidelity[name]["kl_mean"]
    known = {peer: fidelity.get(workers[peer].contender.name) for peer in peers}
    return [peer for peer, found in known.items() if found and found["kl_mean"] <= limit]


def show(results: Sequence[Mapping[str, Any]], contenders: Sequence[Mapping[str, Any]]) -> None:
    """Ours beside the best peer, everybody's medians, and what the formats are."""
    Console(width=100).print(Group(_against_best(results), _medians(results), _formats(contenders)))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_words = column in ("work", "contender", "powertrain", "best peer", "format")
        table.add_column(column, justify="left" if is_words else "right", no_wrap=True)
    return table


def _against_best(results: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("work", "powertrain", "tok/s", "floor", "best peer", "tok/s", "ratio", "rounds")
    table = _table("Medians over rounds; floor: share of it reached; ratio: to the best peer of each round", *columns)
    medians = {(row["workload"], row["name"]): row["median_tokens_per_s"] for row in results}
    for row in results:
        if "best_peer" not in row:
            continue
        peer, ratios = row["best_peer"], row["ratios_to_best_peer"]
        fraction = f"{row['fraction_of_floor']:.0%}" if "fraction_of_floor" in row else ""
        table.add_row(
            row["workload"],
            row["name"].removeprefix("powertrain").strip() or "engine",
            f"{row['median_tokens_per_s']:,.0f}",
            fraction,
            peer,
            f"{medians[row['workload'], peer]:,.0f}",
            f"{row['ratio_to_best_peer']:.2f}",
            f"{min(ratios):.2f}-{max(ratios):.2f}",
        )
    return table


def _medians(results: Sequence[Mapping[str, Any]]) -> Table:
    works = list(dict.fromkeys(row["workload"] for row in results))
    medians = {(row["name"], row["workload"]): row["median_tokens_per_s"] for row in results}
    table = _table("Median tok/s (b: decode, p: prefill)", "contender", *map(_short, works))
    for name in dict.fromkeys(row["name"] for row in results):
        cells = (medians.get((name, work)) for work in works)
        table.add_row(name, *("" if cell is None else f"{cell:,.0f}" for cell in cells))
    return table


def _short(work: str) -> str:
    for long, short in (("decode-", "b="), ("prefill-", "p="), ("context-", "ctx "), ("requests-", "req ")):
        work = work.replace(long, short)
    return work


def _formats(contenders: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("contender", "format", "weights MB/step", "KV B/token", "KL mean", "top-1")
    table = _table("What they read and how faithful it is", *columns)
    for made in contenders:
        kl, top1 = made.get("kl_mean"), made.get("top1_agreement")
        table.add_row(
            made["name"],
            made["format"],
            f"{made['weight_bytes'] / 1e6:.1f}",
            f"{made['kv_bytes_per_token']:,}",
            "" if kl is None else f"{kl:.5f}",
            "" if top1 is None else f"{top1:.1%}",
        )
    return table
