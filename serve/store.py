"""The results store: what was answered, refused and for which study, in any database that SQLAlchemy reaches.

SQLite by default: write-ahead log and a full sync at each commit, so a reader never waits and a committed answer
survives a power cut. Any other SQLAlchemy URL works the same; PostgreSQL where more than one machine takes part.
Three tables: a study has instances, an instance has results, one a model (by digest). Unique keys make a repeated write
a no-op, so the dispatcher may repeat itself after a crash. The study's answer is computed on reading: per finding the
highest probability over its answered instances, with each instance's own beside it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from pydantic import JsonValue
from sqlalchemy import String, Text
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload
from sqlalchemy.pool import ConnectionPoolEntry

from cxr_ray.errors import CxrRayError, UsageError

ANSWERED = "answered"
REFUSED = "refused"
_BUSY_MILLISECONDS = 30_000
_ATTEMPTS = 5
_Found = TypeVar("_Found")


class OtherContentError(CxrRayError):
    """The same SOP Instance UID was answered before for other bytes; which of the two is right, nobody can tell."""


@dataclass(frozen=True)
class ReceivedInstance:
    """An instance as it arrived. `content_digest` tells its bytes apart from others under the same UID."""

    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    content_digest: str
    received_at: datetime
    calling_ae: str | None = None
    patient_id: str | None = None
    accession_number: str | None = None
    study_date: str | None = None


@dataclass(frozen=True)
class Finding:
    """One finding's answer for one instance: `probability` and `threshold` in 0 to 1."""

    name: str
    probability: float
    threshold: float
    positive: bool


@dataclass(frozen=True)
class Answer:
    """What the model said about one instance."""

    model_name: str
    model_version: str
    model_digest: str
    findings: tuple[Finding, ...]
    clinical: dict[str, JsonValue]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class InstanceView:
    """An instance as the store knows it; `answer` is the newest one, `None` where it was refused."""

    sop_instance_uid: str
    series_instance_uid: str
    content_digest: str
    status: str
    reason: str | None
    received_at: datetime
    answered_at: datetime
    calling_ae: str | None
    answer: Answer | None


@dataclass(frozen=True)
class StudyFinding:
    """A finding's answer for a study: the highest of its instances, `positive` if any of them is."""

    name: str
    probability: float
    positive: bool
    by_instance: dict[str, float]


@dataclass(frozen=True)
class StudyView:
    """A study, its instances and its answer; `findings` is empty while no instance was answered."""

    study_instance_uid: str
    patient_id: str | None
    accession_number: str | None
    study_date: str | None
    received_at: datetime
    instances: tuple[InstanceView, ...]
    findings: tuple[StudyFinding, ...]


