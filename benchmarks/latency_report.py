"""benchmarks/history as one HTML page that needs nothing beside it: latest numbers, history, latency by size, rooflines."""

from __future__ import annotations

import html
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.latency_history import NARROW, Kernel, Kernels, Key, Record
from benchmarks.plots import Axis, Series, chart
from engines.errors import RequestError

__all__ = ["floor_ms", "page", "write_report"]

ROWS = 15  # of a table of kernels
STYLE = """
:root { --paper: #fff; --ink: #222; --faint: #ddd } body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em;
padding: 0 1em; color: var(--ink); background: var(--paper) } h2 { margin-top: 2em } h3 { margin: 1.4em 0 .3em; font-size: 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25em .8em; border-bottom: 1px solid var(--faint);
text-align: right; vertical-align: top }
td:first-child, th:first-child { text-align: left; overflow-wrap: anywhere }
.table { overflow-x: auto } .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(24em, 1fr)); gap: 1em 2em }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: currentColor }
.grid { stroke: var(--faint); stroke-width: 1 }
.small { font-size: 13px } .slower { color: #b11 }
@media (prefers-color-scheme: dark) { :root { --paper: #16181a; --ink: #ddd; --faint: #3a3d40 } .slower { color: #f77 } }
"""


def write_report(path: Path, records: Sequence[Record], more: Iterable[str] = ()) -> Path:
    """The page at `path`, whole or not at all. more: further sections, as HTML. Raises RequestError without records."""
    text = page(records, more)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def page(records: Sequence[Record], more: Iterable[str] = ()) -> str:
    """The page's text. records: the oldest first, as History.read gives them."""
    if not records:
        raise RequestError("--report: got no records in the history; expected at least one run. Run benchmarks/latency.py first.")
    by_key: dict[Key, list[Record]] = defaultdict(list)
    for record in records:
        by_key[record.key].append(record)
    latest = [rows[-1] for rows in by_key.values()]
    profiled = [next((row for row in reversed(rows) if row.kernels is not None), rows[-1]) for rows in by_key.values()]
    sections = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Latency</title><style>{STYLE}</style><h1>Latency</h1>"
        f"<p>{len(records)} measurements, the latest of {records[-1].date}. Milliseconds are the device's: between CUDA events, or "
        "of a CPU's cores. Ratios are medians of paired ratios: each sample of the work is divided by samples of the yardstick "
        "just before and after it, so that a machine that is slower today changes nothing.</p>",
        _now(by_key),
        "<h2>History</h2><p>The ratio to the yardstick, divided by that of the first run. Full discs: accepted runs.</p>",
        f"<div class=charts>{''.join(_history(by_key))}</div>",
        "<h2>Latency by size</h2><p>Medians of the latest run of each size; both axes are logarithmic.</p>",
        f"<div class=charts>{''.join(_sizes(latest))}</div>",
        "<h2>Roofline</h2><p>A kernel is bounded by arithmetic (the flat roof: the fastest GEMM's rate) or by traffic (the slope: "
        "a copy's rate), both measured in the same run: the latest of its kind that timed kernels. Its floor is the larger "
        "of the two times.</p>",
        *_rooflines(profiled),
        *more,
    ]
    return "\n".join(sections) + "\n"


