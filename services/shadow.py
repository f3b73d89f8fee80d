"""The Shadow service: answer mirrored inputs with the arm that did not serve them, and write the pairs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bentoml
import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route as HttpRoute

from compression.cascade import keeps
from compression.variant import FULL, tag_name
from compression.workload import Workload, load_workload
from monitoring.errors import LedgerUnavailable
from monitoring.ledger import PairRow
from monitoring.tally import MIRROR
from services.arms import Model
from services.duty import DutyCycle
from services.errors import ArmFailed
from services.live import Live, LiveState
from services.process import ProcessSampler, give_way, speak
from services.routing import TREATMENT
from services.samples import unpacked
from services.settings import Settings

__all__ = ["Shadow", "answer_samples"]

log = logging.getLogger("trimtab.shadow")

_Answer = tuple[int | None, float | None]
"""A class and its confidence, or nothing."""

_BUDGET_SECONDS = 5.0


def answer_samples(
    samples: Sequence[Mapping[str, Any]],
    live: Live,
    workload: Workload,
    deadline: float = 10.0,
    budget: float = float("inf"),
    wanted: Callable[[], bool] = lambda: True,
) -> tuple[list[PairRow], int]:
    """Run the other arm on each sample's records, and form a pair of the record that is judged.

    One record of a request is judged, however many it has: records that come together are alike, and evidence that
    counted each of them as news would be wrong more often than it says.

    Requests are run one by one, never batched together: with dynamic quantization an answer depends on what
    it was batched with, and a pair must compare what each arm would have told the user. Where the other arm
    cannot answer, its side of the pair is None, and the evidence takes the worst case for it.

    Args:
        samples: as the engine makes them.
        live: the arms loaded here. Samples of another rollout than the live one are dropped: its tallies are
            closed.
        budget: seconds after which no further sample is begun; the first one always is.
        deadline: seconds after which a run counts as failed; a candidate that hangs must not end the evidence.
        wanted: asked before each sample; False drops the rest.

    Returns:
        The pairs, and how many samples, from the front, are done with.
    """
    rows: list[PairRow] = []
    end = time.monotonic() + budget
    for taken, sample in enumerate(samples):
        if not wanted():
            break
        if taken and time.monotonic() >= end:
            return rows, taken
        if sample["rollout_id"] != live.route.rollout_id:
            continue
        served_by_treatment = sample["arm"] == TREATMENT
        other = live.control if served_by_treatment else live.treatment
        if sample["treatment_failed"]:
            other = None
        index = sample["judged"]
        served = _served(sample, live.control)
        answered = _answer(other, sample, workload, deadline)
        if not served_by_treatment:
            answered = _cascaded(answered, served, live.route.cascade_threshold)
        control, treatment = (answered, served) if served_by_treatment else (served, answered)
        record, groups = _described(sample, index, workload)
        rows.append(
            PairRow(
                rollout_id=sample["rollout_id"],
                request_id=sample["request_id"],
                index=index,
                served_arm=sample["arm"],
                control=control[0],
                treatment=treatment[0],
                control_confidence=control[1],
                treatment_confidence=treatment[1],
                groups=groups,
                record=record,
                created_at=sample["at"],
            )
        )
    return rows, len(samples)


def _groups(record: Mapping[str, object], workload: Workload) -> dict[str, str]:
    """The record's groups; none when the workload cannot tell, so that one record does not cost a batch."""
    try:
        return workload.groups(record)
    except Exception as error:  # noqa: BLE001  # the user's code; a record may lack what the model does not need
        log.warning("a record belongs to no group: %r", error)
        return {}


def _described(
    sample: Mapping[str, Any], index: int, workload: Workload
) -> tuple[Mapping[str, object], Mapping[str, str]]:
    """The judged record, and its groups. Tensors say neither; the client may have named the groups."""
    if "records" in sample:
        record = sample["records"][index]
        return record, _groups(record, workload)
    groups = sample["groups"] or [{}]
    return {}, groups[index if len(groups) > 1 else 0]


_NOTHING: _Answer = (None, None)


def _served(sample: Mapping[str, Any], model: Model) -> _Answer:
    """What the user was told of the judged record; all arms are read alike.

    Tensors that nobody can read are no answer; whether there is a pair must not depend on that.
    """
    if "answer" in sample:
        class_, confidence = sample["answer"]
        return class_, confidence
    try:
        predictions = model.decode(tuple(unpacked(sample["outputs"]).values()))
    except ArmFailed as error:
        log.warning("%s", error)
        return _NOTHING
    return int(predictions.classes[0]), float(predictions.confidences[0])


