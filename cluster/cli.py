"""`cxr-ray submit`: a command of cxr-ray as a job on a Ray cluster."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.command_line import COMMANDS, CommandLine, check, command_line
from cluster.connection import Cluster, reach
from cluster.errors import SubmitError
from cluster.job import Job
from cluster.room import check_room
from cluster.submit import known_job, submit_patiently
from cluster.submit import submit as submit_job
from cluster.terminal import Address, CaFile, TokenFile, in_one_line, notice, write

_HELP = "\n\n".join(
    (
        f"Run {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]} as a job on a Ray cluster, and follow its log.",
        "The command has the options that it has without 'submit' ('cxr-ray train --help'), and is checked here before "
        "anything is sent; those of this page may stand before or among them. Its settings file (--config) is read here. Its "
        "other paths are the cluster's: relative ones are made absolute here, and the nodes have to find the same files there "
        "(shared storage, or URIs such as s3://bucket/folder).",
        "Example:",
        "cxr-ray submit train --data /shared/nih --out /shared/run1 --workers 4 --gpu --address http://head:8265 "
        "--token-file cluster.token",
        "The cluster needs the same minor versions of Ray and Python, and what cxr-ray depends on, on every node and for the "
        "'python' in the head node's PATH. The code of cxr-ray itself is uploaded from here.",
        "A cluster with token authentication (RAY_AUTH_MODE=token) takes its token from --token-file, RAY_AUTH_TOKEN, "
        "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, in that order.",
        "Passwords and keys in URIs are refused, as everyone who may look at the cluster's jobs would see them: set "
        "AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_PASSWORD and the like in the environment in which Ray runs on each node.",
        "The first line of the output is the submission id. The exit code is that of the command. An interrupt (Ctrl-C) ends "
        "the watching, not the job: 'cxr-ray submit --attach ID' goes on watching, 'cxr-ray jobs' lists and stops.",
    )
)

_INTERRUPTED = 130
# Done, bad usage, and a watcher who went away: none gets better by another attempt.
_NOT_RETRIED = frozenset({0, 2, _INTERRUPTED})

submit = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


# No command has an option of these names: what is unknown here is the command's.
@submit.command(help=_HELP, context_settings={"ignore_unknown_options": True})
def _submit(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND", help=f"{', '.join(COMMANDS)}, and its options.")
    ] = None,
    address: Address = None,
    token_file: TokenFile = None,
    ca_file: CaFile = None,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; one is made if not given.")] = None,
    num_cpus: Annotated[
        float,
        typer.Option(min=0, help="Logical CPUs of one node reserved for the command itself, besides its workers'; 0 for none."),
    ] = 0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit, print the submission id, and leave.")] = False,
    retries: Annotated[
        int, typer.Option(min=0, help="Times that a failed command is submitted again, to go on where it failed.")
    ] = 0,
    attach: Annotated[str | None, typer.Option(metavar="ID", help="Follow the job with this submission id.")] = None,
) -> None:
    with in_one_line():
        if attach is not None:
            _require_nothing_else(attach, command, submission_id, num_cpus, retries, no_wait=no_wait)
            raise SystemExit(_follow(known_job(reach(address, token_file, ca_file), attach)))
        if no_wait and retries:
            raise SubmitError("--no-wait leaves nobody who could try again; leave out --retries or --no-wait", 2)
        prepared = command_line(command or [], Path.cwd())
        check(command or [])
        cluster = reach(address, token_file, ca_file)
        check_room(cluster, num_cpus)
        job = submit_job(cluster, prepared, submission_id=submission_id, num_cpus=num_cpus)
        write(f"{job.submission_id}\n")
        raise SystemExit(0 if no_wait else _see_through(job, cluster, prepared, num_cpus, retries))


def _require_nothing_else(
    attach: str, command: list[str] | None, submission_id: str | None, num_cpus: float, retries: int, *, no_wait: bool
) -> None:
    """Refuse beside --attach what is said of a job that is to be submitted."""
    given = {
        "--submission-id": submission_id is not None,
        "--num-cpus": bool(num_cpus),
        "--no-wait": no_wait,
        "--retries": bool(retries),
        repr((command or [""])[0]): bool(command),
    }
    for name in (name for name, is_given in given.items() if is_given):
        raise SubmitError(f"--attach {attach}: follows a job that runs already; leave out {name}", 2)


def _see_through(job: Job, cluster: Cluster, command: CommandLine, num_cpus: float, retries: int) -> int:
    """Follow a job, and those that go on where it failed; returns the last one's exit code."""
    code = _follow(job)
    for attempt in range(1, retries + 1):
        if code in _NOT_RETRIED or job.stopped:
            break
        notice(f"submitting it again ({attempt} of {retries})")
        job = submit_patiently(cluster, command.again(), notice, num_cpus=num_cpus)
        write(f"{job.submission_id}\n")
        code = _follow(job)
    return code


def _follow(job: Job) -> int:
    try:
        return job.follow(write, notice)
    except KeyboardInterrupt:
        notice(f"job {job.submission_id} goes on; {job.how_to_go_on}")
        return _INTERRUPTED
