"""Recipes on real models beside torch, ONNX Runtime's one-line quantization and nncf: size, speed and quality.

    python -m benchmarks.compression                      everything; an hour or two the first time
    python -m benchmarks.compression --quick              the MLP, two recipes, no peers: does everything work?
    python -m benchmarks.compression --only fashion       one workload; its rows replace those of before
    python -m benchmarks.compression --page               writes the last results into docs/compression-benchmarks.md

One thread; every model is timed in turns with full precision. Quality is measured on the test split, which no training,
calibration or choice has seen. Variants and finished steps are kept under .bench/compression, so that another run only
measures. nncf gets an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_CACHE = _ROOT / ".bench"
# BentoML reads it when it is first imported.
os.environ["TRIMTAB_HOME"] = str(_CACHE / "compression")
os.environ["BENTOML_HOME"] = str(_CACHE / "compression" / "bentoml")

from benchmarks.compression import results  # noqa: E402
from benchmarks.compression.goals import WORKLOADS  # noqa: E402
from benchmarks.compression.measure import Options, measure_workload, sha256_of_recipe  # noqa: E402
from benchmarks.files import load, say, write  # noqa: E402
from benchmarks.serving import machine  # noqa: E402
from benchmarks.serving.processes import BenchmarkError, stop_all  # noqa: E402
from compression.errors import CompressionError  # noqa: E402

__all__ = ["main"]

_RESULTS = _ROOT / "benchmarks" / "results" / "compression.json"
_PAGE = _ROOT / "docs" / "compression-benchmarks.md"


def main() -> None:
    """Run the benchmark; exits 1 when a goal is missed (never when quick), 2 when nothing can be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="employment, two recipes, one round")
    parser.add_argument(
        "--only", action="append", choices=WORKLOADS, metavar="NAME", help=", ".join(WORKLOADS)
    )
    parser.add_argument("-r", "--recipe", action="append", help="these recipes only; repeatable")
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 101), metavar="N", help="default 5")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--page", action="store_true", help="write the last results into the docs")
    parser.add_argument("--sha256", nargs=2, metavar=("FOLDER", "RECIPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        raise SystemExit(_run(arguments))
    except (BenchmarkError, CompressionError, OSError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("benchmark: interrupted; what was finished is kept", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        stop_all()


def _run(arguments: argparse.Namespace) -> int:
    if arguments.sha256:
        print(sha256_of_recipe(*arguments.sha256))
        return 0
    quick = arguments.quick
    whole = not quick and not arguments.recipe
    path = arguments.json or (_RESULTS if whole else _CACHE / "compression.json")
    if arguments.page:
        found = load(arguments.json or _RESULTS)
        if not found:
            raise BenchmarkError("there are no results: run python -m benchmarks.compression first")
        results.write_page(_PAGE, found)
        return 0
    options = Options(
        rounds=1 if quick else arguments.rounds,
        seconds=0.1 if quick else 0.6,
        cache=_CACHE,
        recipes=("int8-dynamic", "int8-static") if quick else tuple(arguments.recipe or ()) or None,
        peers=not quick,
        twice=whole,
    )
    here = machine.describe()
    if not here["idle"]:
        say(
            f"WARNING: the machine is {here['busy_percent']:.0f}% busy: ratios are taken in turns, but less sure"
        )
    missed = 0
    for name in arguments.only or (["employment"] if quick else list(WORKLOADS)):
        began = time.monotonic()
        rows = measure_workload(name, WORKLOADS[name], options, say)
        took = {name: round((time.monotonic() - began) / 60, 1)}
        body = results.merge(load(path), name, rows, here, took)
        # After each workload: the next one may take an hour.
        write(path, body)
        missed += sum(row["met"] is False for row in rows)
        print(results.table(rows))
    say(f"results in {path}")
    return int(not quick and missed > 0)
