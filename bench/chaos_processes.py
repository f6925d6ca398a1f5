"""Processes that a campaign starts: each with its log, killed and started again at will, and none left at the end.

All carry a mark in their environment, and so does whatever they start: only what has this mark, or descends from a process of
the campaign, is ever killed.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from chaos_proc import Seen, descendants, living, titles
from measuring import ROOT

_MARK = "CXR_RAY_CHAOS"
_LOOK_SECONDS = 0.05
_END_SECONDS = 30


class CampaignError(Exception):
    """The campaign itself cannot go on; says why."""


class Family:
    """The processes of one campaign.

    Parameters
    ----------
    mark
        What they carry, and nobody else does.
    folder
        Of their logs; what they keep in temporary files lies in ``tmp`` below it.
    """

    def __init__(self, mark: str, folder: Path) -> None:
        self.mark, self.folder, self.temporary = mark, folder, folder / "tmp"
        self.temporary.mkdir(parents=True)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a process of the campaign."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CXR_RAY_", "FAKETIME"))}
        # DCMTK and Orthanc wait 40 ms with each small PDU otherwise.
        own = {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary), "TCP_NODELAY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        return {**kept, **own, _MARK: self.mark, **(extra or {})}

    def alive(self) -> list[Seen]:
        """All processes that carry the mark."""
        return [process for process in living() if process.carries(_MARK, self.mark)]

    def end(self) -> list[str]:
        """Kill whatever is left; returns what that was."""
        left = self.alive()
        found = titles(left)
        for process in left:
            process.kill()
        return found


class Child:
    """A program of the campaign, started any number of times.

    Parameters
    ----------
    ready
        Whether it is up; asked until it is.
    """

    def __init__(
        self,
        family: Family,
        name: str,
        command: Sequence[str | Path],
        ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
        seconds_to_start: float = 120,
    ) -> None:
        self.name, self._family, self._command, self.ready = name, family, [*map(str, command)], ready
        self._environment, self._seconds = environment, seconds_to_start
        self.log = family.folder / f"{name}.log"
        self.starts = self.failed_starts = 0
        self.wanted = False
        self.guard = threading.RLock()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        if self.process is None:
            raise CampaignError(f"{self.name} was never started")
        return int(self.process.pid)

    @property
    def up(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it and wait until it is ready."""
        with self.guard:
            self.starts += 1
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self._command,
                    env=self._family.environment(self._environment),
                    cwd=self._family.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.wanted = True
            until(self._settled, f"{self.name} to start, see {self.log}", self._seconds)
            if not self.up:
                self.failed_starts += 1
                raise CampaignError(f"{self.name} ended at its start: {self.said()}")

    def kill(self) -> None:
        """Kill it and all that it started, with SIGKILL."""
        with self.guard:
            self.wanted = False
            if self.process is None:
                return
            started = descendants(self.pid)
            self.process.kill()
            for process in started:
                process.kill()
            self.process.wait()

    def stop(self, seconds: float = _END_SECONDS) -> None:
        """Ask it to end by SIGTERM; what does not within that time is killed."""
        with self.guard:
            self.wanted = False
            if self.process is None or not self.up:
                return
            started = descendants(self.pid)
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            self.process.kill()
            for process in started:
                process.kill()
            self.process.wait()

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-1500:]

    def _settled(self) -> bool:
        return not self.up or self.ready()


def until(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Wait for a condition.

    Raises
    ------
    CampaignError
        If it does not come within these seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise CampaignError(f"waited {seconds:.0f} s for {what}")
        time.sleep(_LOOK_SECONDS)


def product(*arguments: str | Path) -> list[str | Path]:
    """The command line of `cxr-ray`."""
    return [sys.executable, "-m", "cxr_ray", *arguments]
