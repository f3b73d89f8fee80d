"""The rounds: every server in turns, started afresh, warmed up, measured and stopped before the next one starts.

Servers are not left running beside each other: on a small machine the idle ones would take part in every figure. The
order turns by one from round to round, so that nobody always follows the same neighbour.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import psutil

from benchmarks.serving import models
from benchmarks.serving.formats import Target
from benchmarks.serving.load import Closed, PacedLoad, closed_loop
from benchmarks.serving.minilm import minilm, minilm_records
from benchmarks.serving.ours import ROOT, Mirrored, Store, Trimtab, store
from benchmarks.serving.peers import PEERS, Peer, serve
from benchmarks.serving.processes import BenchmarkError, Child, environment
from benchmarks.serving.rows import ROWS, Row, Series
from benchmarks.venvs import prepare
from compression.errors import CompressionError
from services.client import GatewayError

__all__ = ["MIRROR_RATE", "MODERATE_RATE", "Measurements", "Options", "measure", "mlp_store"]

MIRROR_RATE = 0.10
"""Of `everything on`."""
MODERATE_RATE = 1000.0
"""Requests per second of the rows on mirroring: some way below saturation, and the same for each mirror rate."""
_MIRROR_RATES = {"0.1%": 0.001, "100%": 1.0, "10%": 0.1, "1%": 0.01}


@dataclass(frozen=True)
class Options:
    """How long, how often, and which rows. Seconds are for each series and round."""

    rounds: int
    seconds: int
    tail_seconds: float
    only: frozenset[str]
    cache: Path
    warm_up: int = 1

    @property
    def rows(self) -> list[Row]:
        return [row for row in ROWS if row.name in self.only]


@dataclass
class Measurements:
    """What came out.

    Attributes:
        mirror: for each look at the mirror, what the server's metrics said.
    """

    series: dict[str, Series] = field(default_factory=dict)
    mirror: dict[str, list[dict[str, float]]] = field(default_factory=dict)


class _Run:
    """Progress and results while it goes on."""

    def __init__(self, options: Options, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.wanted = {name for row in options.rows for name in (row.ours, row.peer)}
        self.found = Measurements({name: Series() for name in sorted(self.wanted)})
        self.round = 0
        self._total = len(self.wanted) * options.rounds
        self._done = 0
        self._started = time.monotonic()

    def add(self, name: str, value: float, failures: int = 0, **details: float) -> None:
        """Note a measurement, and say so."""
        series = self.found.series.get(name)
        if series is None:  # measured on the way to another
            return
        series.values.append(value)
        series.failures += failures
        for key, figure in details.items():
            series.details.setdefault(key, []).append(figure)
        self._done += 1
        extra = "".join(f", {key} {figure:g}" for key, figure in details.items())
        failed = f", {failures} FAILED" if failures else ""
        self._progress(f"{name}: {value:,.4g}{extra}{failed}")

    def fail(self, names: Set[str], problem: str) -> None:
        """Note why series were not measured, and say so."""
        for name in sorted(self.wanted & names):
            series = self.found.series[name]
            if len(series.values) < self.round:
                series.problem = problem
                self._done += 1
                self._progress(f"{name}: NOT MEASURED: {problem}")

    def skip(self, names: Set[str], problem: str) -> None:
        """Note why series will not be measured in any round, and say so."""
        for name in sorted(self.wanted & names):
            self.found.series[name].problem = problem
            self._total -= self.options.rounds
            self.say(f"{name}: WILL NOT BE MEASURED: {problem}")

    def _progress(self, text: str) -> None:
        spent = time.monotonic() - self._started
        left = spent / self._done * (self._total - self._done) / 60
        head = f"[{self._done}/{self._total}] round {self.round}/{self.options.rounds}"
        self.say(f"{head}, {left:.0f} min left  {text}")

    def log(self, name: str) -> Path:
        return self.options.cache / "logs" / f"{name}.log"

    def saturate(self, name: str, target: Target) -> float:
        """Warm up, measure requests per second, note them."""
        closed_loop(target, self.options.warm_up, self.log("wrk"))
        seen = closed_loop(target, self.options.seconds, self.log("wrk"))
        self.add(name, seen.rate, seen.failures, p50_ms=seen.p50, p99_ms=seen.p99)
        return seen.rate

    def tail(self, name: str, target: Target, rate: float) -> None:
        """Warm up, measure latencies at a rate, note them and what the hypervisor took meanwhile."""
        with PacedLoad(target) as load:
            load.run(rate, self.options.warm_up)
            before = psutil.cpu_times()
            seen = load.run(rate, self.options.tail_seconds)
            taken = getattr(psutil.cpu_times(), "steal", 0.0) - getattr(before, "steal", 0.0)
        self.add(
            f"{name} p50",
            seen.p50,
            rate=round(rate),
            generator_late_p99_ms=seen.late,
            stolen_cpu_s=round(taken, 2),
        )
        self.add(f"{name} p99", seen.p99, seen.failures, p999_ms=seen.p999, worst_ms=seen.worst)


@dataclass(frozen=True)
class _Stage:
    """One server's part of a round: what it measures, and how."""

    series: frozenset[str]
    run: Callable[[_Run], None]


