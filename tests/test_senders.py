"""Senders against real peers: pynetdicom, DCMTK and Orthanc over sockets and TLS, and HTTP servers that answer as scripted."""

import hashlib
import hmac
import json
import logging
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pydicom
import pytest
from conftest import peer_environment, require_program
from pydantic import TypeAdapter
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from result_peers import (
    SCP_TITLE,
    SECONDARY_CAPTURE,
    SR_3D,
    TIMEOUTS,
    StorageScp,
    WebServer,
    answering,
    certificate,
    destination,
    dicom_file,
    lying_in,
    open_descriptors,
    orthanc,
    parcel,
    read_part,
    silent_server,
    stored,
    stored_uids,
    until,
)

from cxr_ray.errors import UsageError
from cxr_ray.settings import Settings, load_settings
from serve.node.destinations import DeliverySettings, Destination
from serve.node.parcels import Item, Parcel, StudyOrigin
from serve.node.senders import sender_for
from serve.node.senders.association import Association, decode_command, encode_command
from serve.node.senders.sender import Delivered, Outcome, Permanent, Sender, Transient
from serve.node.senders.statuses import storage_outcome
from serve.node.senders.store_response import read_store_response
from serve.node.senders.upper_layer import Context, Peer, PeerGoneError, RejectedError

BOTH = {"1.2.1.1": 1, "1.2.1.2": 1}
NATIVE = "http://dicom.nema.org/PS3.19/models/NativeDICOM"
DOCUMENT_TYPE = b"<!DOCTYPE NativeDicomModel>"


def settings_of(**given: object) -> Destination:
    return TypeAdapter(Destination).validate_python(given)


def sender_of(**given: object) -> Sender:
    return sender_for(settings_of(**given), lambda *_: 0x0000, lambda: False)


def dicom(port: int, **given: object) -> Sender:
    return sender_of(**destination(port, **given))


class Sent:
    """What came of sending a parcel: the outcome and what was confirmed."""

    def __init__(self, sender: Sender, sent: Parcel, confirmed: frozenset[str] = frozenset()) -> None:
        self.confirmed: list[str] = []
        self.outcome: Outcome = sender.send(sent, confirmed, self.confirmed.append)
        sender.rest(lambda: False)


@pytest.fixture
def waiting(tmp_path: Path) -> Parcel:
    return lying_in(tmp_path / "parcel", parcel())


@pytest.fixture
def scp() -> Iterator[Callable[..., StorageScp]]:
    started: list[StorageScp] = []

    def start(**given: object) -> StorageScp:
        started.append(StorageScp(**given).start())
        return started[-1]

    yield start
    for server in started:
        server.stop_soon()


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    yield server
    server.stop()


def test_instances_arrive_and_are_confirmed_one_by_one(scp, waiting: Parcel) -> None:
    server = scp()
    sent = Sent(dicom(server.port, calling_ae="NODE"), waiting)
    assert sent.outcome == Delivered("0x0000")
    assert sent.confirmed == ["sr.dcm", "sc.dcm"]
    assert (server.times, server.callers, server.associations) == (BOTH, {"NODE"}, 1)


def test_one_association_carries_several_parcels_and_ends_when_there_is_nothing(scp, tmp_path: Path) -> None:
    server = scp()
    sender = dicom(server.port)
    before = open_descriptors()
    for name in "123":
        made = lying_in(tmp_path / name, parcel(name))
        assert isinstance(sender.send(made, frozenset(), lambda _: None), Delivered)
    assert server.associations == 1
    sender.rest(lambda: False)
    until(lambda: open_descriptors() <= before)
    assert isinstance(sender.send(lying_in(tmp_path / "4", parcel("4")), frozenset(), lambda _: None), Delivered)
    sender.rest(lambda: False)
    assert server.associations == 2


