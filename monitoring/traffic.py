"""Made-up traffic for simulated rollouts: pure functions of a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitoring.evidence import Floats
from monitoring.groups import GroupSpec
from monitoring.tally import BUCKET_SECONDS, group_name

__all__ = ["NO_ANSWER", "START", "Scene", "Traffic", "generate", "guarded_groups"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

START = 1_700_000_000.0
"""When the first step of every simulated rollout begins, seconds since the epoch."""
NO_ANSWER = -1


@dataclass(frozen=True, slots=True)
class Scene:
    """What traffic is like. Rates are probabilities, and each request is drawn by itself.

    Attributes:
        requests: how many there are, repeated ones included.
        per_second: how many come in a second, evenly.
        accuracy: of full precision.
        drop: how much less accurate the candidate is.
        discordance: how often exactly one of the two is right, at least `drop`.
        late_after, late_drop: from this request on the candidate loses so much more.
        attributes: sensitive attribute -> share of each of its values, which are called 0, 1, 2...
        harmed, harm: the group that loses so much more, such as "A=0".
        label_delay_s: how long a label takes.
        good_news_delay_s: how much longer one takes that speaks for the candidate.
        label_share, good_news_share: how many labels ever come; and of those that speak for the candidate.
        label_agreements: whether anybody labels what both arms agree on.
        repeated: share of requests that a client sends twice under the same id.
        failing: share of the candidate's requests that fail.
        slow, control_slow: share of each arm's requests over the latency limit, on average; from one block of 10 s to
            the next it varies as an exponential variable does.
    """

    requests: int = 20_000
    per_second: float = 20.0
    accuracy: float = 0.92
    drop: float = 0.0
    discordance: float = 0.04
    late_after: int = 0
    late_drop: float = 0.0
    attributes: tuple[tuple[str, tuple[float, ...]], ...] = ()
    harmed: str = ""
    harm: float = 0.0
    label_delay_s: float = 0.0
    good_news_delay_s: float = 0.0
    label_share: float = 1.0
    good_news_share: float = 1.0
    label_agreements: bool = True
    repeated: float = 0.0
    failing: float = 0.0
    slow: float = 0.0
    control_slow: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Requests in the order in which they come; each array has one entry for each.

    Attributes:
        request: its id; one that was sent twice has the same id twice.
        control, treatment: class index each arm gives; NO_ANSWER where the candidate fails.
        label: the true class.
        created_at, labelled_at: seconds since the epoch; infinity for a label that never comes.
        members: value of each attribute. Shape [requests, attributes].
        attributes: their names.
        ticket: in [0, 1): the candidate answers where that is under its weight.
        failed: whether the candidate fails on it.
        slow, control_slow: whether each arm takes longer than the limit.
    """

    request: Ints
    control: Ints
    treatment: Ints
    label: Ints
    created_at: Floats
    labelled_at: Floats
    members: Ints
    attributes: tuple[str, ...]
    ticket: Floats
    failed: Bools
    slow: Bools
    control_slow: Bools


def guarded_groups(scene: Scene) -> tuple[GroupSpec, ...]:
    """The groups of such traffic, all of them guarded: measured on some rows, and with no gap between them."""
    found = [
        GroupSpec(group_name(attribute, str(value)), share, 0.0, 0.02)
        for attribute, shares in scene.attributes
        for value, share in enumerate(shares)
    ]
    return tuple(sorted(found, key=lambda group: group.name))


def generate(scene: Scene, rng: np.random.Generator) -> Traffic:
    """Traffic of this kind."""
    n = scene.requests
    members = np.zeros((n, len(scene.attributes)), dtype=np.int64)
    for column, (_, shares) in enumerate(scene.attributes):
        members[:, column] = np.searchsorted(np.cumsum(shares)[:-1], rng.random(n), side="right")
    worse = np.full(n, (scene.discordance + scene.drop) / 2)
    better = (scene.discordance - scene.drop) / 2
    worse[scene.late_after :] += scene.late_drop
    for column, (attribute, shares) in enumerate(scene.attributes):
        for value in range(len(shares)):
            if group_name(attribute, str(value)) == scene.harmed:
                worse[members[:, column] == value] += scene.harm
    u = rng.random(n)
    d = np.where(u < worse, 1, np.where(u < worse + better, -1, 0))
    # Where both or none are right, as often as makes full precision's accuracy what it is.
    both = rng.random(n) * (1 - worse - better) < scene.accuracy - worse
    label = rng.integers(0, 2, n)
    control = np.where((d == 1) | ((d == 0) & both), label, 1 - label)
    treatment = np.where((d == -1) | ((d == 0) & both), label, 1 - label)
    failed = rng.random(n) < scene.failing
    delay = np.full(n, scene.label_delay_s)
    delay[d == -1] += scene.good_news_delay_s
    come = rng.random(n) < np.where(d == -1, scene.label_share * scene.good_news_share, scene.label_share)
    delay[~come] = np.inf
    if not scene.label_agreements:
        delay[d == 0] = np.inf
    taken = np.repeat(np.arange(n), 1 + (rng.random(n) < scene.repeated))[:n]
    created_at = START + np.arange(1, n + 1) / scene.per_second
    block = ((created_at - START) // BUCKET_SECONDS).astype(np.int64)
    return Traffic(
        request=taken,
        control=control[taken],
        treatment=np.where(failed, NO_ANSWER, treatment)[taken],
        label=label[taken],
        created_at=created_at,
        labelled_at=created_at + delay[taken],
        members=members[taken],
        attributes=tuple(name for name, _ in scene.attributes),
        ticket=rng.random(n)[taken],
        failed=failed[taken],
        slow=_over(scene.slow, block, rng),
        control_slow=_over(scene.control_slow, block, rng),
    )


def _over(share: float, block: Ints, rng: np.random.Generator) -> Bools:
    if not share:
        return np.zeros(len(block), dtype=np.bool_)
    rates = share * rng.exponential(size=int(block.max()) + 1)
    return np.asarray(rng.random(len(block)) < rates[block], dtype=np.bool_)
