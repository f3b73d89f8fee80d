"""What compression broke: counted by hand, ranked, bounded, the same every time."""

import json
import time

import numpy as np
import pandas as pd
import pytest

from compression.intervals import paired_drop as of_scorecards
from monitoring.error_analysis import (
    LONGEST,
    MOST_CONFUSIONS,
    MOST_SLICES,
    NO_ANSWER,
    analyse_errors,
    paired_drop,
)

CLASSES = ("no", "yes")


def rows(*groups: tuple[str, str, str, str, int]) -> pd.DataFrame:
    """(label, full, candidate, group, how often) -> rows, numbered in the field `n`."""
    lines = [line[:4] for line in groups for _ in range(line[4])]
    frame = pd.DataFrame(lines, columns=["label", "prediction_full", "prediction", "group_SEX"])
    return frame.assign(n=range(len(frame)))


HARMED = rows(
    ("yes", "yes", "yes", "1", 50),
    ("no", "no", "no", "1", 40),
    ("yes", "no", "yes", "1", 2),  # won
    ("yes", "yes", "yes", "2", 30),
    ("yes", "yes", "no", "2", 8),  # lost
    ("no", "no", "yes", "2", 2),  # lost
    ("no", "yes", "yes", "2", 5),
    ("no", "no", "yes", "3", 4),  # lost, in a group of four
)


def test_lost_and_won_are_counted_for_all_each_class_and_each_group() -> None:
    found = analyse_errors(HARMED, CLASSES, sensitive=["SEX"])
    assert found.overall is not None
    assert (found.overall.rows, found.overall.lost, found.overall.won) == (141, 14, 2)
    assert {s.name: (s.rows, s.lost, s.won) for s in found.classes} == {"yes": (90, 8, 2), "no": (51, 6, 0)}
    assert {s.name: (s.rows, s.lost, s.won) for s in found.groups} == {
        "SEX=1": (92, 0, 2),
        "SEX=2": (45, 10, 0),
        "SEX=3": (4, 4, 0),
    }


def test_accuracies_and_net_drop_belong_together() -> None:
    found = analyse_errors(HARMED, CLASSES, sensitive=["SEX"])
    for s in (*found.classes, *found.groups):
        assert s.accuracy_full - s.accuracy == pytest.approx(s.drop)
        assert s.drop == pytest.approx((s.lost - s.won) / s.rows)
        assert s.low <= s.drop <= s.high


def test_those_that_lost_most_come_first_and_small_ones_last_and_marked() -> None:
    found = analyse_errors(HARMED, CLASSES, sensitive=["SEX"])
    assert [(s.name, s.small) for s in found.groups] == [("SEX=2", False), ("SEX=1", False), ("SEX=3", True)]
    assert found.worst is not None
    assert found.worst.name == "SEX=2"


def test_nothing_is_worst_when_nothing_lost() -> None:
    found = analyse_errors(
        rows(("yes", "no", "yes", "1", 50), ("no", "no", "no", "2", 50)), CLASSES, sensitive=["SEX"]
    )
    assert found.worst is None
    assert found.lost_rows == ()


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 0, 1), (3, 1, 40), (0, 9, 9), (500, 20, 9000)])
def test_the_interval_is_that_of_scorecards(lost: int, won: int, n: int) -> None:
    right, full = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    full[:lost] = True
    right[lost : lost + won] = True
    theirs = of_scorecards(right, full)
    assert paired_drop(lost, won, n) == pytest.approx((theirs.value, theirs.low, theirs.high))


def test_a_drop_whose_interval_has_zero_in_it_is_said_to_be_within_chance() -> None:
    sure = analyse_errors(HARMED, CLASSES, sensitive=["SEX"]).worst
    unsure = analyse_errors(rows(("yes", "yes", "no", "1", 1), ("yes", "yes", "yes", "1", 60)), CLASSES).worst
    assert sure is not None
    assert unsure is not None
    assert "chance" not in sure.told()
    assert unsure.told().endswith("; chance alone may do that")


def test_examples_are_lost_rows_of_who_lost_most_first_each_once() -> None:
    found = analyse_errors(HARMED, CLASSES, sensitive=["SEX"], examples=13)
    assert [row.because for row in found.lost_rows] == ["SEX=2"] * 10 + ["class no"] * 3
    assert [row.record["n"] for row in found.lost_rows] == [*range(122, 132), 137, 138, 139]
    assert all(row.full == row.label != row.candidate for row in found.lost_rows)
    assert found.lost_rows[0].groups == {"SEX": "2"}