def test_what_is_confirmed_is_not_sent_again(scp, waiting: Parcel) -> None:
    server = scp()
    sender = dicom(server.port)
    assert Sent(sender, waiting, frozenset({"sr.dcm"})).confirmed == ["sc.dcm"]
    assert server.times == {"1.2.1.2": 1}
    assert isinstance(Sent(sender, waiting, frozenset({"sr.dcm", "sc.dcm"})).outcome, Delivered)
    assert server.associations == 1


def test_peer_of_implicit_vr_gets_the_same_content(scp, waiting: Parcel) -> None:
    server = scp(syntaxes=(ImplicitVRLittleEndian,))
    assert isinstance(Sent(dicom(server.port), waiting).outcome, Delivered)
    assert (server.times, server.patients) == (BOTH, {"Doe^Jane"})


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (0x0000, Delivered),
        (0xB000, Delivered),
        (0xB007, Delivered),
        (0x0111, Delivered),
        (0xA700, Transient),
        (0x0110, Transient),
        (0x0213, Transient),
        (0xA900, Permanent),
        (0xC000, Permanent),
        (0x0122, Permanent),
        (0x0124, Permanent),
    ],
)
def test_status_decides(scp, waiting: Parcel, status: int, wanted: type) -> None:
    server = scp(script=lambda uid, _: status if uid.endswith(".1") else 0x0000)
    sent = Sent(dicom(server.port), waiting)
    assert type(sent.outcome) is wanted
    if wanted is not Delivered:
        assert f"sr.dcm: refused with 0x{status:04X}" in sent.outcome.reason
    # What is refused for good does not keep the other from the reader; what may pass is waited for, in order.
    assert sent.confirmed == {Delivered: ["sr.dcm", "sc.dcm"], Permanent: ["sc.dcm"], Transient: []}[wanted]


def test_every_status_means_something() -> None:
    kinds = {status: type(storage_outcome(status)) for status in range(0x10000)}
    assert {kinds[status] for status in range(0xA700, 0xA800)} == {Transient}
    assert {kinds[status] for status in range(0xC000, 0xD000)} == {Permanent}
    assert {kinds[status] for status in range(0xB000, 0xC000)} == {Delivered}
    assert kinds[0xFE00] is kinds[0x1234] is Transient


def test_refused_class_is_for_good_and_the_other_goes(scp, waiting: Parcel) -> None:
    sent = Sent(dicom(scp(classes=(SECONDARY_CAPTURE,)).port), waiting)
    assert sent.outcome == Permanent(f"sr.dcm: presentation context refused: SOP class {SR_3D}")
    assert sent.confirmed == ["sc.dcm"]


def test_wrong_title_is_for_good(scp, waiting: Parcel) -> None:
    sent = Sent(dicom(scp().port, called_ae="OTHER"), waiting)
    assert sent.outcome == Permanent("association rejected permanently: called AE title not recognised")


@pytest.mark.parametrize(
    ("result", "source", "reason", "lasting"),
    [
        (1, 1, 2, True),
        (1, 1, 3, True),
        (1, 1, 7, True),
        (1, 2, 2, True),
        (1, 1, 1, False),
        (1, 3, 1, False),
        (2, 1, 3, False),
        (2, 1, 7, False),
        (2, 3, 1, False),
        (2, 3, 2, False),
    ],
)
def test_rejections_are_told_apart(result: int, source: int, reason: int, lasting: bool) -> None:
    assert RejectedError(result, source, reason).lasting is lasting


