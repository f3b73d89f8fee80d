"""Search for good recipes with Optuna: every trial a recipe, built and measured on validation rows.

The study lives in a database, so that a search can be stopped and gone on with, and several processes can work on one.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compression.data import Data, Rows
from compression.errors import CompressionError
from compression.pareto import frontier
from compression.planner import plan
from compression.recipe import Recipe
from compression.scenarios import SCENARIOS, Candidate, Choice, choose
from compression.scorecard import Estimate
from compression.search_space import Choices, Draw, Space
from compression.steps import StepContext
from compression.workload import Progress, SplitName, Workload, no_progress

if TYPE_CHECKING:
    import optuna

    from compression.cache import StepCache
    from compression.compress import Model
    from compression.variant import Variant

Objective = Literal["quality", "latency", "size", "macs"]
OBJECTIVES: tuple[Objective, ...] = ("quality", "latency", "size", "macs")
SamplerName = Literal["tpe", "nsga2", "gp", "random"]
SAMPLERS: tuple[SamplerName, ...] = ("tpe", "nsga2", "gp", "random")

POPULATION = 20
"""Of NSGA-II: small, as searches of models have tens of trials, not thousands."""
_HEARTBEAT_S, _GRACE_S = 30, 180
_UNKNOWN_GRACE_S = 120
"""A trial that never said whose it is has died before it began."""
_LATENCY_S = 0.3
_SETUP = "setup"


class SearchError(CompressionError):
    """A search cannot start, or cannot go on where another one stopped."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figures(_Frozen):
    """What was measured about a recipe's model, on validation rows only.

    Attributes:
        quality, drop: by the workload's metric; the drop is paired with full precision on the same rows.
        worst_group: of the groups whose loss is no chance (the lower end of the interval is above 0), the one that
            loses most, and how much; None where there is none.
        invalid_outputs: rows whose outputs are no finite numbers.
        size_bytes: bytes of the file that is kept; macs: multiply-accumulates for one record.
        latency_ms: median at batch 1; `full_latency_ms` of full precision, timed in turns with it.
    """

    quality: Estimate
    drop: Estimate
    worst_group: str | None
    worst_group_drop: float
    invalid_outputs: int
    size_bytes: int
    full_size_bytes: int
    macs: int
    full_macs: int
    latency_ms: float
    full_latency_ms: float

    @property
    def latency_ratio(self) -> float:
        """The model's time over full precision's; below 1 means faster."""
        return self.latency_ms / self.full_latency_ms

    def cost(self, objective: Objective) -> float:
        """The figure of an objective as something to make small: quality negated, latency relative to full's."""
        costs: dict[Objective, float] = {
            "quality": -self.quality.value,
            "latency": self.latency_ratio,
            "size": float(self.size_bytes),
            "macs": float(self.macs),
        }
        return costs[objective]


