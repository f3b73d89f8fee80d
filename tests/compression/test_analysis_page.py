from __future__ import annotations

import functools
import re
from html.parser import HTMLParser

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from compression.analysis import charts
from compression.analysis.marks import with_marks
from compression.analysis.page import Pictures, Variants, page
from compression.analysis.techniques import TREATMENTS
from compression.analysis.types import Analysis, Curve, Effect, LayerReport, Level, Measured
from compression.pareto import Point
from compression.scorecard import Estimate

NASTY = '<script>alert("$x")</script>'


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value - 0.005, high=value + 0.005)


def measured(size: int, loss: float) -> Measured:
    return Measured(
        quality=estimate(0.9 - loss),
        drop=estimate(loss),
        change=loss,
        file_bytes=size,
        coded_bytes=size // 2,
        parameters=size // 4,
        nonzero_parameters=size // 8,
    )


def curve(key: str, sizes: list[int], losses: list[float], epochs: int = 0) -> Curve:
    levels = [
        Level(label=f"{number}0%", setting=number, steps=(), measured=measured(size, loss))
        for number, (size, loss) in enumerate(zip(sizes, losses, strict=True), 1)
    ]
    levels.append(Level(label="99%", setting=99, steps=(), failed=f"nothing is left of {NASTY}"))
    return with_marks(
        Curve(
            key=key,
            title=f"{key} pruning",
            setting="share of weights",
            coded=key == "magnitude",
            epochs=epochs,
            levels=tuple(levels),
        ),
        measured(1000, 0.0),
    )


def point(key: str) -> Curve:
    level = Level(label=key, setting=None, steps=(), measured=measured(270, 0.001))
    return with_marks(
        Curve(key=key, title=key, setting="", coded=False, epochs=0, levels=(level,)), measured(1000, 0.0)
    )


def layer(name: str, loss: float, critical: tuple[str, ...] = ()) -> LayerReport:
    effects = {
        treatment.key: Effect(quality=estimate(0.9 - loss), drop=estimate(loss), change=10 * loss)
        for treatment in TREATMENTS[:3]
    }
    return LayerReport(layer=name, kind="Gemm", weights=1234567, effects=effects, critical=critical)


def analysis(**changes: object) -> Analysis:
    steep = [0.0, 0.004, 0.01, 0.02, 0.3]
    base = Analysis(
        workload="shapes",
        metric="recall",
        recall_of=(NASTY,),
        profile="medical",
        full_tag="shapes-full:1",
        full=measured(1000, 0.0),
        rows=2000,
        cpu=f"CPU {NASTY}",
        versions={"torch": "1"},
        created_at=0.0,
        seconds=12.0,
        measurements=20,
        reused=4,
        epochs=2,
        curves=(
            curve("structured", [800, 600, 400, 300, 100], steep),
            curve("structured", [800, 600, 400, 300, 100], [0.4 * loss for loss in steep], epochs=2),
            curve("magnitude", [900, 700, 500, 200, 100], steep),
            point("int8_static"),
        ),
        treatments=TREATMENTS,
        layers=(layer(NASTY, 0.03, (f"it loses much {NASTY}",)), layer("head", 0.001)),
        notes=(f"low rank: no {NASTY}",),
    )
    return base.model_copy(update=changes)


@functools.cache
def usual() -> Pictures:
    return pictures(analysis())


def pictures(found: Analysis) -> Pictures:
    keys = dict.fromkeys(entry.key for entry in found.curves)
    return Pictures(
        overview=charts.overview(found),
        panels=tuple((key, png) for key in keys if (png := charts.panel(found, key))),
        sensitivity=charts.sensitivity(found),
        pareto=charts.overview(found),
    )


def variants() -> Variants:
    return Variants(
        (
            Point("full", 0, 0, 0, 1, 1, True),
            Point("small", 1, 0.5, 1.5, 0.3, 0.4, True),
            Point("bad", 9, 8, 10, 0.2, 0.4, False, f"side={NASTY}"),
        ),
        ("full", "small"),
    )


