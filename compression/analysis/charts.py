"""The pictures of an analysis, as PNGs: curves of quality over size, and what single layers suffer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from compression.analysis.marks import severity
from compression.analysis.types import Analysis, Curve, LayerReport, Measured
from compression.gate import LIMITS
from compression.pareto import GREY, INK, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

MOST_LAYERS = 30
"""Layers in the picture of sensitivity: the most sensitive ones."""

# Okabe & Ito, "Color Universal Design" (2008): told apart with every kind of colour vision; so are the markers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5195", "#6B8E23")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
_DOTS = 130
_NAME = 28


def overview(analysis: Analysis) -> bytes | None:
    """All one-shot curves and points in one picture, sizes and losses on logarithmic scales."""
    if not any(_measured(curve) for curve in analysis.curves):
        return None
    figure = _figure(8.4, 6.2)
    _overview(figure.subplots(), analysis)
    return _png(figure)


def panel(analysis: Analysis, key: str) -> bytes | None:
    """The curve of one technique, after recovery too where that was measured; None if it has no curve."""
    curves = _curves_of(analysis, key)
    if not curves:
        return None
    figure = _figure(5.6, 4.0)
    axes = figure.subplots()
    _name_levels(figure, [(axes, _panel(axes, analysis, curves))])
    return _png(figure)


def all_curves(analysis: Analysis) -> bytes | None:
    """The overview and the curve of every technique in one picture."""
    keys = [key for key in dict.fromkeys(curve.key for curve in analysis.curves) if _curves_of(analysis, key)]
    if not keys:
        return overview(analysis)
    rows = -(-len(keys) // 3)
    figure = _figure(16, 6.6 + 4.0 * rows)
    (top,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[6.2, 4.0 * rows])
    _overview(top.subplots(), analysis)
    panels = below.subplots(rows, 3, squeeze=False).ravel()
    drawn = [
        (axes, _panel(axes, analysis, _curves_of(analysis, key)))
        for axes, key in zip(panels, keys, strict=False)
    ]
    for axes in panels[len(keys) :]:
        axes.set_axis_off()
    _name_levels(figure, drawn)
    return _png(figure)


def sensitivity(analysis: Analysis) -> bytes | None:
    """What every layer suffers when it alone is pruned or quantized; None if no layer was measured."""
    chosen = drawn_layers(analysis.layers)
    if not chosen:
        return None
    figure = _figure(11, 1.9 + 0.62 * len(chosen))
    left, right = figure.subplots(1, 2, sharey=True)
    spread = 0.7 / max(1, len(analysis.treatments))
    for number, treatment in enumerate(analysis.treatments):
        color, marker = _COLORS[number], _MARKERS[number]
        # The first layer of the graph on top, and the first treatment on top within each.
        found = [
            (place + (number - (len(analysis.treatments) - 1) / 2) * spread, report.effects[treatment.key])
            for place, report in enumerate(chosen)
            if treatment.key in report.effects
        ]
        if not found:
            continue
        rows = [place for place, _ in found]
        drops = [effect.drop for _, effect in found]
        left.errorbar(
            [100 * drop.value for drop in drops],
            rows,
            xerr=[
                [100 * (drop.value - drop.low) for drop in drops],
                [100 * (drop.high - drop.value) for drop in drops],
            ],
            linestyle="",
            marker=marker,
            markersize=7,
            color=color,
            capsize=3,
            linewidth=1.3,
            label=treatment.title,
        )
        right.plot(
            [100 * effect.change for _, effect in found],
            rows,
            linestyle="",
            marker=marker,
            markersize=7,
            color=color,
        )
    for axes in (left, right):
        _plain(axes)
        for place in range(1, len(chosen)):
            axes.axhline(place - 0.5, color="#e6eaed", linewidth=1)
        axes.grid(visible=False, axis="y")
    left.axvline(0, color=INK, linewidth=1)
    left.set_ylim(len(chosen) - 0.5, -0.5)
    names = [_short(report.layer) + (" (critical)" if report.critical else "") for report in chosen]
    left.set_yticks(range(len(chosen)), names)
    for label, report in zip(left.get_yticklabels(), chosen, strict=True):
        label.set_fontweight("bold" if report.critical else "normal")
    left.set_xlabel("quality lost, points (95% interval)")
    right.set_xlabel("change of the outputs, % of their length")
    right.set_xlim(left=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return _png(figure)


def drawn_layers(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """The layers in the picture, in the order of the graph: all, or the most sensitive ones."""
    able = [report for report in layers if report.effects]
    worst = sorted(able, key=severity, reverse=True)[:MOST_LAYERS]
    return [report for report in able if report in worst]


def _curves_of(analysis: Analysis, key: str) -> list[Curve]:
    return [
        curve for curve in analysis.curves if curve.key == key and not curve.is_point and _measured(curve)
    ]


def _measured(curve: Curve) -> list[tuple[int, str, Measured]]:
    return [
        (place, level.label, level.measured) for place, level in enumerate(curve.levels) if level.measured
    ]


def _overview(axes: Axes, analysis: Analysis) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    _plain(axes)
    limit = 100 * LIMITS[analysis.profile]
    axes.axhline(limit, color=RED, linewidth=1.1, linestyle=(0, (5, 4)))
    axes.axhline(0, color=GREY, linewidth=1)
    lows = [0.0]
    for number, curve in enumerate(entry for entry in analysis.curves if not entry.epochs):
        found = [measured for _, _, measured in _measured(curve)]
        if not found:
            continue
        if not curve.is_point:
            found.insert(0, analysis.full)
        x, y, bars = _coordinates(analysis, curve, found)
        lows += [value - below for value, below in zip(y, bars[0], strict=True)]
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        axes.errorbar(
            x,
            y,
            yerr=bars,
            markersize=9 if curve.is_point else 5.5,
            color=color,
            marker=marker,
            markeredgecolor="white" if curve.is_point else color,
            linestyle="" if curve.is_point else "-",
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2,
            zorder=4 if curve.is_point else 3,
            label=curve.title + (", coded" if curve.coded else ""),
        )
        if curve.knee is not None and (at := curve.levels[curve.knee].measured):
            _ring(axes, 100 * analysis.share(curve, at), 100 * at.drop.value)
    axes.plot([], [], linestyle="", **_RING, label="knee")
    axes.plot([], [], color=RED, linestyle=(0, (5, 4)), label=f"gate's limit: {limit:g} points")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1.0, linscale=1.0)
    bottom = max(axes.get_ylim()[1], 1.2 * limit)
    axes.set_ylim(bottom, 1.2 * min(-0.2, *lows))
    places = [-5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100]
    axes.yaxis.set_major_locator(
        FixedLocator([p for p in places if axes.get_ylim()[1] <= p <= axes.get_ylim()[0]])
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    shares = [1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500]
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([p for p in shares if left <= p <= right]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xlabel("size, % of full precision's file (log scale)")
    axes.set_ylabel("quality lost, points, 95% interval (log scale beyond 1)")
    axes.set_title("All techniques, one-shot", loc="left", fontweight="bold", color=INK)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9.5)


_RING: dict[str, Any] = {
    "marker": "o",
    "markersize": 15,
    "markerfacecolor": "none",
    "markeredgecolor": INK,
    "markeredgewidth": 1.8,
}


def _ring(axes: Axes, x: float, y: float) -> None:
    axes.plot([x], [y], linestyle="", zorder=5, **_RING)


class _Line(NamedTuple):
    """A curve as it is drawn: points, bars below and above, names, and the knee's position among them."""

    x: list[float]
    y: list[float]
    bars: list[list[float]]
    labels: list[str]
    knee: int | None

    def first_the_knee(self) -> list[int]:
        """Positions of the points, in the order in which they get their names."""
        return sorted(range(len(self.labels)), key=lambda place: place != self.knee)


