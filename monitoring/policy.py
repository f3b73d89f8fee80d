"""The policy of a rollout: its steps, waits and guardrails, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from monitoring.errors import PolicyError

Action = Literal["rollback", "hold", "alert", "dry-run"]
"""`dry-run` writes into the history what would have been done, and tells nobody."""

Margin = Annotated[float, Field(gt=0, le=0.5)]
ErrorRate = Annotated[float, Field(gt=0, le=0.5)]
Weight = Annotated[float, Field(gt=0, le=100)]
Percent = Annotated[int, Field(ge=0, le=100)]


_LATER = (
    *("class_harm", "latency_vs_control", "sample_ratio"),
    *("equalized_odds", "estimated_drop", "resource_use", "prediction_drift", "input_drift"),
    "reward",
)
"""Guardrails that the first rollouts did not have."""

STORED = "stored"
"""Validation context of a policy that was checked when its rollout started and must be readable for ever."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Section(_Strict):
    """What every guardrail has.

    Attributes:
        weight: its part of the false-rollback rate, relative to the others' that may roll back; those that may not
            share the same rate, of false alarms, among themselves.
    """

    enabled: bool = True
    action: Action = "rollback"
    weight: Weight


class AccuracyDrop(Section):
    """Full precision's accuracy minus the candidate's, on the same inputs, may be at most `margin`."""

    margin: Margin = 0.02
    weight: Weight = 0.4


class GroupHarm(Section):
    """The same within every guarded group."""

    margin: Margin = 0.05
    weight: Weight = 0.3


class ClassHarm(Section):
    """The same within every class, among the inputs for which either arm gives that class."""

    margin: Margin = 0.05
    weight: Weight = 0.2


class DemographicParity(Section):
    """The gap between a group's favourable rate and everybody else's may widen by at most `margin`.

    Where the reference rows are too few to say on which side of zero the gap was, it may move by at most
    `margin` in either direction.
    """

    margin: Margin = 0.05
    weight: Weight = 0.1


class LatencyP95(Section):
    """The share of the candidate's requests that take longer than the policy's `latency_slo_ms` may be 5%.

    That is the average over blocks of 10 s of each block's share: a block counts alike whether it had 20
    requests or 2,000. Blocks with fewer than 20 requests are skipped.
    """

    weight: Weight = 0.1


class LatencyVersusControl(Section):
    """The candidate's share of requests over `latency_slo_ms` may be larger than control's by at most `margin`.

    On average over blocks of 10 s in which each arm had at least 20 requests. For a control that misses the limit
    itself: turn `latency_p95` off with it. Where control does not, `latency_p95` sees more and is quicker.
    """

    enabled: bool = False
    margin: Margin = 0.05
    weight: Weight = 0.05


class TreatmentErrors(Section):
    """At most this share of the candidate's requests may fail and be answered by full precision."""

    ratio: float = Field(default=0.01, gt=0, le=0.5)
    weight: Weight = 0.1


class SampleRatio(Section):
    """Requests must go to the candidate as often as the split says.

    Only those count that came without an assignment key and without a request id, each of which is assigned by itself:
    the requests of one user are not.
    """

    action: Action = "hold"
    weight: Weight = 0.05


class EqualizedOdds(Section):
    """Between a group and everybody else, neither the gap of true positive rates nor that of false positive rates may
    move by more than `margin` against full precision's, in either direction.

    These rates are of inputs with known labels, those on which the arms agree included. So this needs labels of all
    pairs, or of the share `label_share`, drawn by a hash; a pair waits for its label until the deadline.
    """

    enabled: bool = False
    margin: Margin = 0.05
    label_share: float = Field(default=1.0, gt=0, le=1)
    weight: Weight = 0.1


class EstimatedDrop(Section):
    """The accuracy drop that can be expected by full precision's calibrated confidence may be at most `margin`.

    It needs no labels, and is as good as the calibration, which was made on the validation rows: that is why it only
    alerts, unless it is told otherwise.
    """

    action: Action = "alert"
    margin: Margin = 0.05
    weight: Weight = 0.1


class ResourceUse(Section):
    """A record may take the candidate's model at most `ratio` times as long as full precision's.

    In half of the blocks of 10 s in which each model answered at least 20 records.
    """

    action: Action = "alert"
    ratio: float = Field(default=1.25, ge=0.1, le=100)
    weight: Weight = 0.1