def accepted(contexts: int = 4, largest: int = 16384) -> bytes:
    items = b"".join(
        struct.pack(">BxH4B", 0x21, 8 + len(syntax), 2 * number + 1, 0, 0, 0) + struct.pack(">BxH", 0x40, len(syntax)) + syntax
        for number, syntax in enumerate([b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1"] * (contexts // 2))
    )
    user = struct.pack(">BxHBxHL", 0x50, 8, 0x51, 4, largest)
    body = struct.pack(">HH16s16s32x", 1, 0, b"A", b"B") + items + user
    return struct.pack(">BxL", 2, len(body)) + body


@pytest.mark.parametrize(
    ("answers", "says", "whole"),
    [
        ((), "it did not answer in time", True),
        ((struct.pack(">BxLxBBB", 3, 4, 2, 3, 2),), "local limit exceeded", True),
        ((struct.pack(">BxLxBBB", 3, 4, 1, 1, 1),), "no reason given", True),
        ((struct.pack(">BxLL", 7, 4, 0),), "aborted the negotiation", True),
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), "PDU that is too long", True),
        ((b"\x02\x00\x00\x00\x00\x03abc",), "something else", True),
        ((struct.pack(">BxL", 2, 100) + b"\x00" * 68 + b"\x21\x00\xff\xff" + b"\x00" * 28,), "malformed", True),
        ((accepted(),), "it did not answer in time", False),
        ((accepted(), struct.pack(">BxLL", 7, 4, 0)), "aborted the association", False),
        ((accepted(), struct.pack(">BxLL", 5, 4, 0)), "released the association", False),
        ((accepted(), b"\x04\x00\x00\x00\x00\x0a\x00\x00\xff\xff\x01\x03abcd"), "malformed PDU", False),
        ((accepted(), b"\x04\x00\x00\x00\x00\x0a\x00\x00\x00\x06\x01\x03abcd"), "malformed command", False),
        ((accepted(), b"\x04\x00\x7f\xff\xff\xff"), "PDU that is too long", False),
        ((accepted(), b"\x04\x00\x00\x00"), "it did not answer in time", False),
    ],
)
def test_peer_that_hangs_or_misbehaves_is_left(waiting: Parcel, answers: tuple[bytes, ...], says: str, whole: bool) -> None:
    with answering(*answers) as server:
        timeouts = {**TIMEOUTS, "negotiation_seconds": 0.5, "response_seconds": 0.5}
        begun = time.monotonic()
        sent = Sent(dicom(server.getsockname()[1], timeouts=timeouts), waiting)
        assert time.monotonic() - begun < 10
        assert isinstance(sent.outcome, Transient), sent.outcome
        assert says in sent.outcome.reason
        assert sent.outcome.whole_destination is whole
        assert sent.confirmed == []


def test_peer_that_takes_no_bytes_is_left(tmp_path: Path) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def serve() -> None:
        connection, _ = server.accept()
        taken.append(connection)
        connection.recv(65536)
        connection.sendall(accepted(2))

    threading.Thread(target=serve, daemon=True).start()
    large = lying_in(tmp_path, parcel(items=(Item("sr.dcm", dicom_file("1.2.1.1", SR_3D, size=30_000_000)),)))
    sent = Sent(dicom(server.getsockname()[1], timeouts={**TIMEOUTS, "send_seconds": 0.5}), large)
    assert sent.outcome == Transient("association lost: it did not take what was sent in time")
    server.close()
    taken[0].close()


def test_peer_that_is_not_there_is_the_whole_destinations_trouble(free_port, waiting: Parcel) -> None:
    for given in (dict(host="127.0.0.1"), dict(host="no-such-host.invalid")):
        outcome = Sent(dicom(free_port(), **given), waiting).outcome
        assert isinstance(outcome, Transient)
        assert outcome.whole_destination
        assert "cannot be reached" in outcome.reason


def test_association_that_ends_between_parcels_is_opened_anew(scp, tmp_path: Path) -> None:
    server = scp()
    sender = dicom(server.port)
    assert isinstance(sender.send(lying_in(tmp_path / "1", parcel("1")), frozenset(), lambda _: None), Delivered)
    server.stop()
    outcome = sender.send(lying_in(tmp_path / "2", parcel("2")), frozenset(), lambda _: None)
    assert isinstance(outcome, Transient)
    server.start()
    assert isinstance(Sent(sender, lying_in(tmp_path / "2", parcel("2"))).outcome, Delivered)