class Limits(_Frozen):
    """What a recipe must keep to; None is no limit.

    Attributes:
        max_drop: as the gate judges: for the upper end of the drop's interval, and for every group whose loss is no
            chance.
        max_latency_ratio: of full precision's time; `max_latency_ms` in milliseconds, of this machine.
        max_size_bytes: of the file that is kept.
    """

    max_drop: float | None = Field(default=None, ge=0)
    max_latency_ratio: float | None = Field(default=None, gt=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_size_bytes: int | None = Field(default=None, gt=0)
    max_macs: int | None = Field(default=None, gt=0)

    def over(self, figures: Figures) -> dict[str, float]:
        """By how much of itself each limit is passed: 0 or less is within it."""
        compared: dict[str, tuple[float, float | None]] = {
            "drop": (figures.drop.high, self.max_drop),
            "group": (figures.worst_group_drop, self.max_drop),
            "latency": (figures.latency_ratio, self.max_latency_ratio),
            "latency_ms": (figures.latency_ms, self.max_latency_ms),
            "size": (figures.size_bytes, self.max_size_bytes),
            "macs": (figures.macs, self.max_macs),
        }
        found = {
            name: (value - limit) / max(limit, 1e-9)
            for name, (value, limit) in compared.items()
            if limit is not None
        }
        return found | {"invalid_outputs": float(figures.invalid_outputs)}


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
        choices: the best for each scenario, of the feasible ones that nothing beats in quality, latency and size.
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


def selection_data(workload: Workload) -> Data:
    """The splits that a selection may see: asked for the test split, this raises SearchError.

    It is no subclass, because the step cache trusts no other class than `Data`.
    """
    data = Data(workload)
    rows = data.rows

    def guarded(name: SplitName) -> Rows:
        if name == "test":
            raise SearchError("a search must not look at the test split, and a step asked for it")
        return rows(name)

    data.rows = guarded  # type: ignore[method-assign]
    return data


class Evaluator:
    """Measures models on validation rows against full precision."""

    def __init__(self, workload: Workload, data: Data, full: Variant) -> None:
        import onnx

        from compression.graph import count_macs
        from compression.measure import answer, open_checked
        from compression.variant import MODEL

        self.workload = workload
        self.data = data
        self.rows = data.rows("validation")
        content = full.onnx_bytes()
        self.full_session = open_checked(content, self.rows.tensors)
        self.full_answers = answer(workload, self.full_session, self.rows.tensors)
        self.full_size = full.manifest.files[MODEL].bytes
        self.full_macs = count_macs(onnx.load_model_from_string(content), self.rows.tensors)

    def __call__(self, model: Model) -> Figures:
        """Measure one model.

        Raises:
            WorkloadError: it does not take what `encode` makes.
        """
        import onnx
        from numpy import unique

        from compression.graph import count_macs
        from compression.measure import Pairs, answer, drop, latency, open_checked, quality

        metric = self.workload.metric
        session = open_checked(model.onnx, self.rows.tensors)
        own = answer(self.workload, session, self.rows.tensors)
        pairs = Pairs.of(own, self.full_answers, self.rows.labels)
        worst: tuple[float, str | None] = (0.0, None)
        for attribute, values in self.data.groups("validation").items():
            for value in unique(values):
                part = pairs.among(values == value).about(self.workload)
                if len(part.labels):
                    lost = drop(metric, part)
                    if lost.low > 0 and lost.value > worst[0]:
                        worst = lost.value, f"{attribute}={value}"
        times = latency(session, self.full_session, self.rows.tensors, 1, budget_s=_LATENCY_S)
        return Figures(
            quality=quality(metric, pairs.about(self.workload)),
            drop=drop(metric, pairs.about(self.workload)),
            worst_group=worst[1],
            worst_group_drop=worst[0],
            invalid_outputs=pairs.invalid,
            size_bytes=model.size_bytes,
            full_size_bytes=self.full_size,
            macs=count_macs(onnx.load_model_from_string(model.onnx), self.rows.tensors),
            full_macs=self.full_macs,
            latency_ms=times.p50_ms,
            full_latency_ms=times.full_p50_ms,
        )


def full_precision(workload: Workload, folder: Path, progress: Progress = no_progress) -> Variant:
    """The workload's full-precision variant, made if there is none; one process makes it, others wait.

    Args:
        folder: where the lock is kept.
    """
    from compression.full import make_full, stored_full

    with locked(folder / "full.lock"):
        return stored_full(workload) or make_full(workload, Data(workload), progress)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes with the process, whatever becomes of it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    The trial under way when the time is up is finished.

    Args:
        folder: where the study's database and locks are kept.
        study: its name. Another process that gives the same one works on the same study.
        objectives: what to make better, each once.
        sampler: None for the default of so many objectives.
        storage: None for SQLite in `folder`; an SQLAlchemy URL for a database that several machines reach; or
            `journal:PATH` for a file on NFS.
        budget_s: seconds; `trials`: how many finished trials the study has in the end, those of earlier runs included.
        cache: of the results of steps, which recipes with the same beginning share.
        progress: called with the number of the trial and what is being done.
        told: called with each trial that this process has finished.

    Raises:
        SearchError: neither budget nor trials; or the study was made of something else.
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
    with _opened(folder, study, storage, setup, len(objectives), space, trials or 10**9) as opened:
        opened.sampler = _sampler(kind, seed)
        run = _Run(workload, full, space, tuple(objectives), limits, kind, cache, progress, told)
        interrupted = False
        try:
            run.go(opened, budget_s, trials)
        except KeyboardInterrupt:
            interrupted = True
        finished = _finished(opened, limits)
    return _result(
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
        self.done = 0
        self.evaluate: Evaluator | None = None

    def go(self, study: optuna.Study, budget_s: float | None, trials: int | None) -> None:
        """Run trials until the end."""
        callbacks: list[Any] = [self._tell, lambda study, _trial: bury_the_dead(study)]
        bury_the_dead(study)
        if trials is not None:
            if _ended(study) >= trials:
                return
            callbacks.append(lambda study, _trial: study.stop() if _ended(study) >= trials else None)
        stop = None if budget_s is None else time.monotonic() + budget_s
        self.evaluate = Evaluator(self.workload, self.data, self.full)
        left = None if stop is None else max(0.0, stop - time.monotonic())
        study.optimize(self._try, timeout=left, callbacks=callbacks, catch=(Exception,))

    def _tell(self, _study: optuna.Study, frozen: optuna.trial.FrozenTrial) -> None:
        self.done += 1
        self.told(_as_trial(frozen, self.limits))

    def _try(self, trial: optuna.Trial) -> list[float]:
        import optuna

        trial.set_user_attr("worker", _this_worker())
        try:
            return self._measured(trial)
        except KeyboardInterrupt:
            # Nobody's fault: whoever goes on starts with it.
            trial.set_user_attr("why", "interrupted")
            again = trial.user_attrs.get("retry_of", trial.number)
            trial.study.enqueue_trial(trial.params, user_attrs={"retry_of": again, "interrupted": True})
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

        # First the claim, then the look: of two processes at least one sees the other.
        claim = [recipe.hash(), time.time(), trial.number]
        trial.set_user_attr("claim", claim)
        at_it = None
        for other in trial.study.get_trials(deepcopy=False):
            theirs = other.user_attrs.get("claim")
            if other.number == trial.number or not theirs or theirs[0] != claim[0]:
                continue
            if other.state == TrialState.COMPLETE:
                return Figures.model_validate(other.user_attrs["figures"]), other
            if other.state == TrialState.PRUNED and "same_as" not in other.user_attrs:
                return None, other
            if other.state == TrialState.RUNNING and theirs[1:] < claim[1:] and not _is_dead(other):
                at_it = other
        return None, at_it


# --- studies ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(
    folder: Path,
    name: str,
    storage: str | None,
    setup: Mapping[str, Any],
    objectives: int,
    space: Space,
    trials: int,
) -> Iterator[optuna.Study]:
    """The study of that name, made if there is none."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.CRITICAL + 1)
    url = storage or f"sqlite:///{(folder / f'{name}.db').absolute()}"
    with warnings.catch_warnings():
        # Heartbeats and journals count as experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            # Two processes that make the tables at once would get in each other's way.
            with locked(folder / f"{name}.lock"):
                backend = _storage(url)
                try:
                    study = optuna.create_study(
                        storage=backend,
                        study_name=name,
                        directions=["minimize"] * objectives,
                        load_if_exists=True,
                    )
                    _check_setup(study, name, setup)
                    if _SETUP not in study.user_attrs:
                        study.set_user_attr(_SETUP, dict(setup))
                        for start in space.starts()[: max(1, trials // 2)]:
                            study.enqueue_trial(_encoded(space, start), skip_if_exists=True)
                except BaseException:
                    _close(backend)
                    raise
        except (
            SQLAlchemyError,
            ImportError,
            OSError,
            ValueError,
            optuna.exceptions.StorageInternalError,
        ) as error:
            first = " ".join(str(error).split())[:200]
            raise SearchError(f"the study at {url} cannot be opened: {first}") from None
    try:
        yield study
    finally:
        _close(backend)


def _storage(url: str) -> optuna.storages.BaseStorage:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = url.removeprefix("journal:")
    if path != url:
        target = Path(path).expanduser().absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(target), JournalFileOpenLock(str(target)))
        return optuna.storages.JournalStorage(backend)
    if "://" not in url:
        raise ValueError("it is neither a URL such as postgresql://... nor journal:PATH")
    return optuna.storages.RDBStorage(
        url,
        # Others may be writing.
        engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
        heartbeat_interval=_HEARTBEAT_S,
        grace_period=_GRACE_S,
        heartbeat_stale_trial_callback=_retry,
    )


def _close(storage: optuna.storages.BaseStorage) -> None:
    import optuna

    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _check_setup(study: optuna.Study, name: str, setup: Mapping[str, Any]) -> None:
    before = study.user_attrs.get(_SETUP)
    if before is None:
        if study.get_trials(deepcopy=False):
            raise SearchError(f"study {name} was not made by trimtab search: choose another --study")
        return
    for key, words in (
        ("workload", "workload"),
        ("full", "full-precision model or data"),
        ("objectives", "objectives"),
        ("limits", "limits"),
        ("space", "search space"),
    ):
        if before.get(key) != setup[key]:
            raise SearchError(
                f"study {name} was made with another {words} ({_short(before.get(key))}, "
                f"now {_short(setup[key])}), and its trials do not compare: give the study another name with --study"
            )


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def drawing(trial: optuna.Trial, space: Space) -> Draw:
    """Draws parameters of a space with an Optuna trial."""

    def draw(name: str) -> Any:
        parameter = space.parameters[name]
        if isinstance(parameter, Choices):
            # As texts: a database keeps no lists.
            return json.loads(trial.suggest_categorical(name, parameter.labels()))
        if parameter.whole:
            return trial.suggest_int(
                name,
                int(parameter.low),
                int(parameter.high),
                log=parameter.log,
                step=int(parameter.step or 1),
            )
        value = trial.suggest_float(
            name, parameter.low, parameter.high, log=parameter.log, step=parameter.step
        )
        # 0.30000000000000004 would be another recipe than 0.3.
        return float(f"{value:.6g}")

    return draw


def _encoded(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: json.dumps(value, sort_keys=True) if isinstance(space.parameters[name], Choices) else value
        for name, value in values.items()
    }


def _sampler(kind: SamplerName, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler that is seeded anew for each trial by the trial's number.

    A run that goes on does not draw again what the first one drew, nor do two processes draw the same.
    """
    import numpy as np
    import optuna
    from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

    def made(number: int) -> BaseSampler:
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if kind == "nsga2":
                return NSGAIISampler(population_size=POPULATION, seed=own)
            if kind == "gp":
                return GPSampler(seed=own)
            return TPESampler(seed=own) if kind == "tpe" else RandomSampler(seed=own)

    class Numbered(BaseSampler):
        def __init__(self) -> None:
            self.inner = made(0)

        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            self.inner = made(trial.number)
            self.inner.before_trial(study, trial)

        def infer_relative_search_space(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial
        ) -> dict[str, Any]:
            return self.inner.infer_relative_search_space(study, trial)

        def sample_relative(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, Any]
        ) -> dict[str, Any]:
            return self.inner.sample_relative(study, trial, search_space)

        def sample_independent(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            param_name: str,
            param_distribution: optuna.distributions.BaseDistribution,
        ) -> Any:
            return self.inner.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(
            self,
            study: optuna.Study,
            trial: optuna.trial.FrozenTrial,
            state: optuna.trial.TrialState,
            values: Sequence[float] | None,
        ) -> None:
            self.inner.after_trial(study, trial, state, values)

    return Numbered()


