"""`trimtab recipes`: the recipes there are, and their JSON schema for editors."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compression import terminal
from compression.errors import CompressionError
from compression.workload import load_workload

recipes_app = typer.Typer(
    help="The recipes there are, and their JSON schema.", no_args_is_help=True, rich_markup_mode=None
)


@recipes_app.command("list")
def list_recipes(
    workload: Annotated[
        str | None,
        typer.Argument(metavar="[WORKLOAD]", help="With its own recipes, and which can work on it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """What each recipe is for; with a workload, its own too, and why one cannot work on it."""
    from rich.table import Table

    from compression.planner import plan
    from compression.recipe import library, recipes_in

    loaded = None if workload is None else load_workload(workload)
    known = {recipe.name: recipe for recipe in library()}
    if loaded is not None:
        known |= {recipe.name: recipe for recipe in recipes_in(loaded.directory / "recipes")}
    rows = []
    for recipe in known.values():
        problem = None
        if loaded is not None:
            try:
                plan(recipe, loaded)
            except CompressionError as error:
                problem = str(error)
        steps = [spec.step for spec in recipe.steps]
        rows.append(
            {
                "name": recipe.name,
                "about": recipe.about,
                "steps": steps,
                "on_request": recipe.on_request,
                "problem": problem,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for title in (
        "recipe",
        "run",
        "steps",
        "about" if loaded is None else "about, or why it cannot work here",
    ):
        table.add_column(title, no_wrap=title == "recipe")
    for row in rows:
        run = "-" if row["problem"] else "on request" if row["on_request"] else "always"
        table.add_row(str(row["name"]), run, ", ".join(row["steps"]), str(row["problem"] or row["about"]))  # type: ignore[arg-type]
    terminal.console().print(table)


@recipes_app.command("schema")
def schema() -> None:
    """The JSON schema of a recipe, for editors that check YAML as it is typed."""
    from compression.recipe_schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))
