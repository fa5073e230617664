"""Plots as SVG text, by hand: they take the page's colours, light or dark, and shrink on a phone.

All have a viewBox of WIDTH units, so that their letters are as large as the page's on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH = 400
TOP, BOTTOM = 8, 40  # space above a plot's area, and below it for the axis
ROW, NOTED = 24, 31  # height of a row of a forest plot, without a note and with one
TICK = 6.6  # width of a letter, about


class Interval(NamedTuple):
    """A row of a forest plot. value None: not measured. margin: what the low end must not fall below."""

    label: str
    note: str
    value: float | None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    kind: str = "s0"


class Line(NamedTuple):
    """Points from left to right. marks: the class of each point, "" for a plain one."""

    label: str
    points: Sequence[tuple[float, float]]
    kind: str
    marks: Sequence[str] = ()
    bars: Sequence[tuple[float, float]] = ()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, at most `count` + 1."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [round(step * n, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def said(values: Sequence[float], *, signed: bool = False, percent: bool = False) -> list[str]:
    """The ticks' words, with as many digits as tell them apart."""
    scale = 100 if percent else 1
    step = min((b - a for a, b in pairwise(values)), default=0.0) * scale
    digits = 0 if step == 0 else next(n for n in range(12) if abs(round(step, n) - step) < 1e-6 * step)
    sign, unit = "+" if signed else "", "%" if percent else ""
    words = ["0" if signed and value == 0 else f"{value * scale:{sign},.{digits}f}{unit}" for value in values]
    return [word.replace("-", "\N{MINUS SIGN}") for word in words]


def forest(
    rows: Sequence[Interval], axis: str, *, line: float | None = None, signed: bool = False, digits: int = 4
) -> str:
    """A row for each value with its interval, all on one axis; `line` is drawn across, as zero is for differences."""
    left = min(150.0, 12 + max(max(TICK * len(row.label), 5.4 * len(row.note)) for row in rows))
    right = WIDTH - 12 - TICK * (digits + 3.5)
    edges = [edge for row in rows for edge in (row.value, row.low, row.high, row.margin) if edge is not None]
    edges += [] if line is None else [line]
    low, high = _wide(min(edges, default=0.0), max(edges, default=1.0))
    at = _Scale(low, high, left + 8, right - 8)
    row_height = NOTED if any(row.note for row in rows) else ROW
    height = TOP + row_height * len(rows) + BOTTOM
    parts = [_x_axis(at, height, ticks(low, high, 4), axis, signed=signed)]
    if line is not None:
        parts.append(_line(at(line), TOP, at(line), height - BOTTOM, "zero"))
    for place, row in enumerate(rows):
        y = TOP + row_height * (place + 0.5)
        parts.append(_text(4, y + (-1 if row.note else 4), row.label, "label"))
        if row.note:
            parts.append(_text(4, y + 11, row.note, "note"))
        if row.value is None:
            parts.append(_text(WIDTH - 4, y + 4, "\N{EN DASH}", "figure", "end"))
            continue
        if row.margin is not None:
            parts.append(_line(at(row.margin), y - 9, at(row.margin), y + 9, "margin"))
        if row.low is not None and row.high is not None:
            parts.append(_line(at(row.low), y, at(row.high), y, f"interval {row.kind}"))
        parts.append(f'<circle class="{row.kind}" cx="{at(row.value):.1f}" cy="{y:.1f}" r="4"/>')
        figure = f"{row.value:{'+' if signed else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")
        parts.append(_text(WIDTH - 4, y + 4, figure, "figure", "end"))
    return _svg(height, parts, axis)


