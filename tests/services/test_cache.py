from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.cache import AnswerCache

KEY, OTHER = b"k" * 16, b"o" * 16
MAX_BYTES = 100_000


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> AnswerCache:
    return AnswerCache(MAX_BYTES, 10.0, clock)


def logits(*rows: tuple[float, float]) -> tuple[np.ndarray, ...]:
    return (np.array(rows, np.float32),)


# -- keys -------------------------------------------------------------------------------------------------


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def text(*values: str) -> np.ndarray:
    return np.array(values, object)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": f32(1, 2), "b": f32(3)}, {"a": f32(1), "b": f32(2, 3)}),
        ({"a": f32(1), "b": f32(2)}, {"a": f32(2), "b": f32(1)}),
        ({"a": f32(1)}, {"b": f32(1)}),
        ({"a": f32(1)}, {"a": f32(1), "b": f32()}),
        ({"ab": f32(1), "c": f32(1)}, {"a": f32(1), "bc": f32(1)}),
        ({"a": f32(1)}, {"a": f32(1).view(np.int32)}),
        ({"a": f32(1)}, {"a": f32(1).astype(">f4")}),
        ({"a": np.zeros(2, np.int32)}, {"a": np.zeros(1, np.int64)}),
        ({"a": np.zeros((2, 3))}, {"a": np.zeros((3, 2))}),
        ({"a": np.zeros((1, 4))}, {"a": np.zeros(4)}),
        ({"a": np.zeros((0, 3))}, {"a": np.zeros((0, 4))}),
        ({"a": f32(0.0)}, {"a": f32(-0.0)}),
        ({"a": text("ab", "c")}, {"a": text("a", "bc")}),
        ({"a": text("a", "")}, {"a": text("", "a")}),
        ({"a": text("a\0", "b")}, {"a": text("a", "\0b")}),
        ({"a": text("a", "b")}, {"a": text("a"), "b": text("b")}),
        ({"a": text("é")}, {"a": text("e\u0301")}),
        ({"a": text("a")}, {"a": np.array(["a"])}),
        ({"a": text("\ud800")}, {"a": text("?")}),
    ],
)
def test_inputs_that_differ_have_different_keys(
    one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]
) -> None:
    assert AnswerCache.key(one) != AnswerCache.key(two)


def test_a_key_is_of_sixteen_bytes_and_the_same_in_another_process() -> None:
    code = "import numpy as np; from services.cache import AnswerCache as A; print(A.key({'x': np.arange(3.0)}).hex())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    key = AnswerCache.key({"x": np.arange(3.0)})
    assert len(key) == 16
    assert other.stdout.strip() == key.hex()


def test_neither_the_order_of_names_nor_that_in_memory_makes_another_key() -> None:
    grid = np.arange(12.0).reshape(3, 4)
    one = AnswerCache.key({"a": grid, "b": f32(1)})
    assert AnswerCache.key({"b": f32(1), "a": np.asfortranarray(grid)}) == one
    assert AnswerCache.key({"b": f32(1), "a": np.repeat(grid, 2, axis=1)[:, ::2]}) == one


@pytest.mark.parametrize(
    "value",
    [
        np.array([b"a"], object),
        np.array([["a", 1]], object),
        np.zeros(1, [("a", np.int32), ("b", np.int32)]),
        np.array(["a"], np.dtypes.StringDType()),
    ],
)
def test_objects_whose_bytes_are_not_their_values_have_no_key(value: np.ndarray) -> None:
    with pytest.raises(TypeError, match="input 'x' holds neither numbers nor text"):
        AnswerCache.key({"x": value})


_SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=2)
_NUMBERS = st.sampled_from([np.int8, np.uint8, np.int16, np.float16, np.int32, np.float32, np.bool_])
# Few values, so that equal bytes under another name, dtype or shape do come up.
_ARRAYS = st.one_of(
    _NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, _SHAPES, elements=st.sampled_from([0, 1]))),
    hnp.arrays(np.object_, _SHAPES, elements=st.sampled_from(["", "a", "aa", "\0", "é", "\ud800"])),
)
_INPUTS = st.dictionaries(st.sampled_from(["", "a", "b", "ab", "aa"]), _ARRAYS, max_size=3)