def test_abort_ends_a_wait_from_another_thread(scp, waiting: Parcel) -> None:
    server = scp(answers_in=3)
    sender = dicom(server.port, timeouts={**TIMEOUTS, "response_seconds": 60})
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(Sent(sender, waiting).outcome))
    thread.start()
    until(lambda: server.times)
    sender.abort()
    thread.join(2)
    assert not thread.is_alive()
    assert isinstance(outcomes[0], Transient)


def test_what_is_no_dicom_file_is_for_good(free_port, tmp_path: Path) -> None:
    for content in (b"", b"x" * 300, b"\x00" * 128 + b"DICM" + b"\x02\x00\x00\x00UL\x04\x00\xff\xff\xff\x7f" + b"\x00" * 30):
        made = lying_in(tmp_path, parcel(items=(Item("sr.dcm", content),)))
        assert Sent(dicom(free_port()), made).outcome == Permanent("sr.dcm is no DICOM file")
    summary = lying_in(tmp_path, parcel(items=(Item("summary.json", b"{}"),)))
    assert isinstance(Sent(dicom(free_port()), summary).outcome, Permanent)


def test_no_identity_is_logged(scp, waiting: Parcel, caplog) -> None:
    with caplog.at_level(logging.DEBUG):
        Sent(dicom(scp().port), waiting)
        Sent(dicom(scp(script=lambda *_: 0xC000).port), waiting)
    assert "Doe" not in caplog.text.replace("pynetdicom", "")


def test_commands_survive_their_encoding() -> None:
    command = {0x0002: b"1.2.3\x00", 0x0100: b"\x01\x00", 0x0800: b"\x01\x00"}
    encoded = encode_command(command)
    assert {element: value for element, value in decode_command(encoded).items() if element} == command
    for cut in range(1, len(encoded)):
        try:
            decode_command(encoded[:cut])
        except PeerGoneError:
            continue
        assert cut in {12, 26, 36}


def test_too_many_contexts_are_refused_before_the_peer_sees_them(scp) -> None:
    peer = Peer("127.0.0.1", scp().port, SCP_TITLE, "NODE")
    contexts = [Context(f"1.2.{number}", ExplicitVRLittleEndian) for number in range(129)]
    with pytest.raises(ValueError, match="129 presentation contexts"):
        Association(peer, contexts, settings_of(kind="sender", default_port=104).timeouts).request()


@pytest.mark.system
def test_echo_and_storage_with_dcmtk(free_port, tmp_path: Path, waiting: Parcel) -> None:
    port = free_port()
    with DcmtkScp(port, tmp_path / "received", "-pdu", "4096"):
        verification = Context("1.2.840.10008.1.1", ImplicitVRLittleEndian)
        timeouts = settings_of(kind="sender", default_port=104).timeouts
        association = Association(Peer("127.0.0.1", port, SCP_TITLE, "NODE"), [verification], timeouts)
        association.request()
        assert association.c_echo(verification) == 0x0000
        association.release()
        assert Sent(dicom(port), waiting).outcome == Delivered("0x0000")
        received = sorted((tmp_path / "received").iterdir())
        assert sorted(pydicom.dcmread(path).SOPInstanceUID for path in received) == ["1.2.1.1", "1.2.1.2"]
        for path, item in zip(received, reversed(waiting.items), strict=True):
            got, sent = pydicom.dcmread(path), pydicom.dcmread(item.content)
            assert got == sent or got == pydicom.dcmread(waiting.items[0].content)


@pytest.mark.system
@pytest.mark.parametrize(
    ("option", "wanted", "says"),
    [
        ("--refuse", Transient, "association rejected permanently: no reason given"),
        ("--abort-after", Transient, "aborted the association"),
        ("--abort-during", Transient, "association lost"),
    ],
)
def test_dcmtk_that_refuses_and_aborts(
    free_port, tmp_path: Path, waiting: Parcel, option: str, wanted: type, says: str
) -> None:
    port = free_port()
    with DcmtkScp(port, tmp_path / "received", option):
        sent = Sent(dicom(port), waiting)
    assert type(sent.outcome) is wanted
    assert says in sent.outcome.reason
    assert sent.confirmed == []


