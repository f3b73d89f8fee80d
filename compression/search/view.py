"""What is seen of a search: in a terminal while it runs and when it is over, and as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from compression.search.evaluate import Figures, Limits, Objective
    from compression.search.result import Result, Trial
    from compression.variant import Variant
    from compression.workload import Workload


class Watch:
    """A line about what is going on, and one for each trial."""

    def __init__(
        self,
        console: Console,
        update: Callable[[str], None],
        objective: Objective,
        seconds: float | None,
    ) -> None:
        self.console = console
        self.update = update
        self.objective: Objective = objective
        self.seconds = seconds
        self.started = time.monotonic()
        self.done = 0
        self.best: Figures | None = None

    def now(self, number: int, what: str) -> None:
        spent = time.monotonic() - self.started
        left = "" if self.seconds is None else f", {_clock(max(0.0, self.seconds - spent))} left"
        best = "nothing within the limits yet" if self.best is None else f"best {self._figure(self.best)}"
        self.update(f"{self.done} trials done, {best}{left}; trial {number}: {what}")

    def finished(self, trial: Trial) -> None:
        self.done += 1
        figures = trial.figures
        better = figures is not None and (
            self.best is None or figures.cost(self.objective) < self.best.cost(self.objective)
        )
        if trial.feasible and better:
            self.best = figures
        self.console.print(one_line(trial), soft_wrap=True, markup=False)

    def _figure(self, figures: Figures) -> str:
        texts: dict[Objective, str] = {
            "quality": f"quality {100 * figures.quality.value:.1f}%",
            "latency": f"latency {figures.latency_ratio:.0%} of full precision's",
            "size": f"size {figures.size_bytes / 1000:,.1f} kB",
            "macs": f"{figures.macs:,} MACs",
        }
        return texts[self.objective]


def one_line(trial: Trial) -> str:
    """A trial for a terminal."""
    name = trial.recipe.name if trial.recipe else "no recipe"
    if trial.figures is None:
        return f"- {trial.number} {name}: {trial.state}: {trial.why}"
    figures = trial.figures
    again = "" if trial.same_as is None else f" (as in trial {trial.same_as})"
    over = "" if not trial.over else f": over the limit of {', '.join(trial.over)}"
    return (
        f"{'✓' if trial.feasible else '✗'} {trial.number} {name}{again}: "
        f"quality {100 * figures.quality.value:.1f}%, drop {100 * figures.drop.value:z.1f} pt, "
        f"{figures.size_bytes / 1000:,.1f} kB, {figures.latency_ratio:.0%} of the time{over}"
    )


def report(
    result: Result,
    limits: Limits,
    written: dict[str, Path],
    variants: list[Variant],
    failed: dict[str, str],
) -> dict[str, object]:
    """Everything about a search, ready for JSON."""
    from compression.cli import as_dict

    return {
        "study": result.study,
        "workload": result.workload,
        "full": result.full,
        "objectives": list(result.objectives),
        "limits": limits.model_dump(mode="json"),
        "seconds": result.seconds,
        "trials_of_this_run": result.done,
        "interrupted": result.interrupted,
        "trials": [_trial(trial) for trial in result.trials],
        "frontier": [trial.recipe.name for trial in result.frontier if trial.recipe],
        "scenarios": [vars(choice) for choice in result.choices],
        "recipes": {name: str(path) for name, path in written.items()},
        "variants": [as_dict(variant) for variant in variants],
        "failed": failed,
    }


def _trial(trial: Trial) -> dict[str, object]:
    figures = None
    if trial.figures is not None:
        # No `latency_ratio`: that is what variants have, and the other way round.
        figures = trial.figures.model_dump(mode="json") | {"time_ratio": trial.figures.latency_ratio}
    return {
        "number": trial.number,
        "state": trial.state,
        "feasible": trial.feasible,
        "over": list(trial.over),
        "why": trial.why,
        "same_as": trial.same_as,
        "recipe": trial.recipe.model_dump(mode="json") if trial.recipe else None,
        "figures": figures,
    }


def print_result(console: Console, result: Result, folder: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    states = [trial.state for trial in result.trials]
    feasible = sum(trial.feasible for trial in result.trials)
    rate = 60 * result.done / result.seconds if result.seconds else 0.0
    console.print(
        f"{result.done} trials in {_clock(result.seconds)} "
        f"({rate:.1f} a minute); the study has {len(states)}: {states.count('measured')} measured, {feasible} of them "
        f"within the limits, {states.count('refused')} refused, {states.count('failed')} failed",
        soft_wrap=True,
    )
    if not result.frontier:
        console.print(
            "nothing is within the limits yet: give more --trials or time, or wider limits and another --study",
            soft_wrap=True,
        )
        return
    table = Table(
        title=f"{result.workload}: nothing beats these in {', '.join(result.objectives)}; validation rows",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("recipe", no_wrap=True)
    for column in ("quality %", "drop pt (95%)", "kB", "time", "MACs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("steps", overflow="fold")
    for trial in result.frontier:
        table.add_row(*_cells(trial))
    console.print(table)
    for choice in result.choices:
        console.print(f"{choice.scenario}: {choice.why}", soft_wrap=True, markup=False)
    console.print(f"recipes: {folder}/NAME.yaml", soft_wrap=True)


def _cells(trial: Trial) -> list[str]:
    from rich.markup import escape

    from compression.search.result import describe_steps

    assert trial.recipe is not None
    assert trial.figures is not None
    figures, drop = trial.figures, trial.figures.drop
    return [
        trial.recipe.name,
        f"{100 * figures.quality.value:.1f}",
        f"{100 * drop.value:z.1f} ({100 * drop.low:z.1f} to {100 * drop.high:z.1f})",
        f"{figures.size_bytes / 1000:,.1f}",
        f"{figures.latency_ratio:.0%}",
        f"{figures.macs:,}",
        escape(describe_steps(trial.recipe)),
    ]


def print_made(console: Console, workload: Workload, variants: list[Variant], failed: dict[str, str]) -> None:
    from rich.markup import escape

    from compression.tables import print_variants

    if variants:
        print_variants(console, workload, variants)
    for name, why in failed.items():
        console.print(f"[red]✗[/red] {name}: failed: {escape(why)}", soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