class Outline(HTMLParser):
    """Tags in order, what they refer to, and the tags that are open."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_escapes_names() -> None:
    found = analysis()
    text = page(found, usual(), variants())
    outline = Outline(text)
    assert not outline.open
    assert "script" not in outline.tags
    assert outline.links
    assert all(link.startswith("data:image/png;base64,") for link in outline.links)
    assert "url(" not in text
    assert "@import" not in text
    assert text.count("&lt;script&gt;") >= 5
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_tables_can_be_read_without_a_mouse_and_without_colours() -> None:
    text = page(analysis(), usual(), variants())
    assert "<th>" not in text
    assert text.count('role="region" tabindex="0" aria-label="') == text.count("<table>") == 6
    for row in re.findall(r'<tr class="knee">.*?</tr>', text):
        assert "◆ knee" in row or ">yes<" in row


def test_a_curve_that_failed_is_not_said_to_cost_something() -> None:
    failed = Level(label="10%", setting=1, steps=(), failed="cannot")
    broken = analysis().curves[0].model_copy(update={"levels": (failed,), "free": None, "knee": None})
    text = page(analysis(curves=(broken,)), Pictures(), Variants())
    assert "No level could be measured." in text
    assert "loses something" not in text


def test_rows_without_numbers_are_told() -> None:
    level = Level(
        label="x", setting=None, steps=(), measured=measured(270, 0.1).model_copy(update={"invalid": 12})
    )
    text = page(
        analysis(curves=(point("int8").model_copy(update={"levels": (level,)}),)), Pictures(), Variants()
    )
    assert "(12 rows gave no numbers)" in text


def test_a_table_stands_under_every_picture() -> None:
    found = analysis()
    tags = Outline(page(found, usual(), variants())).tags
    places = [number for number, tag in enumerate(tags) if tag in ("img", "table")]
    order = [tags[number] for number in places]
    assert order.count("img") == 5
    for number, tag in enumerate(order):
        assert tag != "img" or order[number + 1] == "table"


def test_the_page_says_what_was_measured_on_what_and_when() -> None:
    found = analysis()
    text = re.sub(r"<[^>]+>", "", page(found, usual(), variants()))
    for words in (
        "2,000 rows of the validation split",
        "1970-01-01 00:00 UTC",
        "one-shot",
        "2 epochs of recovery",
        "entropy coded",
        "4 of them from an earlier run",
        "◆ knee",
        "failed: nothing is left of",
        "measured on the test split",
        "Satopaa",
        "2 points, is that of the profile medical",
    ):
        assert words in text


def test_a_page_without_variants_layers_or_curves_is_possible() -> None:
    found = analysis(curves=(), layers=(), notes=(), epochs=0)
    assert pictures(found) == Pictures()
    text = page(found, pictures(found), Variants())
    assert "<img" not in text
    assert "trimtab compress" in text


def test_pictures_are_pngs_even_of_names_that_look_like_formulas() -> None:
    found = analysis(layers=tuple(layer(f"$\\block_{n}.{'very.' * 12}long$", 0.001 * n) for n in range(40)))
    for picture in (charts.all_curves(found), charts.sensitivity(found)):
        assert picture is not None
        assert picture.startswith(b"\x89PNG")
    assert charts.panel(found, "int8_static") is None
    drawn = charts.drawn_layers(found.layers)
    # The most sensitive ones, in the order of the graph.
    assert [report.layer for report in drawn] == [report.layer for report in found.layers[10:]]


def test_names_of_levels_overlap_neither_each_other_nor_the_points() -> None:
    crowd = curve(
        "structured", [300, 299, 297, 290, 120, 119, 40], [0.0, 0.001, 0.002, 0.003, 0.2, 0.21, 0.4]
    )
    found = analysis(curves=(crowd,))
    figure = Figure(figsize=(5.6, 4.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = charts._panel(axes, found, [crowd])
    charts._name_levels(figure, [(axes, lines)])
    figure.canvas.draw()
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    boxes = [text.get_window_extent() for text in names]
    assert len(boxes) >= 3
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        for x, y in zip(lines[0].x, lines[0].y, strict=True):
            assert not box.contains(*axes.transData.transform((x, y)))
    assert crowd.knee is not None
    bold = [text.get_text() for text in names if text.get_fontweight() == "bold"]
    assert bold == [crowd.levels[crowd.knee].label]
