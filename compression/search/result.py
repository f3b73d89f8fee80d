"""What a search has found: its trials, the best of them, and their recipes as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compression.files import write_atomically
from compression.pareto import frontier
from compression.recipe import Recipe
from compression.search.evaluate import Figures, Limits, Objective
from compression.search.scenarios import SCENARIOS, Candidate, Choice, choose
from compression.workload import Workload

if TYPE_CHECKING:
    import optuna

    from compression.variant import Variant


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        state: `measured`; `refused` where the recipe cannot work; `failed` where its process died or broke off.
        recipe: named by its steps; None where the trial never got so far.
        figures: of a measured one.
        over: names of the limits it passes.
        why: of a refused or failed one.
        same_as: number of the trial whose measurements these are, because its recipe is the same.
    """

    number: int
    state: Literal["measured", "refused", "failed"]
    recipe: Recipe | None
    figures: Figures | None
    over: tuple[str, ...] = ()
    why: str = ""
    same_as: int | None = None

    @property
    def feasible(self) -> bool:
        """Measured, and within all limits."""
        return self.figures is not None and not self.over


@dataclass(frozen=True)
class Result:
    """What a search has found so far.

    Attributes:
        trials: all that are finished, of all processes and runs, in their order.
        frontier: the feasible ones that no other beats in all objectives, each recipe once.
        choices: the best for each scenario, of all feasible ones: one that another beats in quality, latency and size
            can have the narrower interval, and be within a limit where the other is not.
        seconds: how long this run took, and `done` how many trials it finished.
        interrupted: it was broken off with Ctrl-C.
    """

    study: str
    workload: str
    full: str
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    frontier: tuple[Trial, ...]
    choices: tuple[Choice, ...]
    seconds: float = 0.0
    done: int = 0
    interrupted: bool = False

    def named(self, name: str) -> Trial:
        """The trial whose recipe has that name."""
        return next(
            trial for trial in self.trials if trial.recipe and trial.recipe.name == name and trial.figures
        )


INTERRUPTED = "interrupted"
"""Why a trial failed that was broken off with Ctrl-C."""


def ended(study: optuna.Study) -> int:
    """How many trials came to an end of their own: not those that were broken off, or whose process died.

    Errors count, or else a search in which each trial fails would have no end.
    """
    from optuna.trial import TrialState

    return sum(
        trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        or (trial.state == TrialState.FAIL and trial.user_attrs.get("why", INTERRUPTED) != INTERRUPTED)
        for trial in study.get_trials(deepcopy=False)
    )


def finished_of(study: optuna.Study, limits: Limits) -> tuple[Trial, ...]:
    """All trials that are finished, in their order."""
    return tuple(
        as_trial(trial, limits) for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()
    )


def as_trial(frozen: optuna.trial.FrozenTrial, limits: Limits) -> Trial:
    """A finished trial of Optuna's as ours."""
    from optuna.trial import TrialState

    attributes = frozen.user_attrs
    recipe = None
    if "recipe" in attributes:
        raw = Recipe.model_validate(attributes["recipe"])
        recipe = raw.model_copy(update={"name": name_of(raw)})
    same_as = attributes.get("same_as")
    if frozen.state == TrialState.COMPLETE:
        figures = Figures.model_validate(attributes["figures"])
        over = tuple(name for name, by in limits.over(figures).items() if by > 0)
        return Trial(frozen.number, "measured", recipe, figures, over, "", same_as)
    state: Literal["refused", "failed"] = "refused" if frozen.state == TrialState.PRUNED else "failed"
    why = attributes.get("why", "its process died")
    return Trial(frozen.number, state, recipe, None, (), why, same_as)


