"""The label queue over HTTP, with a real ledger and no server."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import bentoml
import pytest

with warnings.catch_warnings():
    # Starlette warns about the library that its test client is made with.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

from compression.workload import Workload
from monitoring.groups import GroupSpec
from monitoring.label_queue import in_sample
from monitoring.ledger import LabelRow, Ledger, PairRow
from monitoring.policy import parse_policy
from services.control.app import make_app
from services.control.auth import RequestIds
from services.control.labels import MAX_ITEMS

TOKEN = {"Authorization": "Bearer s3cret"}
IDS = RequestIds("key")
QUEUE = "/rollouts/current/label-queue"


class Gateway:
    """What the routes need of a gateway."""

    def __init__(self, workload: Workload, ledger: Ledger) -> None:
        self.workload = workload
        self.state = SimpleNamespace(ledger=ledger)
        self.token = "s3cret"
        self.request_ids = IDS

    def count_feedback(self, result: Any) -> None: ...

    def count_rejected_feedback(self) -> None: ...


@pytest.fixture
def http(workload: Workload, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    gateway = Gateway(workload, ledger)
    monkeypatch.setattr(bentoml, "get_current_service", lambda: gateway, raising=False)
    with TestClient(make_app()) as client:
        yield client


def started(ledger: Ledger, deadline_s: float = 3600.0, label_share: float | None = None) -> str:
    rollout = ledger.create_rollout(
        workload="points",
        control="points-full:1",
        treatment="points-same:1",
        policy=parse_policy(
            {
                "label_deadline_s": deadline_s,
                "guardrails": {
                    "equalized_odds": {"enabled": label_share is not None, "label_share": label_share or 1.0}
                },
            }
        ),
        groups=(GroupSpec("A=1", 0.5, 0.0),) if label_share is not None else (),
        actor="ada",
        now=time.time(),
    )
    return rollout.id


@pytest.fixture
def rollout_id(ledger: Ledger) -> str:
    return started(ledger)


def add(
    ledger: Ledger,
    rollout_id: str,
    request_id: str,
    control: int | None = 1,
    treatment: int | None = 1,
    age: float = 0.0,
) -> float:
    """A pair of a request made `age` seconds ago; returns when that was."""
    at = time.time() - age
    row = PairRow(
        *(rollout_id, request_id, 0, "control", control, treatment, 0.9, 0.8),
        groups={"TEAM": "A"},
        record={"a": 0.5, "TEAM": "A"},
        created_at=at,
    )
    assert ledger.record_pairs([row]) == 1
    return at


def asked(http: TestClient, path: str = QUEUE, **query: Any) -> Any:
    reply = http.get(path, params=query, headers=TOKEN)
    assert reply.status_code == 200, reply.text
    return reply.json()


def listed(body: Any) -> list[str]:
    return [item["request_id"] for item in body["items"]]


def refused(reply: Any, status: int, says: str) -> None:
    """The reply must be a refusal of one field and one line."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert list(body) == ["error"]
    assert "\n" not in body["error"]
    assert says in body["error"]


def test_a_disagreement_is_listed_with_the_names_of_both_answers(
    http: TestClient, ledger: Ledger, rollout_id: str
) -> None:
    at = add(ledger, rollout_id, "q", 1, 0)
    assert asked(http) == {
        "items": [
            {
                "request_id": "q",
                "index": 0,
                "why": "disagreement",
                "probability": 1.0,
                "control": {"class": 1, "label": "high"},
                "treatment": {"class": 0, "label": "low"},
                "created_at": at,
                "deadline_at": at + 3600,
                "groups": {"TEAM": "A"},
                "record": {"a": 0.5, "TEAM": "A"},
            }
        ],
        "disagreements_waiting": 1,
    }


def test_a_class_that_the_workload_no_longer_has_is_listed_by_its_index(
    http: TestClient, ledger: Ledger, rollout_id: str
) -> None:
    add(ledger, rollout_id, "q", 1, 7)
    assert asked(http)["items"][0]["treatment"] == {"class": 7, "label": None}


def test_a_label_takes_its_pair_off_the_list(http: TestClient, ledger: Ledger, rollout_id: str) -> None:
    add(ledger, rollout_id, "old", 1, 0, age=9)
    add(ledger, rollout_id, "new", 0, 1)
    assert listed(asked(http)) == ["old", "new"]
    ledger.record_labels([LabelRow("old", 0, 1, time.time())])
    assert listed(asked(http)) == ["new"]


def test_pairs_whose_deadline_has_passed_or_that_lack_an_answer_are_not_listed(
    http: TestClient, ledger: Ledger
) -> None:
    rollout_id = started(ledger, deadline_s=60)
    add(ledger, rollout_id, "late", 1, 0, age=61)
    add(ledger, rollout_id, "late too", age=61)
    add(ledger, rollout_id, "unanswered", 1, None)
    add(ledger, rollout_id, "waits", 1, 0, age=50)
    assert asked(http, agreements=1) == {**asked(http), "disagreements_waiting": 1}
    assert listed(asked(http, agreements=1)) == ["waits"]


