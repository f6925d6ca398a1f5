"""Settled instances are kept for a while, to recognise what is sent again, and then removed."""

import logging
import threading
from typing import Self

from serve.node.spool import Spool

_DAY = 24 * 3600.0
_SWEEP_SECONDS = 3600.0

_log = logging.getLogger(__name__)


class Sweeper:
    """Sweeps a spool at the start and every hour, in a thread of its own.

    Parameters
    ----------
    spool
        Whose settled instances are removed; nothing that waits is ever touched.
    keep_days
        Days since they were settled.
    """

    def __init__(self, spool: Spool, keep_days: float) -> None:
        self._spool, self._keep_seconds = spool, keep_days * _DAY
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                removed = self._spool.sweep(self._keep_seconds)
                if removed:
                    _log.info("%d settled instances removed", removed)
            except OSError as error:
                _log.error("the spool cannot be swept: %s", error.strerror)
            if self._stopping.wait(_SWEEP_SECONDS):
                return
