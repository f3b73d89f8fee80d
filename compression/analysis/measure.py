"""How far a workload can be compressed: degradation curves, their knees, and the layers that suffer most.

Everything here is measured on the validation split, and held against full precision on the same rows; the test split
has no say in it. What was measured is kept as it comes, so that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from compression.analysis.bench import Bench
from compression.analysis.layers import INT4, INT8, INT8_TABLES, Layer, Quantizer, pruned_layer
from compression.analysis.marks import critical_because, with_marks
from compression.analysis.techniques import PRUNED, TECHNIQUES, TREATMENTS, Levels, Technique
from compression.analysis.types import Analysis, Curve, LayerReport, Measured
from compression.errors import PlanError, RecipeError, VariantNotFound
from compression.recipe import Recipe, StepSpec
from compression.variant import this_cpu
from compression.workload import Progress, Workload, no_progress

if TYPE_CHECKING:
    from onnx import ModelProto

_LEAST_LAYERS = 3
"""Layers that a median needs."""


def analyze(
    workload: Workload,
    home: Path,
    *,
    epochs: int = 0,
    techniques: Sequence[str] | None = None,
    layers: bool = True,
    fresh: bool = False,
    progress: Progress = no_progress,
    finished: Callable[[Curve | LayerReport], None] | None = None,
) -> Analysis:
    """Measure the degradation curves and the sensitivity of the layers.

    Args:
        home: where measurements are kept, in a folder of the workload's.
        epochs: passes over the train split after each level of the techniques that work on the torch network; these
            curves come beside the one-shot ones.
        techniques: keys of `TECHNIQUES`; all that can work on the workload if not given.
        layers: measure the layers too.
        fresh: measure anew what an earlier run has measured.
        progress: called before every measurement.
        finished: called after every curve and every layer.

    Raises:
        VariantNotFound: full precision was not made yet, or not from the present code, data and settings.
        RecipeError: no technique has that key.
    """
    from compression.full import stored_full

    known = [technique.key for technique in TECHNIQUES]
    for key in techniques or ():
        if key not in known:
            raise RecipeError(f"no technique {key}: use {', '.join(known)}")
    full = stored_full(workload)
    if full is None:
        raise VariantNotFound(
            f"{workload.name} has no full precision of its present code and data: "
            f"run `trimtab compress {workload.directory}`"
        )
    started = time.monotonic()
    chosen = [technique for technique in TECHNIQUES if techniques is None or technique.key in techniques]
    bench = Bench(workload, full, home, fresh=fresh, progress=progress)
    jobs = list(_jobs(bench, chosen, epochs))
    found = bench.layers() if layers else []
    bench.total = sum(len(levels) for _, _, levels in jobs) + len(found) * len(TREATMENTS)
    reference = bench.full_precision()
    curves = []
    for technique, with_epochs, levels in jobs:
        curve = _curve(bench, technique, with_epochs, levels, reference)
        curves.append(curve)
        if finished:
            finished(curve)
    reports = _layer_reports(bench, found, finished) if found else []
    return Analysis(
        workload=workload.name,
        metric=workload.metric,
        recall_of=workload.settings.recall_of,
        profile=workload.profile,
        full_tag=full.tag,
        full=reference,
        rows=len(bench.rows),
        cpu=this_cpu().model,
        versions=_versions(),
        created_at=time.time(),
        seconds=time.monotonic() - started,
        measurements=bench.done,
        reused=bench.reused,
        epochs=epochs,
        curves=tuple(curves),
        treatments=TREATMENTS,
        layers=tuple(reports),
        notes=tuple(dict.fromkeys(bench.notes)),
    )


def _jobs(bench: Bench, chosen: Sequence[Technique], epochs: int) -> list[tuple[Technique, int, Levels]]:
    """The techniques that can work on the workload, one-shot and, if asked for, with recovery."""
    from compression.planner import plan

    jobs: list[tuple[Technique, int, Levels]] = []
    for technique in chosen:
        specs = technique.specs()
        try:
            steps = plan(Recipe(name="analysis", steps=[specs[0][2]]), bench.workload)
        except PlanError as error:
            reason = str(error).partition(") ")[2]
            bench.notes.append(f"{technique.title}: {reason}")
            continue
        jobs.append((technique, 0, [(label, setting, (spec,)) for label, setting, spec in specs]))
        if epochs and steps[0].level == "torch":
            jobs.append(
                (
                    technique,
                    epochs,
                    [(label, setting, _recovered(spec, epochs)) for label, setting, spec in specs],
                )
            )
    return jobs


def _recovered(spec: StepSpec, epochs: int) -> tuple[StepSpec, ...]:
    if spec.step == "cluster_weights":
        # Plain training would part the weights that share a value; this step trains its own codebooks.
        return (spec.model_copy(update={"params": {**spec.params, "epochs": epochs}}),)
    return (spec, StepSpec(step="finetune", params={"epochs": epochs}))


def _curve(bench: Bench, technique: Technique, epochs: int, levels: Levels, reference: Measured) -> Curve:
    curve = Curve(
        key=technique.key,
        title=technique.title,
        setting=technique.setting,
        coded=technique.coded,
        epochs=epochs,
        levels=tuple(bench.level(technique.title, *level) for level in levels),
    )
    return with_marks(curve, reference)


def _layer_reports(
    bench: Bench, found: Sequence[Layer], finished: Callable[[Curve | LayerReport], None] | None
) -> list[LayerReport]:
    reports = []
    with tempfile.TemporaryDirectory(prefix="trimtab-") as ranges:
        quantizers = {
            name: Quantizer(bench.graph, bench.context, specs, Path(ranges) / f"{name}.json")
            for name, specs in (("int8", INT8), ("int8 tables", INT8_TABLES), ("int4", INT4))
        }

        def treated(layer: Layer, key: str) -> ModelProto | None:
            if key in PRUNED:
                return pruned_layer(bench.graph, layer.tensor, PRUNED[key])
            table = key == "int8" and layer.kind == "Gather"
            return quantizers["int8 tables" if table else key].quantized(layer)

        for layer in found:
            effects = {
                treatment.key: effect
                for treatment in TREATMENTS
                if (effect := bench.layer(layer, treatment, partial(treated, layer, treatment.key)))
            }
            reports.append(
                LayerReport(layer=layer.name, kind=layer.kind, weights=layer.weights, effects=effects)
            )
            if finished:
                finished(reports[-1])
    changes = {
        treatment.key: [
            report.effects[treatment.key].change for report in reports if treatment.key in report.effects
        ]
        for treatment in TREATMENTS
    }
    medians = {key: median(values) for key, values in changes.items() if len(values) >= _LEAST_LAYERS}
    tests = sum(map(len, changes.values()))
    titles = {treatment.key: treatment.title for treatment in TREATMENTS}
    return [
        report.model_copy(update={"critical": critical_because(report.effects, medians, tests, titles)})
        for report in reports
    ]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnxruntime", "torch", "trimtab")}
