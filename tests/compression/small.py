"""Small networks on made-up images, for steps that treat convolutions."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import nn

from compression.data import Data, Rows
from compression.steps import StepContext
from compression.workload import Workload


class Images(nn.Module):
    """Two convolutions, with a batch norm after the first if asked for, and a linear layer."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.second = nn.Conv2d(8, 16, 3, stride=2)
        self.last = nn.Linear(16 * 9, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.norm(self.first(image)).relu()).relu()
        logits: torch.Tensor = self.last(hidden.flatten(1))
        return logits


def images(*, norm: bool = False) -> Images:
    """An untrained network; its batch norm has seen some rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Images(norm=norm)
        network.train()
        network(torch.randn(64, 3, 8, 8) * 3 + 1)
    return network.eval()


def image_context(tiny: Workload) -> StepContext:
    """A context whose train split holds images."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 128)
    pixels = (draw.normal(size=(128, 3, 8, 8)) + labels[:, None, None, None]).astype(np.float32)
    data = Data(tiny)
    data._rows["train"] = Rows(pd.DataFrame({"number": range(128)}), {"image": pixels}, labels)
    return StepContext(tiny, data)


def logits(network: nn.Module, context: StepContext) -> torch.Tensor:
    """Answers to the first 16 images."""
    with torch.no_grad():
        answers: torch.Tensor = network.eval()(
            torch.from_numpy(context.data.rows("train").tensors["image"][:16])
        )
    return answers
