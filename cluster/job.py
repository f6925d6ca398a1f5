"""A job on a cluster, followed to its end.

The job does not depend on whoever watches it: when the connection breaks the log is taken up where it broke, and an interrupt
ends the watching only. A refused token and a cluster that does not know the job any more are no lost connections: waiting helps
neither.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.answers import client_errors, refuses_token, status_of, told, unknown_job
from cluster.connection import Cluster
from cluster.errors import SubmitError, last_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# Ray's log streams have no heartbeat: a connection that died without a word shows only as silence.
_SECONDS_OF_SILENCE = 30.0
SECONDS_BETWEEN_ATTEMPTS = 2.0
SECONDS_OF_ATTEMPTS = 300.0
# A job that waits this long to start is said to wait.
_SECONDS_TO_START = 10.0


class Job:
    """A job on a cluster.

    Attributes
    ----------
    stopped
        Whether somebody stopped it; known once it was followed to its end.
    """

    def __init__(self, client: "JobSubmissionClient", cluster: Cluster, submission_id: str) -> None:
        self.submission_id = submission_id
        self.stopped = False
        self._client, self._cluster = client, cluster

    @property
    def how_to_go_on(self) -> str:
        """What to type to follow the job again, or to stop it."""
        options = self._cluster.options
        return (
            f"follow it with 'cxr-ray submit{options} --attach {self.submission_id}', "
            f"stop it with 'cxr-ray jobs stop{options} {self.submission_id}'"
        )

    def require(self) -> None:
        """See that the cluster knows it.

        Raises
        ------
        SubmitError
            If it does not, or does not say.
        """
        try:
            self._client.get_job_info(self.submission_id)
        except client_errors() as error:
            if status_of(error) != 404:
                raise told(self._cluster, error, f"does not tell of job {self.submission_id!r}") from error
            raise SubmitError(
                f"job {self.submission_id!r} is not known to {self._cluster.address} ({last_line(str(error))}); "
                "'cxr-ray jobs list' shows those that are"
            ) from error

    def log(self) -> str:
        """What it has written so far, standard output and error.

        Raises
        ------
        SubmitError
            If the cluster does not tell.
        """
        try:
            return str(self._client.get_job_logs(self.submission_id))
        except client_errors() as error:
            raise told(self._cluster, error, f"does not give the log of job {self.submission_id}") from error

    def stop(self) -> bool:
        """End it; tells whether there was anything to end.

        Raises
        ------
        SubmitError
            If the cluster does not do it.
        """
        try:
            return bool(self._client.stop_job(self.submission_id))
        except client_errors() as error:
            raise told(self._cluster, error, f"does not stop job {self.submission_id}") from error

    def follow(self, write: Callable[[str], object], notice: Callable[[str], object]) -> int:
        """Hand the job's log, standard output and error, to `write` until the job ends; return its exit code.

        Parameters
        ----------
        notice
            Called with what is to be said about the job: that it waits, a lost connection, a failure.

        Raises
        ------
        SubmitError
            If the connection stays lost, or the cluster takes our token no more.
        KeyboardInterrupt
            If the user interrupts; the job goes on.
        """
        try:
            details = asyncio.run(_follow(self._client, self.submission_id, _Log(write), notice))
        except _LostConnection as lost:
            raise SubmitError(f"job {self.submission_id}: {lost}; it may still run: {self.how_to_go_on}") from lost
        except _Refused as refused:
            raise SubmitError(
                f"{self._cluster.address}: takes the token no more; give the cluster's own with --token-file. Job "
                f"{self.submission_id} may still run: {self.how_to_go_on}"
            ) from refused
        except _Forgotten:
            notice(
                f"job {self.submission_id} failed: {self._cluster.address} does not know it any more; a job ends with its "
                "cluster's head, which was started anew"
            )
            return 1
        self.stopped = details.status.value == "STOPPED"
        return _exit_code(details, notice)


class _LostConnection(Exception):
    pass


class _Refused(Exception):
    pass


class _Forgotten(Exception):
    pass


class _Start:
    """Says once of a job that does not start that it waits, and what for, as far as the cluster knows."""

    def __init__(self, client: "JobSubmissionClient", submission_id: str, notice: Callable[[str], object]) -> None:
        self._client, self._id, self._notice = client, submission_id, notice
        self._began = time.monotonic()
        self._settled = False

    @property
    def patience(self) -> float:
        """Seconds of silence after which to look again."""
        left = _SECONDS_TO_START - (time.monotonic() - self._began)
        return _SECONDS_OF_SILENCE if self._settled else max(left, 0.1)

    def look(self) -> None:
        """Ask whether it has started, when it is time."""
        if self._settled or time.monotonic() - self._began < _SECONDS_TO_START:
            return
        details = self._client.get_job_info(self._id)
        self._settled = True
        if details.status.value == "PENDING":
            why = (details.message or "").removeprefix("Job has not started yet.").strip()
            self._notice(f"job {self._id} has not started after {_SECONDS_TO_START:g} s. {why}".strip())


class _Log:
    """Prints a log that may be read from its beginning several times."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.printed = 0

    def read(self, text: str, start: int) -> None:
        """Print what is new in `text`, which starts at character `start` of the log."""
        new = text[max(0, self.printed - start) :]
        if new:
            self._write(new)
            self.printed += len(new)


