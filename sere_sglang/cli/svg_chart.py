"""Points with error bars as inline SVG, for reports that open without a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 46
_COLORS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#b5a300", "#d95f02", "#7570b3", "#666666")


@dataclass(frozen=True)
class Mark:
    """A point of a series, its interval along y, and the word beside it."""

    x: float
    y: float
    low: float
    high: float
    label: str


def chart(
    title: str, series: dict[str, Sequence[Mark]], x_label: str, y_label: str, *, log_y: bool
) -> str:
    """An ``<svg>`` of all series, joined by lines in the order of x.

    log_y: values below a millionth of the largest lie on the bottom.
    """
    marks = [mark for own in series.values() for mark in own]
    place_x, ticks_x = _axis([m.x for m in marks], _LEFT, WIDTH - _RIGHT, log=False)
    ys = [y for m in marks for y in (m.y, m.low, m.high)]
    place_y, ticks_y = _axis(ys, HEIGHT - _BOTTOM, _TOP, log=log_y)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="11">',
        f'<text x="{_LEFT}" y="14" font-size="13" font-weight="bold">{escape(title)}</text>',
    ]
    for value in ticks_x:
        x = place_x(value)
        parts.append(_line(x, _TOP, x, HEIGHT - _BOTTOM, "#ddd"))
        parts.append(_text(x, HEIGHT - _BOTTOM + 15, f"{value:g}", "middle"))
    for value in ticks_y:
        y = place_y(value)
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, "#ddd"))
        parts.append(_text(_LEFT - 5, y + 4, f"{value:g}", "end"))
    parts.append(_text((_LEFT + WIDTH) / 2, HEIGHT - 8, x_label, "middle"))
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    turned = f' transform="rotate(-90 14 {middle:.1f})"'
    parts.append(_text(14, middle, y_label, "middle", turned))
    words = _Words([(place_x(m.x), place_y(m.y)) for m in marks])
    for at, (name, own) in enumerate(series.items()):
        color = _COLORS[at % len(_COLORS)]
        parts += _series(sorted(own, key=lambda m: m.x), color, place_x, place_y, words)
        parts.append(f'<rect x="{_LEFT + 90 * at}" y="20" width="9" height="9" fill="{color}"/>')
        parts.append(_text(_LEFT + 90 * at + 13, 28, name, "start"))
    return "\n".join([*parts, "</svg>"])


class _Words:
    """Where dots and words of one picture lie, so that the next word finds a free line."""

    def __init__(self, dots: Sequence[tuple[float, float]]) -> None:
        self._taken = [(x - 4, x + 4, y + 4) for x, y in dots]

    def line(self, x: float, y: float, word: str, anchor: str) -> float:
        """The nearest free line, above the point or below it."""
        width = 6.5 * len(word)
        left = x if anchor == "start" else x - width
        for distance in (-5.0, 14.0, -18.0, 27.0, -31.0, 40.0):
            inside = _TOP < y + distance < HEIGHT - _BOTTOM
            if inside and not any(
                left < end and start < left + width and abs(y + distance - line) < 11
                for start, end, line in self._taken
            ):
                break
        else:
            distance = -5.0
        if word:
            self._taken.append((left, left + width, y + distance))
        return y + distance


def _series(
    marks: Sequence[Mark],
    color: str,
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    words: _Words,
) -> list[str]:
    dots = [(place_x(m.x), place_y(m.y)) for m in marks]
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    parts = [f'<polyline points="{joined}" fill="none" stroke="{color}" stroke-opacity="0.4"/>']
    for (x, y), mark in zip(dots, marks, strict=True):
        parts.append(_line(x, place_y(mark.low), x, place_y(mark.high), color))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>')
        left = x > 0.8 * WIDTH  # where a word to the right would leave the picture
        side, anchor = (-6, "end") if left else (6, "start")
        line = words.line(x + side, y, mark.label, anchor)
        parts.append(_text(x + side, line, mark.label, anchor, f' fill="{color}"'))
    return parts


def _axis(
    values: Sequence[float], start: float, end: float, *, log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between two pixels, and round values to mark."""
    if log:
        top = max(*values, 1e-12)
        floor = max(min((v for v in values if v > 0), default=top), 1e-6 * top)
        low, high = math.floor(math.log10(floor)), math.ceil(math.log10(top))
        high = max(high, low + 1)

        def at(value: float) -> float:
            return (math.log10(max(value, 10.0**low)) - low) / (high - low)

        ticks = [10.0**power for power in range(low, high + 1)]
    else:
        low_value, high_value = min(values), max(values)
        span = high_value - low_value or abs(high_value) or 1.0
        step = 10 ** math.floor(math.log10(span))
        step = next(s for s in (step / 5, step / 2, step, 2 * step) if span / s <= 6)
        first, last = math.floor(low_value / step), math.ceil(high_value / step)
        ticks = [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]

        def at(value: float) -> float:
            return (value - ticks[0]) / (ticks[-1] - ticks[0])

    return (lambda value: start + at(value) * (end - start)), ticks


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
