"""Running a command as a job on a Ray cluster, with the code that is installed here.

What is wrong is found before anything is sent: the command's options and settings, the address, the token, other versions of
Ray or Python. Then the four packages are uploaded, and the job runs them on the cluster's own installation of everything they
depend on.

The answer to a submission may be lost when the job was taken: a job is named here, carries a mark of its own, and is asked for
before it is called not taken or submitted again.
"""

import logging
import os
import secrets
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.answers import client_errors, status_of, told, unknown_job
from cluster.command_line import CommandLine
from cluster.connection import ADDRESS_VARIABLE, Cluster
from cluster.errors import Unreachable
from cluster.job import SECONDS_BETWEEN_ATTEMPTS, SECONDS_OF_ATTEMPTS, Job
from cluster.packing import runtime_environment

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# How long a job may take to show itself when the answer to its submission was lost.
_SECONDS_TO_SHOW = 5.0
_MARK = "cxr-ray-submission"
_OF_IDS = string.ascii_letters + string.digits
# They set a level of their own. Not their handlers': those may belong to the program that uses this module.
_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


@dataclass(frozen=True)
class _Submission:
    """What is sent, once or several times: the job is the same."""

    command: CommandLine
    num_cpus: float
    submission_id: str = field(default_factory=lambda: "raysubmit_" + "".join(secrets.choice(_OF_IDS) for _ in range(16)))
    # An id that somebody chose may be that of an earlier job.
    mark: str = field(default_factory=lambda: secrets.token_hex(8))


def client_of(cluster: Cluster) -> "JobSubmissionClient":
    """Ray's own client of a cluster's jobs, without its noise.

    Raises
    ------
    Unreachable
        If the cluster does not answer.
    SubmitError
        If it does not take it.
    """
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

    # Ray prefers this variable to the address that it is given.
    os.environ[ADDRESS_VARIABLE] = cluster.address
    # It also tells of every package and connection.
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        verify = True if cluster.ca_file is None else str(cluster.ca_file)
        return JobSubmissionClient(cluster.address, headers=dict(cluster.headers), verify=verify)
    except client_errors() as error:
        raise told(cluster, error, "does not take jobs") from error


def known_job(cluster: Cluster, submission_id: str) -> Job:
    """A job that a cluster has.

    Raises
    ------
    SubmitError
        If it does not know it, or does not say.
    """
    job = Job(client_of(cluster), cluster, submission_id)
    job.require()
    return job


def submit(cluster: Cluster, command: CommandLine, *, submission_id: str | None = None, num_cpus: float = 0) -> Job:
    """Upload the packages and start a job.

    Parameters
    ----------
    command
        What the job runs.
    submission_id
        Name of the job; None for one that is made here.
    num_cpus
        Logical CPUs reserved for the command itself, besides those of its workers; 0 for none.

    Raises
    ------
    SubmitError
        If the cluster refuses it, as it does a submission id that was used before.
    """
    named = {} if submission_id is None else {"submission_id": submission_id}
    return _send(cluster, _Submission(command, num_cpus, **named))


def submit_patiently(cluster: Cluster, command: CommandLine, notice: Callable[[str], object], *, num_cpus: float = 0) -> Job:
    """`submit`, tried for minutes while the cluster does not answer, as one does not whose head is started anew.

    Raises
    ------
    SubmitError
        If it refuses the job, or does not answer in that time.
    """
    submission = _Submission(command, num_cpus)
    until = time.monotonic() + SECONDS_OF_ATTEMPTS
    quiet = False
    while True:
        try:
            return _send(cluster, submission)
        except Unreachable as error:
            if time.monotonic() > until:
                raise
            if not quiet:
                notice(f"{error}; trying again")
                quiet = True
        time.sleep(SECONDS_BETWEEN_ATTEMPTS)


def _send(cluster: Cluster, submission: _Submission) -> Job:
    client = client_of(cluster)
    job = Job(client, cluster, submission.submission_id)
    try:
        with tempfile.TemporaryDirectory(prefix="cxr-ray-submit-") as folder:
            client.submit_job(
                entrypoint=submission.command.entrypoint,
                submission_id=submission.submission_id,
                runtime_env=runtime_environment(Path(folder), submission.command.settings),
                metadata={_MARK: submission.mark},
                entrypoint_num_cpus=submission.num_cpus or None,
            )
    except client_errors() as error:
        failure = told(cluster, error, "the job was not taken")
        if not isinstance(failure, Unreachable):
            raise failure from error
        # A cluster that answered with an error has decided; one that did not may be at it.
        taken = _is_taken(client, submission, 0 if status_of(error) else _SECONDS_TO_SHOW)
        if taken is None:
            raise Unreachable(f"{failure}; should it run all the same: {job.how_to_go_on}") from error
        if not taken:
            raise failure from error
    return job


def _is_taken(client: "JobSubmissionClient", submission: _Submission, patience: float) -> bool | None:
    """Whether the cluster has the job; None if it does not say."""
    until = time.monotonic() + patience
    while True:
        try:
            return (client.get_job_info(submission.submission_id).metadata or {}).get(_MARK) == submission.mark
        except client_errors() as error:
            known = False if unknown_job(error) else None
        if time.monotonic() >= until:
            return known
        time.sleep(min(SECONDS_BETWEEN_ATTEMPTS, patience))
