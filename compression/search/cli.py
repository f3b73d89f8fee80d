"""The commands `search` and `target`: recipes that nobody had to write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compression import terminal
from compression.errors import CompressionError
from compression.search.options import (
    limits_of,
    parse_duration,
    parse_objectives,
    sampler_named,
)
from compression.search.view import Watch, print_made, print_result, report
from compression.workload import NAME_PATTERN, load_workload

if TYPE_CHECKING:
    from rich.console import Console

    from compression.search.result import Result
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
    from compression.search.evaluate import SearchError, full_precision
    from compression.search.result import save_recipes
    from compression.search.run import search
    from compression.search.space import read_space
    from compression.search.workload_space import workload_space

    objectives = parse_objectives(objective)
    kind = sampler_named(sampler)
    seconds = None if budget is None else parse_duration(budget)
    if seconds is None and trials is None:
        raise SearchError("a search needs an end: give --budget 30m, --trials 100 or both")
    name = study or "-".join(objectives)
    if not re.fullmatch(NAME_PATTERN, name):
        raise SearchError(f"--study {name}: use a letter, then letters, digits and hyphens, all lower case")
    loaded = load_workload(workload)
    limits = limits_of(loaded, max_drop, max_latency, max_size, max_macs)
    folder = terminal.home() / loaded.name / "search"
    console = terminal.console(stderr=as_json)
    with console.status("full precision") as status:
        full = full_precision(loaded, folder, lambda what, done: status.update(f"full: {what} {done:.0%}"))
        chosen = workload_space(loaded, full) if space is None else read_space(space, loaded)
        for left, why in chosen.left_out.items():
            console.print(f"left out: {left}: {why}", soft_wrap=True, markup=False)
        watch = Watch(console, status.update, objectives[0], seconds)
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
            cache=StepCache.open(terminal.home()),
            progress=watch.now,
            told=watch.finished,
        )
    written = save_recipes(result, folder / name)
    variants, failed = ([], {}) if result.interrupted else _make(loaded, result, save, console)
    if as_json:
        typer.echo(json.dumps(report(result, limits, written, variants, failed), indent=2))
    else:
        print_result(console, result, folder / name)
        print_made(console, loaded, variants, failed)
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
    from compression.search.evaluate import full_precision, selection_data
    from compression.search.result import save_recipe
    from compression.search.target import meet_size, parse_size

    limit = parse_size(size)
    loaded = load_workload(workload)
    base = find_recipe(recipe, loaded.directory)
    folder = terminal.home() / loaded.name / "targets"
    cache = StepCache.open(terminal.home())
    console = terminal.console(stderr=as_json)
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
    print_made(console, loaded, [variant], {})


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
            cache=StepCache.open(terminal.home()),
        )
    return variants[1:], failures
