"""An analysis as one HTML page that needs nothing else: no network, no scripts, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from compression.analysis.charts import MOST_LAYERS
from compression.analysis.findings import findings
from compression.analysis.marks import STANDS_OUT, points
from compression.analysis.types import Analysis, Curve, Level
from compression.gate import LIMITS
from compression.pareto import Point

Row = tuple[Sequence[str], str]
"""Cells as plain text, and the CSS class of the row."""


@dataclass(frozen=True)
class Pictures:
    """PNGs of the page; None where there is nothing to draw.

    Attributes:
        panels: by technique.
    """

    overview: bytes | None = None
    panels: tuple[tuple[str, bytes], ...] = ()
    sensitivity: bytes | None = None
    pareto: bytes | None = None


@dataclass(frozen=True)
class Variants:
    """The variants of the workload that were measured on the test split, and which of them nothing else beats."""

    points: tuple[Point, ...] = ()
    frontier: tuple[str, ...] = ()


def page(analysis: Analysis, pictures: Pictures, variants: Variants) -> str:
    """The whole page; every name is escaped."""
    title = f"{analysis.workload}: how far it can be compressed"
    body = [
        f"<h1>{escape(title)}</h1>",
        _headline(analysis),
        *_curves(analysis, pictures),
        *_layers(analysis, pictures),
        *_frontier(variants, pictures),
        *_method(analysis),
    ]
    return _PAGE.replace("@TITLE@", escape(title)).replace("@BODY@", "\n".join(body))


def _headline(analysis: Analysis) -> str:
    when = datetime.fromtimestamp(analysis.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(analysis))
    facts = [
        ("measured on", f"the {analysis.rows:,} rows of the validation split"),
        ("metric", _metric(analysis)),
        ("full precision", f"{_quality(analysis)}, {_kb(analysis.full.file_bytes)}"),
        ("made from", analysis.full_tag),
        ("finished", when),
        ("processor", analysis.cpu),
        ("with", ", ".join(f"{name} {number}" for name, number in analysis.versions.items())),
        (
            "measurements",
            f"{analysis.measurements}"
            + (f", {analysis.reused} of them from an earlier run" if analysis.reused else "")
            + f"; this run took {analysis.seconds:,.0f} s",
        ),
    ]
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f'<ul class="findings">{sentences}</ul>\n<dl>{listed}</dl>'


def _curves(analysis: Analysis, pictures: Pictures) -> list[str]:
    if not analysis.curves:
        return []
    parts = [
        "<h2>Quality against size</h2>",
        f"<p>Each level is made from full precision on its own. {_training(analysis)} "
        "Losses are in points, with 95% intervals paired row by row with full precision; an interval that includes 0 "
        "says that the rows cannot tell the loss from none.</p>",
        _image(pictures.overview, "Quality lost against size, all techniques, one-shot", wide=True),
    ]
    single = [curve for curve in analysis.curves if curve.is_point]
    if single:
        parts.append("<h3>Techniques with one setting</h3>")
        rows = [
            ((curve.title, *_cells(analysis, curve, level)), "failed" if level.failed else "")
            for curve in single
            for level in curve.levels
        ]
        parts.append(_table("Techniques with one setting", ("technique", *_COLUMNS), rows))
    parts.append('<div class="grid">')
    images = dict(pictures.panels)
    for key in dict.fromkeys(curve.key for curve in analysis.curves if not curve.is_point):
        curves = [curve for curve in analysis.curves if curve.key == key]
        parts += ["<section>", f"<h3>{escape(_capital(curves[0].title))}</h3>"]
        parts.append(f"<p>Levels: {escape(curves[0].setting)}. {escape(_size_words(curves[0]))}</p>")
        parts.append(_image(images.get(key), f"{curves[0].title}: quality lost against size"))
        for curve in curves:
            how = f"after {curve.epochs} epochs of recovery" if curve.epochs else "one-shot"
            if len(curves) > 1:
                parts.append(f"<h4>{_capital(how)}</h4>")
            parts.append(f"<p>{escape(_marks(curve))}</p>")
            rows = [
                (
                    (_level_name(curve, place), *_cells(analysis, curve, level)),
                    "failed" if level.failed else "knee" if place == curve.knee else "",
                )
                for place, level in enumerate(curve.levels)
            ]
            parts.append(_table(f"{curve.title}, {how}", ("level", *_COLUMNS), rows))
        parts.append("</section>")
    return [*parts, "</div>"]


_COLUMNS = ("quality %", "lost, pt (95%)", "size %", "file kB", "coded kB", "outputs moved %")


def _training(analysis: Analysis) -> str:
    said = (
        "All of it is <b>one-shot</b>: no training follows, so that it shows how sensitive the model is. A recipe that "
        "trains afterwards loses less."
    )
    if not analysis.epochs:
        return said
    return (
        f"What is called <b>one-shot</b> has no training after it. The other curves had {analysis.epochs} epochs of "
        "recovery on the train split after every level."
    )


def _cells(analysis: Analysis, curve: Curve, level: Level) -> tuple[str, ...]:
    found = level.measured
    if found is None:
        return (f"failed: {level.failed}", *[""] * (len(_COLUMNS) - 1))
    return (
        f"{100 * found.quality.value:.2f}",
        points(found.drop).replace(" pt", ""),
        f"{100 * analysis.share(curve, found):.1f}",
        f"{found.file_bytes / 1000:,.0f}",
        f"{found.coded_bytes / 1000:,.0f}",
        f"{100 * found.change:.1f}" + (f" ({found.invalid:,} rows gave no numbers)" if found.invalid else ""),
    )


def _level_name(curve: Curve, place: int) -> str:
    return f"{curve.levels[place].label}{' ◆ knee' if place == curve.knee else ''}"


def _size_words(curve: Curve) -> str:
    if curve.coded:
        return (
            "Size is that of the entropy-coded file: zeros and shared weights save nothing in the plain one, which "
            "stays as large as it was."
        )
    return "Size is that of the plain ONNX file."


def _marks(curve: Curve) -> str:
    if not any(level.measured for level in curve.levels):
        return "No level could be measured."
    if curve.free is None:
        free = "Even the gentlest level measured loses something."
    elif all(level.measured is None for level in curve.levels[curve.free + 1 :]):
        free = "No level loses anything measurable."
    else:
        free = f"Nothing measurable is lost up to {curve.levels[curve.free].label}."
    bend = (
        f" The knee is at {curve.levels[curve.knee].label}."
        if curve.knee is not None
        else " There is no knee."
    )
    return free + bend


def _layers(analysis: Analysis, pictures: Pictures) -> list[str]:
    if not analysis.layers:
        return []
    tests = sum(len(report.effects) for report in analysis.layers)
    parts = [
        "<h2>Layers on their own</h2>",
        "<p>Each layer alone is pruned (its smallest weights zeroed), or quantized, and all others stay as they are. "
        f"A layer is <b>critical</b> if that costs quality for certain (the interval of the loss, widened for {tests} "
        f"tests by Bonferroni's rule, excludes 0), or if it moves the outputs at least {STANDS_OUT:g} times as far as "
        "in the median layer. Those are the ones to leave in float, or to prune least.</p>",
        _image(pictures.sensitivity, "What pruning or quantizing one layer alone costs", wide=True),
    ]
    if len(analysis.layers) > MOST_LAYERS:
        parts.append(f"<p>The picture has the {MOST_LAYERS} most sensitive layers, the table has all.</p>")
    rows: list[Row] = []
    for report in analysis.layers:
        cells = [report.layer, report.kind, f"{report.weights:,}"]
        for treatment in analysis.treatments:
            effect = report.effects.get(treatment.key)
            cells.append("-" if effect is None else points(effect.drop).replace(" pt", ""))
            cells.append("-" if effect is None else f"{100 * effect.change:.1f}")
        cells.append("yes" if report.critical else "no")
        rows.append((cells, "knee" if report.critical else ""))
    header = ["layer", "operator", "weights"]
    for treatment in analysis.treatments:
        header += [f"{treatment.title}: lost, pt (95%)", "outputs moved %"]
    parts.append(_table("Layers on their own", (*header, "critical"), rows))
    why = "".join(
        f"<li><b>{escape(report.layer)}</b>: {escape('; '.join(report.critical))}</li>"
        for report in analysis.layers
        if report.critical
    )
    return [*parts, f"<p>Critical, and why:</p><ul>{why}</ul>" if why else "<p>No layer is critical.</p>"]


def _frontier(variants: Variants, pictures: Pictures) -> list[str]:
    parts = ["<h2>Variants that were made</h2>"]
    if len(variants.points) < 2:
        return [*parts, "<p>None beside full precision yet: <code>trimtab compress</code> makes them.</p>"]
    parts += [
        "<p>Whole recipes with their training, measured on the <b>test</b> split, which nothing above has seen. On the "
        "frontier are the accepted ones that no other one beats in quality, time and size at once.</p>",
        _image(pictures.pareto, "Quality lost by each variant against size and against time", wide=True),
    ]
    rows: list[Row] = [
        (
            (
                point.name,
                f"{point.drop:z.2f} ({point.low:z.2f} to {point.high:z.2f})",
                f"{point.size_kb:,.0f}",
                f"{100 * point.time:.0f}",
                "accepted" if point.accepted else f"refused: {point.why}",
                "yes" if point.name in variants.frontier else "no",
            ),
            "knee" if point.name in variants.frontier else "",
        )
        for point in variants.points
    ]
    return [
        *parts,
        _table(
            "Variants that were made",
            ("variant", "lost, pt (95%)", "size kB", "time of one record %", "gate", "frontier"),
            rows,
        ),
    ]


def _method(analysis: Analysis) -> list[str]:
    limit = 100 * LIMITS[analysis.profile]
    said = [
        f"All but the variants is measured on the {analysis.rows:,} rows of the validation split. A setting that was "
        "chosen by looking at this page was chosen on those rows: the scorecard of a recipe, on the test "
        "split, is the proof.",
        "Size is the bytes of the file that is kept, as a share of full precision's plain ONNX file "
        f"({_kb(analysis.full.file_bytes)}). Pruning without removal, 2:4 and clustering count as entropy coded "
        "(step entropy_code), because they save nothing otherwise; both sizes are in every table. Entropy coding alone "
        f"takes full precision to {_kb(analysis.full.coded_bytes)}. A coded file takes as much memory, and as much "
        "time to answer, as the plain one.",
        "The knee is found by Kneedle (Satopaa et al. 2011): with both axes from 0 to 1, the point farthest from the "
        "line between the ends. It depends on the range that was measured, and says where the bend is, not that what "
        "is lost there is acceptable. A curve on which no loss is certain has none.",
        "Intervals are 95% for each figure alone; of forty of them that should include 0, one lies wholly above it by "
        "chance. INT8 and INT4 results hold for this kind of processor.",
        f"The gate's limit in the first picture, {limit:g} points, is that of the profile {analysis.profile}; the gate "
        "itself judges recipes on the test split, group by group.",
    ]
    parts = ["<h2>How to read this</h2>", *(f"<p>{escape(text)}</p>" for text in said)]
    if analysis.notes:
        parts.append("<h2>Left out, and why</h2>")
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in analysis.notes) + "</ul>")
    return parts


def _image(png: bytes | None, text: str, *, wide: bool = False) -> str:
    if png is None:
        return ""
    data = base64.b64encode(png).decode("ascii")
    kind = "chart wide" if wide else "chart"
    return f'<div class="scroll"><img class="{kind}" alt="{escape(text)}" src="data:image/png;base64,{data}"></div>'


def _table(title: str, header: Sequence[str], rows: Sequence[Row]) -> str:
    """A table that scrolls sideways where there is no room for it, with the keyboard too."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = []
    for cells, kind in rows:
        first, *rest = (escape(cell) for cell in cells)
        text = f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr class="{kind}">{text}</tr>' if kind else f"<tr>{text}</tr>")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _metric(analysis: Analysis) -> str:
    name = analysis.metric.replace("_", " ")
    return f"{name} of {', '.join(analysis.recall_of)}" if analysis.recall_of else name


