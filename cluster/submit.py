"""Running a command as a job on a Ray cluster, with the code that is installed here.

What is wrong is found before anything is sent: the address, the token, other versions of Ray or Python. Then the four packages
are uploaded, and the job runs them on the cluster's own installation of everything they depend on. Its log is followed to the
end. The job does not depend on whoever watches it: when the connection breaks the log is taken up where it broke, and an
interrupt ends the watching only.

Ray's token authentication is that of its own clients: a bearer token from RAY_AUTH_TOKEN, from the file that
RAY_AUTH_TOKEN_PATH names, or from ``~/.ray/auth_token``. It is sent only to a cluster that asks for one.
"""

import asyncio
import contextlib
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

COMMANDS = ("ingest", "train", "evaluate", "predict")
PACKAGES = ("cxr_ray", "ingest", "serve", "cluster")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PATH_OPTIONS = (
    "data",
    "out",
    "release",
    "source",
    "bundle",
    "config",
    "labels",
    "patient-key-file",
    "init",
    "input",
    "clinical",
)
# Values of --init that are no paths.
NAMED_WEIGHTS = ("random", "imagenet")
DEFAULT_TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105 - where it lies, not what it is

_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_SECONDS_TO_ANSWER = 5.0
# Ray's log streams have no heartbeat: a connection that died without a word shows only as silence.
_SECONDS_OF_SILENCE = 30.0
_SECONDS_BETWEEN_ATTEMPTS = 2.0
_SECONDS_OF_ATTEMPTS = 300.0


class SubmitError(Exception):
    """A command could not be submitted or followed; `str(error)` is one line that names the value and the remedy.

    Attributes
    ----------
    code
        The exit code: 2 for bad usage, 1 for anything else.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


@dataclass(frozen=True)
class Cluster:
    """A cluster that answered and runs our versions.

    Attributes
    ----------
    address
        URL of its dashboard.
    headers
        What every request carries: the token, where the cluster wants one.
    environment
        The variables that Ray's own commands need to reach it, as a shell takes them.
    """

    address: str
    headers: Mapping[str, str]
    environment: str = ""

    def ray_command(self, command: str) -> str:
        """A command of Ray's own, as it has to be typed for this cluster."""
        return f"{self.environment}ray {command} --address {self.address}"


def entrypoint(arguments: Sequence[str], folder: Path) -> str:
    """The shell line that runs a command of cxr-ray on the cluster.

    Parameters
    ----------
    arguments
        The command and its options, as after ``cxr-ray``.
    folder
        What relative paths among them are relative to.

    Raises
    ------
    SubmitError
        If the command is not one that runs as a job.
    """
    if not arguments or arguments[0] not in COMMANDS:
        given = f"command {arguments[0]!r} does not run as a job" if arguments else "no command is given"
        raise SubmitError(f"{given}; submit one of: {', '.join(COMMANDS)}", code=2)
    # Without -P, a checkout in the folder where the cluster was started would go before the code that is uploaded.
    return shlex.join(["python", "-P", "-m", "cxr_ray", *absolute_paths(arguments, folder)])


def absolute_paths(arguments: Sequence[str], folder: Path) -> list[str]:
    """The same arguments with the local paths of `PATH_OPTIONS` made absolute; URIs stay as they are."""
    made: list[str] = []
    option = ""
    for argument in arguments:
        if option:
            made.append(_absolute(option, argument, folder))
            option = ""
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        is_path = argument.startswith("--") and name in PATH_OPTIONS
        if is_path and equals:
            made.append(f"--{name}={_absolute(name, value, folder)}")
        else:
            made.append(argument)
            option = name if is_path else ""
    return made


def _absolute(option: str, value: str, folder: Path) -> str:
    if not value or "://" in value or (option == "init" and value in NAMED_WEIGHTS):
        return value
    # Not resolved: a link may lead elsewhere on the cluster.
    return str(folder / Path(value).expanduser())