@pytest.mark.system
def test_tls_with_dcmtk_and_what_is_wrong_with_it(free_port, tmp_path: Path, waiting: Parcel) -> None:
    ca, other = certificate(tmp_path, "ca"), certificate(tmp_path, "other-ca")
    ours, theirs = certificate(tmp_path, "ours", ca), certificate(tmp_path, "theirs", ca)
    stranger = certificate(tmp_path, "stranger", other)
    port = free_port()
    mutual = {"certificate": ours[0], "key": ours[1]}
    # DCMTK wants a certificate of ours, signed by an authority that it trusts.
    with DcmtkScp(port, tmp_path / "received", "+tls", theirs[1], theirs[0], "+cf", ca[0]):
        assert Sent(dicom(port, tls={"ca": ca[0], **mutual}), waiting).outcome == Delivered("0x0000")
        for wrong, says in (
            ({"ca": other[0], **mutual}, "its certificate"),
            ({"ca": ca[0], **mutual, "server_name": "elsewhere"}, "its certificate"),
            ({"ca": ca[0]}, "no association"),
            ({"ca": ca[0], "certificate": stranger[0], "key": stranger[1]}, "no association"),
        ):
            outcome = Sent(dicom(port, tls=wrong), waiting).outcome
            assert isinstance(outcome, Transient), (wrong, outcome)
            assert outcome.whole_destination
            assert says in outcome.reason
        not_named = {"ca": ca[0], **mutual, "server_name": "elsewhere", "check_name": False}
        assert Sent(dicom(port, tls=not_named), waiting).outcome == Delivered("0x0000")
        # Plain text to a port of TLS.
        assert isinstance(Sent(dicom(port), waiting).outcome, Transient)


def test_tls_with_pynetdicom_and_a_silent_peer(scp, tmp_path: Path, waiting: Parcel) -> None:
    ca = certificate(tmp_path, "ca")
    theirs = certificate(tmp_path, "theirs", ca)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*theirs)
    assert Sent(dicom(scp(tls=context).port, tls={"ca": ca[0]}), waiting).outcome == Delivered("0x0000")
    with silent_server() as port:
        outcome = Sent(dicom(port, tls={"ca": ca[0]}, timeouts={**TIMEOUTS, "connect_seconds": 0.5}), waiting).outcome
    assert outcome == Transient("no association: no TLS with it (no answer in time)", whole_destination=True)
    # TLS to a port of plain text.
    assert isinstance(Sent(dicom(scp().port, tls={"ca": ca[0]}), waiting).outcome, Transient)


@pytest.mark.parametrize(
    ("tls", "says"),
    [
        ({"ca": "missing.pem"}, "destination pacs: tls: ca .*missing.pem: No such file"),
        ({"ca": "junk.pem"}, "destination pacs: tls: ca .*junk.pem: .*name a PEM file with certificates"),
        ({"certificate": "missing.pem"}, "destination pacs: tls: certificate .*No such file"),
    ],
)
def test_certificate_that_cannot_be_read_is_named(tmp_path: Path, tls: dict[str, str], says: str) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(UsageError, match=says):
        dicom(104, tls={name: tmp_path / value for name, value in tls.items()})


