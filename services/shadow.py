"""The Shadow service: answer mirrored inputs with the arm that did not serve them, and write the pairs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import bentoml
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route as HttpRoute

from compression.variant import FULL, load_variant, tag_name
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


def answer_samples(samples: Sequence[Mapping[str, Any]], live: Live, workload: Workload) -> list[PairRow]:
    """Run the other arm on each sample's records and form pairs.

    Requests are run one by one, never batched together: with dynamic quantization an answer depends on what
    it was batched with, and a pair must compare what each arm would have told the user. Where the other arm
    cannot answer, its side of the pair is None, and the evidence takes the worst case for it.

    Args:
        samples: as the gateway's `_offer_to_mirror` makes them.
        live: the arms loaded here. Samples of another rollout than the live one are dropped: its tallies are
            closed.
    """
    rows: list[PairRow] = []
    for sample in samples:
        if sample["rollout_id"] != live.route.rollout_id:
            continue
        served_by_treatment = sample["arm"] == TREATMENT
        other = live.control if served_by_treatment else live.treatment
        if sample["treatment_failed"]:
            other = None
        classes, confidences = _answer(other, sample["records"], workload)
        served = sample["classes"], sample["confidences"]
        control, treatment = (
            ((classes, confidences), served) if served_by_treatment else (served, (classes, confidences))
        )
        for index, record in enumerate(sample["records"]):
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
                    groups=workload.groups(record),
                    record=record,
                    created_at=sample["at"],
                )
            )
    return rows


def _answer(
    model: Model | None, records: Sequence[Mapping[str, object]], workload: Workload
) -> tuple[list[int | None], list[float | None]]:
    if model is not None:
        try:
            predictions = model.run(workload.encode(records)).predictions
            return predictions.classes.tolist(), predictions.confidences.tolist()
        except ArmFailed as error:
            log.warning("shadow arm failed: %s", error)
    return [None] * len(records), [None] * len(records)


async def _mirror(request: Request) -> JSONResponse:
    shadow: Any = bentoml.get_current_service()
    try:
        stored = await asyncio.to_thread(shadow.store, orjson.loads(await request.body()))
    except LedgerUnavailable as error:
        return JSONResponse({"error": str(error)}, 503)
    return JSONResponse({"stored": stored})


@bentoml.service(name="Shadow", workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
@bentoml.asgi_app(Starlette(routes=[HttpRoute("/mirror", _mirror, methods=["POST"])]))
class Shadow:
    """Answers mirrored inputs off the request path. Its death costs evidence, never a reply."""

    def __init__(self) -> None:
        self._settings = Settings.from_env()
        self._workload = load_workload(self._settings.workload)
        self._state = LiveState(
            self._settings, self._workload, "shadow", load_variant(tag_name(self._workload.name, FULL)).tag
        )
        self._process = ProcessSampler("shadow")

    @bentoml.on_startup
    def start(self) -> None:
        self._state.start()
        self._process.start()

    @bentoml.on_shutdown
    def stop(self) -> None:
        self._process.stop()
        self._state.stop()

    def store(self, samples: list[dict[str, Any]]) -> int:
        """Form the pairs and write them; returns how many were new.

        Raises:
            LedgerUnavailable: nothing was stored; the gateway keeps the samples and sends them again.
        """
        if not self._state.ledger_up:
            raise LedgerUnavailable("the shadow does not know the rollout yet: the ledger cannot be read")
        rows = answer_samples(samples, self._state.live, self._workload)
        return self._state.ledger.record_pairs(rows) if rows else 0
