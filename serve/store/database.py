"""The database under the store: how it is reached, and how it is read and written by many at once.

SQLite by default: write-ahead log and a full sync at each commit, so a reader never waits and a committed answer
survives a power cut. Any other SQLAlchemy URL works the same; PostgreSQL where more than one machine takes part.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from cxr_ray.errors import CxrRayError, UsageError
from serve.store.migration import bring_up_to_date

_BUSY_MILLISECONDS = 30_000
_PAUSE_SECONDS = 0.01
_ATTEMPTS = 5
_Found = TypeVar("_Found")


class Database:
    """An open database in the newest schema; safe for threads and processes at once.

    Parameters
    ----------
    url : str
        SQLAlchemy URL, e.g. ``sqlite:////var/lib/cxr-ray/results.db`` or ``postgresql+psycopg://user@host/database``.
        Tables are created where absent, and brought up to date where an older release made them.

    Raises
    ------
    UsageError
        When `url` is none, or its driver is not installed.
    CxrRayError
        When the database cannot be opened or written, or a newer release made its tables.
    """

    def __init__(self, url: str) -> None:
        self._url = _parsed(url)
        self._engine = _engine(self._url)
        self._writer = self._engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        with self._explained():
            bring_up_to_date(self._engine, self._writer, self._name)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    @property
    def _name(self) -> str:
        return f"results store {self._url.render_as_string(hide_password=True)}"

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
                except IntegrityError:
                    # Another writer was first with the same key: on the next look it is there.
                    if attempt == _ATTEMPTS - 1:
                        raise
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise CxrRayError(f"{self._name}: {cause}; check that it can be reached and written") from error


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
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")
    _switch_to_write_ahead_log(cursor)
    for setting in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _switch_to_write_ahead_log(cursor: DBAPICursor) -> None:
    # Of several that open a new file, all but one are refused at once, whatever the timeout.
    deadline = time.monotonic() + _BUSY_MILLISECONDS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_PAUSE_SECONDS)


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads and then writes fails at once when another wrote in between, whatever the timeout:
    # a writer has to queue up before its first look.
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))