class _Drift(Section):
    action: Literal["hold", "alert", "dry-run"] = "alert"
    margin: Margin = 0.1
    weight: Weight = 0.1


class PredictionDrift(_Drift):
    """The share of a class among full precision's answers may be off the reference rows' by at most `margin`.

    Allowed on top is what chance may have done to the reference rows. It says that the world has changed, and not that
    the candidate is worse: it never rolls back.
    """


class InputDrift(_Drift):
    """The share of a value, or of a range of numbers, in a field of the records may be off the reference rows' by at
    most `margin`.

    Allowed on top is what chance may have done to the reference rows. It says that the world has changed, and not that
    the candidate is worse: it never rolls back.
    """


class Reward(Section):
    """The mean reward of the candidate's requests may be lower than that of control's by at most `margin`.

    Rewards come through feedback, such as 1 for a click. One that has not come `deadline_s` after its request is 0.
    Only mirrored requests count, and only where the candidate has an answer to them.
    """

    enabled: bool = False
    margin: Margin = 0.02
    deadline_s: float = Field(default=3600, ge=0, le=90 * 86400)
    weight: Weight = 0.2


class Disagreement(_Strict):
    """Few disagreements prove a small drop without any label; this only ever promotes."""

    enabled: bool = True


class Cascade(_Strict):
    """The candidate answers the records that it is sure of, and full precision the others.

    Attributes:
        max_drop: the loss of quality, as a share, that the candidate's scorecard has a proven threshold for.
    """

    max_drop: float = Field(ge=0, le=0.5)


class Guardrails(_Strict):
    """All guardrails; a section that is left out has its defaults."""

    accuracy_drop: AccuracyDrop = AccuracyDrop()
    group_harm: GroupHarm = GroupHarm()
    class_harm: ClassHarm = ClassHarm()
    demographic_parity: DemographicParity = DemographicParity()
    latency_p95: LatencyP95 = LatencyP95()
    latency_vs_control: LatencyVersusControl = LatencyVersusControl()
    treatment_errors: TreatmentErrors = TreatmentErrors()
    sample_ratio: SampleRatio = SampleRatio()
    equalized_odds: EqualizedOdds = EqualizedOdds()
    estimated_drop: EstimatedDrop = EstimatedDrop()
    resource_use: ResourceUse = ResourceUse()
    prediction_drift: PredictionDrift = PredictionDrift()
    input_drift: InputDrift = InputDrift()
    reward: Reward = Reward()
    disagreement: Disagreement = Disagreement()

    @model_validator(mode="before")
    @classmethod
    def _as_it_was(cls, given: Any, info: ValidationInfo) -> Any:
        """A rollout is judged by the guardrails that there were when it started, with the margins they had then."""
        if info.context == STORED and isinstance(given, dict):
            return {**{name: {"enabled": False} for name in _LATER if name not in given}, **given}
        return given

    def section(self, name: str) -> Section:
        """The settings of a guardrail."""
        found: Section = getattr(self, name)
        return found

    def margin(self, name: str) -> float:
        """The drop that a guardrail of paired outcomes tolerates."""
        found: float = getattr(self, name).margin
        return found

    @property
    def sections(self) -> dict[str, Section]:
        """Name -> settings of each guardrail."""
        return {name: part for name, part in self if isinstance(part, Section)}


def _climbing(steps: tuple[int, ...]) -> tuple[int, ...]:
    if steps[0] != 0:
        raise ValueError("the first step must be 0: the candidate is shadowed before it gets traffic")
    if any(b <= a for a, b in pairwise(steps)):
        raise ValueError("each step must be larger than the one before")
    return steps


def _web_address(url: str | None, info: ValidationInfo) -> str | None:
    if url is None or info.context == STORED:
        return url
    if not url.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    try:
        url.encode()
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        callable_ = bool(host.encode("idna")) and port != 0
    except ValueError:  # UnicodeError is one
        callable_ = False
    if not callable_ or any(letter <= " " or letter == "\x7f" for letter in url):
        raise ValueError("must be an address with a host that can be called")
    return url


