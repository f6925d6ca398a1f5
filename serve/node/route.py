"""What waits for one peer: in which order it is tried, and until when the peer is left alone.

The oldest first, but what failed after what did not; of a study, a revision only after the one before it is delivered or dead.
What fails in passing waits, longer each time. Where the peer as a whole is not to be had, or three parcels fail in a row, all
wait, and one at a time finds out whether it is back; a parcel that fails alone waits alone.

Times are monotonic. A route is not safe for several threads by itself: the loop that owns it guards it.
"""

from dataclasses import dataclass, field
from datetime import datetime

from serve.node.destinations import PatienceSettings
from serve.node.parcels import Parcel, ParcelState
from serve.node.patience import pause_seconds
from serve.node.senders.sender import Transient

_FAILING_IN_A_ROW = 3


@dataclass
class Entry:
    """A parcel that waits, and where it goes. Awaited: commitment was asked for and is not known yet."""

    parcel: Parcel
    state: ParcelState
    route: "Route"
    failures: int = 0
    due: float = 0.0
    asked: float | None = None

    @property
    def awaited(self) -> bool:
        """Whether what comes next is the peer's report."""
        return self.state.asked_at is not None


@dataclass
class _Outage:
    """Why nothing is sent for now, and until when."""

    failures: int = 0
    until: float = 0.0
    reason: str = ""
    in_a_row: set[str] = field(default_factory=set)


class Route:
    """The parcels of one peer.

    Parameters
    ----------
    patience
        Pauses between attempts.

    Attributes
    ----------
    entries
        What waits, by the parcel's id.
    taken
        Whether a thread is at it.
    taken_at
        When one last was.
    """

    def __init__(self, patience: PatienceSettings) -> None:
        self.entries: dict[str, Entry] = {}
        self.taken, self.taken_at = False, 0.0
        self._patience = patience
        self._outage = _Outage()

    def in_order(self) -> list[Entry]:
        """The first revision of each study, by age; those that failed come last, or the same few would be tried for ever."""
        return sorted(self._heads(), key=lambda entry: (entry.failures, entry.parcel.created_at, entry.parcel.id))

    def due(self, entry: Entry) -> float:
        """When a parcel may be tried."""
        return max(entry.due, self._outage.until)

    def next_due(self, now: float) -> float:
        """When something may be tried; never, where nothing waits."""
        if self._outage.until > now:
            # Thousands need not be looked through meanwhile.
            return self._outage.until
        return min((entry.due for entry in self._heads()), default=float("inf"))

    def failed(self, entry: Entry, outcome: Transient, now: float) -> bool:
        """Let a parcel, or all, wait after a failure; tells whether its reason is another one than the last."""
        outage = self._outage
        if outcome.whole_destination:
            told, outage.reason = outage.reason, outcome.reason
        else:
            outage.in_a_row.add(entry.parcel.id)
            entry.failures += 1
            entry.due = now + pause_seconds(self._patience, entry.failures, outcome.retry_after)
            told = entry.state.last_error
        if outcome.whole_destination or len(outage.in_a_row) >= _FAILING_IN_A_ROW:
            outage.failures += 1
            outage.until = now + pause_seconds(self._patience, outage.failures, outcome.retry_after)
        return told != outcome.reason

    def recovered(self) -> bool:
        """Take note that the peer takes something; tells whether it was said to be away."""
        told, self._outage = bool(self._outage.reason), _Outage()
        return told

    def _heads(self) -> list[Entry]:
        heads: dict[str, Entry] = {}
        for entry in self.entries.values():
            head = heads.get(entry.parcel.study_key)
            if head is None or _rank(entry) < _rank(head):
                heads[entry.parcel.study_key] = entry
        return list(heads.values())


def _rank(entry: Entry) -> tuple[int, datetime, str]:
    return entry.parcel.sequence, entry.parcel.created_at, entry.parcel.id
