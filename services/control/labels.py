"""What is worth labelling next, for whoever gives out labels."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from compression.workload import Workload
from monitoring.label_queue import LabelRequest, in_sample, queue
from monitoring.ledger import Ledger
from services.control.auth import bears
from services.control.rollouts import find
from services.errors import BadRequest, Unauthorized

__all__ = ["MAX_ITEMS", "label_queue", "waiting"]

MAX_ITEMS = 10_000


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=100, ge=1, le=MAX_ITEMS)
    agreements: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)


async def label_queue(gateway: Any, request: Request) -> tuple[int, Any]:
    """`GET /rollouts/{rollout_id}/label-queue?limit=100&agreements=0.01`."""
    if not bears(request.headers.get("authorization"), gateway.token):
        raise Unauthorized(
            "the label queue shows users' records: send 'Authorization: Bearer TOKEN' "
            "(TRIMTAB_TOKEN, or the file 'token' in TRIMTAB_HOME)"
        )
    asked = _asked(request.query_params)
    rollout_id = request.path_params["rollout_id"]

    def reply() -> bytes:
        found = waiting(
            gateway.state.ledger,
            gateway.workload,
            rollout_id,
            limit=asked.limit,
            agreements=asked.agreements,
            now=time.time(),
        )
        # One by one: while JSON is made nothing else runs, and predictions must not wait for 10,000 records.
        return orjson.dumps(
            {**found, "items": [orjson.Fragment(orjson.dumps(item)) for item in found["items"]]}
        )

    return 200, orjson.Fragment(await asyncio.to_thread(reply))


def waiting(
    ledger: Ledger, workload: Workload, rollout_id: str, *, limit: int, agreements: float, now: float
) -> dict[str, Any]:
    """The labels most worth having of one rollout, and how many disagreements wait for one in all.

    Args:
        rollout_id: may be `current`.
        agreements: share of the pairs on which the arms agree to list as well; at least what equalized odds are judged
            on, where the rollout's policy asks for them.

    Raises:
        NotFound: no such rollout.
    """
    rollout = find(ledger, rollout_id)
    deadline_s = rollout.policy.label_deadline_s
    odds = rollout.policy.guardrails.equalized_odds
    if odds.enabled and rollout.groups:
        agreements = max(agreements, odds.label_share)  # these the evidence waits for
    # Other agreements have no turn to miss: the cursor goes past them at once.
    seq = 0 if agreements else ledger.cursor(rollout.id).labels_seq
    drawn = partial(in_sample, rate=agreements) if agreements else None
    with ledger.unlabelled_pairs(rollout.id, seq, now - deadline_s, drawn) as pairs:
        found = queue(pairs, now, deadline_s, agreements, limit)
    names = dict(enumerate(workload.classes))
    return {
        "items": [_item(item, names) for item in found.items],
        "disagreements_waiting": found.disagreements_waiting,
    }


def _item(item: LabelRequest, names: Mapping[int, str]) -> dict[str, Any]:
    answers = {"control": item.control, "treatment": item.treatment}
    return {
        **{field.name: getattr(item, field.name) for field in dataclasses.fields(item)},
        **{
            arm: None if answer is None else {"class": answer, "label": names.get(answer)}
            for arm, answer in answers.items()
        },
    }


def _asked(query: Mapping[str, str]) -> _Asked:
    try:
        return _Asked.model_validate(dict(query))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = " ".join(str(first["loc"][0]).split())[:40]
        raise BadRequest(f"{name}: {first['msg']}") from error
