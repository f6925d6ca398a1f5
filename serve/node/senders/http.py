"""HTTP as STOW-RS and webhooks share it: one client, credentials read anew each time, and what a status means.

The token is read from its file for each request, so that a new one counts at once. Redirects are not followed and no proxy is
used: results of patients go where the settings say, or nowhere.
"""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from serve.node.destinations import StowDestination, WebhookDestination
from serve.node.senders.sender import Delivered, Outcome, Permanent, Transient
from serve.node.senders.tls import client_context

_LARGEST_ANSWER = 1024 * 1024
_LONGEST_DETAIL = 500
# The address, or who we are for it: mended in the settings of one of the two, and then everything that waits goes.
_CONFIGURATION = frozenset({301, 302, 303, 307, 308, 401, 402, 403, 404, 407, 421})
# About the service as a whole: nothing else that is sent fares better.
_WHOLE_SERVICE = frozenset({429, 502, 503, 504})
_PASSING = frozenset({408, 425})


@dataclass(frozen=True)
class Answer:
    """What a web service answered; of the body at most 1 MiB."""

    status: int
    headers: httpx.Headers
    body: bytes


class CredentialError(Exception):
    """A file with a credential cannot be read; `str(error)` is our words."""


class HttpPeer:
    """One web address.

    Raises
    ------
    UsageError
        When the certificates that the settings name cannot be read.
    """

    def __init__(self, destination: StowDestination | WebhookDestination) -> None:
        self._destination = destination
        self._client = httpx.Client(
            timeout=httpx.Timeout(destination.timeout_seconds, connect=destination.connect_seconds),
            trust_env=False,
            follow_redirects=False,
            verify=client_context(f"destination {destination.name}", destination.ca),
        )

    def post(self, url: str, content: bytes | Iterable[bytes], headers: dict[str, str]) -> Answer | Transient:
        """Post, with the token if there is one; `Transient` where there is no answer."""
        patience = self._destination.timeout_seconds
        deadline = time.monotonic() + patience
        try:
            request = self._client.build_request("POST", url, content=content, headers=headers | self._authorization())
            answer = self._client.send(request, stream=True)
            with contextlib.closing(answer):
                body = bytearray()
                for piece in answer.iter_bytes():
                    body += piece
                    if len(body) > _LARGEST_ANSWER or time.monotonic() > deadline + patience:
                        break
                return Answer(answer.status_code, answer.headers, bytes(body[:_LARGEST_ANSWER]))
        except CredentialError as error:
            return Transient(str(error), whole_destination=True)
        except httpx.ConnectTimeout:
            return Transient("it cannot be reached (no answer in time)", whole_destination=True)
        except httpx.ConnectError as error:
            words = "its certificate is not trusted" if "CERTIFICATE" in str(error) else "connection refused or no route"
            return Transient(f"it cannot be reached ({words})", whole_destination=True)
        except httpx.TimeoutException:
            return Transient("it did not answer in time")
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            return Transient(f"the connection broke ({type(error).__name__})")

    def close(self) -> None:
        """Close what is open."""
        self._client.close()

    def _authorization(self) -> dict[str, str]:
        file = self._destination.token_file
        return {} if file is None else {"Authorization": f"Bearer {read_secret(file, 'token_file')}"}


def read_secret(file: Path, setting: str) -> str:
    """A credential from its file.

    Raises
    ------
    CredentialError
        When it cannot be read, is empty or holds more than a line.
    """
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialError(f"{setting} {file}: cannot be read ({type(error).__name__})") from None
    if not secret or not secret.isprintable():
        raise CredentialError(f"{setting} {file}: is empty or holds more than a line")
    return secret


def http_outcome(answer: Answer) -> Outcome:
    """What a status means where the answer says no more.

    Waiting helps with what is wrong with the service or with the settings, once somebody has mended it; a verdict on what was
    sent stays one.
    """
    status, words = answer.status, f"answered {answer.status}"
    if 200 <= status < 300:
        return Delivered(str(status))
    detail = own_words(answer)
    wanted = retry_after(answer.headers)
    if status in _CONFIGURATION or status in _WHOLE_SERVICE:
        return Transient(words, detail, wanted, whole_destination=True)
    if status in _PASSING or not 400 <= status < 500:
        return Transient(words, detail, wanted, whole_destination=wanted > 0)
    return Permanent(words, detail)


def retry_after(headers: httpx.Headers) -> float:
    """Seconds that an answer asks to wait (RFC 9110 section 10.2.3); 0 where it says nothing that can be read."""
    value = headers.get("Retry-After", "").strip()
    try:
        if value.isdecimal():
            return float(value)
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def own_words(answer: Answer) -> str:
    """What the service said, shortened: it may quote what it was sent, and stands in no log."""
    return " ".join(answer.body[: 4 * _LONGEST_DETAIL].decode("utf-8", "replace").split())[:_LONGEST_DETAIL]
