"""`cxr-ray submit`: a command of cxr-ray as a job on a Ray cluster."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.submit import COMMANDS, Job, SubmitError, entrypoint, reach
from cluster.submit import submit as submit_job

_HELP = "\n\n".join(
    (
        f"Run {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]} as a job on a Ray cluster, and follow its log.",
        "Everything from the command's name on is the command's own, as it is without 'submit'. Its paths are the cluster's: "
        "relative ones are made absolute here, and the nodes have to find the same files there (shared storage, or URIs "
        "such as s3://bucket/folder).",
        "Example:",
        "cxr-ray submit --address http://head:8265 --token-file cluster.token train --data /shared/nih --out /shared/run1 "
        "--workers 4 --gpu",
        "The cluster needs the same minor versions of Ray and Python, and what cxr-ray depends on, on every node and for the "
        "'python' in the head node's PATH. The code of cxr-ray itself is uploaded from here.",
        "A cluster with token authentication (RAY_AUTH_MODE=token) takes its token from --token-file, RAY_AUTH_TOKEN, "
        "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, in that order.",
        "The first line of the output is the submission id. The exit code is that of the command. An interrupt (Ctrl-C) ends "
        "the watching, not the job.",
    )
)

_INTERRUPTED = 130

submit = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@submit.command(help=_HELP, context_settings={"allow_interspersed_args": False})
def _submit(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND", help=f"{', '.join(COMMANDS)}, and its options.")],
    address: Annotated[
        str | None, typer.Option(help="URL of the cluster's dashboard [RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265].")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the cluster's token.")] = None,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; without it Ray makes one.")] = None,
    num_cpus: Annotated[
        float, typer.Option(min=0, help="Logical CPUs reserved for the command itself, besides its workers'; 0 for none.")
    ] = 0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Submit, print the submission id, and leave.")] = False,
) -> None:
    try:
        command_line = entrypoint(command, Path.cwd())
        cluster = reach(address, token_file)
        job = submit_job(cluster, command_line, submission_id=submission_id, num_cpus=num_cpus)
        _write(f"{job.submission_id}\n")
        raise SystemExit(0 if no_wait else _follow(job))
    except SubmitError as error:
        _notice(str(error))
        raise SystemExit(error.code) from None


def _follow(job: Job) -> int:
    try:
        return job.follow(_write, _notice)
    except KeyboardInterrupt:
        _notice(f"job {job.submission_id} goes on; {job.how_to_go_on}")
        return _INTERRUPTED


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _notice(text: str) -> None:
    sys.stderr.write(f"cxr-ray: {text}\n")
    sys.stderr.flush()
