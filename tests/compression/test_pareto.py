from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from compression.pareto import Point, best, frontier, picture

costs = st.dictionaries(
    st.text(min_size=1, max_size=3), st.tuples(*[st.integers(0, 4).map(float)] * 3), min_size=1, max_size=12
)


def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


@given(costs)
def test_nothing_beats_a_member_and_a_member_beats_every_other(points: dict[str, tuple[float, ...]]) -> None:
    members = frontier(points)
    assert members
    for name, own in points.items():
        beaten = any(beats(points[member], own) for member in members)
        assert beaten == (name not in members)


@given(costs)
def test_a_frontier_is_its_own_frontier(points: dict[str, tuple[float, ...]]) -> None:
    members = frontier(points)
    assert frontier({name: points[name] for name in members}) == members


def point(name: str, drop: float, size: float, time: float, accepted: bool = True) -> Point:
    return Point(name, drop, drop - 0.2, drop + 0.2, size, time, accepted, "" if accepted else "DIS=1")


def test_refused_variants_are_not_on_the_frontier() -> None:
    assert best([point("a", 1, 10, 1), point("b", 0, 1, 0.1, accepted=False)]) == ["a"]


def test_the_picture_is_a_png_even_of_crowded_points(tmp_path: Path) -> None:
    crowd = [point(f"variant-{n}", 0.01 * n, 100 + n, 0.5 + 0.01 * n, accepted=n % 3 > 0) for n in range(12)]
    path = tmp_path / "deep" / "pareto.png"
    picture("crowd", crowd, "standard", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_full_precision_alone_is_possible(tmp_path: Path) -> None:
    picture("one", [point("full", 0, 100, 1)], "medical", tmp_path / "one.png")