def _now(by_key: Mapping[Key, list[Record]]) -> str:
    head = ("work", "p50 ms", "p90", "p99", "wall p50", "of the yardstick", "since accepted", "beside it", "memory MB", "energy J")
    parts = ["<h2>Latest</h2><div class=table><table><tr>" + "".join(f"<th>{word}" for word in head) + "</tr>"]
    notes: dict[str, None] = {}  # in order, once each
    for rows in by_key.values():
        now = rows[-1]
        before = next((row for row in reversed(rows[:-1]) if row.accepted), None)
        yardstick = now.references[now.yardstick]
        change = "" if before is None else f"{yardstick.ratio / before.references[before.yardstick].ratio - 1:+.1%}"
        peers = "<br>".join(
            f"{html.escape(name)} {other.ms:.3f} ms{' wall' if other.clock == 'wall' else ''} ({1 / other.ratio:.2f} x"
            f"{'; ' + html.escape(other.note) if other.note else ''})"
            for name, other in now.references.items()
            if other.rms_error is not None
        )
        energy = f"{now.energy_j:.3g}" if now.energy_j else "none"
        memory = "unknown" if now.memory_bytes is None else f"{now.memory_bytes / 1e6:.0f}"
        if not now.energy_j and now.energy_note:
            notes[f"Energy {now.energy_note}."] = None
        times = (now.device.p50, now.device.p90, now.device.p99, now.wall.p50)
        parts.append(
            f"<tr><td>{html.escape(now.title)}<br><span class=small>{html.escape(now.machine)}; {now.date[:10]}; commit "
            f"{html.escape(now.commit)}; bundle {now.bundle[:12]}{f'; GPU at {now.clock_mhz:.0f} MHz' if now.clock_mhz else ''}"
            f"{'; ' + html.escape(now.note) if now.note else ''}</span>"
            + "".join(f"<td>{ms:.3f}" for ms in times)
            + f"<td>{yardstick.ratio:.4f}<td>{change}<td>{peers}<td>{memory}<td>{energy}</tr>"
        )
    yardsticks = dict.fromkeys(html.escape(rows[-1].yardstick) for rows in by_key.values())
    notes[f"Yardstick: {'; '.join(yardsticks)}."] = None
    return "".join(parts) + f"</table></div><p class=small>{' '.join(notes)}</p>"


