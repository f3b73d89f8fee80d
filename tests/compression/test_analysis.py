from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from compression import cli
from compression.analysis import bench, measure
from compression.analysis.cli import _print_curves, _print_layers
from compression.analysis.findings import findings
from compression.analysis.graft import Graft
from compression.analysis.kept import MEASUREMENTS, folder
from compression.analysis.layers import layers_of, pruned_layer
from compression.analysis.marks import critical_because, excludes_zero, knee, with_marks
from compression.analysis.measure import analyze
from compression.analysis.techniques import TECHNIQUES, Technique
from compression.analysis.types import Analysis, Curve, Effect, Level, Measured
from compression.compress import build_model
from compression.data import Data
from compression.errors import CompressionError, RecipeError, VariantNotFound
from compression.files import write_atomically
from compression.full import make_full
from compression.scorecard import Estimate
from compression.steps import StepContext
from compression.steps.onnx_nodes import named_copy
from compression.steps.prune import PruneMagnitude, PruneStructured
from compression.variant import Variant
from compression.workload import Workload, load_workload

from .conftest import write_workload

app = typer.Typer()
cli.register(app)


def estimate(value: float, half: float = 0.005) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half)


def measured(size: int, loss: float, half: float = 0.005, coded: int | None = None) -> Measured:
    return Measured(
        quality=estimate(0.9 - loss),
        drop=estimate(loss, half),
        change=loss,
        file_bytes=size,
        coded_bytes=size if coded is None else coded,
        parameters=size // 4,
        nonzero_parameters=size // 4,
    )


def curve(*levels: Measured | None, key: str = "structured", coded: bool = False) -> Curve:
    return Curve(
        key=key,
        title=f"{key} pruning",
        setting="share",
        coded=coded,
        epochs=0,
        levels=tuple(
            Level(
                label=f"{10 * n + 10}%",
                setting=n,
                steps=(),
                measured=found,
                failed=None if found else "cannot",
            )
            for n, found in enumerate(levels)
        ),
    )


# --- the knee ---------------------------------------------------------------------------------------------


def test_the_knee_of_the_papers_own_example_is_found() -> None:
    x = np.linspace(0, 1, 10)
    found = knee(x.tolist(), (-1 / (x + 0.1) + 5).tolist())
    assert found is not None
    assert x[found] == pytest.approx(0.22, abs=0.01)


@given(st.permutations(range(8)), st.floats(0.1, 1e6), st.floats(-100, 100))
def test_the_knee_is_where_the_bend_is_in_any_order_and_unit(
    order: list[int], unit: float, shift: float
) -> None:
    sizes = [10.0, 20.0, 30.0, 40.0, 55.0, 70.0, 85.0, 100.0]
    heights = [0.2, 0.5, 0.8, 0.81, 0.82, 0.82, 0.83, 0.83]
    found = knee([unit * sizes[n] for n in order], [heights[n] * unit + shift for n in order])
    assert found is not None
    assert sizes[order[found]] == 30


@pytest.mark.parametrize(
    "qualities",
    [
        [1, 2, 3, 4, 5, 6],
        [1.0, 2.1, 2.95, 4.05, 5.0, 6.0],
        [5, 5, 5, 5, 5, 5],
        [1, 1.1, 1.2, 1.5, 3, 6],
        [6, 5, 4, 3, 2, 1],
        [1, 2, float("nan"), 4, 5, 6],
    ],
    ids=["straight", "nearly straight", "flat", "bent the other way", "falling", "no number"],
)
def test_what_has_no_bend_has_no_knee(qualities: list[float]) -> None:
    assert knee([1, 2, 3, 4, 5, 6], qualities) is None


def test_a_knee_needs_three_different_sizes() -> None:
    assert knee([], []) is None
    assert knee([1, 2], [0, 1]) is None
    assert knee([1, 1, 1, 2], [0, 0.9, 0.5, 1]) is None
    assert knee([1, 2, 2, 3, 4], [0, 0.1, 0.9, 0.95, 1]) == 2  # of one size the best counts


def test_a_sharper_bend_can_be_asked_for() -> None:
    sizes, qualities = [0, 25, 50, 75, 100], [0, 0.6, 0.8, 0.9, 1]
    assert knee(sizes, qualities, sensitivity=1) == 1
    assert knee(sizes, qualities, sensitivity=2) is None


