from __future__ import annotations

import pytest

from services.duty import DutyCycle


class Machine:
    """A clock and a CPU of its own: work takes CPU time, and rest only time."""

    def __init__(self) -> None:
        self.now = self.used = 0.0
        self.rests: list[float] = []

    def duty(self, share: float) -> DutyCycle:
        return DutyCycle(share, clock=lambda: self.now, cpu=lambda: self.used, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds

    def work(self, duty: DutyCycle, seconds: float, cpu: float | None = None) -> float:
        begun = duty.begin()
        self.now += seconds
        self.used += seconds if cpu is None else cpu
        return duty.end(begun)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
async def test_over_time_the_share_is_kept_by_work_without_end(share: float) -> None:
    machine = Machine()
    duty = machine.duty(share)
    while machine.now < 2000:
        allowance = await duty.allowance()
        if allowance:
            machine.work(duty, min(allowance, 0.03))
    assert machine.used / machine.now == pytest.approx(share, rel=0.1)
    assert max(machine.rests) <= 1.0


async def test_a_little_work_now_and_then_never_waits() -> None:
    machine = Machine()
    duty = machine.duty(0.5)
    for _ in range(1000):
        assert await duty.allowance() > 0.5
        machine.work(duty, 0.02)
        machine.now += 0.08
    assert machine.rests == []


async def test_a_burst_is_let_through_and_rested_for_afterwards() -> None:
    machine = Machine()
    duty = machine.duty(0.5)
    assert await duty.allowance() == 1.0
    machine.work(duty, 1.0)
    assert await duty.allowance() == pytest.approx(0.5)  # what has come in meanwhile
    machine.work(duty, 1.0)
    assert machine.rests == []
    assert await duty.allowance() == pytest.approx(0.1)
    assert machine.rests == [pytest.approx(0.2)]


async def test_after_work_that_took_far_too_much_nothing_may_be_used_for_long() -> None:
    machine = Machine()
    duty = machine.duty(0.1)
    machine.work(duty, 3.0)
    refused = 0
    while not await duty.allowance():
        refused += 1
    assert machine.used / machine.now == pytest.approx(0.1, rel=0.5)
    assert refused == len(machine.rests) - 1
    assert set(machine.rests[:-1]) == {1.0}


async def test_idle_time_is_not_saved_up_for_more_than_a_burst() -> None:
    machine = Machine()
    duty = machine.duty(0.5)
    machine.now += 10_000
    assert await duty.allowance() == 1.0


async def test_more_than_a_core_is_no_limit_for_one_thread() -> None:
    machine = Machine()
    duty = machine.duty(2.0)
    for _ in range(100):
        assert await duty.allowance() > 0
        machine.work(duty, 0.5)
    assert machine.rests == []


def test_work_occupies_the_time_in_which_its_cpu_is_allowed_or_all_that_it_took() -> None:
    machine = Machine()
    duty = machine.duty(0.5)
    assert machine.work(duty, 0.1) == pytest.approx(0.2)
    assert machine.work(duty, 0.5, cpu=0.1) == pytest.approx(0.5)


async def test_what_the_process_uses_between_turns_is_charged_and_part_of_what_the_next_one_costs() -> None:
    machine = Machine()
    duty = machine.duty(0.5)
    machine.now += 1.0
    machine.used += 0.8
    assert await duty.allowance() == pytest.approx(0.7)
    assert machine.work(duty, 0.1) == pytest.approx(1.8)
    assert machine.work(duty, 0.1) == pytest.approx(0.2)
