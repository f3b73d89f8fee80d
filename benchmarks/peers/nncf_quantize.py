"""Quantize `model.onnx` in a folder with nncf, with its accuracy control on; writes `quantized.onnx` beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nncf
import numpy as np
import onnx
import onnxruntime

BATCH = 50


def main(folder: Path) -> None:
    """Read the rows and the settings, quantize, write."""
    settings = json.loads((folder / "settings.json").read_text())
    calibration, validation = (
        dict(np.load(folder / f"{part}.npz")) for part in ("calibration", "validation")
    )
    labels = validation.pop("labels")

    def batches(rows: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        number = len(next(iter(rows.values())))
        return [{name: a[i : i + BATCH] for name, a in rows.items()} for i in range(0, number, BATCH)]

    def accuracy(model: onnx.ModelProto, dataset: object) -> tuple[float, None]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        answers = [session.run(None, batch)[0].argmax(axis=1) for batch in dataset]
        return float((np.concatenate(answers) == labels).mean()), None

    quantized = nncf.quantize_with_accuracy_control(
        onnx.load(folder / "model.onnx"),
        nncf.Dataset(batches(calibration)),
        nncf.Dataset(batches(validation)),
        accuracy,
        max_drop=settings["max_drop"],
        model_type=nncf.ModelType.TRANSFORMER if settings["transformer"] else None,
        subset_size=len(batches(calibration)),
    )
    onnx.save(quantized, folder / "quantized.onnx")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
