"""The study of a search: where its trials are kept, what draws them, and whose process died."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compression.search.evaluate import SearchError, locked
from compression.search.space import Choices, Draw, Space

if TYPE_CHECKING:
    import optuna

SamplerName = Literal["tpe", "nsga2", "gp", "random"]
SAMPLERS: tuple[SamplerName, ...] = ("tpe", "nsga2", "gp", "random")

POPULATION = 20
"""Of NSGA-II: small, as searches of models have tens of trials, not thousands."""
_HEARTBEAT_S, _GRACE_S = 30, 180
_UNKNOWN_GRACE_S = 120
"""A trial that never said whose it is has died before it began."""
_SETUP = "setup"


@contextlib.contextmanager
def opened(
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
    from optuna.exceptions import StorageInternalError
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
        except (SQLAlchemyError, StorageInternalError, ImportError, OSError, ValueError) as error:
            first = " ".join(str(error).split())[:200]
            raise SearchError(f"the study at {without_password(url)} cannot be opened: {first}") from None
    try:
        yield study
    except (SQLAlchemyError, StorageInternalError) as error:
        first = " ".join(str(error).split())[:200]
        raise SearchError(
            f"the study at {without_password(url)} is out of reach: {first}; run the same command again to go on"
        ) from None
    finally:
        _close(backend)


def without_password(url: str) -> str:
    """A database's address as it may be shown."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url)


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


def sampler_of(kind: SamplerName, seed: int) -> optuna.samplers.BaseSampler:
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


def this_worker() -> dict[str, Any]:
    import psutil

    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_dead(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether the process of a running trial is gone, as far as can be told from here.

    Of other machines only the heartbeat can tell, which Optuna minds. A journal has none: there, what another machine
    was at when it died counts as running for good.
    """
    import psutil

    worker = trial.user_attrs.get("worker")
    if worker is None:
        began = trial.datetime_start
        return began is not None and time.time() - began.timestamp() > _UNKNOWN_GRACE_S
    if worker["host"] != socket.gethostname():
        return False
    try:
        process = psutil.Process(worker["pid"])
        if process.status() == psutil.STATUS_ZOMBIE:  # killed, and its parent has not asked yet
            return True
        # Another process may have got the number since.
        return abs(process.create_time() - worker["started"]) > 1
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def bury_the_dead(study: optuna.Study) -> None:
    """Mark the trials of processes that died as failed, and queue each once more."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not is_dead(trial):
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
    requeue(study, trial, {"retry_of": attributes.get("retry_of", trial.number)})


def requeue(study: optuna.Study, trial: optuna.trial.FrozenTrial, attributes: dict[str, Any]) -> None:
    """Queue a trial again, with what it had drawn and what it had been given and not come to."""
    given = trial.system_attrs.get("fixed_params", {})
    study.enqueue_trial({**given, **trial.params}, user_attrs=attributes)
