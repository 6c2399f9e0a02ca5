"""Plots of runs: what is in them, and their pictures as PNG files for papers. In pages report/drawing.py draws them.

Text in plots is ours (labels, numbers, the letters of compared runs), never the data's: a font may lack its script.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#1b1f24", "#d5d9de"
SERIES = ("#2563eb", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490")
SMOOTH_FROM = 24  # points from which a running mean is drawn over a pale line of the raw values

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A line of training values, and marks of evaluation values over it. `colour` is a number below len(SERIES).

    The label is "" for the only curve of a plot.
    """

    label: str
    training: Points
    evaluation: Mapping[str, Points] = field(default_factory=dict)
    colour: int = 0


@dataclass(frozen=True)
class Plot:
    """One figure: its file name, title, axis labels, and one sentence on how to read it."""

    name: str
    title: str
    reading: str
    curves: Sequence[Curve] = ()
    bars: Mapping[str, Sequence[float]] = field(default_factory=dict)  # heights between `edges`
    edges: Sequence[float] = ()
    percent: bool = False
    x: str = "optimizer step"
    y: str = ""

    @property
    def empty(self) -> bool:
        return not self.bars and not any(c.training or any(c.evaluation.values()) for c in self.curves)

    def save_png(self, folder: Path) -> Path:
        path = folder / f"{self.name}.png"
        buffer = io.BytesIO()
        self._draw().savefig(buffer, format="png", dpi=160)
        path.write_bytes(buffer.getvalue())
        return path

    def _draw(self) -> Figure:
        import matplotlib  # here: of the processes that train only the first draws, at its end
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        style = {
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.facecolor": "none",
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.6,
            "axes.titlesize": 11,
            "grid.color": GRID,
            "grid.linewidth": 0.6,
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(4.2, 2.7), layout="constrained")
            axes = figure.add_subplot()
            axes.set_axisbelow(True)
            axes.grid(True)
            for i, (label, heights) in enumerate(self.bars.items()):
                axes.stairs(heights, self.edges, label=label, color=SERIES[i], linewidth=1.6)
            for curve in self.curves:
                _draw_curve(axes, curve, SERIES[curve.colour])
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            if self.percent:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_xlabel(self.x)
            axes.set_ylabel(self.y)
            axes.set_title(self.title)
            if len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(frameon=False, fontsize=8.5)
        return figure


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    label = curve.label or "training"
    x, y = zip(*curve.training, strict=True) if curve.training else ((), ())
    many = len(x) >= SMOOTH_FROM
    if x:
        marker = "." if len(x) <= 12 else None
        axes.plot(
            x, y, color=colour, marker=marker, linewidth=0.8 if many else 1.5, alpha=0.35 if many else 1,
            label=None if many else label,
        )  # fmt: skip
    if many:
        axes.plot(x, running_mean(y, len(y) // 12), color=colour, linewidth=1.8, label=label)
    for marker, (name, points) in zip("oDs^v", curve.evaluation.items(), strict=False):
        if points:
            options: dict[str, Any] = {"marker": marker, "markersize": 5, "linestyle": "--", "linewidth": 0.9}
            label = f"{curve.label}, {name}" if curve.label else name
            axes.plot(*zip(*points, strict=True), color=colour, markerfacecolor="none", label=label, **options)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean over up to `reach` neighbours on each side, as many on one as on the other: the ends are not bent."""
    result = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        window = values[i - near : i + near + 1]
        result.append(sum(window) / len(window))
    return result
