"""What is told of peers, once a minute for each kind and address: who floods the node shall not flood its log."""

import logging
import threading
import time

_PERIOD_SECONDS = 60.0
_MOST_KINDS = 1024


class QuietLog:
    """Lets a message through once in a while.

    Parameters
    ----------
    log : logging.Logger
        Where they go.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._guard = threading.Lock()
        self._told: dict[tuple[str, str], tuple[float, int]] = {}

    def warning(self, address: str, words: str, *arguments: object) -> None:
        """Warn of what `address` did, in `words` that are its kind; later ones say how many were left out."""
        self._say(logging.WARNING, address, words, *arguments)

    def error(self, address: str, words: str, *arguments: object) -> None:
        """Tell what failed here for `address`, as `warning` does."""
        self._say(logging.ERROR, address, words, *arguments)

    def _say(self, level: int, address: str, words: str, *arguments: object) -> None:
        kind = (address, words)
        now = time.monotonic()
        with self._guard:
            told, left_out = self._told.pop(kind, (-_PERIOD_SECONDS, 0))
            is_due = now - told >= _PERIOD_SECONDS
            self._told[kind] = (now, 0) if is_due else (told, left_out + 1)
            while len(self._told) > _MOST_KINDS:
                del self._told[next(iter(self._told))]
        if not is_due:
            return
        more = f" ({left_out} more of these since)" if left_out else ""
        self._log.log(level, "%s: " + words + "%s", address, *arguments, more)
