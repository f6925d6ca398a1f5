"""The audit: who read, changed or sent whose data. It grows and is never changed: nothing here can."""

from datetime import UTC, datetime

import sqlalchemy as sa

from serve.store.database import Database
from serve.store.records import Access
from serve.store.tables import AccessRow


class Audit(Database):
    """The store's record of accesses."""

    def record_access(
        self,
        actor: str,
        action: str,
        study_instance_uid: str | None = None,
        patient_id: str | None = None,
        request_id: str | None = None,
        at: datetime | None = None,
    ) -> None:
        """Commit an access; `at` is an aware time, now if it is left out.

        Raises
        ------
        CxrRayError
            When the database does not take it; then the access must not take place.
        """
        entry = dict(
            at=at or datetime.now(UTC),
            actor=actor,
            action=action,
            study_instance_uid=study_instance_uid,
            patient_id=patient_id,
            request_id=request_id,
        )
        self._write(lambda session: session.add(AccessRow(**entry)))

    def accesses(self, study_instance_uid: str | None = None, limit: int = 100, offset: int = 0) -> list[Access]:
        """Return accesses to one study, or all of them, the newest first."""
        query = sa.select(AccessRow).order_by(AccessRow.id.desc()).limit(limit).offset(offset)
        if study_instance_uid is not None:
            query = query.filter_by(study_instance_uid=study_instance_uid)
        with self._read() as session:
            return [
                Access(row.at, row.actor, row.action, row.study_instance_uid, row.patient_id, row.request_id)
                for row in session.scalars(query)
            ]