def _answer(model: Model | None, sample: Mapping[str, Any], workload: Workload, deadline: float) -> _Answer:
    """What the model says of the judged record; it is asked about all that came with it."""
    if model is None:
        return _NOTHING
    try:
        inputs = workload.encode(sample["records"]) if "records" in sample else unpacked(sample["tensors"])
        predictions = model.run_within(inputs, sample["rows"], deadline)
    except ArmFailed as error:
        log.warning("shadow arm failed: %s", error)
    except Exception as error:  # noqa: BLE001  # the user's code; what it does to one sample is that sample's
        log.warning("a sample cannot be answered: %r", error)
    else:
        index = sample["judged"]
        return int(predictions.classes[index]), float(predictions.confidences[index])
    return _NOTHING


def _cascaded(answer: _Answer, control: _Answer, threshold: float | None) -> _Answer:
    """What a user would have got of the treatment: control's answer where the treatment is not sure."""
    confidence = answer[1]
    if threshold is None or confidence is None or keeps(np.array(confidence), threshold):
        return answer
    return control


async def _mirror(request: Request) -> JSONResponse:
    shadow: Any = bentoml.get_current_service()
    body = await request.body()
    try:
        # One batch at a time, whatever the number of gateways: batches that run beside each other would make each
        # other slow, and what is slow counts as an arm that cannot answer. The rest that the CPU budget asks for is
        # taken within the turn, for all of them. What is not taken then stays with its gateway, which knows what
        # else waits and sheds what is too much.
        async with shadow.turn:
            allowance = await shadow.duty.allowance()
            taken = await asyncio.to_thread(shadow.store, body, allowance) if allowance else 0
    except LedgerUnavailable as error:
        return JSONResponse({"error": str(error)}, 503)
    return JSONResponse({"taken": taken})


@bentoml.service(name="Shadow", workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
@bentoml.asgi_app(Starlette(routes=[HttpRoute("/mirror", _mirror, methods=["POST"])]))
class Shadow:
    """Answers mirrored inputs off the request path. Its death costs evidence, never a reply."""

    def __init__(self) -> None:
        # Imported here, when BentoML has told this process where its metrics files are.
        from monitoring import metrics

        self._metrics = metrics
        self._settings = Settings.from_env()
        self._workload = load_workload(self._settings.workload)
        self._state = LiveState(self._settings, self._workload, "shadow", tag_name(self._workload.name, FULL))
        self._process = ProcessSampler("shadow")
        self.turn = asyncio.Lock()
        self.duty = DutyCycle(self._settings.mirror_cpu)

    @bentoml.on_startup
    async def start(self) -> None:
        speak()
        give_way()  # in the event loop's thread
        await asyncio.to_thread(self._state.start)
        self._process.start()

    @bentoml.on_shutdown
    def stop(self) -> None:
        self._process.stop()
        self._state.stop()

    def store(self, body: bytes, allowance: float) -> int:
        """Form pairs and write them; returns how many samples, from the front, are done with.

        Args:
            body: the samples, a JSON list.
            allowance: seconds after which no further sample is begun. (No gateway must give up on a batch that a slow
                model is still working on, so there is a limit of the shadow's own too.)

        Raises:
            LedgerUnavailable: nothing was stored; the gateway keeps the samples and sends them again.
        """
        if not self._state.ledger_up:
            raise LedgerUnavailable("the shadow does not know the rollout yet: the ledger cannot be read")
        live = self._state.live
        begun = self.duty.begin()
        try:
            # More than the gateway's own deadline: nobody waits here, and a busy machine is not the candidate's fault.
            deadline = max(1.0, 2 * self._settings.treatment_deadline)
            budget = min(_BUDGET_SECONDS, allowance)
            rows, taken = answer_samples(
                orjson.loads(body), live, self._workload, deadline, budget, self._is_judged
            )
            if rows and self._state.ledger.record_pairs(rows):  # a batch that is sent again adds nothing
                self._count(rows, live)
        finally:
            occupied = self.duty.end(begun)
        if rows:  # What the next rate of sampling is reckoned from.
            now, rollout_id = time.time(), rows[0].rollout_id
            self._state.count(rollout_id, MIRROR, "samples", 0, now, len(rows))
            self._state.count(rollout_id, MIRROR, "microseconds", 0, now, round(occupied * 1e6))
        return taken

    def _is_judged(self) -> bool:
        """Whether pairs still count: after a rollback nobody looks at them, and a bad candidate is slow to ask."""
        return self._state.live.route.state != "rolled_back"

    def _count(self, rows: Sequence[PairRow], live: Live) -> None:
        name = live.treatment.name if live.treatment is not None else ""
        for outcome, number in Counter(map(_outcome, rows)).items():
            self._metrics.PAIRS.labels(name, outcome).inc(number)


def _outcome(row: PairRow) -> str:
    if row.control is None or row.treatment is None:
        return "missing"
    return "agree" if row.control == row.treatment else "disagree"
