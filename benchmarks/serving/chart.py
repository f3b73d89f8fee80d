"""The chart: throughput of everything measured, and every goal with how far it was met."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

_MOST = 8.0
"""Margins beyond this many times a goal are drawn at the edge."""
_OURS, _PEERS, _BAD, _GRID = "#0b6e6e", "#a9b4bd", "#c0392b", "#e3e7ea"
_LABELS = {
    "trimtab v2-binary": "Trimtab, V2 binary",
    "trimtab v2-json": "Trimtab, V2 JSON",
    "trimtab v2-json off": "Trimtab, V2 JSON, no rollout",
    "trimtab 2 workers": "Trimtab, V2 JSON, 2 workers",
    "trimtab predict": "Trimtab, /predict",
    "bare-asgi v2-binary": "bare ASGI, V2 binary",
    "bare-asgi v2-json": "bare ASGI, V2 JSON",
    "fastapi": "FastAPI",
    "bentoml": "BentoML API method",
    "mlserver": "MLServer",
    "litserve": "LitServe",
    "ray": "Ray Serve",
}


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draw the results into a PNG; False when there is nothing to draw."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    bars = [
        (label, series["values"])
        for name, label in _LABELS.items()
        if (series := results["series"].get(name)) and series["values"]
    ]
    goals = [row for row in results["rows"] if row["goal"] is not None and row["ratio"]]
    if not bars and not goals:
        return False
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    height = 1.6 + 0.38 * max(len(bars), len(goals))
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, height), width_ratios=(1.0, 0.9))
    _throughput(left, bars)
    _goals(right, goals)
    machine = results["machine"]
    settings = results["settings"]
    note = (
        f"{machine['cpu']}, {machine['cores']} cores, load generator included; "
        f"rounds: {settings['rounds']}, of {settings['seconds']:g} s, {machine['date'][:10]}"
    )
    if settings["quick"]:
        note = "A QUICK RUN, not for citing. " + note
    figure.text(0.01, 0.012, note, fontsize=8.5, color="#5b6770")
    figure.tight_layout(rect=(0, 0.03, 1, 1), w_pad=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _throughput(axes: Axes, bars: list[tuple[str, list[float]]]) -> None:
    from statistics import median

    bars = sorted(bars, key=lambda bar: median(bar[1]))
    for at, (label, values) in enumerate(bars):
        middle = median(values)
        axes.barh(at, middle, color=_OURS if label.startswith("Trimtab") else _PEERS, height=0.66)
        axes.plot([min(values), max(values)], [at, at], color="#1f2a30", linewidth=1.4, solid_capstyle="butt")
        axes.annotate(
            f"{middle:,.0f}",
            (max(values), at),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_title("Requests per second, one worker, 8 connections, a 64-32-2 model", loc="left", fontsize=11)
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _quiet(axes, "x")


def _goals(axes: Axes, goals: list[dict[str, Any]]) -> None:
    """How many times better than the goal: 1 is just met, whichever way the goal points."""
    import matplotlib.ticker

    shown = []
    for at, row in enumerate(reversed(goals)):
        true_margin = row["ratio"] / row["goal"] if row["bound"] == ">=" else row["goal"] / row["ratio"]
        margin = min(_MOST, max(1 / _MOST, true_margin))
        shown.append(margin)
        colour = _OURS if row["met"] else _BAD
        axes.plot([1, margin], [at, at], color=colour, linewidth=2.2)
        marker = "o" if margin == true_margin else ">" if margin > 1 else "<"  # beyond the edge
        axes.plot(margin, at, marker, color=colour, markersize=7)
        text = (
            f"{row['ratio']:.3g}  (goal {row['bound'].replace('>=', '≥').replace('<=', '≤')} {row['goal']:g})"
        )
        if row["failures"]:
            text += f", {row['failures']} failed"
        right = margin >= 1
        axes.annotate(
            text,
            (margin, at),
            xytext=(9 if right else -9, 0),
            textcoords="offset points",
            va="center",
            ha="left" if right else "right",
            fontsize=9,
        )
    axes.axvline(1, color="#1f2a30", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}x" if value >= 1 else f"1/{1 / value:g}")
    )
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    low, high = min(shown, default=1.0), max(shown, default=1.0)
    # Room for the text beside the outermost points.
    axes.set_xlim(low / 6 if low < 1 else 0.85, high * 4)
    axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([2.0**power for power in range(-5, 6)]))
    axes.set_ylim(-0.7, len(goals) - 0.3)
    axes.set_yticks(range(len(goals)), [row["name"] for row in reversed(goals)])
    axes.set_title("Ratio against its goal: right of the line is met", loc="left", fontsize=11)
    _quiet(axes, "x")


def _quiet(axes: Axes, axis: str) -> None:
    axes.set_axisbelow(True)
    axes.grid(axis=axis, color=_GRID)  # type: ignore[arg-type]
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
