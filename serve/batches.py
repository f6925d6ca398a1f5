"""Batches that fill while the one before them is computed.

Serve's own decorator closes a batch as soon as its waiting time is over, whether the network is free or not: under load,
batches of one then queue up before a network that is fastest with eight. Here whoever comes while the network computes is
gathered, and when it is free all that wait (up to a limit) are computed at once. Who comes alone waits for nobody.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Given = TypeVar("Given")


class Batches(Generic[Asked, Given]):
    """Gathers questions of one event loop and answers them together, in a thread.

    Parameters
    ----------
    work
        Answers several questions, in their order; called for one batch at a time. What it raises, all askers of the batch get.
    most
        Questions a batch.
    wait
        Seconds that a batch which is not full waits for more once the network is free.
    """

    def __init__(self, work: Callable[[list[Asked]], list[Given]], *, most: int, wait: float) -> None:
        self._work, self._most, self._wait = work, most, wait
        self._waiting: deque[tuple[Asked, asyncio.Future[Given]]] = deque()
        self._computing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")

    async def ask(self, question: Asked) -> Given:
        """The answer to one question; whoever is cancelled while waiting is not computed."""
        answer: asyncio.Future[Given] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._computing is None:
            self._computing = asyncio.create_task(self._compute())
        return await answer

    async def _compute(self) -> None:
        try:
            while self._waiting:
                if self._wait and len(self._waiting) < self._most:
                    await asyncio.sleep(self._wait)
                if batch := self._taken():
                    await self._answer(batch)
        finally:
            self._computing = None

    def _taken(self) -> list[tuple[Asked, asyncio.Future[Given]]]:
        batch: list[tuple[Asked, asyncio.Future[Given]]] = []
        while self._waiting and len(batch) < self._most:
            question, answer = self._waiting.popleft()
            # Done before it is answered: its client has gone.
            if not answer.done():
                batch.append((question, answer))
        return batch

    async def _answer(self, batch: list[tuple[Asked, asyncio.Future[Given]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            given = await loop.run_in_executor(self._thread, self._work, [question for question, _ in batch])
        except Exception as error:  # noqa: BLE001 - it belongs to those who asked; the next batch is computed all the same
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), one in zip(batch, given, strict=True):
            if not answer.done():
                answer.set_result(one)
