"""Results: the JSON file, the table on the terminal, and the table in docs/guardrail-benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.guardrails.scenarios import SCENARIOS, STEP
from benchmarks.page import write_between_marks

__all__ = ["merge", "names", "table", "write_page"]

_CHART = "guardrails.png"
_HEADS = [
    "traffic",
    "judge",
    "runs",
    "stopped wrongly",
    "95% interval",
    "median",
    "p95",
    "exposed",
    "besides",
    "goal",
    "met",
]
_TEXT = (0, 1, 8, 9, 10)


def names() -> list[str]:
    """All scenarios in the order of the table."""
    return [*(scenario.name for scenario in SCENARIOS), STEP]


def merge(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """New rows in place of old ones of the same name: rates depend on no machine. Each row says when it was made."""
    rows = {row["name"]: row for row in before.get("rows", [])}
    rows |= {row["name"]: {**row, "at": now["machine"]["date"]} for row in now["rows"]}
    order = [
        *(f"{scenario.name}/{judge}" for scenario in SCENARIOS for judge in scenario.judges),
        STEP,
    ]
    return {**now, "rows": [rows[name] for name in order if name in rows]}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g}%"


def _requests(row: dict[str, Any], key: str) -> str:
    if row.get("median_ms") is not None:
        return f"{row[key.replace('delay', 'ms')]:.3g} ms"
    if row[key] is not None:
        return f"{row[key]:,.0f}"
    return f"> {row['requests']:,}" if row["caught"] is not None or row["promoted"] is not None else "-"


def _besides(row: dict[str, Any]) -> str:
    found = []
    if row.get("caught") is not None:
        found.append(f"caught {_share(row['caught'])}")
    if row.get("named") is not None:
        found.append(f"named {_share(row['named'])}")
    if row.get("promoted") is not None:
        low, high = row["ci"]
        found.append(f"promoted {_share(row['promoted'])} ({_share(low)} to {_share(high)})")
    if row.get("labels") is not None:
        found.append(f"{row['labels']:,.0f} labels")
    return ", ".join(found) or "-"


def _cells(row: dict[str, Any]) -> list[str]:
    wrong = row["false_rollback"]
    return [
        row["scenario"],
        row["method"],
        f"{row['runs']:,}",
        _share(wrong),
        "-" if wrong is None else f"{_share(row['ci'][0])} to {_share(row['ci'][1])}",
        _requests(row, "median_delay"),
        _requests(row, "p95_delay"),
        "-" if row["exposed"] is None else f"{row['exposed']:,.0f}",
        _besides(row),
        row["goal"] or "-",
        {None: "-", True: "yes", False: "NO"}[row["met"]],
    ]


def table(results: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [_HEADS, *(_cells(row) for row in results["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in _TEXT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_page(page: Path, results: dict[str, Any]) -> None:
    """Put the results into the page, between its two marks. Raises ValueError if it has none."""
    write_between_marks(page, _page(results))


def _page(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    lines = [
        f"Made on {machine['date'][:10]} in {settings['minutes']:g} minutes, looked at every {settings['look_every']} "
        f"requests, seed {settings['seed']}; {machine['cpu']}, {machine['cores']} cores."
    ]
    if settings["quick"]:
        lines.append("**A quick run: these figures show that everything works, and nothing else.**")
    lines += ["", f"![Evidence over requests, one run each](../benchmarks/results/{_CHART})"]
    for scenario in SCENARIOS:
        rows = [row for row in results["rows"] if row["name"].startswith(f"{scenario.name}/")]
        if rows:
            lines += ["", f"**{scenario.title[0].upper()}{scenario.title[1:]}**", "", *_markdown(rows)]
    step = [row for row in results["rows"] if row["name"] == STEP]
    if step:
        lines += ["", f"**{step[0]['scenario'][0].upper()}{step[0]['scenario'][1:]}**", "", *_markdown(step)]
    return "\n".join(lines)


def _markdown(rows: list[dict[str, Any]]) -> list[str]:
    """A table without the columns that say nothing in it."""
    cells = [_cells(row)[1:] for row in rows]
    shown = [place for place in range(len(cells[0])) if any(line[place] != "-" for line in cells)]
    heads = [_HEADS[1 + place] for place in shown]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    return lines + ["| " + " | ".join(line[place] for place in shown) + " |" for line in cells]
