"""Make every variant and every peer's model of a workload, and measure them side by side."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compression import peers
from benchmarks.compression.goals import BASELINES, GOALS, Bench, judge
from benchmarks.serving.processes import BenchmarkError
from compression.cache import StepCache
from compression.compress import compress
from compression.data import Data
from compression.errors import CompressionError
from compression.export import open_session
from compression.full import load_network
from compression.measure import Answers, Pairs, answer, drop, latency, measure
from compression.planner import plan
from compression.recipe import Recipe, find_recipe, library, recipes_in
from compression.scorecard import Scorecard
from compression.variant import FULL, Variant
from compression.workload import Tensors, Workload, load_workload

__all__ = ["Options", "measure_workload", "sha256_of_recipe"]

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch, eager"
_BATCHES = (1, 32)
_LEAST, _MOST = 10, 20_000
"""Calls of each model in a round: a batch of texts takes a second, and an MLP hundredths of a millisecond."""
_SAME_SIZE = 1.02
"""A peer's file may be this much larger and still count as no larger."""
_FASTER = 1.05
_ROUNDS = 0.8
"""A peer counts as faster that is so by `_FASTER` in this share of the rounds."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How much is measured.

    Attributes:
        rounds: times that everything is timed, in turns.
        seconds: for each model, batch size and round.
        recipes: names of the recipes to run, instead of the workload's.
        peers: whether to compare with other libraries.
        twice: whether to make a variant of each goal again in a fresh process.
    """

    rounds: int
    seconds: float
    cache: Path
    recipes: tuple[str, ...] | None = None
    peers: bool = True
    twice: bool = True


@dataclass(frozen=True)
class Model:
    """A model that is measured: its file, and how it answers the test split."""

    name: str
    kind: str
    card: Scorecard
    content: bytes
    answers: Answers


def measure_workload(name: str, bench: Bench, options: Options, say: Say) -> list[dict[str, Any]]:
    """The rows of one workload.

    Raises:
        CompressionError: full precision cannot be made.
    """
    import torch

    workload = load_workload(ROOT / bench.folder)
    data = Data(workload)
    problems: dict[str, str] = {}
    recipes = _recipes(workload, options.recipes or bench.recipes)
    shown = [0.0]

    def progress(what: str, done: float) -> None:
        if time.monotonic() - shown[0] > 30:
            shown[0] = time.monotonic()
            say(f"{name}: {what} {done:.0%}")

    variants = compress(
        workload,
        recipes,
        cache=StepCache.open(),
        progress=progress,
        made=lambda variant, seconds, *_: say(f"{name}: {variant.name} ({seconds:.0f} s)"),
        failed=lambda recipe, error: problems.__setitem__(recipe.name, str(error)),
    )
    full = variants[0]
    models = [_of_variant(workload, data, variant) for variant in variants]
    for peer, make in peers.ALL.items() if options.peers else ():
        say(f"{name}: {peer}")
        try:
            content = make(workload, data, full.onnx_bytes(), options.cache, say)
            models.append(_of_peer(workload, data, peer, content, full.onnx_bytes()))
        except (CompressionError, BenchmarkError, OSError, RuntimeError, ValueError) as error:
            problems[peer] = " ".join(str(error).split())[:300]
    say(f"{name}: timing {len(models)} models, {options.rounds} rounds")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ratios = _ratios(models, lambda: _Eager(load_network(workload, full)), data.rows("test").tensors, options)
    torch.set_num_threads(threads)
    labels = data.rows("test").labels
    rows = [_row(workload, model, models, ratios, labels) for model in models]
    rows.append(_empty(workload, TORCH, "peer") | _speeds(ratios, TORCH))
    rows += [
        {**_empty(workload, which, "problem"), "problem": problem} for which, problem in problems.items()
    ]
    if options.twice:
        rows += _made_twice(workload, bench, variants, say)
    return rows


def _recipes(workload: Workload, names: Sequence[str] | None) -> list[Recipe]:
    if names is not None:
        return [find_recipe(name, workload.directory) for name in names]
    known = {recipe.name: recipe for recipe in (*library(), *recipes_in(workload.directory / "recipes"))}
    able = []
    for recipe in known.values():
        try:
            plan(recipe, workload)
        except CompressionError:
            continue
        able.append(recipe)
    return able


def _of_variant(workload: Workload, data: Data, variant: Variant) -> Model:
    card = variant.scorecard()
    assert card is not None  # compress() measured it
    kind = "full precision" if variant.name == FULL else "recipe"
    return _model(workload, data, variant.name, kind, card, variant.onnx_bytes())


def _of_peer(workload: Workload, data: Data, name: str, content: bytes, full: bytes) -> Model:
    card = measure(workload, data, name, content, full)
    return _model(workload, data, name, "peer", card, content)


def _model(workload: Workload, data: Data, name: str, kind: str, card: Scorecard, content: bytes) -> Model:
    return Model(
        name, kind, card, content, answer(workload, open_session(content), data.rows("test").tensors)
    )


