"""Reading studies: one, or a page of those that a filter lets through.

The study's answer is computed on reading: per finding the highest probability over the newest answers of its instances, with
each instance's own beside it. A page is found by identifiers alone, on indices in the order of arrival, and only its own
studies are loaded then, with a fixed number of queries.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import selectinload

from serve.store.database import Database
from serve.store.records import Finding, InstanceView, Review, StudyFilter, StudyFinding, StudyView
from serve.store.results import answer_of
from serve.store.tables import InstanceRow, PositiveFindingRow, StudyRow

_EVERYTHING = StudyFilter()
_DICOM_DATE = "%Y%m%d"
# What a view of a study is made of, in one query each.
WHOLE_STUDY = (
    selectinload(StudyRow.instances).options(selectinload(InstanceRow.results), selectinload(InstanceRow.picture)),
    selectinload(StudyRow.reviews),
)


class Studies(Database):
    """The store's studies, for reading."""

    def studies(self, limit: int = 100, offset: int = 0, filter: StudyFilter = _EVERYTHING) -> list[StudyView]:
        """Return studies that the filter lets through, the last received first."""
        page = _filtered(StudyRow.id, filter).order_by(*_newest_first(filter)).limit(limit).offset(offset)
        with self._read() as session:
            wanted = session.scalars(page).all()
            rows = session.scalars(sa.select(StudyRow).where(StudyRow.id.in_(wanted)).options(*WHOLE_STUDY))
            by_id = {row.id: study_view(row) for row in rows}
            return [by_id[key] for key in wanted]

    def count(self, filter: StudyFilter = _EVERYTHING) -> int:
        """Return how many studies the filter lets through."""
        with self._read() as session:
            return session.scalar(_filtered(sa.func.count(), filter)) or 0

    def study(self, study_instance_uid: str) -> StudyView | None:
        """Return one study, `None` where nothing of it was answered or refused."""
        with self._read() as session:
            wanted = sa.select(StudyRow).where(StudyRow.study_instance_uid == study_instance_uid)
            row = session.scalar(wanted.options(*WHOLE_STUDY))
            return study_view(row) if row else None


def _filtered(what: Any, wanted: StudyFilter) -> sa.Select[Any]:
    query = sa.select(what).select_from(StudyRow)
    if wanted.finding is not None:
        query = query.join(PositiveFindingRow, PositiveFindingRow.study_id == StudyRow.id)
        query = query.where(PositiveFindingRow.finding == wanted.finding)
    equal = {"patient_id": wanted.patient_id, "accession_number": wanted.accession_number, "status": wanted.status}
    query = query.filter_by(**{name: value for name, value in equal.items() if value is not None})
    query = query.where(StudyRow.fetched == wanted.fetched)
    if wanted.received_from is not None:
        query = query.where(_received(wanted) >= wanted.received_from)
    if wanted.study_date_from is not None:
        query = query.where(StudyRow.study_date >= wanted.study_date_from.strftime(_DICOM_DATE))
    if wanted.study_date_to is not None:
        query = query.where(StudyRow.study_date <= wanted.study_date_to.strftime(_DICOM_DATE))
    return query


def _received(wanted: StudyFilter) -> Any:
    """The column that the index in use is sorted by."""
    return StudyRow.received_at if wanted.finding is None else PositiveFindingRow.received_at


def _newest_first(wanted: StudyFilter) -> tuple[Any, Any]:
    key = StudyRow.id if wanted.finding is None else PositiveFindingRow.study_id
    return _received(wanted).desc(), key.desc()


def study_view(row: StudyRow) -> StudyView:
    """The record of a study's row."""
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
        status=row.status,
        instances=instances,
        findings=findings,
        reviews=tuple(Review(each.finding, each.verdict, each.actor, each.reviewed_at) for each in row.reviews),
    )


def _instance_view(row: InstanceRow) -> InstanceView:
    return InstanceView(
        sop_instance_uid=row.sop_instance_uid,
        series_instance_uid=row.series_instance_uid,
        content_digest=row.content_digest,
        status=row.status,
        reason=row.reason,
        received_at=row.received_at,
        answered_at=row.answered_at,
        calling_ae=row.calling_ae,
        answer=answer_of(row.results[-1]) if row.results else None,
        has_picture=row.picture is not None,
    )
