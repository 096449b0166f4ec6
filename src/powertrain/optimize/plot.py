"""The speed-against-fidelity plot as inline SVG: no script, no style of its own beyond class names of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 880.0, 440.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 24.0, 30.0, 56.0
_ZERO_GAP = 84.0
"""Width kept left of the logarithmic axis for a KL of exactly zero, which has no logarithm."""
_TINY_KL = 1e-8
"""Below this a KL is rounding of equal models and stands with the zero."""
_CHAR, _LINE = 6.7, 15.0
"""Estimated width and height of a 12-pixel character: labels are placed without a browser to measure them."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class _Axes:
    """From KL and tokens/s to SVG coordinates."""

    low: float
    high: float
    top_speed: float

    def x(self, kl: float) -> float:
        if kl < _TINY_KL:
            return _LEFT + _ZERO_GAP / 2
        start, width = _LEFT + _ZERO_GAP, _WIDTH - _RIGHT - _LEFT - _ZERO_GAP
        return start + width * (math.log10(kl) - self.low) / (self.high - self.low)

    def y(self, speed: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * speed / self.top_speed


def pareto_svg(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float | None], batch: int) -> str:
    """One mark per candidate of a record's `results`: KL to the right (logarithmic), output tokens/s upwards.

    Filled marks meet the limits, hollow ones break one, the winner is ringed; a cross on the base line was judged but
    not timed. The line joins the candidates that no other beats in both. `title` and `desc` say the same in words.
    """
    judged = [row for row in rows if row["fidelity"]]
    timed = [row for row in judged if row["speed"]]
    max_kl = limits.get("max_kl")
    axes = _axes(judged, timed, max_kl)
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        'aria-labelledby="plot-title plot-desc">',
        '<title id="plot-title">Speed against fidelity</title>',
        f'<desc id="plot-desc">{escape(_description(timed, max_kl, batch))}</desc>',
        *_limit_area(axes, max_kl),
        *_grid(axes),
        *_front(axes, timed),
    ]
    marks = [_mark(axes, row) for row in judged]
    parts += marks
    parts += _labels(axes, judged, max_kl)
    parts.append("</svg>")
    return "\n".join(parts)


def _kl(row: Mapping[str, Any]) -> float:
    fidelity = row["fidelity"]
    return float(max(0.0, fidelity["kl"], fidelity["kl_small_batch"]))


def _speed(row: Mapping[str, Any]) -> float:
    return float(row["speed"]["output_tokens_per_s"]) if row["speed"] else 0.0


def breaks_limit(row: Mapping[str, Any]) -> bool:
    """Whether the row was rejected for anything but being slower than the winner."""
    return any(not reason.startswith("slower") for reason in row["rejected"])


def _axes(judged: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]], max_kl: float | None) -> _Axes:
    values = [_kl(row) for row in judged] + ([max_kl] if max_kl else [])
    positive = [value for value in values if value >= _TINY_KL] or [0.01, 0.1]
    low, high = math.floor(math.log10(min(positive)) * 2) / 2, math.ceil(math.log10(max(positive)) * 2) / 2
    # Room for the labels right of the last mark, and never a span of nothing.
    low, high = (low - 0.5, high + 0.5) if high - low < 1 else (low - 0.15, high)
    fastest = max((_speed(row) for row in timed), default=1.0) or 1.0
    return _Axes(low, high, 1.12 * fastest)


