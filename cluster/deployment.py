"""Putting applications on a cluster by Serve's REST API, and again whenever the cluster has lost them.

A head keeps what it serves in its memory: one that was started again serves nothing until somebody says what. `Keeper` is that
somebody. It also tries again what could not be built, as it happens when the database comes up after the head; replicas that
fail are Serve's own affair.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.connection import Cluster
from cluster.errors import SubmitError, last_line

_PATH = "/api/serve/applications/"
# A head starts Serve's controller and proxies before it answers.
_SECONDS_TO_ANSWER = 120.0
# What failed is tried again after so many seconds, then after twice as many, and so on; a bundle is read each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 20.0, 300.0
_RUNNING, _FAILED = "RUNNING", "DEPLOY_FAILED"


def read_configuration(path: Path) -> dict[str, Any]:
    """Read what 'cxr-ray serve --write-config' wrote.

    Raises
    ------
    SubmitError
        If it cannot be read, or names no application.
    """
    remedy = "give a file that 'cxr-ray serve --write-config' wrote"
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SubmitError(f"{path}: cannot be read ({error}); {remedy}", code=2) from None
    applications = read.get("applications") if isinstance(read, dict) else None
    if not isinstance(applications, list) or not all(isinstance(each, dict) and each.get("name") for each in applications):
        raise SubmitError(f"{path}: is no list of named applications; {remedy}", code=2)
    if not applications:
        raise SubmitError(f"{path}: names no application; {remedy}", code=2)
    return dict(read)


def names(configuration: Mapping[str, Any]) -> list[str]:
    """The names of its applications."""
    return [str(application["name"]) for application in configuration["applications"]]


def deploy(cluster: Cluster, configuration: Mapping[str, Any]) -> None:
    """Put a configuration on a cluster; applications that it does not name are taken away.

    Raises
    ------
    SubmitError
        If the cluster does not take it.
    """
    _ask(cluster, "PUT", configuration)


def states(cluster: Cluster) -> dict[str, str]:
    """The state of each application that a cluster has, by name.

    Raises
    ------
    SubmitError
        If the cluster does not say.
    """
    answer = _ask(cluster, "GET")
    try:
        return {name: str(application["status"]) for name, application in answer.json()["applications"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SubmitError(f"{cluster.address}{_PATH}: does not list applications; give the dashboard's address") from None


class Keeper:
    """Puts a configuration on a cluster, and again whenever it is not there.

    Parameters
    ----------
    reached
        Finds the cluster; asked at each look, as a head that was started again may have another token.
    tell
        Takes a line of what was done, and of what is wrong; the same thing is told once.
    """

    def __init__(self, reached: Callable[[], Cluster], configuration: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self._reached, self._configuration, self._tell = reached, configuration, tell
        self._names = names(configuration)
        # What the cluster has may be of an older configuration.
        self._is_put = False
        self._told = ""
        self._pause, self._not_before = _FIRST_PAUSE, 0.0

    def look(self) -> None:
        """Look whether the applications are there, and put them there if they are not.

        Raises
        ------
        SubmitError
            If the address can be none; everything else is told, for the next look.
        """
        try:
            self._look()
        except SubmitError as error:
            if error.code == 2:
                raise
            if str(error) != self._told:
                self._tell(f"{error}; trying again")
            self._told = str(error)

    def _look(self) -> None:
        try:
            cluster = self._reached()
            there = states(cluster)
        except SubmitError:
            # Whatever comes back knows of no attempt before.
            self._rest()
            raise
        absent = [name for name in self._names if name not in there]
        failed = [name for name in self._names if there.get(name) == _FAILED]
        if all(there.get(name) == _RUNNING for name in self._names):
            self._rest()
        if (self._is_put and not absent and not failed) or time.monotonic() < self._not_before:
            return
        self._not_before = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        deploy(cluster, self._configuration)
        self._is_put, self._told = True, ""
        why = f": {', '.join(absent)} was not there" if absent else f": {', '.join(failed)} had failed" if failed else ""
        self._tell(f"{', '.join(self._names)} put on {cluster.address}{why}")

    def _rest(self) -> None:
        self._pause, self._not_before = _FIRST_PAUSE, 0.0


def _ask(cluster: Cluster, method: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
    answer = cluster.ask(_PATH, method, body=body, seconds=_SECONDS_TO_ANSWER)
    if not answer.is_success:
        raise SubmitError(
            f"{cluster.address}{_PATH}: answers {answer.status_code} ({last_line(answer.text)}); the head's log has more"
        )
    return answer
