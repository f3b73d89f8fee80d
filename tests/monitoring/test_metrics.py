"""Series that BentoML's merging can carry, and what a step shows in them."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Gauge, Histogram

from monitoring import metrics
from monitoring.controller import StepResult
from monitoring.groups import GroupSpec
from monitoring.records import STATES
from tests.monitoring.judgement import World

OURS = [m for m in vars(metrics).values() if hasattr(m, "_name") and str(m._name).startswith("trimtab_")]


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def test_every_gauge_says_how_it_is_merged() -> None:
    gauges = [m for m in OURS if isinstance(m, Gauge)]
    assert len(gauges) > 10
    assert {m._multiprocess_mode for m in gauges} <= {"mostrecent", "livesum"}


def test_no_gauge_has_a_label_that_merging_drops() -> None:
    assert all("pid" not in m._labelnames for m in OURS)
    assert metrics.RESIDENT._labelnames == metrics.CPU._labelnames == ("service", "process")


def test_a_controller_that_waits_for_the_lease_does_not_seem_to_judge(world: World) -> None:
    metrics.CONTROLLER_AT.set(1.0)
    metrics.publish(StepResult(2.0))
    assert value("trimtab_controller_last_step_timestamp_seconds") == 1
    metrics.publish(StepResult(3.0, leader=True))
    assert value("trimtab_controller_last_step_timestamp_seconds") == 3


def test_histogram_edges_are_floats_and_sit_on_the_usual_limits() -> None:
    for histogram in (m for m in OURS if isinstance(m, Histogram)):
        assert all(isinstance(edge, float) for edge in histogram._kwargs["buckets"])
    usual = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5}
    assert usual <= set(metrics.REQUEST_EDGES)
    assert usual <= set(metrics.MODEL_EDGES)
    assert min(metrics.MODEL_EDGES) == 5e-5


def test_series_that_ratios_divide_by_exist_from_the_start() -> None:
    metrics.prepare([("prepared-full", "control"), ("prepared-small", "treatment")])
    for outcome in metrics.REQUEST_OUTCOMES:
        assert (
            value("trimtab_requests_total", variant="prepared-small", arm="treatment", outcome=outcome) == 0
        )
    for outcome in metrics.FALLBACK_OUTCOMES:
        assert value("trimtab_fallbacks_total", variant="prepared-small", outcome=outcome) == 0
    for state in STATES:
        assert value("trimtab_decisions_total", state=state) is not None


def test_importing_the_package_does_not_import_prometheus() -> None:
    command = "import sys, monitoring; sys.exit('prometheus_client' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", command], cwd=root, check=False).returncode == 0


def test_a_step_shows_split_state_and_evidence(world: World) -> None:
    world.controller._publish = metrics.publish
    world.start({"step_min_pairs": 10**6}, [GroupSpec("DIS=1", 0.1, 0.1)])
    world.warm()
    world.traffic([0] * 96 + [1] * 3 + [-1], groups={"DIS": "1"})
    world.step()
    assert value("trimtab_rollout_state", state="shadowing") == 1
    assert sum(value("trimtab_rollout_state", state=state) or 0 for state in STATES) == 1
    assert value("trimtab_weight_ratio", variant="full", arm="control") == 1
    assert value("trimtab_weight_ratio", variant="small", arm="treatment") == 0
    assert value("trimtab_disagreement_ratio", group="") == pytest.approx(0.04)
    assert value("trimtab_guardrail_estimate", guardrail="accuracy_drop", group="") == pytest.approx(0.02)
    evidence = value("trimtab_evidence_log10", guardrail="group_harm", group="DIS=1")
    assert evidence is not None
    assert math.isfinite(evidence)
    assert value("trimtab_evidence_limit_log10", guardrail="accuracy_drop", group="") == pytest.approx(
        2.4, abs=0.1
    )


def test_the_mirrors_rate_is_shown_and_is_nothing_once_it_is_rolled_back(world: World) -> None:
    world.controller._publish = metrics.publish
    world.start({"step_min_pairs": 10**6, "mirror_rate": 0.25})
    world.warm()
    assert value("trimtab_mirror_rate") == 0.25
    world.order("rollback")
    world.step()
    assert value("trimtab_mirror_rate") == 0


def test_a_variant_that_is_no_longer_routed_to_has_no_weight() -> None:
    metrics.publish_route("full", "first", 50, "step")
    metrics.publish_route("full", "second", 5, "step")
    assert value("trimtab_weight_ratio", variant="first", arm="treatment") == 0
    assert value("trimtab_weight_ratio", variant="second", arm="treatment") == 0.05


def test_evidence_about_groups_that_are_gone_falls_to_zero(world: World) -> None:
    world.controller._publish = metrics.publish
    world.start({"step_min_pairs": 10**6}, [GroupSpec("OLD=1", 0.1, 0.1)])
    world.warm()
    world.traffic([0] * 100, groups={"OLD": "1"})
    world.step()
    world.order("rollback")
    world.start()
    world.step()
    assert value("trimtab_evidence_log10", guardrail="group_harm", group="OLD=1") == 0


def test_a_process_shows_its_memory_and_adds_up_its_cpu_time() -> None:
    meter = metrics.ProcessMeter("test")
    labels = {"service": meter._labels[0], "process": meter._labels[1]}
    meter.update()
    first = value("trimtab_cpu_seconds_total", **labels)
    assert (value("trimtab_resident_memory_bytes", **labels) or 0) > 1e6
    sum(i * i for i in range(300_000))
    meter.update()
    assert first is not None
    assert (value("trimtab_cpu_seconds_total", **labels) or 0) >= first > 0
