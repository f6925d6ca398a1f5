"""What STOW-RS services answer, and how much of it the sender believes."""

import json

import pytest
from result_peers import WebServer
from sending import Sent, stow, waiting, web

from serve.node.parcels import Parcel
from serve.node.senders.sender import Delivered, Permanent, Transient
from serve.node.senders.store_response import read_store_response

__all__ = ["waiting", "web"]

NATIVE = "http://dicom.nema.org/PS3.19/models/NativeDICOM"
DOCUMENT_TYPE = b"<!DOCTYPE NativeDicomModel>"


def said(first: int | None, second: int | None) -> bytes:
    """What a service says of the two instances: 0 for taken, None for nothing."""
    taken, failed = [], []
    for uid, reason in (("1.2.1.1", first), ("1.2.1.2", second)):
        item = {"00081155": {"vr": "UI", "Value": [uid]}}
        if reason:
            failed.append(item | {"00081197": {"vr": "US", "Value": [reason]}})
        elif reason == 0:
            taken.append(item)
    return json.dumps({"00081198": {"vr": "SQ", "Value": failed}, "00081199": {"vr": "SQ", "Value": taken}}).encode()


def said_in_xml(first: int | None, second: int | None, *, namespace: str = f'xmlns="{NATIVE}"') -> bytes:
    """The same as a Native DICOM Model (PS3.19 annex A)."""

    def in_xml(model: dict) -> str:
        return "".join(
            f'<DicomAttribute tag="{tag}" vr="{said["vr"]}">{"".join(map(value_in_xml, said["Value"]))}</DicomAttribute>'
            for tag, said in model.items()
        )

    def value_in_xml(value: object) -> str:
        return f"<Item>{in_xml(value)}</Item>" if isinstance(value, dict) else f"<Value>{value}</Value>"

    content = in_xml(json.loads(said(first, second)))
    return f'<?xml version="1.0"?>\n<NativeDicomModel {namespace}>{content}</NativeDicomModel>'.encode()


@pytest.mark.parametrize(
    ("status", "body", "wanted", "confirmed"),
    [
        (200, said(0, 0), Delivered, ["sr.dcm", "sc.dcm"]),
        (200, said(0, None), Transient, ["sr.dcm"]),
        (200, said(None, None), Transient, []),
        (200, said(0, 0xA700), Transient, ["sr.dcm"]),
        (200, b"[" + said(0, None) + b"," + said(None, 0) + b"]", Delivered, ["sr.dcm", "sc.dcm"]),
        (200, said_in_xml(0, 0), Delivered, ["sr.dcm", "sc.dcm"]),
        (200, said_in_xml(0, 0, namespace=""), Delivered, ["sr.dcm", "sc.dcm"]),
        (200, said_in_xml(None, 0), Transient, ["sc.dcm"]),
        (200, b"<NativeDicomModel/>", Transient, []),
        (200, DOCUMENT_TYPE + said_in_xml(0, 0).partition(b"\n")[2], Transient, []),
        (200, said(0, 0)[:-1], Transient, []),
        (201, said(0, 0), Delivered, ["sr.dcm", "sc.dcm"]),
        (201, b"", Transient, []),
        (204, b"", Transient, []),
        (202, b"", Transient, []),
        (202, said_in_xml(0xA900, 0), Permanent, ["sc.dcm"]),
        (202, said(0xA700, 0), Transient, ["sc.dcm"]),
        (202, said(0xA900, 0), Permanent, ["sc.dcm"]),
        (202, said(0xC000, 0xA700), Transient, []),
        (202, said(0x0111, 0xB000), Delivered, ["sr.dcm", "sc.dcm"]),
        (409, said(0x0122, 0x0122), Permanent, []),
        (409, said(0x0110, 0x0110), Transient, []),
        (409, b"", Permanent, []),
        (409, b"[]", Permanent, []),
        (409, said_in_xml(0x0110, 0x0110), Transient, []),
    ],
)
def test_stow_answers_are_read_instance_by_instance(
    web: WebServer, waiting: Parcel, status: int, body: bytes, wanted: type, confirmed: list[str]
) -> None:
    web.script = lambda *_: (status, {"Content-Type": "application/dicom+json"}, body)
    sent = Sent(stow(web.url), waiting)
    assert type(sent.outcome) is wanted
    assert sent.confirmed == confirmed