class _Eager:
    """A torch network with the one method of a session that timing uses."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def run(self, _outputs: None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import torch

        with torch.inference_mode():
            answers = self.network(**{name: torch.from_numpy(array) for name, array in feed.items()})
        return [answers.numpy()]


_Ratios = Mapping[tuple[str, int], Sequence[float]]
"""(model, batch) -> how many times faster than full precision it was in each round."""


def _ratios(
    models: Sequence[Model], eager: Callable[[], _Eager], tensors: Tensors, options: Options
) -> _Ratios:
    """Time all models in each round, each in turns with full precision.

    Every round loads them anew: where a session's memory comes to lie moves its speed by some percent for as long as it
    is open, which more rounds of the same session would not show.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(options.rounds):
        full = open_session(models[0].content)
        order = [*models, None]
        for model in order if number % 2 else order[::-1]:
            session = open_session(model.content) if model else eager()
            for batch in _BATCHES:
                timed = latency(
                    session, full, tensors, batch, budget_s=options.seconds, least=_LEAST, most=_MOST
                )
                found.setdefault((model.name if model else TORCH, batch), []).append(timed.speedup)
    return found


def _speeds(ratios: _Ratios, name: str) -> dict[str, Any]:
    alone = ratios[name, 1]
    return {
        "latency_ratio": statistics.median(alone),
        "latency_range": [min(alone), max(alone)],
        "latency_ratio_32": statistics.median(ratios[name, 32]),
    }


def _row(
    workload: Workload,
    model: Model,
    models: Sequence[Model],
    ratios: _Ratios,
    labels: np.ndarray,
) -> dict[str, Any]:
    card, full = model.card, models[0].card
    row = _empty(workload, model.name, model.kind) | {
        "size_bytes": card.size_bytes,
        "size_ratio": card.size_ratio,
        "weights_ratio": full.nonzero_parameters / max(1, card.nonzero_parameters),
        **_speeds(ratios, model.name),
        "torch_ratio": _faster(ratios, model.name, TORCH),
        "quality": card.quality.value,
        "quality_drop": card.drop.value,
        "ci": [card.drop.low, card.drop.high],
        "agreement": card.agreement,
        "groups_worse": sorted(name for name, group in card.groups.items() if group.drop.low > 0),
    }
    if model.kind == "recipe":
        row["beaten_by"] = [
            other.name
            for other in models
            if other.kind == "peer" and _beats(other, model, workload, ratios, labels)
        ]
    if model.kind == "full precision" and (least := BASELINES.get(workload.name)) is not None:
        row |= {"goal": f"full precision: accuracy >= {least:g}", "met": card.quality.value >= least}
    for goal in GOALS:
        if (goal.workload, goal.variant) == (workload.name, model.name):
            missed = judge(goal, row)
            row |= {"goal": goal.text(), "met": not missed, "missed": missed}
    return row


def _beats(
    peer: Model,
    ours: Model,
    workload: Workload,
    ratios: _Ratios,
    labels: np.ndarray,
) -> bool:
    """Whether a peer's model is no larger, and better: surely more often right, or no less often and faster."""
    if peer.card.size_bytes > _SAME_SIZE * ours.card.size_bytes:
        return False
    lost = drop(workload.metric, Pairs.of(ours.answers, peer.answers, labels).about(workload))
    if lost.low > 0:
        return _faster(ratios, peer.name, ours.name) >= 1 / _FASTER
    return lost.high >= 0 and _surely_faster(ratios, peer.name, ours.name)


def _faster(ratios: _Ratios, name: str, than: str) -> float:
    """How many times faster one is than another for single records: the median of the rounds."""
    return statistics.median(_in_rounds(ratios, name, than))


def _surely_faster(ratios: _Ratios, name: str, than: str) -> bool:
    rounds = _in_rounds(ratios, name, than)
    return sum(ratio > _FASTER for ratio in rounds) >= _ROUNDS * len(rounds)


def _in_rounds(ratios: _Ratios, name: str, than: str) -> list[float]:
    return [a / b for a, b in zip(ratios[name, 1], ratios[than, 1], strict=True)]


def _made_twice(
    workload: Workload, bench: Bench, variants: Sequence[Variant], say: Say
) -> list[dict[str, Any]]:
    """The recipes of this workload's goals once more, in a fresh process and without the cache."""
    made = {variant.name: variant for variant in variants}
    rows = []
    for name in sorted({goal.variant for goal in GOALS if goal.workload == workload.name} & made.keys()):
        say(f"{workload.name}: {name} again, in a process of its own")
        command = [sys.executable, "-m", "benchmarks.compression", "--sha256", bench.folder, name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        again = done.stdout.strip().rpartition("\n")[2]
        first = hashlib.sha256(made[name].onnx_bytes()).hexdigest()
        row = _empty(workload, name, "made twice")
        row |= {
            "goal": "the same recipe twice: identical sha256",
            "met": again == first,
            "sha256": [first, again],
        }
        rows.append(row)
    return rows


def sha256_of_recipe(folder: str, name: str) -> str:
    """Make a recipe's model anew from the stored full precision, and hash it as JSON-safe text."""
    from compression.compress import build_model
    from compression.full import stored_full
    from compression.steps import StepContext

    workload = load_workload(ROOT / folder)
    full = stored_full(workload)
    if full is None:
        raise BenchmarkError(f"{workload.name} has no full precision yet: run the benchmark itself first")
    recipe = find_recipe(name, workload.directory)
    context = StepContext(workload, Data(workload), recipe.seed)
    return hashlib.sha256(build_model(full, plan(recipe, workload), context).onnx).hexdigest()


def _empty(workload: Workload, variant: str, kind: str) -> dict[str, Any]:
    names = ("size_ratio", "latency_ratio", "quality", "quality_drop", "ci", "goal", "met")
    return {"workload": workload.name, "variant": variant, "kind": kind} | dict.fromkeys(names)
