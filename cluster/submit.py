"""Running a command as a job on a Ray cluster, with the code that is installed here.

What is wrong is found before anything is sent: the command's options and settings, the address, the token, other versions of
Ray or Python. Then the four packages are uploaded, and the job runs them on the cluster's own installation of everything they
depend on.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.command_line import CommandLine
from cluster.connection import ADDRESS_VARIABLE, Cluster
from cluster.errors import SubmitError, last_line
from cluster.job import Job
from cluster.packing import runtime_environment

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient


def client_of(cluster: Cluster) -> "JobSubmissionClient":
    """Ray's own client of a cluster's jobs, without its noise.

    Raises
    ------
    SubmitError
        If the cluster does not take it.
    """
    from ray.exceptions import AuthenticationError  # noqa: PLC0415
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

    # Ray prefers this variable to the address that it is given.
    os.environ[ADDRESS_VARIABLE] = cluster.address
    # It also tells of every package and connection.
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(cluster.address, headers=dict(cluster.headers))
    except (RuntimeError, ValueError, OSError, AuthenticationError) as error:
        raise SubmitError(f"{cluster.address}: does not take jobs ({last_line(str(error))})") from error


def submit(cluster: Cluster, command: CommandLine, *, submission_id: str | None = None, num_cpus: float = 0) -> Job:
    """Upload the packages and start a job.

    Parameters
    ----------
    command
        What the job runs.
    submission_id
        Name of the job; None for one that Ray makes.
    num_cpus
        Logical CPUs reserved for the command itself, besides those of its workers; 0 for none.

    Raises
    ------
    SubmitError
        If the cluster refuses it, as it does a submission id that was used before.
    """
    from ray.exceptions import AuthenticationError  # noqa: PLC0415

    client = client_of(cluster)
    try:
        with tempfile.TemporaryDirectory(prefix="cxr-ray-submit-") as folder:
            made = client.submit_job(
                entrypoint=command.entrypoint,
                submission_id=submission_id,
                runtime_env=runtime_environment(Path(folder), command.settings),
                entrypoint_num_cpus=num_cpus or None,
            )
    except (RuntimeError, ValueError, OSError, AuthenticationError) as error:
        raise SubmitError(f"{cluster.address}: the job was not taken ({last_line(str(error))})") from error
    return Job(client, cluster, made)
