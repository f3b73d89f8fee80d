"""The three sentences that a user needs: about quantization, about the curves, and about the layers."""

from __future__ import annotations

from compression.analysis.marks import excludes_zero, points, severity
from compression.analysis.types import Analysis, Curve, Level, Measured

_QUANTIZED = ("int8_static", "int8_dynamic", "int4_weights")


def findings(analysis: Analysis) -> tuple[str, str, str]:
    """The sentences; each stands on its own, and says on what it rests."""
    return _about_quantization(analysis), _about_curves(analysis), _about_layers(analysis)


def _about_quantization(analysis: Analysis) -> str:
    measured = [
        (curve, level.measured)
        for curve in analysis.curves
        for level in curve.levels
        if curve.key in _QUANTIZED and level.measured
    ]
    if not measured:
        return "No quantization was measured."
    free = [entry for entry in measured if not excludes_zero(entry[1].drop)]
    if free:
        best = min(free, key=lambda entry: entry[1].file_bytes)
        others = [curve.title for curve, _ in free if curve.key != best[0].key]
        also = f"; {' and '.join(others)} cost{'s' if len(others) == 1 else ''} nothing measurable either"
        return (
            f"{best[0].title} costs nothing measurable on {analysis.rows:,} rows: {_words(analysis, *best)}"
            f"{also if others else ''}."
        )
    best = min(measured, key=lambda entry: entry[1].drop.value)
    if len(measured) == 1:
        return f"{best[0].title} costs something: {_words(analysis, *best)}."
    return f"Every quantization measured costs something; {best[0].title} costs least: {_words(analysis, *best)}."


def _about_curves(analysis: Analysis) -> str:
    curves = [
        curve
        for curve in analysis.curves
        if not curve.is_point and any(level.measured for level in curve.levels)
    ]
    if not curves:
        return "No technique with a curve was measured."
    parts = []
    free = [
        (curve, level, level.measured)
        for curve in curves
        if curve.free is not None and (level := curve.levels[curve.free]).measured
    ]
    # A level can be free and save nothing: factors of nearly full rank, or zeros too few to code.
    smaller = [entry for entry in free if analysis.share(entry[0], entry[2]) < 1]
    if smaller:
        curve, level, found = min(smaller, key=lambda entry: analysis.share(entry[0], entry[2]))
        parts.append(
            f"{_named(curve)} goes furthest at no measurable cost, at {_at(curve, level)}: "
            f"{_words(analysis, curve, found)}"
        )
    elif free:
        parts.append("no curve makes the file smaller at no measurable cost")
    else:
        parts.append("every curve costs something measurable from its first level on")
    knees = [curve for curve in curves if curve.knee is not None]
    # The one that also saves time is what most people ask about.
    for curve in sorted(knees, key=lambda entry: (entry.key != "structured", entry.epochs))[:1]:
        assert curve.knee is not None
        level = curve.levels[curve.knee]
        if level.measured:
            parts.append(
                f"{_named(curve)} has its knee at {_at(curve, level)}: {_words(analysis, curve, level.measured)}"
            )
    if not knees:
        parts.append("no curve has a knee within the levels measured")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _words(analysis: Analysis, curve: Curve, found: Measured) -> str:
    coded = " once the file is entropy coded" if curve.coded else ""
    return (
        f"a loss of {points(found.drop, '95% interval ')} at {analysis.share(curve, found):.0%} of full "
        f"precision's size{coded}"
    )


def _at(curve: Curve, level: Level) -> str:
    return f"{level.label} ({curve.setting})"


def _named(curve: Curve) -> str:
    return curve.title if not curve.epochs else f"{curve.title} with {curve.epochs} epochs of recovery"


def _about_layers(analysis: Analysis) -> str:
    if not analysis.layers:
        return "No layer was measured."
    critical = [report for report in analysis.layers if report.critical]
    if not critical:
        return (
            f"No layer is critical: none of the {len(analysis.layers)}, pruned or quantized alone, loses quality for "
            "certain or moves the outputs much further than the others."
        )
    worst, *others = sorted(critical, key=severity, reverse=True)
    also = ""
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        also = f"; critical too: {', '.join(report.layer for report in others[:3])}{more}"
    return f"The most critical layer is {worst.layer}: {worst.critical[0]}{also}."
