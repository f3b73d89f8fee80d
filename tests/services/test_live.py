from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from compression.variant import Variant
from compression.workload import Workload
from monitoring.errors import LedgerUnavailable
from monitoring.ledger import Ledger
from monitoring.policy import Policy
from monitoring.rollout import Rollout
from monitoring.tally import Counts, TallyKey
from services import live as module
from services.live import LiveState
from services.settings import Settings
from tests import models

pytestmark = pytest.mark.usefixtures("variants")


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come about in time")


@pytest.fixture
def state(settings: Settings, workload: Workload, variants: dict[str, Variant]) -> Iterator[LiveState]:
    state = LiveState(settings, workload, "gateway", variants["full"].tag)
    yield state
    state.stop()


def begin(ledger: Ledger, variants: dict[str, Variant], name: str, **policy: Any) -> Rollout:
    return ledger.create_rollout(
        workload="points",
        control=variants["full"].tag,
        treatment=variants[name].tag,
        policy=Policy(**policy),
        actor="test",
        now=time.time(),
    )


def test_without_a_rollout_control_serves(state: LiveState, variants: dict[str, Variant]) -> None:
    state.start()
    assert state.live.control.tag == variants["full"].tag
    assert state.live.treatment is None
    assert (state.live.route.rollout_id, state.live.route.weight) == (None, 0)