def lines(
    series: Sequence[Line], x_axis: str, y_axis: str, *, names: Sequence[str] = (), percent: bool = False,
    diagonal: bool = False, zero: bool = False,
) -> str:  # fmt: skip
    """Lines with points. names: of the places 0, 1, … of the x axis; without them it has numbers.

    diagonal  both axes alike, from 0, and the line of equal values; zero  the y axis begins there
    """
    xs, ys = ([point[at] for one in series for point in one.points] for at in (0, 1))
    ys += [edge for one in series for bar in one.bars for edge in bar]
    if diagonal:
        low_x = low_y = 0.0
        high_x = high_y = max([*xs, *ys, 1e-3]) * 1.05
    else:
        low_y, high_y = _wide(min(ys), max(ys))
        low_y = 0.0 if zero else low_y
        low_x, high_x = min(xs), max(xs)
        if names:
            low_x, high_x = -0.5, len(names) - 0.5
        elif low_x == high_x:
            low_x, high_x = low_x - 0.5, high_x + 0.5
    height = 260.0
    marks_y = ticks(low_y, high_y, 5)
    words_y = said(marks_y, percent=percent)
    left = 14 + TICK * max(map(len, words_y))
    x, y = _Scale(low_x, high_x, left + 6, WIDTH - 10), _Scale(low_y, high_y, height - BOTTOM, TOP + 18)
    parts = []
    parts += _y_axis(y, left, marks_y, words_y, y_axis)
    if names:
        every = math.ceil(len(names) * 46 / (WIDTH - left))
        for place in range(0, len(names), every):
            parts.append(_text(x(place), height - BOTTOM + 16, names[place], "tick", "middle"))
        parts.append(_text((left + WIDTH) / 2, height - 6, x_axis, "axis", "middle"))
    else:
        marks_x = ticks(low_x, high_x, 5)
        if not diagonal and not percent:
            marks_x = [value for value in marks_x if value == int(value)]  # epochs
        parts.append(_x_axis(x, height, marks_x, x_axis, percent=percent, grid=False))
    if diagonal:
        parts.append(_line(x(0), y(0), x(high_x), y(high_y), "zero"))
    for one in series:
        places = [(x(a), y(b)) for a, b in one.points]
        for (a, _), (low, high) in zip(places, one.bars, strict=False):
            parts.append(_line(a, y(low), a, y(high), f"interval thin {one.kind}"))
        drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline class="{one.kind}" points="{drawn}"/>')
        for (a, b), mark in zip(places, one.marks or [""] * len(places), strict=True):
            parts.append(_mark(a, b, mark, one.kind))
    return _svg(height, parts, f"{y_axis} by {x_axis}")


def bars(values: Sequence[float | None], names: Sequence[str], axis: str) -> str:
    """A bar for each name, from 0."""
    height = 180.0
    marks = ticks(0, max((value for value in values if value is not None), default=1.0) * 1.05 or 1.0, 4)
    words = said(marks)
    left = 14 + TICK * max(map(len, words))
    y = _Scale(0, max(marks[-1], max((value or 0 for value in values), default=1.0)) or 1.0, height - BOTTOM, TOP + 18)
    step = (WIDTH - 4 - left) / max(1, len(names))
    parts = _y_axis(y, left, marks, words, axis)
    every = math.ceil(len(names) * 46 / (WIDTH - left))
    for place, (value, name) in enumerate(zip(values, names, strict=True)):
        middle = left + step * (place + 0.5)
        if value is not None:
            wide = min(step * 0.7, 40)
            parts.append(
                f'<rect class="s0" x="{middle - wide / 2:.1f}" y="{y(value):.1f}" width="{wide:.1f}" '
                f'height="{height - BOTTOM - y(value):.1f}"/>'
            )
        if place % every == 0:
            parts.append(_text(middle, height - BOTTOM + 16, name, "tick", "middle"))
    return _svg(height - 18, parts, axis)


# ---- parts of a plot --------------------------------------------------------------------------------------------


class _Scale(NamedTuple):
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)


def _wide(low: float, high: float) -> tuple[float, float]:
    space = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    return low - space, high + space


def _x_axis(
    at: _Scale, height: float, marks: Sequence[float], axis: str, *, signed: bool = False, percent: bool = False,
    grid: bool = True,
) -> str:  # fmt: skip
    parts = []
    for value, word in zip(marks, said(marks, signed=signed, percent=percent), strict=True):
        if grid:
            parts.append(_line(at(value), TOP, at(value), height - BOTTOM, "grid"))
        parts.append(_text(at(value), height - BOTTOM + 16, word, "tick", "middle"))
    parts.append(_text((at.start + at.end) / 2, height - 6, axis, "axis", "middle"))
    return "".join(parts)


def _y_axis(at: _Scale, left: float, marks: Sequence[float], words: Sequence[str], axis: str) -> list[str]:
    parts = [_text(4, TOP + 4, axis, "axis")]
    for value, word in zip(marks, words, strict=True):
        parts.append(_line(left, at(value), WIDTH - 4, at(value), "grid"))
        parts.append(_text(left - 4, at(value) + 4, word, "tick", "end"))
    return parts


def _mark(x: float, y: float, mark: str, kind: str) -> str:
    if mark == "promoted":
        return f'<path class="mark ok" d="M{x:.1f} {y - 7:.1f}l7 12h-14z"/>'
    if mark == "rejected":
        return f'<path class="cross bad" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>'
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(height: float, parts: Sequence[str], name: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'
