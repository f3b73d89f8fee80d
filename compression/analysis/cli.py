"""`trimtab analyze`: measure, draw, and say in three sentences how far a workload can be compressed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compression import terminal
from compression.cli import Json, WorkloadRef
from compression.workload import Workload, load_workload

if TYPE_CHECKING:
    from rich.console import Console

    from compression.analysis.page import Variants
    from compression.analysis.types import Analysis, Curve, LayerReport

_WIDE, _WIDEST = 110, 136
"""Columns of terminal that all of the table of curves needs, and of that of layers."""


def analyze_command(
    workload: WorkloadRef,
    epochs: Annotated[
        int,
        typer.Option(
            min=0, max=1000, help="Also measure after so many epochs of training; 0: one-shot only."
        ),
    ] = 0,
    technique: Annotated[
        list[str] | None,
        typer.Option(
            "-t",
            "--technique",
            help="magnitude, threshold, structured, low_rank, clusters, 2:4, int8_static, int8_dynamic or "
            "int4_weights; repeatable. Default: all that can work.",
        ),
    ] = None,
    layers: Annotated[bool, typer.Option(help="Measure layer by layer too.")] = True,
    levels: Annotated[bool, typer.Option("--levels", help="Print every level of every curve.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure anew what an earlier run has measured.")
    ] = False,
    as_json: Json = False,
) -> None:
    """How far a workload can be compressed: curves of quality over size, their knees, and the critical layers."""
    from compression.analysis.findings import findings
    from compression.analysis.kept import folder
    from compression.analysis.measure import analyze

    loaded = load_workload(workload)
    home = terminal.home()
    target = folder(home, loaded.name)
    console = terminal.console(stderr=as_json)
    analysis: Analysis | None = None
    try:
        with console.status("loading data") as status:
            analysis = analyze(
                loaded,
                home,
                epochs=epochs,
                techniques=technique or None,
                layers=layers,
                fresh=fresh,
                progress=lambda what, done: status.update(f"{what} {done:.0%}"),
                finished=lambda part: console.print(_one_line(part), soft_wrap=True),
            )
            status.update("drawing")
            variants, old = _variants(loaded, analysis)
            files = _write(loaded, analysis, variants, target)
    except KeyboardInterrupt:
        drawn = "" if analysis is None else " while drawing"
        typer.echo(f"interrupted{drawn}: what was measured is kept, run the same command to go on", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo((target / "analysis.json").read_text(encoding="utf-8"))
        return
    _print_curves(console, analysis, every=levels)
    if analysis.layers:
        _print_layers(console, analysis)
    _print_frontier(console, variants, old)
    for note in analysis.notes:
        console.print(f"left out: {note}", soft_wrap=True, markup=False)
    console.print()
    for sentence in findings(analysis):
        console.print(sentence, soft_wrap=True, markup=False)
    console.print(
        f"\nmeasured on the {analysis.rows:,} rows of the validation split in {analysis.seconds:.0f} s"
    )
    console.print(f"page: {files['page']}", soft_wrap=True, markup=False)


def _variants(workload: Workload, analysis: Analysis) -> tuple[Variants, list[str]]:
    """The measured variants of the present full precision, and the names of those of an older one."""
    from compression.analysis.page import Variants
    from compression.pareto import best, points
    from compression.variant import list_variants

    stored = list_variants(workload.name)
    present = [variant for variant in stored if variant.manifest.parent in (None, analysis.full_tag)]
    found = points(present)
    old = [variant.name for variant in stored if variant not in present]
    return Variants(tuple(found), tuple(best(found))), old


def _write(workload: Workload, analysis: Analysis, variants: Variants, target: Path) -> dict[str, str]:
    """Write pictures, page and JSON; paths by what they are."""
    from compression.analysis import charts
    from compression.analysis.findings import findings
    from compression.analysis.page import Pictures, page
    from compression.files import write_atomically

    keys = dict.fromkeys(curve.key for curve in analysis.curves)
    panels = [(key, png) for key in keys if (png := charts.panel(analysis, key))]
    pictures = Pictures(
        overview=charts.overview(analysis),
        panels=tuple(panels),
        sensitivity=charts.sensitivity(analysis),
        pareto=_pareto_picture(workload, variants),
    )
    parts: dict[str, tuple[str, bytes | None]] = {
        "curves": ("curves.png", charts.all_curves(analysis)),
        "sensitivity": ("sensitivity.png", pictures.sensitivity),
        "pareto": ("pareto.png", pictures.pareto),
        "page": ("analysis.html", page(analysis, pictures, variants).encode()),
    }
    files: dict[str, str] = {}
    for what, (name, content) in parts.items():
        if content is None:
            (target / name).unlink(missing_ok=True)  # of an earlier run, which this one does not bear out
        else:
            write_atomically(target / name, content)
            files[what] = str(target / name)
    report = {
        "findings": findings(analysis),
        "analysis": analysis.model_dump(mode="json"),
        "pareto": {
            "split": "test",
            "frontier": variants.frontier,
            "points": [point._asdict() for point in variants.points],
        },
        "files": files,
    }
    write_atomically(target / "analysis.json", json.dumps(report, indent=1).encode())
    return files


def _pareto_picture(workload: Workload, variants: Variants) -> bytes | None:
    import tempfile

    from compression.pareto import picture

    if len(variants.points) < 2:
        return None
    with tempfile.TemporaryDirectory(prefix="trimtab-") as scratch:
        path = Path(scratch) / "pareto.png"
        picture(f"{workload.name}: what compression costs and buys", variants.points, workload.profile, path)
        return path.read_bytes()


def _one_line(part: Curve | LayerReport) -> str:
    from rich.markup import escape

    from compression.analysis.types import Curve

    if not isinstance(part, Curve):
        return f"[green]✓[/green] layer {escape(part.layer)}: {len(part.effects)} treatments"
    measured = [level.measured for level in part.levels if level.measured]
    name = part.title + (f", {part.epochs} epochs of recovery" if part.epochs else "")
    failed = [level for level in part.levels if level.failed]
    if not measured:
        return f"[red]✗[/red] {name}: {escape(str(failed[0].failed))}"
    seconds = sum(found.seconds for found in measured)
    count = f"{len(measured)} levels, " if len(part.levels) > 1 else ""
    missing = f"; {len(failed)} failed: {failed[0].label}: {failed[0].failed}" if failed else ""
    return f"[green]✓[/green] {name} ({count}{seconds:.1f} s){escape(missing)}"


def _print_curves(console: Console, analysis: Analysis, *, every: bool) -> None:
    """Each technique's knee and how far it is free; or, if asked for, all of its levels."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from compression.analysis.marks import points

    wide = console.width >= _WIDE
    metric = analysis.metric.replace("_", " ")
    table = Table(
        title=f"{analysis.workload}: {metric} {100 * analysis.full.quality.value:.2f}% on the validation split, "
        f"{analysis.full.file_bytes / 1000:,.0f} kB, and what compression takes away",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=wide,
        padding=(0, 1) if wide else (0, 1, 0, 0),
    )
    table.add_column("technique", no_wrap=wide)
    for column in ("level", "lost pt (95%)", "size %", *(("file kB", "coded kB") if wide else ())):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for curve in analysis.curves:
        name = curve.title + (f" + {curve.epochs} epochs" if curve.epochs else "")
        for place, level in enumerate(curve.levels):
            if level.measured is None:
                continue
            marks = []
            if place == curve.free:
                marks.append("free")
            if place == curve.knee:
                marks.append("knee")
            if not (every or marks or curve.is_point):
                continue
            found = level.measured
            table.add_row(
                escape(name),
                "" if curve.is_point else level.label,
                points(found.drop).replace(" pt", ""),
                f"{100 * analysis.share(curve, found):.1f}",
                *((f"{found.file_bytes / 1000:,.0f}", f"{found.coded_bytes / 1000:,.0f}") if wide else ()),
                ", ".join(marks),
            )
            name = ""
        if every and not curve.is_point:
            table.add_section()
    console.print(table)
    console.print(
        "free: the last level up to which no interval excludes 0; knee: where the curve bends (Kneedle). Size: of the "
        "file that is kept, % of full precision's; pruning without removal, 2:4 and clustering count as entropy coded.",
        soft_wrap=True,
        markup=False,
    )