class Store:
    """Results by study; safe for threads and processes at once.

    Parameters
    ----------
    url : str
        SQLAlchemy URL, e.g. ``sqlite:////var/lib/cxr-ray/results.db`` or ``postgresql+psycopg://user@host/database``.
        Tables are created where absent.

    Raises
    ------
    UsageError
        When `url` is none, or its driver is not installed.
    CxrRayError
        When the database cannot be opened or written.
    """

    def __init__(self, url: str) -> None:
        self._url = _parsed(url)
        self._engine = _engine(self._url)
        self._writer = self._engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        self._write(lambda session: _Base.metadata.create_all(session.connection()))

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def record_result(self, instance: ReceivedInstance, answer: Answer) -> bool:
        """Commit an answer; a refusal of the same instance is overruled by it.

        Returns
        -------
        bool
            False when this model (by digest) has answered this instance before: nothing changes then.

        Raises
        ------
        OtherContentError
            When the instance was answered for other bytes under the same SOP Instance UID.
        CxrRayError
            When the database does not take it.
        """

        def work(session: Session) -> bool:
            row = _instance_row(session, instance)
            if row.status == ANSWERED and row.content_digest != instance.content_digest:
                raise OtherContentError(f"instance {instance.sop_instance_uid} was received before with other bytes")
            if any(result.model_digest == answer.model_digest for result in row.results):
                return False
            row.status, row.reason, row.answered_at = ANSWERED, None, datetime.now(UTC)
            row.content_digest = instance.content_digest
            row.results.append(
                _Result(
                    model_name=answer.model_name,
                    model_version=answer.model_version,
                    model_digest=answer.model_digest,
                    findings=answer.findings,
                    clinical=answer.clinical,
                    warnings=list(answer.warnings),
                    created_at=row.answered_at,
                )
            )
            return True

        return self._write(work)

    def record_refusal(self, instance: ReceivedInstance, reason: str) -> bool:
        """Commit that the service does not read this instance, and why.

        Returns
        -------
        bool
            False when the same refusal, or an answer, is known already: nothing changes then.

        Raises
        ------
        CxrRayError
            When the database does not take it.
        """

        def work(session: Session) -> bool:
            row = _instance_row(session, instance)
            if row.status == ANSWERED or row.reason == reason:
                return False
            row.reason, row.answered_at = reason, datetime.now(UTC)
            row.content_digest = instance.content_digest
            return True

        return self._write(work)

    def content_digest(self, sop_instance_uid: str) -> str | None:
        """Return the digest of the bytes that were answered under this UID; `None` while there is no answer."""
        with self._read() as session:
            return session.scalar(
                sa.select(_Instance.content_digest).where(
                    _Instance.sop_instance_uid == sop_instance_uid, _Instance.status == ANSWERED
                )
            )

    def studies(self, limit: int = 100, offset: int = 0) -> list[StudyView]:
        """Return studies, the last received first."""
        with self._read() as session:
            rows = session.scalars(
                sa.select(_Study)
                .options(selectinload(_Study.instances).selectinload(_Instance.results))
                .order_by(_Study.received_at.desc(), _Study.id.desc())
                .limit(limit)
                .offset(offset)
            )
            return [_study_view(row) for row in rows]

    def study(self, study_instance_uid: str) -> StudyView | None:
        """Return one study, `None` where nothing of it was answered or refused."""
        with self._read() as session:
            row = session.scalar(sa.select(_Study).where(_Study.study_instance_uid == study_instance_uid))
            return _study_view(row) if row else None

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with self._explained(), Session(self._engine) as session:
            yield session

    def _write(self, work: Callable[[Session], _Found]) -> _Found:
        with self._explained():
            for attempt in range(_ATTEMPTS):
                try:
                    with Session(self._writer) as session, session.begin():
                        return work(session)
                except (IntegrityError, ProgrammingError):
                    # Another writer was first with the same key or table: on the next look it is there.
                    if attempt == _ATTEMPTS - 1:
                        raise
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise CxrRayError(
                f"results store {self._url.render_as_string(hide_password=True)}: {cause}; "
                "check that it can be reached and written"
            ) from error


class _UTCTime(sa.TypeDecorator[datetime]):
    # SQLite keeps no zone: what goes in is turned to UTC, what comes out is marked as it.
    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value and not value.tzinfo:
            raise ValueError(f"{value} has no time zone; pass an aware time")
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value and not value.tzinfo:
            return value.replace(tzinfo=UTC)
        return value.astimezone(UTC) if value else None


class _Findings(sa.TypeDecorator[tuple[Finding, ...]]):
    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: tuple[Finding, ...] | None, dialect: sa.Dialect) -> list[dict[str, JsonValue]]:
        return [asdict(finding) for finding in value or ()]

    def process_result_value(self, value: list[dict[str, Any]] | None, dialect: sa.Dialect) -> tuple[Finding, ...]:
        return tuple(Finding(**finding) for finding in value or ())


class _Base(DeclarativeBase):
    pass


class _Study(_Base):
    __tablename__ = "study"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(String(64), unique=True)
    patient_id: Mapped[str | None] = mapped_column(Text)
    accession_number: Mapped[str | None] = mapped_column(Text)
    study_date: Mapped[str | None] = mapped_column(Text)
    received_at: Mapped[datetime] = mapped_column(_UTCTime, index=True)
    instances: Mapped[list["_Instance"]] = relationship(back_populates="study", order_by="_Instance.id")


class _Instance(_Base):
    __tablename__ = "instance"

    id: Mapped[int] = mapped_column(primary_key=True)
    sop_instance_uid: Mapped[str] = mapped_column(String(64), unique=True)
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), index=True)
    series_instance_uid: Mapped[str] = mapped_column(String(64))
    content_digest: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    received_at: Mapped[datetime] = mapped_column(_UTCTime)
    answered_at: Mapped[datetime] = mapped_column(_UTCTime)
    calling_ae: Mapped[str | None] = mapped_column(String(16))
    study: Mapped[_Study] = relationship(back_populates="instances")
    results: Mapped[list["_Result"]] = relationship(order_by="_Result.id")