def test_results_go_back_to_whoever_sent_the_study(scp, tmp_path: Path) -> None:
    first, second = scp(titles=["CT1"]), scp(titles=["CR2"])
    sender = sender_of(kind="sender", peers={"CT1": first.port, "CR2": f"localhost:{second.port}"}, timeouts=TIMEOUTS)
    for title, address, name in (("CT1", "127.0.0.1", "1"), ("CR2", "10.9.9.9", "2"), ("CT1", "127.0.0.1", "1")):
        made = lying_in(tmp_path, parcel(name, origin=StudyOrigin(calling_ae=title, address=address)))
        assert isinstance(sender.send(made, frozenset(), lambda _: None), Delivered)
    sender.rest(lambda: False)
    assert (first.times["1.2.1.1"], second.times["1.2.2.1"]) == (2, 1)
    stranger = lying_in(tmp_path, parcel(origin=StudyOrigin(calling_ae="MR3", address="127.0.0.1")))
    assert Sent(sender, stranger).outcome == Permanent("the settings name no port for 'MR3', which sent the study")
    assert isinstance(Sent(sender, lying_in(tmp_path, parcel())).outcome, Permanent)


def stow(url: str, **given: object) -> Sender:
    return sender_of(**dict(kind="stow", name="web", url=url, connect_seconds=5, timeout_seconds=5) | given)


def webhook(url: str, **given: object) -> Sender:
    return sender_of(**dict(kind="webhook", name="hook", url=url, connect_seconds=5, timeout_seconds=5) | given)


@pytest.fixture
def summary(tmp_path: Path) -> Parcel:
    return lying_in(tmp_path / "summary", parcel(items=(Item("summary.json", b'{"study": 1}'),)))


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


def test_stow_sends_all_in_one_request(web: WebServer, waiting: Parcel, tmp_path: Path) -> None:
    web.script = stored
    (tmp_path / "token").write_text("secret-1\n")
    sent = Sent(stow(f"{web.url}/dicom-web/", token_file=tmp_path / "token"), waiting)
    assert sent.outcome == Delivered("200")
    assert sent.confirmed == ["sr.dcm", "sc.dcm"]
    (request,) = web.requests
    assert request.path == "/dicom-web/studies"
    assert request.headers["authorization"] == "Bearer secret-1"
    assert request.headers["content-type"].startswith('multipart/related; type="application/dicom"; boundary=')
    assert [instance.SOPInstanceUID for instance in read_part(request.body)] == ["1.2.1.1", "1.2.1.2"]
    # A token that was changed counts with the next request.
    (tmp_path / "token").write_text("secret-2")
    sender = stow(web.url, token_file=tmp_path / "token")
    Sent(sender, waiting, frozenset({"sr.dcm"}))
    assert [instance.SOPInstanceUID for instance in read_part(web.requests[1].body)] == ["1.2.1.2"]
    assert web.requests[1].headers["authorization"] == "Bearer secret-2"


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


@pytest.mark.parametrize("status", [400, 405, 406, 410, 413, 415, 422])
def test_http_verdicts_are_for_good(web: WebServer, waiting: Parcel, status: int) -> None:
    web.script = lambda *_: (status, {}, b"Doe^Jane is unknown")
    assert Sent(stow(web.url), waiting).outcome == Permanent(f"answered {status}", "Doe^Jane is unknown")


@pytest.mark.parametrize(
    ("status", "whole"),
    [(301, True), (307, True), (401, True), (403, True), (404, True), (429, True), (503, True), (408, False), (500, False)],
)
def test_http_weather_passes(web: WebServer, waiting: Parcel, status: int, whole: bool) -> None:
    web.script = lambda *_: (status, {"Location": f"{web.url}/elsewhere"}, b"")
    outcome = Sent(stow(web.url), waiting).outcome
    assert outcome == Transient(f"answered {status}", whole_destination=whole)
    assert len(web.requests) == 1


@pytest.mark.parametrize("form", ["seconds", "date", "junk"])
def test_retry_after_is_told(web: WebServer, summary: Parcel, form: str) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    value = {"seconds": "100", "date": date, "junk": "soon"}[form]
    web.script = lambda *_: (503, {"Retry-After": value}, b"")
    outcome = Sent(webhook(web.url), summary).outcome
    assert 90 <= outcome.retry_after <= 100 if form != "junk" else outcome.retry_after == 0


