"""Results: the JSON file, the table on the terminal, and the tables in docs/compression-benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import write_between_marks

__all__ = ["merge", "table", "write_page"]

_HEAD = (
    "variant",
    "smaller",
    "fewer weights",
    "faster (range)",
    "batch of 32",
    "than torch",
    "accuracy",
    "drop, points (95%)",
    "goal",
    "met",
)


def merge(
    before: dict[str, Any],
    workload: str,
    rows: list[dict[str, Any]],
    machine: dict[str, Any],
    took: dict[str, float],
) -> dict[str, Any]:
    """New rows in place of the workload's old ones; others stay if they are of a machine like this."""
    alike = all(before.get("machine", {}).get(key) == machine[key] for key in ("cpu", "cores"))
    kept = [row for row in before.get("rows", []) if row["workload"] != workload] if alike else []
    minutes = {**(before.get("minutes", {}) if alike else {}), **took}
    stamped = [{**row, "at": machine["date"]} for row in rows]
    return {"rows": kept + stamped, "machine": machine, "minutes": minutes}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One workload for a terminal."""
    cells = [list(_HEAD), *([_plain(cell) for cell in _cells(row)] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def write_page(page: Path, found: dict[str, Any]) -> None:
    """Write all results into the docs. Raises ValueError if the page has no marks."""
    machine = found["machine"]
    parts = [f"Made on {machine['date'][:10]}; {machine['cpu']}, {machine['cores']} cores, one thread."]
    for workload in dict.fromkeys(row["workload"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["workload"] == workload]
        parts.append(f"\n**{workload}**\n")
        parts += ["| " + " | ".join(_HEAD) + " |", "| " + " | ".join(["---"] * len(_HEAD)) + " |"]
        parts += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    write_between_marks(page, "\n".join(parts))


def _cells(row: dict[str, Any]) -> list[str]:
    name = row["variant"] if row["kind"] != "made twice" else f"{row['variant']}, made twice"
    if row["kind"] == "problem":
        return [name, *["-"] * 7, f"failed: {row['problem']}", "-"]
    goal = row["goal"] or "-"
    met = {None: "-", True: "yes", False: "NO"}[row["met"]]
    if row.get("missed"):
        met += f": {', '.join(row['missed'])}"
    if row["quality"] is None:
        speed = "-" if row["latency_ratio"] is None else _speed(row)
        batch = f"{row['latency_ratio_32']:.2f}x" if row.get("latency_ratio_32") else "-"
        return [name, "-", "-", speed, batch, "-", "-", "-", goal, met]
    low, high = row["ci"]
    return [
        name,
        f"{row['size_ratio']:.1f}x",
        f"{row['weights_ratio']:.1f}x",
        _speed(row),
        f"{row['latency_ratio_32']:.2f}x",
        f"{row['torch_ratio']:.1f}x",
        f"{100 * row['quality']:.2f}%",
        f"{100 * row['quality_drop']:z.2f} ({100 * low:z.2f} to {100 * high:z.2f})",
        goal,
        met,
    ]


def _speed(row: dict[str, Any]) -> str:
    low, high = row["latency_range"]
    return f"{row['latency_ratio']:.2f}x ({low:.2f} to {high:.2f})"


def _plain(cell: str) -> str:
    return cell if len(cell) <= 60 else cell[:57] + "..."
