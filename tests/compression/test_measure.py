from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from compression.data import Data
from compression.errors import WorkloadError
from compression.export import open_session
from compression.gate import judge
from compression.measure import Answers, Pairs, batch_sensitivity, drop, latency, measure, quality
from compression.steps import STEPS, StepContext
from compression.variant import Variant
from compression.workload import Workload

from .conftest import dense


def pairs(own: list[int], full: list[int], labels: list[int]) -> Pairs:
    every = np.ones(len(labels), dtype=bool)
    return Pairs.of(Answers(np.array(own), every), Answers(np.array(full), every), np.array(labels))


def test_accuracy_and_its_drop() -> None:
    found = pairs(own=[1, 0, 1, 0], full=[1, 1, 1, 0], labels=[1, 1, 1, 1])
    assert quality("accuracy", found).value == 0.5
    assert drop("accuracy", found).value == 0.25


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_occur() -> None:
    found = pairs(own=[0, 0, 0, 0], full=[0, 0, 0, 2], labels=[0, 0, 0, 2])
    assert quality("accuracy", found).value == 0.75
    assert quality("balanced_accuracy", found).value == 0.5
    assert drop("balanced_accuracy", found).value == 0.5


def test_an_output_that_is_no_number_is_wrong_and_counted() -> None:
    answers = Answers(np.array([0, 0]), np.array([True, False]))
    found = Pairs.of(answers, Answers(np.array([0, 0]), np.array([True, True])), np.array([0, 0]))
    assert found.right.tolist() == [True, False]
    assert found.invalid == 1


def test_full_precision_against_itself_loses_nothing(full: Variant) -> None:
    card = full.scorecard()
    assert card is not None
    assert card.quality.value > 0.85
    assert (card.drop.value, card.agreement, card.size_ratio, card.invalid_outputs) == (0, 1, 1, 0)
    assert set(card.groups) == {"side=left", "side=right"}
    assert sum(group.rows for group in card.groups.values()) == card.rows == 600
    assert set(card.classes) == {"below", "above"}
    assert card.batch_sensitivity == 0
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


def test_latencies_are_ordered_and_taken_for_both(full: Variant, data: Data) -> None:
    session = open_session(full.onnx_bytes())
    found = latency(session, session, data.rows("test").tensors, 32, budget_s=0.05)
    assert 0 < found.p50_ms <= found.p95_ms <= found.p99_ms
    assert 0.2 < found.speedup < 5


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
