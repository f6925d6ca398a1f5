"""The results store of the service: SQLite, which somebody locks, and PostgreSQL, which is stopped in the middle of it all."""

import os
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Protocol

from chaos_processes import CampaignError
from sqlalchemy import create_engine, text

_FOLDERS = os.pathsep.join(map(str, [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), "/usr/bin"]))
_USER = "postgres"
_ROWS = (
    "select instance.sop_instance_uid, count(*) from result join instance on instance.id = result.instance_id "
    "group by instance.sop_instance_uid"
)


class ResultsStore(Protocol):
    """A database that can be made to fail."""

    url: str
    outage: str

    def fail(self, seconds: float) -> None:
        """Not be there for some seconds."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class SqliteStore:
    """A file, locked by somebody who writes for long."""

    outage = "store locked (SQLite)"

    def __init__(self, folder: Path) -> None:
        self._file = folder / "results.sqlite"
        self.url = f"sqlite:///{self._file}"

    def fail(self, seconds: float) -> None:
        """Hold the database locked."""
        connection = sqlite3.connect(self._file, timeout=60, isolation_level=None)
        try:
            connection.execute("begin exclusive")
            time.sleep(seconds)
            connection.execute("rollback")
        finally:
            connection.close()

    def close(self) -> None:
        """Nothing runs."""


class PostgresStore:
    """A cluster of its own, stopped as by a crash."""

    outage = "store stopped (PostgreSQL)"

    def __init__(self, folder: Path) -> None:
        self._folder, self._data = folder, folder / "data"
        # It refuses to be run by root.
        self._owner = {"user": _USER, "group": _USER, "extra_groups": []} if os.geteuid() == 0 else {}
        folder.mkdir()
        if self._owner:
            shutil.chown(folder, _USER, _USER)
        self._run("initdb", "--username", _USER, "--auth", "trust", "--encoding", "UTF8")
        self._start()
        self.url = f"postgresql+psycopg://{_USER}@/postgres?host={folder}"

    def fail(self, seconds: float) -> None:
        """Be gone without a word, and come back by recovery."""
        self._run("pg_ctl", "stop", "-m", "immediate", "-w")
        time.sleep(seconds)
        self._start()

    def close(self) -> None:
        """Stop it."""
        self._run("pg_ctl", "stop", "-m", "fast", "-w")

    def _start(self) -> None:
        settings = f"-c listen_addresses='' -c unix_socket_directories={self._folder} -c shared_buffers=32MB"
        self._run("pg_ctl", "start", "-w", "-o", settings, "-l", str(self._folder / "log"))

    def _run(self, program: str, *arguments: str) -> None:
        found = shutil.which(program, path=_FOLDERS)
        if found is None:
            raise CampaignError(f"{program} is in none of {_FOLDERS}; install postgresql")
        ran = subprocess.run(
            [found, "-D", str(self._data), *arguments],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            # Not a pipe: the server that it starts would hold it open.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
            **self._owner,
        )
        if ran.returncode:
            raise CampaignError(f"{program} {' '.join(arguments)} ended with {ran.returncode}, see {self._folder / 'log'}")


def result_rows(url: str) -> dict[str, int]:
    """How many results the store has for each SOP Instance UID."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            return {uid: count for uid, count in connection.execute(text(_ROWS))}  # noqa: C416 - rows are no pairs to dict
    finally:
        engine.dispose()