def test_the_same_rows_give_the_same_analysis() -> None:
    first, second = (analyse_errors(HARMED, CLASSES, sensitive=["SEX"], examples=5) for _ in range(2))
    assert first == second
    assert len(first.lost_rows) == 5


def test_records_of_examples_are_cut_and_can_be_empty() -> None:
    frame = HARMED[HARMED["group_SEX"] == "2"].drop(columns="n")
    bare = analyse_errors(frame, CLASSES, sensitive=["SEX"])
    assert bare.lost_rows[0].record == {}
    gap = [float("nan")] * len(frame)
    wide = frame.assign(
        text="x" * 9999, vector=[list(range(9999))] * len(frame), gap=gap, **{f"f{i}": i for i in range(60)}
    )
    record = analyse_errors(wide, CLASSES, sensitive=["SEX"]).lost_rows[0].record
    assert len(str(record["text"])) == len(str(record["vector"])) == LONGEST
    assert "gap" not in record
    assert record["..."] == "22 more fields"
    assert record["f3"] == 3


def test_both_matrices_are_by_label_and_answer() -> None:
    found = analyse_errors(HARMED, CLASSES)
    assert found.labels == found.answers == CLASSES
    assert found.matrix_full == ((46, 5), (2, 88))
    assert found.matrix == ((40, 11), (8, 82))


def test_an_answer_that_is_no_class_is_wrong_and_has_a_column_of_its_own() -> None:
    found = analyse_errors(rows(("yes", "yes", NO_ANSWER, "1", 3), ("no", "no", "no", "1", 5)), CLASSES)
    assert found.answers == (*CLASSES, NO_ANSWER)
    assert found.matrix == ((5, 0, 0), (0, 0, 3))
    assert found.overall is not None
    assert found.overall.lost == 3


def test_rows_without_label_or_answer_are_left_out_and_counted() -> None:
    frame = HARMED.astype(object)
    frame.loc[0, "label"] = None
    frame.loc[1, "prediction_full"] = None
    frame.loc[2, "prediction"] = None
    found = analyse_errors(frame, CLASSES, sensitive=["SEX"])
    assert (found.rows, found.left_out) == (138, 3)


@pytest.mark.parametrize("missing", ["label", "prediction_full"])
def test_without_labels_or_full_precision_there_is_nothing_to_say(missing: str) -> None:
    found = analyse_errors(HARMED.drop(columns=missing), CLASSES, sensitive=["SEX"])
    assert found.overall is None
    assert (found.rows, found.left_out) == (0, 141)
    assert found.worst is None


def test_rows_without_a_group_belong_to_none_of_the_attribute() -> None:
    frame = HARMED.astype(object)
    frame.loc[:9, "group_SEX"] = None
    found = analyse_errors(frame, CLASSES, sensitive=["SEX", "unknown"])
    assert {s.name: s.rows for s in found.groups} == {"SEX=1": 82, "SEX=2": 45, "SEX=3": 4}


def test_a_thousand_classes_stay_small_and_fast() -> None:
    rng = np.random.default_rng(0)
    names = tuple(f"class {i}" for i in range(1000))
    label = rng.integers(0, 1000, 50_000)
    full = np.where(rng.random(50_000) < 0.2, rng.integers(0, 1000, 50_000), label)
    mine = np.where(label == 7, 8, full)
    named = np.array(names, dtype=object)
    frame = pd.DataFrame(
        {
            "label": named[label],
            "prediction_full": named[full],
            "prediction": named[mine],
            "group_G": label.astype(str),
        }
    )
    started = time.process_time()
    found = analyse_errors(frame, names, sensitive=["G"])
    assert time.process_time() - started < 10
    assert found.matrix == ()
    assert len(found.confusions) == MOST_CONFUSIONS
    first = found.confusions[0]
    assert (first.label, first.answer) == ("class 7", "class 8")
    assert first.candidate == int((label == 7).sum()) > first.full
    assert found.worst is not None
    assert found.worst.name == "class 7"
    assert (len(found.classes), found.more_classes) == (MOST_SLICES, 1000 - MOST_SLICES)
    assert (len(found.groups), found.more_groups) == (MOST_SLICES, 1000 - MOST_SLICES)
    assert len(json.dumps(found.as_dict())) < 100_000
