"""LeNet-300-100 on the fashion example's pictures: the network that pruning papers begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compression.workload import Progress, no_progress
from examples.fashion.workload import PIXELS, Fashion

if TYPE_CHECKING:
    from torch import nn


class LeNet(Fashion):
    """Records, splits and slices are the example's. LeCun et al. (1998); Han et al. (1506.02626), section 4.1."""

    def network(self) -> nn.Module:
        """784 pixels, 300, 100, 10."""
        from .model import LeNet300

        return LeNet300(PIXELS)

    def train(self, progress: Progress = no_progress) -> nn.Module:
        """Half a minute. Rates were chosen on the validation split."""
        from compression.training import fit, seeded

        split = self.split("train")
        with seeded(0):
            model = self.network()
        tensors = self.encode(split.to_records())
        fit(
            model,
            tensors,
            split.labels,
            epochs=12,
            lr=2e-3,
            batch_size=128,
            weight_decay=5e-2,
            progress=progress,
        )
        return model