def _panel(axes: Axes, analysis: Analysis, curves: Sequence[Curve]) -> list[_Line]:
    from matplotlib.ticker import FuncFormatter

    _plain(axes)
    axes.axhline(0, color=GREY, linewidth=1)
    lines = []
    for number, curve in enumerate(curves):
        found = _measured(curve)
        x, y, bars = _coordinates(analysis, curve, [analysis.full, *(entry for _, _, entry in found)])
        color = _COLORS[0] if not number else _COLORS[2]
        axes.errorbar(
            x,
            y,
            yerr=bars,
            color=color,
            marker="o" if not number else "s",
            markersize=6,
            linestyle="-" if not curve.epochs else "--",
            linewidth=1.6,
            elinewidth=1.2,
            capsize=3,
            zorder=3,
            label="one-shot" if not curve.epochs else f"after {curve.epochs} epochs of recovery",
        )
        labels = ["full", *(label for _, label, _ in found)]
        marked = None if curve.knee is None else [place for place, _, _ in found].index(curve.knee) + 1
        if marked is not None:
            _ring(axes, x[marked], y[marked])
        lines.append(_Line(x, y, bars, labels, marked))
    if len(curves) > 1 or any(curve.knee is not None for curve in curves):
        axes.plot([], [], linestyle="", **_RING, label="knee")
    axes.margins(x=0.08, y=0.12)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    what = "entropy-coded file" if curves[0].coded else "ONNX file"
    axes.set_xlabel(f"{what}, % of full precision's ONNX file")
    axes.set_ylabel("quality lost, points (95% interval)")
    title = curves[0].title
    axes.set_title(f"{title[0].upper()}{title[1:]}", loc="left", fontweight="bold", color=INK)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    axes.set_autoscale_on(False)
    return lines


