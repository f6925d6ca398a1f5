"""How long things stay: settled instances, what was sent of a study, and what a person was to decide about.

Nothing that waits for an answer or a delivery is ever removed.
"""

import logging
import threading
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from serve.node.spool import Spool
from serve.node.study_ledger import StudyLedger

_DAY = 24 * 3600.0
_SWEEP_SECONDS = 3600.0

_log = logging.getLogger(__name__)


class RetentionSettings(BaseModel):
    """How long things stay in the spool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    studies_days: float = Field(
        400, gt=0, description="Days after a study's last result in which a further one is known to be a revision."
    )
    dead_days: float | None = Field(None, gt=0, description="Days that dead letters of instances stay; null: for ever.")
    conflicts_days: float | None = Field(
        None, gt=0, description="Days that other bytes under a known UID stay; null: for ever."
    )
    filed_days: float | None = Field(None, gt=0, description="Days that what was filed unread stays; null: for ever.")


class Sweeper:
    """Sweeps a spool at the start and every hour, in a thread of its own.

    Parameters
    ----------
    spool
        Whose settled instances are removed; nothing that waits is ever touched.
    keep_days
        Days since they were settled.
    retention
        How long the rest stays.
    """

    def __init__(self, spool: Spool, keep_days: float, retention: RetentionSettings) -> None:
        self._spool, self._keep_seconds, self._retention = spool, keep_days * _DAY, retention
        self._ledger = StudyLedger(spool.root)
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
                self._sweep()
            except OSError as error:
                _log.error("the spool cannot be swept: %s", error.strerror)
            if self._stopping.wait(_SWEEP_SECONDS):
                return

    def _sweep(self) -> None:
        removed = self._spool.sweep(self._keep_seconds, needed=frozenset(self._ledger.needed()))
        if removed:
            _log.info("%d settled instances removed", removed)
        self._ledger.forget(self._retention.studies_days * _DAY)
        for folder, days in (
            ("dead", self._retention.dead_days),
            ("conflicts", self._retention.conflicts_days),
            ("filed", self._retention.filed_days),
        ):
            if days is not None and (removed := self._spool.sweep_aside(folder, days * _DAY)):
                _log.warning("%d instances removed from %s/: older than %g days", removed, folder, days)