def test_webhook_is_signed_and_repeats_its_key(web: WebServer, summary: Parcel, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hush\n")
    sender = webhook(f"{web.url}/hook", hmac_secret_file=tmp_path / "secret")
    web.script = lambda _, turn: (500 if turn == 1 else 204, {}, b"")
    assert isinstance(Sent(sender, summary).outcome, Transient)
    sent = Sent(sender, summary)
    assert (sent.outcome, sent.confirmed) == (Delivered("204"), ["summary.json"])
    first, second = web.requests
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"] == summary.id
    assert (second.path, second.body, second.headers["content-type"]) == ("/hook", b'{"study": 1}', "application/json")
    signed = second.headers["x-cxr-ray-timestamp"].encode() + b"." + second.body
    wanted = hmac.new(b"hush", signed, hashlib.sha256).hexdigest()
    assert second.headers["x-cxr-ray-signature"] == f"sha256={wanted}"
    assert abs(int(second.headers["x-cxr-ray-timestamp"]) - time.time()) < 60


def test_webhook_that_is_busy_with_the_same_key_is_asked_again(web: WebServer, summary: Parcel) -> None:
    web.script = lambda *_: (409, {}, b"")
    assert Sent(webhook(web.url), summary).outcome == Transient("answered 409")


def test_credential_that_cannot_be_read_waits_and_is_named(web: WebServer, summary: Parcel, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "lines").write_text("a\nb")
    for name in ("missing", "empty", "lines"):
        for setting in ("token_file", "hmac_secret_file"):
            outcome = Sent(webhook(web.url, **{setting: tmp_path / name}), summary).outcome
            assert isinstance(outcome, Transient)
            assert outcome.whole_destination
            assert f"{setting} {tmp_path / name}:" in outcome.reason
    assert web.requests == []


def test_web_server_that_hangs_drips_or_is_not_there_is_left(free_port, summary: Parcel, tmp_path: Path) -> None:
    with silent_server() as port:
        outcome = Sent(webhook(f"http://127.0.0.1:{port}", timeout_seconds=0.5), summary).outcome
    assert outcome == Transient("it did not answer in time")
    outcome = Sent(webhook(f"http://127.0.0.1:{free_port()}"), summary).outcome
    assert outcome == Transient("it cannot be reached (connection refused or no route)", whole_destination=True)
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", keep=False) as server:
        outcome = Sent(webhook(f"http://127.0.0.1:{server.getsockname()[1]}"), summary).outcome
    assert isinstance(outcome, Transient)


def test_https_trusts_the_authority_that_is_named_alone(tmp_path: Path, summary: Parcel) -> None:
    ca, other = certificate(tmp_path, "ca"), certificate(tmp_path, "other")
    theirs = certificate(tmp_path, "theirs", ca)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*theirs)
    server = WebServer(context)
    assert isinstance(Sent(webhook(server.url, ca=ca[0]), summary).outcome, Delivered)
    outcome = Sent(webhook(server.url, ca=other[0]), summary).outcome
    assert outcome == Transient("it cannot be reached (its certificate is not trusted)", whole_destination=True)
    server.stop()


@pytest.mark.system
def test_orthanc_takes_results_by_both_ways(free_port, tmp_path: Path) -> None:
    http_port, dicom_port = free_port(), free_port()
    with orthanc(tmp_path / "orthanc", http_port, dicom_port) as client:
        first, second = lying_in(tmp_path / "1", parcel("1")), lying_in(tmp_path / "2", parcel("2"))
        sender = dicom(dicom_port, called_ae="ORTHANC")
        assert Sent(sender, first).outcome == Delivered("0x0000")
        assert Sent(sender, first).outcome == Delivered("0x0000")
        assert Sent(stow(f"http://127.0.0.1:{http_port}/dicom-web"), second).outcome == Delivered("200")
        assert Sent(stow(f"http://127.0.0.1:{http_port}/dicom-web"), second).outcome == Delivered("200")
        assert stored_uids(client) == ["1.2.1.1", "1.2.1.2", "1.2.2.1", "1.2.2.2"]


