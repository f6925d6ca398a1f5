"""Who may still come in: as many as are answered before a client's patience ends.

A fixed number of requests is either too small for a fast machine or too large for a slow one. What is under way, times what one
takes, is the time that the next would wait (Little's law); above a limit, 503 now is worth more than an answer too late.
"""

import time

# The rate is averaged over about so many answers.
_MEMORY = 20


class Admission:
    """Counts requests under way and how fast they are answered.

    Parameters
    ----------
    most
        Requests under way.
    seconds
        That a request may have to wait.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._under_way = 0
        self._pace: float | None = None
        self._last = 0.0

    @property
    def under_way(self) -> int:
        """Requests that were let in and are not answered yet."""
        return self._under_way

    def admits(self) -> bool:
        """Whether one more may come in now."""
        if self._under_way >= self._most:
            return False
        expected = (self._pace or 0.0) * (self._under_way + 1)
        # Who comes alone is always let in: else a pace that was once slow would never be measured again.
        return self._under_way == 0 or expected <= self._seconds

    def enter(self) -> None:
        """A request comes in."""
        if self._under_way == 0:
            self._last = time.monotonic()
        self._under_way += 1

    def leave(self) -> None:
        """A request is answered."""
        now = time.monotonic()
        # Seconds an answer while there was work to do.
        pace, self._last = now - self._last, now
        self._pace = pace if self._pace is None else self._pace + (pace - self._pace) / _MEMORY
        self._under_way -= 1
