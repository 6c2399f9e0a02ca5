"""Plots as inline SVG of a page: its colours are the page's CSS variables, its text is text, a hover shows the values.

No script is needed: a value is the <title> of an invisible dot over it. PNG files for papers are report/figures.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from preference.report.figures import SMOOTH_FROM, Curve, Plot, Points, running_mean

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 24, 40
DOTS = 120  # hover values of a line at most: a long run stays a small page
MARKS = ("circle", "square", "diamond", "down", "up")


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Some `count` round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= count)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def written(value: float, percent: bool = False) -> str:
    """A value as short as it can be told from its neighbours."""
    if percent:
        return f"{value * 100:.4g}%"
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1e3 else f"{value:,.0f}"


class _Scale:
    """From values to the places of a plot."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.x0, self.x1 = min(xs), max(xs)
        low, high = min(ys), max(ys)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.y0, self.y1 = low - room, high + room

    def x(self, value: float) -> float:
        span = self.x1 - self.x0 or 1.0
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x0) / span

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y0) / (self.y1 - self.y0)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def draw(plot: Plot) -> str:
    """The plot as an <svg> element, as wide as what it stands in."""
    curves = [_only_finite(curve) for curve in plot.curves]
    scale = _scale(plot, curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(plot.title)}" font-size="11">'
    ]
    if scale is not None:
        parts += _axes(plot, scale)
        for number, (label, heights) in enumerate(plot.bars.items()):
            parts += _bars(plot, scale, label, heights, number)
        for curve in curves:
            parts += _curve(plot, scale, curve)
        parts += _legend(plot, curves)
    return "".join([*parts, "</svg>"])


def _only_finite(curve: Curve) -> Curve:
    marks = {name: _finite(points) for name, points in curve.evaluation.items()}
    return Curve(curve.label, _finite(curve.training), marks, curve.colour)


