"""The control routes over HTTP, with a real ledger and model store, and no server."""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import bentoml
import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

with warnings.catch_warnings():
    # Starlette warns about the library that its test client is made with.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

from compression.scorecard import CascadePoint
from compression.variant import GATE, SCORECARD, Variant, load_variant
from compression.workload import Workload
from monitoring.chain import GENESIS
from monitoring.controller import count
from monitoring.ledger import Ledger, PairRow
from services import cli
from services.client import Client
from services.control.app import MAX_FEEDBACK_ITEMS, make_app
from services.control.auth import RequestIds
from services.errors import ServingError
from services.status_view import render

TOKEN = {"Authorization": "Bearer s3cret"}
IDS = RequestIds("key")
_, KNOWN = IDS.issue("known")

pytestmark = pytest.mark.usefixtures("variants")


class Gateway:
    """What the routes need of a gateway."""

    def __init__(self, workload: Workload, ledger: Ledger) -> None:
        self.workload = workload
        self.state = SimpleNamespace(ledger=ledger)
        self.token = "s3cret"
        self.request_ids = IDS
        self.counted: list[Any] = []
        self.rejected = 0

    def count_feedback(self, result: Any) -> None:
        self.counted.append(result)

    def count_rejected_feedback(self) -> None:
        self.rejected += 1


