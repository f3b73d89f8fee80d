"""The chart: the evidence for rolling back over requests, one run each, with the line at which it acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

_COLOURS = ("#0b6e6e", "#7a8a94", "#d98324", "#c0392b")
_GRID, _INK = "#e3e7ea", "#1f2a30"
_LOWEST = -1.6


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draw the traces into a PNG; False when there are none."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    traces = results.get("traces")
    if not traces:
        return False
    plt.rcParams.update({"font.size": 10, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(figsize=(11, 5.2))
    limit = traces[0]["limit"]
    last = max(requests for trace in traces for requests, _ in trace["line"])
    rolled_back = 0
    for colour, trace in zip(_COLOURS, traces, strict=True):
        requests, evidence = zip(*trace["line"], strict=True)
        axes.plot(requests, evidence, color=colour, linewidth=1.7)
        crossed = evidence[-1] >= limit
        text = _title(trace["drop"]) + (f": rolled back after {requests[-1]:,}" if crossed else "")
        if crossed:
            axes.plot(requests[-1], evidence[-1], "o", color=colour, markersize=6)
            rolled_back += 1
        # A line that ends below the picture is named where it leaves.
        inside = [place for place, value in enumerate(evidence) if value >= _LOWEST]
        axes.annotate(
            text,
            (requests[inside[-1]], evidence[inside[-1]]),
            # One above the other: the one that was earlier passes over the one that was later.
            xytext=(8, 17 * rolled_back - 13 if crossed else 8),
            textcoords="offset points",
            color=colour,
            fontsize=9.5,
        )
    axes.axhline(limit, color=_INK, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"rolls back: evidence of {10**limit:.0f} to 1",
        (last, limit),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        fontsize=9.5,
        color=_INK,
    )
    axes.set_xlim(0, last * 1.22)
    axes.set_ylim(_LOWEST, limit + 0.8)
    axes.set_xlabel("requests, each answered by both arms")
    axes.set_ylabel("log10 of the evidence for rolling back")
    axes.set_title("One run each, margin 1 pt, error rate 5%", loc="left", fontsize=11)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_axisbelow(True)
    axes.grid(color=_GRID)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _title(drop: float) -> str:
    return {0.0: "no drop", 0.01: "a drop of 1 pt, the margin"}.get(drop, f"a drop of {100 * drop:g} pt")
