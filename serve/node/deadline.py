"""A time budget: one moment by which something has to be over, however many steps it takes.

A peer that sends a byte a second keeps every time-out of a single step from running out. So the budget is a moment and not a
duration, and what cannot be trusted to look at the clock runs in a thread that is left behind when the moment has come.
"""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_Found = TypeVar("_Found")


class DeadlineError(Exception):
    """The moment has come."""


class Deadline:
    """A moment `seconds` from now, by a clock that nobody sets.

    Parameters
    ----------
    seconds
        More than 0.
    """

    def __init__(self, seconds: float) -> None:
        self._begun = time.monotonic()
        self._end = self._begun + seconds

    def left(self) -> float:
        """Seconds to go; 0 when the moment has come."""
        return max(self._end - time.monotonic(), 0.0)

    def spent(self) -> float:
        """Seconds since it was set."""
        return time.monotonic() - self._begun

    def check(self) -> None:
        """Go on only while there is time.

        Raises
        ------
        DeadlineError
            When there is none left.
        """
        if not self.left():
            raise DeadlineError

    def earlier(self, share: float) -> "Deadline":
        """The moment at which this share (0 to 1) of what is left is spent."""
        return Deadline(self.left() * share)


class Aside(Generic[_Found]):
    """Work in a thread of its own, for whose result one waits as long as there is time, and no longer.

    Parameters
    ----------
    work
        What to do. It should watch a deadline itself: nobody ends the thread from outside.
    name
        Of the thread.
    """

    def __init__(self, work: Callable[[], _Found], name: str) -> None:
        self._work = work
        self._found: list[_Found] = []
        self._error: BaseException | None = None
        self._over = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def result(self, deadline: Deadline) -> _Found:
        """Wait for the result.

        Raises
        ------
        DeadlineError
            When there is none in time; the work may still go on. Besides, whatever the work raised.
        """
        if not self._over.wait(deadline.left()):
            raise DeadlineError
        if self._error is not None:
            raise self._error
        return self._found[0]

    def _run(self) -> None:
        try:
            self._found.append(self._work())
        # It is handed to who waits.
        except BaseException as error:  # noqa: BLE001
            self._error = error
        finally:
            self._over.set()
