"""What the Monitor's reports cost, on 5,000 pairs and 5,000 reference rows of the employment example.

    python -m benchmarks.reports            200 reports in one process, about ten minutes
    python -m benchmarks.reports --quick    20 reports: does everything work? Memory has hardly settled by then

The figures of 200 reports go to benchmarks/results/reports.json; others go to .bench/ unless --json says where.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.files import say, write
from benchmarks.reports.measure import measure, summarise
from benchmarks.serving import machine
from services.settings import Settings

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / "benchmarks" / "results" / "reports.json"
RUNS, QUICK_RUNS = 200, 20


def main() -> None:
    """Run the benchmark; exits 1 when a goal is missed (never when quick), 2 when nothing can be written."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reports",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_RUNS} reports")
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    try:
        raise SystemExit(_run(quick=arguments.quick, path=arguments.json))
    except (OSError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("benchmark: interrupted, nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


def _run(*, quick: bool, path: Path | None) -> int:
    began, here = time.monotonic(), machine.describe()
    runs = measure(QUICK_RUNS if quick else RUNS, say)
    rows = summarise(runs, Settings.from_env().report_interval)
    body = {
        "rows": rows,
        "machine": here,
        "settings": {
            "runs": len(runs),
            "quick": quick,
            "minutes": round((time.monotonic() - began) / 60, 1),
        },
        "cpu_seconds": [run.cpu for run in runs],
        "resident_mb": [round(run.resident / 1e6, 1) for run in runs],
    }
    path = path or (_ROOT / ".bench" / "reports.json" if quick else _RESULTS)
    write(path, body)
    say(f"results in {path}")
    print(_table(rows))
    return int(not quick and any(row["met"] is False for row in rows))


def _table(rows: list[dict[str, Any]]) -> str:
    verdict = {None: "", True: "yes", False: "NO"}
    cells = [["measure", "value", "goal", "met"]]
    cells += [[row["measure"], f"{row['value']:.4g}", row["goal"] or "", verdict[row["met"]]] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    return "\n".join(
        f"{line[0]:{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:{widths[2]}}  {line[3]}".rstrip()
        for line in cells
    )
