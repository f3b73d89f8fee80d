"""Rollouts from start to end, on a server of two gateway workers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.client import GatewayError
from tests import models
from tests.e2e.server import ROOT, Server, Traffic, running, until

pytestmark = pytest.mark.e2e

POINT, _ = next(models.points(1))


class Webhook:
    """Takes alerts, as somebody's pager would."""

    def __init__(self) -> None:
        alerts: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                alerts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.alerts = alerts
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/alerts"

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join(10)
        self.http.server_close()


@pytest.fixture(scope="module")
def webhook() -> Iterator[Webhook]:
    webhook = Webhook()
    yield webhook
    webhook.close()


@pytest.fixture(scope="module")
def _server(store: Path, webhook: Webhook, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("rollouts")
    with running(store, home, workers=2, TRIMTAB_ALERT_WEBHOOK=webhook.url) as server:
        yield server


def ending(server: Server, rollout_id: str) -> dict[str, Any]:
    """The decision that ended a rollout, once every worker has applied it."""

    def found() -> dict[str, Any] | None:
        with server.client() as client:
            last = client.decisions(rollout_id)[-1]
        return last if last["effective_at"] is not None else None

    return until(found, "the decision is in effect in every worker")  # type: ignore[return-value]


def check_effect_and_alert(
    server: Server, webhook: Webhook, decision: dict[str, Any], traffic: Traffic
) -> None:
    """What every rollback has to have: effect within a second, for users too, and somebody told."""
    assert decision["to_state"] == "rolled_back"
    assert 0 <= decision["effective_at"] - decision["at"] < 1.0
    late = [at - decision["at"] for at, arm in traffic.arms if arm == "treatment"]
    assert max(late, default=0.0) < 1.5
    identity = f"{decision['rollout_id']}/{decision['seq']}"
    until(lambda: [alert for alert in webhook.alerts if alert["id"] == identity], "the webhook was called")
    until(lambda: f'"id":"{identity}"' in server.log(), "the alert is in the log")
    name = 'trimtab_alerts_total{outcome="delivered",state="rolled_back"}'
    until(lambda: server.metrics()[name] >= 1, "the alert is counted", pause=0.2)


def test_a_good_variant_climbs_every_step_and_is_promoted(server: Server, webhook: Webhook) -> None:
    with Traffic(server) as traffic:
        traffic.wait(20)
        rollout = server.rollout("same")
        status = server.wait_state(rollout["id"], "promoted")
        traffic.wait(30)
    assert status["weight"] == 90
    with server.client() as client:
        decisions = client.decisions(rollout["id"])
    assert [decision["weight"] for decision in decisions if decision["to_state"] == "step"] == [
        1,
        5,
        25,
        50,
        90,
    ]
    assert [d["to_state"] for d in decisions if d["to_state"] != "step"] == [
        *("pending", "warmup", "shadowing", "promoting", "promoted")
    ]
    assert all(decision["actor"] == "controller" for decision in decisions[1:])
    assert decisions[1]["reason"].startswith(
        "self-test: A/A replay of 1,500 pairs of reference rows held; a planted"
    )
    assert decisions[-1]["evidence_log10"] >= decisions[-1]["limit_log10"]
    assert set(traffic.statuses) == {200}
    assert traffic.errors == []
    assert set(traffic.replies) == {("control", "full"), ("treatment", "same")}
    until(lambda: [a for a in webhook.alerts if a["to_state"] == "promoted"], "the webhook was called")


def test_clients_see_the_split_that_is_meant(server: Server) -> None:
    server.promoted("same")
    with httpx.Client(base_url=server.url) as http:

        def arm_of(user: str | None = None) -> str:
            headers = {} if user is None else {"X-Assignment-Key": user}
            return http.post("/predict", json={"records": [POINT]}, headers=headers).headers["X-Trimtab-Arm"]

        users = [f"user-{number}" for number in range(500)]
        by_user = [arm_of(user) for user in users]
        again = [arm_of(user) for user in users[:100]]
        by_request = [arm_of() for _ in range(500)]
    assert again == by_user[:100], "a user changed arms"
    for arms in (by_user, by_request):
        # 4.5 standard deviations either way: a right split fails 1 in 100,000.
        assert abs(arms.count("treatment") - 450) <= 4.5 * math.sqrt(500 * 0.9 * 0.1)


def test_every_reply_names_its_request_its_variant_and_its_arm(server: Server) -> None:
    reply = httpx.post(
        server.url + "/predict", json={"records": [POINT]}, headers={"X-Request-Id": "order-17"}
    )
    body = reply.json()
    assert reply.headers["X-Request-Id"] == body["request_id"]
    assert body["request_id"].startswith("order-17.")
    assert (reply.headers["X-Trimtab-Variant"], reply.headers["X-Trimtab-Arm"]) == ("full", "control")
    assert (body["variant"], body["arm"]) == ("full", "control")
    (prediction,) = body["predictions"]
    assert prediction["class"] == models.truth(POINT)
    assert prediction["label"] == ("low", "high")[prediction["class"]]
    assert 0.5 <= prediction["confidence"] <= 1


def test_a_worse_variant_is_rolled_back_by_its_accuracy(server: Server, webhook: Webhook) -> None:
    with Traffic(server, records=3) as traffic:
        rollout = server.rollout("worse")
        server.wait_state(rollout["id"], "rolled_back")
        traffic.wait(60)
        decision = ending(server, rollout["id"])
    assert decision["guardrail"] in ("accuracy_drop", "group_harm")
    assert decision["evidence_log10"] >= decision["limit_log10"]
    assert 0.05 < decision["drop"] < 0.3
    assert decision["pairs"] > 0
    assert decision["labels"] > 0
    assert set(traffic.statuses) == {200}
    check_effect_and_alert(server, webhook, decision, traffic)


def test_a_variant_that_harms_one_group_is_rolled_back_and_the_group_is_named(
    server: Server, webhook: Webhook
) -> None:
    policy = {"guardrails": {"accuracy_drop": {"margin": 0.3}, "demographic_parity": {"enabled": False}}}
    with Traffic(server, records=4) as traffic:
        rollout = server.rollout("harms-b", **policy)
        server.wait_state(rollout["id"], "rolled_back")
        traffic.wait(60)
        decision = ending(server, rollout["id"])
    assert (decision["guardrail"], decision["group"]) == ("group_harm", "TEAM=B")
    assert "TEAM=B" in decision["reason"]
    assert decision["drop"] > 0.5
    assert set(traffic.statuses) == {200}
    check_effect_and_alert(server, webhook, decision, traffic)


def test_a_broken_variant_costs_no_request_and_is_rolled_back_by_its_errors(
    server: Server, webhook: Webhook
) -> None:
    # Without the other guardrails and straight to half of the traffic: its errors have to speak for themselves.
    policy = {
        "steps": [0, 50, 90],
        "step_min_pairs": 20,
        "guardrails": {
            "accuracy_drop": {"margin": 0.5},
            "group_harm": {"enabled": False},
            "demographic_parity": {"enabled": False},
        },
    }
    with Traffic(server) as traffic:
        rollout = server.rollout("broken", **policy)
        server.wait_state(rollout["id"], "rolled_back")
        traffic.wait(60)
        decision = ending(server, rollout["id"])
    assert decision["guardrail"] == "treatment_errors"
    assert set(traffic.statuses) == {200}
    assert traffic.errors == []
    metrics = server.metrics()
    assert metrics['trimtab_fallbacks_total{outcome="invalid",variant="broken"}'] > 0
    assert metrics['trimtab_requests_total{arm="treatment",outcome="failed",variant="broken"}'] == 0
    check_effect_and_alert(server, webhook, decision, traffic)


def test_a_variant_that_hangs_costs_no_request_and_is_rolled_back(server: Server, webhook: Webhook) -> None:
    policy = {"steps": [0, 50, 90], "step_min_pairs": 5, "guardrails": {"accuracy_drop": {"margin": 0.5}}}
    policy["guardrails"] |= {"group_harm": {"enabled": False}, "demographic_parity": {"enabled": False}}
    with Traffic(server, rate=100, threads=8) as traffic:
        rollout = server.rollout("stuck", **policy)
        server.wait_state(rollout["id"], "rolled_back", seconds=60)
        traffic.wait(60)
        decision = ending(server, rollout["id"])
    assert decision["guardrail"] in ("treatment_errors", "accuracy_drop")
    assert set(traffic.statuses) == {200}
    assert traffic.errors == []


def test_a_variant_that_does_not_even_load_never_gets_traffic(server: Server) -> None:
    with Traffic(server, rate=50) as traffic:
        rollout = server.rollout("hopeless", warmup_timeout_s=1)
        status = server.wait_state(rollout["id"], "rolled_back")
    assert "not loaded within 1 s" in status["reason"]
    assert "NaN" in status["reason"]
    assert set(traffic.replies) == {("control", "full")}
    assert set(traffic.statuses) == {200}


def test_after_a_rollback_the_next_rollout_starts_afresh(server: Server) -> None:
    with Traffic(server) as traffic:
        first = server.rollout("worse")
        server.wait_state(first["id"], "rolled_back")
        second = server.rollout("same")
        server.wait_state(second["id"], "promoted")
    assert second["id"] != first["id"]
    assert set(traffic.statuses) == {200}


# -- operators -------------------------------------------------------------------------------------------------


def cli(server: Server, *arguments: str, status: int = 0) -> Any:
    """Run `trimtab` as an operator would and return what it printed as JSON."""
    environment = {**os.environ, "TRIMTAB_HOME": str(server.home), "TRIMTAB_URL": server.url, "USER": "olga"}
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=server.home,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    return json.loads(done.stdout) if done.stdout else done.stderr


def test_operators_pause_resume_promote_and_roll_back_over_http(server: Server) -> None:
    rollout = server.rollout("same", step_min_seconds=3600)
    server.wait_state(rollout["id"], "shadowing")
    with server.client() as client:
        assert client.verb("current", "pause", reason="lunch", actor="olga")["state"] == "held"
        assert client.verb("current", "resume", actor="olga")["state"] == "shadowing"
        stepped = client.verb("current", "promote", actor="olga")
        assert (stepped["state"], stepped["weight"]) == ("step", 1)
        promoted = client.verb("current", "promote", full=True, reason="we know it", actor="olga")
        assert promoted["state"] in ("promoting", "promoted")
        server.wait_state(rollout["id"], "promoted")
        back = client.verb("current", "rollback", reason="we did not", actor="olga")
        assert (back["state"], back["weight"]) == ("rolled_back", 0)
        decisions = [decision for decision in client.decisions("current") if decision["actor"] == "olga"]
    assert [d["verb"] for d in decisions] == ["pause", "resume", "promote", "promote full", "rollback"]
    assert decisions[0]["reason"] == "lunch"
    assert decisions[3]["override"], "a promotion without evidence is on record as such"
    assert 0 <= ending(server, rollout["id"])["effective_at"] - decisions[-1]["at"] < 1.0


def test_operators_do_the_same_on_the_command_line(server: Server) -> None:
    workload = str(models.WORKLOAD)
    policy = server.home / "policy.yaml"
    policy.write_text("step_min_seconds: 3600\nstep_min_pairs: 5\n")
    rollout = cli(server, "rollout", "start", workload, "same", "--policy", str(policy), "--json")
    server.wait_state(rollout["id"], "shadowing")
    assert cli(server, "rollout", "pause", "--reason", "lunch", "--json")["state"] == "held"
    assert cli(server, "rollout", "resume", "--json")["state"] == "shadowing"
    assert cli(server, "rollout", "promote", "--json")["weight"] == 1
    shown = cli(server, "rollout", "status", "--json")
    assert (shown["id"], shown["state"], shown["weight"]) == (rollout["id"], "step", 1)
    assert cli(server, "rollout", "rollback", "--reason", "enough", "--json")["state"] == "rolled_back"
    history = cli(server, "rollout", "history", "--id", rollout["id"], "--json")
    assert [d["verb"] for d in history if d["actor"] == "olga"] == [
        *("start", "pause", "resume", "promote", "rollback")
    ]
    listed = cli(server, "rollout", "history", "--json")
    assert listed[0]["id"] == rollout["id"]


def test_waiting_on_the_command_line_tells_the_end_by_its_exit_code(server: Server) -> None:
    rollout = server.rollout("same", step_min_seconds=3600)
    server.wait_state(rollout["id"], "shadowing")
    said = cli(server, "rollout", "status", "--wait", "--timeout", "1", status=4)
    assert "still shadowing" in said
    with server.client() as client:
        client.verb("current", "promote", full=True)
    assert cli(server, "rollout", "status", "--wait", "--json")["state"] == "promoted"
    with server.client() as client:
        client.verb("current", "rollback", reason="test")
    ended = cli(server, "rollout", "status", "--wait", "--json", status=3)
    assert (ended["state"], ended["reason"]) == ("rolled_back", "test")


def test_the_command_line_fails_in_one_line(server: Server) -> None:
    said = cli(server, "rollout", "status", "--id", "points-999", status=2)
    assert said == "trimtab: no rollout is called 'points-999' (HTTP 404)\n"
    said = cli(server, "rollout", "start", str(models.WORKLOAD), "refused", status=2)
    assert "TEAM=B loses 30.0 pt" in said
    assert said.count("\n") == 1
    said = cli(server, "rollout", "status", "--url", "http://127.0.0.1:9", status=2)
    assert "no gateway at http://127.0.0.1:9" in said


@pytest.mark.parametrize("token", [None, "wrong"])
def test_nobody_steers_without_the_token(server: Server, token: str | None) -> None:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        before = http.get("/rollouts").json()
        replies = [http.post("/rollouts", json={"variant": "points-same"})]
        replies += [http.post(f"/rollouts/current/{v}") for v in ("promote", "pause", "resume", "rollback")]
        assert {reply.status_code for reply in replies} == {401}
        assert all("error" in reply.json() for reply in replies)
        assert http.get("/rollouts").json() == before


def test_an_unknown_rollout_is_not_found(server: Server) -> None:
    for call in (
        lambda client: client.status("points-999"),
        lambda client: client.decisions("points-999"),
        lambda client: client.verb("points-999", "pause"),
    ):
        with server.client() as client, pytest.raises(GatewayError, match="HTTP 404"):
            call(client)


def test_one_rollout_at_a_time(server: Server) -> None:
    server.rollout("same", step_min_seconds=3600)
    with pytest.raises(GatewayError, match=r"under way.*HTTP 409"):
        server.rollout("worse")


def test_the_gates_refusal_stands_unless_it_is_overridden_and_that_is_on_record(server: Server) -> None:
    with pytest.raises(GatewayError, match=r"TEAM=B loses 30.0 pt.*HTTP 409"):
        server.rollout("refused")
    rollout = server.rollout("refused", override="to see it caught")
    with server.client() as client:
        start = client.decisions(rollout["id"])[0]
    assert (start["verb"], start["override"], start["reason"]) == ("start", True, "to see it caught")


# -- metrics ---------------------------------------------------------------------------------------------------


def quantile(metrics: dict[str, float], name: str, labels: str, q: float) -> float:
    """As PromQL's histogram_quantile."""
    edges: list[tuple[float, float]] = []
    for series, count in metrics.items():
        if series.startswith(name + "_bucket{") and all(label in series for label in labels.split(",")):
            edge = series.partition('le="')[2].partition('"')[0]
            edges.append((math.inf if edge == "+Inf" else float(edge), count))
    edges.sort()
    rank, below, low = q * edges[-1][1], 0.0, 0.0
    for edge, count in edges:
        if count >= rank:
            return low if edge == math.inf else low + (edge - low) * (rank - below) / (count - below)
        below, low = count, edge
    raise AssertionError("no samples")


def test_metrics_tell_the_whole_story_with_our_own_labels(server: Server) -> None:
    with Traffic(server) as traffic:
        rollout = server.rollout("same")
        server.wait_state(rollout["id"], "promoted")
        traffic.wait(100)
        metrics = until(lambda: _complete(server.metrics()), "all series are there", pause=0.3)
    assert set(traffic.statuses) == {200}
    for variant, arm in (("full", "control"), ("same", "treatment")):
        for name in ("trimtab_request_seconds", "trimtab_model_seconds"):
            labels = f'arm="{arm}",variant="{variant}"'
            p50, p95, p99 = (quantile(metrics, name, labels, q) for q in (0.5, 0.95, 0.99))
            assert 0 < p50 <= p95 <= p99 < 5
        assert metrics[f'trimtab_requests_total{{arm="{arm}",outcome="ok",variant="{variant}"}}'] > 0
        assert metrics[f'trimtab_requests_total{{arm="{arm}",outcome="failed",variant="{variant}"}}'] == 0
    assert metrics['trimtab_rollout_state{state="promoted"}'] == 1
    assert metrics['trimtab_feedback_total{outcome="accepted"}'] > 0
    assert metrics['trimtab_pairs_total{outcome="agree",variant="same"}'] > 0
    assert metrics["trimtab_shadow_queue_depth"] < 200
    assert metrics['trimtab_shadow_shed_total{outcome="full"}'] == 0
    assert not [name for name, count in metrics.items() if 'http_response_code="5' in name and count]


SERIES = [
    'trimtab_evidence_log10{group="",guardrail="accuracy_drop"}',
    'trimtab_evidence_log10{group="TEAM=B",guardrail="group_harm"}',
    'trimtab_evidence_log10{group="TEAM=B",guardrail="demographic_parity"}',
    'trimtab_evidence_log10{group="",guardrail="latency_p95"}',
    'trimtab_evidence_log10{group="",guardrail="treatment_errors"}',
    'trimtab_evidence_limit_log10{group="",guardrail="accuracy_drop"}',
    'trimtab_promotion_evidence_log10{group="",guardrail="disagreement"}',
    'trimtab_disagreement_ratio{group=""}',
    'trimtab_disagreement_ratio{group="TEAM=B"}',
    'trimtab_fallbacks_total{outcome="timeout",variant="same"}',
    'trimtab_label_lag_seconds{quantile="0.95"}',
    "trimtab_labels_waiting",
    "trimtab_pairs_resolved",
    "trimtab_rollout_step",
    "trimtab_decision_effect_seconds",
    "trimtab_controller_last_step_timestamp_seconds",
    "trimtab_shadow_queue_depth",
]


def _complete(metrics: dict[str, float]) -> dict[str, float] | None:
    by_service = all(
        any(name.startswith(f"trimtab_{series}{{") and f'service="{service}"' in name for name in metrics)
        for series in ("resident_memory_bytes", "cpu_seconds_total")
        for service in ("gateway", "shadow", "monitor")
    )
    weights = sorted(value for name, value in metrics.items() if name.startswith("trimtab_weight_ratio{"))
    whole = all(name in metrics for name in SERIES)
    return metrics if by_service and whole and any(abs(weight - 0.9) < 1e-9 for weight in weights) else None
