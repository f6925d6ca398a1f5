"""`cxr-ray jobs`: what runs and ran on a Ray cluster."""

import json as json_module
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.answers import client_errors, told
from cluster.connection import Cluster, reach
from cluster.credentials import hidden
from cluster.errors import last_line
from cluster.submit import client_of, known_job
from cluster.terminal import Address, CaFile, TokenFile, in_one_line, notice, write

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

SubmissionId = Annotated[str, typer.Argument(metavar="ID", help="Submission id, as 'list' prints it.")]
# What goes before the command that was submitted.
_INTERPRETER = "python -P -m cxr_ray "

jobs = typer.Typer(help="Jobs on a Ray cluster.", add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


@jobs.command("list")
def list_jobs(
    address: Address = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List submitted jobs, the last first: id, state, when it began, how long it took, what it runs."""
    with in_one_line():
        found = [job for job in _listed(reach(address, token_file, ca_file)) if job.submission_id]
    found.sort(key=lambda job: job.start_time or 0, reverse=True)
    if json:
        sys.stdout.write(json_module.dumps([_as_json(job) for job in found], indent=2) + "\n")
        return
    shown = Table(title=f"{len(found)} jobs", title_justify="left", box=None, pad_edge=False)
    for name in ("id", "state", "began (UTC)", "took", "command"):
        # Ids are copied: only the command is broken into lines.
        shown.add_column(name, overflow="fold", no_wrap=name != "command", justify="right" if name == "took" else "left")
    for job in found:
        # As text: what is in brackets in a command is no markup.
        told_of = (job.submission_id or "", job.status.value.lower(), _began(job), _took(job), _command(job))
        shown.add_row(*map(Text, told_of))
    Console().print(shown)


@jobs.command("logs")
def print_log(
    submission_id: SubmissionId,
    address: Address = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on to the job's end; its exit code is this command's.")] = False,
) -> None:
    """Print a job's log."""
    with in_one_line():
        job = known_job(reach(address, token_file, ca_file), submission_id)
        if follow:
            raise SystemExit(job.follow(write, notice))
        write(job.log())


@jobs.command("stop")
def stop_job(
    submission_id: SubmissionId, address: Address = None, token_file: TokenFile = None, ca_file: CaFile = None
) -> None:
    """End a job; what it has written stays, and the same command goes on from there."""
    with in_one_line():
        job = known_job(reach(address, token_file, ca_file), submission_id)
        notice(f"job {submission_id} {'is being stopped' if job.stop() else 'had ended already'}")


def _listed(cluster: Cluster) -> "list[JobDetails]":
    client = client_of(cluster)
    try:
        return list(client.list_jobs())
    except client_errors() as error:
        raise told(cluster, error, "does not list its jobs") from error


def _as_json(job: "JobDetails") -> dict[str, object]:
    return {
        "submission_id": job.submission_id,
        "state": job.status.value.lower(),
        "command": _command(job),
        "began": None if job.start_time is None else _moment(job.start_time).isoformat(),
        "ended": None if not job.end_time else _moment(job.end_time).isoformat(),
        "exit_code": job.driver_exit_code,
        "message": hidden(last_line(job.message or "")) if job.message else None,
    }


def _command(job: "JobDetails") -> str:
    return hidden(job.entrypoint.removeprefix(_INTERPRETER))


def _began(job: "JobDetails") -> str:
    return "" if job.start_time is None else f"{_moment(job.start_time):%m-%d %H:%M}"


def _took(job: "JobDetails") -> str:
    if job.start_time is None:
        return ""
    ended = _moment(job.end_time) if job.end_time else datetime.now(UTC)
    minutes, seconds = divmod(int((ended - _moment(job.start_time)).total_seconds()), 60)
    return f"{minutes}:{seconds:02d}"


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
