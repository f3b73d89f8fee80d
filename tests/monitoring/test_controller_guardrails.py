"""What the controller counts for each guardrail reaches the guardrail, on a real ledger."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from monitoring.baseline import Baseline, ColumnSpec
from monitoring.groups import GroupSpec
from monitoring.guardrails import Verdict
from monitoring.ledger import LabelRow, PairRow
from monitoring.quality import quality_of
from monitoring.tally import TallyKey, bucket_of
from tests.monitoring.judgement import World

BASELINE = Baseline(
    rows=2000,
    labels=(0.9, 0.1),
    answers=(0.9, 0.1),
    calibration=((0.5, 0.5), (1.0, 1.0)),
    columns=(ColumnSpec("AGE", (30.0,), (), (0.5, 0.5, 0.0)),),
)
Row = tuple[int | None, int | None, int | None]
"""What control and the candidate answer, and the label."""


def send(world: World, rows: Sequence[Row], groups: str = "1", confidence: float = 0.9) -> None:
    """One request per row, of the groups in turn; the controller looks after 50 of them."""
    for start in range(0, len(rows), 50):
        pairs, labels = [], []
        for control, treatment, label in rows[start : start + 50]:
            request = f"q{world.requests}"
            world.requests += 1
            pairs.append(
                PairRow(
                    world.rollout_id, request, 0, "control", control, treatment, confidence, 0.9,
                    {"DIS": groups[world.requests % len(groups)]}, {"AGE": 20}, world.now,
                )
            )  # fmt: skip
            if label is not None:
                labels.append(LabelRow(request, 0, label, world.now))
        world.ledger.record_pairs(pairs)
        world.ledger.record_labels(labels)
        world.step()


def verdict(world: World, name: str) -> Verdict:
    result = world.step()
    assert result.assessment is not None
    return next(v for v in result.assessment.verdicts if v.name == name)


def test_a_candidate_that_loses_the_rare_class_is_rolled_back_where_quality_is_balanced_accuracy(
    world: World,
) -> None:
    rng = np.random.default_rng(1)
    rows = [(1, int(rng.random() > 0.3), 1) if rng.random() < 0.1 else (0, 0, 0) for _ in range(3000)]
    policy = {"guardrails": {"class_harm": {"enabled": False}}}
    world.start(policy, quality=quality_of("balanced_accuracy", BASELINE.labels))
    world.warm()
    send(world, rows)
    assert world.rollout.state == "rolled_back"
    assert world.rollout.reason.startswith("balanced accuracy drop ")
    decision = world.ledger.decisions(world.rollout_id)[-1]
    # 30% of the rare class is 15 points of the mean recall of two classes, and 3 points of accuracy.
    assert decision.drop == pytest.approx(0.15, abs=0.08)


def test_once_promoted_the_late_loss_of_the_rare_class_is_caught_in_balanced_accuracy(world: World) -> None:
    policy = {
        "guardrails": {"class_harm": {"enabled": False}, "accuracy_drop": {"margin": 0.05}},
        "promoted_run_length": 100_000,
    }
    world.start(policy, quality=quality_of("balanced_accuracy", BASELINE.labels))
    world.climb()
    rng = np.random.default_rng(2)
    send(world, [(1, int(rng.random() > 0.5), 1) if rng.random() < 0.1 else (0, 0, 0) for _ in range(4000)])
    assert world.rollout.state == "rolled_back"
    assert world.ledger.decisions(world.rollout_id)[-1].guardrail == "accuracy_drop"


def test_a_group_whose_true_positive_rate_falls_away_from_the_others_moves_equalized_odds(
    world: World,
) -> None:
    groups = (GroupSpec("DIS=1", 0.5, 0.0, 0.1), GroupSpec("DIS=2", 0.5, 0.0, 0.1))
    only = {
        name: {"enabled": False}
        for name in ("accuracy_drop", "group_harm", "class_harm", "demographic_parity")
    }
    world.start({"guardrails": {**only, "equalized_odds": {"enabled": True}}}, groups=groups)
    world.warm()
    # Of every other row of the group that deserves a favourable answer the candidate takes it away.
    send(world, [(1, 0, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (0, 0, 0)] * 60, "12")
    assert world.rollout.state == "rolled_back"
    assert "of the true positive rate of DIS=" in world.rollout.reason


def test_without_any_label_a_large_expected_drop_raises_an_alert_and_rolls_nothing_back(world: World) -> None:
    world.start({"label_deadline_s": 1e6}, baseline=BASELINE)
    world.warm()
    send(world, [(0, 1, None), (0, 0, None), (0, 0, None)] * 100, confidence=0.95)
    assert world.rollout.state == "shadowing"
    assert "estimated_drop" in world.rollout.alerted
    assert verdict(world, "estimated_drop").estimate == pytest.approx(0.3, abs=0.1)


def test_answers_unlike_those_of_the_reference_raise_an_alert(world: World) -> None:
    world.start(baseline=BASELINE)
    world.warm()
    send(world, [(1, 1, 1), (0, 0, 0)] * 150)
    assert "prediction_drift" in world.rollout.alerted
    assert verdict(world, "prediction_drift").estimate == pytest.approx(0.4, abs=0.01)


def test_inputs_unlike_those_of_the_reference_hold_the_rollout_where_the_policy_says_so(
    world: World,
) -> None:
    world.start({"guardrails": {"input_drift": {"action": "hold"}}}, baseline=BASELINE)
    world.warm()
    key = world.rollout_id, TallyKey("input_drift", "AGE", bucket_of(world.now))
    assert world.ledger.add_counts("reports", 1, {key: {0: 400, 1: 40}}, world.now)
    world.step()
    assert world.rollout.state == "held"
    assert "AGE" in world.rollout.reason


def test_a_candidate_whose_model_takes_longer_for_a_record_raises_an_alert(world: World) -> None:
    world.start()
    world.warm()
    for _ in range(40):
        world.counts(
            {("model_time", "control"): {0: 1000, 1: 50}, ("model_time", "treatment"): {0: 900, 1: 30}}
        )
        world.step(10)
    assert "resource_use" in world.rollout.alerted
    assert verdict(world, "resource_use").estimate == 1.0
    assert world.rollout.state != "rolled_back"


def test_one_whose_model_is_quicker_raises_none(world: World) -> None:
    world.start()
    world.warm()
    for _ in range(40):
        world.counts(
            {("model_time", "control"): {0: 1000, 1: 50}, ("model_time", "treatment"): {0: 400, 1: 30}}
        )
        world.step(10)
    found = verdict(world, "resource_use")
    assert (found.estimate, found.n >= 38) == (0.0, True)
    assert not world.rollout.alerted
