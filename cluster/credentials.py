"""Credentials in URIs: found before a command is sent, hidden where the commands of others are shown.

The command line of a job stands in the cluster's metadata, its dashboard, its list of processes and the first line of the log,
and its settings file lies on every node: a key in a URI is known to everyone who may look at the cluster.
"""

import re
from collections.abc import Iterator, Sequence

# What storage, object stores' signed URLs and tracking servers take after a question mark.
SECRET_OPTIONS = frozenset(
    (
        *("access_key", "secret_key", "session_token", "external_id", "account_key", "client_secret", "sas_token"),
        *("sig", "signature", "x-amz-credential", "x-amz-security-token", "x-amz-signature", "x-goog-signature"),
        *("key", "api_key", "token", "access_token", "password"),
    )
)
HIDDEN = "***"
# By scheme; `mlflow` is the option, whose servers are reached by the schemes of other things.
_REMEDIES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
    "abfss": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
    "mlflow": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
}
# A secret key may hold a slash, which ends the part of a URI where users stand: then what looks like a port is no number.
_USER = re.compile(r"(?<=://)(?:[^/?#\s@]*@|[^/?#\s@:\[]*:(?!\d*(?:[/?#]|$))[^\s@]*@)")
_OPTION = re.compile(rf"(?<=[?&])({'|'.join(map(re.escape, sorted(SECRET_OPTIONS)))})=[^&#\s'\"]*", re.IGNORECASE)


def hidden(text: str) -> str:
    """A text with the users, passwords and keys in its URIs replaced by `HIDDEN`."""
    return _OPTION.sub(rf"\1={HIDDEN}", _USER.sub(f"{HIDDEN}@", text)) if "://" in text else text


def told_secret(name: str, value: object) -> str | None:
    """What is to be said of a value whose URIs would tell a password or a key, without repeating it; None if none does.

    Parameters
    ----------
    name
        The option, or the key in the settings file, as it is to be named.
    value
        Text, or lists and mappings of it as YAML has them.
    """
    for place, text in _texts(name, value):
        if (scheme := _scheme_with_secret(text)) is not None:
            return (
                f"{place}: its URI holds a password or a key, which everyone who may look at the cluster's jobs would see; "
                f"leave it out of the URI, and set {_remedy(place, scheme)} in the environment in which Ray runs on each node"
            )
    return None


def told_secret_in(arguments: Sequence[str]) -> str | None:
    """`told_secret` for the options of a command line."""
    option = "argument"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_option = argument.startswith("--")
        said = told_secret(name if is_option else option, value if is_option and equals else argument)
        if said is not None:
            return said
        option = name if is_option and not equals else "argument"
    return None


def _texts(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _texts(f"{name}.{key}", part)
            yield from _texts(name, key)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(name, part)
    elif isinstance(value, str):
        yield name, value


def _scheme_with_secret(text: str) -> str | None:
    """The scheme of a URI that holds a secret, None if there is none."""
    for found in _USER.finditer(text):
        scheme = _scheme(text[: found.start()])
        # A user alone is part of an address in HDFS and Azure, and anonymous in Google's; to a web server it is a token.
        if ":" in found[0] or scheme in ("http", "https"):
            return scheme
    option = _OPTION.search(text)
    return _scheme(text[: text.rindex("://", 0, option.start()) + 3]) if option and "://" in text[: option.start()] else None


def _scheme(before: str) -> str:
    found = re.search(r"([A-Za-z][A-Za-z0-9+.-]*)://$", before)
    return found[1].lower() if found else ""


def _remedy(place: str, scheme: str) -> str:
    by_option = "mlflow" if re.search(r"\bmlflow$", place) else scheme
    return _REMEDIES.get(by_option, "what the storage takes its credentials from")
