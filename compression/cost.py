"""What a variant's model time costs in CPU, energy and money, beside the quality that it loses.

Model time only: encoding, HTTP and monitoring cost the same with every variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

from compression.errors import CompressionError
from compression.gate import GateResult
from compression.scorecard import Estimate, Scorecard

__all__ = ["Cost", "Deployment", "Prices", "costs", "deployments", "full_ms"]

_DAYS = 365


@dataclass(frozen=True)
class Prices:
    """What is asked of the machines, and what they cost.

    Attributes:
        price_per_hour: of one machine, in any currency; `cores` is how many cores it has.
        watts_per_core: of a core that is busy.
        mirror_rate: share of the requests that full precision answers too, in the shadow.
        utilization: share of the paid core time in which a model runs.

    Raises:
        CompressionError: a number that makes no sense, named as the command line's option.
    """

    requests_per_day: float
    price_per_hour: float
    cores: int = 1
    watts_per_core: float = 10.0
    mirror_rate: float = 0.0
    utilization: float = 0.6

    def __post_init__(self) -> None:
        positive = {
            "--requests-per-day": self.requests_per_day,
            "--price-per-hour": self.price_per_hour,
            "--cores": self.cores,
            "--watts-per-core": self.watts_per_core,
        }
        for option, value in positive.items():
            if not (isfinite(value) and value > 0):
                raise CompressionError(f"{option} must be a number above 0 (not {value:g})")
        if not 0 <= self.mirror_rate <= 1:
            raise CompressionError(f"--mirror-rate must be from 0 to 1 (not {self.mirror_rate:g})")
        if not 0 < self.utilization <= 1:
            raise CompressionError(f"--utilization must be above 0 and at most 1 (not {self.utilization:g})")


@dataclass(frozen=True)
class Deployment:
    """A variant, alone or with a cascade, as something to pay for.

    Attributes:
        time_ratio: model time of one record over full precision's, escalated records included.
        escalated: share of records that go on to full precision; `threshold` is the confidence that keeps the
            others. None without a cascade.
        drop: None for full precision itself.
        accepted: the gate's verdict on the variant alone.
    """

    name: str
    variant: str
    time_ratio: float
    drop: Estimate | None
    accepted: bool
    escalated: float = 0.0
    threshold: float | None = None


@dataclass(frozen=True)
class Cost:
    """What 1,000 requests of one record, and a year of them, cost with a deployment.

    Attributes:
        cpu_s_per_request: what is mirrored to full precision included.
        saving_per_year: against full precision, which mirrors nothing; below 0 it costs more.
        break_even_mirror_rate: at this mirror rate nothing is saved any more; 0 when nothing ever is, None for
            full precision.
    """

    deployment: Deployment
    cpu_s_per_request: float
    cpu_s_per_1000: float
    kwh_per_1000: float
    cost_per_1000: float
    cost_per_year: float
    saving_per_year: float
    break_even_mirror_rate: float | None

    def as_dict(self) -> dict[str, object]:
        """All figures on one level, ready for JSON."""
        own, drop = vars(self.deployment), self.deployment.drop
        figures = {name: value for name, value in vars(self).items() if name != "deployment"}
        return own | {"drop": None if drop is None else drop.model_dump()} | figures


def full_ms(cards: Sequence[Scorecard]) -> float:
    """Full precision's median time for one record: the median over the scorecards, each of which timed it."""
    return median(card.latency_at(1).full_p50_ms for card in cards)


def deployments(full: str, judged: Sequence[tuple[Scorecard, GateResult]]) -> list[Deployment]:
    """Each variant, followed by its cascades; `full` names the one that is full precision.

    A variant's time is relative to full precision's in the same scorecard, because the two were timed in turns:
    milliseconds of different minutes on a busy machine do not compare.
    """
    found = []
    for card, verdict in judged:
        name, accepted = card.variant, verdict.accepted
        if name == full:
            found.append(Deployment(name, name, 1.0, None, accepted))
            continue
        found.append(Deployment(name, name, 1 / card.latency_at(1).speedup, card.drop, accepted))
        found += [
            Deployment(
                f"{name} + cascade {100 * point.max_drop:g} pt",
                name,
                point.cost_ratio,
                point.drop,
                accepted,
                point.escalated.value,
                point.threshold,
            )
            for point in card.cascade
        ]
    return found


def costs(chosen: Sequence[Deployment], full_precision_ms: float, prices: Prices) -> list[Cost]:
    """What each deployment costs when it answers all requests."""
    per_core_second = prices.price_per_hour / prices.cores / prices.utilization / 3600
    per_year = prices.requests_per_day * _DAYS / 1000
    full_cost = full_precision_ms * per_core_second  # 1,000 requests of so many ms are so many seconds
    found = []
    for deployment in chosen:
        is_full = deployment.drop is None
        mirrored = 0.0 if is_full else prices.mirror_rate
        seconds = full_precision_ms * (deployment.time_ratio + mirrored)
        cost = seconds * per_core_second
        found.append(
            Cost(
                deployment=deployment,
                cpu_s_per_request=seconds / 1000,
                cpu_s_per_1000=seconds,
                kwh_per_1000=seconds * prices.watts_per_core / 3.6e6,
                cost_per_1000=cost,
                cost_per_year=cost * per_year,
                saving_per_year=(full_cost - cost) * per_year,
                break_even_mirror_rate=None if is_full else max(0.0, 1 - deployment.time_ratio),
            )
        )
    return found