def measure(options: Options, say: Callable[[str], None]) -> Measurements:
    """Measure all series that the wanted rows need. What cannot be measured is noted with its reason.

    Raises:
        BenchmarkError: nothing can be measured at all.
    """
    run = _Run(options, say)
    with _stages(run) as stages:
        for number in range(options.rounds):
            run.round = number + 1
            for at in range(len(stages)):
                stage = stages[(at + number) % len(stages)]
                try:
                    stage.run(run)
                except (BenchmarkError, GatewayError, httpx.HTTPError) as error:
                    run.fail(stage.series, str(error) or repr(error))
    return run.found


@contextlib.contextmanager
def mlp_store(cache: Path) -> Iterator[tuple[Path, Store]]:
    """The MLP as a file, and in a model store as both arms."""
    path = cache / "models" / "mlp.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    model, records = models.mlp(), models.mlp_records()
    path.write_bytes(model)
    with store("mlp", path, records, models.predict(model, records), cache, candidate=True) as made:
        yield path, made


@contextlib.contextmanager
def _stages(run: _Run) -> Iterator[list[_Stage]]:
    """Make everything that is needed before the first measurement, and keep it until the last."""
    cache, wanted = run.options.cache, run.wanted
    stages = []
    with contextlib.ExitStack() as stack:
        path, mlp = stack.enter_context(mlp_store(cache))
        floor: _Targets | None = None
        for peer in PEERS:
            series = frozenset(peer.endpoints)
            if _BARE in series:
                series |= _BARE_TAIL
            if wanted & series:
                try:
                    bin_ = prepare(peer.name, cache, run.say)
                except BenchmarkError as error:
                    run.skip(series, f"not installed: {error}")
                    continue
                if _BARE in series:
                    floor = partial(serve, peer, bin_, path, mlp.records, mlp.logits, cache)
                else:
                    stages.append(_Stage(series, _peer_stage(peer, bin_, path, mlp)))
        together = _EVERYTHING | _BARE_TAIL | {_BARE, "bare-asgi v2-binary"}
        if wanted & together:
            stages.append(_Stage(together, _everything_stage(mlp, floor)))
        for names, make in (
            (_MIRRORING, _mirror_stage),
            (_WORKERS, _workers_stage),
        ):
            if wanted & names:
                stages.append(_Stage(names, make(mlp)))
        if wanted & _TRANSFORMER:
            try:
                run.say("preparing MiniLM")
                file = minilm(cache / "models")
            except (BenchmarkError, CompressionError) as error:
                run.skip(_TRANSFORMER, f"not installed: {error}")
            else:
                records = minilm_records()
                logits = models.predict(file.read_bytes(), records)
                made = stack.enter_context(store("minilm", file, records, logits, cache, candidate=False))
                stages.append(_Stage(_TRANSFORMER, _transformer_stage(made, file)))
        yield stages


_BARE = "bare-asgi v2-json"
_BARE_TAIL = frozenset({"bare-asgi tail p50", "bare-asgi tail p99"})
_Targets = Callable[[], contextlib.AbstractContextManager[Mapping[str, Target]]]


