"""The commands `search` and `target`: recipes that nobody had to write."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compression.errors import CompressionError
from compression.workload import NAME_PATTERN, load_workload

if TYPE_CHECKING:
    from rich.console import Console

    from compression.search import Figures, Limits, Objective, Result, SamplerName, Trial
    from compression.variant import Variant
    from compression.workload import Workload

WorkloadRef = Annotated[
    str, typer.Argument(metavar="WORKLOAD", help="A workload folder, or module:attribute.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the `trimtab` application."""
    app.command("search")(search_command)
    app.command("target")(target_command)


def search_command(
    workload: WorkloadRef,
    budget: Annotated[
        str | None, typer.Option(help="How long, of this run: 90s, 30m, 2h. The last trial is finished.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many finished trials the study has in the end.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="What to make better, some of quality, latency, size, macs.")
    ] = "quality,latency,size",
    space: Annotated[
        Path | None,
        typer.Option(help="A recipe whose parameters may be {low, high, log, step} or {choices: [...]}."),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="tpe, nsga2, gp or random. Default: tpe for one objective, nsga2 for several."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="What the trials draw depends on it.")] = 0,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of quality, upper end of the interval. Default: the workload's profile."),
    ] = None,
    max_latency: Annotated[
        str | None, typer.Option(help="Of full precision's time (0.5, 50%) or in milliseconds (2ms).")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Of the file that is kept: 200kB.")] = None,
    max_macs: Annotated[int | None, typer.Option(min=1, help="Multiply-accumulates for one record.")] = None,
    study: Annotated[
        str | None, typer.Option(help="Name of the study to begin or go on with. Default: the objectives.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="A database URL that several machines reach, or journal:PATH for a file on NFS. "
            "Default: SQLite under TRIMTAB_HOME."
        ),
    ] = None,
    save: Annotated[
        int, typer.Option(min=0, max=2, help="Variants to make for each scenario: 2 takes the runner-up too.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Search for recipes on validation rows; name the best for mobile, edge server and cloud, and make those."""
    from compression.cache import StepCache
    from compression.search import SearchError, full_precision, save_recipes, search
    from compression.search_space import read_space, workload_space

    objectives = parse_objectives(objective)
    kind = _sampler(sampler)
    seconds = None if budget is None else parse_duration(budget)
    if seconds is None and trials is None:
        raise SearchError("a search needs an end: give --budget 30m, --trials 100 or both")
    name = study or "-".join(objectives)
    if not re.fullmatch(NAME_PATTERN, name):
        raise SearchError(f"--study {name}: use a letter, then letters, digits and hyphens, all lower case")
    loaded = load_workload(workload)
    limits = _limits(loaded, max_drop, max_latency, max_size, max_macs)
    folder = _home() / loaded.name / "search"
    console = _console(stderr=as_json)
    with console.status("full precision") as status:
        full = full_precision(loaded, folder, lambda what, done: status.update(f"full: {what} {done:.0%}"))
        chosen = workload_space(loaded, full) if space is None else read_space(space, loaded)
        for left, why in chosen.left_out.items():
            console.print(f"left out: {left}: {why}", soft_wrap=True, markup=False)
        watch = _Watch(console, status.update, objectives[0], seconds)
        result = search(
            loaded,
            full,
            chosen,
            folder=folder,
            study=name,
            objectives=objectives,
            limits=limits,
            sampler=kind,
            seed=seed,
            storage=storage,
            budget_s=seconds,
            trials=trials,
            cache=StepCache.open(_home()),
            progress=watch.now,
            told=watch.finished,
        )
    written = save_recipes(result, folder / name)
    variants, failed = ([], {}) if result.interrupted else _make(loaded, result, save, console)
    if as_json:
        typer.echo(json.dumps(report(result, limits, written, variants, failed), indent=2))
    else:
        _print(console, result, folder / name)
        _print_variants(console, loaded, variants, failed)
    if result.interrupted:
        console.print("interrupted: run the same command again to go on")
        raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


def target_command(
    workload: WorkloadRef,
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="A recipe's name or .yaml file.")],
    size: Annotated[str, typer.Option(help="The most that the kept file may have: 200kB, 1.5MB, 64KiB.")],
    vary: Annotated[
        str | None,
        typer.Option(help="STEP.PARAM to vary. Default: the first one that changes the size."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the variant of a recipe whose file just fits a size, by varying one parameter."""
    from compression.cache import StepCache
    from compression.cli import as_dict
    from compression.compress import compress
    from compression.recipe import find_recipe
    from compression.search import full_precision, selection_data
    from compression.target import meet_size, parse_size, save_recipe

    limit = parse_size(size)
    loaded = load_workload(workload)
    base = find_recipe(recipe, loaded.directory)
    folder = _home() / loaded.name / "targets"
    cache = StepCache.open(_home())
    console = _console(stderr=as_json)
    with console.status("full precision") as status:

        def progress(what: str, done: float) -> None:
            status.update(f"{what} {done:.0%}" if done else what)

        full = full_precision(loaded, folder, progress)
        found = meet_size(
            loaded,
            selection_data(loaded),
            full,
            base,
            limit,
            vary=vary,
            cache=cache,
            progress=progress,
        )
        comment = [
            f"{base.name} with {found.vary.name} {found.value:g}: the largest file within {limit} bytes."
        ]
        path = save_recipe(found.recipe, comment, folder / f"{found.recipe.name}.yaml")
        variant = compress(loaded, [found.recipe], progress=progress, cache=cache)[1]
    if as_json:
        out = {
            "recipe": found.recipe.model_dump(mode="json"),
            "path": str(path),
            "parameter": found.vary.name,
            "value": found.value,
            "limit_bytes": limit,
            "size_bytes": found.size_bytes,
            "looked_at": {f"{value:g}": bytes_ for value, bytes_ in found.looks.items()},
            "built": {f"{value:g}": bytes_ for value, bytes_ in found.built.items()},
            "variant": as_dict(variant),
        }
        typer.echo(json.dumps(out, indent=2))
        return
    console.print(
        f"{found.vary.name} {found.value:g} makes {found.size_bytes:,} bytes, {found.size_bytes / limit:.1%} of the "
        f"{limit:,} asked for ({len(found.looks)} quick builds, {len(found.built)} real); recipe: {path}",
        soft_wrap=True,
    )
    _print_variants(console, loaded, [variant], {})


# --- reading options ----------------------------------------------------------------------------------------------


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `1.5h`, or of a plain number.

    Raises:
        SearchError: it is no duration.
    """
    from compression.search import SearchError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise SearchError(f"--budget {text}: write for example 90s, 30m or 2h")
    return seconds


def parse_objectives(text: str) -> tuple[Objective, ...]:
    """Objectives from a list with commas, in its order.

    Raises:
        SearchError: one is unknown or there twice.
    """
    from compression.search import OBJECTIVES, SearchError

    names = [name.strip() for name in text.split(",")]
    known = {name: name for name in OBJECTIVES}
    if not set(names) <= known.keys() or len(set(names)) != len(names):
        raise SearchError(f"--objective {text}: give some of {', '.join(OBJECTIVES)}, each once, with commas")
    return tuple(known[name] for name in names)  # type: ignore[index]


def parse_latency(text: str) -> tuple[float | None, float | None]:
    """A share of full precision's time, or milliseconds; the other one is None.

    Raises:
        SearchError: it is neither.
    """
    from compression.search import SearchError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|%|x?)\s*", text)
    if match is None or float(match[1]) <= 0:
        raise SearchError(f"--max-latency {text}: write 0.5 or 50% of full precision's time, or 2ms")
    number = float(match[1])
    if match[2] == "ms":
        return None, number
    return (number / 100 if match[2] == "%" else number), None


def _sampler(text: str | None) -> SamplerName | None:
    from compression.search import SAMPLERS, SearchError

    for name in SAMPLERS:
        if text == name:
            return name
    if text is not None:
        raise SearchError(f"--sampler {text}: give one of {', '.join(SAMPLERS)}")
    return None


def _limits(
    workload: Workload, drop: float | None, latency: str | None, size: str | None, macs: int | None
) -> Limits:
    from compression.gate import LIMITS
    from compression.search import Limits, SearchError
    from compression.target import parse_size

    if drop is not None and drop < 0:
        raise SearchError(f"--max-drop {drop:g}: give points of quality, 0 or more")
    ratio, ms = (None, None) if latency is None else parse_latency(latency)
    return Limits(
        max_drop=LIMITS[workload.profile] if drop is None else drop / 100,
        max_latency_ratio=ratio,
        max_latency_ms=ms,
        max_size_bytes=None if size is None else parse_size(size),
        max_macs=macs,
    )


def _home() -> Path:
    return Path(os.environ.get("TRIMTAB_HOME", ".trimtab"))


# --- what is seen -------------------------------------------------------------------------------------------------


class _Watch:
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
        figures = trial.figures.model_dump(mode="json") | {"latency_ratio": trial.figures.latency_ratio}
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


def _print(console: Console, result: Result, folder: Path) -> None:
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
        console.print("nothing is within the limits yet: run the same command again, or give wider limits")
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

    from compression.search import describe_steps

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


def _make(
    workload: Workload, result: Result, save: int, console: Console
) -> tuple[list[Variant], dict[str, str]]:
    """The variants of those that suit a scenario, measured on the test split and judged."""
    from compression.cache import StepCache
    from compression.compress import compress
    from compression.recipe import Recipe

    names = [
        name
        for choice in result.choices
        for name in (choice.winner, choice.runner_up)[:save]
        if name is not None
    ]
    recipes = [result.named(name).recipe for name in dict.fromkeys(names)]
    wanted = [recipe for recipe in recipes if recipe is not None]
    if not wanted:
        return [], {}
    failures: dict[str, str] = {}

    def failed(recipe: Recipe, error: CompressionError) -> None:
        failures[recipe.name] = str(error)

    with console.status("making variants") as status:
        variants = compress(
            workload,
            wanted,
            progress=lambda what, done: status.update(f"{what} {done:.0%}" if done else what),
            failed=failed,
            cache=StepCache.open(_home()),
        )
    return variants[1:], failures


def _print_variants(
    console: Console, workload: Workload, variants: list[Variant], failed: dict[str, str]
) -> None:
    from compression.tables import print_variants

    if variants:
        print_variants(console, workload, variants)
    for name, why in failed.items():
        console.print(f"[red]✗[/red] {name}: failed: {why}", soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _console(stderr: bool = False) -> Console:
    from compression.cli import _console as console

    return console(stderr)
