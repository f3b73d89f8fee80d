"""The frontier of quality, latency and size: which variants nothing else beats, and a picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compression.gate import LIMITS
from compression.variant import FULL, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase

GREEN, RED, GREY, INK = "#1a7f5a", "#c0392b", "#9aa5ad", "#22303a"


class Point(NamedTuple):
    """One variant in the picture.

    Drops are in points (percent); `time` is its share of full precision's; `why` is what the gate refused.
    """

    name: str
    drop: float
    low: float
    high: float
    size_kb: float
    time: float
    accepted: bool
    why: str = ""


def points(variants: Sequence[Variant]) -> list[Point]:
    """The measured variants as points.

    Time is relative to full precision because both were timed in turns: milliseconds of different minutes on
    a busy machine do not compare.
    """
    found = []
    for variant in variants:
        card, verdict = variant.scorecard(), variant.gate()
        if card is None or verdict is None:
            continue
        drop = card.drop
        time = 1.0 if variant.name == FULL else 1 / card.latency_at(1).speedup
        found.append(
            Point(
                variant.name,
                100 * drop.value,
                100 * drop.low,
                100 * drop.high,
                card.size_bytes / 1000,
                time,
                verdict.accepted,
                verdict.reasons[0].partition(" loses")[0] if verdict.reasons else "",
            )
        )
    return found


def frontier(costs: Mapping[str, Sequence[float]]) -> list[str]:
    """Names that no other one beats: at least as low in every cost, and lower in one. Input order is kept."""
    return [
        name
        for name, own in costs.items()
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and tuple(other) != tuple(own)
            for other in costs.values()
        )
    ]


def best(found: Sequence[Point]) -> list[str]:
    """The frontier of the accepted variants in drop, time at batch 1 and size."""
    return frontier(
        {point.name: (point.drop, point.time, point.size_kb) for point in found if point.accepted}
    )


def picture(title: str, found: Sequence[Point], profile: str, path: Path) -> None:
    """Draw quality lost against size and against time, every variant named, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.6), dpi=130, layout="constrained", facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()
    left, right = figure.subplots(1, 2, sharey=True)
    on_frontier = set(best(found))
    limit = 100 * LIMITS[profile]
    sizes, times = [point.size_kb for point in found], [100 * point.time for point in found]
    left.set_xscale("log")
    # At least a decade wide, so that variants of one size still have room for their names.
    span = max(10.0, max(sizes) / min(sizes))
    left.set_xlim(min(sizes) / span**0.12, max(sizes) * span**0.22)
    ticks = [tick for tick in _round_numbers() if left.get_xlim()[0] <= tick <= left.get_xlim()[1]]
    left.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    left.minorticks_off()
    right.set_xlim(0, 1.2 * max(times))
    low, high = min(point.low for point in found), max(limit, *(point.high for point in found))
    left.set_ylim(high + 0.06 * (high - low), low - 0.16 * (high - low))
    for axes, horizontal in ((left, sizes), (right, times)):
        axes.set_autoscale_on(False)
        _panel(axes, found, horizontal, on_frontier, limit)
    left.set_xlabel("size on disk, kB (log scale)")
    right.set_xlabel("time to answer one record, % of full precision")
    left.set_ylabel("quality lost, points (95% interval)")
    figure.suptitle(title, fontsize=15, fontweight="bold", color=INK, x=0.01, ha="left")
    figure.legend(
        handles=_legend(profile, limit), loc="outside lower center", ncols=4, frameon=False, fontsize=10
    )
    figure.canvas.draw()
    for axes, horizontal in ((left, sizes), (right, times)):
        _name_points(renderer, axes, found, horizontal, on_frontier)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(
    axes: Axes, found: Sequence[Point], horizontal: Sequence[float], on_frontier: set[str], limit: float
) -> None:
    axes.grid(color="#e6eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(limit, color=RED, linewidth=1.2, linestyle=(0, (5, 4)))
    for point, x in zip(found, horizontal, strict=True):
        color = (GREEN if point.name in on_frontier else GREY) if point.accepted else RED
        bar = [[max(0.0, point.drop - point.low)], [max(0.0, point.high - point.drop)]]
        axes.errorbar([x], [point.drop], yerr=bar, color=color, capsize=3, linewidth=1.3, zorder=2)
        size = 110 if point.name in on_frontier else 70
        axes.scatter([x], [point.drop], s=size, marker="o" if point.accepted else "X", color=color, zorder=3)


def _round_numbers() -> list[float]:
    return [digit * 10.0**power for power in range(-2, 9) for digit in (1, 2, 5)]


def _name_points(
    renderer: RendererBase,
    axes: Axes,
    found: Sequence[Point],
    horizontal: Sequence[float],
    on_frontier: set[str],
) -> None:
    """Write each name at the nearest free place around its point, with a thin line if that is far."""
    from matplotlib.text import Text as TextBox

    markers = [axes.transData.transform((x, point.drop)) for point, x in zip(found, horizontal, strict=True)]
    ends = [
        axes.transData.transform((x, end))
        for point, x in zip(found, horizontal, strict=True)
        for end in (point.low, point.high)
    ]
    taken: list[Any] = []
    frame = axes.get_window_extent()
    for point, x in zip(found, horizontal, strict=True):
        for dx, dy in _offsets():
            label = axes.annotate(
                f"{point.name}: harms {point.why}" if "=" in point.why else point.name,
                (x, point.drop),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center",
                fontsize=9.5,
                fontweight="bold" if point.name in on_frontier else "normal",
                color=INK if point.accepted else RED,
                arrowprops={"arrowstyle": "-", "color": "#b8c1c7", "linewidth": 0.7, "shrinkB": 5}
                if abs(dy) >= 16
                else None,
            )
            # The annotation's own extent takes in its line; only the words must be clear.
            label.update_positions(renderer)
            box = TextBox.get_window_extent(label).padded(2)
            clear = not any(box.overlaps(other) for other in taken)
            clear &= not any(box.contains(*end) for end in ends)
            clear &= not any(box.padded(12).contains(*mark) for mark in markers)
            if (
                clear
                and frame.x0 <= box.x0
                and box.x1 <= frame.x1
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1
            ):
                taken.append(box)
                break
            label.remove()
        else:
            axes.annotate(
                point.name, (x, point.drop), xytext=(10, 0), textcoords="offset points", fontsize=9.5
            )


def _offsets() -> list[tuple[float, float]]:
    """Places for a label in points, nearest first."""
    places = [(dx, dy) for dy in range(-128, 129, 16) for dx in (13, -13, 0) if dx or abs(dy) >= 16]
    return sorted(places, key=lambda place: (abs(place[1]), place[0] <= 0))


def _legend(profile: str, limit: float) -> list[Any]:
    from matplotlib.lines import Line2D

    def mark(marker: str, color: str, label: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, markersize=9, color=color, label=label)

    return [
        mark("o", GREEN, "accepted, on the frontier"),
        mark("o", GREY, "accepted, beaten by another"),
        mark("X", RED, "refused by the gate"),
        Line2D([], [], color=RED, linestyle=(0, (5, 4)), label=f"limit of profile {profile}: {limit:g} pt"),
    ]