def _peer_stage(peer: Peer, bin_: Path, model: Path, mlp: Store) -> Callable[[_Run], None]:
    def stage(run: _Run) -> None:
        with serve(peer, bin_, model, mlp.records, mlp.logits, run.options.cache) as targets:
            for series, target in targets.items():
                if series in run.wanted:
                    run.saturate(series, target)

    return stage


class _Looks:
    """Series that are looked at twice in a round, for half of the time each; what is noted is the mean of both."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._seen: dict[str, list[Closed]] = {}

    def look(self, name: str, target: Target) -> float:
        """Warm up, measure requests per second; returns them."""
        run = self._run
        closed_loop(target, run.options.warm_up, run.log("wrk"))
        seen = closed_loop(target, max(1, run.options.seconds // 2), run.log("wrk"))
        self._seen.setdefault(name, []).append(seen)
        return seen.rate

    def note(self) -> None:
        """Note all series."""
        for name, seen in self._seen.items():
            rate, p50, p99 = (
                statistics.fmean(values)
                for values in zip(*((one.rate, one.p50, one.p99) for one in seen), strict=True)
            )
            self._run.add(
                name, rate, sum(one.failures for one in seen), p50_ms=round(p50, 3), p99_ms=round(p99, 3)
            )


_EVERYTHING = frozenset(
    {"trimtab v2-json", "trimtab v2-binary", "trimtab predict", "trimtab v2-json off", "tail p99", "tail p50"}
)


def _everything_stage(mlp: Store, floor: _Targets | None) -> Callable[[_Run], None]:
    """The floor, nothing on, a rollout at 50% with its mirror, and back the same way: what the machine's speed does in
    these minutes is then much the same for all of them.

    Args:
        floor: bare ASGI's server, if it is wanted.
    """

    def stage(run: _Run) -> None:
        looks = _Looks(run)
        _floor(run, looks, floor, first=True)
        if run.wanted & _EVERYTHING:
            with Trimtab(mlp, run.options.cache) as server:
                for first in (True, False):
                    if first and "trimtab v2-json off" in run.wanted:
                        looks.look("trimtab v2-json off", server.target("v2-json"))
                    if run.wanted & (_EVERYTHING - {"trimtab v2-json off"}):
                        with server.rollout(MIRROR_RATE):
                            _everything_on(run, looks, server, first=first)
                    if not first and "trimtab v2-json off" in run.wanted:
                        looks.look("trimtab v2-json off", server.target("v2-json"))
        _floor(run, looks, floor, first=False)
        looks.note()

    return stage


def _floor(run: _Run, looks: _Looks, floor: _Targets | None, *, first: bool) -> None:
    if floor is None:
        return
    with floor() as targets:
        for series, target in targets.items() if first else reversed(targets.items()):
            rate = looks.look(series, target)
            if first and series == _BARE and _BARE_TAIL & run.wanted:
                run.tail("bare-asgi tail", target, rate / 2)


def _everything_on(run: _Run, looks: _Looks, server: Trimtab, *, first: bool) -> None:
    formats = [
        ("trimtab v2-json", "v2-json"),
        ("trimtab v2-binary", "v2-binary"),
        ("trimtab predict", "records"),
    ]
    with server.mirrored() as mirrored:
        rates = {
            series: looks.look(series, server.target(format_))
            for series, format_ in (formats if first else reversed(formats))
            if series in run.wanted or series == "trimtab v2-json"
        }
        _note_mirror(run, "saturated", MIRROR_RATE, mirrored())
    if first and "tail p99" in run.wanted:
        with server.mirrored() as mirrored:
            run.tail("tail", server.target("v2-json"), rates["trimtab v2-json"] / 2)
            _note_mirror(run, "half of saturation", MIRROR_RATE, mirrored())


def _note_mirror(run: _Run, when: str, asked: float, seen: Mirrored) -> None:
    figures = {
        "asked": asked,
        "in_force": round(seen.share, 5),
        "requests": seen.requests,
        "pairs": seen.pairs,
        "meant": seen.meant,
        **{f"shed_{reason}": number for reason, number in seen.shed.items()},
        "shed": sum(seen.shed.values()),
    }
    run.found.mirror.setdefault(when, []).append(figures)
    run.say(f"mirror, {when}: asked {asked:g}, in force {seen.share:.4f}, {figures['shed']} shed")


_MIRRORING = frozenset(
    {
        *(f"p50 mirrored {rate}" for rate in _MIRROR_RATES),
        *(f"{service} CPU at {rate}" for service in ("shadow", "gateway") for rate in _MIRROR_RATES),
    }
)


@dataclass
class _Look:
    """What was seen at one mirror rate, in all looks of a round."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    failures: int = 0
    seconds: float = 0.0
    shadow: float = 0.0
    gateway: float = 0.0


