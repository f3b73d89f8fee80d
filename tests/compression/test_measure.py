from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compression.cascade import MAX_DROPS
from compression.data import Data
from compression.errors import WorkloadError
from compression.export import open_session
from compression.gate import judge
from compression.measure import (
    Answers,
    Pairs,
    answer,
    batch_sensitivity,
    drop,
    latency,
    measure,
    quality,
)
from compression.scorecard import Scorecard
from compression.steps import STEPS, StepContext
from compression.variant import Variant
from compression.workload import Workload, load_workload

from .conftest import dense, write_workload


def pairs(own: list[int], full: list[int], labels: list[int]) -> Pairs:
    return Pairs.of(answers(own), answers(full), np.array(labels))


def answers(classes: list[int], confidences: list[float] | None = None) -> Answers:
    sure = np.array(confidences or [1.0] * len(classes))
    return Answers(np.array(classes), sure, ~np.isnan(sure))


def test_accuracy_and_its_drop() -> None:
    found = pairs(own=[1, 0, 1, 0], full=[1, 1, 1, 0], labels=[1, 1, 1, 1])
    assert quality("accuracy", found).value == 0.5
    assert drop("accuracy", found).value == 0.25


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_occur() -> None:
    found = pairs(own=[0, 0, 0, 0], full=[0, 0, 0, 2], labels=[0, 0, 0, 2])
    assert quality("accuracy", found).value == 0.75
    assert quality("balanced_accuracy", found).value == 0.5
    assert drop("balanced_accuracy", found).value == 0.5


def test_recall_is_that_of_the_named_classes_alone(tmp_path: Path) -> None:
    folder = write_workload(tmp_path / "w", metric="recall\nrecall_of: [above]")
    found = pairs(own=[0, 0, 0, 1], full=[0, 1, 1, 1], labels=[0, 1, 1, 1]).about(load_workload(folder))
    assert found.labels.tolist() == [1, 1, 1]
    assert quality("recall", found).value == pytest.approx(1 / 3)
    assert drop("recall", found).value == pytest.approx(2 / 3)


def test_an_output_that_is_no_number_is_wrong_and_counted() -> None:
    found = Pairs.of(answers([0, 0], [0.9, np.nan]), answers([0, 0]), np.array([0, 0]))
    assert found.right.tolist() == [True, False]
    assert found.invalid == 1


def test_a_cascade_keeps_the_answers_that_are_sure_enough_and_are_numbers() -> None:
    own = answers([0, 0, 0, 0], [0.9, 0.7, 0.6, np.nan])
    both = own.above(0.7, answers([1, 1, 1, 1]))
    assert both.classes.tolist() == [0, 0, 1, 1]
    assert both.finite.all()


def test_full_precision_against_itself_loses_nothing(full: Variant) -> None:
    card = full.scorecard()
    assert card is not None
    assert card.quality.value > 0.85
    assert (card.drop.value, card.agreement, card.size_ratio, card.invalid_outputs) == (0, 1, 1, 0)
    assert set(card.groups) == {"side=left", "side=right"}
    assert sum(group.rows for group in card.groups.values()) == card.rows == 600
    assert set(card.classes) == {"below", "above"}
    assert card.batch_sensitivity == 0
    assert card.cascade == []
    gate = full.gate()
    assert gate is not None
    assert gate.accepted