_PLACES = ((11, -9), (-11, -9), (0, 15), (0, -16), (12, 8), (-12, 8), (17, 0), (-17, 0))
"""Where a name may stand beside its point, in points."""


def _name_levels(figure: Figure, panels: Sequence[tuple[Axes, Sequence[_Line]]]) -> None:
    """Write each level's name beside its point where there is room; the knee's first."""
    figure.canvas.draw()  # places everything; from here on nothing may move
    figure.set_layout_engine("none")
    for axes, lines in panels:
        legend = axes.get_legend()
        taken: list[Any] = [legend.get_window_extent()] if legend else []
        spots = [axes.transData.transform(spot) for line in lines for spot in _inked(line)]
        frame = axes.get_window_extent()
        for line in lines:
            for place in line.first_the_knee():
                for offset in _PLACES:
                    text = _name(axes, line, place, offset)
                    box = text.get_window_extent().padded(1)
                    clear = not any(box.overlaps(other) for other in taken)
                    clear &= not any(box.contains(*spot) for spot in spots)
                    clear &= frame.x0 <= box.x0 and box.x1 <= frame.x1
                    clear &= frame.y0 <= box.y0 and box.y1 <= frame.y1
                    if clear:
                        taken.append(box)
                        break
                    text.remove()


def _inked(line: _Line) -> list[tuple[float, float]]:
    """Spots that no name may cover: points, along the bars, and along the line between the points."""
    steps = [step / 20 for step in range(21)]
    found = [
        (x, y - below + step * (below + above))
        for x, y, below, above in zip(line.x, line.y, *line.bars, strict=True)
        for step in steps
    ]
    return found + [
        (a + step * (c - a), b + step * (d - b))
        for (a, b), (c, d) in pairwise(zip(line.x, line.y, strict=True))
        for step in steps
    ]


def _name(axes: Axes, line: _Line, place: int, offset: tuple[int, int]) -> Annotation:
    return axes.annotate(
        line.labels[place],
        (line.x[place], line.y[place]),
        xytext=offset,
        textcoords="offset points",
        ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center",
        va="center",
        fontsize=9,
        fontweight="bold" if place == line.knee else "normal",
        color=INK,
    )


def _coordinates(
    analysis: Analysis, curve: Curve, found: Sequence[Measured]
) -> tuple[list[float], list[float], list[list[float]]]:
    """Size in percent, points lost, and the bars below and above, without noise of rounding."""
    x = [100 * analysis.share(curve, entry) for entry in found]
    y = [100 * entry.drop.value for entry in found]
    bars = [
        [max(0.0, 100 * (entry.drop.value - entry.drop.low)) for entry in found],
        [max(0.0, 100 * (entry.drop.high - entry.drop.value)) for entry in found],
    ]
    return x, y, bars


def _plain(axes: Axes) -> None:
    axes.grid(color="#e6eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    """A name that leaves room for the picture; its ends tell most. Dollars would start a formula."""
    if len(name) > _NAME:
        name = f"{name[: _NAME // 2 - 1]}…{name[-(_NAME // 2) :]}"
    return name.replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