class Policy(_Strict):
    """How a rollout climbs and what stops it.

    Attributes:
        false_rollback_rate: a candidate that is no worse than the margins is rolled back with at most this
            probability, all guardrails together, however often and however long it is looked at; once more
            after promotion, when the evidence starts afresh.
        promotion_error_rate: a candidate worse than the accuracy margin is promoted with at most this
            probability.
        promotion_min_group_share: a group with at least this share of people must be proven to lose less than
            group_harm's margin before the candidate is promoted; smaller ones only must not look harmed.
        steps: percent of traffic on the candidate; starts with 0, which is shadowing.
        step_min_pairs, step_min_seconds: what a step must have seen before the next one; pairs are those that
            both arms answered.
        label_deadline_s: a label that has not come by then counts as missing.
        mirror_rate: largest share of requests that get the other arm's answer too; less where the shadow's share of
            the CPU does not suffice.
        promoted_run_length: pairs between two false alarms, at least, on average, once promoted: of harm overall, in a
            class or in a group. (The other guardrails go on with `false_rollback_rate`.)
        promoted_pairs_per_s: so many pairs are wanted once promoted, when the decision is made and only late harm is
            watched for. At 20 a second the 1,000 to 2,750 pairs that it takes in the median to catch a loss of 5 points
            come in within two or three minutes.
        blind_after_s: traffic without any pair coming in for this long freezes the split...
        blind_rollback_s: ...and after this long in that state rolls back.
        warmup_timeout_s: how long the workers may take to load the candidate.
        promoted_weight: percent of traffic on the candidate once promoted.
        latency_slo_ms: limit of the latency guardrail.
        alert_webhook: where alerts are posted to; None for the environment's default, if any.
        cascade: None for a candidate that answers every record of its requests by itself.
    """

    false_rollback_rate: ErrorRate = 0.01
    promotion_error_rate: ErrorRate = 0.05
    promotion_min_group_share: float = Field(default=0.05, ge=0, le=1)
    steps: Annotated[tuple[Percent, ...], Field(min_length=2, max_length=32), AfterValidator(_climbing)] = (
        0,
        1,
        5,
        25,
        50,
        90,
    )
    step_min_pairs: int = Field(default=200, ge=0, le=10_000_000)
    step_min_seconds: float = Field(default=5, ge=0, le=30 * 86400)
    label_deadline_s: float = Field(default=3600, ge=0, le=90 * 86400)
    mirror_rate: float = Field(default=1.0, gt=0, le=1)
    promoted_run_length: int = Field(default=10_000_000, ge=10_000, le=10**15)
    promoted_pairs_per_s: float = Field(default=20, ge=0.1, le=100_000)
    blind_after_s: float = Field(default=60, ge=1, le=86400)
    blind_rollback_s: float = Field(default=600, ge=1, le=30 * 86400)
    warmup_timeout_s: float = Field(default=60, ge=1, le=86400)
    promoted_weight: int = Field(default=90, ge=1, le=100)
    latency_slo_ms: float = Field(default=100, gt=0, le=600_000)
    alert_webhook: Annotated[str | None, AfterValidator(_web_address)] = Field(default=None, max_length=2000)
    cascade: Cascade | None = None
    guardrails: Guardrails = Guardrails()

    @model_validator(mode="after")
    def _something_guards(self) -> Policy:
        g = self.guardrails
        if not any(part.enabled for part in g.sections.values()):
            raise ValueError("guardrails: at least one must be enabled besides disagreement")
        if not (g.accuracy_drop.enabled or g.disagreement.enabled):
            raise ValueError(
                "guardrails: accuracy_drop or disagreement must be enabled, or nothing can promote"
            )
        return self

    def public(self) -> dict[str, Any]:
        """As JSON for whoever may look: of the webhook, whose path is often a secret, scheme and host only."""
        shown: dict[str, Any] = self.model_dump(mode="json")
        if self.alert_webhook is not None:
            shown["alert_webhook"] = _host_of(self.alert_webhook)
        return shown


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port is not None else ""
        host = parts.hostname or ""
    except ValueError:
        return "hidden"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def parse_policy(section: Mapping[str, object] | None) -> Policy:
    """The policy a workload's or an operator's settings describe.

    Raises:
        PolicyError: one line that names every wrong field and what is allowed there.
    """
    try:
        return Policy.model_validate(dict(section or {}))
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False, include_context=False):
            where = ".".join(str(part) for part in item["loc"])
            what = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                what = "no such setting"
            given = (
                ""
                if item["type"] in {"missing", "extra_forbidden"} or not where
                else f" (not {item['input']!r})"
            )
            problems.append(f"policy.{where}: {what}{given}" if where else f"policy: {what}")
        raise PolicyError("; ".join(problems).replace("\n", " ")) from error
