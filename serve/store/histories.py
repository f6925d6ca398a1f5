"""What is known of a patient's earlier visits: what people confirmed, and what this service answered before.

Confirmed is what was put or imported for the patient, and each study that a reader reviewed, with the findings that the
reader confirmed. Predicted is what the newest answers to a study call positive, without what a reader rejected; of a study
that was not answered here, what an archive has of an earlier answer. Where both are wanted, a day on which anything is
confirmed leaves out the prediction of that day.

Patients are told apart by their PatientID, whose leading and trailing blanks mean nothing (PS3.5 section 6.2, LO). An empty
one is nobody's.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cxr_ray.earlier_visits import EarlierVisit, View, united
from cxr_ray.errors import CxrRayError
from cxr_ray.findings import canonical
from serve.store.database import Database
from serve.store.records import ANSWERED, ArchivedResult, ConfirmedVisit, HistorySource, StudyView, Verdict
from serve.store.studies import WHOLE_STUDY, study_view
from serve.store.tables import ArchivedResultRow, ConfirmedVisitRow, PatientHistoryRow, ReviewRow, StudyRow


class Histories(Database):
    """The store's histories of patients, and the reviews that feed them."""

    def put_history(self, patient_id: str, visits: Sequence[ConfirmedVisit]) -> None:
        """Replace what is stated of the patient's visits, imported ones included; records of one date become one.

        Without any visit it is stated that there were none, which is not the same as no statement.

        Raises
        ------
        CxrRayError
            When `patient_id` is empty, or the database does not take it.
        """
        patient = _require_patient(patient_id)

        def work(session: Session) -> None:
            row = _history_row(session, patient)
            known = {visit.visit_date: visit for visit in row.visits}
            new = _by_date(visits)
            row.visits = [known.get(day) or ConfirmedVisitRow(visit_date=day) for day in new]
            _state(row, new)

        self._write(work)

    def import_history(self, visits: Mapping[str, Sequence[ConfirmedVisit]]) -> int:
        """Add visits by patient, all or none; what is stated of the same patient and date is replaced.

        Returns
        -------
        int
            Visits written, one a patient and date.

        Raises
        ------
        CxrRayError
            When a patient's identifier is empty, or the database does not take it.
        """
        by_patient: dict[str, list[ConfirmedVisit]] = {}
        for patient_id, of_patient in visits.items():
            by_patient.setdefault(_require_patient(patient_id), []).extend(of_patient)

        def work(session: Session) -> int:
            written = 0
            # In one order, so that two imports never wait for each other.
            for patient in sorted(by_patient):
                row, new = _history_row(session, patient), _by_date(by_patient[patient])
                known = {visit.visit_date for visit in row.visits}
                row.visits.extend(ConfirmedVisitRow(visit_date=day) for day in new if day not in known)
                _state(row, new)
                written += len(new)
            return written

        return self._write(work)

    def history(self, patient_id: str) -> tuple[ConfirmedVisit, ...] | None:
        """Return what is stated of the patient's visits, by date; None if nothing was ever stated."""
        with self._read() as session:
            row = session.get(PatientHistoryRow, patient_id.strip())
            return None if row is None else tuple(_confirmed_visit(visit) for visit in row.visits)

    def review(self, study_instance_uid: str, finding: str, verdict: Verdict | None, actor: str) -> bool:
        """Keep a reader's verdict on a finding of a study, in place of an earlier one; None takes it back.

        Returns
        -------
        bool
            False when the study is not known: nothing changes then.

        Raises
        ------
        CxrRayError
            When the finding is unknown, or the database does not take it.
        """
        name = canonical(finding)

        def work(session: Session) -> bool:
            wanted = sa.select(StudyRow).where(StudyRow.study_instance_uid == study_instance_uid)
            study = session.scalar(wanted.with_for_update(key_share=True))
            if study is None:
                return False
            if verdict is None:
                session.execute(sa.delete(ReviewRow).filter_by(study_id=study.id, finding=name))
                return True
            review = ReviewRow(study_id=study.id, finding=name, verdict=verdict, actor=actor, reviewed_at=datetime.now(UTC))
            session.merge(review)
            return True

        return self._write(work)

    def put_archived_results(self, patient_id: str, results: Sequence[ArchivedResult]) -> None:
        """Keep what an archive has of earlier answers to this patient's studies; one a study, the last that is put.

        Raises
        ------
        CxrRayError
            When `patient_id` is empty, or the database does not take it.
        """
        patient, now = _require_patient(patient_id), datetime.now(UTC)

        def work(session: Session) -> None:
            for result in sorted(results, key=lambda each: each.study_instance_uid):
                session.merge(
                    ArchivedResultRow(
                        patient_id=patient,
                        study_instance_uid=result.study_instance_uid,
                        study_date=result.study_date,
                        findings=list(result.findings),
                        view=result.view,
                        read_at=now,
                    )
                )

        self._write(work)

    def predicted_studies(self, patient_id: str, before: date) -> frozenset[str]:
        """Return the UIDs of studies of strictly earlier days that were answered, here or as an archive has it."""
        patient = patient_id.strip()
        with self._read() as session:
            wanted = sa.select(StudyRow.study_instance_uid, StudyRow.study_date)
            answered = session.execute(wanted.where(StudyRow.patient_id == patient, StudyRow.status == ANSWERED))
            dated = [(uid, _study_date(day)) for uid, day in answered]
            archived = [row.study_instance_uid for row in _archived(session, patient, before)]
        return frozenset([*(uid for uid, day in dated if day is not None and day < before), *archived])

    def earlier_visits(self, patient_id: str | None, before: date, source: HistorySource) -> tuple[EarlierVisit, ...] | None:
        """Return the patient's visits on strictly earlier days, one a day, by date.

        Returns
        -------
        tuple of EarlierVisit, or None
            Empty where a history was stated for the patient, and nothing in it or in a study is earlier: then this is known
            to be the first visit. None where nothing is known: that nothing came here does not say that nothing was.
        """
        patient = (patient_id or "").strip()
        if not patient or source == "none":
            return None
        with self._read() as session:
            stated = session.get(PatientHistoryRow, patient) if source != "predicted" else None
            studies = _earlier_studies(session, patient, before)
            archived = _archived(session, patient, before)
            visits = [_earlier(visit) for visit in stated.visits if visit.visit_date < before] if stated else []
        if source != "predicted":
            visits += [_reviewed(study, day) for day, study in studies if study.reviews]
        if source != "confirmed":
            # Who states a day states all of it; who reviews a study says something of the findings reviewed.
            whole = {visit.visit_date for visit in stated.visits} if stated else set()
            visits += [_predicted(study, day) for day, study in studies if day not in whole]
            here = {study.study_instance_uid for _, study in studies}
            left = [row for row in archived if row.study_instance_uid not in here and row.study_date not in whole]
            visits += [EarlierVisit(row.study_date, tuple(row.findings), row.view, "predicted") for row in left]
        return united(visits) if visits or stated else None


