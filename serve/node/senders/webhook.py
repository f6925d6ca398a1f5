"""A study's summary to a web address, as JSON, signed on request.

The receiver tells repetitions by ``Idempotency-Key``, which is the parcel's id. With a secret, ``X-CXR-Ray-Signature`` is
``sha256=`` and the HMAC-SHA-256 over the time in ``X-CXR-Ray-Timestamp``, a full stop and the body: what is repeated later by
somebody else bears an old time.
"""

import hashlib
import hmac
import time
from collections.abc import Callable, Set

from serve.node.destinations import WebhookDestination
from serve.node.parcels import JSON, Parcel
from serve.node.senders.http import CredentialError, HttpPeer, http_outcome, read_secret, retry_after
from serve.node.senders.sender import Delivered, Outcome, Permanent, Transient


class WebhookSender:
    """Sends the JSON items of parcels, a request each.

    Raises
    ------
    UsageError
        When the certificates that the settings name cannot be read.
    """

    def __init__(self, destination: WebhookDestination) -> None:
        self._destination = destination
        self._peer = HttpPeer(destination)

    def send(self, parcel: Parcel, confirmed: Set[str], confirm: Callable[[str], None]) -> Outcome:
        """See `Sender`."""
        items = parcel.of_type(JSON)
        if not items:
            return Permanent("it holds no summary")
        last: Outcome = Delivered("200")
        for item in items:
            if item.name in confirmed:
                continue
            last = self._post(parcel.id if len(items) == 1 else f"{parcel.id}-{item.name}", item.read())
            if not isinstance(last, Delivered):
                return last
            confirm(item.name)
        return last

    def rest(self, interrupted: Callable[[], bool]) -> None:
        """See `Sender`."""

    def abort(self) -> None:
        """See `Sender`."""
        self._peer.close()

    def _post(self, key: str, body: bytes) -> Outcome:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        if self._destination.hmac_secret_file is not None:
            try:
                secret = read_secret(self._destination.hmac_secret_file, "hmac_secret_file")
            except CredentialError as error:
                return Transient(str(error), whole_destination=True)
            headers |= signed(secret, body, int(time.time()))
        answer = self._peer.post(self._destination.url, body, headers)
        if isinstance(answer, Transient):
            return answer
        if answer.status == 409:
            # The same key is being worked on: what is told of it comes later.
            return Transient("answered 409", retry_after=retry_after(answer.headers))
        return http_outcome(answer)


def signed(secret: str, body: bytes, seconds: int) -> dict[str, str]:
    """The headers that prove where a request comes from.

    Parameters
    ----------
    seconds
        Time, since the epoch.
    """
    digest = hmac.new(secret.encode(), str(seconds).encode() + b"." + body, hashlib.sha256).hexdigest()
    return {"X-CXR-Ray-Timestamp": str(seconds), "X-CXR-Ray-Signature": f"sha256={digest}"}
