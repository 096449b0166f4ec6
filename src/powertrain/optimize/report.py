"""What `optimize` shows: one self-contained HTML page that works offline and on paper, and a table for the terminal.

Both are pure functions of the record, so a report can be drawn again from `record.json` at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from powertrain.measure.record import device_line
from powertrain.optimize.choice import show_kl, show_ms
from powertrain.optimize.plot import breaks_limit, pareto_svg

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("candidate", "tok/s", "TPOT ms", "TTFT ms", "memory MB", "KL", "top-1", "perplexity", "verdict")
_LIMIT_NAMES = {
    "tpot_ms": ("time per output token", "ms", 1),
    "ttft_ms": ("time to first token", "ms", 1),
    "max_kl": ("KL divergence", "nats per token", 1),
    "max_memory": ("memory", "MB", 1e6),
}


def terminal_table(made: Mapping[str, Any]) -> Table:
    """All candidates of an optimize record, the best first, with the reason against each (a rich renderable)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"{made['model']}, {made['batch']} concurrent request{'s' if made['batch'] > 1 else ''}"
    table = Table(header_style="bold", pad_edge=False, padding=(0, 1, 0, 0), title=title, box=box.SIMPLE_HEAD)
    table.add_column("candidate", min_width=24)
    for column in _COLUMNS[1:-1]:
        table.add_column(column.replace(" ", "\n").replace("perplexity", "ppl"), justify="right", no_wrap=True)
    for row in _ordered(made["results"]):
        style = "bold green" if row["is_winner"] else "dim" if breaks_limit(row) else ""
        # The verdict stands under the name: a column of its own leaves no room for either on 80 columns.
        name = Text(f"{_name(row)}\n{_verdict(row)}", style=style)
        table.add_row(name, *(Text(cell, style=style) for cell in _figures(row)))
    return table


def render_html(made: Mapping[str, Any]) -> str:
    """The page of an optimize record: outcome, plot, table, method. No script, nothing loaded from outside."""
    style = resources.files("powertrain.optimize").joinpath("report.css").read_text(encoding="utf-8")
    rows = _ordered(made["results"])
    title = f"{made['model']}: optimize"
    body = [
        _header(made, rows),
        _serve(made),
        '<section><h2>Speed against fidelity</h2><figure class="wide">',
        pareto_svg(rows, made["limits"], made["batch"]),
        f"<figcaption>{_caption(rows)}</figcaption></figure></section>",
        _table(rows, made["limits"]),
        _notes(made),
        _method(made),
        _machine(made),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, float]:
        speed = row["speed"]["output_tokens_per_s"] if row["speed"] else 0.0
        return not row["is_winner"], breaks_limit(row), -speed

    # What was not timed was so under every setting: one line says it.
    shown: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        shown.setdefault((row["format"], row["setting"] if row["speed"] else ""), row)
    return sorted(shown.values(), key=rank)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['format']} · {_setting(row)}"


def _setting(row: Mapping[str, Any]) -> str:
    return str(row["setting"]) if row["speed"] else "not timed"


