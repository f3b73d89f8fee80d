"""A tiny workload on made-up rows: two numbers and a group in, above or below a line out."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compression.data import Data
from compression.export import export
from compression.full import load_network
from compression.steps import StepContext
from compression.variant import Variant
from compression.workload import Workload, load_workload

with warnings.catch_warnings():
    # Its build configuration uses a pattern class that the installed pathspec deprecates.
    warnings.filterwarnings("ignore", "GitWildMatchPattern", DeprecationWarning)
    import bentoml

    _ = bentoml.models.list  # it loads its parts when they are first touched

SETTINGS = """\
name: {name}
classes: [below, above]
metric: {metric}
sensitive: [{sensitive}]
"""

CODE = """
import numpy as np
from compression.fields import category, number
from compression.workload import Split, Workload

class Tiny(Workload):
    def encode(self, records):
        numbers = [(number(r, "x", i, -9, 9), number(r, "y", i, -9, 9)) for i, r in enumerate(records)]
        sides = [category(r, "side", i, {"left": 0, "right": 1}) for i, r in enumerate(records)]
        return {
            "numbers": np.array(numbers, dtype=np.float32).reshape(len(records), 2),
            "side": np.array(sides, dtype=np.int64).reshape(len(records), 1),
        }

    def split(self, name):
        import pandas as pd
        seed = ["train", "calibration", "validation", "test", "production"].index(name)
        draw = np.random.default_rng(seed)
        rows = {"train": 1200, "calibration": 200}.get(name, 600)
        x, y = draw.normal(size=(2, rows)).clip(-9, 9)
        side = draw.choice(["left", "right"], rows)
        above = x + y * np.where(side == "left", 1, -1) + draw.normal(0, 0.3, rows) > 0
        return Split(pd.DataFrame({"x": x, "y": y, "side": side}), above.astype(np.int64))
"""

TORCH_CODE = """
    def network(self):
        return self.student(32)

    def student(self, width):
        from .model import Net
        return Net(width)

    def train(self, progress=lambda what, done: None):
        import torch
        from compression.training import fit
        split = self.split("train")
        torch.manual_seed(0)
        model = self.network()
        fit(model, self.encode(split.to_records()), split.labels, epochs=6, lr=1e-2, batch_size=64)
        return model
"""

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.side = nn.Embedding(2, 3)
        self.layers = nn.Sequential(
            nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, numbers, side):
        return self.layers(torch.cat([numbers, self.side(side).flatten(1)], dim=1))
"""

ONNX_CODE = """
    def full_precision_onnx(self):
        return self.directory / "model.onnx"
"""


def write_workload(
    folder: Path,
    *,
    name: str = "tiny",
    torch_source: bool = True,
    metric: str = "accuracy",
    sensitive: str = "side",
) -> Path:
    """Write the tiny workload's files into a new folder."""
    folder.mkdir(parents=True)
    (folder / "workload.yaml").write_text(SETTINGS.format(name=name, metric=metric, sensitive=sensitive))
    (folder / "workload.py").write_text(CODE + (TORCH_CODE if torch_source else ONNX_CODE))
    if torch_source:
        (folder / "model.py").write_text(MODEL)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    return load_workload(write_workload(tmp_path_factory.mktemp("tiny") / "workload"))


@pytest.fixture(scope="session")
def onnx_only(tmp_path_factory: pytest.TempPathFactory, network: nn.Module, data: Data) -> Workload:
    """The tiny network as an ONNX file alone, judged by balanced accuracy and with no sensitive attributes."""
    folder = tmp_path_factory.mktemp("onnx") / "workload"
    write_workload(folder, name="tiny-onnx", torch_source=False, metric="balanced_accuracy", sensitive="")
    exported = export(network, data.rows("validation").take(slice(0, 16)).tensors)
    onnx.save_model(exported.onnx, folder / "model.onnx")
    return load_workload(folder)


@pytest.fixture(scope="session")
def data(tiny: Workload) -> Data:
    return Data(tiny)


@pytest.fixture(scope="session")
def full(tiny: Workload, data: Data) -> Variant:
    from compression.full import make_full

    return make_full(tiny, data)


@pytest.fixture(scope="session")
def network(tiny: Workload, full: Variant) -> nn.Module:
    return load_network(tiny, full)


@pytest.fixture
def context(tiny: Workload, data: Data) -> StepContext:
    return StepContext(tiny, data)


@pytest.fixture(scope="session")
def graph(full: Variant) -> onnx.ModelProto:
    return onnx.load_model_from_string(full.onnx_bytes())


def dense(weights: list[torch.Tensor]) -> onnx.ModelProto:
    """A chain of Gemm layers without names on its nodes, as hand-made models often are."""
    nodes, initializers, last = [], [], "x"
    for number, weight in enumerate(weights):
        initializers.append(numpy_helper.from_array(weight.numpy(), f"w{number}"))
        output = "logits" if number == len(weights) - 1 else f"h{number}"
        nodes.append(helper.make_node("Gemm", [last, f"w{number}"], [output]))
        last = output
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weights[0].shape[0]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weights[-1].shape[1]])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
