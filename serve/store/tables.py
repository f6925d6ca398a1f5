"""The tables, as SQLAlchemy models. The migrations make them; a test holds that both agree.

A study has instances, an instance has results, one a model (by digest), at most one picture, and the results of shadow
models in a table of their own, where nothing that shows answers can meet them. `positive_finding` repeats what the newest
results say, so that a list can be filtered without reading them. A patient's confirmed history hangs on the patient's
identifier and not on a study: it may know visits that never came here.
"""

from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Any

import sqlalchemy as sa
from pydantic import JsonValue
from sqlalchemy import String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from cxr_ray.earlier_visits import View
from serve.store.records import REFUSED, Finding, Role, Status, Verdict


class UTCTime(sa.TypeDecorator[datetime]):
    """An aware time; SQLite keeps no zone, so what goes in is turned to UTC, and what comes out is marked as it."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """To UTC."""
        if value and not value.tzinfo:
            raise ValueError(f"{value} has no time zone; pass an aware time")
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Marked as UTC."""
        if value and not value.tzinfo:
            return value.replace(tzinfo=UTC)
        return value.astimezone(UTC) if value else None


class Findings(sa.TypeDecorator[tuple[Finding, ...]]):
    """Findings as a JSON list of objects."""

    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: tuple[Finding, ...] | None, dialect: sa.Dialect) -> list[dict[str, JsonValue]]:
        """To JSON."""
        return [asdict(finding) for finding in value or ()]

    def process_result_value(self, value: list[dict[str, Any]] | None, dialect: sa.Dialect) -> tuple[Finding, ...]:
        """From JSON."""
        return tuple(Finding(**finding) for finding in value or ())


class Base(DeclarativeBase):
    """All tables of the store."""


class StudyRow(Base):
    """A study; `status` is ``answered`` as soon as one of its instances is, `fetched` false as soon as one was sent here."""

    __tablename__ = "study"
    __table_args__ = (
        # With the date in it, a range of dates is sought here in the order of arrival; an index by date would be sorted again.
        sa.Index("ix_study_received", "received_at", "id", "study_date"),
        sa.Index("ix_study_status_received", "status", "received_at", "id"),
        sa.Index("ix_study_patient_id", "patient_id"),
        sa.Index("ix_study_accession_number", "accession_number"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(String(64), unique=True)
    patient_id: Mapped[str | None] = mapped_column(Text)
    accession_number: Mapped[str | None] = mapped_column(Text)
    study_date: Mapped[str | None] = mapped_column(Text)
    received_at: Mapped[datetime] = mapped_column(UTCTime)
    status: Mapped[Status] = mapped_column(String(16), default=REFUSED, server_default=REFUSED)
    fetched: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    instances: Mapped[list["InstanceRow"]] = relationship(back_populates="study", order_by="InstanceRow.id")
    reviews: Mapped[list["ReviewRow"]] = relationship(order_by="ReviewRow.finding")


class InstanceRow(Base):
    """An instance that was answered or refused; `fetched` if it was got from an archive, as a prior of another."""

    __tablename__ = "instance"

    id: Mapped[int] = mapped_column(primary_key=True)
    sop_instance_uid: Mapped[str] = mapped_column(String(64), unique=True)
    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), index=True)
    series_instance_uid: Mapped[str] = mapped_column(String(64))
    content_digest: Mapped[str] = mapped_column(String(64))
    status: Mapped[Status] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    received_at: Mapped[datetime] = mapped_column(UTCTime)
    answered_at: Mapped[datetime] = mapped_column(UTCTime)
    calling_ae: Mapped[str | None] = mapped_column(String(16))
    fetched: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    study: Mapped[StudyRow] = relationship(back_populates="instances")
    results: Mapped[list["ResultRow"]] = relationship(order_by="ResultRow.id")
    picture: Mapped["PictureRow | None"] = relationship()


class _AnswerColumns:
    id: Mapped[int] = mapped_column(primary_key=True)
    instance_id: Mapped[int] = mapped_column(sa.ForeignKey("instance.id"))
    model_name: Mapped[str] = mapped_column(Text)
    model_version: Mapped[str] = mapped_column(Text)
    model_digest: Mapped[str] = mapped_column(String(128))
    findings: Mapped[tuple[Finding, ...]] = mapped_column(Findings)
    clinical: Mapped[dict[str, JsonValue]] = mapped_column(sa.JSON)
    warnings: Mapped[list[str]] = mapped_column(sa.JSON)
    created_at: Mapped[datetime] = mapped_column(UTCTime)
    priors: Mapped[dict[str, JsonValue] | None] = mapped_column(sa.JSON(none_as_null=True))