def _history(by_key: Mapping[Key, list[Record]]) -> list[str]:
    groups: dict[str, list[list[Record]]] = defaultdict(list)
    for rows in by_key.values():
        first = rows[0]
        groups[f"{first.model} {first.component}, {first.precision}, {first.backend}, {first.machine}"].append(rows)
    found = []
    for title, keys in groups.items():
        runs = list(dict.fromkeys(row.run for rows in sorted(keys, key=lambda rows: rows[0].date) for row in rows))
        dates = {row.run: row.date for rows in keys for row in rows}
        runs.sort(key=lambda run: dates[run])
        step = max(1, -(-len(runs) // 5))
        shown = range(0, len(runs), step)
        labels = _times([dates[runs[number]] for number in shown])
        ticks = [(number + 1.0, label) for number, label in zip(shown, labels, strict=True)]
        series = []
        for rows in keys:
            start = rows[0].references[rows[0].yardstick].ratio
            ratios = [row.references[row.yardstick].ratio / start for row in rows]
            series.append(
                Series(
                    name=_kind(rows[0]),
                    points=[(float(runs.index(row.run) + 1), ratio) for row, ratio in zip(rows, ratios, strict=True)],
                    words=[f"run {row.run}, commit {row.commit}, {row.date}: {row.device.p50:.3f} ms" for row in rows],
                    filled=[row.accepted for row in rows],
                )
            )
        drawing = chart(title, Axis(label="run", ticks=ticks), Axis(label="ratio, of the first"), series)
        found.append(f"<section><h3>{html.escape(title)}</h3>{drawing}</section>")
    return found


def _times(dates: Sequence[str]) -> list[str]:
    """Of ISO 8601 dates in order what tells them apart: the day, and the time of those of the same day as the one before."""
    days = [date[:10] for date in dates]
    return [date[11:16] if day == before else day for date, day, before in zip(dates, days, ["", *days], strict=False)]


def _kind(record: Record) -> str:
    steps = f", {record.steps} steps" if record.component == "picture" else ""
    others = len(record.references) - 1
    return f"{record.size}{steps}" + (f", beside {others} other{'s' if others > 1 else ''}" if others else "")


def _sizes(latest: Sequence[Record]) -> list[str]:
    """Of each work once: of the runs beside peers, where there are such, the latest."""
    chosen: dict[Key, Record] = {}
    for record in sorted(latest, key=lambda each: each.date):
        if record.work not in chosen or record.has_peers >= chosen[record.work].has_peers:
            chosen[record.work] = record
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in chosen.values():
        if record.component != "text_encoder":
            what = f"{record.component}, {record.steps} steps" if record.component == "picture" else record.component
            where = f"{record.precision}, batch {record.batch}, {record.backend}, {record.machine}"
            groups[f"{record.model} {what}, {where}"].append(record)
    found = []
    for title, rows in groups.items():
        rows.sort(key=lambda row: row.width * row.height)
        wall = any(other.clock == "wall" for row in rows for other in row.references.values())  # then of all lines
        mine = [(_megapixels(row), (row.wall if wall else row.device).p50) for row in rows]
        series = [Series(name="this bundle", points=mine)]
        names = dict.fromkeys(name for row in rows for name, other in row.references.items() if other.rms_error is not None)
        for name in names:
            points = [(_megapixels(row), row.references[name].ms) for row in rows if name in row.references]
            series.append(Series(name=name.replace("_", " "), points=points, dashed=True))
        ticks = [(_megapixels(row), f"{row.width}" if row.width == row.height else f"{row.width}x{row.height}") for row in rows]
        x = Axis(label="px", log=True, ticks=list(dict(ticks).items()))
        drawing = chart(title, x, Axis(label="ms, wall clock" if wall else "ms", log=True), series)
        found.append(f"<section><h3>{html.escape(title)}</h3>{drawing}</section>")
    return found


def _megapixels(record: Record) -> float:
    return record.width * record.height / 1e6


def floor_ms(kernel: Kernel, kernels: Kernels) -> float:
    """The least that a kernel can take, in milliseconds. 0 if neither FLOPs nor bytes are known."""
    narrow = kernels.peak_narrow_flops if kernel.kind.startswith(NARROW) else 0.0
    peak = narrow or kernels.peak_flops
    by_arithmetic = kernel.flops / peak if peak else 0.0
    by_traffic = kernel.bytes / kernels.peak_bytes if kernels.peak_bytes else 0.0
    return 1000 * max(by_arithmetic, by_traffic)


def _rooflines(records: Sequence[Record]) -> list[str]:
    found, without = [], []
    for record in records:
        if record.kernels is None:
            without.append(record.title)
        elif not record.kernels.kernels:
            found.append(f"<h3>{html.escape(record.title)}</h3><p>No kernels: {html.escape(record.kernels.why)}.</p>")
        else:
            found.append(_roofline(record, record.kernels))
    if without:
        words = "; ".join(html.escape(title) for title in without)
        found.append(f"<p class=small>Kernels were not timed (<code>--kernels</code> does) of: {words}.</p>")
    return found


def _roofline(record: Record, kernels: Kernels) -> str:
    when = html.escape(f"{record.date[:10]}, commit {record.commit}")
    parts = [f"<h3>{html.escape(record.title)}</h3><p class=small>{when}: {html.escape(kernels.why)}.</p>"]
    placed = [kernel for kernel in kernels.kernels if kernel.flops and kernel.bytes and kernel.ms]
    if placed and kernels.peak_flops and kernels.peak_bytes:
        intensity = [kernel.flops / kernel.bytes for kernel in placed]
        peaks = {"roof": kernels.peak_flops, "roof, 8 bits": kernels.peak_narrow_flops}
        ridges = {name: peak / kernels.peak_bytes for name, peak in peaks.items() if peak}
        low, high = min(*intensity, *ridges.values()) / 2, max(*intensity, *ridges.values()) * 2
        words = [f"{kernel.name} ({kernel.kind}): {kernel.ms:.3f} ms" for kernel in placed]
        points = [(at, 1000 * kernel.flops / kernel.ms) for at, kernel in zip(intensity, placed, strict=True)]
        series = [
            Series(name=name, points=[(low, low * kernels.peak_bytes), (ridge, peaks[name]), (high, peaks[name])], dots=False)
            for name, ridge in ridges.items()
        ]
        series.append(Series(name="kernels", points=points, words=words, line=False))
        x, y = Axis(label="FLOP per byte of traffic", log=True), Axis(label="FLOP/s", log=True)
        parts.append(f"<div class=charts>{chart(f'Roofline, {record.title}', x, y, series)}</div>")
    else:
        parts.append("<p>No points: FLOPs and bytes of these kernels are not known.</p>")
    parts.append("<div class=table><table class=small><tr><th>kernel<th>kind<th>ms<th>floor ms<th>of its floor</tr>")
    for kernel in kernels.kernels[:ROWS]:
        floor = floor_ms(kernel, kernels)
        share = f"{kernel.ms / floor:.1f} x" if floor else ""
        floor_words = f"{floor:.4f}" if floor else "not known"
        parts.append(
            f"<tr><td>{html.escape(kernel.name)}<td>{html.escape(kernel.kind)}<td>{kernel.ms:.4f}<td>{floor_words}<td>{share}</tr>"
        )
    return "".join(parts) + "</table></div>"
