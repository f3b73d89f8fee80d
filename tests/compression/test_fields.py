from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.errors import InvalidRecord
from compression.fields import category, number

SEX = {1: 0, 2: 1}


@pytest.mark.parametrize("value", [2, 2.0, np.int8(2), np.float32(2)])
def test_whole_numbers_of_any_type_find_their_code(value: object) -> None:
    assert category({"SEX": value}, "SEX", 0, SEX) == 1


@pytest.mark.parametrize("value", [True, math.nan, math.inf, "1", None, 3, 1.5, [1], {"a": 1}])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(InvalidRecord) as caught:
        category({"SEX": value}, "SEX", 4, SEX)
    assert str(caught.value).startswith('record 4, field "SEX": ')
    assert str(caught.value).endswith("; allowed: 1, 2")
    assert (caught.value.index, caught.value.field, caught.value.allowed) == (4, "SEX", "1, 2")


def test_a_long_run_of_codes_is_shown_as_a_range() -> None:
    with pytest.raises(InvalidRecord, match="allowed: 1 to 9"):
        category({"RACE": 0}, "RACE", 0, {code: code for code in range(1, 10)})


def test_a_missing_field_is_called_missing() -> None:
    with pytest.raises(InvalidRecord, match='field "SEX": is missing'):
        category({}, "SEX", 0, SEX)
    with pytest.raises(InvalidRecord, match='field "age": is missing'):
        number({}, "age", 0, 0, 1)


@given(st.floats(-5, 5))
def test_numbers_in_range_come_back_as_they_are(value: float) -> None:
    assert number({"x": value}, "x", 0, -5, 5) == value


@pytest.mark.parametrize("value", [True, "3", None, math.nan, math.inf, 6, -6, [3]])
def test_numbers_out_of_range_and_non_numbers_are_refused(value: object) -> None:
    with pytest.raises(InvalidRecord, match="allowed: -5 to 5"):
        number({"x": value}, "x", 0, -5, 5)