def result_of(
    study: str,
    workload: Workload,
    full: Variant,
    objectives: tuple[Objective, ...],
    trials: tuple[Trial, ...],
    seconds: float,
    done: int,
    interrupted: bool,
) -> Result:
    """What a study's trials come to."""
    feasible = {
        trial.recipe.name: trial
        for trial in trials
        if trial.feasible and trial.recipe is not None and trial.same_as is None
    }
    best = best_of(feasible, objectives)
    candidates = [candidate_of(trial) for trial in feasible.values()]
    choices = tuple(choose(scenario, candidates) for scenario in SCENARIOS)
    return Result(
        study, workload.name, full.tag, objectives, trials, tuple(best), choices, seconds, done, interrupted
    )


def best_of(trials: Mapping[str, Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The measured trials that no other beats, best in the first objective first."""
    costs = {
        name: tuple(trial.figures.cost(objective) for objective in objectives)
        for name, trial in trials.items()
        if trial.figures is not None
    }
    return [trials[name] for name in sorted(frontier(costs), key=lambda name: costs[name])]


def candidate_of(trial: Trial) -> Candidate:
    """A measured trial as the scenarios see it."""
    assert trial.recipe is not None
    assert trial.figures is not None
    figures = trial.figures
    return Candidate(
        trial.recipe.name,
        figures.drop.value,
        figures.drop.high,
        figures.size_bytes,
        figures.size_bytes / figures.full_size_bytes,
        figures.latency_ratio,
    )


_WORDS = {
    "prune_structured": "structured",
    "prune_magnitude": "sparse",
    "cluster_weights": "shared",
    "low_rank": "low-rank",
    "distill": "distilled",
    "int8_dynamic": "int8-dynamic",
    "int8_static": "int8-static",
    "int4_weights": "int4",
    "mixed_precision": "mixed",
    "entropy_code": "coded",
    "finetune": "",
}


def name_of(recipe: Recipe) -> str:
    """A name for a recipe from its steps, with six digits of its hash: `structured-int8-static-3fa2b1`."""
    words = []
    for spec in recipe.steps:
        word = _WORDS.get(spec.step, spec.step.replace("_", "-"))
        if spec.params.get("nodes_to_exclude"):
            word += "-mixed"
        if word and word not in words:
            words.append(word)
    digits = recipe.model_copy(update={"name": "trial"}).hash()[:6]
    return f"{'-'.join(words)[:34].strip('-') or 'tuned'}-{digits}"


def describe_steps(recipe: Recipe) -> str:
    """The steps and their parameters in one line: `prune_structured(amount=0.5) finetune(epochs=2)`."""
    parts = []
    for spec in recipe.steps:
        params = ", ".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in spec.params.items()
        )
        parts.append(f"{spec.step}({params})" if params else spec.step)
    return " ".join(parts)


def save_recipes(result: Result, folder: Path) -> dict[str, Path]:
    """Write the frontier's recipes, and those that suit a scenario, as YAML that reads back to equal recipes."""
    chosen = {trial.recipe.name: trial for trial in result.frontier if trial.recipe}
    for choice in result.choices:
        for name in (choice.winner, choice.runner_up):
            if name is not None:
                chosen.setdefault(name, result.named(name))
    written = {}
    for name, trial in chosen.items():
        assert trial.recipe is not None
        assert trial.figures is not None
        figures = trial.figures
        comment = [
            f"Trial {trial.number} of search {result.study}, from {result.full}. On validation rows: quality "
            f"{100 * figures.quality.value:.1f}%, drop {100 * figures.drop.value:z.1f} pt,",
            f"{figures.size_bytes} bytes, {figures.latency_ratio:.0%} of full precision's time.",
        ]
        written[name] = save_recipe(trial.recipe, comment, folder / f"{name}.yaml")
    return written


def save_recipe(recipe: Recipe, comment: Sequence[str], path: Path) -> Path:
    """Write a recipe as YAML that reads back to an equal one; a reader never sees half a file.

    Args:
        comment: lines above it.
    """
    text = "".join(f"# {line}\n" for line in comment) + recipe.to_yaml()
    write_atomically(path, text.encode())
    return path
