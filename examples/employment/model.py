"""The networks of the employment workload: one embedding table for all coded columns, then an MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EmploymentNet(nn.Module):
    """Codes int64 [N, C] and age float32 [N, 1] to logits float32 [N, 2].

    The columns share one table (column c owns the rows from its offset on), so that the whole lookup is a
    single gather in the exported graph.
    """

    offsets: Tensor

    def __init__(
        self,
        cardinalities: tuple[int, ...],
        width: int,
        depth: int = 2,
        embedding: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        starts = [sum(cardinalities[:column]) for column in range(len(cardinalities))]
        self.register_buffer("offsets", torch.tensor(starts), persistent=False)
        self.table = nn.Embedding(sum(cardinalities), embedding)
        layers: list[nn.Module] = []
        features = len(cardinalities) * embedding + 1
        for _ in range(depth):
            layers += [nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout)]
            features = width
        self.mlp = nn.Sequential(*layers, nn.Linear(features, 2))

    def forward(self, codes: Tensor, age: Tensor) -> Tensor:
        embedded = self.table(codes + self.offsets).flatten(1)
        logits: Tensor = self.mlp(torch.cat([embedded, age], dim=1))
        return logits
