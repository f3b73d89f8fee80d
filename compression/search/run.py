"""Search for good recipes with Optuna: every trial a recipe, built and measured on validation rows.

The study lives in a database, so that a search can be stopped and gone on with, and several processes can work on one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.errors import CompressionError
from compression.planner import plan
from compression.recipe import Recipe
from compression.search.evaluate import (
    OBJECTIVES,
    Evaluator,
    Figures,
    Limits,
    Objective,
    SearchError,
    locked,
    selection_data,
)
from compression.search.result import (
    INTERRUPTED,
    Result,
    Trial,
    as_trial,
    describe_steps,
    ended,
    finished_of,
    result_of,
)
from compression.search.space import Space
from compression.search.study import (
    SamplerName,
    bury_the_dead,
    drawing,
    is_dead,
    opened,
    requeue,
    sampler_of,
    this_worker,
)
from compression.steps import StepContext
from compression.workload import Workload

if TYPE_CHECKING:
    import optuna

    from compression.cache import StepCache
    from compression.variant import Variant

STALE = 50
"""So many trials in a row that are all copies say that the space is used up."""


def search(
    workload: Workload,
    full: Variant,
    space: Space,
    *,
    folder: Path,
    study: str,
    objectives: Sequence[Objective] = ("quality", "latency", "size"),
    limits: Limits | None = None,
    sampler: SamplerName | None = None,
    seed: int = 0,
    storage: str | None = None,
    budget_s: float | None = None,
    trials: int | None = None,
    cache: StepCache | None = None,
    progress: Callable[[int, str], None] = lambda _number, _what: None,
    told: Callable[[Trial], None] = lambda _trial: None,
) -> Result:
    """Try recipes of a space until the time or the number of trials is used up; goes on with a study that exists.

    One objective is searched with TPE (Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011,
    section 4), several with NSGA-II (Deb et al., "A fast and elitist multiobjective genetic algorithm", IEEE TEC 6(2),
    2002), both as Optuna has them. What a trial draws depends on the seed, its number and what is finished by then.
    The trial under way when the time is up is finished. Where only the time ends a search, it also ends after STALE
    trials in a row whose recipes were all tried before.

    Args:
        folder: where the study's database and locks are kept.
        study: its name. Another process that gives the same one works on the same study.
        objectives: what to make better, each once.
        sampler: None for the default of so many objectives.
        storage: None for SQLite in `folder`; an SQLAlchemy URL for a database that several machines reach; or
            `journal:PATH` for a file on NFS.
        budget_s: seconds; `trials`: how many finished trials the study has in the end, those of earlier runs, refused
            ones and ones that raised an error included.
        cache: of the results of steps, which recipes with the same beginning share.
        progress: called with the number of the trial and what is being done.
        told: called with each trial that this process has finished.

    Raises:
        SearchError: neither budget nor trials; the study was made of something else; or its database is out of reach.
    """
    if budget_s is None and trials is None:
        raise SearchError("a search needs an end: give --budget, --trials or both")
    if not objectives or len(set(objectives)) != len(objectives):
        raise SearchError("give each objective once, and at least one of " + ", ".join(OBJECTIVES))
    limits = limits or Limits()
    kind: SamplerName = sampler or ("tpe" if len(objectives) == 1 else "nsga2")
    setup = {
        "workload": workload.name,
        "full": full.tag,
        "objectives": list(objectives),
        "limits": limits.model_dump(mode="json", exclude_none=True),
        "space": space.digest(),
    }
    started = time.monotonic()
    with opened(folder, study, storage, setup, len(objectives), space, trials or 10**9) as found:
        found.sampler = sampler_of(kind, seed)
        run = _Run(
            workload,
            full,
            space,
            tuple(objectives),
            limits,
            kind,
            cache,
            progress,
            told,
            folder / f"{study}.claims",
        )
        interrupted = False
        try:
            run.go(found, budget_s, trials)
        except KeyboardInterrupt:
            interrupted = True
        finished = finished_of(found, limits)
    return result_of(
        study, workload, full, tuple(objectives), finished, time.monotonic() - started, run.done, interrupted
    )


class _Run:
    """One process's share of a search."""

    def __init__(
        self,
        workload: Workload,
        full: Variant,
        space: Space,
        objectives: tuple[Objective, ...],
        limits: Limits,
        kind: SamplerName,
        cache: StepCache | None,
        progress: Callable[[int, str], None],
        told: Callable[[Trial], None],
        claims: Path,
    ) -> None:
        self.workload = workload
        self.full = full
        self.space = space
        self.objectives = objectives
        self.limits = limits
        # Crossover and Gaussian processes only know parameters that all trials have.
        self.draw_all = kind in ("nsga2", "gp")
        self.cache = cache
        self.progress = progress
        self.told = told
        self.data = selection_data(workload)
        self.claims = claims
        self.done = 0
        self.stale = 0
        self.evaluate: Evaluator | None = None

    def go(self, study: optuna.Study, budget_s: float | None, trials: int | None) -> None:
        """Run trials until the end."""
        callbacks: list[Any] = [self._tell, lambda study, _trial: bury_the_dead(study)]
        bury_the_dead(study)
        if trials is not None:
            if ended(study) >= trials:
                return
            callbacks.append(lambda study, _trial: study.stop() if ended(study) >= trials else None)
        else:
            callbacks.append(lambda study, _trial: study.stop() if self.stale >= STALE else None)
        stop = None if budget_s is None else time.monotonic() + budget_s
        self.evaluate = Evaluator(self.workload, self.data, self.full)
        left = None if stop is None else max(0.0, stop - time.monotonic())
        study.optimize(self._try, timeout=left, callbacks=callbacks, catch=(Exception,))

    def _tell(self, _study: optuna.Study, frozen: optuna.trial.FrozenTrial) -> None:
        self.done += 1
        self.stale = self.stale + 1 if "same_as" in frozen.user_attrs else 0
        self.told(as_trial(frozen, self.limits))

    def _try(self, trial: optuna.Trial) -> list[float]:
        import optuna

        trial.set_user_attr("worker", this_worker())
        try:
            return self._measured(trial)
        except KeyboardInterrupt:
            # Nobody's fault: whoever goes on starts with it.
            trial.set_user_attr("why", INTERRUPTED)
            again = trial.user_attrs.get("retry_of", trial.number)
            drawn = trial.study.get_trials(deepcopy=False)[trial.number]
            requeue(trial.study, drawn, {"retry_of": again, "interrupted": True})
            raise
        except optuna.TrialPruned:
            raise
        except CompressionError as error:
            trial.set_user_attr("why", str(error))
            raise optuna.TrialPruned(str(error)) from None
        except Exception as error:
            trial.set_user_attr("why", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            raise

    def _measured(self, trial: optuna.Trial) -> list[float]:
        import optuna

        from compression.compress import build_model

        draw = drawing(trial, self.space)
        if self.draw_all:
            for name in self.space.parameters:
                draw(name)
        recipe = self.space.recipe(draw)
        trial.set_user_attr("recipe", recipe.model_dump(mode="json"))
        steps = plan(recipe, self.workload)
        self.progress(trial.number, describe_steps(recipe))
        figures, other = self._known(trial, recipe)
        if other is not None:
            trial.set_user_attr("same_as", other.number)
        if figures is None and other is not None:
            reason = other.user_attrs.get("why") or f"trial {other.number} is at the same recipe"
            trial.set_user_attr("why", reason)
            raise optuna.TrialPruned(reason)
        if figures is None:
            assert self.evaluate is not None
            context = StepContext(
                self.workload,
                self.data,
                recipe.seed,
                lambda what, done: self.progress(
                    trial.number,
                    f"{describe_steps(recipe)}: {what}" + (f" {done:.0%}" if done else ""),
                ),
            )
            figures = self.evaluate(build_model(self.full, steps, context, self.cache))
        trial.set_user_attr("figures", figures.model_dump(mode="json"))
        for name, over in self.limits.over(figures).items():
            trial.set_constraint(name, over)
        return [figures.cost(objective) for objective in self.objectives]

    def _known(
        self, trial: optuna.Trial, recipe: Recipe
    ) -> tuple[Figures | None, optuna.trial.FrozenTrial | None]:
        """The figures of the same recipe in another trial, and that trial; or the one that is at it now."""
        from optuna.trial import TrialState

        # One at a time in this folder. Machines with folders of their own may now and then both build one recipe.
        with locked(self.claims):
            claim = [recipe.hash(), time.time(), trial.number]
            trial.set_user_attr("claim", claim)
            others = trial.study.get_trials(deepcopy=False)
        at_it = None
        for other in others:
            theirs = other.user_attrs.get("claim")
            if other.number == trial.number or not theirs or theirs[0] != claim[0]:
                continue
            if other.state == TrialState.COMPLETE:
                return Figures.model_validate(other.user_attrs["figures"]), other
            if other.state == TrialState.PRUNED and "same_as" not in other.user_attrs:
                return None, other
            if other.state == TrialState.RUNNING and theirs[1:] < claim[1:] and not is_dead(other):
                at_it = other
        return None, at_it
