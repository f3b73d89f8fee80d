from __future__ import annotations

import torch
from torch import nn

from compression.folding import fold_batch_norms

from .small import images

PIXELS = {"image": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def test_a_batch_norm_after_a_convolution_is_folded_into_it() -> None:
    network = images(norm=True)
    before = network(**PIXELS)
    assert fold_batch_norms(network, PIXELS) == ["first"]
    assert isinstance(network.norm, nn.Identity)
    assert torch.allclose(network(**PIXELS), before, atol=1e-4)


def test_a_network_without_batch_norms_stays_as_it_is() -> None:
    network = images()
    weights = [weight.clone() for weight in network.parameters()]
    assert fold_batch_norms(network, PIXELS) == []
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), weights, strict=True))


def test_a_layer_whose_output_is_read_elsewhere_too_is_left_alone() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            answer: torch.Tensor = self.norm(hidden) + hidden
            return answer

    network = Forked()
    assert fold_batch_norms(network, {"x": torch.ones(3, 4)}) == []
    assert isinstance(network.norm, nn.BatchNorm1d)


def test_a_linear_layer_takes_its_batch_norm_in() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    network[1].running_mean.fill_(3.0)
    rows = torch.ones(3, 4)
    before = network(rows)
    assert fold_batch_norms(network, {"input": rows}) == ["0"]
    assert torch.allclose(network(rows), before, atol=1e-5)


def test_what_torch_cannot_fold_is_left_alone() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)).eval()
    assert fold_batch_norms(plain, {"input": torch.ones(3, 4)}) == []
    rows = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3)).eval()
    assert fold_batch_norms(rows, {"input": torch.ones(2, 3, 4)}) == []
