"""What rollouts judge, beside the ways popular tools judge. docs/guardrail-benchmarks.md says what each row is.

    python -m benchmarks.guardrails                   all scenarios, 200 to 3,000 runs each
    python -m benchmarks.guardrails --quick           does everything work? 20 runs, figures not to be cited
    python -m benchmarks.guardrails --only aa --only drop-3 --runs 5000
    python -m benchmarks.guardrails --page            the last results into docs/guardrail-benchmarks.md, nothing is run

All scenarios go to benchmarks/results/guardrails.json with a chart beside it; a quick or partial run goes to .bench/
unless --json says where. Rows that are not made keep the figures they had.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.files import load, say, write
from benchmarks.guardrails import measure, results
from benchmarks.guardrails.chart import draw
from benchmarks.serving import machine

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[2]
_RESULTS = _ROOT / "benchmarks" / "results" / "guardrails.json"
_PAGE = _ROOT / "docs" / "guardrail-benchmarks.md"


def main() -> None:
    """Run the benchmark; exits 1 when a goal is missed (never when quick), 2 when nothing can be written."""
    arguments = _arguments()
    try:
        raise SystemExit(_run(arguments))
    except (OSError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("benchmark: interrupted, nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guardrails",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = results.names()
    parser.add_argument("--quick", action="store_true", help="20 runs of each")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--runs", type=_positive, help="of each scenario, at most; default 1,000")
    parser.add_argument("--json", type=Path, help="where the results go; the chart goes beside them")
    parser.add_argument(
        "--page", action="store_true", help="only write the last results into docs/guardrail-benchmarks.md"
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def _run(arguments: argparse.Namespace) -> int:
    if arguments.page:
        path = arguments.json or _RESULTS
        found = load(path)
        if not found:
            raise ValueError(f"{path} has no results: run python -m benchmarks.guardrails first")
        results.write_page(_PAGE, found)
        return 0
    quick, began = arguments.quick, time.monotonic()
    runs = arguments.runs or (20 if quick else 1000)
    whole = not quick and arguments.only is None and arguments.runs is None
    path = arguments.json or (_RESULTS if whole else _ROOT / ".bench" / "guardrails.json")
    here = machine.describe()
    rows = measure.measure(frozenset(arguments.only or results.names()), runs, say)
    body = {
        "rows": rows,
        "traces": measure.traces(),
        "machine": here,
        "settings": {
            "runs": runs,
            "look_every": measure.LOOK_EVERY,
            "seed": measure.SEED,
            "quick": quick,
            "minutes": round((time.monotonic() - began) / 60, 1),
        },
    }
    body = results.merge(load(path), body)
    write(path, body)
    say(f"results in {path}")
    if draw(body, path.with_suffix(".png")):
        say(f"chart in {path.with_suffix('.png')}")
    print(results.table(body))
    return int(not quick and any(row["met"] is False for row in rows))
