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


class Attending(nn.Module):
    """Attention with four heads over the three inputs of the tiny workload, each of which is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.side = nn.Embedding(2, 8)
        self.first = nn.Linear(2, 16)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.attended = nn.Linear(8, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, numbers: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.first(numbers).reshape(-1, 2, 8), self.side(side)], dim=1)
        query, key, value = (
            part(x).reshape(len(x), 3, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = (query @ key.transpose(2, 3)).softmax(-1) @ value
        attended: torch.Tensor = self.attended(mixed.transpose(1, 2).flatten(2))
        logits: torch.Tensor = self.last(attended.mean(1))
        return logits


def attending() -> Attending:
    """An untrained network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attending().eval()


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
