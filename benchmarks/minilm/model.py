"""all-MiniLM-L6-v2 as it is published: the sentiment example's encoder, with mean pooling to a sentence's embedding."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.sentiment.model import WIDTH, Encoder, load_weights

__all__ = ["MiniLm", "load"]


class MiniLm(nn.Module):
    """Tokens [N, L] to two logits [N, 2]: `embed`, then a head with seeded weights, since the package has none."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(WIDTH, 2)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.head.weight.copy_(torch.randn(2, WIDTH, generator=generator) * 4.0)
            self.head.bias.zero_()

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """The sentence's embedding, of length one: the mean over its tokens [N, 384]."""
        shown = attention_mask.float()
        x = self.encoder(input_ids, shown, token_type_ids)
        mean = (x * shown[:, :, None]).sum(1) / shown.sum(1, keepdim=True).clamp(min=1.0)
        return functional.normalize(mean, dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask, token_type_ids))


def load(path: Path) -> MiniLm:
    """The network with the weights of a safetensors file; ready to be run.

    Raises:
        safetensors.SafetensorError: the file is damaged, or one of its tensors is missing.
    """
    model = MiniLm()
    load_weights(model.encoder, path)
    return model.eval()
