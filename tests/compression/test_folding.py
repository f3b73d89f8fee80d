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


def test_a_second_reader_that_changes_no_answer_of_the_rows_at_hand_is_seen() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            # Only large inputs get past this.
            answer: torch.Tensor = self.norm(hidden) + (hidden - 50).relu()
            return answer

    network = Forked().eval()
    far = torch.full((1, 4), 1000.0)
    before = network(far)
    assert fold_batch_norms(network, {"x": torch.randn(64, 4)}) == []
    assert torch.equal(network(far), before)


def test_a_look_at_the_shape_is_no_second_reader() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            rows = hidden.shape[0] if hidden.dim() == 4 else hidden.size(0)
            answer: torch.Tensor = self.norm(hidden).reshape(rows, -1)
            return answer

    assert fold_batch_norms(Shaped(), {"x": torch.ones(2, 3, 5, 5)}) == ["first"]


def test_a_norm_of_the_batch_itself_is_left_alone() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    rows = torch.randn(6, 4)
    before = network(rows)
    assert fold_batch_norms(network, {"input": rows}) == []
    assert torch.equal(network(rows), before)


def test_norms_in_a_row_of_layers_are_all_folded() -> None:
    network = nn.Sequential(
        *(part for _ in range(3) for part in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    )
    network.train()(torch.randn(64, 4))
    network.eval()
    rows = torch.randn(6, 4)
    before = network(rows)
    assert fold_batch_norms(network, {"input": rows}) == ["0", "3", "6"]
    assert torch.allclose(network(rows), before, atol=1e-5)


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
