"""What the store takes and gives: plain records, without a trace of the database."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Final, Literal, get_args

from pydantic import JsonValue

from cxr_ray import findings as known_findings
from cxr_ray.earlier_visits import View
from cxr_ray.errors import CxrRayError, UsageError

ANSWERED: Final = "answered"
REFUSED: Final = "refused"

Status = Literal["answered", "refused"]
Verdict = Literal["confirmed", "rejected"]
HistorySource = Literal["none", "confirmed", "predicted", "both"]
Role = Literal["read", "write", "admin"]
# Each may do what those before it may.
ROLES: tuple[Role, ...] = get_args(Role)


class OtherContentError(CxrRayError):
    """The same SOP Instance UID was answered before for other bytes; which of the two is right, nobody can tell."""


@dataclass(frozen=True)
class ReceivedInstance:
    """An instance as it arrived. `content_digest` tells its bytes apart from others under the same UID.

    `fetched` is one that was got from an archive, to learn what an earlier film shows: nobody sent it to be answered.
    """

    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    content_digest: str
    received_at: datetime
    calling_ae: str | None = None
    patient_id: str | None = None
    accession_number: str | None = None
    study_date: str | None = None
    fetched: bool = False


@dataclass(frozen=True)
class Finding:
    """One finding's answer for one instance: `probability` and `threshold` in 0 to 1."""

    name: str
    probability: float
    threshold: float
    positive: bool


@dataclass(frozen=True)
class Answer:
    """What the model said about one instance; `priors` what came of asking an archive before, None where none was asked."""

    model_name: str
    model_version: str
    model_digest: str
    findings: tuple[Finding, ...]
    clinical: dict[str, JsonValue]
    warnings: tuple[str, ...] = ()
    priors: dict[str, JsonValue] | None = None


@dataclass(frozen=True)
class Picture:
    """An instance's pixels as greyscale PNG of 8 bits: `square` is what the network sees, `view` what people look at."""

    square: bytes = field(repr=False)
    view: bytes = field(repr=False)


@dataclass(frozen=True)
class InstanceView:
    """An instance as the store knows it; `answer` is the newest one, `None` where it was refused."""

    sop_instance_uid: str
    series_instance_uid: str
    content_digest: str
    status: Status
    reason: str | None
    received_at: datetime
    answered_at: datetime
    calling_ae: str | None
    answer: Answer | None
    has_picture: bool = False


@dataclass(frozen=True)
class StudyFinding:
    """A finding's answer for a study: the highest of its instances, `positive` if any of them is."""

    name: str
    probability: float
    positive: bool
    by_instance: dict[str, float]


@dataclass(frozen=True)
class Review:
    """What a reader said of one finding of a study."""

    finding: str
    verdict: Verdict
    actor: str
    reviewed_at: datetime


@dataclass(frozen=True)
class StudyView:
    """A study, its instances and its answer; `findings` is empty while no instance was answered.

    `status` is ``answered`` as soon as one instance is: a lateral view that was refused does not make a study refused.
    """

    study_instance_uid: str
    patient_id: str | None
    accession_number: str | None
    study_date: str | None
    received_at: datetime
    status: Status
    instances: tuple[InstanceView, ...]
    findings: tuple[StudyFinding, ...]
    reviews: tuple[Review, ...] = ()


@dataclass(frozen=True)
class StudyFilter:
    """Which studies are wanted; what is None does not restrict.

    Attributes
    ----------
    patient_id, accession_number
        As the images have them, in full.
    study_date_from, study_date_to
        Both days are included; studies without a date are then left out.
    finding
        Positive in the newest answer of any instance.
    status
        As `StudyView.status`.
    received_from
        Aware time; what arrived then or later.
    fetched
        Studies that were only fetched from an archive, in place of those that were sent here.
    """

    patient_id: str | None = None
    accession_number: str | None = None
    study_date_from: date | None = None
    study_date_to: date | None = None
    finding: str | None = None
    status: Status | None = None
    received_from: datetime | None = None
    fetched: bool = False


def tomorrow() -> date:
    """A day more than UTC has: somewhere it is tomorrow already."""
    return (datetime.now(UTC) + timedelta(days=1)).date()


@dataclass(frozen=True)
class ConfirmedVisit:
    """What a person states of a visit; findings by name, none for a visit without any.

    Raises
    ------
    CxrRayError
        If the date lies in the future, or a finding or the view is unknown.
    """

    visit_date: date
    findings: tuple[str, ...] = ()
    view: View | None = None

    def __post_init__(self) -> None:
        if self.visit_date > tomorrow():
            raise CxrRayError(f"visit date {self.visit_date} is in the future; give the day of a visit that took place")
        if self.view not in (None, *get_args(View)):
            raise CxrRayError(f"view {self.view!r} is not known; use PA or AP, or leave it out")
        object.__setattr__(self, "findings", _in_order(self.findings))


def _in_order(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(known_findings.names(known_findings.encode(names)))


@dataclass(frozen=True)
class ArchivedResult:
    """What this software said of an earlier study, as an archive keeps it: the findings that it called positive.

    Raises
    ------
    CxrRayError
        If the date lies in the future, or a finding is unknown.
    """

    study_instance_uid: str
    study_date: date
    findings: tuple[str, ...]
    view: View | None = None

    def __post_init__(self) -> None:
        if self.study_date > tomorrow():
            raise CxrRayError(f"study date {self.study_date} is in the future; give the day of an earlier study")
        object.__setattr__(self, "findings", _in_order(self.findings))


@dataclass(frozen=True)
class Token:
    """A bearer token as the store knows it, which is without its secret; `last_used_on` to the day (UTC)."""

    name: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    last_used_on: date | None
    revoked_at: datetime | None

    def may(self, role: Role) -> bool:
        """Whether the token's role includes this one."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Access:
    """Who did what with whose data: an entry of the audit."""

    at: datetime
    actor: str
    action: str
    study_instance_uid: str | None
    patient_id: str | None
    request_id: str | None


def require_role(value: str) -> Role:
    """The role of this name.

    Raises
    ------
    UsageError
        If there is none.
    """
    for role in ROLES:
        if role == value:
            return role
    raise UsageError(f"role {value!r} is not known; use one of: {', '.join(ROLES)}")
