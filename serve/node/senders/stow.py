"""Results to a DICOMweb service by STOW-RS (PS3.18 section 10.5): what is left of a parcel in one request.

A service that takes some instances and refuses others says so instance by instance; what it took is confirmed, and each
refusal is judged as a C-STORE status is, for it is the same list of reasons. An instance that the answer does not name was
not taken, whatever the status says.
"""

import json
import uuid
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, cast

from serve.node.destinations import StowDestination
from serve.node.parcels import DICOM, Parcel
from serve.node.senders.c_store import Instance, read_instance
from serve.node.senders.http import Answer, HttpPeer, http_outcome
from serve.node.senders.sender import Delivered, Outcome, Permanent, Transient
from serve.node.senders.statuses import storage_outcome

_PIECE = 256 * 1024
_FAILED, _REFERENCED = "00081198", "00081199"
_INSTANCE, _REASON = "00081155", "00081197"


class StowSender:
    """Sends the DICOM items of parcels by STOW-RS.

    Raises
    ------
    UsageError
        When the certificates that the settings name cannot be read.
    """

    def __init__(self, destination: StowDestination) -> None:
        self._url = f"{destination.url.rstrip('/')}/studies"
        self._peer = HttpPeer(destination)

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
        return answer if isinstance(answer, Transient) else _outcome(answer, instances, confirm)

    def rest(self, interrupted: Callable[[], bool]) -> None:
        """See `Sender`."""

    def abort(self) -> None:
        """See `Sender`."""
        self._peer.close()


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


def _outcome(answer: Answer, instances: dict[str, Instance], confirm: Callable[[str], None]) -> Outcome:
    said = _said(answer) if answer.status in {200, 202, 409} else None
    if said is None or (answer.status == 409 and not said):
        outcome = http_outcome(answer)
        if answer.status == 202:
            return Transient("answered 202, and not what it took")
        if isinstance(outcome, Delivered):
            for name in instances:
                confirm(name)
        return outcome
    judged: list[Outcome] = []
    for name, instance in instances.items():
        reason = said.get(instance.sop_instance_uid)
        outcome = Transient(f"answered {answer.status} without naming it") if reason is None else storage_outcome(reason)
        if isinstance(outcome, Delivered):
            confirm(name)
        else:
            judged.append(type(outcome)(f"{name}: {outcome.reason}"))
    # What waiting helps is tried first; the rest is refused again after that, and dead then.
    passing = next((outcome for outcome in judged if isinstance(outcome, Transient)), None)
    return passing or next(iter(judged), Delivered(str(answer.status)))


def _said(answer: Answer) -> dict[str, int] | None:
    """Reason by SOP Instance UID, 0 for what was taken (PS3.18 section 10.5.3); None where the answer says neither in JSON."""
    try:
        content = json.loads(answer.body)
        content = content[0] if isinstance(content, list) else content
        if _FAILED not in content and _REFERENCED not in content:
            return None
        said = {str(_value(item, _INSTANCE)): 0x0000 for item in _items(content, _REFERENCED)}
        failed = _items(content, _FAILED)
        return said | {str(_value(item, _INSTANCE)): int(cast(Any, _value(item, _REASON)) or 0x0110) for item in failed}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _items(content: dict[str, dict[str, Any]], tag: str) -> list[dict[str, dict[str, list[object]]]]:
    return content.get(tag, {}).get("Value") or []


def _value(item: dict[str, dict[str, list[object]]], tag: str) -> object:
    return (item.get(tag, {}).get("Value") or [None])[0]