# --- processes that died ------------------------------------------------------------------------------------------


def _this_worker() -> dict[str, Any]:
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _is_dead(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether the process of a running trial is gone, as far as can be told from here.

    Of other machines only the heartbeat can tell, which Optuna minds.
    """
    import psutil

    worker = trial.user_attrs.get("worker")
    if worker is None:
        began = trial.datetime_start
        return began is not None and time.time() - began.timestamp() > _UNKNOWN_GRACE_S
    if worker["host"] != socket.gethostname():
        return False
    try:
        # Another process may have got the number since.
        return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 1
    except psutil.Error:
        return True


def bury_the_dead(study: optuna.Study) -> None:
    """Mark the trials of processes that died as failed, and queue each once more."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _is_dead(trial):
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, UpdateFinishedTrialError):
            continue  # another process was first
        _retry(study, trial)


def _retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue a trial whose process died once more; the second time it may be the recipe's doing."""
    attributes = trial.user_attrs
    if "retry_of" in attributes and not attributes.get("interrupted"):
        return
    study.enqueue_trial(trial.params, user_attrs={"retry_of": attributes.get("retry_of", trial.number)})


# --- results ------------------------------------------------------------------------------------------------------


def _ended(study: optuna.Study) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _finished(study: optuna.Study, limits: Limits) -> tuple[Trial, ...]:
    return tuple(
        _as_trial(trial, limits) for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()
    )


