"""The residual networks of the fashion workload."""

from __future__ import annotations

from torch import Tensor, nn


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


class _Residual(nn.Module):
    """Two convolutions, and the input added to what comes out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(x + self.second(self.relu(self.first(x))))
        return out


class FashionNet(nn.Module):
    """Pictures float32 [N, 1, 28, 28] to logits float32 [N, 10]; `width` channels, then 2 `width`, then 4 `width`.

    The picture is halved at once and again later. Convolutions over many channels are what INT8 makes faster.
    """

    def __init__(self, width: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(_conv(1, width, 2), nn.ReLU()),
            *(_conv(width, 2 * width), nn.ReLU(), _Residual(2 * width)),
            *(_conv(2 * width, 4 * width, 2), nn.ReLU(), _Residual(4 * width)),
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(image).mean((2, 3))))
        return logits
