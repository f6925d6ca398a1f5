"""Admission: as many as are answered in time, measured and not guessed."""

import pytest

from serve import admission
from serve.admission import Admission


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    return now


def answered(room: Admission, clock: list[float], pace: float, count: int) -> None:
    """So many requests, one after the other, with another one always waiting."""
    room.enter()
    for _ in range(count):
        room.enter()
        clock[0] += pace
        room.leave()
    clock[0] += pace
    room.leave()


def let_in(room: Admission) -> int:
    count = 0
    while room.admits():
        room.enter()
        count += 1
    return count


def test_nothing_is_known_at_first_and_the_number_limits(clock: list[float]) -> None:
    assert let_in(Admission(most=64, seconds=3.0)) == 64


@pytest.mark.parametrize(("pace", "fit"), [(0.01, 64), (0.1, 30), (0.25, 12), (10.0, 1)])
def test_as_many_as_are_answered_in_time(clock: list[float], pace: float, fit: int) -> None:
    room = Admission(most=64, seconds=3.0001)
    answered(room, clock, pace, 50)
    assert let_in(room) == fit


def test_idle_time_is_not_slowness_and_a_slow_time_is_forgotten(clock: list[float]) -> None:
    room = Admission(most=64, seconds=3.0001)
    answered(room, clock, 0.1, 50)
    clock[0] += 3600
    answered(room, clock, 0.1, 1)
    assert let_in(room) == 30
    slow = Admission(most=64, seconds=3.0001)
    answered(slow, clock, 5.0, 50)
    answered(slow, clock, 0.01, 400)
    assert let_in(slow) == 64