# --- what is marked ---------------------------------------------------------------------------------------


def test_a_curve_is_marked_at_its_knee_and_where_it_stops_being_free() -> None:
    marked = with_marks(
        curve(measured(900, 0.001), measured(600, 0.004), measured(300, 0.02), measured(100, 0.3)),
        measured(1000, 0.0),
    )
    assert (marked.free, marked.knee) == (1, 2)


def test_noise_has_no_knee_and_is_free_to_its_end() -> None:
    noise = curve(*(measured(size, loss) for size, loss in ((900, -0.004), (500, 0.001), (100, 0.004))))
    assert knee([1000, 900, 500, 100], [0.9, 0.904, 0.899, 0.896]) is not None
    marked = with_marks(noise, measured(1000, 0.0))
    assert (marked.free, marked.knee) == (2, None)


def test_a_curve_that_costs_from_the_start_is_never_free() -> None:
    marked = with_marks(curve(measured(900, 0.02), measured(500, 0.003)), measured(1000, 0.0))
    assert marked.free is None


def test_levels_that_failed_are_passed_over() -> None:
    levels = curve(None, measured(600, 0.004), None, measured(300, 0.02), measured(100, 0.3))
    marked = with_marks(levels, measured(1000, 0.0))
    assert (marked.free, marked.knee) == (1, 3)
    nothing = with_marks(curve(None, None), measured(1000, 0.0))
    assert (nothing.free, nothing.knee) == (None, None)


def test_the_size_of_a_coded_curve_is_that_of_the_coded_file() -> None:
    # The plain files are all of one size, so only the coded ones can have a knee.
    levels = [measured(1000, loss, coded=size) for size, loss in ((600, 0.001), (300, 0.02), (100, 0.3))]
    reference = measured(1000, 0.0, coded=900)
    assert with_marks(curve(*levels, coded=True), reference).knee == 1
    assert with_marks(curve(*levels), reference).knee is None


def test_many_tests_ask_for_a_surer_loss() -> None:
    loss = Estimate(value=0.010, low=0.001, high=0.019)
    assert excludes_zero(loss)
    assert not excludes_zero(loss, 50)
    assert excludes_zero(Estimate(value=0.02, low=0.011, high=0.029), 50)
    assert not excludes_zero(Estimate(value=-0.02, low=-0.03, high=-0.01))


def test_a_layer_is_critical_for_its_loss_or_for_how_far_it_moves_the_outputs() -> None:
    titles = {"int8": "in INT8"}

    def why(loss: float, change: float, medians: dict[str, float]) -> tuple[str, ...]:
        effect = Effect(quality=estimate(0.9), drop=estimate(loss), change=change)
        return critical_because({"int8": effect}, medians, 4, titles)

    assert why(0.001, 0.02, {"int8": 0.01}) == ()
    assert why(0.03, 0.02, {"int8": 0.01}) == ("in INT8 it loses 3.00 pt (95% interval 2.50 to 3.50)",)
    assert why(0.001, 0.04, {"int8": 0.01}) == (
        "in INT8 it moves the outputs 4.0 times as far as the median layer",
    )
    assert why(0.001, 0.04, {}) == ()


def test_the_worst_reason_comes_first() -> None:
    def effect(loss: float, change: float) -> Effect:
        return Effect(quality=estimate(0.9), drop=estimate(loss), change=change)

    effects = {"a": effect(0.001, 0.04), "b": effect(0.03, 0.01), "c": effect(0.3, 0.05)}
    medians = {"a": 0.01, "c": 0.01}
    reasons = critical_because(effects, medians, 3, {key: f"under {key}" for key in effects})
    assert [reason.partition(" it ")[0] for reason in reasons] == ["under c", "under b", "under c", "under a"]
    assert "loses 30.00 pt" in reasons[0]


# --- layers -----------------------------------------------------------------------------------------------


def test_layers_have_the_names_of_their_weights(graph: onnx.ModelProto) -> None:
    found = {layer.name: (layer.kind, layer.weights) for layer in layers_of(named_copy(graph))}
    assert found == {
        "side": ("Gather", 6),
        "layers.0": ("Gemm", 160),
        "layers.2": ("Gemm", 1024),
        "layers.4": ("Gemm", 64),
    }


