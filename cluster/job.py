"""A job on a cluster, followed to its end.

The job does not depend on whoever watches it: when the connection breaks the log is taken up where it broke, and an interrupt
ends the watching only.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.connection import Cluster
from cluster.errors import SubmitError, last_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# Ray's log streams have no heartbeat: a connection that died without a word shows only as silence.
_SECONDS_OF_SILENCE = 30.0
_SECONDS_BETWEEN_ATTEMPTS = 2.0
_SECONDS_OF_ATTEMPTS = 300.0


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
            If it does not.
        """
        try:
            self._client.get_job_info(self.submission_id)
        except (RuntimeError, OSError) as error:
            raise SubmitError(
                f"job {self.submission_id!r} is not known to {self._cluster.address} ({last_line(str(error))}); "
                "'cxr-ray jobs list' shows those that are"
            ) from error

    def log(self) -> str:
        """What it has written so far, standard output and error."""
        return str(self._client.get_job_logs(self.submission_id))

    def stop(self) -> bool:
        """End it; tells whether there was anything to end."""
        return bool(self._client.stop_job(self.submission_id))

    def follow(self, write: Callable[[str], object], notice: Callable[[str], object]) -> int:
        """Hand the job's log, standard output and error, to `write` until the job ends; return its exit code.

        Parameters
        ----------
        notice
            Called with what is to be said about the job: a lost connection, a failure.

        Raises
        ------
        SubmitError
            If the connection stays lost.
        KeyboardInterrupt
            If the user interrupts; the job goes on.
        """
        try:
            details = asyncio.run(_follow(self._client, self.submission_id, _Log(write), notice))
        except _LostConnection as lost:
            raise SubmitError(f"job {self.submission_id}: {lost}; it may still run: {self.how_to_go_on}") from lost
        self.stopped = details.status.value == "STOPPED"
        return _exit_code(details, notice)


class _LostConnection(Exception):
    pass


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
    import aiohttp  # noqa: PLC0415 - comes with ray[default]
    from ray.exceptions import AuthenticationError  # noqa: PLC0415

    # Those of requests are OSErrors; RuntimeError is what Ray's client makes of a refused request and a broken stream.
    connection_errors = (OSError, RuntimeError, aiohttp.ClientError, AuthenticationError)
    lost: float | None = None
    while True:
        try:
            await _tail(client, submission_id, log)
            details = client.get_job_info(submission_id)
            lost = None
            if details.status.is_terminal():
                with contextlib.suppress(*connection_errors):
                    log.read(client.get_job_logs(submission_id), 0)
                return details
        except connection_errors as error:
            if lost is None:
                lost = time.monotonic()
                notice("connection lost, the job goes on; trying again")
            elif time.monotonic() - lost > _SECONDS_OF_ATTEMPTS:
                raise _LostConnection(f"connection lost ({last_line(str(error))})") from error
        await asyncio.sleep(_SECONDS_BETWEEN_ATTEMPTS)


async def _tail(client: "JobSubmissionClient", submission_id: str, log: _Log) -> None:
    """Print the log as it comes until the stream ends, or turns out to have stopped telling."""
    start = 0
    async with contextlib.aclosing(client.tail_job_logs(submission_id)) as stream:
        coming = asyncio.ensure_future(anext(stream))
        try:
            while True:
                await asyncio.wait({coming}, timeout=_SECONDS_OF_SILENCE)
                if coming.done():
                    text = coming.result()
                    log.read(text, start)
                    start += len(text)
                    coming = asyncio.ensure_future(anext(stream))
                elif _has_more_to_tell(client, submission_id, start):
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
