"""The offline commands: init, compress, variants, show, pareto, cost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compression import terminal
from compression.errors import CompressionError, VariantNotFound, WorkloadError
from compression.recipes_cli import recipes_app
from compression.search import cli as search_cli
from compression.workload import NAME_PATTERN, Workload, load_workload

if TYPE_CHECKING:
    from rich.console import Console

    from compression.compress import Effort
    from compression.recipe import Recipe
    from compression.variant import Variant

INTERRUPTED = "interrupted; run the same command again to go on from the last finished step"
TEMPLATES = Path(__file__).parent / "templates"

WorkloadRef = Annotated[
    str, typer.Argument(metavar="WORKLOAD", help="A workload folder, or module:attribute.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


def register(app: typer.Typer) -> None:
    """Add the offline commands to the `trimtab` application."""
    app.command("init")(init)
    app.add_typer(recipes_app, name="recipes")
    app.command("compress")(compress_command)
    app.command("variants")(variants_command)
    app.command("show")(show)
    app.command("pareto")(pareto)
    app.command("cost")(cost)
    from compression.analysis.cli import analyze_command

    app.command("analyze")(analyze_command)
    search_cli.register(app)


def init(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to make; its name names the workload.")
    ],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="For a model that is an ONNX file, without torch.")
    ] = False,
) -> None:
    """Scaffold a workload that runs unchanged; then put your data and model in."""
    target = directory.expanduser()
    name = target.resolve().name
    if not re.fullmatch(NAME_PATTERN, name):
        raise WorkloadError(
            f"{name!r} cannot name a workload: use a letter, then letters, digits and hyphens, all lower case"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WorkloadError(f"{target} already exists and is not empty: choose another folder")
    shutil.copytree(
        TEMPLATES / ("onnx" if onnx else "torch"),
        target,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for path in (target / "workload.yaml", target / "README.md"):
        path.write_text(path.read_text(encoding="utf-8").replace("__NAME__", name), encoding="utf-8")
    typer.echo(f"{target} is ready:")
    for path in sorted(target.iterdir()):
        typer.echo(f"  {path.name}")
    typer.echo(f"try it as it is:  trimtab compress {directory}")


def compress_command(
    workload: WorkloadRef,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "-r",
            "--recipe",
            help="A recipe's name or .yaml file; repeatable. Default: all that can work and are not on request.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train full precision and make every variant anew.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither use nor keep what single steps make.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make variants of a workload: train, compress, measure, judge, save.

    What is finished is kept: the same command, run again, does what is missing or has changed.
    """
    try:
        _compress(workload, recipe or [], force, no_cache, as_json)
    except KeyboardInterrupt:
        typer.echo(f"trimtab: {INTERRUPTED}", err=True)
        raise typer.Exit(130) from None


def _compress(workload: str, refs: Sequence[str], force: bool, no_cache: bool, as_json: bool) -> None:
    from compression.cache import StepCache
    from compression.compress import compress, default_recipes
    from compression.recipe import find_recipe

    loaded = load_workload(workload)
    asked = [find_recipe(ref, loaded.directory) for ref in refs]
    recipes = asked or default_recipes(loaded)
    console = terminal.console(stderr=as_json)
    failures: dict[str, str] = {}
    efforts: dict[str, dict[str, object]] = {}
    cache = None if no_cache else StepCache.open()
    if cache and cache.problem:
        console.print(f"warning: no step cache: {cache.problem}", markup=False, soft_wrap=True)

    def made(variant: Variant, seconds: float, effort: Effort) -> None:
        efforts[variant.tag] = {"seconds": seconds} | asdict(effort)
        console.print(_one_line(variant, seconds, effort), soft_wrap=True)
        for warning in variant.manifest.warnings:
            console.print(f"  warning: {warning}", soft_wrap=True)

    def failed(which: Recipe, error: CompressionError) -> None:
        failures[which.name] = str(error)
        console.print(f"[red]✗[/red] {which.name}: failed: {error}", soft_wrap=True)

    with console.status("loading data") as status:
        variants = compress(
            loaded,
            recipes,
            force=force,
            progress=lambda what, done: status.update(f"{what} {done:.0%}" if done else what),
            made=made,
            failed=failed,
            cache=cache,
        )
    if as_json:
        found = [as_dict(variant) | {"effort": efforts[variant.tag]} for variant in variants]
        typer.echo(json.dumps({"variants": found, "failed": failures}, indent=2))
    else:
        _print_table(console, loaded, variants)
    if failures:
        raise typer.Exit(1)


def variants_command(workload: WorkloadRef, as_json: Json = False) -> None:
    """List the newest variant of each name."""
    loaded, found = _stored(workload)
    if as_json:
        typer.echo(json.dumps([as_dict(variant) for variant in found], indent=2))
    else:
        _print_table(terminal.console(), loaded, found)


def show(
    workload: WorkloadRef,
    variant: Annotated[
        str | None, typer.Argument(help="A variant's name, or name:version. Default: full.")
    ] = None,
    as_json: Json = False,
) -> None:
    """One variant's scorecard, group by group, with its verdict and origin."""
    from compression.tables import print_scorecard
    from compression.variant import FULL, load_variant, tag_name

    loaded = load_workload(workload)
    chosen = load_variant(tag_name(loaded.name, variant or FULL))
    if as_json:
        typer.echo(
            json.dumps(as_dict(chosen) | {"manifest": chosen.manifest.model_dump(mode="json")}, indent=2)
        )
    else:
        print_scorecard(terminal.console(), chosen)