def _quality(analysis: Analysis) -> str:
    found = analysis.full.quality
    return f"{100 * found.value:.2f}% ({100 * found.low:.2f} to {100 * found.high:.2f})"


def _kb(size: int) -> str:
    return f"{size / 1000:,.0f} kB"


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>@TITLE@</title>
<style>
:root { --ink: #22303a; --soft: #5b6b76; --line: #d9e0e4; --back: #ffffff; --mark: #e6f4ee; --edge: #1a7f5a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4eaee; --soft: #9fb0bb; --line: #35424b; --back: #14191d; --mark: #173a2d; --edge: #4fc795; }
  /* Turns white to black and keeps the hues. */
  img.chart { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.2rem 1rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { margin-top: 2.6rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.4rem 0 .3rem; font-size: 1.05rem; }
h4 { margin: 1rem 0 0; font-size: .95rem; }
p { max-width: 46rem; }
section p { margin: .3rem 0; color: var(--soft); font-size: .92rem; }
.findings { list-style: none; margin: 1rem 0; padding: .4rem 1rem; border-left: 4px solid var(--edge);
  background: var(--mark); }
.findings li { margin: .45rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .92rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2.5rem; }
.grid > section { min-width: 0; }
.scroll { overflow-x: auto; margin: .7rem 0; }
img.chart { display: block; width: 100%; max-width: 36rem; height: auto; }
img.wide { max-width: 68rem; min-width: 38rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-weight: normal; }
thead th { color: var(--soft); vertical-align: bottom; }
th:first-child { text-align: left; }
tbody th:first-child { position: sticky; left: 0; background: var(--back); }
tr.knee > * { background: var(--mark) !important; font-weight: 600; }
tr.failed > td { text-align: left; color: var(--soft); }
tr.failed > td:nth-child(2) { min-width: 16rem; white-space: normal; }
</style>
</head>
<body>
<main>
@BODY@
</main>
</body>
</html>
"""