def test_agreements_are_sampled_at_the_rate_asked_for_after_all_disagreements(
    http: TestClient, ledger: Ledger, rollout_id: str
) -> None:
    requests = [f"q{i}" for i in range(60)]
    for request_id in requests:
        add(ledger, rollout_id, request_id)
    add(ledger, rollout_id, "differ", 1, 0)
    for rate in (0.0, 0.3, 1.0):
        drawn = [request_id for request_id in requests if in_sample(request_id, 0, rate)]
        body = asked(http, agreements=rate)
        assert listed(body) == ["differ", *drawn]
        assert {item["probability"] for item in body["items"] if item["why"] == "sample"} <= {rate}
        assert body["disagreements_waiting"] == 1


def test_one_agreement_in_a_hundred_is_listed_unless_another_share_is_asked_for(
    http: TestClient, ledger: Ledger, rollout_id: str
) -> None:
    drawn = next(f"q{i}" for i in range(10_000) if in_sample(f"q{i}", 0, 0.01))
    add(ledger, rollout_id, drawn)
    assert [item["probability"] for item in asked(http)["items"]] == [0.01]


def test_agreements_that_equalized_odds_wait_for_are_listed_whatever_share_was_asked_for(
    http: TestClient, ledger: Ledger
) -> None:
    rollout_id = started(ledger, label_share=0.3)
    requests = [f"q{i}" for i in range(60)]
    for request_id in requests:
        add(ledger, rollout_id, request_id)
    waited_for = [request_id for request_id in requests if in_sample(request_id, 0, 0.3)]
    assert waited_for
    assert listed(asked(http, agreements=0)) == waited_for
    assert set(waited_for) < set(listed(asked(http, agreements=0.6)))


def test_what_the_controller_has_counted_is_listed_for_as_long_as_a_label_is_of_use(
    http: TestClient, ledger: Ledger, rollout_id: str
) -> None:
    from monitoring.controller import count

    add(ledger, rollout_id, "same")
    add(ledger, rollout_id, "first", 1, 0)
    add(ledger, rollout_id, "second", 0, 1)
    count(ledger, ledger.rollout(rollout_id), time.time())
    assert ledger.cursor(rollout_id).labels_seq == 1
    assert listed(asked(http, agreements=0)) == ["first", "second"]
    assert listed(asked(http, agreements=1)) == ["first", "second", "same"]


def test_the_limit_cuts_the_list_and_not_the_count(http: TestClient, ledger: Ledger, rollout_id: str) -> None:
    for i in range(101):
        add(ledger, rollout_id, f"q{i:03}", 1, 0, age=200 - i)
    assert listed(asked(http, limit=2)) == ["q000", "q001"]
    assert len(asked(http)["items"]) == 100
    body = asked(http, limit=MAX_ITEMS)
    assert len(body["items"]) == body["disagreements_waiting"] == 101


def test_an_older_rollout_can_be_asked_for_by_its_id(
    http: TestClient, ledger: Ledger, rollout_id: str
) -> None:
    add(ledger, rollout_id, "q", 1, 0)
    assert listed(asked(http, f"/rollouts/{rollout_id}/label-queue")) == ["q"]


def test_a_rollout_that_does_not_exist_is_not_found(http: TestClient) -> None:
    refused(http.get(QUEUE, headers=TOKEN), 404, "no rollout yet")
    refused(http.get("/rollouts/points-9/label-queue", headers=TOKEN), 404, "points-9")


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer ", "Basic s3cret", "s3cret"])
def test_without_the_token_no_record_is_shown(
    http: TestClient, ledger: Ledger, rollout_id: str, authorization: str | None
) -> None:
    add(ledger, rollout_id, "q", 1, 0)
    headers = {} if authorization is None else {"Authorization": authorization}
    reply = http.get(QUEUE, params={"limit": "bad"}, headers=headers)
    refused(reply, 401, "users' records")
    assert "WWW-Authenticate" in reply.headers


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        (f"limit={MAX_ITEMS + 1}", "limit"),
        ("limit=1" + "0" * 400, "limit"),
        ("limit=many", "limit"),
        ("limit=1.5", "limit"),
        ("limit=", "limit"),
        ("agreements=-0.1", "agreements"),
        ("agreements=1.01", "agreements"),
        ("agreements=nan", "agreements"),
        ("agreements=inf", "agreements"),
        ("agreements=1%25", "agreements"),
        ("agreements=", "agreements"),
        ("limt=5", "limt"),
        ("a%0Ab=5", "a b"),
        ("%FF=5", "�"),
        ("x" * 500 + "=5", "x" * 40 + ":"),
    ],
)
def test_a_bad_question_is_refused_in_one_line(
    http: TestClient, rollout_id: str, query: str, says: str
) -> None:
    refused(http.get(f"{QUEUE}?{query}", headers=TOKEN), 400, says)


def test_the_queue_is_only_read(http: TestClient, rollout_id: str) -> None:
    refused(http.post(QUEUE, headers=TOKEN), 404, "no verb")
    assert http.put(QUEUE, headers=TOKEN).status_code == 405


def test_the_route_says_so_when_the_ledger_is_away(http: TestClient, ledger: Ledger, rollout_id: str) -> None:
    ledger.path.rename(ledger.path.with_name("aside"))
    for agreements in (0, 0.5):
        reply = http.get(QUEUE, params={"agreements": agreements}, headers=TOKEN)
        refused(reply, 503, "ledger")
        assert reply.headers["Retry-After"] == "1"