def test_a_variant_that_answers_one_class_only_is_refused(
    tiny: Workload, data: Data, full: Variant, graph: onnx.ModelProto
) -> None:
    stuck = onnx.ModelProto()
    stuck.CopyFrom(graph)
    bias = next(tensor for tensor in stuck.graph.initializer if tensor.name == "layers.4.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([100, -100], dtype=np.float32), bias.name))
    card = measure(tiny, data, "stuck", stuck.SerializeToString(), full.onnx_bytes())
    assert all(group.selection_rate == 0 for group in card.groups.values())
    assert card.classes["above"].recall.value == 0
    assert card.drop.value > 0.3
    assert judge(card, "generative").reasons[0].startswith("side=")


@pytest.fixture(scope="module")
def shifted(graph: onnx.ModelProto) -> bytes:
    """The tiny model with a bias that turns the answers it is not sure of."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    bias = next(tensor for tensor in changed.graph.initializer if tensor.name == "layers.4.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([0.0, -2.0], dtype=np.float32), bias.name))
    return changed.SerializeToString()


def test_each_point_of_a_cascade_is_measured_on_the_test_split(
    tiny: Workload, data: Data, full: Variant, shifted: bytes
) -> None:
    card = measure(tiny, data, "shifted", shifted, full.onnx_bytes())
    points = card.cascade
    assert 0 < len(points) < len(MAX_DROPS)
    assert [point.max_drop for point in points] == sorted(point.max_drop for point in points)
    rows = data.rows("test")
    own, reference = (
        answer(tiny, open_session(model), rows.tensors) for model in (shifted, full.onnx_bytes())
    )
    for point in points:
        kept = own.confidences >= point.threshold
        assert point.escalated.value == pytest.approx((~kept).mean())
        assert 0 <= point.escalated.low <= point.escalated.value <= point.escalated.high <= 1
        right = np.where(kept, own.classes, reference.classes) == rows.labels
        assert point.quality.value == pytest.approx(right.mean())
        assert point.drop.value == pytest.approx((reference.classes == rows.labels).mean() - right.mean())
        assert point.cost_ratio == pytest.approx(1 / card.latency_at(1).speedup + point.escalated.value)
        assert point.worst_group in card.groups
        assert point.worst_group_drop is not None
    assert points[-1].escalated.value > 0
    assert points[-1].drop.value < card.drop.value


def test_the_thresholds_come_from_the_validation_split_alone(
    tiny: Workload, data: Data, full: Variant, shifted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def choose(metric: str, *arrays: np.ndarray) -> dict[float, float | None]:
        seen.extend(arrays)
        return {0.5: 0.75, 0.1: None}

    monkeypatch.setattr("compression.measure.choose", choose)
    card = measure(tiny, data, "shifted", shifted, full.onnx_bytes())
    assert [(point.max_drop, point.threshold) for point in card.cascade] == [(0.5, 0.75)]
    rows = data.rows("validation")
    own, reference = (
        answer(tiny, open_session(model), rows.tensors) for model in (shifted, full.onnx_bytes())
    )
    expected = (own.classes == rows.labels, reference.classes == rows.labels, own.confidences, rows.labels)
    assert all(np.array_equal(found, wanted) for found, wanted in zip(seen, expected, strict=True))


def test_a_cascade_without_groups_has_no_worst_one(
    onnx_only: Workload, full: Variant, shifted: bytes
) -> None:
    card = measure(onnx_only, Data(onnx_only), "shifted", shifted, full.onnx_bytes())
    assert card.cascade
    assert {(point.worst_group, point.worst_group_drop) for point in card.cascade} == {(None, None)}


def test_a_scorecard_from_before_cascades_is_read(full: Variant) -> None:
    card = full.scorecard()
    assert card is not None
    stored = card.model_dump(mode="json")
    del stored["cascade"]
    assert Scorecard.model_validate(stored) == card


def test_full_precision_is_asked_once_for_all_variants(
    tiny: Workload, full: Variant, shifted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(side_effect=answer)
    monkeypatch.setattr("compression.measure.answer", asked)
    data, content = Data(tiny), full.onnx_bytes()
    for name in ("one", "other"):
        measure(tiny, data, name, content, content)
    # The test and the validation split: each variant's answers to both, and full precision's.
    assert asked.call_count == 2 * 2 + 2
    measure(tiny, data, "one", content, shifted)  # another full precision
    assert asked.call_count == 2 * 2 + 2 + 4


def test_latencies_are_ordered_and_taken_for_both(full: Variant, data: Data) -> None:
    session = open_session(full.onnx_bytes())
    found = latency(session, session, data.rows("test").tensors, 32, budget_s=0.05)
    assert 0 < found.p50_ms <= found.p95_ms <= found.p99_ms
    assert 0.2 < found.speedup < 5


def test_models_are_timed_in_turns_of_which_the_first_call_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    clock = 0

    class Session:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, _outputs: None, _feed: object) -> None:
            nonlocal clock
            clock += 1_000_000 if calls[-1:] == [self.name] else 5_000_000  # the other one had the cache
            calls.append(self.name)

    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock)
    own, full = (cast(onnxruntime.InferenceSession, Session(name)) for name in ("own", "full"))
    found = latency(own, full, {"x": np.zeros((1, 1), np.float32)}, 1, budget_s=0.0)
    assert (found.p99_ms, found.full_p99_ms) == (1.0, 1.0)
    turns = [(name, len(list(group))) for name, group in itertools.groupby(calls[10:])]
    # Thirty calls of each count: five in each turn, after one that does not; who goes first changes.
    assert turns == [("own", 6), *[("full", 12), ("own", 12)] * 2, ("full", 12), ("own", 6)]


def test_dynamic_quantization_shows_up_as_batch_sensitivity(tiny: Workload, context: StepContext) -> None:
    # One row in eight is a thousand times larger: its scale swallows the others of its batch.
    torch.manual_seed(0)
    changed = STEPS["int8_dynamic"]().apply(dense([torch.randn(8, 64), torch.randn(64, 2)]), context)
    rows = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    rows[::8] *= 1000
    session = open_session(changed.SerializeToString())
    assert batch_sensitivity(tiny, session, {"x": rows}) > 0.1


def test_a_model_with_other_inputs_is_refused_by_name(tiny: Workload, data: Data, full: Variant) -> None:
    other = dense([torch.ones(2, 2)]).SerializeToString()
    with pytest.raises(WorkloadError, match="makes the tensors numbers, side; the model takes x"):
        measure(tiny, data, "other", other, full.onnx_bytes())


def test_a_model_with_a_fixed_batch_is_refused(
    tiny: Workload, data: Data, full: Variant, graph: onnx.ModelProto
) -> None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    for value in fixed.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(WorkloadError, match="export the model with a dynamic batch"):
        measure(tiny, data, "fixed", fixed.SerializeToString(), full.onnx_bytes())
