"""The Shadow service: answer mirrored inputs with the arm that did not serve them, and write the pairs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bentoml
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route as HttpRoute

from compression.variant import FULL, tag_name
from compression.workload import Workload, load_workload
from monitoring.errors import LedgerUnavailable
from monitoring.ledger import PairRow
from services.arms import Model
from services.errors import ArmFailed
from services.live import Live, LiveState
from services.process import ProcessSampler
from services.routing import TREATMENT
from services.settings import Settings

__all__ = ["Shadow", "answer_samples"]

log = logging.getLogger("trimtab.shadow")

MAX_RECORD_BYTES = 16 << 10
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
        samples: as the gateway's `_offer_to_mirror` makes them.
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
        classes, confidences = _answer(other, sample["records"], workload, deadline)
        served = sample["classes"], sample["confidences"]
        control, treatment = (
            ((classes, confidences), served) if served_by_treatment else (served, (classes, confidences))
        )
        index = sample["judged"]
        record = sample["records"][index]
        rows.append(
            PairRow(
                rollout_id=sample["rollout_id"],
                request_id=sample["request_id"],
                index=index,
                served_arm=sample["arm"],
                control=control[0][index],
                treatment=treatment[0][index],
                control_confidence=control[1][index],
                treatment_confidence=treatment[1][index],
                groups=_groups(record, workload),
                record=_kept(record),
                created_at=sample["at"],
            )
        )
    return rows, len(samples)


def _kept(record: Mapping[str, object]) -> Mapping[str, object]:
    """What of a record the ledger keeps for reports: all of it, unless a client made it huge."""
    return record if len(orjson.dumps(record)) <= MAX_RECORD_BYTES else {}


def _groups(record: Mapping[str, object], workload: Workload) -> dict[str, str]:
    """The record's groups; none when the workload cannot tell, so that one record does not cost a batch."""
    try:
        return workload.groups(record)
    except Exception as error:  # noqa: BLE001  # the user's code; a record may lack what the model does not need
        log.warning("a record belongs to no group: %r", error)
        return {}


def _answer(
    model: Model | None, records: Sequence[Mapping[str, object]], workload: Workload, deadline: float
) -> tuple[list[int | None], list[float | None]]:
    if model is not None:
        try:
            predictions = model.run_within(workload.encode(records), deadline).predictions
            return predictions.classes.tolist(), predictions.confidences.tolist()
        except ArmFailed as error:
            log.warning("shadow arm failed: %s", error)
        except Exception as error:  # noqa: BLE001  # the user's code; what it does to one sample is that sample's
            log.warning("a sample cannot be answered: %r", error)
    return [None] * len(records), [None] * len(records)


async def _mirror(request: Request) -> JSONResponse:
    shadow: Any = bentoml.get_current_service()
    samples = orjson.loads(await request.body())
    try:
        # One batch at a time, whatever the number of gateways: batches that run beside each other would make each
        # other slow, and what is slow counts as an arm that cannot answer.
        async with shadow.turn:
            taken = await asyncio.to_thread(shadow.store, samples)
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

    @bentoml.on_startup
    def start(self) -> None:
        self._state.start()
        self._process.start()

    @bentoml.on_shutdown
    def stop(self) -> None:
        self._process.stop()
        self._state.stop()

    def store(self, samples: list[dict[str, Any]]) -> int:
        """Form pairs and write them; returns how many samples, from the front, are done with.

        The budget keeps the gateway from giving up on a batch that a slow model is still working on.

        Raises:
            LedgerUnavailable: nothing was stored; the gateway keeps the samples and sends them again.
        """
        if not self._state.ledger_up:
            raise LedgerUnavailable("the shadow does not know the rollout yet: the ledger cannot be read")
        live = self._state.live
        # More than the gateway's own deadline: here nobody waits, and a busy machine is not the candidate's fault.
        deadline = max(1.0, 2 * self._settings.treatment_deadline)
        rows, taken = answer_samples(
            samples, live, self._workload, deadline, _BUDGET_SECONDS, self._is_judged
        )
        if rows and self._state.ledger.record_pairs(rows):  # a batch that is sent again adds nothing
            self._count(rows, live)
        return taken

    def _is_judged(self) -> bool:
        """Whether pairs still count: after a rollback nobody looks at them, and a bad candidate is slow to ask."""
        return self._state.live.route.state != "rolled_back"

    def _count(self, rows: Sequence[PairRow], live: Live) -> None:
        name = live.treatment.name if live.treatment is not None else ""
        for row in rows:
            missing = row.control is None or row.treatment is None
            outcome = "missing" if missing else "agree" if row.control == row.treatment else "disagree"
            self._metrics.PAIRS.labels(name, outcome).inc()