def pareto(
    workload: WorkloadRef,
    out: Annotated[Path | None, typer.Option(help="Where to write the picture.")] = None,
    as_json: Json = False,
) -> None:
    """The frontier of quality, latency and size: a table and a picture."""
    from compression.pareto import best, picture, points

    loaded, found = _stored(workload)
    measured = points(found)
    winners = best(measured)
    target = out or terminal.home() / loaded.name / "pareto.png"
    picture(f"{loaded.name}: what compression costs and buys", measured, loaded.profile, target)
    if as_json:
        report = {
            "frontier": winners,
            "points": [point._asdict() for point in measured],
            "picture": str(target),
        }
        typer.echo(json.dumps(report, indent=2))
        return
    _print_table(terminal.console(), loaded, [variant for variant in found if variant.name in winners])
    typer.echo(f"{len(winners)} of {len(measured)} variants are on the frontier; picture: {target}")


def cost(
    workload: WorkloadRef,
    requests_per_day: Annotated[float, typer.Option(help="Requests of one record, on average.")],
    price_per_hour: Annotated[float, typer.Option(help="Price of a machine-hour, in any currency.")],
    cores: Annotated[int, typer.Option(help="Cores of that machine.")] = 1,
    watts_per_core: Annotated[float, typer.Option(help="Power of a busy core.")] = 10.0,
    mirror_rate: Annotated[
        float, typer.Option(help="Share of requests that the shadow answers with full precision too.")
    ] = 0.0,
    utilization: Annotated[
        float, typer.Option(help="Share of the paid core time in which a model runs.")
    ] = 0.6,
    as_json: Json = False,
) -> None:
    """What each variant's model time costs in CPU, energy and money, and what that saves a year."""
    from compression.cost import Prices, costs, deployments, full_ms
    from compression.tables import print_costs
    from compression.variant import FULL

    prices = Prices(requests_per_day, price_per_hour, cores, watts_per_core, mirror_rate, utilization)
    loaded, stored = _stored(workload)
    full = next((variant.tag for variant in stored if variant.name == FULL), None)
    judged, left_out = [], []
    for variant in stored:
        card, verdict = variant.scorecard(), variant.gate()
        if card is None or verdict is None or variant.manifest.parent not in (None, full):
            left_out.append(variant.name)
        else:
            judged.append((card, verdict))
    if not any(card.variant == FULL for card, _ in judged):
        raise VariantNotFound(
            f"{loaded.name} has no measured full precision: run `trimtab compress {workload}`"
        )
    reference = full_ms([card for card, _ in judged])
    found = costs(deployments(FULL, judged), reference, prices)
    if as_json:
        report = {
            "prices": vars(prices),
            "full_p50_ms": reference,
            "costs": [entry.as_dict() for entry in found],
            "left_out": left_out,
        }
        typer.echo(json.dumps(report, indent=2))
        return
    print_costs(terminal.console(), loaded, found, prices, reference)
    if left_out:
        names = ", ".join(left_out)
        typer.echo(f"left out, not made from the present full precision or not measured: {names}")


def as_dict(variant: Variant) -> dict[str, object]:
    """The headline figures of a variant and its whole scorecard, ready for JSON."""
    card, verdict = variant.scorecard(), variant.gate()
    if card is None or verdict is None:
        return {"name": variant.name, "tag": variant.tag}
    latency = card.latency_at(1)
    return {
        "name": variant.name,
        "tag": variant.tag,
        "recipe": variant.manifest.recipe,
        "size_bytes": card.size_bytes,
        "size_ratio": card.size_ratio,
        "quality": card.quality.value,
        "quality_drop": card.drop.value,
        "latency_p50_ms": latency.p50_ms,
        "latency_ratio": latency.speedup,
        "accepted": verdict.accepted,
        "reasons": verdict.reasons,
        "warnings": list(variant.manifest.warnings),
        "scorecard": card.model_dump(mode="json"),
    }


def _stored(workload: str) -> tuple[Workload, list[Variant]]:
    from compression.variant import list_variants

    loaded = load_workload(workload)
    found = list_variants(loaded.name)
    if not found:
        raise VariantNotFound(f"{loaded.name} has no variants yet: run `trimtab compress {workload}`")
    return loaded, found


def _print_table(console: Console, workload: Workload, variants: Sequence[Variant]) -> None:
    from compression.tables import print_variants

    print_variants(console, workload, variants)


def _took(seconds: float, effort: Effort) -> str:
    if effort.kept:
        return "unchanged, kept"
    spared = ""
    if effort.cached:
        spared = f", {effort.cached} of {effort.steps} step{'s' * (effort.steps > 1)} from the cache"
    return f"{seconds:.1f} s{spared}"


def _one_line(variant: Variant, seconds: float, effort: Effort) -> str:
    card, verdict = variant.scorecard(), variant.gate()
    if card is None or verdict is None:
        return variant.name
    figures = f"{card.metric.replace('_', ' ')} {100 * card.quality.value:.1f}%"
    if card.size_bytes != card.full_size_bytes or variant.manifest.parent:
        figures += f", drop {100 * card.drop.value:z.1f} pt, {card.size_ratio:.1f}x smaller"
    mark = "[green]✓[/green]" if verdict.accepted else "[red]✗[/red]"
    refused = "" if verdict.accepted else f": refused, {verdict.reasons[0]}"
    return f"{mark} {variant.name} ({_took(seconds, effort)}): {figures}{refused}"
