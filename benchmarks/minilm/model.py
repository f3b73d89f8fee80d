"""all-MiniLM-L6-v2 in torch: BERT's encoder with mean pooling, as its published weights name the parts."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MiniLm", "load"]

_WIDTH, _HEADS, _LAYERS, _INNER = 384, 12, 6, 1536
_VOCABULARY, _POSITIONS, _EPSILON = 30522, 512, 1e-12


class _Layer(nn.Module):
    """Self-attention and a feed-forward network, each with its sum and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))
        self.attended, self.inner, self.outer = (
            nn.Linear(_WIDTH, _WIDTH),
            nn.Linear(_WIDTH, _INNER),
            nn.Linear(_INNER, _WIDTH),
        )
        self.attended_norm, self.outer_norm = (nn.LayerNorm(_WIDTH, _EPSILON) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(rows, length, _HEADS, _WIDTH // _HEADS).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(2, 3) / (_WIDTH // _HEADS) ** 0.5 + mask
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(rows, length, _WIDTH)
        x = self.attended_norm(x + self.attended(mixed))
        return self.outer_norm(x + self.outer(functional.gelu(self.inner(x))))


class MiniLm(nn.Module):
    """Tokens [N, L] to two logits [N, 2]: `embed`, then a head with seeded weights, since the package has none."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY, _WIDTH)
        self.positions = nn.Embedding(_POSITIONS, _WIDTH)
        self.kinds = nn.Embedding(2, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH, _EPSILON)
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))
        self.head = nn.Linear(_WIDTH, 2)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.head.weight.copy_(torch.randn(2, _WIDTH, generator=generator) * 4.0)
            self.head.bias.zero_()

    def embed(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """The sentence's embedding, of length one: the mean over its tokens [N, 384]."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.kinds(token_type_ids) + self.positions(places))
        shown = attention_mask.to(x.dtype)
        mask = (1.0 - shown)[:, None, None, :] * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        mean = (x * shown[:, :, None]).sum(1) / shown.sum(1, keepdim=True).clamp(min=1.0)
        return functional.normalize(mean, dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask, token_type_ids))


_PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attended",
    "attention.output.LayerNorm": "attended_norm",
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


def load(path: Path) -> MiniLm:
    """The network with the weights of a safetensors file; ready to be run. Raises KeyError if one is missing."""
    published = _safetensors(path)
    names = dict(_EMBEDDINGS)
    for number in range(_LAYERS):
        for theirs, ours in _PARTS.items():
            names[f"encoder.layer.{number}.{theirs}"] = f"layers.{number}.{ours}"
    model = MiniLm()
    state = model.state_dict()
    for theirs, ours in names.items():
        for part in ("weight", "bias"):
            if f"{ours}.{part}" in state:
                state[f"{ours}.{part}"] = torch.from_numpy(published[f"{theirs}.{part}"])
    model.load_state_dict(state)
    return model.eval()


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a file: eight bytes with the length of a JSON header, the header, the data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    found = {}
    for name, tensor in header.items():
        if tensor.get("dtype") == "F32":
            begin, end = tensor["data_offsets"]
            flat = np.frombuffer(content, "<f4", (end - begin) // 4, 8 + length + begin)
            found[name] = flat.reshape(tensor["shape"]).copy()
    return found
