"""LeNet-300-100."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet300(nn.Module):
    """Pictures float32 [N, 1, H, W] to logits float32 [N, 10]."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(pixels, 300), nn.ReLU()),
            nn.Linear(300, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image)
        return logits