def _require_patient(patient_id: str) -> str:
    patient = patient_id.strip()
    if not patient:
        raise CxrRayError("patient identifier is empty; give the PatientID that the patient's images have")
    return patient


def _history_row(session: Session, patient: str) -> PatientHistoryRow:
    """The patient's row, made if it is new, held against other writers."""
    row = session.get(PatientHistoryRow, patient, with_for_update={"key_share": True})
    if row is None:
        row = PatientHistoryRow(patient_id=patient)
        session.add(row)
    row.stated_at = datetime.now(UTC)
    session.flush()
    return row


def _by_date(visits: Iterable[ConfirmedVisit]) -> dict[date, EarlierVisit]:
    return {visit.visit_date: visit for visit in united(EarlierVisit(v.visit_date, v.findings, v.view) for v in visits)}


def _state(row: PatientHistoryRow, new: Mapping[date, EarlierVisit]) -> None:
    for visit in row.visits:
        if visit.visit_date in new:
            stated = new[visit.visit_date]
            visit.findings, visit.view = list(stated.findings), stated.view


def _confirmed_visit(row: ConfirmedVisitRow) -> ConfirmedVisit:
    return ConfirmedVisit(row.visit_date, tuple(row.findings), row.view)


def _earlier(row: ConfirmedVisitRow) -> EarlierVisit:
    return EarlierVisit(row.visit_date, tuple(row.findings), row.view)


def _earlier_studies(session: Session, patient: str, before: date) -> list[tuple[date, StudyView]]:
    """The patient's answered studies of earlier days; a date that is none does not count."""
    wanted = sa.select(StudyRow).where(StudyRow.patient_id == patient, StudyRow.status == ANSWERED)
    rows = session.scalars(wanted.options(*WHOLE_STUDY))
    dated = [(_study_date(row.study_date), row) for row in rows]
    return [(day, study_view(row)) for day, row in dated if day is not None and day < before]


def _archived(session: Session, patient: str, before: date) -> list[ArchivedResultRow]:
    wanted = sa.select(ArchivedResultRow).where(ArchivedResultRow.patient_id == patient, ArchivedResultRow.study_date < before)
    return list(session.scalars(wanted.order_by(ArchivedResultRow.study_date)))


def _study_date(value: str | None) -> date | None:
    # strptime would take "2026 1 1" too.
    if value is None or len(value.strip()) != 8 or not value.strip().isdecimal():
        return None
    try:
        return datetime.strptime(value.strip(), "%Y%m%d").date()
    except ValueError:
        return None


def _reviewed(study: StudyView, day: date) -> EarlierVisit:
    confirmed = tuple(review.finding for review in study.reviews if review.verdict == "confirmed")
    return EarlierVisit(day, confirmed, _view(study), "confirmed")


def _predicted(study: StudyView, day: date) -> EarlierVisit:
    rejected = {review.finding for review in study.reviews if review.verdict == "rejected"}
    positive = tuple(finding.name for finding in study.findings if finding.positive and finding.name not in rejected)
    return EarlierVisit(day, positive, _view(study), "predicted")


def _view(study: StudyView) -> View | None:
    """What all answered images of the study agree on."""
    views = {instance.answer.clinical.get("view") for instance in study.instances if instance.answer}
    view = views.pop() if len(views) == 1 else None
    return cast(View, view) if view in ("PA", "AP") else None
