from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import pytest

from services import mirror as module
from services.mirror import Mirror, ShadowRefused

Batch = list[bytes]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF_SECONDS", (0.001,))
    monkeypatch.setattr(module, "_LINGER_SECONDS", 0.005)


class Shadow:
    """Stands in for the shadow: takes batches, or raises what it is told to."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.troubles: list[Exception] = []
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, batch: Batch) -> int:
        await self.open.wait()
        if self.troubles:
            raise self.troubles.pop(0)
        self.batches.append(batch)
        return len(batch)

    @property
    def taken(self) -> list[int]:
        return [int(sample) for batch in self.batches for sample in batch]


def make(shadow: Shadow, capacity: int = 1000) -> tuple[Mirror, Counter[str]]:
    shed: Counter[str] = Counter()
    return Mirror(shadow.send, capacity, on_shed=lambda why, number: shed.update({why: number})), shed


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_samples_arrive_in_order() -> None:
    shadow = Shadow()
    mirror, shed = make(shadow)
    mirror.start()
    for n in range(500):
        assert mirror.offer(b"%d" % n)
    await until(lambda: len(shadow.taken) == 500)
    assert shadow.taken == list(range(500))
    assert not shed
    await mirror.stop()


async def test_samples_that_come_together_travel_together() -> None:
    shadow = Shadow()
    mirror, _ = make(shadow)
    mirror.start()
    for n in range(300):
        mirror.offer(b"%d" % n)
    await until(lambda: len(shadow.taken) == 300)
    assert max(map(len, shadow.batches)) == 128
    assert len(shadow.batches) <= 4
    await mirror.stop()


async def test_a_full_queue_sheds_the_newest_and_counts_it() -> None:
    shadow = Shadow()
    shadow.open.clear()
    mirror, shed = make(shadow, capacity=5)
    mirror.start()
    offered = [mirror.offer(b"%d" % n) for n in range(8)]
    assert offered == [True] * 5 + [False] * 3
    assert shed == {"full": 3}
    shadow.open.set()
    await until(lambda: mirror.depth == 0)
    assert shadow.taken == [0, 1, 2, 3, 4]
    await mirror.stop()


async def test_samples_on_their_way_count_against_the_capacity() -> None:
    shadow = Shadow()
    shadow.open.clear()
    mirror, shed = make(shadow, capacity=2)
    mirror.start()
    mirror.offer(b"0")
    mirror.offer(b"1")
    await asyncio.sleep(0.05)
    assert mirror.depth == 2
    assert not mirror.offer(b"2")
    await mirror.stop(grace=0)
    assert shed == {"full": 1, "failed": 2}


async def test_a_batch_is_sent_again_until_it_is_stored() -> None:
    shadow = Shadow()
    shadow.troubles = [ConnectionError("down"), TimeoutError(), OSError(), RuntimeError("surprise")]
    mirror, shed = make(shadow)
    mirror.start()
    mirror.offer(b"1")
    mirror.offer(b"2")
    await until(lambda: mirror.depth == 0)
    assert shadow.taken == [1, 2]
    assert not shed
    await mirror.stop()


async def test_what_a_slow_shadow_did_not_take_is_sent_again_and_nothing_twice() -> None:
    taken: Batch = []

    async def three_at_most(batch: Batch) -> int:
        taken.extend(batch[:3])
        return min(3, len(batch))

    shed: Counter[str] = Counter()
    mirror = Mirror(three_at_most, 100, on_shed=lambda why, number: shed.update({why: number}))
    for n in range(20):
        mirror.offer(b"%d" % n)
    mirror.start()
    await until(lambda: mirror.depth == 0)
    assert taken == [b"%d" % n for n in range(20)]
    assert not shed
    await mirror.stop()


async def test_a_refused_batch_is_dropped_and_counted_and_the_next_one_passes() -> None:
    shadow = Shadow()
    shadow.troubles = [ShadowRefused("HTTP 400")]
    mirror, shed = make(shadow)
    mirror.start()
    mirror.offer(b"1")
    await until(lambda: mirror.depth == 0)
    mirror.offer(b"2")
    await until(lambda: mirror.depth == 0)
    assert shadow.taken == [2]
    assert shed == {"failed": 1}
    await mirror.stop()


async def test_stopping_gives_the_queue_a_moment_to_empty() -> None:
    shadow = Shadow()
    mirror, shed = make(shadow)
    mirror.start()
    for n in range(200):
        mirror.offer(b"%d" % n)
    await mirror.stop(grace=5)
    assert len(shadow.taken) == 200
    assert not shed


async def test_what_is_left_at_the_end_is_counted() -> None:
    shadow = Shadow()
    shadow.open.clear()
    mirror, shed = make(shadow)
    mirror.start()
    for n in range(200):
        mirror.offer(b"%d" % n)
    await mirror.stop(grace=0.05)
    assert shed == {"failed": 200}
    assert mirror.depth == 0


async def test_an_offer_never_waits_however_the_shadow_does() -> None:
    shadow = Shadow()
    shadow.open.clear()
    mirror, _ = make(shadow, capacity=10_000)
    mirror.start()
    await asyncio.sleep(0.01)
    started = time.perf_counter()
    for n in range(20_000):
        mirror.offer(b"%d" % n)
    assert time.perf_counter() - started < 1.0
    await mirror.stop(grace=0)


async def test_the_depth_is_shown_as_it_changes() -> None:
    shadow = Shadow()
    depths: list[int] = []
    mirror = Mirror(shadow.send, 10, on_shed=lambda *_: None, on_depth=depths.append)
    mirror.start()
    mirror.offer(b"1")
    mirror.offer(b"2")
    await until(lambda: mirror.depth == 0)
    assert depths[:2] == [1, 2]
    assert depths[-1] == 0
    await mirror.stop()


async def test_while_users_wait_only_a_trickle_is_wanted_and_the_rest_is_counted() -> None:
    shadow = Shadow()
    shed: Counter[str] = Counter()
    mirror = Mirror(
        shadow.send, 10, on_shed=lambda why, number: shed.update({why: number}), busy=lambda: True
    )
    assert mirror.wants()
    mirror.offer(b"0")
    assert [mirror.wants() for _ in range(3)] == [False, False, False]
    mirror.start()
    await until(lambda: mirror.depth == 0)
    assert mirror.wants()  # evidence goes on
    assert shadow.taken == [0]
    assert shed == {"busy": 3}
    await mirror.stop()


async def test_a_full_queue_wants_nothing() -> None:
    mirror, shed = make(Shadow(), capacity=2)
    assert [mirror.wants() and mirror.offer(b"%d" % n) for n in range(4)] == [True, True, False, False]
    assert shed == {"full": 2}


async def test_the_deeper_the_queue_the_larger_the_batches() -> None:
    shadow = Shadow()
    mirror, _ = make(shadow, capacity=5000)
    for n in range(4000):
        mirror.offer(b"%d" % n)
    mirror.start()
    await until(lambda: mirror.depth == 0)
    sizes = [len(batch) for batch in shadow.batches]
    assert sizes[0] == max(sizes) == 512
    assert 128 in sizes
    assert shadow.taken == list(range(4000))
    await mirror.stop()


async def test_a_batch_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_BYTES", 10)
    shadow = Shadow()
    mirror, _ = make(shadow)
    for _ in range(5):
        mirror.offer(b"1234")
    mirror.offer(b"123456789012")
    mirror.start()
    await until(lambda: mirror.depth == 0)
    assert [len(batch) for batch in shadow.batches] == [2, 2, 1, 1]
    await mirror.stop()


async def test_samples_that_have_waited_too_long_make_room_for_newer_ones() -> None:
    shadow = Shadow()
    shadow.troubles = [ConnectionError("down")]
    shed: Counter[str] = Counter()
    now = 1000.0
    mirror = Mirror(shadow.send, 4, on_shed=lambda why, number: shed.update({why: number}), clock=lambda: now)
    mirror.offer(b"1")
    mirror.offer(b"2")
    now += 20
    mirror.offer(b"3")
    now += 11
    mirror.start()
    await until(lambda: mirror.depth == 0)
    assert shadow.taken == [3]
    assert shed == {"full": 2}
    assert mirror._bytes == 0
    await mirror.stop()


async def test_a_shadow_that_rests_is_asked_again_and_loses_nothing() -> None:
    answers = [0, 0, 2, 0]
    taken: Batch = []

    async def resting(batch: Batch) -> int:
        number = answers.pop(0) if answers else len(batch)
        taken.extend(batch[:number])
        return number

    shed: Counter[str] = Counter()
    mirror = Mirror(resting, 100, on_shed=lambda why, number: shed.update({why: number}))
    for n in range(5):
        mirror.offer(b"%d" % n)
    mirror.start()
    await until(lambda: mirror.depth == 0)
    assert taken == [b"%d" % n for n in range(5)]
    assert not shed
    await mirror.stop()
