"""Reaching a cluster: its address, its token, and whether it runs our versions of Ray and Python.

Ray's token authentication is that of its own clients: a bearer token from RAY_AUTH_TOKEN, from the file that
RAY_AUTH_TOKEN_PATH names, or from ``~/.ray/auth_token``. It is sent only to a cluster that asks for one.

A dashboard behind TLS whose certificate comes from an authority of one's own is trusted by a file with that authority. The
three libraries that ask a dashboard each look for such a file somewhere else, so it is named once and handed to all of them.
"""

import os
import shlex
import ssl
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from cluster.credentials import hidden
from cluster.errors import SubmitError, Unreachable

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105 - where it lies, not what it is
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
CA_VARIABLE = "CXR_RAY_CA_FILE"
_SECONDS_TO_ANSWER = 5.0


@dataclass(frozen=True)
class Cluster:
    """A cluster; from `reach`, one that answered and runs our versions.

    Attributes
    ----------
    address
        URL of its dashboard.
    headers
        What every request carries: the token, where the cluster wants one.
    token_file
        The file that the token was read from because it was named; None if it was found elsewhere, or is not wanted.
    ca_file
        The file with the authorities that its certificate may come from; None for those that are known everywhere.
    """

    address: str
    headers: Mapping[str, str]
    token_file: Path | None = None
    ca_file: Path | None = None

    def ask(
        self, path: str, method: str = "GET", *, body: Mapping[str, Any] | None = None, seconds: float = _SECONDS_TO_ANSWER
    ) -> httpx.Response:
        """What it answers to a request, whatever the status.

        Parameters
        ----------
        body
            What is sent along, as JSON.
        seconds
            How long the answer is waited for.

        Raises
        ------
        Unreachable
            If it does not come in time.
        SubmitError
            If its certificate is not trusted.
        """
        url, headers = f"{self.address}{path}", dict(self.headers)
        try:
            trusted = True if self.ca_file is None else ssl.create_default_context(cafile=self.ca_file)
            return httpx.request(method, url, headers=headers, json=body, timeout=seconds, verify=trusted)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise untrusted(self.address, error) or Unreachable(
                f"{self.address}: no answer ({error or type(error).__name__}); start the cluster, or give the URL of its "
                "dashboard with --address (port 8265 of the head node unless set otherwise)"
            ) from None

    @property
    def options(self) -> str:
        """The options by which cxr-ray's own commands reach it, as a shell takes them."""
        given = ["", "--address", hidden(self.address)]
        if self.token_file is not None:
            given += ["--token-file", str(self.token_file)]
        if self.ca_file is not None:
            given += ["--ca-file", str(self.ca_file)]
        return " ".join(shlex.quote(word) if word else word for word in given)


def reach(address: str | None, token_file: Path | None, ca_file: Path | None = None) -> Cluster:
    """Find the cluster and check that it takes our token and runs our versions.

    Parameters
    ----------
    address
        URL of the dashboard; None for RAY_API_SERVER_ADDRESS, else `DEFAULT_ADDRESS`.
    token_file
        File with the token; None to look where Ray's own clients look.
    ca_file
        File with the authorities that its certificate may come from, in PEM; None for CXR_RAY_CA_FILE, else those that are
        known everywhere.

    Raises
    ------
    SubmitError
        If it does not answer within seconds, has a certificate that is not trusted, refuses the token, or runs another Ray or
        Python.
    """
    address = (address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"--address {address}: is no http:// or https:// URL; give the dashboard's, as {DEFAULT_ADDRESS}", 2)
    cluster = Cluster(address, {}, ca_file=_authorities(ca_file))
    answer = cluster.ask("/api/version")
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        token, origin = _token(token_file, address)
        named = None if token_file is None else token_file.absolute()
        cluster = replace(cluster, headers={"Authorization": f"Bearer {token}"}, token_file=named)
        answer = cluster.ask("/api/version")
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise SubmitError(f"{address}: refuses the token from {origin}; give the cluster's own with --token-file")
    _check_ray(address, _field(answer, "ray_version"))
    _check_python(address, _field(cluster.ask("/api/v0/cluster_metadata"), "data", "pythonVersion"))
    return cluster


def untrusted(address: str, error: BaseException) -> SubmitError | None:
    """What to say where an error, or what it comes from, is a certificate that is not trusted; None where it is not."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(texts) < 20:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = next((text for text in texts if "CERTIFICATE_VERIFY_FAILED" in text), None)
    if text is None:
        return None
    reason = text.partition("certificate verify failed:")[2].partition(" (_ssl")[0].strip() or "certificate verify failed"
    remedy = (
        "give an address that the certificate names with --address"
        if "mismatch" in reason or "not valid for" in reason
        else f"give the file with the authority that it comes from with --ca-file or {CA_VARIABLE}"
    )
    return SubmitError(f"{address}: its certificate is not trusted ({reason}); {remedy}")


def _authorities(ca_file: Path | None) -> Path | None:
    named = os.environ.get(CA_VARIABLE)
    path = ca_file or (Path(named) if named else None)
    if path is None:
        return None
    # Absolute, since it is named to the user, who may go elsewhere.
    path = path.expanduser().absolute()
    origin = "--ca-file" if ca_file else CA_VARIABLE
    remedy = "give a file with certificates in PEM form"
    try:
        ssl.create_default_context(cafile=path)
    except ssl.SSLError:
        raise SubmitError(f"{origin} {path}: holds no certificates; {remedy}", 2) from None
    except OSError as error:
        raise SubmitError(f"{origin} {path}: cannot be read ({error.strerror}); {remedy}", 2) from None
    return path


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
