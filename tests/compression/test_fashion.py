"""The pictures' example: what it takes, what it refuses, and its splits."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest

from compression.errors import InvalidRecord
from compression.planner import plan
from compression.recipe import library
from compression.workload import Workload, load_workload

ROOT = Path(__file__).parents[2] / "examples" / "fashion"
SPLITS = ("train", "validation", "calibration", "test", "production")


@pytest.fixture(scope="module")
def fashion() -> Workload:
    return load_workload(ROOT)


def record(pixels: np.ndarray) -> dict[str, object]:
    return {"image": base64.b64encode(pixels.astype(np.uint8).tobytes()).decode()}


def test_a_picture_becomes_a_scaled_tensor_row_by_row(fashion: Workload) -> None:
    pixels = np.zeros(784)
    pixels[28] = 255
    image = fashion.encode([record(pixels), record(np.zeros(784))])["image"]
    assert (image.shape, image.dtype) == ((2, 1, 28, 28), np.float32)
    assert image[0, 0, 1, 0] == pytest.approx((1 - 0.286) / 0.353)
    assert image[1].max() == image[0].min() == pytest.approx(-0.286 / 0.353)
    assert fashion.encode([])["image"].shape == (0, 1, 28, 28)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (None, "is missing"),
        (7, "is no text"),
        ([0] * 784, "is no text"),
        ("not base64!", "is not base64"),
        ("é", "is not base64"),
        ("", "holds 0 bytes"),
        (base64.b64encode(bytes(783)).decode(), "holds 783 bytes"),
    ],
)
def test_what_is_no_such_picture_is_refused_by_name(fashion: Workload, image: object, problem: str) -> None:
    with pytest.raises(InvalidRecord, match=problem) as caught:
        fashion.encode([record(np.zeros(784)), {"image": image}])
    assert (caught.value.index, caught.value.field) == (1, "image")


def test_the_slices_are_by_the_share_of_covered_pixels(fashion: Workload) -> None:
    covered = [record(np.arange(784) < share * 784) for share in (0.1, 0.5, 0.9)]
    assert [fashion.groups(one)["INK"] for one in covered] == ["light", "middling", "heavy"]


def test_no_two_splits_share_a_picture_and_each_has_all_classes(fashion: Workload) -> None:
    seen: set[str] = set()
    for name in SPLITS:
        split = fashion.split(name)
        images = set(split.records["image"])
        assert len(images) == len(split.labels)
        assert not images & seen
        assert set(split.labels) == set(range(10))
        seen |= images


def test_no_slice_is_so_small_that_nobody_could_guard_it(fashion: Workload) -> None:
    rows = fashion.split("validation").to_records()
    slices = [fashion.groups(row)["INK"] for row in rows]
    assert min(slices.count(name) for name in ("light", "middling", "heavy")) > 0.2 * len(rows)


def test_every_recipe_of_the_library_can_be_planned_for_it(fashion: Workload) -> None:
    for recipe in library():
        assert plan(recipe, fashion)
