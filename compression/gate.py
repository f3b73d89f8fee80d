"""Acceptance: may this variant start a rollout? A pure function of a scorecard and a profile."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from compression.scorecard import Estimate, Scorecard

LIMITS: Mapping[str, float] = {
    "safety_critical": 0.01,
    "medical": 0.02,
    "standard": 0.05,
    "ranking": 0.10,
    "generative": 0.15,
}
"""Largest drop of quality that a profile accepts, overall and in every group."""


class GateResult(BaseModel):
    """The verdict: `reasons` is empty when accepted, else it starts with the group that is hurt most."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accepted: bool
    profile: str
    reasons: list[str]


def judge(scorecard: Scorecard, profile: str) -> GateResult:
    """Hold a scorecard against the limit of a profile.

    Overall, the upper end of the drop's interval has to stay within the limit: the variant must show that it
    is good enough. A group is ruined when its drop is over the limit and the lower end of its interval over
    zero: a handful of rows cannot show more than that some harm is real. Where the metric is a mean of recalls,
    the recall of every class that it is about is held like a group, because an average can hide one of them.

    Raises:
        KeyError: the profile is none of LIMITS.
    """
    limit = LIMITS[profile]
    reasons: list[str] = []
    if scorecard.invalid_outputs:
        reasons.append(f"{scorecard.invalid_outputs} of {scorecard.rows} outputs are not finite numbers")
    reasons += _ruined({name: group.drop for name, group in scorecard.groups.items()}, limit)
    if scorecard.metric != "accuracy":
        recalls = {
            f"recall of class {name}": score.drop
            for name, score in scorecard.classes.items()
            if name in (scorecard.recall_of or scorecard.classes)
        }
        reasons += _ruined(recalls, limit)
    drop = scorecard.drop
    if drop.value > limit:
        reasons.append(_loss(f"overall {_words(scorecard.metric)}", drop, limit))
    elif drop.high > limit:
        reasons.append(
            f"overall {_words(scorecard.metric)} may lose up to {_points(drop.high)} pt "
            f"(measured {_points(drop.value)}), over the {_points(limit, 0)} pt limit"
        )
    return GateResult(accepted=not reasons, profile=profile, reasons=reasons)


def _ruined(drops: Mapping[str, Estimate], limit: float) -> list[str]:
    hurt = [(name, drop) for name, drop in drops.items() if drop.value > limit and drop.low > 0]
    hurt.sort(key=lambda item: item[1].value, reverse=True)
    return [_loss(name, drop, limit) for name, drop in hurt]


def _loss(name: str, drop: Estimate, limit: float) -> str:
    interval = f"{_points(drop.low)} to {_points(drop.high)}"
    return f"{name} loses {_points(drop.value)} pt ({interval}), over the {_points(limit, 0)} pt limit"


def _points(share: float, digits: int = 1) -> str:
    return f"{round(100 * share, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0.0 into 0.0


def _words(metric: str) -> str:
    return metric.replace("_", " ")