def _header(made: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    winner = next((row for row in rows if row["is_winner"]), None)
    if winner is None:
        heading, lead = "Nothing meets the limits", "Every candidate breaks a limit on this machine. What would help:"
        advice = "".join(f"<li>{escape(line)}</li>" for line in made["advice"])
        lead = f"{lead}</p><ul class='lead'>{advice}</ul><p>" if advice else "No candidate could be measured."
        figures = ""
    else:
        heading = "The model as it is" if winner["format"] == "none" else winner["format"]
        lead, figures = _lead(winner, rows), _key_figures(winner)
    return (
        f'<header><p class="kicker">Powertrain optimize · {escape(made["model"])}</p><h1>{escape(heading)}</h1>'
        f'<p class="lead">{lead}</p>{figures}<p class="limits">{escape(_limits_line(made))}</p></header>'
    )


def _lead(winner: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    plain = next(
        (row for row in rows if row["format"] == "none" and row["setting"] == "default" and row["speed"]), None
    )
    if plain is None or winner["format"] == "none":
        return "No weight format beats the model as it is within the limits."
    ratio = winner["speed"]["output_tokens_per_s"] / plain["speed"]["output_tokens_per_s"]
    agreement = winner["fidelity"]["top1_agreement"]
    return (
        f"{ratio:.1f} times the output of the model as it is, with the same most likely token in {agreement:.1%} of "
        "places."
    )


def _key_figures(winner: Mapping[str, Any]) -> str:
    speed, fidelity = winner["speed"], winner["fidelity"]
    figures = (
        (f"{speed['output_tokens_per_s']:.1f}", "output tokens/s"),
        (show_ms(speed["tpot_ms"]), "ms per output token"),
        (show_ms(speed["ttft_ms"]), "ms to first token"),
        (show_kl(_worst_kl(fidelity)), "KL, nats per token"),
        (f"{fidelity['ppl_ratio']:.3f}×", "perplexity"),
        (f"{speed['memory_bytes'] / 1e6:,.0f} MB", "memory at its peak"),
    )
    cells = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for value, label in figures)
    return f'<dl class="figures">{cells}</dl>'


def _limits_line(made: Mapping[str, Any]) -> str:
    parts = []
    for name, (label, unit, scale) in _LIMIT_NAMES.items():
        value = made["limits"].get(name)
        if value is not None:
            parts.append(f"{label} ≤ {value / scale:,g} {unit}")
    where = f"{made['batch']} concurrent request{'s' if made['batch'] > 1 else ''}"
    return f"Limits: {'; '.join(parts) if parts else 'none'}. Measured with {where}."


def _serve(made: Mapping[str, Any]) -> str:
    if not made["serve"]:
        return ""
    return f"<section><h2>Serve it</h2><pre><code>{escape(made['serve'])}</code></pre></section>"


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = ["Filled: meets the limits. Hollow: breaks one. Ringed: the choice."]
    if any(row["fidelity"] and not row["speed"] for row in rows):
        parts.append("Cross: fidelity already over the limit, so not timed.")
    parts.append("The line joins the candidates that no other beats in both.")
    return " ".join(parts)


def _table(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> str:
    heads = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    lines = []
    for row in rows:
        kind = "winner" if row["is_winner"] else "broken" if breaks_limit(row) else ""
        cells = "".join(f"<td>{cell}</td>" for cell in _cells(row, rows, limits))
        name = f"{escape(row['format'])}<small>{escape(_setting(row))}</small>"
        verdict = f'<td class="verdict">{_lines(_verdict(row))}</td>'
        lines.append(f'<tr class="{kind}"><th scope="row">{name}</th>{cells}{verdict}</tr>')
    return (
        '<section><h2>Every candidate</h2><div class="scroll"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> list[str]:
    """The figures of a row; the timed ones with a bar to the scale of their column and a mark at the limit."""
    figures = list(_figures(row))
    bars = (
        ("output_tokens_per_s", None),
        ("tpot_ms", "tpot_ms"),
        ("ttft_ms", "ttft_ms"),
        ("memory_bytes", "max_memory"),
    )
    for index, (key, limit) in enumerate(bars):
        if row["speed"]:
            longest = max(other["speed"][key] for other in rows if other["speed"])
            figures[index] += _bar(row["speed"][key], longest, limits.get(limit) if limit else None)
    if row["fidelity"]:
        low, high = row["fidelity"]["kl_low"], row["fidelity"]["kl_high"]
        figures[4] += f"<small>{show_kl(low)} to {show_kl(high)}</small>" if high > low else "<small>&nbsp;</small>"
    return figures


def _bar(value: float, longest: float, limit: float | None) -> str:
    width, scale = 64, 64 / (max(longest, limit or 0.0) or 1.0)
    is_over = limit is not None and value > limit
    fill = f'<rect class="{"bar over" if is_over else "bar"}" width="{value * scale:.1f}" height="3" y="3"/>'
    mark = f'<rect class="mark" x="{min(limit * scale, width - 1.5):.1f}" width="1.5" height="9"/>' if limit else ""
    return (
        f'<svg class="spark" viewBox="0 0 {width} 9" width="{width}" height="9" aria-hidden="true">{fill}{mark}</svg>'
    )


def _figures(row: Mapping[str, Any]) -> tuple[str, ...]:
    speed, fidelity = row["speed"], row["fidelity"]
    timed = ("–",) * 4
    if speed:
        rate, memory = f"{speed['output_tokens_per_s']:.1f}", f"{speed['memory_bytes'] / 1e6:,.0f}"
        timed = (rate, show_ms(speed["tpot_ms"]), show_ms(speed["ttft_ms"]), memory)
    if not fidelity:
        return *timed, "–", "–", "–"
    return (
        *timed,
        show_kl(_worst_kl(fidelity)),
        f"{fidelity['top1_agreement']:.1%}",
        f"{fidelity['ppl_ratio']:.3f}×",
    )


def _worst_kl(fidelity: Mapping[str, Any]) -> float:
    return float(max(0.0, fidelity["kl"], fidelity["kl_small_batch"]))


def _verdict(row: Mapping[str, Any]) -> str:
    if row["is_winner"]:
        return "chosen"
    # The figures stand in the row already.
    return "\n".join("slower" if reason.startswith("slower") else reason for reason in row["rejected"])


def _lines(text: str) -> str:
    return "<br>".join(escape(line) for line in text.splitlines())


def _notes(made: Mapping[str, Any]) -> str:
    if not made["notes"]:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in made["notes"])
    return f"<section><h2>About this model</h2><ul>{items}</ul></section>"


def _method(made: Mapping[str, Any]) -> str:
    effort = made["config"]["effort"]
    data = made["config"]["data"]
    data = "text sampled from the model as it is" if data == "self" else data
    return (
        "<section><h2>How it was measured</h2><p>"
        f"Each format was written to disk, read back and compared with the model as it is in float32, on "
        f"{effort['num_tokens']:,} tokens of {escape(data)}, in windows of {effort['window']}, seed {effort['seed']}. "
        f"KL is the mean divergence per token; the table gives the larger of two values, one from whole windows, "
        f"one from {made['config']['small_chunk']} tokens at a time, which takes the products that decoding takes. "
        f"Under it stands the 95 % bootstrap interval of the first. Top-1 is how often both give the same most likely "
        f"token; perplexity is relative to the model as it is.</p><p>"
        f"Speed was measured with the real engine in a process of its own: {made['batch']} request(s) of "
        f"{effort['prompt']} prompt tokens at once, {effort['output']} tokens out, temperature 0.6, the better of two "
        f"runs after a warm-up, no prefix cache. Memory is the peak of that process with a KV pool of "
        f"{made['config']['pool_bytes'] / 1e6:,.0f} MB; a server takes more unless --kv-cache-memory-bytes says so. "
        f"What drafts gain depends on the text; here it is the evaluation text. "
        f"The whole search took {made['seconds']:,.0f} s.</p></section>"
    )


def _machine(made: Mapping[str, Any]) -> str:
    facts = made["device"]
    versions = ", ".join(f"{name} {version}" for name, version in made["software"].items())
    commit = made["git"]["commit"]
    state = (
        f"commit {commit[:12]}{' with local changes' if made['git']['dirty'] else ''}"
        if commit
        else "installed package"
    )
    entries = {
        "Machine": device_line(facts) + (f" ({', '.join(facts['cpu_flags'])})" if facts["cpu_flags"] else ""),
        "System": facts["system"],
        "Software": versions,
        "Source": state,
        "Data": f"SHA-256 of the token ids {made['data_sha256'][:16]}…",
        "Made": made["created"],
    }
    cells = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in entries.items())
    return f'<section><h2>Machine and versions</h2><dl class="facts">{cells}</dl></section>'