def _grid(axes: _Axes) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for speed in _ticks(axes.top_speed):
        y = axes.y(speed)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{speed:g}</text>')
    for exponent in range(math.ceil(axes.low - 1e-9), math.floor(axes.high + 1e-9) + 1):
        for factor in (1, 2, 5):
            kl = factor * 10.0**exponent
            if axes.low - 1e-9 <= math.log10(kl) <= axes.high + 1e-9:
                x = axes.x(kl)
                parts.append(f'<line class="tickmark" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
                parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{kl:g}</text>')
    zero = axes.x(0.0)
    parts.append(f'<text class="tick" x="{zero:.1f}" y="{bottom + 20}" text-anchor="middle">0</text>')
    # The base line is broken between the exact zero and the logarithmic part.
    start = _LEFT + _ZERO_GAP
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{start - 12}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="{start - 4}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for x in (start - 12, start - 4):
        parts.append(f'<line class="axis" x1="{x - 3}" x2="{x + 3}" y1="{bottom + 5}" y2="{bottom - 5}"/>')
    parts.append(f'<text class="label" x="{_LEFT - 44}" y="{_TOP - 14}">output tokens/s</text>')
    end = _WIDTH - _RIGHT
    note = "KL divergence from the model as it is, nats per token (further left is more faithful)"
    parts.append(f'<text class="label" x="{end}" y="{_HEIGHT - 12}" text-anchor="end">{note}</text>')
    return parts


def _limit_x(axes: _Axes, max_kl: float) -> float:
    return axes.x(max_kl) if max_kl >= _TINY_KL else _LEFT + _ZERO_GAP - 20


def _limit_area(axes: _Axes, max_kl: float | None) -> list[str]:
    if max_kl is None:
        return []
    x, bottom, right = _limit_x(axes, max_kl), _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    # The words go where the room is.
    side, anchor = (6, "start") if right - x > 130 else (-6, "end")
    return [
        f'<rect class="beyond" x="{x:.1f}" y="{_TOP}" width="{max(0.0, right - x):.1f}" height="{bottom - _TOP}"/>',
        f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>',
        f'<text class="limit-label" x="{x + side:.1f}" y="{_TOP - 14}" text-anchor="{anchor}">'
        f"limit: KL {max_kl:g}</text>",
    ]


def _front(axes: _Axes, timed: Sequence[Mapping[str, Any]]) -> list[str]:
    """A staircase through the candidates that are faster than every more faithful one."""
    points: list[tuple[float, float]] = []
    fastest = 0.0
    for row in sorted(timed, key=lambda row: (_kl(row), -_speed(row))):
        if _speed(row) > fastest:
            fastest = _speed(row)
            points.append((axes.x(_kl(row)), axes.y(fastest)))
    if len(points) < 2:
        return []
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for x, y in points[1:]:
        path += f" H{x:.1f} V{y:.1f}"
    return [f'<path class="front" d="{path}"/>']


def _mark(axes: _Axes, row: Mapping[str, Any]) -> str:
    x, y = axes.x(_kl(row)), axes.y(_speed(row))
    if not row["speed"]:
        arms = f"M{x - 4:.1f} {y - 4:.1f} l8 8 M{x - 4:.1f} {y + 4:.1f} l8 -8"
        return f'<path class="untimed" d="{arms}"><title>{escape(row["name"])}: not timed</title></path>'
    kind = "broken" if breaks_limit(row) else "winner" if row["is_winner"] else "met"
    title = f"<title>{escape(row['name'])}: {_speed(row):.1f} tokens/s, KL {_kl(row):.3g}</title>"
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="10"/>' if row["is_winner"] else ""
    return f'{ring}<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'


def _labels(axes: _Axes, judged: Sequence[Mapping[str, Any]], max_kl: float | None) -> list[str]:
    """One label a format, at its fastest mark, moved aside until it covers no mark, no other label, nor the limit."""
    taken: list[Box] = []
    for row in judged:
        x, y, radius = axes.x(_kl(row)), axes.y(_speed(row)), 13 if row["is_winner"] else 7
        taken.append((x - radius, y - radius, x + radius, y + radius))
    line = [] if max_kl is None else [(_limit_x(axes, max_kl) - 3, 0.0, _limit_x(axes, max_kl) + 3, _HEIGHT)]
    best: dict[str, Mapping[str, Any]] = {}
    for row in judged:
        shown = best.get(row["format"])
        if shown is None or (row["is_winner"], _speed(row)) > (shown["is_winner"], _speed(shown)):
            best[row["format"]] = row
    parts = []
    for row in sorted(best.values(), key=lambda row: (not row["is_winner"], -_speed(row))):
        name = "as it is" if row["format"] == "none" else row["format"]
        width = len(name) * _CHAR * (1.12 if row["is_winner"] else 1.0)  # the winner's is bold
        x, y = axes.x(_kl(row)), axes.y(_speed(row))
        places = [box for box in _places(x, y, width) if _is_inside(box)]
        free = [box for box in places if not any(_overlap(box, other) for other in taken)]
        # Where nothing else is free, a label may lie across the limit.
        clear = [box for box in free if not any(_overlap(box, other) for other in line)]
        box = next(iter(clear or free or places), (x, y, x + width, y + _LINE))
        taken.append(box)
        kind = "name winner-name" if row["is_winner"] else "name"
        middle = (box[0] + box[2]) / 2
        parts.append(
            f'<text class="{kind}" x="{middle:.1f}" y="{box[3] - 4:.1f}" text-anchor="middle">{escape(name)}</text>'
        )
    return parts


def _places(x: float, y: float, width: float) -> list[Box]:
    """Boxes around (x, y), the best first: above, left, right, below, then the same further and further away."""
    places: list[Box] = []
    for step in range(24):
        away = step * _LINE / 2
        up, down = y - 20 - away, y + 20 + away
        spots = [(x - width / 2, up), (x - 18 - width, y - away), (x + 18, y - away), (x - width / 2, down)]
        spots += [(x - 18 - width, y + away), (x + 18, y + away), (x - 10 - width, up), (x + 10, up)]
        places += [(left, middle - _LINE / 2, left + width, middle + _LINE / 2) for left, middle in spots]
    return places


def _is_inside(box: Box) -> bool:
    return box[0] >= _LEFT and box[2] <= _WIDTH - 4 and box[1] >= _TOP - 6 and box[3] <= _HEIGHT - _BOTTOM - 4


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ticks(top: float) -> list[float]:
    """Round values from 0 up to `top`, four to eight of them."""
    step = 10.0 ** math.floor(math.log10(top / 4))
    step = next((step * factor for factor in (1, 2, 5, 10) if top / (step * factor) <= 7), step * 10)
    return [step * index for index in range(int(top / step) + 1)]


def _description(timed: Sequence[Mapping[str, Any]], max_kl: float | None, batch: int) -> str:
    entries = [f"{row['name']} {_speed(row):.1f} tokens/s at KL {_kl(row):.3g}" for row in timed]
    limit = f" The KL limit is {max_kl:g}." if max_kl is not None else ""
    return f"Output tokens per second at {batch} concurrent requests: {'; '.join(entries) or 'none timed'}.{limit}"