def test_a_new_rollout_loads_its_treatment(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    state.start()
    rollout = begin(ledger, variants, "same")
    live = until(lambda: state.live if state.live.treatment else None)
    assert live.treatment.tag == variants["same"].tag
    assert live.route.rollout_id == rollout.id
    assert live.error is None


def test_a_restarted_worker_knows_the_split_before_its_first_request(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    rollout = begin(ledger, variants, "same")
    ledger.apply(rollout, replace(rollout, state="step", step=3, weight=25), None)
    state.start()
    assert state.live.route.weight == 25
    assert state.live.treatment is not None


def test_a_change_of_weight_keeps_the_models_that_are_loaded(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    rollout = begin(ledger, variants, "same")
    state.start()
    before = state.live
    ledger.apply(rollout, replace(rollout, state="step", step=3, weight=25), None)
    after = until(lambda: state.live if state.live.route.weight == 25 else None)
    assert after.treatment is before.treatment
    assert after.control is before.control


def test_a_rollback_is_seen_within_one_second(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    rollout = begin(ledger, variants, "same")
    stored = ledger.apply(rollout, replace(rollout, state="step", step=3, weight=25), None)
    assert stored is not None
    state.start()
    started = time.monotonic()
    ledger.apply(stored, replace(stored, state="rolled_back", weight=0), None)
    until(lambda: state.live.route.weight == 0)
    assert time.monotonic() - started < 1.0


def test_the_next_rollout_takes_the_old_treatment_out(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    rollout = begin(ledger, variants, "same")
    state.start()
    ledger.apply(rollout, replace(rollout, state="rolled_back"), None)
    begin(ledger, variants, "worse")
    live = until(
        lambda: state.live if state.live.treatment and state.live.treatment.name == "worse" else None
    )
    beat = until(
        lambda: next((b for b in ledger.workers(time.time()) if variants["worse"].tag in b.loaded), None)
    )
    assert beat.loaded == (variants["full"].tag, variants["worse"].tag)
    assert live.control.tag == variants["full"].tag


def test_nobody_is_sent_to_an_old_treatment_under_a_new_route(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = begin(ledger, variants, "same")
    state.start()
    ledger.apply(rollout, replace(rollout, state="rolled_back"), None)
    seen = []
    real = module.load_model

    def watching(*arguments: Any, **options: Any) -> Any:
        seen.append(state.live.treatment)
        return real(*arguments, **options)

    monkeypatch.setattr(module, "load_model", watching)
    begin(ledger, variants, "worse")
    until(lambda: state.live.treatment and state.live.treatment.name == "worse")
    assert seen == [None]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("hopeless", None, "NaN"),
        ("no-onnx", b"garbage", "does not load"),
        (
            "other-output",
            models.points_onnx().replace(b"logits", b"scores"),
            "inputs or outputs are not those",
        ),
        (
            "odd-type",
            models.parsed(
                '<ir_version: 10, opset_import: ["" : 21]> g (bfloat16[N] x) => (bfloat16[N] y) { y = Identity(x) }'
            ),
            "bfloat16",
        ),
    ],
)
def test_a_treatment_that_does_not_load_is_reported_in_the_heartbeat(
    state: LiveState,
    ledger: Ledger,
    variants: dict[str, Variant],
    name: str,
    content: bytes | None,
    said: str,
) -> None:
    saved = variants if content is None else {**variants, name: models.save(name, content)}
    rollout = begin(ledger, saved, name)
    state.start()
    beat = until(lambda: next((beat for beat in ledger.workers(time.time()) if beat.error), None))
    assert said in beat.error
    assert beat.revision == rollout.revision
    assert saved[name].tag not in beat.loaded
    assert state.live.treatment is None


def test_a_treatment_that_did_not_load_is_tried_again(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_LOAD_SECONDS", 0.05)
    real, troubles = module.load_variant, [OSError("disk asleep"), OSError("still asleep")]

    def sleepy(tag: str) -> Variant:
        if troubles:
            raise troubles.pop()
        return real(tag)

    begin(ledger, variants, "same")
    monkeypatch.setattr(module, "load_variant", sleepy)
    state.start()
    assert state.live.error is not None
    until(lambda: state.live.treatment is not None)
    assert state.live.error is None


def test_a_route_that_names_another_control_reloads_it(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    newer = models.save("full", models.points_onnx(), seed=1)
    assert newer.tag != variants["full"].tag
    state.start()
    begin(ledger, {**variants, "full": newer}, "same")
    until(lambda: state.live.control.tag == newer.tag)
    assert state.live.treatment is not None


def test_a_control_that_is_gone_leaves_the_one_that_serves(
    state: LiveState, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    state.start()
    ledger.create_rollout(
        workload="points",
        control="points-full:000000000000",
        treatment=variants["same"].tag,
        policy=Policy(),
        actor="test",
        now=time.time(),
    )
    until(lambda: state.live.error)
    assert state.live.control.tag == variants["full"].tag


def test_with_the_ledger_gone_the_last_split_stands_and_with_it_back_the_new_one_comes(
    state: LiveState, ledger: Ledger, settings: Settings, variants: dict[str, Variant]
) -> None:
    rollout = begin(ledger, variants, "same")
    stored = ledger.apply(rollout, replace(rollout, state="step", step=3, weight=25), None)
    assert stored is not None
    state.start()
    until(lambda: len(state.ledger._store._open) == 3)  # this thread's, the poller's and the reporter's
    aside = settings.home / "aside"
    settings.ledger_path("points").rename(aside)
    until(lambda: not state.ledger_up)
    assert state.live.route.weight == 25
    assert state.live.treatment is not None
    aside.rename(settings.ledger_path("points"))
    until(lambda: state.ledger_up)
    ledger.apply(stored, replace(stored, weight=50), None)
    until(lambda: state.live.route.weight == 50)


def test_a_worker_that_starts_without_a_ledger_serves_control(
    settings: Settings, workload: Workload, variants: dict[str, Variant]
) -> None:
    settings.home.parent.mkdir(exist_ok=True)
    settings.home.write_text("a file where the folder should be")
    state = LiveState(settings, workload, "gateway", variants["full"].tag)
    state.start()
    assert not state.ledger_up
    assert state.live.control.tag == variants["full"].tag
    state.stop()


def test_a_locked_ledger_does_not_hold_up_the_route(
    state: LiveState, ledger: Ledger, settings: Settings, variants: dict[str, Variant]
) -> None:
    rollout = begin(ledger, variants, "same")
    state.start()
    lock = sqlite3.connect(settings.ledger_path("points"), isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    state.count(rollout.id, "requests", "control", 0, time.time())
    time.sleep(0.2)
    assert state.ledger_up
    lock.execute("ROLLBACK")
    lock.close()


def test_the_view_is_handed_on_when_it_changes(
    settings: Settings, workload: Workload, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    seen: list[Any] = []
    state = LiveState(settings, workload, "gateway", variants["full"].tag, on_change=seen.append)
    state.start()
    begin(ledger, variants, "same")
    until(lambda: seen and seen[-1].treatment)
    state.stop()


class FakeLedger:
    """Adds counts as the ledger does, and fails before or after the commit when told to."""

    def __init__(self) -> None:
        self.applied: dict[tuple[str, int], dict[Any, dict[int, int]]] = {}
        self.fail: list[str] = []
        self.at: list[float] = []

    def add_counts(
        self, source: str, sequence: int, deltas: Mapping[tuple[str, TallyKey], Counts], at: float = 0.0
    ) -> bool:
        self.at.append(at)
        trouble = self.fail.pop(0) if self.fail else ""
        if trouble == "before":
            raise LedgerUnavailable("locked")
        fresh = (source, sequence) not in self.applied
        if fresh:
            self.applied[source, sequence] = {key: dict(counts) for key, counts in deltas.items()}
        if trouble == "after":
            raise LedgerUnavailable("the disk answered too late")
        return fresh

    def total(self) -> int:
        return sum(
            n for deltas in self.applied.values() for counts in deltas.values() for n in counts.values()
        )


@pytest.fixture
def fake(state: LiveState) -> FakeLedger:
    fake = FakeLedger()
    state._ledger = fake  # type: ignore[assignment]
    return fake


@pytest.mark.parametrize("troubles", [[], ["before"], ["after"], ["before", "after", "before", "after"]])
def test_every_count_arrives_exactly_once_whenever_the_ledger_fails(
    state: LiveState, fake: FakeLedger, troubles: list[str]
) -> None:
    fake.fail = list(troubles)
    counted = 0
    for _ in range(len(troubles) + 2):
        for outcome in (0, 0, 1):
            state.count("points-1", "requests", "control", outcome, 1000.0)
            counted += 1
        try:
            state.flush()
        except LedgerUnavailable:
            continue
    state.flush()
    state.flush()
    assert fake.total() == counted


def test_counts_go_into_their_time_bucket(state: LiveState, fake: FakeLedger) -> None:
    state.count("points-1", "latency_p95", "treatment", 1, 1009.9)
    state.count("points-1", "latency_p95", "treatment", 1, 1010.0)
    state.flush()
    (deltas,) = fake.applied.values()
    assert deltas == {
        ("points-1", TallyKey("latency_p95", "treatment", 100)): {1: 1},
        ("points-1", TallyKey("latency_p95", "treatment", 101)): {1: 1},
    }


def test_a_flush_says_when_it_was_made_so_that_its_source_is_not_forgotten_early(
    state: LiveState, fake: FakeLedger
) -> None:
    state.count("points-1", "requests", "control", 0, 1000.0)
    state.flush()
    assert abs(fake.at[0] - time.time()) < 5


def test_counts_of_the_last_moment_are_flushed_on_stopping(
    settings: Settings, workload: Workload, ledger: Ledger, variants: dict[str, Variant]
) -> None:
    rollout = begin(ledger, variants, "same")
    state = LiveState(replace(settings, flush_interval=30.0), workload, "gateway", variants["full"].tag)
    state.start()
    state.count(rollout.id, "requests", "control", 0, time.time())
    state.stop()
    assert ledger.totals(rollout.id, 0)["requests", "control"] == {0: 1}


def test_the_last_flush_brings_what_came_after_one_that_failed(state: LiveState, fake: FakeLedger) -> None:
    fake.fail = ["before"]
    state.count("points-1", "requests", "control", 0, 1000.0, 5)
    with pytest.raises(LedgerUnavailable):
        state.flush()
    state.count("points-1", "requests", "control", 0, 1000.0, 7)
    state._stop.set()
    state._report_forever()
    assert fake.total() == 12


def test_counts_wait_in_bounded_memory_while_the_ledger_is_away(
    state: LiveState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_PENDING_KEYS", 10)
    for bucket in range(100):
        state.count("points-1", "requests", "control", 0, bucket * 10.0)
    assert len(state._counts) == 10
