"""What archives tell of earlier studies: results read there, images fetched from there, and what came of asking."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table and the columns; all that is there came by itself."""
    for table in ("study", "instance"):
        op.add_column(table, sa.Column("fetched", sa.Boolean(), nullable=False, server_default=sa.false()))
    for table in ("result", "shadow_result"):
        op.add_column(table, sa.Column("priors", sa.JSON(none_as_null=True)))
    op.create_table(
        "archived_result",
        sa.Column("patient_id", sa.Text(), primary_key=True),
        sa.Column("study_instance_uid", sa.String(64), primary_key=True),
        sa.Column("study_date", sa.Date(), nullable=False),
        sa.Column("findings", sa.JSON(), nullable=False),
        sa.Column("view", sa.String(2)),
        sa.Column("read_at", sa.DateTime(timezone=True), nullable=False),
    )
