"""The DICOM sender against real peers, over sockets and TLS: pynetdicom, DCMTK, and servers that break the protocol."""

import logging
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pydicom
import pytest
from conftest import peer_environment, require_program
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from result_peers import (
    SCP_TITLE,
    SECONDARY_CAPTURE,
    SR_3D,
    TIMEOUTS,
    StorageScp,
    answering,
    certificate,
    dicom_file,
    lying_in,
    open_descriptors,
    parcel,
    silent_server,
    until,
)
from sending import Sent, dicom, sender_of, settings_of, waiting

from cxr_ray.errors import UsageError
from serve.node.parcels import Item, Parcel, StudyOrigin
from serve.node.senders.association import Association, decode_command, encode_command
from serve.node.senders.sender import Delivered, Outcome, Permanent, Transient
from serve.node.senders.statuses import storage_outcome
from serve.node.senders.upper_layer import Context, Peer, PeerGoneError, RejectedError

__all__ = ["waiting"]

BOTH = {"1.2.1.1": 1, "1.2.1.2": 1}


@pytest.fixture
def scp() -> Iterator[Callable[..., StorageScp]]:
    started: list[StorageScp] = []

    def start(**given: object) -> StorageScp:
        started.append(StorageScp(**given).start())
        return started[-1]

    yield start
    for server in started:
        server.stop_soon()


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
