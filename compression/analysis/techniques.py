"""What is measured: techniques and their levels, and what is done to single layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from compression.analysis.types import Treatment
from compression.recipe import StepSpec

Levels = list[tuple[str, float | None, tuple[StepSpec, ...]]]
"""Label, setting and steps of each level."""


@dataclass(frozen=True)
class Technique:
    """A technique and the settings at which it is measured.

    Attributes:
        step: the registered name; `params` are the same at all levels.
        parameter: the one that is varied over `levels`, the gentlest first; empty for a technique with one setting.
        setting: what the parameter is, for people.
        label: how a level is written, by `str.format` with the level.
        coded: the technique saves bytes only where the file is entropy coded.
    """

    key: str
    title: str
    step: str
    params: Mapping[str, JsonValue] = field(default_factory=dict)
    parameter: str = ""
    setting: str = ""
    levels: tuple[float, ...] = ()
    label: str = ""
    coded: bool = False

    def specs(self) -> list[tuple[str, float | None, StepSpec]]:
        """Label, setting and step of every level."""
        if not self.parameter:
            return [(self.title, None, StepSpec(step=self.step, params=dict(self.params)))]
        found: list[tuple[str, float | None, StepSpec]] = []
        for level in self.levels:
            value = 2 ** int(level) if self.parameter == "clusters" else level
            spec = StepSpec(step=self.step, params={**self.params, self.parameter: value})
            found.append((self.label.format(level), level, spec))
        return found


_SHARES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

TECHNIQUES: tuple[Technique, ...] = (
    Technique(
        key="magnitude",
        title="magnitude pruning",
        step="prune_magnitude",
        parameter="amount",
        setting="share of the weights zeroed",
        levels=_SHARES,
        label="{:.0%}",
        coded=True,
    ),
    Technique(
        key="threshold",
        title="per-layer threshold pruning",
        step="prune_threshold",
        params={"allow_extreme": True},
        parameter="quality",
        setting="threshold in standard deviations of each layer's weights",
        levels=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
        label="{:g} sd",
        coded=True,
    ),
    Technique(
        key="structured",
        title="structured pruning",
        step="prune_structured",
        parameter="amount",
        setting="share of the hidden neurons or channels removed",
        levels=(0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9),
        label="{:.0%}",
    ),
    Technique(
        key="low_rank",
        title="low rank",
        step="low_rank",
        parameter="size",
        setting="share of each layer's weights that its factors may take",
        levels=(0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1),
        label="{:.0%}",
    ),
    Technique(
        key="clusters",
        title="weight clustering",
        step="cluster_weights",
        params={"epochs": 0},
        parameter="clusters",
        setting="bits of each layer's codebook",
        levels=(8, 6, 5, 4, 3, 2, 1),
        label="{:g} bit",
        coded=True,
    ),
    Technique(key="2:4", title="2:4 sparsity", step="prune_2_4", coded=True),
    Technique(key="int8_static", title="INT8 static", step="int8_static"),
    Technique(key="int8_dynamic", title="INT8 dynamic", step="int8_dynamic"),
    Technique(key="int4_weights", title="INT4 weight-only", step="int4_weights"),
)
"""What is measured, in this order."""

PRUNED = {"prune_50": 0.5, "prune_80": 0.8}
"""Treatment -> share of the layer's weights that it zeroes."""
TREATMENTS: tuple[Treatment, ...] = (
    Treatment(key="prune_50", title="pruned by 50%"),
    Treatment(key="prune_80", title="pruned by 80%"),
    Treatment(key="int8", title="in INT8"),
    Treatment(key="int4", title="in INT4"),
)
