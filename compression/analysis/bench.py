"""The bench of an analysis: makes models of full precision, measures them, and keeps what it has measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import JsonValue

from compression.analysis.graft import Graft
from compression.analysis.kept import MEASUREMENTS, Kept, folder
from compression.analysis.layers import Layer, layers_of
from compression.analysis.types import FORMAT, Effect, Level, Measured, Treatment
from compression.cache import StepCache, key_of, root_key
from compression.data import Data, Rows
from compression.errors import CompressionError, StepError
from compression.export import run
from compression.measure import Answers, Pairs, decode, drop, open_checked, quality
from compression.recipe import Recipe, StepSpec

if TYPE_CHECKING:
    from pathlib import Path

    from onnx import ModelProto

    from compression.steps import Step, StepContext
    from compression.variant import Variant
    from compression.workload import Progress, Workload


_CHECKED_ROWS = 16


class Bench:
    """Makes and measures models of one workload, and keeps what it has measured."""

    def __init__(
        self, workload: Workload, full: Variant, home: Path, *, fresh: bool, progress: Progress
    ) -> None:
        from onnx import load_model_from_string

        from compression.steps.onnx_nodes import named_copy

        self.workload = workload
        self.full = full
        self.full_bytes = full.onnx_bytes()
        self.graph = named_copy(load_model_from_string(self.full_bytes))
        self.data = Data(workload)
        self.rows: Rows = self.data.rows("validation")
        self.notes: list[str] = []
        self.total = self.done = self.reused = 0
        self._progress = progress
        self._graft: Graft | None = None
        cache = StepCache.open(home)
        self._cache = cache.fresh() if fresh else cache
        self._kept = Kept(
            folder(home, workload.name) / MEASUREMENTS,
            key_of("analysis", FORMAT, root_key(full, self.data)),
            fresh=fresh,
        )
        session = open_checked(self.full_bytes, self.rows.tensors)
        self._output, self._answers = self._run(session)
        self._length = max(float(np.linalg.norm(_numbers(self._output))), 1e-12)

    def context(self, what: str = "") -> StepContext:
        """What steps work with; their own progress is shown behind that of the whole."""
        from compression.steps import StepContext

        def shown(detail: str, _done: float) -> None:
            self._progress(f"{what}: {detail}" if what else detail, min(1.0, self.done / max(1, self.total)))

        return StepContext(self.workload, self.data, progress=shown)

    def full_precision(self) -> Measured:
        """Full precision's own sizes and quality."""
        return self._measured(self.full_bytes, 0.0)

    def level(self, title: str, label: str, setting: float | None, steps: tuple[StepSpec, ...]) -> Level:
        """Measure one level of a technique."""
        what = title if setting is None else f"{title} {label}"
        self._announce(what)
        identity: dict[str, JsonValue] = {"steps": [spec.model_dump(mode="json") for spec in steps]}
        found = self._kept.get(identity, Measured)
        failed = None
        if found is None:
            started = time.monotonic()
            try:
                found = self._measured(self._built(steps, what), started)
            except CompressionError as error:
                failed = str(error)
            else:
                self._kept.put(identity, found)
        else:
            self.reused += 1
        self.done += 1
        return Level(label=label, setting=setting, steps=steps, measured=found, failed=failed)

    def layers(self) -> list[Layer]:
        """The layers of full precision."""
        found = layers_of(self.graph)
        if not found:
            self.notes.append(
                "layers: the model has none with constant weights in MatMul, Gemm, Conv or Gather"
            )
        return found

    def layer(
        self, layer: Layer, treatment: Treatment, change: Callable[[], ModelProto | None]
    ) -> Effect | None:
        """Measure one treatment of one layer; None if it cannot be applied.

        Args:
            change: makes the model with the layer treated, or None.
        """
        self._announce(f"layer {layer.name}, {treatment.title}")
        identity: dict[str, JsonValue] = {
            "layer": layer.tensor,
            "nodes": list(layer.nodes),
            "treatment": treatment.key,
        }
        found = self._kept.get(identity, Effect)
        if found is None:
            started = time.monotonic()
            try:
                changed = change()
                if changed is not None:
                    found = self._effect(changed.SerializeToString(), started)
                    self._kept.put(identity, found)
            except CompressionError as error:
                self.notes.append(f"layers {treatment.title}: {error}")
        else:
            self.reused += 1
        self.done += 1
        return found

    def _announce(self, what: str) -> None:
        self._progress(f"{what} ({self.done + 1} of {self.total})", min(1.0, self.done / max(1, self.total)))

    def _built(self, specs: Sequence[StepSpec], what: str) -> bytes:
        from compression.compress import build_model
        from compression.planner import plan

        steps: list[Step] = plan(Recipe(name="analysis", steps=list(specs)), self.workload)
        if all(step.level == "torch" for step in steps):
            content = self._grafting().built(steps, self.context(what))
            if content is not None:
                return content
        return build_model(self.full, steps, self.context(what), self._cache).onnx

    def _grafting(self) -> Graft:
        from onnx import load_model_from_string

        from compression.full import load_network

        if self._graft is None:
            few = self.rows.take(slice(0, _CHECKED_ROWS)).tensors
            model = load_model_from_string(self.full_bytes)
            self._graft = Graft(model, load_network(self.workload, self.full), few)
        return self._graft

    def _run(self, session: Any) -> tuple[np.ndarray, Answers]:
        output = run(session, self.rows.tensors)
        predictions = decode(self.workload, session, output)
        finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
        return output.astype(np.float64), Answers(predictions.classes, predictions.confidences, finite)

    def _effect(self, content: bytes, started: float) -> Effect:
        output, answers = self._run(open_checked(content, self.rows.tensors))
        pairs = Pairs.of(answers, self._answers, self.rows.labels)
        judged = pairs.about(self.workload)
        moved = np.linalg.norm(_numbers(output) - _numbers(self._output))
        return Effect(
            quality=quality(self.workload.metric, judged),
            drop=drop(self.workload.metric, judged),
            change=float(moved) / self._length,
            invalid=pairs.invalid,
            seconds=time.monotonic() - started if started else 0.0,
            measured_at=time.time(),
        )

    def _measured(self, content: bytes, started: float) -> Measured:
        from onnx import load_model_from_string

        from compression.graph import count_parameters
        from compression.steps.entropy import EntropyCode

        effect = self._effect(content, started)
        try:
            coded = len(EntropyCode().apply(content, self.context()))
        except StepError:
            coded = len(content)  # it would not become smaller, so it is kept as it is
        total, nonzero = count_parameters(load_model_from_string(content))
        return Measured(
            **dict(effect),
            file_bytes=len(content),
            coded_bytes=coded,
            parameters=total,
            nonzero_parameters=nonzero,
        )


def _numbers(output: np.ndarray) -> np.ndarray:
    """Outputs with 0 for what is no number; the largest float in its place would make every length infinite."""
    return np.nan_to_num(output, posinf=0.0, neginf=0.0)
