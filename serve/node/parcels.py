"""What the outbox carries: the results of one revision of a study for one destination.

A parcel says of itself only what delivery needs. Its id is made from what it holds, so that making it again makes nothing
new; study and names are digests, and identifiers of a patient stand nowhere but inside the items.
"""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

MediaType = Literal["application/dicom", "application/json"]
DICOM: MediaType = "application/dicom"
JSON: MediaType = "application/json"
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_SAFE_FILE = re.compile(r"(?!(parcel|state|letter)\.json)[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.(dcm|json)")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


@dataclass(frozen=True)
class Item:
    """One object of a parcel.

    Parameters
    ----------
    name
        File name within the parcel, e.g. ``sr.dcm`` or ``summary.json``; the suffix says what it is.
    content
        Bytes, or the file that holds them; a parcel that lies in the outbox has files.
    """

    name: str
    content: bytes | Path

    @property
    def media_type(self) -> MediaType:
        """DICOM or JSON, by the name."""
        return DICOM if self.name.endswith(".dcm") else JSON

    def read(self) -> bytes:
        """The bytes.

        Raises
        ------
        OSError
            When the file cannot be read.
        """
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


class StudyOrigin(_Record):
    """Who sent a study: AE title, IP address."""

    calling_ae: str
    address: str


@dataclass(frozen=True)
class Parcel:
    """Results on their way.

    Parameters
    ----------
    id
        Deterministic: the same results for the same destination have the same id.
    destination
        Name of the destination.
    study_key
        Digest of the study; what belongs to one is delivered in order.
    sequence
        Place within the study: the revision.
    items
        What is sent, in this order.
    origin
        Who sent the study; needed by destinations of kind ``sender``.
    """

    id: str
    destination: str
    study_key: str
    sequence: int
    items: tuple[Item, ...]
    origin: StudyOrigin | None = None
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        names = [item.name for item in self.items]
        for label, value, form in (
            ("id", self.id, _SAFE),
            ("destination", self.destination, _SAFE),
            ("study_key", self.study_key, _SAFE),
            *(("items", name, _SAFE_FILE) for name in names),
        ):
            if not form.fullmatch(value):
                raise ValueError(f"parcel {label} {value[:140]!r} is no safe file name; use letters, digits, - and _")
        if not names or len(set(names)) < len(names):
            raise ValueError("parcel items are none, or two of one name; give at least one, each with a name of its own")

    def of_type(self, media_type: MediaType) -> tuple[Item, ...]:
        """Its items of a type."""
        return tuple(item for item in self.items if item.media_type == media_type)


class ParcelRecord(_Record):
    """What lies beside a parcel's items and says what they are."""

    id: str
    destination: str
    study_key: str
    sequence: int
    items: tuple[str, ...]
    origin: StudyOrigin | None
    created_at: datetime

    @classmethod
    def of(cls, parcel: Parcel) -> "ParcelRecord":
        """The record of a parcel."""
        return cls(
            id=parcel.id,
            destination=parcel.destination,
            study_key=parcel.study_key,
            sequence=parcel.sequence,
            items=tuple(item.name for item in parcel.items),
            origin=parcel.origin,
            created_at=parcel.created_at,
        )

    def parcel(self, folder: Path) -> Parcel:
        """The parcel whose items lie in `folder`."""
        items = tuple(Item(name, folder / name) for name in self.items)
        return Parcel(self.id, self.destination, self.study_key, self.sequence, items, self.origin, self.created_at)


class ParcelState(_Record):
    """How far a parcel has come.

    Attributes
    ----------
    confirmed
        Names of items that the destination has taken.
    asked_at
        When storage commitment was asked for; None: not yet, or what came of it has to be sent again.
    resends
        How often the destination did not commit to what it had taken.
    replayed_at
        When it was last put back from the dead letters.
    """

    attempts: int = 0
    confirmed: tuple[str, ...] = ()
    last_error: str = ""
    last_attempt_at: datetime | None = None
    asked_at: datetime | None = None
    resends: int = 0
    replayed_at: datetime | None = None


class Receipt(_Record):
    """What is kept of a delivered parcel."""

    id: str
    study_key: str
    sequence: int
    items: tuple[str, ...]
    created_at: datetime
    delivered_at: datetime
    attempts: int
    remote_status: str
    committed: bool


class Letter(_Record):
    """Why a parcel is dead: `reason` is ours, `detail` the destination's own words."""

    reason: str
    detail: str
    when: datetime
    attempts: int
