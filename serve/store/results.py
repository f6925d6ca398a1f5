"""Writing answers and refusals, and asking for single ones.

Unique keys make a repeated write a no-op, so the dispatcher may repeat itself after a crash. Who writes holds the study's
row: what repeats its results (status, positive findings) would miss an instance that is written at the same moment.
"""

from datetime import UTC, datetime
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import Session, selectinload, undefer

from cxr_ray.errors import CxrRayError
from serve.store.database import Database
from serve.store.records import ANSWERED, REFUSED, Answer, OtherContentError, Picture, ReceivedInstance
from serve.store.tables import InstanceRow, PictureRow, PositiveFindingRow, ResultRow, ShadowResultRow, StudyRow

_Row = TypeVar("_Row", ResultRow, ShadowResultRow)


class Results(Database):
    """The store's answers, one instance and model at a time."""

    def record_result(self, instance: ReceivedInstance, answer: Answer, picture: Picture | None = None) -> bool:
        """Commit an answer; a refusal of the same instance is overruled by it.

        So is what was said of it when it was fetched as a prior, once it is sent here: from then on it is as if it had never
        been fetched. An archive may write the same instance in other bytes, and nobody was told of that answer.

        Returns
        -------
        bool
            False when this model (by digest) has answered this instance before: nothing changes then, but that a picture
            is kept where there was none.

        Raises
        ------
        OtherContentError
            When the instance was answered for other bytes under the same SOP Instance UID.
        CxrRayError
            When the database does not take it.
        """

        def work(session: Session) -> bool:
            row = _instance_row(session, instance)
            if row.fetched and not instance.fetched:
                _take_back(session, row, instance)
            if row.status == ANSWERED and row.content_digest != instance.content_digest:
                raise OtherContentError(f"instance {instance.sop_instance_uid} was received before with other bytes")
            known = any(result.model_digest == answer.model_digest for result in row.results)
            if picture and not (known and row.picture):
                session.merge(PictureRow(instance_id=row.id, square=picture.square, view=picture.view))
            if known:
                return False
            row.status, row.reason, row.answered_at = ANSWERED, None, datetime.now(UTC)
            row.content_digest = instance.content_digest
            row.results.append(_answer_row(ResultRow, answer))
            row.study.status = ANSWERED
            session.flush()
            _renew_positive_findings(session, row.study)
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
            if row.fetched and not instance.fetched:
                _take_back(session, row, instance)
            if row.status == ANSWERED or row.reason == reason:
                return False
            row.reason, row.answered_at = reason, datetime.now(UTC)
            row.content_digest = instance.content_digest
            return True

        return self._write(work)

    def record_shadow(self, sop_instance_uid: str, answer: Answer) -> bool:
        """Commit what a model on trial says: it is kept and never shown.

        Returns
        -------
        bool
            False when this model (by digest) has a shadow answer to this instance already: nothing changes then.

        Raises
        ------
        CxrRayError
            When the instance is not known, or the database does not take it.
        """

        def work(session: Session) -> bool:
            instance = session.scalar(sa.select(InstanceRow.id).where(InstanceRow.sop_instance_uid == sop_instance_uid))
            if instance is None:
                raise CxrRayError(f"instance {sop_instance_uid} is not in the store; record its result before a shadow's")
            known = sa.exists().where(
                ShadowResultRow.instance_id == instance, ShadowResultRow.model_digest == answer.model_digest
            )
            if session.scalar(sa.select(known)):
                return False
            row = _answer_row(ShadowResultRow, answer)
            row.instance_id = instance
            session.add(row)
            return True

        return self._write(work)

    def content_digest(self, sop_instance_uid: str) -> str | None:
        """Return the digest of the bytes that were answered under this UID; `None` while there is no answer."""
        with self._read() as session:
            return session.scalar(
                sa.select(InstanceRow.content_digest).where(
                    InstanceRow.sop_instance_uid == sop_instance_uid, InstanceRow.status == ANSWERED
                )
            )

    def is_fetched(self, sop_instance_uid: str) -> bool:
        """Return whether this instance was got from an archive and never sent here."""
        with self._read() as session:
            return bool(session.scalar(sa.select(InstanceRow.fetched).filter_by(sop_instance_uid=sop_instance_uid)))

    def answer(self, sop_instance_uid: str, model_digest: str) -> Answer | None:
        """Return what this model said of this instance before, `None` if it has not been asked."""
        with self._read() as session:
            row = session.scalar(
                sa.select(ResultRow)
                .join(InstanceRow, InstanceRow.id == ResultRow.instance_id)
                .where(InstanceRow.sop_instance_uid == sop_instance_uid, ResultRow.model_digest == model_digest)
            )
            return answer_of(row) if row else None

    def shadow_answers(self, sop_instance_uid: str) -> tuple[Answer, ...]:
        """Return what models on trial said of this instance, the oldest first."""
        with self._read() as session:
            rows = session.scalars(
                sa.select(ShadowResultRow)
                .join(InstanceRow, InstanceRow.id == ShadowResultRow.instance_id)
                .where(InstanceRow.sop_instance_uid == sop_instance_uid)
                .order_by(ShadowResultRow.id)
            )
            return tuple(answer_of(row) for row in rows)

    def picture(self, sop_instance_uid: str) -> Picture | None:
        """Return the instance's pixels, `None` where none were kept."""
        with self._read() as session:
            row = session.scalar(
                sa.select(PictureRow)
                .join(InstanceRow, InstanceRow.id == PictureRow.instance_id)
                .where(InstanceRow.sop_instance_uid == sop_instance_uid)
                .options(undefer(PictureRow.square), undefer(PictureRow.view))
            )
            return Picture(row.square, row.view) if row else None


