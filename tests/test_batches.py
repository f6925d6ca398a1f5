"""Batches fill while the one before is computed; nobody alone waits, nobody pays for another's failure or departure."""

import asyncio
import threading

import pytest

from serve.batches import Batches


class Slow:
    """Doubles numbers, a batch whenever the test lets it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Semaphore(0)

    def __call__(self, questions: list[int]) -> list[int]:
        self.batches.append(questions)
        assert self.gate.acquire(timeout=30)
        if -1 in questions:
            raise ValueError("minus one")
        return [2 * question for question in questions]


async def asked(batches: Batches[int, int], questions: list[int]) -> list[asyncio.Task[int]]:
    """Under way, as far as they come without an answer."""
    tasks = [asyncio.create_task(batches.ask(question)) for question in questions]
    await asyncio.sleep(0)
    return tasks


async def started(work: Slow, batches: int) -> None:
    while len(work.batches) < batches:
        await asyncio.sleep(0.001)


def test_who_comes_while_one_is_computed_is_computed_together():
    async def told() -> None:
        work = Slow()
        batches = Batches(work, most=4, wait=0.0)
        first = await asked(batches, [1])
        await started(work, 1)
        others = await asked(batches, [2, 3, 4, 5, 6])
        work.gate.release(3)
        assert await asyncio.gather(*first, *others) == [2, 4, 6, 8, 10, 12]
        assert work.batches == [[1], [2, 3, 4, 5], [6]]
        # And again, once it had nothing to do.
        again = await asked(batches, [7])
        work.gate.release()
        assert await again[0] == 14

    asyncio.run(told())


def test_a_batch_waits_for_more_where_it_is_told_to():
    async def told() -> None:
        work = Slow()
        work.gate.release(2)
        batches = Batches(work, most=2, wait=0.2)
        first = await asked(batches, [1])
        await asyncio.sleep(0.02)
        assert await asyncio.gather(*first, *await asked(batches, [2])) == [2, 4]
        assert work.batches == [[1, 2]]

    asyncio.run(told())


def test_what_fails_fails_its_own_batch_and_who_left_is_not_computed():
    async def told() -> None:
        work = Slow()
        batches = Batches(work, most=2, wait=0.0)
        failing = await asked(batches, [-1])
        await started(work, 1)
        waiting = await asked(batches, [2, 3, 4])
        waiting[0].cancel()
        await asyncio.sleep(0)
        work.gate.release(2)
        with pytest.raises(ValueError, match="minus one"):
            await failing[0]
        assert await asyncio.gather(*waiting[1:]) == [6, 8]
        assert work.batches == [[-1], [3, 4]]

    asyncio.run(told())
