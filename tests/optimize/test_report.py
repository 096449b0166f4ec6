from __future__ import annotations

import re
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

import pytest

from powertrain.measure import record
from powertrain.optimize import plot, report
from powertrain.optimize.choice import choose
from powertrain.optimize.run import _row
from powertrain.optimize.space import Fidelity, Format, Limits, Measured, Setting, Speed, serve_command

VOID = {"meta", "br", "rect", "line", "circle", "path"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)
        if tag in ("meta", "br"):
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def measured(name: str, kl: float, rate: float | None, setting: str = "default") -> Measured:
    fidelity = Fidelity(kl=kl, kl_low=0.9 * kl, kl_high=1.1 * kl, kl_small_batch=kl, top1_agreement=0.9, ppl_ratio=1.1)
    speed = None
    if rate is not None:
        speed = Speed(
            ttft_ms=100, tpot_ms=1000 / rate, output_tokens_per_s=rate, memory_bytes=4 * 10**8, weight_bytes=10**8
        )
    return Measured(format=Format(name), setting=Setting(setting), fidelity=fidelity, speed=speed)


def page_record(candidates: list[Measured], limits: Limits, model: str = "smollm2") -> dict[str, Any]:
    choice = choose(candidates, limits)
    return record.new_record(
        "optimize",
        git="abc",
        model=model,
        limits=asdict(limits),
        batch=1,
        config={
            "data": "self",
            "effort": {"num_tokens": 64, "window": 16, "prompt": 8, "output": 4, "seed": 0},
            "small_chunk": 8,
            "pool_bytes": 10**8,
        },
        data_sha256="0" * 64,
        results=[_row(candidate, choice) for candidate in candidates],
        winner=choice.winner.name if choice.winner else None,
        serve=serve_command("out/model", choice.winner.setting.options) if choice.winner else None,
        advice=[str(relaxation) for relaxation in choice.relaxations],
        notes=["a <note>"],
        seconds=1.0,
    )


USUAL = [
    measured("none", 0.0, 20),
    measured("W8A16 channel", 0.002, 35),
    measured("W8A16 channel, head W8A16", 0.0021, 40),
    measured("W4A16 g64", 0.13, None),
    measured("W4A16_ASYM g64", 0.06, 50),
    measured("W4A16_ASYM g64", 0.06, 55, "n-gram drafts"),
]
CASES = {
    "usual": (USUAL, Limits(tpot_ms=40, max_kl=0.1)),
    "nothing qualifies": (USUAL, Limits(tpot_ms=1)),
    "no limits": (USUAL, Limits()),
    "one candidate": (USUAL[:1], Limits(max_kl=0.0)),
    "equal marks": ([measured(f"format {n}", 0.01, 30) for n in range(6)], Limits(max_kl=0.01)),
    "nothing ran": (
        [Measured(format=Format("none"), setting=Setting("default"), fidelity=None, failure="x")],
        Limits(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_loads_nothing(case: str) -> None:
    html = report.render_html(page_record(*CASES[case]))
    page = Page()
    page.feed(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|//\w|url\(|@import", html)
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", html.lower())


def test_the_page_says_what_the_record_says() -> None:
    made = page_record(*CASES["usual"])
    html = report.render_html(made)
    assert made["winner"] == "W4A16_ASYM g64 · n-gram drafts"
    assert "powertrain serve out/model" in html
    assert "KL 0.13 &gt; --max-kl 0.1" in html
    assert "2.8 times" in html
    assert record.device_line(made["device"]).split(",")[0] in html
    assert "prefers-color-scheme" in html
    assert "@media print" in html
    assert "<title id=" in html
    assert "<desc id=" in html


def test_names_are_escaped() -> None:
    html = report.render_html(page_record(*CASES["usual"], model="<script>alert(1)</script>"))
    assert "<script" not in html
    assert "a &lt;note&gt;" in html


def test_when_nothing_qualifies_the_page_gives_the_advice() -> None:
    made = page_record(*CASES["nothing qualifies"])
    html = report.render_html(made)
    assert "Nothing meets the limits" in html
    assert "--tpot-ms 19 would admit" in html
    assert "powertrain serve" not in html


def test_labels_do_not_cover_each_other() -> None:
    rows = page_record(*CASES["usual"])["results"]
    rows += page_record(*CASES["equal marks"])["results"]
    axes = plot._axes(rows, [row for row in rows if row["speed"]], 0.1)
    boxes = []
    for label in plot._labels(axes, rows, 0.1):
        middle, bottom, name = re.search(r'x="([\d.]+)" y="([\d.]+)".*>(.*)</text>', label).groups()  # type: ignore[union-attr]
        half = len(name) * plot._CHAR / 2
        boxes.append((float(middle) - half, float(bottom) - 11, float(middle) + half, float(bottom) + 4))
    assert len(boxes) == 11
    for index, box in enumerate(boxes):
        assert not any(plot._overlap(box, other) for other in boxes[:index])
        assert 0 <= box[0] <= box[2] <= plot._WIDTH


@pytest.mark.parametrize("width", [80, 160])
def test_terminal_table_has_every_candidate_and_reason(width: int) -> None:
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as captured:
        console.print(report.terminal_table(page_record(*CASES["usual"])))
    lines = captured.get().splitlines()
    first_column = " ".join(" ".join(line[:27].split()) for line in lines) if width == 80 else " ".join(lines)
    for expected in ("n-gram drafts", "chosen", "KL 0.13 > --max-kl 0.1", "not timed", "TPOT 50 > --tpot-ms 40"):
        assert expected in first_column
    assert len(lines) < 40
