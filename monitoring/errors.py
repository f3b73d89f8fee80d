"""Errors of the judgement package. Each one's text is a sentence an operator can act on."""

from __future__ import annotations


class TrimtabError(Exception):
    """Base of every error this package raises on purpose."""


class PolicyError(TrimtabError):
    """A rollout policy is not valid; the text is one line that names the field and what is allowed."""


class LedgerUnavailable(TrimtabError):
    """The ledger cannot be read or written now: locked, disk full, corrupt, missing or an I/O error.

    The data plane answers requests with what it last knew; the caller may try again.
    """


class LedgerTooNew(LedgerUnavailable):
    """The ledger was written by a newer version of Trimtab, and this one must not touch it."""


class RolloutNotFound(TrimtabError):
    """No rollout has this id."""


class RolloutConflict(TrimtabError):
    """The rollout cannot be started, or changed in this way, in the state that things are in."""