def _print_layers(console: Console, analysis: Analysis) -> None:
    """The layers, the most sensitive first where there are many."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from compression.analysis.marks import severity

    wide = console.width >= _WIDEST
    table = Table(
        title="layer by layer: points lost when it alone is treated"
        + (" (95%), and how far the outputs move" if wide else ""),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=wide,
        padding=(0, 1) if wide else (0, 1, 0, 0),
    )
    table.add_column("layer", overflow="fold")
    if wide:
        table.add_column("weights", justify="right", no_wrap=True)
    for treatment in analysis.treatments:
        table.add_column(treatment.title, justify="right", no_wrap=wide)
    table.add_column("critical", no_wrap=True)
    most = 20
    shown: Sequence[LayerReport] = analysis.layers
    if len(shown) > most:
        shown = sorted(shown, key=severity, reverse=True)[:most]
    for report in shown:
        cells = []
        for treatment in analysis.treatments:
            effect = report.effects.get(treatment.key)
            if effect is None:
                cells.append("-")
            elif wide:
                low, high = (f"{100 * end:z.1f}" for end in (effect.drop.low, effect.drop.high))
                cells.append(f"{100 * effect.drop.value:z.1f} ({low} to {high}) {100 * effect.change:.0f}%")
            else:
                cells.append(f"{100 * effect.drop.value:z.2f}")
        table.add_row(
            escape(report.layer),
            *([f"{report.weights:,}"] if wide else []),
            *cells,
            "[red]yes[/red]" if report.critical else "",
        )
    console.print(table)
    if len(shown) < len(analysis.layers):
        console.print(f"the {most} most sensitive of {len(analysis.layers)} layers; the page has all")


def _print_frontier(console: Console, variants: Variants, old: Sequence[str]) -> None:
    if len(variants.points) > 1:
        names: Any = ", ".join(variants.frontier) or "none"
        console.print(
            f"of {len(variants.points)} variants, measured on the test split, these are on the frontier: {names}",
            soft_wrap=True,
            markup=False,
        )
    if old:
        console.print(
            f"left out, made from another full precision: {', '.join(old)}", soft_wrap=True, markup=False
        )