def test_nodes_that_share_weights_are_one_layer(graph: onnx.ModelProto) -> None:
    model = named_copy(graph)
    before = layers_of(model)
    twin = onnx.NodeProto()
    twin.CopyFrom(next(node for node in model.graph.node if node.name == before[-1].nodes[0]))
    twin.name = "twin"
    model.graph.node.append(twin)
    after = layers_of(model)
    assert len(after) == len(before)
    assert after[-1].nodes == (*before[-1].nodes, "twin")


def test_a_layer_pruned_in_the_graph_is_what_the_step_makes_of_it(
    graph: onnx.ModelProto, network: nn.Module, context: StepContext
) -> None:
    before = graph.SerializeToString()
    changed = pruned_layer(graph, "layers.2.weight", 0.5)
    expected = PruneMagnitude(amount=0.5, targets="layers.2.weight").apply(network, context)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in changed.graph.initializer}
    assert np.array_equal(
        arrays["layers.2.weight"], expected.get_parameter("layers.2.weight").detach().numpy()
    )
    assert (arrays["layers.0.weight"] != 0).all()
    assert graph.SerializeToString() == before


def test_outputs_that_are_no_numbers_count_as_nothing() -> None:
    output = np.array([[3.0, np.inf], [np.nan, -np.inf], [0.0, 4.0]])
    assert np.linalg.norm(bench._numbers(output)) == 5


# --- without an export ------------------------------------------------------------------------------------


def test_a_graft_is_the_file_that_the_export_would_be(
    full: Variant, graph: onnx.ModelProto, network: nn.Module, data: Data, context: StepContext
) -> None:
    graft = Graft(graph, network, data.rows("validation").take(slice(0, 16)).tensors)
    steps = [PruneMagnitude(amount=0.5)]
    content = graft.built(steps, context)
    assert content is not None
    exported = build_model(full, steps, context).onnx
    assert len(content) == pytest.approx(len(exported), abs=64)
    arrays = [
        {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in onnx.load_model_from_string(file).graph.initializer
        }
        for file in (content, exported)
    ]
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(array, arrays[1][name]) for name, array in arrays[0].items())
    assert graft.built([PruneStructured(amount=0.5)], context) is None


def test_nothing_is_grafted_where_the_graph_is_not_the_network(
    graph: onnx.ModelProto, network: nn.Module, data: Data, context: StepContext
) -> None:
    rows = data.rows("validation").take(slice(0, 16)).tensors
    steps = [PruneMagnitude(amount=0.5)]
    renamed = onnx.ModelProto()
    renamed.CopyFrom(graph)
    for tensor in renamed.graph.initializer:
        if tensor.name == "layers.2.weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))
    assert Graft(renamed, network, rows).built(steps, context) is None
    # The same weights, and other arithmetic.
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    next(node for node in other.graph.node if node.op_type == "Relu").op_type = "Tanh"
    assert Graft(other, network, rows).built(steps, context) is None


def test_files_are_readable_for_whom_the_umask_lets(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "page.html", b"1")
    write_atomically(tmp_path / "new" / "page.html", b"2")
    (tmp_path / "new" / "plain").touch()
    page, plain = tmp_path / "new" / "page.html", tmp_path / "new" / "plain"
    assert page.read_bytes() == b"2"
    assert page.stat().st_mode == plain.stat().st_mode
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.html", "plain"]


# --- the whole --------------------------------------------------------------------------------------------


def few() -> tuple[Technique, ...]:
    known = {technique.key: technique for technique in TECHNIQUES}
    return (
        replace(known["threshold"], levels=(1e-7, 1.5)),
        replace(known["structured"], levels=(0.25, 0.75)),
        known["int8_static"],
    )


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TECHNIQUES", few())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def found(tiny: Workload, full: Variant, home: Path) -> Analysis:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "TECHNIQUES", few())
        original = type(tiny).split

        def split(self: Workload, name: str) -> object:
            assert name != "test", "the test split was looked at"
            return original(self, name)  # type: ignore[arg-type]

        patch.setattr(type(tiny), "split", split)
        return analyze(tiny, home)


