"""STOW-RS: studies as PACS and modalities send them over HTTP (PS3.18 section 10.5)."""

import asyncio
from email.message import Message
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from cxr_ray.errors import CxrRayError
from serve.http.access import Writer
from serve.http.problems import UPLOADING, ApiProblem, problems
from serve.http.services import Services, Serving
from serve.instance_names import InstanceNames, instance_names
from serve.intake import Arrival
from serve.node.storage import StoreRefused
from serve.spooled_intake import SpooledIntake

router = APIRouter(tags=["dicomweb"])
DICOM_JSON = "application/dicom+json"
_DICOM = "application/dicom"
# PS3.4 table B.2-1 and PS3.3 section C.14.1.1: Failure Reason (0008,1197).
_REASON_OF_STATUS = {400: 0xC000, 409: 0x0111, 413: 0xC101, 415: 0xC000, 422: 0xA900, 503: 0xA700}
_PROCESSING_FAILURE = 0x0110


class _Parts:
    """The bodies of a multipart message, with their content types."""

    def __init__(self, boundary: str) -> None:
        self.parts: list[tuple[str, bytearray]] = []
        self._field = self._value = b""
        self.whole = False
        self.parser = MultipartParser(
            boundary.encode("latin-1"),
            {
                "on_part_begin": lambda: self.parts.append(("", bytearray())),
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_part_data": lambda data, start, end: self.parts[-1][1].extend(memoryview(data)[start:end]),
                "on_end": self._on_end,
            },
        )

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        if self._field.lower() == b"content-type":
            self.parts[-1] = (self._value.decode("latin-1"), self.parts[-1][1])
        self._field = self._value = b""

    def _on_end(self) -> None:
        self.whole = True


@router.post(
    "/dicom-web/studies",
    responses=UPLOADING | problems(409) | {200: {"content": {DICOM_JSON: {}}}, 202: {"description": "some were refused"}},
    response_class=JSONResponse,
    summary="Store instances (STOW-RS)",
    openapi_extra={"requestBody": {"content": {'multipart/related; type="application/dicom"': {}}, "required": True}},
)
async def store_instances(request: Request, serving: Serving, _actor: Writer) -> JSONResponse:
    """Answer and keep every instance; the response says which were, and why the others were not.

    Beside a DICOM node, the instances go into its spool: kept durably now, answered soon, and their results delivered.
    """
    return await _stored(request, serving, None)


@router.post(
    "/dicom-web/studies/{study_uid}",
    responses=UPLOADING | problems(409) | {200: {"content": {DICOM_JSON: {}}}, 202: {"description": "some were refused"}},
    response_class=JSONResponse,
    summary="Store instances of one study (STOW-RS)",
    openapi_extra={"requestBody": {"content": {'multipart/related; type="application/dicom"': {}}, "required": True}},
)
async def store_study(
    request: Request, serving: Serving, _actor: Writer, study_uid: Annotated[str, Path(max_length=64)]
) -> JSONResponse:
    """Answer and keep every instance of one study; instances of others are refused."""
    return await _stored(request, serving, study_uid)


async def _stored(request: Request, serving: Services, study_uid: str | None) -> JSONResponse:
    instances = await _instances(request)
    most = serving.settings.max_images
    if len(instances) > most:
        raise ApiProblem(413, f"{len(instances)} instances were sent; send {most} a request")
    address = request.client.host if request.client else ""
    outcomes = await asyncio.gather(*(_outcome(serving, data, study_uid, address) for data in instances))
    kept = [entry for stored, entry in outcomes if stored]
    refused = [entry for stored, entry in outcomes if not stored]
    answer: dict[str, object] = {}
    if kept:
        answer["00081199"] = {"vr": "SQ", "Value": kept}
    if refused:
        answer["00081198"] = {"vr": "SQ", "Value": refused}
    # PS3.18 table 10.5.3-1: 200 all stored, 202 some, 409 none.
    status = 200 if not refused else 202 if kept else 409
    # Those who could come again make it worth the while: what failed for want of room is not a conflict.
    reasons = {entry["00081197"]["Value"][0] for entry in refused}
    if not kept and reasons == {_REASON_OF_STATUS[503]}:
        status = 503
    headers = {"Retry-After": "2"} if status == 503 else None
    return JSONResponse(answer, status, headers, media_type=DICOM_JSON)


async def _instances(request: Request) -> list[bytes]:
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    boundary, kind = header.get_param("boundary"), header.get_param("type", _DICOM)
    if header.get_content_type() != "multipart/related" or not isinstance(boundary, str) or kind != _DICOM:
        given = request.headers.get("content-type", "")[:80]
        raise ApiProblem(415, f'the content type is {given!r}; send multipart/related; type="application/dicom"; boundary=...')
    parts = _Parts(boundary)
    try:
        async for chunk in request.stream():
            parts.parser.write(chunk)
        parts.parser.finalize()
    except MultipartParseError:
        parts.whole = False
    if not parts.whole or not parts.parts:
        raise ApiProblem(400, "the multipart message is cut off or holds no part; send it again")
    for number, (kind, _) in enumerate(parts.parts, 1):
        if kind.partition(";")[0].strip().lower() not in {"", _DICOM}:
            raise ApiProblem(415, f"part {number} is {kind[:60]!r}; send application/dicom")
    return [bytes(content) for _, content in parts.parts]


async def _outcome(serving: Services, data: bytes, study_uid: str | None, address: str) -> tuple[bool, dict]:
    """Whether an instance was kept, and its item in the response."""
    if serving.spooled is not None:
        return await asyncio.to_thread(_spooled, serving.spooled, data, study_uid, address)
    try:
        names, _ = await serving.intake.keep(data, Arrival(study_instance_uid=study_uid))
    except ApiProblem as problem:
        item = await asyncio.to_thread(_item_of, data)
        reason = _REASON_OF_STATUS.get(problem.status_code, _PROCESSING_FAILURE)
        item["00081197"] = {"vr": "US", "Value": [reason]}
        return False, item
    # Retrieve URL, type 2: instances are not given back here.
    return True, {**_references(names), "00081190": {"vr": "UR"}}


def _spooled(intake: SpooledIntake, data: bytes, study_uid: str | None, address: str) -> tuple[bool, dict]:
    item = _item_of(data)
    try:
        intake.take(data, study_uid=study_uid, address=address)
    except StoreRefused as refusal:
        return False, {**item, "00081197": {"vr": "US", "Value": [refusal.status]}}
    return True, {**item, "00081190": {"vr": "UR"}}


def _item_of(data: bytes) -> dict:
    try:
        return _references(instance_names(data))
    except (CxrRayError, OSError):
        return {}


def _references(names: InstanceNames) -> dict:
    return {
        "00081150": {"vr": "UI", "Value": [names.sop_class_uid]},
        "00081155": {"vr": "UI", "Value": [names.sop_instance_uid]},
    }