@pytest.fixture
def gateway(workload: Workload, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    gateway = Gateway(workload, ledger)
    monkeypatch.setattr(bentoml, "get_current_service", lambda: gateway, raising=False)
    return gateway


@pytest.fixture
def http(gateway: Gateway) -> Iterator[TestClient]:
    with TestClient(make_app()) as client:
        yield client


def start(http: TestClient, variant: str = "points-same", **body: Any) -> Any:
    return http.post("/rollouts", json={"variant": variant, **body}, headers=TOKEN)


def refused(reply: Any, status: int, says: str = "") -> str:
    """The message of a refusal, which must be JSON of one field and one line."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert list(body) == ["error"]
    assert "\n" not in body["error"]
    assert says in body["error"]
    return str(body["error"])


# -- feedback ----------------------------------------------------------------------------------------------


def feedback(http: TestClient, *items: Any) -> Any:
    return http.post("/feedback", json={"feedback": list(items)})


def outcomes(reply: Any) -> dict[str, int]:
    """What became of the items, outcomes of none left out."""
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert list(body) == ["accepted", "duplicates", "conflicts", "corrected", "too_late"]
    return {outcome: number for outcome, number in body.items() if number}


def test_labels_are_taken_by_name_and_by_index(http: TestClient, ledger: Ledger) -> None:
    reply = feedback(
        http,
        {"request_id": KNOWN, "label": "high"},
        {"request_id": KNOWN, "index": 1, "label": 0},
    )
    assert outcomes(reply) == {"accepted": 2}
    rows = sqlite3.connect(ledger.path).execute("SELECT request_id, idx, label FROM labels").fetchall()
    assert rows == [(KNOWN, 0, 1), (KNOWN, 1, 0)]


def test_the_same_label_again_changes_nothing_and_another_one_is_a_conflict(http: TestClient) -> None:
    item = {"request_id": KNOWN, "label": 1}
    feedback(http, item)
    assert outcomes(feedback(http, item)) == {"duplicates": 1}
    assert outcomes(feedback(http, {**item, "label": 0})) == {"conflicts": 1}


def test_a_correction_takes_the_place_of_the_label(http: TestClient, ledger: Ledger) -> None:
    item = {"request_id": KNOWN, "label": "high"}
    corrected = {"request_id": KNOWN, "label": "low", "correction": True}
    feedback(http, item)
    assert outcomes(feedback(http, corrected)) == {"corrected": 1}
    assert outcomes(feedback(http, corrected, item)) == {"duplicates": 1, "conflicts": 1}
    db = sqlite3.connect(ledger.path)
    assert db.execute("SELECT request_id, idx, label FROM labels").fetchall() == [(KNOWN, 0, 0)]
    assert db.execute("SELECT request_id, idx, was, label FROM corrections").fetchall() == [(KNOWN, 0, 1, 0)]


def test_a_correction_of_a_record_without_a_label_is_a_label(http: TestClient) -> None:
    assert outcomes(feedback(http, {**GOOD, "correction": True})) == {"accepted": 1}


def test_a_correction_of_a_pair_that_was_counted_is_too_late(http: TestClient, ledger: Ledger) -> None:
    feedback(http, GOOD)
    rollout_id = start(http).json()["id"]
    ledger.record_pairs([PairRow(rollout_id, KNOWN, 0, "control", 1, 0, 0.9, 0.8, {}, {}, 1_700_000_000.0)])
    assert outcomes(feedback(http, {**GOOD, "label": 0, "correction": True})) == {"corrected": 1}
    count(ledger, ledger.rollout(rollout_id), 1_700_000_001.0)
    assert outcomes(feedback(http, {**GOOD, "correction": True})) == {"too_late": 1}


REWARD = {"request_id": KNOWN, "reward": 0.5}


def stored(ledger: Ledger) -> tuple[int, int]:
    """How many labels and rewards there are."""
    db = sqlite3.connect(ledger.path)
    found: tuple[int, int] = db.execute(
        "SELECT (SELECT count(*) FROM labels), (SELECT count(*) FROM rewards)"
    ).fetchone()
    db.close()
    return found


@pytest.mark.parametrize("reward", [0, 1, 0.0, 0.25, 1.0])
def test_a_reward_is_stored_once(http: TestClient, ledger: Ledger, reward: float) -> None:
    item = {"request_id": KNOWN, "reward": reward}
    assert outcomes(feedback(http, item)) == {"accepted": 1}
    assert outcomes(feedback(http, item)) == {"duplicates": 1}
    assert outcomes(feedback(http, {**item, "reward": 0.75})) == {"conflicts": 1}
    rows = sqlite3.connect(ledger.path).execute("SELECT request_id, reward FROM rewards").fetchall()
    assert rows == [(KNOWN, reward)]


def test_labels_and_rewards_may_come_together_and_are_counted_together(
    http: TestClient, gateway: Gateway
) -> None:
    assert outcomes(feedback(http, GOOD, REWARD, GOOD, REWARD)) == {"accepted": 2, "duplicates": 2}
    assert [(result.accepted, result.duplicates) for result in gateway.counted] == [(2, 2)]


def test_one_bad_reward_among_good_feedback_stores_none_of_it(http: TestClient, ledger: Ledger) -> None:
    refused(feedback(http, GOOD, REWARD, {**REWARD, "request_id": "known~000000000000"}), 404, "unknown")
    ledger.revision()
    assert stored(ledger) == (0, 0)


def test_feedback_needs_no_token_and_is_counted(http: TestClient, gateway: Gateway) -> None:
    feedback(http, {"request_id": KNOWN, "label": 1})
    assert [result.accepted for result in gateway.counted] == [1]


GOOD = {"request_id": KNOWN, "label": 1}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"NaN", 400),
        (b"[" * 100_000, 400),
        (orjson.dumps({"feedback": []}), 400),
        (orjson.dumps({"feedback": GOOD}), 400),
        (orjson.dumps({"feedback": [GOOD], "more": 1}), 400),
        (orjson.dumps({"feedback": [GOOD] * (MAX_FEEDBACK_ITEMS + 1)}), 400),
        (orjson.dumps({"feedback": [{"label": 1}]}), 400),
        (orjson.dumps({"feedback": [{"request_id": KNOWN}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "request_id": 7}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "request_id": ""}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "request_id": "x" * 10_000}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "request_id": "never-seen"}]}), 404),
        (orjson.dumps({"feedback": [{**GOOD, "request_id": "known~000000000000"}]}), 404),
        (orjson.dumps({"feedback": [{**GOOD, "request_id": KNOWN[:-1]}]}), 404),
        (orjson.dumps({"feedback": [{**GOOD, "request_id": "\x00~\u0000"}]}), 404),
        (b'{"feedback": [{"request_id": "\\ud800~x", "label": 1}]}', 400),
        (orjson.dumps({"feedback": [{**GOOD, "index": -1}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "index": 256}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "index": 2**63 - 1}]}), 400),
        (
            b'{"feedback": [{"request_id": "%s", "label": 1, "index": 1%s}]}' % (KNOWN.encode(), b"0" * 40),
            400,
        ),
        (orjson.dumps({"feedback": [{**GOOD, "index": "0"}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "index": True}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "label": 2}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "label": -1}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "label": "HIGH"}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "label": 1.0}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "label": True}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "label": None}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "label": [1]}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "correction": 1}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "correction": None}]}), 400),
        (orjson.dumps({"feedback": [{**GOOD, "reward": 1}]}), 400),
        (orjson.dumps({"feedback": [{"request_id": KNOWN, "index": 0, "reward": 1}]}), 400),
        (orjson.dumps({"feedback": [{"request_id": KNOWN, "correction": True, "reward": 1}]}), 400),
        (orjson.dumps({"feedback": [{"request_id": "never-seen", "reward": 1}]}), 404),
        *(
            (b'{"feedback": [{"request_id": "%s", "reward": %s}]}' % (KNOWN.encode(), reward), 400)
            for reward in (b"-0.01", b"1.01", b"1e999", b"NaN", b"null", b"true", b'"1"', b"[1]", b"2", b"{}")
        ),
    ],
)
def test_bad_feedback_is_refused_whole(http: TestClient, ledger: Ledger, body: bytes, status: int) -> None:
    refused(http.post("/feedback", content=body), status)
    http.post("/feedback", json={"feedback": [GOOD]})
    assert stored(ledger) == (1, 0)


def test_one_bad_label_among_good_ones_stores_none_of_them(
    http: TestClient, ledger: Ledger, gateway: Gateway
) -> None:
    refused(feedback(http, GOOD, {"request_id": "never-seen", "label": 1}), 404, "unknown request id")
    assert (gateway.rejected, gateway.counted) == (1, [])
    ledger.revision()
    assert sqlite3.connect(ledger.path).execute("SELECT count(*) FROM labels").fetchone() == (0,)


def test_feedback_that_cannot_be_stored_is_not_acknowledged(http: TestClient, ledger: Ledger) -> None:
    ledger.revision()
    lock = sqlite3.connect(ledger.path, isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    reply = feedback(http, GOOD)
    refused(reply, 503, "nothing was stored")
    assert reply.headers["Retry-After"] == "1"
    lock.execute("ROLLBACK")
    lock.close()
    assert feedback(http, GOOD).json()["accepted"] == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(
    body=json_values
    | st.fixed_dictionaries({"feedback": json_values})
    | st.fixed_dictionaries(
        {
            "feedback": st.lists(
                st.fixed_dictionaries({"request_id": st.just(KNOWN) | json_values, "label": json_values}),
                min_size=1,
                max_size=3,
            )
        }
    )
)
@hypothesis_settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_json_comes_as_feedback_it_is_taken_or_refused(http: TestClient, body: Any) -> None:
    content = json.dumps(body).encode()
    assert http.post("/feedback", content=content).status_code in (200, 400, 404)


# -- starting ----------------------------------------------------------------------------------------------


def test_a_rollout_starts_against_the_full_precision_it_was_made_from(
    http: TestClient, variants: dict[str, Variant]
) -> None:
    reply = start(http, actor="me")
    assert reply.status_code == 201
    body = reply.json()
    assert (body["state"], body["weight"], body["override_reason"]) == ("pending", 0, None)
    assert (body["control"], body["treatment"]) == (variants["full"].tag, variants["same"].tag)


def test_a_variant_can_be_named_with_its_version(http: TestClient, variants: dict[str, Variant]) -> None:
    assert start(http, variants["worse"].tag).json()["treatment"] == variants["worse"].tag


def test_the_policy_given_is_laid_over_the_workloads(http: TestClient) -> None:
    rollout = start(http, policy={"step_min_pairs": 7}).json()
    policy = http.get(f"/rollouts/{rollout['id']}").json()["policy"]
    assert (policy["step_min_pairs"], policy["latency_slo_ms"]) == (7, 2000)


def test_the_guarded_groups_come_from_the_references_rows(http: TestClient, ledger: Ledger) -> None:
    rollout = ledger.rollout(start(http).json()["id"])
    assert [group.name for group in rollout.groups] == ["TEAM=A", "TEAM=B"]


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer ", "Basic s3cret", "s3cret"])
@pytest.mark.parametrize("path", ["/rollouts", "/rollouts/current/rollback", "/rollouts/points-1/promote"])
def test_without_the_token_no_verb_is_heard(http: TestClient, path: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    reply = http.post(path, json={"variant": "points-same"}, headers=headers)
    refused(reply, 401, "Bearer TOKEN")
    assert "WWW-Authenticate" in reply.headers
    assert http.get("/rollouts").json() == {"rollouts": []}


def test_the_token_is_asked_for_before_the_body_is_looked_at(http: TestClient) -> None:
    refused(http.post("/rollouts", content=b"not JSON"), 401)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "variant"),
        ({"variant": ""}, 400, "variant"),
        ({"variant": 3}, 400, "variant"),
        ({"variant": None}, 400, "variant"),
        ({"variant": "x" * 300}, 400, "variant"),
        ({"variant": "points-same", "force": True}, 400, "force"),
        ({"variant": "points-same", "override": ""}, 400, "override"),
        ({"variant": "points-same", "override": True}, 400, "override"),
        ({"variant": "points-same", "actor": ""}, 400, "actor"),
        ({"variant": "points-same", "policy": []}, 400, "policy"),
        ({"variant": "points-same", "policy": {"stepps": [0, 1]}}, 400, "policy.stepps"),
        ({"variant": "points-same", "policy": {"steps": [1, 0]}}, 400, "policy.steps"),
        ({"variant": "points-same", "policy": {"steps": []}}, 400, "policy.steps"),
        ({"variant": "points-same", "policy": {"mirror_rate": 0}}, 400, "policy.mirror_rate"),
        ({"variant": "points-same", "policy": {"false_rollback_rate": "NaN"}}, 400, "false_rollback_rate"),
        ({"variant": "points-same", "policy": {"guardrails": {"made_up": {}}}}, 400, "made_up"),
        ({"variant": "points-nothing"}, 404, "points-nothing"),
        ({"variant": "points-same:000000000000"}, 404, "points-same:000000000000"),
        ({"variant": "points-full"}, 400, "control already"),
        ({"variant": "../../../etc/passwd"}, 404, ""),
        ({"variant": "a b:c:d"}, 404, ""),
        ({"variant": "points-same\n"}, 404, ""),
        ({"variant": "Ω"}, 404, ""),
    ],
)
def test_a_bad_start_is_refused_and_says_what_is_wrong(
    http: TestClient, body: dict[str, Any], status: int, says: str
) -> None:
    refused(http.post("/rollouts", json=body, headers=TOKEN), status, says)
    assert http.get("/rollouts").json() == {"rollouts": []}


def test_a_variant_of_another_workload_is_refused(http: TestClient) -> None:
    from tests import models

    full = models.save("full", models.points_onnx(), workload="other")
    same = models.save("same", models.points_onnx(), workload="other", parent=full.tag)
    refused(start(http, same.tag), 400, "belongs to workload other")
    refused(start(http, "other-same"), 404, "no variant points-other-same")


def test_a_variants_name_alone_is_enough(http: TestClient) -> None:
    assert start(http, "same").json()["treatment"].startswith("points-same:")


def test_a_variant_that_the_gate_refused_is_refused_with_the_gates_reasons(http: TestClient) -> None:
    refused(start(http, "points-refused"), 409, "TEAM=B loses 30.0 pt")


def test_a_variant_that_the_gate_never_saw_is_refused(http: TestClient) -> None:
    refused(start(http, "points-unmeasured"), 409, "no scorecard")


@pytest.mark.parametrize("variant", ["points-refused", "points-unmeasured"])
def test_an_override_goes_past_the_gate_and_is_on_record(http: TestClient, variant: str) -> None:
    rollout = start(http, variant, override="the customer insists").json()
    assert rollout["override_reason"] == "the customer insists"
    (decision,) = http.get(f"/rollouts/{rollout['id']}/decisions").json()["decisions"]
    assert (decision["verb"], decision["override"]) == ("start", True)
    assert decision["reason"] == "the customer insists"


def test_an_override_that_was_not_needed_is_not_on_record(http: TestClient) -> None:
    rollout = start(http, override="just in case").json()
    assert rollout["override_reason"] is None


def cascading(*points: tuple[float, float]) -> Variant:
    """A variant whose scorecard proves these thresholds: (max_drop, threshold)."""
    from tests import models
    from tests.compression.test_gate import card, estimate

    cascade = [
        CascadePoint(
            max_drop=max_drop,
            threshold=threshold,
            escalated=estimate(0.1),
            quality=estimate(0.8),
            drop=estimate(0.0),
            worst_group=None,
            worst_group_drop=None,
            cost_ratio=0.5,
        )
        for max_drop, threshold in points
    ]
    files = {
        GATE: models.verdict(accepted=True),
        SCORECARD: card(cascade=cascade).model_dump_json().encode(),
    }
    full = load_variant("points-full")
    return models.save("cascading", models.points_onnx(flip_d=0.999), parent=full.tag, files=files)


def test_a_cascade_takes_the_threshold_that_its_scorecard_proves(http: TestClient, ledger: Ledger) -> None:
    cascading((0.0025, 0.9), (0.005, 0.75))
    rollout = start(http, "cascading", policy={"cascade": {"max_drop": 0.005}}).json()
    assert ledger.rollout(rollout["id"]).cascade_threshold == 0.75
    assert ledger.route().cascade_threshold == 0.75
    status = http.get("/rollouts/current").json()
    assert (status["cascade_threshold"], status["policy"]["cascade"]) == (0.75, {"max_drop": 0.005})
    assert "cascade     treatment's answers stand from confidence 0.75 on" in render(status)
    assert "proven to lose at most 0.5 pt" in render(status)


def test_without_a_cascade_in_the_policy_no_threshold_is_set(http: TestClient, ledger: Ledger) -> None:
    cascading((0.005, 0.75))
    start(http, "cascading")
    assert ledger.route().cascade_threshold is None
    status = http.get("/rollouts/current").json()
    assert (status["cascade_threshold"], status["policy"]["cascade"]) == (None, None)
    assert "cascade" not in render(status).replace("points-cascading", "")


def test_a_loss_that_is_not_proven_is_refused_and_the_proven_ones_named(http: TestClient) -> None:
    cascading((0.0025, 0.9), (0.005, 0.75))
    reply = start(http, "cascading", policy={"cascade": {"max_drop": 0.001}})
    refused(reply, 400, "has no threshold for 0.001; it must be one of 0.0025, 0.005, or null")
    assert http.get("/rollouts").json() == {"rollouts": []}


@pytest.mark.parametrize("variant", ["same", "unmeasured", "cascading"])
def test_a_cascade_of_a_variant_that_has_none_is_refused(http: TestClient, variant: str) -> None:
    cascading()
    reply = start(http, variant, policy={"cascade": {"max_drop": 0.005}}, override="to see what happens")
    refused(reply, 400, "it has none: compress the variant again")


def test_a_second_rollout_waits_for_the_first(http: TestClient) -> None:
    start(http)
    refused(start(http, "points-worse"), 409, "under way")


# -- steering and looking ------------------------------------------------------------------------------------


def test_a_pause_and_a_resume_are_decisions_of_the_operators(http: TestClient) -> None:
    start(http)
    body = {"reason": "lunch", "actor": "me"}
    assert http.post("/rollouts/current/pause", json=body, headers=TOKEN).json()["state"] == "held"
    assert http.post("/rollouts/current/resume", json=body, headers=TOKEN).json()["state"] == "pending"
    decisions = http.get("/rollouts/current/decisions").json()["decisions"]
    assert [(d["verb"], d["actor"]) for d in decisions[1:]] == [("pause", "me"), ("resume", "me")]


def test_a_rollback_is_final(http: TestClient) -> None:
    rollout = start(http).json()
    body = http.post(f"/rollouts/{rollout['id']}/rollback", json={"reason": "no"}, headers=TOKEN).json()
    assert (body["state"], body["weight"]) == ("rolled_back", 0)
    for verb in ("promote", "pause", "resume", "rollback"):
        refused(http.post(f"/rollouts/{rollout['id']}/{verb}", headers=TOKEN), 409, "final")


def test_a_full_promotion_is_an_override(http: TestClient) -> None:
    start(http)
    refused(http.post("/rollouts/current/promote", json={"full": True}, headers=TOKEN), 409, "not loaded")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/rollouts/current/promote", {}, 409),
        ("/rollouts/current/resume", {}, 409),
        ("/rollouts/current/explode", {}, 404),
        ("/rollouts/current/promote full", {}, 404),
        ("/rollouts/points-99/pause", {}, 404),
        ("/rollouts/%00/pause", {}, 404),
        ("/rollouts/current/pause", {"full": True}, 400),
        ("/rollouts/current/pause", {"reason": 1}, 400),
        ("/rollouts/current/pause", {"reason": "x" * 501}, 400),
        ("/rollouts/current/pause", {"actor": ""}, 400),
        ("/rollouts/current/pause", {"why": "because"}, 400),
        ("/rollouts/current/pause", [], 400),
    ],
)
def test_a_verb_that_makes_no_sense_is_refused(http: TestClient, path: str, body: Any, status: int) -> None:
    start(http)
    refused(http.post(path, json=body, headers=TOKEN), status)
    assert http.get("/rollouts/current").json()["state"] == "pending"


def test_a_verb_needs_no_body(http: TestClient) -> None:
    start(http)
    assert http.post("/rollouts/current/pause", headers=TOKEN).status_code == 200


@pytest.mark.parametrize("path", ["/rollouts/current", "/rollouts/points-9", "/rollouts/points-9/decisions"])
def test_a_rollout_that_does_not_exist_is_not_found(http: TestClient, path: str) -> None:
    refused(http.get(path), 404)


def test_rollouts_are_listed_newest_first(http: TestClient) -> None:
    first = start(http).json()
    http.post("/rollouts/current/rollback", json={"reason": "next"}, headers=TOKEN)
    second = start(http, "points-worse").json()
    listed = http.get("/rollouts").json()["rollouts"]
    assert [rollout["id"] for rollout in listed] == [second["id"], first["id"]]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/feedback"),
        ("PUT", "/feedback"),
        ("DELETE", "/rollouts"),
        ("PUT", "/rollouts/current"),
        ("POST", "/rollouts/verify"),
    ],
)
def test_other_methods_are_not_allowed(http: TestClient, method: str, path: str) -> None:
    assert http.request(method, path).status_code == 405


def test_every_route_says_so_when_the_ledger_is_away(http: TestClient, ledger: Ledger) -> None:
    start(http)
    ledger.path.rename(ledger.path.with_name("aside"))
    for reply in (
        http.get("/rollouts"),
        http.get("/rollouts/current"),
        http.get("/rollouts/current/decisions"),
        http.get("/rollouts/verify"),
        http.post("/rollouts/current/rollback", headers=TOKEN),
        start(http),
        feedback(http, GOOD),
    ):
        refused(reply, 503, "ledger")
        assert reply.headers["Retry-After"] == "1"


# -- the chain of decisions ----------------------------------------------------------------------------------


def tamper(ledger: Ledger) -> None:
    """Change the second decision past the triggers."""
    db = sqlite3.connect(ledger.path)
    db.execute("DROP TRIGGER decisions_stand")
    db.execute("UPDATE decisions SET reason = 'dinner' WHERE seq = 2")
    db.commit()
    db.close()


def paused(http: TestClient) -> None:
    """Two decisions."""
    start(http)
    http.post("/rollouts/current/pause", json={"reason": "lunch"}, headers=TOKEN)


def test_the_chain_of_decisions_is_verified_without_a_token(http: TestClient) -> None:
    assert http.get("/rollouts/verify").json() == {"count": 0, "head": GENESIS, "problem": None}
    paused(http)
    body = http.get("/rollouts/verify").json()
    assert (body["count"], body["problem"]) == (2, None)
    assert http.get("/rollouts/verify", params={"expect": body["head"].upper()}).json() == body
    assert http.get("/rollouts/verify", params={"expect": GENESIS}).json() == body


def test_a_decision_that_was_changed_in_the_file_is_named(http: TestClient, ledger: Ledger) -> None:
    paused(http)
    tamper(ledger)
    reply = http.get("/rollouts/verify")
    assert (reply.status_code, reply.json()["count"]) == (200, 1)
    assert (reply.json()["problem"]["seq"], reply.json()["problem"]["how"]) == (2, "changed")


def test_a_head_that_is_not_in_the_chain_is_unknown(http: TestClient) -> None:
    paused(http)
    problem = http.get("/rollouts/verify", params={"expect": "ab" * 32}).json()["problem"]
    assert (problem["seq"], problem["how"]) == (None, "unknown")


@pytest.mark.parametrize("expect", ["", "3f", "x" * 64, "a" * 65, "٣" * 64])
def test_a_head_that_is_no_digest_is_refused(http: TestClient, expect: str) -> None:
    refused(http.get("/rollouts/verify", params={"expect": expect}), 400, "64 hexadecimal digits")


@pytest.fixture
def trimtab(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`trimtab rollout` with a gateway behind it."""

    def connect(_: str | None) -> Client:
        client = Client("http://gateway")
        client._http.close()
        client._http = TestClient(make_app())
        return client

    monkeypatch.setattr(cli, "_client", connect)
    return lambda *words: CliRunner().invoke(cli.rollout_app, words)


def test_the_command_line_says_in_one_line_that_the_chain_is_whole(
    http: TestClient, trimtab: Callable[..., Result]
) -> None:
    start(http)
    head = http.get("/rollouts/verify").json()["head"]
    one = trimtab("history", "--verify")
    assert (one.exit_code, one.stdout) == (0, f"1 decision, chain whole, head {head}\n")
    http.post("/rollouts/current/pause", headers=TOKEN)
    two = trimtab("history", "--verify", "--expect", head)
    assert two.exit_code == 0
    assert two.stdout.startswith("2 decisions, chain whole, head ")
    body = json.loads(trimtab("history", "--verify", "--json").stdout)
    assert body == http.get("/rollouts/verify").json()


def test_the_command_line_names_the_first_bad_decision_and_exits_with_1(
    http: TestClient, ledger: Ledger, trimtab: Callable[..., Result]
) -> None:
    paused(http)
    unknown = trimtab("history", "--verify", "--expect", "ab" * 32)
    assert (unknown.exit_code, unknown.stdout.count("\n")) == (1, 1)
    assert unknown.stdout.startswith(f"no decision has the digest {'ab' * 32}")
    tamper(ledger)
    changed = trimtab("history", "--verify")
    assert (changed.exit_code, changed.stdout.count("\n")) == (1, 1)
    assert changed.stdout.startswith("decision 2 does not match its digest")
    as_json = trimtab("history", "--verify", "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["problem"]["seq"]) == (1, 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--expect", "ab" * 32), "pass both"),
        (("--verify", "--id", "current"), "leave --id out"),
        (("--verify", "--expect", "3f"), "64 hexadecimal digits"),
    ],
)
def test_a_wrong_call_of_verify_is_refused(
    trimtab: Callable[..., Result], words: tuple[str, ...], says: str
) -> None:
    error = trimtab("history", *words).exception
    assert isinstance(error, ServingError)
    assert says in str(error)
