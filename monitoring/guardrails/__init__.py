"""From counts to verdicts: what each guardrail has to say about a rollout. Pure."""

from __future__ import annotations

from monitoring.groups import GroupSpec, group_specs
from monitoring.guardrails.assess import describe, evaluate, limits
from monitoring.guardrails.rules import GUARDRAILS, Guardrail, quality_of
from monitoring.guardrails.verdicts import (
    Assessment,
    Certificate,
    Promotion,
    Scope,
    Totals,
    Verdict,
    scope_of,
)
from monitoring.policy import Policy, parse_policy

__all__ = [
    "GUARDRAILS",
    "Assessment",
    "Certificate",
    "GroupSpec",
    "Guardrail",
    "Policy",
    "Promotion",
    "Scope",
    "Totals",
    "Verdict",
    "describe",
    "evaluate",
    "group_specs",
    "limits",
    "parse_policy",
    "quality_of",
    "scope_of",
]
