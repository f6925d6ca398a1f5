"""An archive that is asked over DICOMweb (PS3.18): by QIDO-RS for what there is, by WADO-RS for the instances.

Time-outs of HTTP are those of one step, and a header may come in a hundred thousand steps: so the connections are cut when the
time is over, under whoever reads from them.
"""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from email.message import Message
from typing import Any, Self

import httpx
from pydicom.dataset import Dataset

from serve.node.deadline import Deadline
from serve.node.prior_query import Archive, ArchiveError, FetchedTooMuchError, Question
from serve.node.priors_settings import PriorsSettings

_DICOM = "application/dicom"
_STUDY_FIELDS = ("IssuerOfPatientID", "PatientBirthDate", "StudyTime", "StudyDescription", "ModalitiesInStudy")
_SERIES_FIELDS = ("SeriesDescription", "BodyPartExamined")
_BYTES_A_MATCH = 16 * 1024
_OK, _NO_CONTENT = 200, 204


class WebArchive(Archive):
    """The archive's web services, for one study's priors.

    Parameters
    ----------
    settings
        Of kind dicomweb.
    tls
        For an address of https.
    token
        Bearer token; None sends none.
    deadline
        When nothing more is read.
    """

    def __init__(self, settings: PriorsSettings, tls: ssl.SSLContext, token: str | None, deadline: Deadline) -> None:
        self._settings, self._deadline = settings, deadline
        self._fetched = 0
        self._connections: list[socket.socket] = []
        self._cutter = threading.Timer(deadline.left(), self._cut)
        self._cutter.daemon = True
        self._client = httpx.Client(
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {token}"} if token else {})},
            # Who is asked for patients' studies is the one who was named: neither a proxy nor whom a redirect names.
            trust_env=False,
            follow_redirects=False,
            verify=tls,
        )

    def __enter__(self) -> Self:
        """Connections come with the first request; see `Archive`."""
        self._deadline.check()
        self._cutter.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Close the connections."""
        self._cutter.cancel()
        self._client.close()
        for connection in self._connections:
            connection.close()

    def studies(self, question: Question) -> list[Dataset]:
        """See `Archive`."""
        day = f"-{question.before - timedelta(days=1):%Y%m%d}"
        return self._found("studies", {"PatientID": question.patient_id, "StudyDate": day}, _STUDY_FIELDS)

    def series(self, study_uid: str) -> list[Dataset]:
        """See `Archive`."""
        return self._found(f"studies/{study_uid}/series", {}, _SERIES_FIELDS)

    def instances(self, study_uid: str, series_uid: str) -> Iterator[bytes]:
        """See `Archive`."""
        accept = f'multipart/related; type="{_DICOM}"; transfer-syntax=*'
        address = f"studies/{study_uid}/series/{series_uid}"
        headers, body = self._asked(address, None, accept, self._settings.max_bytes - self._fetched)
        self._fetched += len(body)
        yield from parts(body, headers.get("content-type", ""))

    def _found(self, address: str, given: dict[str, str], fields: tuple[str, ...]) -> list[Dataset]:
        most = self._settings.max_matches
        query = httpx.QueryParams({**given, "includefield": list(fields), "limit": str(most)})
        _, body = self._asked(address, query, "application/dicom+json", most * _BYTES_A_MATCH)
        if not body:
            return []
        try:
            matches = json.loads(body)
            found = [Dataset.from_json(match) for match in matches[:most]]
        # What the archive writes into a value, pydicom may refuse in any way.
        except Exception as error:  # noqa: BLE001
            raise ArchiveError(f"QIDO-RS answered no DICOM JSON ({type(error).__name__})") from None
        return found

    def _asked(self, address: str, query: httpx.QueryParams | None, accept: str, most: int) -> tuple[httpx.Headers, bytes]:
        self._deadline.check()
        body = bytearray()
        url = f"{str(self._settings.url).rstrip('/')}/{address}"
        try:
            with self._client.stream(
                "GET",
                url,
                params=query,
                headers={"Accept": accept},
                timeout=self._deadline.left(),
                extensions={"trace": self._traced},
            ) as response:
                if response.status_code == _NO_CONTENT:
                    return response.headers, b""
                if response.status_code != _OK:
                    raise ArchiveError(f"HTTP {response.status_code}")
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > most:
                        raise FetchedTooMuchError
                    self._deadline.check()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            self._deadline.check()
            raise ArchiveError(f"no answer ({type(error).__name__})") from None
        return response.headers, bytes(body)

    def _traced(self, event: str, said: dict[str, Any]) -> None:
        """Keep a handle on each connection, which TLS does not take along."""
        if event == "connection.connect_tcp.complete":
            self._connections.append(said["return_value"].get_extra_info("socket").dup())
            if not self._deadline.left():
                self._cut()

    def _cut(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def parts(body: bytes, content_type: str) -> Iterator[bytes]:
    """The bodies of a multipart/related message (RFC 2387, RFC 2046 section 5.1.1).

    Raises
    ------
    ArchiveError
        When it is none, or breaks off.
    """
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_param("boundary")
    if header.get_content_type() != "multipart/related" or not isinstance(boundary, str) or not boundary:
        raise ArchiveError("WADO-RS answered no multipart/related")
    between = b"\r\n--" + boundary.encode("latin-1", "replace")
    # The first delimiter may stand at the very beginning; what precedes it means nothing.
    _, *pieces = (b"\r\n" + body).split(between)
    if not pieces or not pieces[-1].startswith(b"--"):
        raise ArchiveError("WADO-RS answered a message that breaks off")
    for piece in pieces[:-1]:
        _, separator, content = piece.partition(b"\r\n\r\n")
        if not separator:
            raise ArchiveError("WADO-RS answered a part without content")
        yield content
