"""MiniLM-L6 in torch: BERT's encoder as its published weights name the parts, and a classifier on top of it.

Devlin et al., "BERT" (arXiv 1810.04805); Wang et al., "MiniLM" (arXiv 2002.10957).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Attention", "Encoder", "SentimentNet", "load_weights"]

WIDTH, HEADS, LAYERS, INNER = 384, 12, 6, 1536
VOCABULARY, EPSILON = 30522, 1e-12


class Attention(nn.Module):
    """Self-attention with `heads` heads, which may be fewer than there were: then the layers are narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.query, self.key, self.value, self.attended = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """States float32 [N, L, 384] to the same shape; `mask` [N, 1, 1, L] is added to the scores."""
        rows, length, _ = x.shape
        query, key, value = (
            part(x).reshape(rows, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        out: Tensor = self.attended(mixed)
        return out


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each with its sum and norm."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm, self.outer_norm = (nn.LayerNorm(WIDTH, EPSILON) for _ in range(2))
        self.inner, self.outer = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        out: Tensor = self.outer_norm(x + self.dropout(self.outer(functional.gelu(self.inner(x)))))
        return out


class Encoder(nn.Module):
    """Tokens int64 [N, L] to their states float32 [N, L, 384].

    Args:
        layers: how many of the six.
        positions: the longest text in tokens; the published weights have 512.
        dropout: of all states while training.
    """

    def __init__(self, layers: int = LAYERS, positions: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(positions, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(layers))

    def forward(self, tokens: Tensor, shown: Tensor, kinds: Tensor | None = None) -> Tensor:
        """States of `tokens`, of which those count where `shown` is 1.0, float [N, L].

        `kinds` int64 [N, L] says which of two texts a token belongs to; without it all are of the first.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        kind = self.kinds.weight[0] if kinds is None else self.kinds(kinds)
        x = self.dropout(self.norm(self.words(tokens) + (self.positions(places) + kind)))
        mask = (1.0 - shown)[:, None, None, :] * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        return x


class SentimentNet(nn.Module):
    """Tokens to two logits: the mean of their states, then one linear layer.

    Args:
        layers: 1 to 6.
        positions: the longest text in tokens.
    """

    # A text is as long as it is, so what is shorter is faster.
    dynamic_axes: ClassVar[Mapping[str, Mapping[int, str]]] = {
        "input_ids": {1: "tokens"},
        "attention_mask": {1: "tokens"},
    }
    padding_mask: ClassVar[str] = "attention_mask"

    def __init__(self, layers: int, positions: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder = Encoder(layers, positions, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [N, L] and int64 [N, L], 1 where there is a token and 0 where there is padding, to [N, 2]."""
        shown = attention_mask.float()
        states = self.encoder(input_ids, shown)
        mean = (states * shown[:, :, None]).sum(1) / shown.sum(1, keepdim=True).clamp(min=1.0)
        logits: Tensor = self.head(self.dropout(mean))
        return logits


_IN_A_LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.attended",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "inner",
    "output.dense": "outer",
    "output.LayerNorm": "outer_norm",
}
_EMBEDDINGS = {
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm",
}


def load_weights(encoder: Encoder, path: Path, layers: Sequence[int] = range(LAYERS)) -> None:
    """Fill an encoder, in place, with the weights of a safetensors file in BERT's names.

    Args:
        layers: the published layer that each of the encoder's comes from; shorter tables take the first rows.

    Raises:
        safetensors.SafetensorError: the file is damaged, or one of its tensors is missing.
        ValueError: `layers` are not as many as the encoder has.
    """
    from safetensors import safe_open

    names = dict(_EMBEDDINGS)
    for ours, theirs in zip(range(len(encoder.layers)), layers, strict=True):
        names |= {f"encoder.layer.{theirs}.{a}": f"layers.{ours}.{b}" for a, b in _IN_A_LAYER.items()}
    state = encoder.state_dict()
    with safe_open(path, "pt") as file:
        for theirs_name, ours_name in names.items():
            for part in ("weight", "bias"):
                target = state.get(f"{ours_name}.{part}")
                if target is not None:
                    target.copy_(file.get_tensor(f"{theirs_name}.{part}")[: len(target)])
