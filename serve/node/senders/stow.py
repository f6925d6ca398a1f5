"""Results to a DICOMweb service by STOW-RS (PS3.18 section 10.5): what is left of a parcel in one request.

A service that takes some instances and refuses others says so instance by instance; what it took is confirmed, and each
refusal is judged as a C-STORE status is, for it is the same list of reasons. An instance that the answer does not name was
not taken, whatever the status says: a proxy's page comes with 200, too, and so does that of another service at a mistyped URL.
"""

import logging
import re
import uuid
from collections.abc import Callable, Iterator, Set
from http import HTTPStatus
from pathlib import Path

from serve.node.destinations import StowDestination
from serve.node.parcels import DICOM, Parcel
from serve.node.senders.c_store import Instance, read_instance
from serve.node.senders.http import Answer, HttpPeer, http_outcome, own_words
from serve.node.senders.sender import Delivered, Outcome, Permanent, Transient
from serve.node.senders.statuses import storage_outcome
from serve.node.senders.store_response import read_store_response

_PIECE = 256 * 1024
_MEDIA_TYPE = re.compile(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,60}")
# With which a service may say in an empty answer that it is one of STOW-RS.
_OF_DICOM = frozenset({"", "application/dicom", "application/dicom+json", "application/dicom+xml"})

_log = logging.getLogger(__name__)


class StowSender:
    """Sends the DICOM items of parcels by STOW-RS.

    Raises
    ------
    UsageError
        When the certificates that the settings name cannot be read.
    """

    def __init__(self, destination: StowDestination) -> None:
        self._name, self._url = destination.name, f"{destination.url.rstrip('/')}/studies"
        self._peer = HttpPeer(destination)
        self._warned = False

    def send(self, parcel: Parcel, confirmed: Set[str], confirm: Callable[[str], None]) -> Outcome:
        """See `Sender`."""
        items = parcel.of_type(DICOM)
        if not items:
            return Permanent("it holds nothing that a STOW-RS service takes")
        try:
            instances = {item.name: read_instance(item) for item in items if item.name not in confirmed}
        except ValueError as error:
            return Permanent(str(error))
        if not instances:
            return Delivered("200")
        boundary = uuid.uuid4().hex
        files = [instance.path for instance in instances.values()]
        head = _head(boundary)
        tail = f"\r\n--{boundary}--\r\n".encode()
        size = sum(len(head) + file.stat().st_size for file in files) + len(tail)
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(size),
            "Accept": "application/dicom+json",
        }
        answer = self._peer.post(self._url, _body(head, files, tail), headers)
        return answer if isinstance(answer, Transient) else self._outcome(answer, instances, confirm)

    def rest(self, interrupted: Callable[[], bool]) -> None:
        """See `Sender`."""

    def abort(self) -> None:
        """See `Sender`."""
        self._peer.close()

    def _outcome(self, answer: Answer, instances: dict[str, Instance], confirm: Callable[[str], None]) -> Outcome:
        success = 200 <= answer.status < 300
        said = read_store_response(answer.body) if success or answer.status == HTTPStatus.CONFLICT else None
        # A conflict that names nothing is about all of them.
        if said is not None and (said or success):
            return _of_each(answer.status, said, instances, confirm)
        if not success:
            return http_outcome(answer)
        if answer.status == HTTPStatus.OK and not answer.body.strip() and _media_type(answer) in _OF_DICOM:
            self._warn()
            for name in instances:
                confirm(name)
            return Delivered("200, empty")
        words = f"answered {answer.status} with {_content(answer)}, which does not say what was stored; check the URL"
        return Transient(words, own_words(answer))

    def _warn(self) -> None:
        """Once: a success has to say what was stored (PS3.18 section 10.5.3.3), but waiting would send the same for ever."""
        if not self._warned:
            _log.warning("destination %s: answers 200 with an empty body, which is taken for stored; check the URL", self._name)
        self._warned = True


def _head(boundary: str) -> bytes:
    # Without the transfer-syntax parameter, which is optional: Orthanc 1.10 answers 200 and drops a part that has it.
    return f"\r\n--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()


def _body(head: bytes, files: list[Path], tail: bytes) -> Iterator[bytes]:
    for path in files:
        yield head
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    yield tail


def _of_each(status: int, said: dict[str, int], instances: dict[str, Instance], confirm: Callable[[str], None]) -> Outcome:
    judged: list[Outcome] = []
    for name, instance in instances.items():
        reason = said.get(instance.sop_instance_uid)
        outcome = Transient(f"answered {status} without naming it") if reason is None else storage_outcome(reason)
        if isinstance(outcome, Delivered):
            confirm(name)
        else:
            judged.append(type(outcome)(f"{name}: {outcome.reason}"))
    # What waiting helps is tried first; the rest is refused again after that, and dead then.
    passing = next((outcome for outcome in judged if isinstance(outcome, Transient)), None)
    return passing or next(iter(judged), Delivered(str(status)))


def _content(answer: Answer) -> str:
    """What came, in words for a log: a media type where it looks like one, and nothing else that the peer said."""
    kind = _media_type(answer)
    if kind and not _MEDIA_TYPE.fullmatch(kind):
        kind = "an unreadable content type"
    if answer.body.strip():
        return kind or "no content type"
    return f"an empty body of {kind}" if kind else "an empty body"


def _media_type(answer: Answer) -> str:
    return str(answer.headers.get("Content-Type", "")).partition(";")[0].strip().lower()