class _Node(Settings):
    delivery: DeliverySettings = DeliverySettings()


PACS = "{kind: dicom, name: pacs, host: pacs.example, port: 104, called_ae: PACS"


@pytest.mark.parametrize(
    ("destinations", "says"),
    [
        ("[{kind: fax, name: a}]", r"delivery.destinations.0.* 'fax'"),
        (f"[{PACS}, port: 0}}]", "port"),
        (f"[{PACS}, name: Über}}]", "name"),
        (f"[{PACS}, results: []}}]", "results"),
        (f"[{PACS}, results: [sr, sr]}}]", "names a kind of result twice"),
        (f"[{PACS}, results: [pdf]}}]", "results"),
        (f"[{PACS}, sr_class: basic}}]", "sr_class"),
        (f"[{PACS}, called_ae: seventeen-letters}}]", "called_ae"),
        (f"[{PACS}, tls: {{key: a.pem}}}}]", "name the certificate's file too"),
        (f"[{PACS}, tsl: null}}]", "tsl"),
        (f"[{PACS}}}, {PACS}}}]", "destinations pacs stand there twice"),
        ("[{kind: sender}]", "give peers or default_port"),
        ("[{kind: sender, peers: {CT1: eleven}}]", "CT1: 'eleven' is neither PORT nor HOST:PORT"),
        ("[{kind: stow, name: a, url: 'https://user:secret@pacs/'}]", "url"),
        ("[{kind: webhook, name: a, url: 'ftp://pacs/'}]", "url"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(tmp_path: Path, destinations: str, says: str) -> None:
    # A later key of the same name wins in YAML: each case spoils one setting of a good destination.
    (tmp_path / "node.yaml").write_text(f"delivery: {{destinations: {destinations}}}")
    with pytest.raises(UsageError, match=says) as raised:
        load_settings(_Node, tmp_path / "node.yaml", {})
    assert "\n" not in str(raised.value)


def test_settings_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(
        f"""delivery:
  destinations:
  - {PACS}, commitment: true, tls: {{ca: ca.pem}}}}
  - {{kind: stow, name: cloud, url: 'https://cloud.example/dicom-web', token_file: token, results: [sr]}}
  - {{kind: webhook, name: ris, url: 'https://ris.example/results', hmac_secret_file: secret}}
  - {{kind: sender, peers: {{CT1: 104, CR2: '[fe80::1]:105'}}, default_port: 11112}}
"""
    )
    settings = load_settings(_Node, tmp_path / "node.yaml", {}).delivery
    pacs, cloud, ris, sender = settings.destinations
    assert (pacs.sr_class, pacs.results, pacs.commitment.resends) == ("comprehensive-3d", ("sr", "sc"), 5)
    assert (cloud.results, ris.kind, sender.name) == (("sr",), "webhook", "sender")
    assert sender.port_of("CT1", "10.0.0.1") == ("10.0.0.1", 104)
    assert sender.port_of("CR2", "10.0.0.1") == ("fe80::1", 105)
    assert sender.port_of("MR3", "10.0.0.1") == ("10.0.0.1", 11112)


class DcmtkScp:
    """DCMTK's storescp on a port, writing into a folder."""

    def __init__(self, port: int, folder: Path, *options: object) -> None:
        folder.mkdir()
        self.port = port
        self.command = [require_program("storescp"), "-aet", SCP_TITLE, "-od", folder, "-pm", *options, port]

    def __enter__(self) -> None:
        self.process = subprocess.Popen([str(part) for part in self.command], env=peer_environment())

        def listens() -> bool:
            assert self.process.poll() is None
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        until(listens)

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