def _mirror_stage(mlp: Store) -> Callable[[_Run], None]:
    """One server, one rate of requests, and a rollout for each look at a mirror rate.

    Every rate is looked at twice, there and back again: what a server does while it grows older is then the same
    for all of them.
    """

    def stage(run: _Run) -> None:
        turn = [
            name
            for name in _MIRROR_RATES
            if {f"p50 mirrored {name}", f"shadow CPU at {name}", f"gateway CPU at {name}"} & run.wanted
        ]
        turn = turn[run.round % len(turn) :] + turn[: run.round % len(turn)]
        looks = {name: _Look() for name in turn}
        with Trimtab(mlp, run.options.cache) as server, PacedLoad(server.target("v2-json")) as load:
            load.run(MODERATE_RATE, 2 * run.options.warm_up)
            for name in (*turn, *reversed(turn)):
                with server.rollout(_MIRROR_RATES[name]):
                    load.run(MODERATE_RATE, run.options.warm_up)
                    _look(run, server, load, name, looks[name])
        for name, look in looks.items():
            p50, p99 = statistics.fmean(look.p50), max(look.p99)
            run.add(f"p50 mirrored {name}", p50, look.failures, p99_ms=p99)
            run.add(f"shadow CPU at {name}", look.shadow / look.seconds)
            run.add(f"gateway CPU at {name}", look.gateway / look.seconds, look.failures)

    return stage


def _look(run: _Run, server: Trimtab, load: PacedLoad, name: str, look: _Look) -> None:
    seconds = run.options.seconds / 2
    with server.mirrored() as mirrored:
        before = {service: server.cpu_seconds(service) for service in ("shadow", "gateway")}
        seen = load.run(MODERATE_RATE, seconds)
        look.shadow += server.cpu_seconds("shadow") - before["shadow"]
        look.gateway += server.cpu_seconds("gateway") - before["gateway"]
        look.p50.append(seen.p50)
        look.p99.append(seen.p99)
        look.failures += seen.failures
        look.seconds += seconds
        _note_mirror(run, f"{MODERATE_RATE:g} requests/s, {name}", _MIRROR_RATES[name], mirrored())


_WORKERS = frozenset({"trimtab 2 workers"})


def _workers_stage(mlp: Store) -> Callable[[_Run], None]:
    def stage(run: _Run) -> None:
        with Trimtab(mlp, run.options.cache, workers=2) as server, server.rollout(MIRROR_RATE):
            run.saturate("trimtab 2 workers", server.target("v2-json"))

    return stage


_TRANSFORMER = frozenset({"minilm served", "minilm direct"})


def _transformer_stage(made: Store, file: Path) -> Callable[[_Run], None]:
    """The same file, the same number of threads: served to 8 connections, and in a loop in each thread."""
    threads = os.cpu_count() or 1

    def stage(run: _Run) -> None:
        with Trimtab(made, run.options.cache, TRIMTAB_MODEL_THREADS=str(threads)) as server:
            run.saturate("minilm served", server.target("v2-json"))
        command = [sys.executable, "-m", "benchmarks.serving.direct"]
        log = run.log("direct")
        command += [str(file), str(threads), str(run.options.seconds)]
        with Child(command, log, environment(PYTHONPATH=str(ROOT))) as child:
            if child.wait() != 0:
                raise BenchmarkError(f"the model called directly: {child.last_line()} (see {log})")
            run.add("minilm direct", float(child.last_line()))

    return stage
