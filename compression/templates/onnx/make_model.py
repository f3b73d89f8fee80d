"""How model.onnx was made; it stands in for your own training. Not needed once you have an ONNX file.

Run it as `python make_model.py` in this folder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.neural_network import MLPClassifier

from compression.workload import load_workload

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Train a small MLP with scikit-learn and write its weights as an ONNX graph."""
    workload = load_workload(FOLDER)
    split = workload.split("train")
    features = workload.encode(split.to_records())["features"]
    # As many fraudulent rows as genuine ones: the metric is balanced accuracy.
    draw = np.random.default_rng(0)
    fraud = np.flatnonzero(split.labels == 1)
    rows = np.concatenate([np.flatnonzero(split.labels == 0), draw.choice(fraud, (split.labels == 0).sum())])
    model = MLPClassifier((128, 128), alpha=1e-3, early_stopping=True, max_iter=20, random_state=0)
    model.fit(features[rows], split.labels[rows])

    nodes, weights, last = [], [], "features"
    for layer, (kernel, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        final = layer == len(model.coefs_) - 1
        if final:
            # scikit-learn has one output for two classes; logits (0, x) have the same probabilities.
            kernel = np.hstack([np.zeros_like(kernel), kernel])  # noqa: PLW2901
            bias = np.concatenate([np.zeros_like(bias), bias])  # noqa: PLW2901
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"kernel_{layer}"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"bias_{layer}"))
        output = "logits" if final else f"sum_{layer}"
        nodes.append(
            helper.make_node("Gemm", [last, f"kernel_{layer}", f"bias_{layer}"], [output], f"layer_{layer}")
        )
        if not final:
            nodes.append(helper.make_node("Relu", [output], [f"hidden_{layer}"], f"relu_{layer}"))
            last = f"hidden_{layer}"
    graph = helper.make_graph(
        nodes,
        "fraud",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", features.shape[1]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        weights,
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(built)
    onnx.save_model(built, FOLDER / "model.onnx")


if __name__ == "__main__":
    main()