def _scale(plot: Plot, curves: Sequence[Curve]) -> _Scale | None:
    points = [point for curve in curves for line in (curve.training, *curve.evaluation.values()) for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if plot.bars:
        xs, ys = list(plot.edges), [0.0, *(height for heights in plot.bars.values() for height in heights)]
    return _Scale(xs, ys) if xs else None


def _axes(plot: Plot, scale: _Scale) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in ticks(scale.y0, scale.y1):
        y = scale.y(value)
        yield f'<path d="M{LEFT} {y:.1f}H{right}" stroke="var(--e1)" stroke-width=".6" fill="none"/>'
        told = written(value, plot.percent)
        yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="var(--e0)">{told}</text>'
    for value in ticks(scale.x0, scale.x1, 6, whole=True):
        x = scale.x(value)
        yield f'<path d="M{x:.1f} {bottom}v4" stroke="var(--e0)" stroke-width=".6" fill="none"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle" fill="var(--e0)">{written(value)}</text>'
    yield f'<path d="M{LEFT} {TOP}V{bottom}H{right}" stroke="var(--e0)" stroke-width=".6" fill="none"/>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" fill="var(--e0)">{escape(plot.x)}</text>'


def _curve(plot: Plot, scale: _Scale, curve: Curve) -> Iterator[str]:
    colour = f"var(--f{curve.colour})"
    line = f'fill="none" stroke="{colour}" stroke-linejoin="round"'
    points = curve.training
    if points:
        many = len(points) >= SMOOTH_FROM
        weak = ' stroke-opacity=".35" stroke-width=".8"' if many else ' stroke-width="1.6"'
        yield f'<path d="{scale.path(points)}" {line}{weak}/>'
        if many:
            smooth = running_mean([y for _, y in points], len(points) // 12)
            path = scale.path(list(zip((x for x, _ in points), smooth, strict=True)))
            yield f'<path d="{path}" {line} stroke-width="1.8"/>'
        stride = max(1, math.ceil(len(points) / DOTS))
        told = [*points[:-1:stride], points[-1]]
        yield from _hover(plot, scale, told, curve.label or "training", colour, shown=len(points) <= 12)
    for shape, (name, marks) in zip(MARKS, curve.evaluation.items(), strict=False):
        if marks:
            yield f'<path d="{scale.path(marks)}" {line} stroke-width=".9" stroke-dasharray="4 3"/>'
            label = f"{curve.label}, {name}" if curve.label else name
            for x, y in marks:
                yield _mark(shape, scale.x(x), scale.y(y), colour, _told(plot, label, x, y))


def _hover(plot: Plot, scale: _Scale, points: Points, label: str, colour: str, shown: bool) -> Iterator[str]:
    for x, y in points:
        fill = colour if shown else "transparent"
        radius = 2.2 if shown else 5
        title = _told(plot, label, x, y)
        place = f'cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}"'
        yield f'<circle class="dot" {place} r="{radius}" fill="{fill}">{title}</circle>'


def _told(plot: Plot, label: str, x: float, y: float) -> str:
    value = f"{y:.2%}" if plot.percent else f"{y:.5g}"
    return f"<title>{escape(label)}: {value} at {escape(plot.x)} {written(x)}</title>"


def _mark(shape: str, x: float, y: float, colour: str, title: str) -> str:
    forms = {
        "circle": "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
        "square": "m-3 -3h6v6h-6z",
        "diamond": "m0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
        "down": "m-4 -3h8l-4 7z",
        "up": "m-4 3h8l-4 -7z",
    }
    style = f'fill="var(--card)" stroke="{colour}" stroke-width="1.3"'
    return f'<path class="dot" d="M{x:.1f} {y:.1f}{forms[shape]}" {style}>{title}</path>'


def _bars(plot: Plot, scale: _Scale, label: str, heights: Sequence[float], number: int) -> Iterator[str]:
    """A histogram's outline, and over each of its bins what it holds."""
    colour = f"var(--f{number})"
    path = f"M{scale.x(plot.edges[0]):.1f} {scale.y(0):.1f}"
    for left, right, height in zip(plot.edges, plot.edges[1:], heights, strict=False):
        path += f"L{scale.x(left):.1f} {scale.y(height):.1f}L{scale.x(right):.1f} {scale.y(height):.1f}"
    path += f"L{scale.x(plot.edges[-1]):.1f} {scale.y(0):.1f}"
    yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
    for left, right, height in zip(plot.edges, plot.edges[1:], heights, strict=False):
        title = f"<title>{escape(label)}: {height:,.0f} of {left:g} to {right - 1:g} {escape(plot.x)}</title>"
        x = scale.x((left + right) / 2)
        yield f'<circle class="dot" cx="{x:.1f}" cy="{scale.y(height):.1f}" r="5" fill="transparent">{title}</circle>'


def _legend(plot: Plot, curves: Sequence[Curve]) -> Iterator[str]:
    """What is what, in a line above the plot, where there is more than one thing."""
    entries = [(label, number, "line") for number, label in enumerate(plot.bars)]
    for curve in curves:
        if curve.training:
            entries.append((curve.label or "training", curve.colour, "line"))
        for shape, (name, marks) in zip(MARKS, curve.evaluation.items(), strict=False):
            if marks:
                entries.append((f"{curve.label}, {name}" if curve.label else name, curve.colour, shape))
    if len(entries) < 2:
        return
    x = float(LEFT)
    for label, colour, shape in entries:
        if x + 20 + 6.2 * len(label) > WIDTH:
            break
        if shape == "line":
            yield f'<path d="M{x:.1f} 10h12" stroke="var(--f{colour})" stroke-width="2" fill="none"/>'
        else:
            yield _mark(shape, x + 6, 10, f"var(--f{colour})", "")
        yield f'<text x="{x + 16:.1f}" y="14" fill="var(--e0)">{escape(label)}</text>'
        x += 26 + 6.2 * len(label)
