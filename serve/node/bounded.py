"""What a process may remember and how often it may fail, so that neither grows without end."""

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class Remembered(Generic[_Value]):
    """Values by key, each for a while, the oldest forgotten first; safe for threads.

    Parameters
    ----------
    seconds
        How long a value is good; 0 remembers nothing.
    most
        Values at once.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds, self._most = seconds, most
        self._values: OrderedDict[Hashable, tuple[float, _Value]] = OrderedDict()
        self._guard = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> _Value | None:
        """The value, None if there is none that is still good."""
        with self._guard:
            until, value = self._values.get(key, (0.0, None))
            return value if time.monotonic() < until else None

    def put(self, key: Hashable, value: _Value) -> None:
        """Remember a value from now on."""
        if not self._seconds:
            return
        with self._guard:
            self._values.pop(key, None)
            self._values[key] = (time.monotonic() + self._seconds, value)
            while len(self._values) > self._most:
                self._values.popitem(last=False)


class Breaker:
    """Says when to leave a peer alone: after so many failures in a row, for a while; then one try decides. Safe for threads.

    Parameters
    ----------
    failures
        In a row.
    seconds
        For which it is left alone.
    """

    def __init__(self, failures: int, seconds: float) -> None:
        self._most, self._seconds = failures, seconds
        self._failures = 0
        self._open_until = 0.0
        self._guard = threading.Lock()

    def may_try(self) -> bool:
        """Whether the peer may be asked now. Where it may after a pause, the next who asks has to wait for what comes of it."""
        with self._guard:
            if self._failures < self._most:
                return True
            now = time.monotonic()
            if now < self._open_until:
                return False
            self._open_until = now + self._seconds
            return True

    def failed(self) -> bool:
        """Count a failure; True if from now on the peer is left alone, and was not before."""
        with self._guard:
            self._failures += 1
            if self._failures < self._most:
                return False
            self._open_until = time.monotonic() + self._seconds
            return self._failures == self._most

    def worked(self) -> None:
        """Forget the failures."""
        with self._guard:
            self._failures = 0