async def _follow(
    client: "JobSubmissionClient", submission_id: str, log: _Log, notice: Callable[[str], object]
) -> "JobDetails":
    connection_errors = client_errors()
    begun = _Start(client, submission_id, notice)
    lost: float | None = None
    while True:
        try:
            await _tail(client, submission_id, log, begun)
            details = client.get_job_info(submission_id)
            lost = None
            if details.status.is_terminal():
                with contextlib.suppress(*connection_errors):
                    log.read(client.get_job_logs(submission_id), 0)
                return details
        except connection_errors as error:
            _require_hope(client, submission_id, error)
            if lost is None:
                lost = time.monotonic()
                notice("connection lost, the job goes on; trying again")
            elif time.monotonic() - lost > SECONDS_OF_ATTEMPTS:
                raise _LostConnection(f"connection lost ({last_line(str(error))})") from error
        await asyncio.sleep(SECONDS_BETWEEN_ATTEMPTS)


def _require_hope(client: "JobSubmissionClient", submission_id: str, error: Exception) -> None:
    """Tell an error that will pass from a refused token and a job that is gone.

    A proxy may answer for the log's stream what it likes: what is said of the job itself decides.
    """
    if status_of(error) is None:
        return
    try:
        client.get_job_info(submission_id)
    except client_errors() as said:
        if refuses_token(said):
            raise _Refused from said
        if unknown_job(said):
            raise _Forgotten from said


async def _tail(client: "JobSubmissionClient", submission_id: str, log: _Log, begun: _Start) -> None:
    """Print the log as it comes until the stream ends, or turns out to have stopped telling."""
    start = 0
    async with contextlib.aclosing(client.tail_job_logs(submission_id)) as stream:
        coming = asyncio.ensure_future(anext(stream))
        try:
            while True:
                await asyncio.wait({coming}, timeout=begun.patience)
                if coming.done():
                    text = coming.result()
                    log.read(text, start)
                    start += len(text)
                    coming = asyncio.ensure_future(anext(stream))
                else:
                    begun.look()
                    if _has_more_to_tell(client, submission_id, start):
                        return
        except StopAsyncIteration:
            return
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def _has_more_to_tell(client: "JobSubmissionClient", submission_id: str, start: int) -> bool:
    ended = client.get_job_info(submission_id).status.is_terminal()
    return ended or len(client.get_job_logs(submission_id)) > start


def _exit_code(details: "JobDetails", notice: Callable[[str], object]) -> int:
    status = details.status.value
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        notice(f"job {details.submission_id} was stopped")
        return 1
    code = details.driver_exit_code
    if code is None:
        notice(f"job {details.submission_id} failed: {last_line(details.message or '')}")
        return 1
    notice(f"job {details.submission_id} failed with exit code {code}; its log is above")
    return code if 0 < code < 256 else 1
