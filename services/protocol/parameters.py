"""The parameters of an infer request that mean something here: a client's patience, and whom its records concern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.errors import BadRequest

__all__ = ["read_groups", "read_timeout", "refuse_sequences"]

_MAX_VALUE_CHARS = 64


def read_timeout(parameters: Mapping[str, Any]) -> float | None:
    """Seconds that the client will wait; `timeout` has microseconds, and 0 means that it does not say.

    Raises:
        BadRequest: it is not a whole number, or negative.
    """
    value = parameters.get("timeout")
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise BadRequest("parameter timeout must be a whole number of microseconds")
    return value / 1e6 if value else None


def read_groups(
    parameters: Mapping[str, Any], sensitive: Sequence[str], rows: int
) -> list[dict[str, str]] | None:
    """The groups that the records belong to, for the evidence: tensors do not say it by themselves.

    `groups` is a string such as `SEX=1,AGE=40-49`: one entry for all records, or one for each, separated by `;`.

    Raises:
        BadRequest: an attribute is not sensitive in this workload, a value is not 1 to 64 printable characters, or
            there are neither as many entries as records nor one.
    """
    text = parameters.get("groups")
    if text is None:
        return None
    if type(text) is not str:
        raise BadRequest('parameter groups must be a string such as "SEX=1,AGE=40-49"')
    entries = text.split(";")
    if len(entries) not in (1, rows):
        raise BadRequest(
            f"parameter groups has {len(entries)} entries for {rows} records: give one for all, or one for each"
        )
    return [_groups(entry, sensitive) for entry in entries]


def _groups(entry: str, sensitive: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in entry.split(","):
        attribute, _, value = part.partition("=")
        if attribute not in sensitive:
            known = ", ".join(sensitive) or "none"
            raise BadRequest(
                f"parameter groups: no sensitive attribute {attribute[:80]!r}; this workload has {known}"
            )
        if attribute in found:
            raise BadRequest(f"parameter groups: {attribute} is given twice for one record")
        if not 1 <= len(value) <= _MAX_VALUE_CHARS or not value.isprintable():
            raise BadRequest(
                f"parameter groups: the value of {attribute} must be 1 to {_MAX_VALUE_CHARS} printable characters"
            )
        found[attribute] = value
    return found


def refuse_sequences(parameters: Mapping[str, Any]) -> None:
    """Raise BadRequest for a request that is part of a sequence: no model here keeps state between requests."""
    if parameters.get("sequence_id") not in (None, 0, ""):
        raise BadRequest("parameter sequence_id: models here keep no state between requests; leave it out")