def test_curves_and_layers_are_measured_without_the_test_split(found: Analysis, full: Variant) -> None:
    threshold, structured, int8 = found.curves
    assert found.full.drop.value == 0
    assert found.full.file_bytes == len(full.onnx_bytes())
    assert found.rows == 600
    light, heavy = (level.measured for level in structured.levels)
    assert light is not None
    assert heavy is not None
    assert heavy.file_bytes < light.file_bytes < found.full.file_bytes
    assert heavy.drop.value > light.drop.value
    assert heavy.drop.low > 0
    zeroed = threshold.levels[1].measured
    assert zeroed is not None
    assert zeroed.nonzero_parameters < 0.5 * found.full.nonzero_parameters
    # Zeros save nothing in the plain file.
    assert zeroed.file_bytes == pytest.approx(found.full.file_bytes, rel=0.02)
    assert threshold.size(zeroed) == zeroed.coded_bytes < 0.7 * found.full.coded_bytes
    assert int8.is_point
    assert len(found.layers) == 4
    prune = {report.layer: report.effects["prune_80"] for report in found.layers}
    assert all(effect.change > 0 for effect in prune.values())
    # Tables that rows are looked up in as well.
    assert all("int8" in report.effects for report in found.layers)
    assert prune["layers.2"].change > found.layers[2].effects["prune_50"].change


def test_a_level_that_cannot_be_made_says_why_and_the_others_go_on(found: Analysis) -> None:
    broken = found.curves[0].levels[0]
    assert broken.measured is None
    assert "no weight is below" in str(broken.failed)


def test_three_sentences_say_what_was_found(found: Analysis) -> None:
    quantization, curves, layers = findings(found)
    assert quantization.startswith("INT8 static costs ")
    assert "% of full precision's size" in curves
    assert "critical" in layers
    assert all(sentence.endswith(".") for sentence in (quantization, curves, layers))
    bare = found.model_copy(update={"curves": (), "layers": ()})
    assert findings(bare) == (
        "No quantization was measured.",
        "No technique with a curve was measured.",
        "No layer was measured.",
    )


def test_sentences_say_what_is_lost_and_how_sure_that_is(found: Analysis) -> None:
    def said(*curves: Curve) -> tuple[str, str]:
        marked = tuple(with_marks(entry, measured(1000, 0.0)) for entry in curves)
        return findings(found.model_copy(update={"full": measured(1000, 0.0), "curves": marked}))[:2]

    def point(key: str, size: int, loss: float) -> Curve:
        return curve(measured(size, loss), key=key).model_copy(update={"setting": "", "title": key})

    good, bad = point("int8_static", 270, 0.002), point("int8_dynamic", 300, 0.02)
    words = "a loss of 0.20 pt (95% interval -0.30 to 0.70) at 27% of full precision's size"
    assert said(good, bad)[0] == f"int8_static costs nothing measurable on 600 rows: {words}."
    also = said(good, point("int4_weights", 280, 0.0))[0]
    assert also.endswith("size; int4_weights costs nothing measurable either.")
    assert said(bad)[0].startswith("int8_dynamic costs something: a loss of 2.00 pt (")
    # What is free but saves nothing goes nowhere.
    grown = said(curve(measured(1100, 0.001), measured(500, 0.1)))[1]
    assert grown.startswith("No curve makes the file smaller at no measurable cost")
    assert said(curve(None, None))[1] == "No technique with a curve was measured."


@pytest.mark.usefixtures("short")
def test_what_was_measured_is_not_measured_again(tiny: Workload, home: Path, found: Analysis) -> None:
    again = analyze(tiny, home)
    assert again.measurements == found.measurements
    # The level that failed is tried again.
    assert again.reused == sum(len(report.effects) for report in found.layers) + 4
    assert (again.curves, again.layers) == (found.curves, found.layers)


@pytest.mark.usefixtures("short", "full")
def test_an_interrupted_run_goes_on_where_it_was(tiny: Workload, tmp_path: Path) -> None:
    def stop(what: str, done: float) -> None:
        if "(3 of" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(tiny, tmp_path, techniques=["int8_static"], progress=stop)
    done = analyze(tiny, tmp_path, techniques=["int8_static"])
    assert done.reused == 2
    anew = analyze(tiny, tmp_path, techniques=["int8_static"], fresh=True, layers=False)
    assert (anew.reused, anew.layers) == (0, ())
    (folder(tmp_path, tiny.name) / MEASUREMENTS).write_text("{")
    assert analyze(tiny, tmp_path, techniques=["int8_static"], layers=False).reused == 0


