"""Starting, steering and describing rollouts: glue between the model store, the gate and the ledger."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from compression.errors import VariantNotFound
from compression.variant import FULL, Variant, load_variant, tag_name
from compression.workload import Workload
from monitoring.baseline import Baseline, baseline_of
from monitoring.controller import apply_command
from monitoring.errors import RolloutConflict, RolloutNotFound
from monitoring.groups import group_specs
from monitoring.ledger import LabelRow, Ledger
from monitoring.policy import Policy, parse_policy
from monitoring.quality import Quality, quality_of
from monitoring.records import Decision, Rollout
from services.errors import BadRequest, Conflict, NotFound

__all__ = ["command", "find", "history", "label_row", "listing", "start", "status", "verify"]

VERBS = ("promote", "pause", "resume", "rollback")
CURRENT = "current"
_DIGEST = re.compile("[0-9a-f]{64}")
_DESCRIBED = (
    *("id", "workload", "control", "treatment", "state", "step", "weight", "reason", "active"),
    *("created_at", "entered_at", "override_reason", "version", "revision", "cascade_threshold"),
)


def label_row(workload: Workload, request_id: str, index: int, label: str | int, now: float) -> LabelRow:
    """A label as the ledger stores it, from a class name or index.

    Raises:
        BadRequest: the workload has no such class, or the index is over what a request can hold.
    """
    if index >= workload.max_records:
        raise BadRequest(
            f"index {index}: a request has at most {workload.max_records} records, counted from 0"
        )
    if isinstance(label, str):
        if label not in workload.classes:
            raise BadRequest(
                f"label {label[:60]!r} is not a class; the classes are {', '.join(workload.classes)}"
            )
        label = workload.classes.index(label)
    elif not 0 <= label < len(workload.classes):
        raise BadRequest(f"label {label} is not a class index; it must be 0 to {len(workload.classes) - 1}")
    return LabelRow(request_id=request_id, index=index, label=label, at=now)


def start(
    ledger: Ledger,
    workload: Workload,
    variant: str,
    *,
    policy: Mapping[str, Any],
    override: str | None,
    actor: str,
    now: float,
) -> dict[str, Any]:
    """Start a rollout of a variant against the full-precision model it was made from.

    The guarded groups and the workload's policy, with `policy` laid over its top level, are fixed here.

    Raises:
        NotFound: no such variant.
        BadRequest: the policy is wrong or asks for a cascade that is not proven, or the variant belongs to
            another workload.
        Conflict: the gate refused the variant, or full precision was made anew since, and `override` gives no reason;
            or a rollout is under way.
    """
    try:
        candidate = load_variant(_tag(workload, variant))
        control = load_variant(candidate.manifest.parent or tag_name(workload.name, FULL))
    except VariantNotFound as error:
        raise NotFound(" ".join(str(error).split())) from error
    if candidate.workload != workload.name:
        raise BadRequest(
            f"{candidate.tag} belongs to workload {candidate.workload}; this serves {workload.name}"
        )
    if candidate.name == FULL:
        raise BadRequest("the full-precision model is control already; roll out another variant")
    verdict = candidate.gate()
    if (verdict is None or not verdict.accepted) and override is None:
        raise Conflict(
            f"the gate refused {candidate.tag}: {_why(verdict.reasons) if verdict else 'it has no scorecard'}. "
            "To start all the same, give a reason: --override, or 'override' in the request"
        )
    newest = load_variant(tag_name(workload.name, FULL)).tag
    if newest != control.tag and override is None:
        raise Conflict(
            f"{candidate.tag} was made from {control.tag}, which {newest} has replaced, and users would get the old "
            "one back as control: run 'trimtab compress' again. To start all the same, give a reason: --override"
        )
    refused = verdict is None or not verdict.accepted or newest != control.tag
    reference = control.manifest.reference.model_dump() if control.manifest.reference else None
    baseline = baseline_of(reference)
    fixed = parse_policy({**workload.policy, **policy})
    try:
        rollout = ledger.create_rollout(
            workload=workload.name,
            control=control.tag,
            treatment=candidate.tag,
            policy=fixed,
            groups=group_specs(reference),
            classes=workload.classes,
            baseline=baseline,
            quality=_quality(workload, baseline),
            positive=workload.positive,
            actor=actor,
            now=now,
            override_reason=override if refused else None,
            cascade_threshold=_cascade_threshold(candidate, fixed),
        )
    except RolloutConflict as error:
        raise Conflict(str(error)) from error
    return describe(rollout)


def command(
    ledger: Ledger,
    rollout_id: str,
    verb: str,
    *,
    full: bool,
    actor: str,
    reason: str,
    now: float,
) -> dict[str, Any]:
    """Apply an operator's verb at once; a dead Monitor does not stand in its way.

    Raises:
        NotFound: no such rollout or verb.
        Conflict: the verb makes no sense in the rollout's state.
    """
    if verb not in VERBS:
        raise NotFound(f"no verb {verb[:40]!r}: it must be one of {', '.join(VERBS)}")
    if full and verb != "promote":
        raise BadRequest("'full' belongs to promote only")
    found = find(ledger, rollout_id)
    try:
        apply_command(ledger, found.id, "promote full" if full else verb, actor=actor, reason=reason, now=now)
    except RolloutConflict as error:
        raise Conflict(str(error)) from error
    return describe(ledger.rollout(found.id))


def listing(ledger: Ledger) -> list[dict[str, Any]]:
    """The newest rollouts, newest first."""
    return [describe(rollout) for rollout in ledger.rollouts()]


def status(ledger: Ledger, rollout_id: str, now: float) -> dict[str, Any]:
    """One rollout with the controller's latest evidence. `rollout_id` may be `current`."""
    rollout = find(ledger, rollout_id)
    return {
        **describe(rollout),
        "policy": rollout.policy.public(),
        "evidence": ledger.status(rollout.id),
        "pairs": dataclasses.asdict(ledger.pair_stats(rollout.id)),
        "workers": [dataclasses.asdict(worker) for worker in ledger.workers(now)],
        "now": now,
    }