class _Result(_Base):
    __tablename__ = "result"
    __table_args__ = (sa.UniqueConstraint("instance_id", "model_digest"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    instance_id: Mapped[int] = mapped_column(sa.ForeignKey("instance.id"))
    model_name: Mapped[str] = mapped_column(Text)
    model_version: Mapped[str] = mapped_column(Text)
    model_digest: Mapped[str] = mapped_column(String(128))
    findings: Mapped[tuple[Finding, ...]] = mapped_column(_Findings)
    clinical: Mapped[dict[str, JsonValue]] = mapped_column(sa.JSON)
    warnings: Mapped[list[str]] = mapped_column(sa.JSON)
    created_at: Mapped[datetime] = mapped_column(_UTCTime)


def _parsed(url: str) -> URL:
    try:
        return sa.make_url(url)
    except (ArgumentError, ValueError) as error:
        # Not the URL itself: what does not parse may still hold a password.
        raise UsageError(
            "results store: the URL does not parse; write e.g. sqlite:////path/results.db "
            "or postgresql+psycopg://user@host/database"
        ) from error


def _engine(url: URL) -> sa.Engine:
    try:
        # An error's text carries the parameters otherwise, patient identifiers among them.
        engine = sa.create_engine(url, hide_parameters=True, pool_pre_ping=True)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise UsageError(
            f"results store {url.render_as_string(hide_password=True)}: no driver for {url.drivername!r}; use sqlite, "
            'or install "cxr-ray[postgresql]" and write postgresql+psycopg'
        ) from error
    if url.get_backend_name() == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for setting in (f"busy_timeout={_BUSY_MILLISECONDS}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads and then writes fails at once when another wrote in between, whatever the timeout:
    # a writer has to queue up before its first look.
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))


def _instance_row(session: Session, instance: ReceivedInstance) -> _Instance:
    row = session.scalar(sa.select(_Instance).where(_Instance.sop_instance_uid == instance.sop_instance_uid).with_for_update())
    if row:
        return row
    study = session.scalar(sa.select(_Study).where(_Study.study_instance_uid == instance.study_instance_uid))
    if not study:
        study = _Study(
            study_instance_uid=instance.study_instance_uid,
            patient_id=instance.patient_id,
            accession_number=instance.accession_number,
            study_date=instance.study_date,
            received_at=instance.received_at,
        )
        session.add(study)
    row = _Instance(
        study=study,
        sop_instance_uid=instance.sop_instance_uid,
        series_instance_uid=instance.series_instance_uid,
        content_digest=instance.content_digest,
        status=REFUSED,
        reason=None,
        received_at=instance.received_at,
        answered_at=datetime.now(UTC),
        calling_ae=instance.calling_ae,
    )
    session.add(row)
    session.flush()
    return row


def _study_view(row: _Study) -> StudyView:
    instances = tuple(_instance_view(instance) for instance in row.instances)
    found: dict[str, dict[str, Finding]] = {}
    for instance in instances:
        for finding in instance.answer.findings if instance.answer else ():
            found.setdefault(finding.name, {})[instance.sop_instance_uid] = finding
    findings = tuple(
        StudyFinding(
            name=name,
            probability=max(finding.probability for finding in by_instance.values()),
            positive=any(finding.positive for finding in by_instance.values()),
            by_instance={uid: finding.probability for uid, finding in by_instance.items()},
        )
        for name, by_instance in found.items()
    )
    return StudyView(
        study_instance_uid=row.study_instance_uid,
        patient_id=row.patient_id,
        accession_number=row.accession_number,
        study_date=row.study_date,
        received_at=row.received_at,
        instances=instances,
        findings=findings,
    )


def _instance_view(row: _Instance) -> InstanceView:
    return InstanceView(
        sop_instance_uid=row.sop_instance_uid,
        series_instance_uid=row.series_instance_uid,
        content_digest=row.content_digest,
        status=row.status,
        reason=row.reason,
        received_at=row.received_at,
        answered_at=row.answered_at,
        calling_ae=row.calling_ae,
        answer=_answer(row.results[-1]) if row.results else None,
    )


def _answer(row: _Result) -> Answer:
    return Answer(row.model_name, row.model_version, row.model_digest, row.findings, row.clinical, warnings=tuple(row.warnings))
