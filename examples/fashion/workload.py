"""Fashion-MNIST: a picture of 28 x 28 grey pixels in, one of ten kinds of clothing out."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compression.errors import InvalidRecord, WorkloadError
from compression.workload import Progress, Record, Split, SplitName, Tensors, Workload, no_progress

if TYPE_CHECKING:
    from torch import nn

DATA = Path(__file__).parent / "data" / "fashion_mnist.npz"
SIDE = 28
PIXELS = SIDE * SIDE
ALLOWED = f"the {PIXELS} grey values of a picture, row by row, a byte each, in base64"
MEAN, SPREAD = 0.286, 0.353
"""Of the training pictures' grey values, 0 to 1."""
LIGHT, HEAVY = 0.4, 0.6
"""Shares of covered pixels that part the pictures into three slices of about the same size."""
_ROWS: Mapping[SplitName, tuple[str, int, int]] = {
    "train": ("train", 0, 18_000),
    "validation": ("train", 18_000, 23_000),
    "calibration": ("train", 23_000, 24_000),
    "test": ("test", 0, 6_000),
    "production": ("test", 6_000, 10_000),
}
"""Split -> part of the data set, first row and end. Its rows come in random order, and no picture twice."""


class Fashion(Workload):
    """Pictures as `{"image": base64}` to a kind of clothing."""

    def encode(self, records: Sequence[Record]) -> Tensors:
        """Records to `image` float32 [N, 1, 28, 28], scaled to mean 0 and spread 1."""
        pixels = [_pixels(record, index) for index, record in enumerate(records)]
        image = np.array(pixels, dtype=np.float32).reshape(len(records), 1, SIDE, SIDE)
        return {"image": (image / 255 - MEAN) / SPREAD}

    def groups(self, record: Record) -> dict[str, str]:
        """How much of the picture is covered: light, middling or heavy."""
        covered = float((_pixels(record, 0) > 0).mean())
        return {"INK": "light" if covered < LIGHT else "heavy" if covered >= HEAVY else "middling"}

    def split(self, name: SplitName) -> Split:
        """Train, validation and calibration are of the data set's training part, the others of its test part."""
        import pandas as pd

        part, first, end = _ROWS[name]
        pictures, labels = self._data[part]
        images = [base64.b64encode(picture.tobytes()).decode() for picture in pictures[first:end]]
        return Split(pd.DataFrame({"image": images}), labels[first:end].astype(np.int64))

    def network(self) -> nn.Module:
        """48, 96 and 192 channels."""
        from .model import FashionNet

        return FashionNet(48)

    def student(self, width: int) -> nn.Module:
        """The same network with `width` channels at 7x7, where full precision has 192; a multiple of 4."""
        from .model import FashionNet

        if width % 4:
            raise WorkloadError(f"student({width}): the width must be a multiple of 4")
        return FashionNet(width // 4, dropout=0.0)

    def train(self, progress: Progress = no_progress) -> nn.Module:
        """Some minutes on two cores, on the pictures and their mirror images, these moved by a pixel or two."""
        from compression.training import fit, seeded

        split = self.split("train")
        with seeded(0):
            model = self.network()
        image = self.encode(split.to_records())["image"]
        tensors = {"image": np.concatenate([image, moved(image[..., ::-1], np.random.default_rng(0))])}
        labels = np.concatenate([split.labels, split.labels])
        fit(
            model,
            tensors,
            labels,
            epochs=5,
            lr=4e-3,
            batch_size=128,
            weight_decay=5e-2,
            bfloat16=self.bfloat16,
            progress=progress,
        )
        return model

    @cached_property
    def _data(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        try:
            with np.load(DATA, allow_pickle=False) as file:
                return {part: (file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test")}
        except FileNotFoundError:
            raise WorkloadError(f"{DATA} is missing: it comes with the example, copy it back") from None


def moved(images: np.ndarray, rng: np.random.Generator, most: int = 2) -> np.ndarray:
    """Each picture [N, 1, H, W] moved by up to `most` pixels either way; what comes in is what was at the edge."""
    wide = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    height, width = images.shape[2:]
    found = np.empty_like(images)
    for picture, (down, right) in enumerate(rng.integers(0, 2 * most + 1, (len(images), 2))):
        found[picture] = wide[picture, :, down : down + height, right : right + width]
    return found


def _pixels(record: Record, index: int) -> np.ndarray:
    """The grey values of a record's picture, uint8 [784]."""
    image = record.get("image")
    if not isinstance(image, str):
        raise InvalidRecord(index, "image", "is missing" if image is None else "is no text", ALLOWED)
    try:
        content = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRecord(index, "image", "is not base64", ALLOWED) from None
    if len(content) != PIXELS:
        raise InvalidRecord(index, "image", f"holds {len(content)} bytes", ALLOWED)
    return np.frombuffer(content, np.uint8)