@pytest.mark.parametrize(
    ("kind", "body", "says"),
    [
        ("text/html; charset=utf-8", b"<!DOCTYPE html><html>Doe^Jane</html>", "text/html"),
        ("text/html", b"<html/>", "text/html"),
        ("text/html", b"", "an empty body of text/html"),
        ("text/plain", b"OK", "text/plain"),
        ("application/json", b'{"status": "ok"}', "application/json"),
        ("application/json", b"null", "application/json"),
        ("application/json", b"[" * 100_000, "application/json"),
        ("application/dicom+json", b"[]", "application/dicom+json"),
        ("application/dicom+xml", b"<a>&b;</a>", "application/dicom+xml"),
        ("Doe^Jane", b"OK", "an unreadable content type"),
        (None, b"OK", "no content type"),
    ],
)
def test_success_that_does_not_say_what_was_stored_is_none(
    web: WebServer, waiting: Parcel, kind: str | None, body: bytes, says: str
) -> None:
    web.script = lambda *_: (200, {"Content-Type": kind} if kind else {}, body)
    sent = Sent(stow(web.url), waiting)
    assert isinstance(sent.outcome, Transient)
    assert sent.outcome.reason == f"answered 200 with {says}, which does not say what was stored; check the URL"
    assert sent.confirmed == []


@pytest.mark.parametrize("kind", [None, "application/dicom", "application/dicom+json", "application/dicom+xml"])
def test_empty_answer_of_a_dicomweb_service_is_believed_and_told_once(
    web: WebServer, waiting: Parcel, kind: str | None, caplog
) -> None:
    web.script = lambda *_: (200, {"Content-Type": kind} if kind else {}, b"")
    sender = stow(web.url)
    for _ in range(2):
        sent = Sent(sender, waiting)
        assert (sent.outcome, sent.confirmed) == (Delivered("200, empty"), ["sr.dcm", "sc.dcm"])
    (told,) = [record.getMessage() for record in caplog.records if record.name == "serve.node.senders.stow"]
    assert told == "destination web: answers 200 with an empty body, which is taken for stored; check the URL"


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (said(0, 0xA900), {"1.2.1.1": 0, "1.2.1.2": 0xA900}),
        (said_in_xml(0, 0xA900), {"1.2.1.1": 0, "1.2.1.2": 0xA900}),
        (said_in_xml(0, None).decode().replace("?>", ' encoding="utf-16"?>').encode("utf-16"), {"1.2.1.1": 0}),
        (b"\xef\xbb\xbf" + said(0, None), {"1.2.1.1": 0}),
        (b"\xef\xbb\xbf" + said_in_xml(0, None), {"1.2.1.1": 0}),
        (said_in_xml(1, None).replace(b">1<", b">0<"), {"1.2.1.1": 0x0110}),
        (said(0, None).replace(b'"00081155": {"vr": "UI", "Value": ["1.2.1.1"]}', b""), {"None": 0}),
        (b'{"00081199": {}}', {}),
        (b'{"00081199": 1}', None),
        (b'{"00081199": {"Value": [1]}}', None),
        (b'{"00081198": {"Value": [{"00081197": {"Value": [Infinity]}}]}}', None),
        (DOCUMENT_TYPE.replace(b">", b' [<!ENTITY a "b">]>') + b"<NativeDicomModel>&a;</NativeDicomModel>", None),
        ((DOCUMENT_TYPE + b"<NativeDicomModel/>").decode().encode("utf-16"), None),
        (b'<?xml version="1.0" encoding="nothing"?><NativeDicomModel/>', None),
        (b"<a>" * 50_000, None),
        (b"", None),
    ],
)
def test_store_response_is_read_or_is_none(body: bytes, wanted: dict[str, int] | None) -> None:
    assert read_store_response(body) == wanted


def test_store_response_that_nests_without_end_is_none() -> None:
    level = b'<DicomAttribute tag="00081199"><Item>', b"</Item></DicomAttribute>"
    nested = b"<NativeDicomModel>" + level[0] * 10_000 + level[1] * 10_000 + b"</NativeDicomModel>"
    assert read_store_response(nested) is None
