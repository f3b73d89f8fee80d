"""Trimtab against other servers, on this machine. docs/benchmarks.md says what each row is.

    python -m benchmarks.serving                      all rows; about half an hour
    python -m benchmarks.serving --quick              does everything work? a few minutes, figures not to be cited
    python -m benchmarks.serving --only tail --only transformer
    python -m benchmarks.serving --soak 30            half load for 30 minutes, instead of the rows
    python -m benchmarks.serving --page               the last results into docs/benchmarks.md, nothing is measured

All rows, and the soak, go to benchmarks/results/serving.json with a chart beside it; a quick or partial run goes to
.bench/ unless --json says where. Rows that are not measured keep the figures they had.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.files import load, say, write
from benchmarks.serving import machine, results
from benchmarks.serving.chart import draw
from benchmarks.serving.load import need_wrk
from benchmarks.serving.measure import Measurements, Options, measure
from benchmarks.serving.ours import ROOT
from benchmarks.serving.peers import PEERS
from benchmarks.serving.processes import BenchmarkError, stop_all
from benchmarks.serving.rows import ROWS, result
from benchmarks.serving.soak import soak
from benchmarks.venvs import describe

__all__ = ["main"]

_CACHE = ROOT / ".bench"
_RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
_PAGE = ROOT / "docs" / "benchmarks.md"


def main() -> None:
    """Run the benchmark; exits 1 when a goal is missed (quick: something failed), 2 when nothing can be measured."""
    options = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        raise SystemExit(_run(options))
    except (BenchmarkError, OSError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("benchmark: interrupted, nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        # A second Ctrl-C must not leave servers behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop_all()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rows = [row.name for row in ROWS]
    parser.add_argument("--quick", action="store_true", help="one round of 2 s")
    parser.add_argument("--only", action="append", choices=rows, metavar="NAME", help=", ".join(rows))
    parser.add_argument("--rounds", type=_positive(int), help="default 5")
    parser.add_argument("--seconds", type=_positive(int), help="for each series and round; default 8")
    parser.add_argument(
        "--soak", type=_positive(float), metavar="MINUTES", help="the soak instead of the rows"
    )
    parser.add_argument("--json", type=Path, help="where the results go; the chart goes beside them")
    parser.add_argument(
        "--page", action="store_true", help="only write the last results into docs/benchmarks.md"
    )
    return parser.parse_args()


def _positive(kind: type) -> Any:
    def convert(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return value

    convert.__name__ = kind.__name__
    return convert


def _run(arguments: argparse.Namespace) -> int:
    if arguments.page:
        path = arguments.json or _RESULTS
        found = load(path)
        if not found:
            raise BenchmarkError(f"{path} has no results: run python -m benchmarks.serving first")
        results.write_page(_PAGE, found)
        return 0
    need_wrk()
    quick = arguments.quick
    options = Options(
        rounds=arguments.rounds or (1 if quick else 5),
        seconds=arguments.seconds or (2 if quick else 8),
        tail_seconds=3.0 if quick else 60.0,
        only=frozenset(arguments.only or [row.name for row in ROWS]),
        cache=_CACHE,
    )
    here = machine.describe()
    if not here["idle"]:
        say(
            f"WARNING: the machine is {here['busy_percent']:.0f}% busy before anything was started: "
            "these figures will be too low, and ratios unfair"
        )
    measured = Measurements()
    if arguments.soak is not None:
        rows = [soak(options, arguments.soak, say)]
    else:
        measured = measure(options, say)
        rows = [result(row, measured.series, options.rounds) for row in options.rows]
    whole = not quick and arguments.only is None
    path = arguments.json or (_RESULTS if whole else _CACHE / "serving.json")
    body = {
        "rows": rows,
        "series": {name: dataclasses.asdict(series) for name, series in measured.series.items()},
        "mirror": measured.mirror,
        "peers": {
            peer.name: describe(peer.name, peer.package, _CACHE)
            for peer in PEERS
            if measured.series.keys() & set(peer.endpoints)
        },
        "machine": here,
        "settings": {"rounds": options.rounds, "seconds": options.seconds, "quick": quick},
    }
    body = results.merge(load(path), body)
    write(path, body)
    say(f"results in {path}")
    if draw(body, path.with_suffix(".png")):
        say(f"chart in {path.with_suffix('.png')}")
    print(results.table(body))
    if quick:  # its figures say nothing about goals
        return int(any(row["problem"] or row["failures"] for row in rows))
    return int(any(row["met"] is False for row in rows))
