"""New records are counted into the bins of the reference rows."""

from dataclasses import replace

import pytest

from monitoring.baseline import Baseline, ColumnSpec
from monitoring.input_counts import count_inputs, tally_inputs
from tests.monitoring.judgement import World

AGE = ColumnSpec("AGE", edges=(20.0, 40.0), values=(), shares=(0.2, 0.5, 0.3, 0.0))
SEX = ColumnSpec("SEX", edges=(), values=("1", "2"), shares=(0.5, 0.5, 0.0, 0.0))


def test_numbers_go_between_their_edges_and_an_edge_belongs_to_the_bin_above() -> None:
    records = [{"AGE": age} for age in (3, 19.9, 20, 39, 40, 1e9)]
    assert count_inputs(records, [AGE]) == {"AGE": {0: 2, 1: 2, 2: 2}}


def test_other_values_go_to_their_own_bin_and_unknown_ones_to_the_one_after() -> None:
    assert count_inputs([{"SEX": 1}, {"SEX": "1"}, {"SEX": 2}, {"SEX": 9}], [SEX]) == {
        "SEX": {0: 2, 1: 1, 2: 1}
    }


@pytest.mark.parametrize("value", [None, float("nan"), "forty", True, [40], {"years": 40}])
def test_what_is_no_number_goes_to_the_last_bin(value: object) -> None:
    assert count_inputs([{"AGE": value}], [AGE]) == {"AGE": {3: 1}}


def test_a_missing_field_goes_to_the_last_bin() -> None:
    assert count_inputs([{"SEX": 1}], [AGE, SEX]) == {"AGE": {3: 1}, "SEX": {0: 1}}


def test_records_without_any_field_say_nothing() -> None:
    assert count_inputs([{}, {}], [AGE]) == {"AGE": {}}


def test_fields_that_no_column_is_about_are_ignored() -> None:
    assert count_inputs([{"AGE": 30, "note": "x"}], [AGE]) == {"AGE": {1: 1}}


def total(world: World) -> dict[int, int]:
    return dict(world.ledger.totals(world.rollout_id, 0).get(("input_drift", "AGE"), {}))


def tally(world: World, limit: int = 1000) -> int:
    return tally_inputs(world.ledger, world.rollout_id, limit, world.now)


def test_the_records_of_new_pairs_are_counted_once(world: World) -> None:
    world.start(baseline=Baseline(rows=100, columns=(replace(AGE, name="x", edges=(1.0, 2.0)),)))
    world.warm()
    world.traffic([0] * 30)
    assert [tally(world), tally(world)] == [30, 0]
    world.traffic([0] * 5)
    assert tally(world) == 5
    assert world.ledger.totals(world.rollout_id, 0)["input_drift", "x"] == {1: 35}


def test_of_more_pairs_than_the_limit_the_oldest_are_passed_over(world: World) -> None:
    world.start(baseline=Baseline(rows=100, columns=(AGE,)))
    world.warm()
    world.traffic([0] * 30)
    assert tally(world, limit=10) == 10
    assert total(world) == {3: 10}


def test_what_was_counted_is_not_counted_again_after_days_without_traffic(world: World) -> None:
    world.start(baseline=Baseline(rows=100, columns=(AGE,)))
    world.warm()
    world.traffic([0] * 30)
    tally(world)
    world.now += 3 * 86400
    world.ledger.prune(world.rollout_id, world.now)
    assert tally(world) == 0
    assert total(world) == {3: 30}


def test_without_a_baseline_nothing_is_read(world: World) -> None:
    world.start()
    world.traffic([0] * 30)
    assert tally(world) == 0