def reach(address: str | None, token_file: Path | None) -> Cluster:
    """Find the cluster and check that it takes our token and runs our versions.

    Parameters
    ----------
    address
        URL of the dashboard; None for RAY_API_SERVER_ADDRESS, else `DEFAULT_ADDRESS`.
    token_file
        File with the token; None to look where Ray's own clients look.

    Raises
    ------
    SubmitError
        If it does not answer within seconds, refuses the token, or runs another Ray or Python.
    """
    address = (address or os.environ.get(_ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"--address {address}: is no http:// or https:// URL; give the dashboard's, as {DEFAULT_ADDRESS}", 2)
    headers: dict[str, str] = {}
    environment = ""
    answer = _get(address, "/api/version", headers)
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        token, origin = _token(token_file, address)
        headers = {"Authorization": f"Bearer {token}"}
        environment = "RAY_AUTH_MODE=token "
        if token_file is not None:
            environment += f"RAY_AUTH_TOKEN_PATH={shlex.quote(str(token_file.absolute()))} "
        answer = _get(address, "/api/version", headers)
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise SubmitError(f"{address}: refuses the token from {origin}; give the cluster's own with --token-file")
    _check_ray(address, _field(answer, "ray_version"))
    metadata = _get(address, "/api/v0/cluster_metadata", headers)
    _check_python(address, _field(metadata, "data", "pythonVersion"))
    return Cluster(address, headers, environment)


def _get(address: str, path: str, headers: Mapping[str, str]) -> httpx.Response:
    try:
        return httpx.get(f"{address}{path}", headers=dict(headers), timeout=_SECONDS_TO_ANSWER)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SubmitError(
            f"{address}: no answer ({error or type(error).__name__}); start the cluster, or give the URL of its dashboard "
            "with --address (port 8265 of the head node unless set otherwise)"
        ) from None


def _field(answer: httpx.Response, *names: str) -> str | None:
    """A text in a JSON answer, None where it is not there."""
    try:
        value: Any = answer.json()
    except ValueError:
        return None
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else None


def _token(token_file: Path | None, address: str) -> tuple[str, str]:
    """The token, and where it comes from."""
    in_environment = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token_file is None and in_environment:
        return in_environment, "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = token_file or Path(named or DEFAULT_TOKEN_FILE).expanduser()
    remedy = "give the file with the cluster's token with --token-file or RAY_AUTH_TOKEN_PATH"
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise SubmitError(f"{address}: wants a token, and {path} cannot be read ({reason}); {remedy}") from None
    if not token.isascii() or not token.isprintable() or not token:
        raise SubmitError(f"{address}: wants a token, and {path} holds none; {remedy}")
    return token, str(path)


def _check_ray(address: str, version: str | None) -> None:
    import ray  # noqa: PLC0415 - takes a second that wrong addresses and tokens need not wait for

    if version is None:
        raise SubmitError(f"{address}: is no Ray dashboard; give its URL with --address (port 8265 unless set otherwise)")
    if _minor(version) != _minor(ray.__version__):
        raise SubmitError(
            f"{address}: runs Ray {version}, here is Ray {ray.__version__}; install ray=={version} here, or the other there"
        )


def _check_python(address: str, version: str | None) -> None:
    here = ".".join(map(str, sys.version_info[:3]))
    if version is not None and _minor(version) != _minor(here):
        raise SubmitError(f"{address}: runs Python {version}, here is Python {here}; submit from Python {_minor(version)}")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


class Job:
    """A job on a cluster."""

    def __init__(self, client: "JobSubmissionClient", cluster: Cluster, submission_id: str) -> None:
        self.submission_id = submission_id
        self._client, self._cluster = client, cluster

    @property
    def how_to_go_on(self) -> str:
        """What to type to follow the job again, or to stop it."""
        follow, stop = (
            self._cluster.ray_command(f"job {command} {self.submission_id}") for command in ("logs --follow", "stop")
        )
        return f"follow it with '{follow}', stop it with '{stop}'"

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
        return _exit_code(details, notice)


def submit(cluster: Cluster, command_line: str, *, submission_id: str | None = None, num_cpus: float = 0) -> Job:
    """Upload the packages and start a job.

    Parameters
    ----------
    command_line
        What `entrypoint` made.
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
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

    # Ray prefers this variable to the address that it is given.
    os.environ[_ADDRESS_VARIABLE] = cluster.address
    # It also tells of every package and connection.
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(cluster.address, headers=dict(cluster.headers))
        with tempfile.TemporaryDirectory(prefix="cxr-ray-submit-") as folder:
            made = client.submit_job(
                entrypoint=command_line,
                submission_id=submission_id,
                runtime_env=runtime_environment(Path(folder)),
                entrypoint_num_cpus=num_cpus or None,
            )
    except (RuntimeError, ValueError, OSError, AuthenticationError) as error:
        raise SubmitError(f"{cluster.address}: the job was not taken ({_last_line(str(error))})") from error
    return Job(client, cluster, made)


def runtime_environment(folder: Path) -> dict[str, Any]:
    """Ray's runtime environment of a job: the packages' Python files, copied to `folder`, and the variables it needs."""
    return {
        "py_modules": [str(_copy_package(package, folder)) for package in PACKAGES],
        "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
    }


def _copy_package(package: str, folder: Path) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SubmitError(f"package {package!r} is not installed here; install cxr-ray again")
    origin = Path(spec.submodule_search_locations[0])
    for source in [*origin.rglob("*.py"), *origin.rglob("py.typed")]:
        target = folder / package / source.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return folder / package


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1] if lines else "no reason given"


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
                raise _LostConnection(f"connection lost ({_last_line(str(error))})") from error
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
        notice(f"job {details.submission_id} failed: {_last_line(details.message or '')}")
        return 1
    notice(f"job {details.submission_id} failed with exit code {code}; its log is above")
    return code if 0 < code < 256 else 1