def same(one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(
        value.dtype == two[name].dtype
        and value.shape == two[name].shape
        and value.tolist() == two[name].tolist()
        for name, value in one.items()
    )


@given(_INPUTS, _INPUTS)
def test_keys_are_equal_exactly_when_inputs_are(
    one: dict[str, np.ndarray], two: dict[str, np.ndarray]
) -> None:
    assert (AnswerCache.key(one) == AnswerCache.key(two)) == same(one, two)


@given(_INPUTS, st.data())
def test_cutting_the_same_bytes_elsewhere_makes_another_key(
    one: dict[str, np.ndarray], data: st.DataObject
) -> None:
    """The adversary's move: all bytes in the same order, under other names, dtypes and shapes."""
    numbers = {name: value for name, value in one.items() if value.dtype != object}
    stream = b"".join(numbers[name].tobytes() for name in sorted(numbers))
    cut = data.draw(st.integers(0, len(stream)))
    two = {"a": np.frombuffer(stream[:cut], np.uint8), "b": np.frombuffer(stream[cut:], np.uint8)}
    assume(not same(numbers, two))
    assert AnswerCache.key(numbers) != AnswerCache.key(two)


# -- answers ----------------------------------------------------------------------------------------------


def test_what_was_put_comes_back_with_its_dtype_and_shape(cache: AnswerCache) -> None:
    outputs = (np.array([[0.25, 4]], np.float32), np.array([3], np.int64), text("yes"))
    cache.put("full:1", KEY, outputs)
    found = cache.get("full:1", KEY)
    assert found is not None
    for got, put in zip(found, outputs, strict=True):
        np.testing.assert_array_equal(got, put, strict=True)


def test_an_answer_is_that_of_one_variant_and_one_key(cache: AnswerCache) -> None:
    cache.put("full:1", KEY, logits((0, 1)))
    assert cache.get("full:1", OTHER) is None
    assert cache.get("int8:1", KEY) is None
    cache.put("int8:1", KEY, logits((2, 3)))
    assert [found[0].tolist() for tag in ("full:1", "int8:1") if (found := cache.get(tag, KEY))] == [
        [[0, 1]],
        [[2, 3]],
    ]


def test_nobody_can_change_a_kept_answer(cache: AnswerCache) -> None:
    outputs = logits((0, 1), (2, 3))
    cache.put("full:1", KEY, (outputs[0][1:],))
    outputs[0][:] = 9
    found = cache.get("full:1", KEY)
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found[0][0, 0] = 9
    assert found[0].tolist() == [[2, 3]]


def test_the_given_outputs_stay_writable(cache: AnswerCache) -> None:
    outputs = logits((0, 1))
    cache.put("full:1", KEY, outputs)
    outputs[0][0, 0] = 5


def test_an_answer_is_gone_when_its_time_is_over(cache: AnswerCache, clock: Clock) -> None:
    cache.put("full:1", KEY, logits((0, 1)))
    clock.now += 9.9
    assert cache.get("full:1", KEY) is not None
    clock.now += 0.2
    assert cache.get("full:1", KEY) is None
    assert (cache.bytes, cache.entries) == (0, 0)


def test_reading_an_answer_does_not_make_it_younger_but_putting_it_again_does(
    cache: AnswerCache, clock: Clock
) -> None:
    for key in (KEY, OTHER):
        cache.put("full:1", key, logits((0, 1)))
    clock.now += 9
    assert cache.get("full:1", KEY) is not None
    cache.put("full:1", OTHER, logits((0, 1)))
    clock.now += 2
    assert cache.get("full:1", KEY) is None
    assert cache.get("full:1", OTHER) is not None


def test_the_answer_that_was_not_used_for_longest_makes_room(cache: AnswerCache) -> None:
    kept = 0
    while cache.entries == kept:
        cache.put("full:1", kept.to_bytes(16, "little"), logits((0, kept)))
        assert cache.get("full:1", bytes(16)) is not None
        kept += 1
    assert cache.get("full:1", (1).to_bytes(16, "little")) is None
    assert cache.get("full:1", (2).to_bytes(16, "little")) is not None


@pytest.mark.parametrize(("numbers", "entries"), [(9_000, 1), (10_000, 0)])
def test_an_answer_larger_than_a_tenth_of_the_cache_is_not_kept(
    cache: AnswerCache, numbers: int, entries: int
) -> None:
    cache.put("full:1", KEY, (np.zeros((1, numbers), np.uint8),))
    assert cache.entries == entries


def test_text_counts_with_its_letters(cache: AnswerCache) -> None:
    cache.put("full:1", KEY, (text("a" * 9_900),))
    assert cache.entries == 0
    cache.put("full:1", KEY, (text("a" * 5_000),))
    assert cache.bytes > 5_000


def test_clear_forgets_everything(cache: AnswerCache) -> None:
    for tag in ("full:1", "int8:1"):
        cache.put(tag, KEY, logits((0, 1)))
    cache.clear()
    assert (cache.bytes, cache.entries) == (0, 0)
    assert cache.get("full:1", KEY) is None
    cache.put("full:1", KEY, logits((0, 1)))
    assert cache.entries == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "get", "wait"]), st.integers(0, 5), st.integers(0, 1_200)),
        max_size=60,
    )
)
def test_it_never_holds_more_than_its_limit_nor_gives_an_old_or_another_answer(
    operations: list[tuple[str, int, int]],
) -> None:
    clock = Clock()
    cache = AnswerCache(8_000, 5.0, clock)
    put_at: dict[bytes, float] = {}
    for operation, which, size in operations:
        key = bytes([which]) * 16
        if operation == "wait":
            clock.now += which
        elif operation == "put":
            cache.put("full:1", key, (np.full((1, size), which, np.uint8),))
            put_at[key] = clock.now
        found = cache.get("full:1", key)
        if found is not None:
            assert clock.now - put_at[key] < 5.0
            assert found[0].tolist() == [[which] * found[0].shape[1]]
        assert cache.bytes <= 8_000
        kept = [answer for number in range(6) if (answer := cache.get("full:1", bytes([number]) * 16))]
        assert cache.entries == len(kept)
        assert cache.bytes >= sum(answer[0].nbytes for answer in kept)
