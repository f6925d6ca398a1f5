"""What a worklist needs: pictures, reviews, histories, tokens, an audit, shadow results, and lists that can be filtered."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_AT_ONCE = 1000


def upgrade() -> None:
    """Make the new tables and indices, and fill what repeats the results that are there."""
    op.drop_index("ix_study_received_at", "study")
    op.add_column("study", sa.Column("status", sa.String(16), nullable=False, server_default="refused"))
    _study_indices()
    _tables_of_results()
    _tables_of_people()
    _mark_answered_studies()
    _fill_positive_findings()


def _study_indices() -> None:
    op.create_index("ix_study_received", "study", ["received_at", "id", "study_date"])
    op.create_index("ix_study_status_received", "study", ["status", "received_at", "id"])
    op.create_index("ix_study_patient_id", "study", ["patient_id"])
    op.create_index("ix_study_accession_number", "study", ["accession_number"])


def _tables_of_results() -> None:
    op.create_table(
        "shadow_result",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("instance_id", sa.Integer(), sa.ForeignKey("instance.id"), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("model_digest", sa.String(128), nullable=False),
        sa.Column("findings", sa.JSON(), nullable=False),
        sa.Column("clinical", sa.JSON(), nullable=False),
        sa.Column("warnings", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("instance_id", "model_digest"),
    )
    op.create_table(
        "positive_finding",
        sa.Column("study_id", sa.Integer(), sa.ForeignKey("study.id"), primary_key=True),
        sa.Column("finding", sa.String(64), primary_key=True),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_index("ix_positive_finding_received", "positive_finding", ["finding", "received_at", "study_id"])
    op.create_table(
        "picture",
        sa.Column("instance_id", sa.Integer(), sa.ForeignKey("instance.id"), primary_key=True, autoincrement=False),
        sa.Column("square", sa.LargeBinary(), nullable=False),
        sa.Column("view", sa.LargeBinary(), nullable=False),
    )


def _tables_of_people() -> None:
    op.create_table(
        "review",
        sa.Column("study_id", sa.Integer(), sa.ForeignKey("study.id"), primary_key=True),
        sa.Column("finding", sa.String(64), primary_key=True),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reviewed_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "patient_history",
        sa.Column("patient_id", sa.Text(), primary_key=True),
        sa.Column("stated_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "confirmed_visit",
        sa.Column("patient_id", sa.Text(), sa.ForeignKey("patient_history.patient_id"), primary_key=True),
        sa.Column("visit_date", sa.Date(), primary_key=True),
        sa.Column("findings", sa.JSON(), nullable=False),
        sa.Column("view", sa.String(2)),
    )
    op.create_table(
        "token",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("last_used_on", sa.Date()),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
    )
    op.create_table(
        "access",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("study_instance_uid", sa.Text()),
        sa.Column("patient_id", sa.Text()),
        sa.Column("request_id", sa.Text()),
    )
    op.create_index("ix_access_study", "access", ["study_instance_uid", "id"])


def _mark_answered_studies() -> None:
    study, instance = (
        sa.table("study", sa.column("id"), sa.column("status")),
        sa.table("instance", *_columns("study_id status")),
    )
    answered = sa.exists().where(instance.c.study_id == study.c.id, instance.c.status == "answered")
    op.get_bind().execute(sa.update(study).where(answered).values(status="answered"))


def _fill_positive_findings() -> None:
    """From the newest result of each instance; as many at a time as are no burden to memory."""
    connection = op.get_bind()
    received = sa.DateTime(timezone=True)
    study = sa.table("study", sa.column("id"), sa.column("received_at", received))
    instance = sa.table("instance", *_columns("id study_id"))
    result = sa.table("result", *_columns("id instance_id"), sa.column("findings", sa.JSON()))
    positive = sa.table("positive_finding", *_columns("study_id finding"), sa.column("received_at", received))
    newest = sa.select(sa.func.max(result.c.id)).group_by(result.c.instance_id)
    said = (
        sa.select(study.c.id, study.c.received_at, result.c.findings)
        .join_from(result, instance, instance.c.id == result.c.instance_id)
        .join(study, study.c.id == instance.c.study_id)
        .where(result.c.id.in_(newest))
        .order_by(study.c.id)
    )
    # Those of a study that has several images are met again.
    written: set[tuple[int, str]] = set()
    for page in connection.execute(said).partitions(_AT_ONCE):
        rows = {(key, finding["name"]): at for key, at, findings in page for finding in findings if finding["positive"]}
        new = [{"study_id": key[0], "finding": key[1], "received_at": at} for key, at in rows.items() if key not in written]
        if new:
            connection.execute(sa.insert(positive), new)
        written.update(rows)


def _columns(names: str) -> list[sa.ColumnClause]:
    return [sa.column(name) for name in names.split()]
