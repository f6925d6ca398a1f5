"""The log files of the service's replicas, and how their lines reach the terminal of the command that started it.

Replicas are processes of Ray, which keeps what they print in files of its session. Each writes its log lines into a file of
its own beside those, whole and at once; whoever runs `cxr-ray serve` follows the files of this machine. Those of a cluster's
other machines are collected there, as all of Ray's logs are.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Self

from serve.logs import LogLevel, log_to_file

_PATTERN = "cxr-ray-*.jsonl"
_LOOK_SECONDS = 0.5


def session_log_folder() -> Path:
    """Where Ray keeps Serve's logs on this machine. Ray has to be initialised."""
    import ray  # noqa: PLC0415 - takes a second

    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / context.get_session_name() / "logs" / "serve"


def log_as_replica(folder: str | None, level: LogLevel) -> None:
    """Write this replica's lines into its own file; None is `session_log_folder`."""
    from ray import serve  # noqa: PLC0415 - as above

    replica = serve.get_replica_context().replica_id
    names = {"deployment": replica.deployment_id.name, "replica": replica.unique_id}
    place = Path(folder) if folder else session_log_folder()
    log_to_file(place / f"cxr-ray-{names['deployment']}-{names['replica']}.jsonl", level, names)


class LogFollower:
    """Hands on the lines that replicas of this machine add to their files, in a thread of its own.

    Parameters
    ----------
    folder
        Where the files are, or will be.
    told
        Called with each line, parsed.
    """

    def __init__(self, folder: Path, told: Callable[[dict[str, object]], None]) -> None:
        self._folder, self._told = folder, told
        self._open: dict[Path, BinaryIO] = {}
        # What a service before this one wrote is none of this one's.
        for path in folder.glob(_PATTERN):
            self._open[path] = file = path.open("rb")
            file.seek(0, os.SEEK_END)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-follower", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        for file in self._open.values():
            file.close()

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        for path in sorted(self._folder.glob(_PATTERN)):
            # While one file takes another's name there is none for a moment.
            with contextlib.suppress(FileNotFoundError):
                self._look_at(path)

    def _look_at(self, path: Path) -> None:
        if path not in self._open:
            self._open[path] = path.open("rb")
        file = self._open[path]
        replaced = path.stat().st_ino != _inode(file)
        self._tell(file)
        if replaced:
            file.close()
            del self._open[path]
            self._open[path] = path.open("rb")
            self._tell(self._open[path])

    def _tell(self, file: BinaryIO) -> None:
        while True:
            start = file.tell()
            text = file.readline()
            if not text.endswith(b"\n"):
                file.seek(start)
                return
            # A disk that was full leaves parts of lines.
            with contextlib.suppress(ValueError):
                self._told(json.loads(text))


def _inode(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_ino