def _as_trial(frozen: optuna.trial.FrozenTrial, limits: Limits) -> Trial:
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


def _result(
    study: str,
    workload: Workload,
    full: Variant,
    objectives: tuple[Objective, ...],
    trials: tuple[Trial, ...],
    seconds: float,
    done: int,
    interrupted: bool,
) -> Result:
    feasible = {
        trial.recipe.name: trial
        for trial in trials
        if trial.feasible and trial.recipe is not None and trial.same_as is None
    }
    best = best_of(feasible, objectives)
    able = best_of(feasible, ("quality", "latency", "size"))
    candidates = [candidate_of(trial) for trial in able]
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
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, trial in chosen.items():
        assert trial.recipe is not None
        assert trial.figures is not None
        figures = trial.figures
        path = folder / f"{name}.yaml"
        comment = (
            f"# Trial {trial.number} of search {result.study}, from {result.full}. On validation rows: quality "
            f"{100 * figures.quality.value:.1f}%, drop {100 * figures.drop.value:z.1f} pt,\n"
            f"# {figures.size_bytes} bytes, {figures.latency_ratio:.0%} of full precision's time.\n"
        )
        # A reader must never see half a file.
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(comment + trial.recipe.to_yaml(), encoding="utf-8")
        part.replace(path)
        written[name] = path
    return written
