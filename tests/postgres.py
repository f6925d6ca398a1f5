"""A real PostgreSQL server for the session, and an empty database in it for each test that asks for one."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

# Debian keeps the server's programs, version by version, out of the way.
_FOLDERS = os.pathsep.join(map(str, [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), "/usr/bin"]))
# A crash of the machine costs a test's database nothing that anybody misses; and a server may keep any time.
_SETTINGS = {"listen_addresses": "", "fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB", "timezone": "<-05>5"}
_USER = "postgres"
_numbers = count()


def _as_owner() -> dict[str, object]:
    """PostgreSQL refuses to be run by root."""
    return {"user": _USER, "group": _USER, "extra_groups": []} if os.geteuid() == 0 else {}


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Path]:
    """The folder with the server's socket."""
    with running_postgres() as folder:
        yield folder


@contextmanager
def running_postgres(address: str = "", port: int = 5432, clients: str | None = None) -> Iterator[Path]:
    """A server on a socket in the folder that is yielded, and on an address, where a network of clients is let in."""
    from conftest import require_program

    initdb, server = require_program("initdb", _FOLDERS), require_program("postgres", _FOLDERS)
    # Not below pytest's folder, which only its own user may enter, and whose paths are too long for a socket.
    folder = Path(tempfile.mkdtemp(prefix="cxr-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, _USER, _USER)
        made = [initdb, "--pgdata", folder / "data", "--username", _USER, "--auth", "trust", "--encoding", "UTF8", "--no-sync"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=folder, **_as_owner())
        if clients:
            with (folder / "data" / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all {_USER} {clients} trust\n")
        settings = {**_SETTINGS, "unix_socket_directories": folder, "listen_addresses": address, "port": port}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [server, "-D", folder / "data", *options], stdout=log, stderr=log, cwd=folder, **_as_owner()
            )
        try:
            _wait_until_it_answers(folder, port, process)
            yield folder
        finally:
            # The "fast" shutdown, which waits for nobody.
            process.send_signal(signal.SIGINT)
            process.wait(30)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgres_url(postgres_server: Path) -> Iterator[str]:
    """The SQLAlchemy URL of an empty database, which goes when the test ends."""
    name = f"test_{next(_numbers)}"
    with _connect(postgres_server) as server:
        server.execute(f"CREATE DATABASE {name}")
    yield f"postgresql+psycopg://{_USER}@/{name}?host={postgres_server}"
    with _connect(postgres_server) as server:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _connect(folder: Path, port: int = 5432) -> psycopg.Connection:
    return psycopg.connect(host=str(folder), port=port, user=_USER, dbname="postgres", autocommit=True)


def _wait_until_it_answers(folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return _connect(folder, port).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL does not start: {(folder / 'log').read_text()[-1000:]}")
            time.sleep(0.05)