def history(ledger: Ledger, rollout_id: str) -> list[dict[str, Any]]:
    """Every decision about a rollout, oldest first."""
    return [_decision(decision) for decision in ledger.decisions(find(ledger, rollout_id).id)]


def verify(ledger: Ledger, expect: str | None) -> dict[str, Any]:
    """What a walk along the chain of all decisions found; a broken chain is an answer and no error.

    Raises:
        BadRequest: `expect` is not a digest.
    """
    if expect is not None:
        expect = expect.strip().lower()
        if not _DIGEST.fullmatch(expect):
            raise BadRequest("expect: it must be the 64 hexadecimal digits of a head that was noted earlier")
    return dataclasses.asdict(ledger.verify_decisions(expect))


def describe(rollout: Rollout) -> dict[str, Any]:
    """The fields of a rollout that an operator steers by."""
    described = {name: getattr(rollout, name) for name in _DESCRIBED}
    if not rollout.active:
        described["weight"] = 0  # a promotion lasts until the next rollout starts
    return described


def _decision(decision: Decision) -> dict[str, Any]:
    return dataclasses.asdict(decision)


def _cascade_threshold(candidate: Variant, policy: Policy) -> float | None:
    """The threshold that the candidate's scorecard proves for the policy's loss; None without a cascade.

    Raises:
        BadRequest: it proves none for that loss.
    """
    if policy.cascade is None:
        return None
    card = candidate.scorecard()
    points = {} if card is None else {point.max_drop: point.threshold for point in card.cascade}
    asked = policy.cascade.max_drop
    if asked not in points:
        known = ", ".join(f"{max_drop:g}" for max_drop in points)
        choice = f"it must be one of {known}, or null" if known else "it has none: compress the variant again"
        raise BadRequest(f"policy.cascade.max_drop: {candidate.tag} has no threshold for {asked:g}; {choice}")
    return points[asked]


def _quality(workload: Workload, baseline: Baseline) -> Quality:
    """What a drop of this workload is measured in.

    Raises:
        BadRequest: the stored full-precision model does not say how frequent the classes are.
    """
    try:
        return quality_of(workload.metric, baseline.labels, workload.recall_of)
    except ValueError:
        raise BadRequest(
            f"{workload.metric} needs the share of each class in the reference rows, which full precision was stored "
            f"without: run 'trimtab compress' again"
        ) from None


def _tag(workload: Workload, variant: str) -> str:
    """A variant's tag; its name alone, such as `int8-dynamic`, is enough."""
    own = tag_name(workload.name, "")
    return variant if ":" in variant or variant.startswith(own) else own + variant


def _why(reasons: Sequence[str], shown: int = 2) -> str:
    more = f" (and {len(reasons) - shown} more reasons)" if len(reasons) > shown else ""
    return "; ".join(reasons[:shown]) + more


def find(ledger: Ledger, rollout_id: str) -> Rollout:
    """The rollout of that id, or the one that routes traffic. Raises NotFound."""
    if rollout_id == CURRENT:
        rollout = ledger.active_rollout()
        if rollout is None:
            raise NotFound("there is no rollout yet: start one with 'trimtab rollout start'")
        return rollout
    try:
        return ledger.rollout(rollout_id)
    except RolloutNotFound as error:
        raise NotFound(str(error)) from error
