"""Results: the JSON file, the table on the terminal, and the table in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import write_between_marks
from benchmarks.serving.rows import names

__all__ = ["merge", "table", "write_page"]

_CHART = "serving.png"


def merge(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """New rows in place of old ones of the same name; the others stay if they were measured on a machine like this.

    Every row says when it was measured.
    """
    alike = all(before.get("machine", {}).get(key) == now["machine"][key] for key in ("cpu", "cores"))
    rows = {row["name"]: row for row in before.get("rows", [])} if alike else {}
    rows |= {row["name"]: {**row, "at": now["machine"]["date"]} for row in now["rows"]}
    parts = {
        key: {**(before.get(key, {}) if alike else {}), **now[key]} for key in ("series", "mirror", "peers")
    }
    if alike and not now["series"]:  # a soak: most of the file is of before
        parts |= {key: before[key] for key in ("machine", "settings")}
    return {**now, **parts, "rows": [rows[name] for name in names() if name in rows]}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _range(values: Sequence[float] | None) -> str:
    return "" if not values else f"{_number(values[0])} to {_number(values[1])}"


def _cells(row: dict[str, Any]) -> list[str]:
    spread = _range(row["ratio_range"])
    goal = f"{row['bound']} {row['goal']:g}" if row["goal"] is not None else "-"
    verdict = {None: "-", True: "yes", False: "NO"}[row["met"]]
    problem = row["problem"]
    if problem is not None and "not installed" in problem:
        verdict = "not installed"
    if row["failures"]:
        verdict += f", {row['failures']} failed"
    return [
        row["title"],
        f"{_number(row['ours'])} {row['unit']}" if row["ours"] is not None else "-",
        _number(row["peer"]),
        _number(row["ratio"]),
        spread,
        goal,
        verdict,
    ]


_HEADS = ["row", "ours", "peer", "ratio", "range of rounds", "goal", "met"]


def table(results: dict[str, Any]) -> str:
    """The rows as text, with what went wrong below."""
    lines = [_HEADS, *(_cells(row) for row in results["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    text = [
        "  ".join(
            cell.ljust(width) if column in (0, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text += [f"{row['name']}: {row['problem']}" for row in results["rows"] if row["problem"]]
    return "\n".join(text)


def write_page(page: Path, results: dict[str, Any]) -> None:
    """Put the results into the page, between its two marks. Raises ValueError if it has none."""
    write_between_marks(page, _page(results))


def _page(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    lines = [
        f"Measured on {machine['date'][:10]}: {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
        f"onnxruntime {machine['versions']['onnxruntime']}; {settings['rounds']} rounds of "
        f"{settings['seconds']:g} s; the machine was {'idle' if machine['idle'] else 'NOT idle'} at the start."
    ]
    if settings["quick"]:
        lines.append("**A quick run: these figures show that everything works, and nothing else.**")
    lines += ["", f"![Requests per second, and every goal](../benchmarks/results/{_CHART})"]
    lines += ["", "| " + " | ".join(_HEADS) + " |", "| " + " | ".join(["---"] * len(_HEADS)) + " |"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in results["rows"]]
    lines += [*_mirror(results), *_soak(results), *_peers(results)]
    return "\n".join(lines)


def _mirror(results: dict[str, Any]) -> list[str]:
    """What mirror rate was in force."""
    lines = ["", "| the mirror | asked | in force, each round | shed |", "| --- | --- | --- | --- |"]
    for when, looks in results["mirror"].items():
        in_force = ", ".join(f"{look['in_force']:.3g}" for look in looks)
        lines.append(
            f"| {when} | {looks[0]['asked']:g} | {in_force} | {sum(look['shed'] for look in looks)} |"
        )
    return lines if results["mirror"] else []


def _soak(results: dict[str, Any]) -> list[str]:
    row = next((row for row in results["rows"] if row["name"] == "soak"), None)
    if row is None:
        return []
    details = row["details"]
    lines = [
        "",
        f"The soak: {details['minutes']:g} minutes at {details['requests_per_s']:,} requests/s, "
        f"{details['requests']:,} requests, {row['failures']} failed, p99 {details['p99_ms']:.3g} ms.",
        "",
        "| process | second third | last third | slope | flat |",
        "| --- | --- | --- | --- | --- |",
    ]
    for service, memory in details["memory"].items():
        lines.append(
            f"| {service} | {memory['second_third_mb']:g} MB | {memory['last_third_mb']:g} MB | "
            f"{memory['slope_mb_per_hour']:+g} MB/h | {'yes' if memory['flat'] else 'NO'} |"
        )
    return lines


def _peers(results: dict[str, Any]) -> list[str]:
    lines = ["", "| peer | version | on disk |", "| --- | --- | --- |"]
    for name, peer in results["peers"].items():
        lines.append(f"| {name} | {peer['version']} | {peer['disk_mb']} MB |")
    return lines if results["peers"] else []