class ResultRow(_AnswerColumns, Base):
    """What one model said of one instance."""

    __tablename__ = "result"
    __table_args__ = (sa.UniqueConstraint("instance_id", "model_digest"),)


class ShadowResultRow(_AnswerColumns, Base):
    """What a model that is on trial said of one instance."""

    __tablename__ = "shadow_result"
    __table_args__ = (sa.UniqueConstraint("instance_id", "model_digest"),)


class PositiveFindingRow(Base):
    """A finding that the newest answers of a study's instances call positive; `received_at` is the study's."""

    __tablename__ = "positive_finding"
    __table_args__ = (sa.Index("ix_positive_finding_received", "finding", "received_at", "study_id"),)

    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), primary_key=True)
    finding: Mapped[str] = mapped_column(String(64), primary_key=True)
    received_at: Mapped[datetime] = mapped_column(UTCTime)


class PictureRow(Base):
    """The pixels of an instance, which only those load who ask for them."""

    __tablename__ = "picture"

    instance_id: Mapped[int] = mapped_column(sa.ForeignKey("instance.id"), primary_key=True, autoincrement=False)
    square: Mapped[bytes] = mapped_column(sa.LargeBinary, deferred=True)
    view: Mapped[bytes] = mapped_column(sa.LargeBinary, deferred=True)


class ReviewRow(Base):
    """A reader's verdict on a finding of a study; without a row nobody has said anything."""

    __tablename__ = "review"

    study_id: Mapped[int] = mapped_column(sa.ForeignKey("study.id"), primary_key=True)
    finding: Mapped[str] = mapped_column(String(64), primary_key=True)
    verdict: Mapped[Verdict] = mapped_column(String(16))
    actor: Mapped[str] = mapped_column(Text)
    reviewed_at: Mapped[datetime] = mapped_column(UTCTime)


class PatientHistoryRow(Base):
    """A patient whose earlier visits were stated, if only that there were none."""

    __tablename__ = "patient_history"

    patient_id: Mapped[str] = mapped_column(Text, primary_key=True)
    stated_at: Mapped[datetime] = mapped_column(UTCTime)
    visits: Mapped[list["ConfirmedVisitRow"]] = relationship(
        order_by="ConfirmedVisitRow.visit_date", cascade="all, delete-orphan"
    )


class ConfirmedVisitRow(Base):
    """What was stated of one date."""

    __tablename__ = "confirmed_visit"

    patient_id: Mapped[str] = mapped_column(sa.ForeignKey("patient_history.patient_id"), primary_key=True)
    visit_date: Mapped[date] = mapped_column(sa.Date, primary_key=True)
    findings: Mapped[list[str]] = mapped_column(sa.JSON)
    view: Mapped[View | None] = mapped_column(String(2))


class ArchivedResultRow(Base):
    """What this software said of an earlier study, as an archive keeps it (SR); the study itself need not be here."""

    __tablename__ = "archived_result"

    patient_id: Mapped[str] = mapped_column(Text, primary_key=True)
    study_instance_uid: Mapped[str] = mapped_column(String(64), primary_key=True)
    study_date: Mapped[date] = mapped_column(sa.Date)
    findings: Mapped[list[str]] = mapped_column(sa.JSON)
    view: Mapped[View | None] = mapped_column(String(2))
    read_at: Mapped[datetime] = mapped_column(UTCTime)


class TokenRow(Base):
    """A bearer token; `digest` is the SHA-256 of its secret."""

    __tablename__ = "token"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[Role] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UTCTime)
    expires_at: Mapped[datetime | None] = mapped_column(UTCTime)
    last_used_on: Mapped[date | None] = mapped_column(sa.Date)
    revoked_at: Mapped[datetime | None] = mapped_column(UTCTime)


class AccessRow(Base):
    """An entry of the audit; nothing here changes or removes one."""

    __tablename__ = "access"
    __table_args__ = (sa.Index("ix_access_study", "study_instance_uid", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UTCTime)
    actor: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(Text)
    study_instance_uid: Mapped[str | None] = mapped_column(Text)
    patient_id: Mapped[str | None] = mapped_column(Text)
    request_id: Mapped[str | None] = mapped_column(Text)


class SecretRow(Base):
    """A random value that all who open the store share."""

    __tablename__ = "secret"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[bytes] = mapped_column(sa.LargeBinary)
