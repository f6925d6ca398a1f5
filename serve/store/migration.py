"""The schema's history: a store is brought to the newest revision whenever it is opened, by Alembic.

Several processes may open a store at once, and one of them does the work: SQLite lets one writer in at a time, and
PostgreSQL is asked for an advisory lock. The revision is looked at again behind the lock. All steps are one transaction, so
a store that was left in the middle is where it was before.
"""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from cxr_ray.errors import CxrRayError

_FOLDER = Path(__file__).parent / "migrations"
# The tables as they were made before there were revisions.
_FIRST_REVISION = "0001"
# Any number will do that nobody else locks in the same database: "cxr-ray" in ASCII.
_LOCK = int.from_bytes(b"cxr-ray")


def bring_up_to_date(engine: sa.Engine, writer: sa.Engine, name: str) -> None:
    """Make or change the tables where they are not of the newest revision.

    Parameters
    ----------
    engine, writer
        The same database; with SQLite, `writer` is the one whose transactions wait for their turn.
    name
        What to call the store in an error.

    Raises
    ------
    CxrRayError
        If a newer release made the tables.
    """
    config = configuration()
    scripts = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        if _revision(connection) == scripts.get_current_head():
            return
    with writer.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        revision = _revision(connection)
        if revision is not None and revision not in {script.revision for script in scripts.walk_revisions()}:
            raise CxrRayError(
                f"{name}: its schema {revision} is newer than this cxr-ray knows ({scripts.get_current_head()}); "
                "install the release that wrote it, or name another store"
            )
        config.attributes["connection"] = connection
        if revision is None and sa.inspect(connection).has_table("study"):
            command.stamp(config, _FIRST_REVISION)
        command.upgrade(config, "head")


def configuration() -> Config:
    """Alembic's configuration for the store's migrations."""
    config = Config()
    # A percent sign begins a reference to another setting.
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return config


def _revision(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
