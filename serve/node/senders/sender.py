"""What every sender does, and the three ways in which it ends.

Delivered; not now, so that waiting helps; or never in this form, so that somebody has to look at it. Reasons are our own words
and may stand in a log; what the destination says may quote what it was sent, and goes into the dead letter alone.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from serve.node.parcels import Parcel


@dataclass(frozen=True)
class Delivered:
    """The destination has taken everything; `status` is what it answered to the last item."""

    status: str = ""


@dataclass(frozen=True)
class Transient:
    """Not now.

    Attributes
    ----------
    retry_after
        Seconds that the destination asked for; 0: it said nothing.
    whole_destination
        Whether it is the destination that is not to be had, whatever is sent; else it may be this parcel.
    """

    reason: str
    detail: str = ""
    retry_after: float = 0.0
    whole_destination: bool = False


@dataclass(frozen=True)
class Permanent:
    """Not like this, however often."""

    reason: str
    detail: str = ""


Outcome: TypeAlias = Delivered | Transient | Permanent


class Sender(Protocol):
    """Brings parcels to one destination. Used by one thread, but for `abort`."""

    def send(self, parcel: Parcel, confirmed: Set[str], confirm: Callable[[str], None]) -> Outcome:
        """Send what is not confirmed yet; every step ends within the destination's patience.

        Parameters
        ----------
        confirmed
            Names of the items that the destination has taken already.
        confirm
            Called with the name of each item that it takes.
        """
        ...

    def rest(self, interrupted: Callable[[], bool]) -> None:
        """There is nothing to send for now: hold nothing open. Waiting for the peer ends when `interrupted`."""
        ...

    def abort(self) -> None:
        """End what is under way, from another thread."""
        ...


@runtime_checkable
class CommittingSender(Protocol):
    """Can ask whether the destination keeps what it has taken."""

    def request_commitment(self, parcel: Parcel, transaction_uid: str) -> Outcome:
        """Ask for storage commitment of all items; `Delivered` means that the question was taken."""
        ...

    def instances(self, parcel: Parcel) -> dict[str, tuple[str, str]]:
        """SOP class and instance UID of each DICOM item, by its name."""
        ...
