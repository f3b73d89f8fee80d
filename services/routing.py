"""Sticky assignment and sampling: pure functions of a key, the same in every worker, replica and retry."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

__all__ = ["CONTROL", "TREATMENT", "Arm", "assign", "is_sampled", "unit_interval"]

Arm = Literal["control", "treatment"]
CONTROL: Arm = "control"
TREATMENT: Arm = "treatment"

_SCALE = float(1 << 53)
_CHECKSUMS = float(1 << 48)


def unit_interval(key: str, salt: str) -> float:
    """Map a key to [0, 1), uniformly and independently for each salt (53 bits of keyed BLAKE2b)."""
    digest = _salted(salt).copy()
    digest.update(key.encode("utf-8", "surrogatepass"))
    return (int.from_bytes(digest.digest(), "big") >> 11) / _SCALE


@lru_cache(maxsize=16)
def _salted(salt: str) -> hashlib.blake2b:
    """A hash that has taken the salt in, which costs as much as the key does."""
    return hashlib.blake2b(digest_size=8, key=salt.encode("utf-8")[:64])


def assign(key: str, rollout_id: str | None, weight: int) -> Arm:
    """Choose the arm for an assignment key.

    A key that is on treatment at one weight stays on it at every larger weight, so that a user does not flip
    between models while a rollout climbs. The rollout id is the salt: who goes first differs by rollout.

    Args:
        key: the client's assignment key, else the request id.
        rollout_id: the running rollout, or None when there is none.
        weight: percent of keys on treatment, 0 to 100.
    """
    if rollout_id is None or weight <= 0:
        return CONTROL
    if weight >= 100:
        return TREATMENT
    return TREATMENT if unit_interval(key, "assign:" + rollout_id) * 100.0 < weight else CONTROL


def is_sampled(request_id: str, rate: float) -> bool:
    """Whether a request is mirrored to the shadow, at `rate` in [0, 1], independent of its arm.

    A signed request id ends in the 48 bits of its keyed checksum, which are as good as drawn at random and are the
    same in every worker, replica and retry. What is sampled at one rate is sampled at every larger one.
    """
    return rate >= 1.0 or int(request_id[-12:], 16) < rate * _CHECKSUMS
