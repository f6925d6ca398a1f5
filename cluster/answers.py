"""What Ray's client of a cluster's jobs raises, told apart: it says by words which status a request was answered with."""

import re

from cluster.connection import Cluster, untrusted
from cluster.errors import SubmitError, Unreachable, last_line


def client_errors() -> tuple[type[Exception], ...]:
    """All that Ray's client raises when it is answered otherwise than it expects, or not at all."""
    import aiohttp  # noqa: PLC0415 - comes with ray[default]
    from ray.exceptions import AuthenticationError  # noqa: PLC0415

    # Those of requests are OSErrors; RuntimeError is what the client makes of a refused request and a broken stream.
    return (OSError, RuntimeError, ValueError, aiohttp.ClientError, AuthenticationError)


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error comes from; None for one that comes from no answer."""
    import aiohttp  # noqa: PLC0415 - as above
    from ray.exceptions import AuthenticationError  # noqa: PLC0415

    if isinstance(error, AuthenticationError):
        return 403
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return error.status
    found = re.match(r"Request failed with status code (\d{3})\b", str(error))
    return int(found[1]) if found else None


def refuses_token(error: Exception) -> bool:
    """Whether the cluster takes our token no more, or wants one that it did not want before."""
    return status_of(error) in (401, 403)


def unknown_job(error: Exception) -> bool:
    """Whether the cluster, and not a proxy before it, says that it has no such job."""
    return status_of(error) == 404 and re.search(r"Job .* does not exist", str(error)) is not None


def told(cluster: Cluster, error: Exception, failed: str) -> SubmitError:
    """An error of the client in one line.

    Parameters
    ----------
    failed
        What did not come about, as ``the job was not taken``.
    """
    status = status_of(error)
    if found := untrusted(cluster.address, error):
        return found
    if refuses_token(error):
        return SubmitError(f"{cluster.address}: refuses the token; give the cluster's own with --token-file")
    said = f"{cluster.address}: {failed} ({last_line(str(error) or type(error).__name__)})"
    may_pass = isinstance(error, client_errors()[0]) if status is None else status >= 500
    return Unreachable(said) if may_pass else SubmitError(said)
