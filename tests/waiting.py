"""Waiting for what happens in other threads and processes."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], what: str = "", seconds: float = 60) -> None:
    """Return once a condition holds; fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or 'it did not happen'}"
        time.sleep(0.02)