@pytest.mark.usefixtures("short", "full")
def test_recovery_adds_curves_beside_the_one_shot_ones(
    tiny: Workload, home: Path, found: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    structured = replace(few()[1], levels=(0.75,))
    monkeypatch.setattr(measure, "TECHNIQUES", (structured, few()[2]))
    done = analyze(tiny, home, epochs=4, layers=False)
    assert done.reused == 2
    assert [(curve.key, curve.epochs) for curve in done.curves] == [
        ("structured", 0),
        ("structured", 4),
        ("int8_static", 0),
    ]
    before, after = (curve.levels[0].measured for curve in done.curves[:2])
    assert before is not None
    assert after is not None
    assert after.drop.value < before.drop.value


def test_codebooks_recover_by_their_own_training() -> None:
    clusters = next(technique for technique in TECHNIQUES if technique.key == "clusters")
    _, bits, spec = clusters.specs()[3]
    assert (bits, spec.params) == (4, {"epochs": 0, "clusters": 16})
    (recovered,) = measure._recovered(spec, 3)
    assert recovered.params == {"epochs": 3, "clusters": 16}


def test_an_onnx_file_alone_gets_all_that_works_on_it(onnx_only: Workload, tmp_path: Path) -> None:
    make_full(onnx_only, Data(onnx_only))
    done = analyze(onnx_only, tmp_path)
    assert [curve.key for curve in done.curves] == ["int8_static", "int8_dynamic", "int4_weights"]
    assert done.metric == "balanced_accuracy"
    assert len(done.layers) == 4
    assert any(note.startswith("structured pruning: works on the torch network") for note in done.notes)


def test_mistakes_are_told_in_one_line(tiny: Workload, full: Variant, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no technique magic: use magnitude, threshold,"):
        analyze(tiny, tmp_path, techniques=["magic"])
    other = load_workload(write_workload(tmp_path / "never-made", name="never-made"))
    with pytest.raises(VariantNotFound, match=r"run `trimtab compress .*never-made`"):
        analyze(other, tmp_path)


# --- the command ------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, CompressionError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_writes_page_pictures_and_json_and_says_three_sentences(
    tiny: Workload, full: Variant
) -> None:
    target = folder(Path(os.environ["TRIMTAB_HOME"]), tiny.name)
    text = run("analyze", tiny.directory, "-t", "int8_static", "-t", "int8_dynamic")
    report = json.loads((target / "analysis.json").read_text())
    for sentence in report["findings"]:
        assert sentence in text
    assert str(target / "analysis.html") in text
    assert "INT8 dynamic" in text
    assert "layers.2" in text
    for name in ("curves", "sensitivity"):
        assert (target / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in target.iterdir() if path.name.startswith(".")]
    shown = json.loads(run("analyze", tiny.directory, "-t", "int8_static", "--no-layers", "--json"))
    assert [curve["key"] for curve in shown["analysis"]["curves"]] == ["int8_static"]
    assert shown["analysis"]["reused"] == 1
    # The picture of the layers was of the run before.
    assert "sensitivity" not in shown["files"]
    assert not (target / "sensitivity.png").exists()


@pytest.mark.parametrize("columns", [80, 140])
def test_tables_fit_the_terminal(columns: int, found: Analysis) -> None:
    console = Console(width=columns, file=io.StringIO(), record=True)
    _print_curves(console, found, every=True)
    _print_layers(console, found)
    text = console.export_text()
    table = text.partition("free: the last")[0]
    assert "75%" in table
    assert "layers.2" in text
    assert max(map(len, table.splitlines())) <= columns
    assert "…" not in text


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "layers_of", stop)
    return stop


@pytest.mark.usefixtures("stopped", "full")
def test_an_interruption_ends_in_one_line(tiny: Workload) -> None:
    result = CliRunner().invoke(app, ["analyze", str(tiny.directory), "-t", "int8_static"])
    assert result.exit_code == 130
    assert result.stderr == "interrupted: what was measured is kept, run the same command to go on\n"