def answer_of(row: ResultRow | ShadowResultRow) -> Answer:
    """The record of a row."""
    said = (row.model_name, row.model_version, row.model_digest, row.findings, row.clinical)
    return Answer(*said, warnings=tuple(row.warnings), priors=row.priors)


def _answer_row(table: type[_Row], answer: Answer) -> _Row:
    return table(
        model_name=answer.model_name,
        model_version=answer.model_version,
        model_digest=answer.model_digest,
        findings=answer.findings,
        clinical=answer.clinical,
        warnings=list(answer.warnings),
        created_at=datetime.now(UTC),
        priors=answer.priors,
    )


def _instance_row(session: Session, instance: ReceivedInstance) -> InstanceRow:
    """The row of this instance, made if it is new, with its study's row held."""
    this = sa.select(InstanceRow).where(InstanceRow.sop_instance_uid == instance.sop_instance_uid)
    study_id = session.scalar(this.with_only_columns(InstanceRow.study_id))
    is_study = StudyRow.study_instance_uid == instance.study_instance_uid if study_id is None else StudyRow.id == study_id
    # Held against other writers, not against those who only refer to the study.
    study = session.scalar(sa.select(StudyRow).where(is_study).with_for_update(key_share=True))
    row = session.scalar(this) if study else None
    if study and study.fetched and not instance.fetched:
        _arrives(session, study, instance.received_at)
    if row:
        return row
    if not study:
        study = StudyRow(
            study_instance_uid=instance.study_instance_uid,
            patient_id=instance.patient_id,
            accession_number=instance.accession_number,
            study_date=instance.study_date,
            received_at=instance.received_at,
            fetched=instance.fetched,
        )
        session.add(study)
    row = InstanceRow(
        study=study,
        sop_instance_uid=instance.sop_instance_uid,
        series_instance_uid=instance.series_instance_uid,
        content_digest=instance.content_digest,
        status=REFUSED,
        reason=None,
        received_at=instance.received_at,
        answered_at=datetime.now(UTC),
        calling_ae=instance.calling_ae,
        fetched=instance.fetched,
    )
    session.add(row)
    session.flush()
    return row


def _arrives(session: Session, study: StudyRow, received_at: datetime) -> None:
    """A study that was only fetched is now sent: it stands in lists from this moment on."""
    study.fetched, study.received_at = False, received_at
    session.execute(sa.update(PositiveFindingRow).filter_by(study_id=study.id).values(received_at=received_at))


def _take_back(session: Session, row: InstanceRow, instance: ReceivedInstance) -> None:
    """Forget what was said of a fetched instance, for now it is sent here."""
    for results in (ResultRow, ShadowResultRow):
        session.execute(sa.delete(results).filter_by(instance_id=row.id))
    session.execute(sa.delete(PictureRow).filter_by(instance_id=row.id))
    row.fetched, row.status, row.reason = False, REFUSED, None
    row.received_at, row.calling_ae = instance.received_at, instance.calling_ae
    session.flush()
    session.expire(row, ["results", "picture"])
    answered = sa.exists().where(InstanceRow.study_id == row.study_id, InstanceRow.status == ANSWERED)
    row.study.status = ANSWERED if session.scalar(sa.select(answered)) else REFUSED
    _renew_positive_findings(session, row.study)


def _renew_positive_findings(session: Session, study: StudyRow) -> None:
    instances = session.scalars(
        sa.select(InstanceRow).where(InstanceRow.study_id == study.id).options(selectinload(InstanceRow.results))
    )
    newest = [instance.results[-1] for instance in instances if instance.results]
    positive = {finding.name for result in newest for finding in result.findings if finding.positive}
    known = {row.finding: row for row in session.scalars(sa.select(PositiveFindingRow).filter_by(study_id=study.id))}
    for name in known.keys() - positive:
        session.delete(known[name])
    for name in positive - known.keys():
        session.add(PositiveFindingRow(study_id=study.id, finding=name, received_at=study.received_at))
