"""Scorecards for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from compression.cascade import MAX_DROPS
from compression.cost import Cost, Prices
from compression.scorecard import Estimate, Scorecard
from compression.variant import FULL, Variant
from compression.workload import Workload

_SCORECARD_WIDE = 110
_WIDE = 136
"""Columns of terminal that all of a table needs; narrower ones get its most telling part."""


def print_variants(console: Console, workload: Workload, variants: Sequence[Variant]) -> None:
    """One line per variant, and below the table why the gate refused what it refused."""
    wide = console.width >= _WIDE
    table = Table(
        title=f"{workload.name}: {_words(workload.metric)} on the test split",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1) if wide else (0, 1, 0, 0),
        show_edge=wide,
    )
    table.add_column("variant", no_wrap=True)
    for column in _WIDE_COLUMNS if wide else _NARROW_COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("gate", no_wrap=True, min_width=8)
    full_tag = next((variant.tag for variant in variants if variant.name == FULL), None)
    refused = []
    for variant in variants:
        card, verdict = variant.scorecard(), variant.gate()
        if card is None or verdict is None:
            continue
        # Made from a full-precision model that has been replaced: its drops are from another reference.
        outdated = (
            " [yellow](old full)[/yellow]"
            if full_tag and variant.manifest.parent not in (None, full_tag)
            else ""
        )
        table.add_row(
            variant.name,
            *(_wide_cells if wide else _narrow_cells)(card, full=variant.name == FULL),
            ("[green]accepted[/green]" if verdict.accepted else "[red]refused[/red]")
            + (outdated if wide else ""),
        )
        if not verdict.accepted:
            refused.append((variant.name, verdict.reasons))
    console.print(table)
    console.print("(x): times smaller or faster than full precision; median, 1 thread, in turns with it")
    for name, reasons in refused:
        more = f" (and {len(reasons) - 1} more reasons)" if len(reasons) > 1 else ""
        console.print(f"[red]refused[/red] {name}: {reasons[0]}{more}", soft_wrap=True)


_WIDE_COLUMNS = (
    *("quality %", "drop pt (95%)", "worst group", "agree %"),
    *("size kB", "1 row ms", "32 rows ms"),
)
_NARROW_COLUMNS = ("quality", "drop pt", "worst group", "size", "1 row")


def _wide_cells(card: Scorecard, *, full: bool) -> list[str]:
    return [
        f"{100 * card.quality.value:.1f}",
        "" if full else _drop(card.drop),
        "" if full else _worst(card),
        "" if full else f"{100 * card.agreement:.1f}",
        f"{card.size_bytes / 1000:,.0f}" + ("" if full else f" ({card.size_ratio:.1f}x)"),
        _time(card, 1, full),
        _time(card, 32, full),
    ]


def _narrow_cells(card: Scorecard, *, full: bool) -> list[str]:
    quality = f"{100 * card.quality.value:.1f}"
    if full:
        return [quality, "", "", "", ""]
    latency = card.latency_at(1)
    return [
        quality,
        _points(card.drop.value),
        _worst(card),
        f"{card.size_ratio:.1f}x",
        f"{latency.speedup:.1f}x",
    ]


def print_scorecard(console: Console, variant: Variant) -> None:
    """Everything a scorecard has, class by class and group by group."""
    card, verdict = variant.scorecard(), variant.gate()
    manifest = variant.manifest
    console.print(f"[bold]{variant.tag}[/bold]  {variant.path}", soft_wrap=True)
    steps = manifest.recipe.get("steps")
    if isinstance(steps, list) and steps:
        for step in steps:
            given = ", ".join(f"{key}={value}" for key, value in step["params"].items())
            console.print(f"  {step['step']}({given})", soft_wrap=True)
    if card is None or verdict is None:
        console.print("no scorecard")
        return
    console.print(
        f"{_words(card.metric)} {_share(card.quality)} on {card.rows:,} rows; drop {_drop(card.drop)} pt; "
        f"agrees with full precision on {100 * card.agreement:.1f}%",
        soft_wrap=True,
    )
    console.print(
        f"{card.size_bytes / 1000:,.1f} kB ({card.size_ratio:.1f}x smaller), {card.parameters:,} parameters "
        f"({card.nonzero_parameters:,} not zero), {card.macs:,} multiply-accumulates a row; "
        f"{100 * card.batch_sensitivity:.2f}% of answers depend on their batch",
        soft_wrap=True,
    )
    for entry in card.latency:
        console.print(
            f"batch {entry.batch}: p50 {entry.p50_ms:.3f} ms, p95 {entry.p95_ms:.3f}, p99 {entry.p99_ms:.3f} "
            f"({entry.speedup:.2f} times the speed of full precision) on {card.cpu}",
            soft_wrap=True,
        )
    wide = console.width >= _SCORECARD_WIDE
    share = _share if wide else _value
    table = Table(
        title="by class and group",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=wide,
        padding=(0, 1) if wide else (0, 1, 0, 0),
    )
    wide_columns = ("", "rows", "quality %", "drop pt (95%)", "agree %", "positive %", "full's")
    for column in wide_columns if wide else ("", "rows", "quality", "drop pt (95%)", "pos. %", "full's"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, score in card.classes.items():
        table.add_row(f"recall of {name}", f"{score.rows:,}", share(score.recall), _drop(score.drop))
    for name, group in card.groups.items():
        table.add_row(
            name,
            f"{group.rows:,}",
            share(group.quality),
            _drop(group.drop),
            *([f"{100 * group.agreement:.1f}"] if wide else []),
            f"{100 * group.selection_rate:.1f}",
            f"{100 * group.full_selection_rate:.1f}",
        )
    console.print(table)
    if variant.name != FULL:
        _print_cascade(console, card)
    verdict_words = "[green]accepted[/green]" if verdict.accepted else "[red]refused[/red]"
    console.print(f"gate ({verdict.profile}): {verdict_words}")
    for reason in (*verdict.reasons, *(f"warning: {warning}" for warning in manifest.warnings)):
        console.print(f"  {reason}", soft_wrap=True)


def _print_cascade(console: Console, card: Scorecard) -> None:
    """What each proven threshold of the cascade costs and loses on the test split."""
    if not card.cascade:
        console.print(
            "cascade: no threshold proven, or compressed before cascades were measured", soft_wrap=True
        )
        return
    wide = console.width >= _SCORECARD_WIDE
    table = Table(
        title="cascade: full precision answers where it is not sure",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=wide,
        padding=(0, 1) if wide else (0, 1, 0, 0),
    )
    wide_columns = (
        "loses at most pt",
        "confidence from",
        "escalated %",
        "drop pt (95%)",
        "worst group",
        "time %",
    )
    for column in wide_columns if wide else ("max pt", "from", "escal. %", "drop pt (95%)", "time %"):
        table.add_column(column, justify="right", no_wrap=True)
    points = {point.max_drop: point for point in card.cascade}
    for max_drop in sorted({*MAX_DROPS, *points}):
        point = points.get(max_drop)
        if point is None:
            table.add_row(f"{100 * max_drop:g}", "none")
            continue
        worst = point.worst_group_drop
        table.add_row(
            f"{100 * max_drop:g}",
            f"{point.threshold:.6g}",
            (_share if wide else _value)(point.escalated),
            _drop(point.drop, 2),
            *([f"{point.worst_group} {_points(worst.value, 2)}" if worst else ""] if wide else []),
            f"{100 * point.cost_ratio:.0f}",
        )
    console.print(table)


def print_costs(
    console: Console, workload: Workload, found: Sequence[Cost], prices: Prices, full_ms: float
) -> None:
    """What each variant costs and saves.

    Of cascades that share a threshold the one that proves most is shown, and none that keeps every answer, which
    is the variant alone.
    """
    wide = console.width >= _WIDE
    table = Table(
        title=f"{workload.name}: model time of {prices.requests_per_day:,.0f} requests a day",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1) if wide else (0, 1, 0, 0),
        show_edge=wide,
    )
    table.add_column("variant", no_wrap=True)
    wide_columns = (
        *("CPU s\n/ 1,000", "kWh\n/ 1,000", "cost\n/ 1,000", "cost\na year", "saved\na year"),
        *("drop pt (95%)", "even at\nmirror"),
    )
    for column in wide_columns if wide else ("saved a year", "drop pt", "even at"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    shown: set[tuple[str, float | None]] = {(cost.deployment.variant, 0.0) for cost in found}
    for cost in found:
        deployment = cost.deployment
        drop, even = deployment.drop, cost.break_even_mirror_rate
        if (deployment.variant, deployment.threshold) in shown:
            continue
        shown.add((deployment.variant, deployment.threshold))
        even_words = "" if even is None else f"{even:.2f}" if even else "never"
        saved = "" if drop is None else f"{cost.saving_per_year:,.2f}"
        figures = [f"{cost.cpu_s_per_1000:.3g}", f"{cost.kwh_per_1000:.2e}", f"{cost.cost_per_1000:.2e}"]
        table.add_row(
            deployment.name,
            *([*figures, f"{cost.cost_per_year:,.2f}"] if wide else []),
            saved,
            "" if drop is None else _drop(drop, 2) if wide else _points(drop.value, 2),
            even_words,
            "[green]accepted[/green]" if deployment.accepted else "[red]refused[/red]",
        )
    console.print(table)
    console.print(
        f"Model time only: the median of one record on one thread; full precision takes {full_ms:.3f} ms, the others "
        "their share of it when timed in turns. Encoding, HTTP and monitoring are not in it.",
        soft_wrap=True,
    )
    console.print(
        f"Money: {prices.price_per_hour:g} an hour for {prices.cores} core(s) of which {prices.utilization:.0%} "
        f"work. Energy: an estimate, {prices.watts_per_core:g} W for a busy core and nothing for an idle one.",
        soft_wrap=True,
    )
    console.print(
        f"Mirrored to full precision: {prices.mirror_rate:.0%} of requests, charged to the variant; at the rate "
        "under 'even at' the mirror has eaten the saving.",
        soft_wrap=True,
    )


def _worst(card: Scorecard) -> str:
    # A group of a few rows can lose half of them by chance: rank by the loss that its interval vouches for.
    hurt = {name: group.drop for name, group in card.groups.items()}
    hurt |= {name: score.drop for name, score in card.classes.items()} if not hurt else {}
    if not hurt:
        return ""
    name = max(hurt, key=lambda key: hurt[key].low)
    return f"{name} {_points(hurt[name].value)}"


def _drop(drop: Estimate, digits: int = 1) -> str:
    low, high = _points(drop.low, digits), _points(drop.high, digits)
    return f"{_points(drop.value, digits)} ({low} to {high})"


def _points(share: float, digits: int = 1) -> str:
    return f"{100 * share:z.{digits}f}"  # z: never -0.0


def _share(share: Estimate) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _value(share: Estimate) -> str:
    return f"{100 * share.value:.1f}"


def _time(card: Scorecard, batch: int, full: bool) -> str:
    entry = card.latency_at(batch)
    return f"{entry.p50_ms:.3f}" + ("" if full else f" ({entry.speedup:.1f}x)")


def _words(metric: str) -> str:
    return metric.replace("_", " ")
