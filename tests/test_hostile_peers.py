"""The listener among peers that break the protocol, stop in the middle, flood it or speak something else.

Every byte is written by the test. What a hostile peer gets is at most an abort or a close; what counts is that an honest one is
served all the time, and that nothing of the others is left behind.
"""

import json
import logging
import resource
import socket
import ssl
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from dicom_peers import (
    CR,
    DEFLATED,
    ECHO,
    EXPLICIT,
    IMPLICIT,
    RELEASE,
    VERIFICATION,
    Wire,
    command,
    data_set,
    deflated,
    instance,
    item,
    listener_process,
    make_certificates,
    p_data,
    pdu,
    pdv,
    request,
    store_command,
    store_pdus,
    until,
)
from prometheus_client import CollectorRegistry

from serve.node.data_set_head import class_and_instance
from serve.node.listener import Listener, ListenerSettings
from serve.node.spool import Origin, Spool, Stored
from serve.node.storage import (
    CANNOT_UNDERSTAND,
    INFLATES_TOO_FAR,
    NO_INSTANCE_UID,
    NOT_THE_SOP_CLASS,
    PROCESSING_FAILURE,
    StoreRefused,
    store_part10,
)
from serve.spooled_intake import SpooledIntake

CONTEXTS = ((1, CR, EXPLICIT), (3, VERIFICATION, IMPLICIT))
FOR_DEFLATED = (5, CR, DEFLATED)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def listen(spool: Spool):
    listeners: list[Listener] = []

    def start(**settings: object) -> Listener:
        defaults = {"port": 0, "min_free_bytes": 0, "drain_seconds": 0}
        registry = CollectorRegistry()
        listeners.append(Listener(ListenerSettings(**{**defaults, **settings}), spool, registry=registry))
        listeners[-1].registry = registry
        listeners[-1].start()
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.stop()


def associated(port: int, *more: tuple[int, str, str], timeout: float = 30) -> Wire:
    """An association of the usual presentation contexts, and of `more`."""
    wire = Wire(port, timeout).send(request(*CONTEXTS, *more))
    kind, _ = wire.read()
    assert kind == 2
    return wire


def honest_store(port: int) -> None:
    with associated(port) as wire:
        assert wire.send(*store_pdus(instance())).status() == 0x0000
        assert wire.send(RELEASE).read()[0] == 6


def outcome(listener: Listener, name: str) -> float:
    return listener.registry.get_sample_value("cxr_node_associations_total", {"outcome": name}) or 0.0


def nothing_left(listener: Listener, spool: Spool) -> bool:
    return listener._connections.associations == 0 and not list((spool.root / "incoming").iterdir())


UID = "1.2.3.4"
DATA = data_set(instance(SOPInstanceUID=UID))
MESSAGES = {
    "a context that was never negotiated": p_data(pdv(5, 3, store_command(UID))),
    "an even context": p_data(pdv(2, 3, ECHO)),
    "a data set without command": p_data(pdv(1, 2, b"\x08\x00")),
    "a command within a data set": p_data(pdv(1, 3, store_command(UID)), pdv(1, 0, DATA[:50]), pdv(1, 3, ECHO)),
    "a data set on another context": p_data(pdv(1, 3, store_command(UID)), pdv(3, 2, DATA)),
    "a fragment shorter than its head": pdu(4, struct.pack(">LBB", 1, 1, 3)),
    "a fragment of no length": pdu(4, struct.pack(">LBB", 0, 1, 3)),
    "a fragment longer than its PDU": pdu(4, struct.pack(">LBB", 0xFFFFFFFF, 1, 3)),
    "a fragment cut off": pdu(4, b"\x00\x00\x00"),
    "an empty P-DATA": pdu(4, b""),
    "a PDU longer than agreed": struct.pack(">BxL", 4, 131072 + 4096),
    "a PDU of the greatest length": struct.pack(">BxL", 4, 0xFFFFFFFF),
    "a release of wild length": struct.pack(">BxL", 5, 0xFFFFFF00),
    "a second request": request(*CONTEXTS),
    "an accept": pdu(2, bytes(68)),
    "an unknown PDU": pdu(0x77, b"abc"),
    "a command of wild lengths": p_data(pdv(1, 3, struct.pack("<HHL", 0, 0x0100, 0xFFFFFFF0))),
    "a command cut off": p_data(pdv(1, 3, b"\x00\x00\x00")),
    "a command of another group": p_data(pdv(1, 3, struct.pack("<HHLH", 8, 0x0100, 2, 1))),
    "an empty command": p_data(pdv(1, 3, b"")),
    "a response to nothing": p_data(pdv(1, 3, command(sop_class=CR, field=0x8001, responded=1, data=0x0101, status=0))),
    "a command without end": p_data(*(pdv(1, 1, bytes(10_000)) for _ in range(7))),
}


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES.keys())
def test_broken_messages_end_their_association_and_no_other(listen, spool: Spool, message: bytes) -> None:
    listener = listen()
    with associated(listener.port) as witness:
        with associated(listener.port) as wire:
            wire.send(message)
            kind, body = wire.read()
            # A-ABORT by the service provider.
            assert (kind, body[:3]) == (7, b"\x00\x00\x02")
            assert wire.ends()
        assert witness.send(p_data(pdv(3, 3, ECHO))).status() == 0x0000
    until(lambda: nothing_left(listener, spool), "the end of both")
    until(lambda: outcome(listener, "protocol error") == 1, "the count")
    assert spool.pending() == []


def requests() -> dict[str, bytes]:
    whole = request(*CONTEXTS)
    fixed = struct.pack(">H2x16s16s32x", 1, b"CXRRAY".ljust(16), b"X".ljust(16))
    return {
        "a request too short": pdu(1, b"\x00\x01"),
        "a request of wild length": struct.pack(">BxL", 1, 0xFFFFFFF0),
        "an item longer than the request": pdu(1, fixed + struct.pack(">BxH", 0x10, 0xFFFF)),
        "an item cut off": pdu(1, fixed + b"\x10\x00"),
        "a context twice": request((1, CR, EXPLICIT), (1, VERIFICATION, IMPLICIT)),
        "an even context": request((2, CR, EXPLICIT)),
        "a context without identifier": pdu(1, fixed + item(0x20, b"\x01")),
        "a role of wild length": request(*CONTEXTS, more=item(0x54, b"\xff\xff1.2\x01\x01")),
        "data before the answer": whole + p_data(pdv(3, 3, ECHO)),
        "data without request": p_data(pdv(3, 3, ECHO)),
        "a thousand items": pdu(1, fixed + item(0x99, b"") * 5000),
        "HTTP": b"GET / HTTP/1.1\r\nHost: cxr-ray\r\n\r\n",
        "noise": bytes(range(1, 200)),
    }


@pytest.mark.parametrize("words", requests().values(), ids=requests().keys())
def test_broken_requests_are_aborted(listen, spool: Spool, words: bytes) -> None:
    listener = listen()
    with Wire(listener.port) as wire:
        with suppress(ConnectionError):
            wire.send(words)
        assert wire.read()[0] in (0, 7)
        assert wire.ends()
    honest_store(listener.port)
    until(lambda: outcome(listener, "protocol error") == 1, "the count")


def test_contexts_have_a_limit(listen) -> None:
    listener = listen(max_contexts=3)
    with Wire(listener.port) as wire:
        assert wire.send(request(*((number, CR, EXPLICIT) for number in (1, 3, 5, 7)))).read()[0] == 7
    honest_store(listener.port)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (dict(called="SOMEONE"), b"\x00\x01\x01\x07"),
        (dict(calling="STRANGER"), b"\x00\x01\x01\x03"),
        (dict(version=2), b"\x00\x01\x02\x02"),
    ],
)
def test_rejections_say_why(listen, wrong: dict, expected: bytes) -> None:
    listener = listen(allowed_calling=("TESTPACS",), other_titles=("SECOND",))
    with Wire(listener.port) as wire:
        assert wire.send(request(*CONTEXTS, **wrong)).read() == (3, expected)
    with Wire(listener.port) as wire:
        assert wire.send(request(*CONTEXTS, called="SECOND")).read()[0] == 2


@pytest.mark.parametrize(
    "uid", ["../../../etc/passwd", "1.2/../../x", "", "1" * 65, "1.2\x00.3", "1.2.3\\1.2.4", "/etc/passwd"]
)
def test_uids_that_are_none_get_no_file(listen, spool: Spool, uid: str) -> None:
    before = sorted(path.name for path in spool.root.parent.iterdir())
    with associated(listen().port) as wire:
        status = wire.send(p_data(pdv(1, 3, store_command(uid))), p_data(pdv(1, 2, DATA))).status()
        assert status == NO_INSTANCE_UID
        assert wire.send(*store_pdus(instance())).status() == 0x0000
    assert len(spool.pending()) == 1
    assert sorted(path.name for path in spool.root.parent.iterdir()) == before


def nested(depth: int) -> bytes:
    opened = struct.pack("<HH2s2xL", 8, 6, b"SQ", 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return opened * depth


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (nested(3000) + DATA, {NO_INSTANCE_UID, CANNOT_UNDERSTAND}),
        (struct.pack("<HH2s2xL", 8, 6, b"SQ", 0xFFFFFFF0) + DATA, {NO_INSTANCE_UID, CANNOT_UNDERSTAND}),
        (struct.pack("<HH2s2xL", 8, 6, b"OB", 0xFFFFFFFF) + DATA, {CANNOT_UNDERSTAND}),
        (DATA[:10], {NO_INSTANCE_UID, CANNOT_UNDERSTAND}),
        (DATA[::-1], {NO_INSTANCE_UID, CANNOT_UNDERSTAND}),
        (DATA.replace(UID.encode(), b"9.9.9.9"), {NOT_THE_SOP_CLASS}),
        (b"", {NO_INSTANCE_UID, CANNOT_UNDERSTAND}),
    ],
    ids=["nested", "sequence of wild length", "binary without end", "cut off", "backwards", "another UID", "empty"],
)
def test_data_sets_that_are_none_are_refused_and_the_association_goes_on(
    listen, spool: Spool, data: bytes, statuses: set[int]
) -> None:
    with associated(listen().port) as wire:
        parts = [data[start : start + 8000] for start in range(0, len(data), 8000)] or [b""]
        wire.send(p_data(pdv(1, 3, store_command(UID))))
        for number, part in enumerate(parts, 1):
            wire.send(p_data(pdv(1, 2 if number == len(parts) else 0, part)))
        assert wire.status() in statuses
        assert wire.send(*store_pdus(instance())).status() == 0x0000
    assert len(spool.pending()) == 1
    assert not list((spool.root / "incoming").iterdir())


def test_sequences_before_the_uids_are_stepped_over() -> None:
    closed = struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    for head in (nested(1) + closed, nested(500) + closed * 500, struct.pack("<HH2s2xL", 8, 6, b"SQ", 8) + bytes(8)):
        assert class_and_instance(head + DATA, EXPLICIT) == (CR, UID)
    with pytest.raises(ValueError, match="not deflated"):
        class_and_instance(b"\xff" * 100, "1.2.840.10008.1.2.1.99")
    assert class_and_instance(deflated(DATA, mebibytes=200), DEFLATED) == (CR, UID)


def deflated_store(uid: str, data: bytes) -> bytes:
    """The PDUs of a C-STORE on a context of the deflated syntax."""
    parts = [data[start : start + 100_000] for start in range(0, len(data), 100_000)]
    sent = p_data(pdv(5, 3, store_command(uid)))
    return sent + b"".join(p_data(pdv(5, 2 if part is parts[-1] else 0, part)) for part in parts)


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def endless(data: bytes) -> bytes:
    """A data set whose pixels do not end."""
    at = data.index(struct.pack("<HH", 0x7FE0, 0x0010))
    return data[:at] + struct.pack("<HH2s2xL", 0x7FE0, 0x0010, b"OW", 0xFFFFFFFE)


def test_a_deflate_bomb_is_refused_in_constant_memory(tmp_path: Path) -> None:
    """A gigabyte in a megabyte; the honest film after it, deflated too, is taken."""
    bomb = deflated(endless(DATA), mebibytes=1000)
    assert len(bomb) < 2_000_000
    spool = Spool(tmp_path / "spool")
    settings = json.dumps({"port": 0, "min_free_bytes": 0})
    with listener_process(spool.root, settings) as (process, port), associated(port, FOR_DEFLATED) as wire:
        assert wire.send(deflated_store(UID, deflated(DATA))).status() == 0x0000
        before = peak_mib(process.pid)
        for _ in range(3):
            assert wire.send(deflated_store(UID, bomb)).status() == INFLATES_TOO_FAR
        assert peak_mib(process.pid) < before + 16
        other = data_set(instance(SOPInstanceUID="1.2.3.5"))
        assert wire.send(deflated_store("1.2.3.5", deflated(other))).status() == 0x0000
    assert {spool.read(name).sop_instance_uid for name in spool.pending()} == {UID, "1.2.3.5"}
    assert not list((spool.root / "incoming").iterdir())


def test_a_data_set_may_inflate_to_what_may_be_sent(listen, spool: Spool) -> None:
    data, most = deflated(DATA, mebibytes=1), len(DATA) + (1 << 20)
    with associated(listen(max_object_bytes=most - 1).port, FOR_DEFLATED) as wire:
        assert wire.send(deflated_store(UID, data)).status() == INFLATES_TOO_FAR
    assert spool.pending() == []
    with associated(listen(max_object_bytes=most).port, FOR_DEFLATED) as wire:
        assert wire.send(deflated_store(UID, data)).status() == 0x0000


def test_a_deflate_bomb_in_a_file_over_http_is_refused_too(spool: Spool, listen) -> None:
    listener = listen()
    begun = Origin(CR, UID, DEFLATED).file_head()
    bomb = begun + deflated(endless(DATA), mebibytes=200)
    for store in (
        lambda: store_part10(listener.storage, bomb),
        lambda: SpooledIntake(spool.root, listener.storage.rules).take(bomb, study_uid=None, address="192.0.2.7"),
    ):
        with pytest.raises(StoreRefused) as refused:
            store()
        assert refused.value.status == INFLATES_TOO_FAR
        assert len(refused.value.comment) <= 64
    # Of another study than it is sent to: its header is read before it is stored.
    no_header = begun + deflated(DATA[: DATA.index(b"CR")] + struct.pack("<HH2s2xL", 9, 1, b"OB", 0xFFFFFFFE), mebibytes=200)
    with pytest.raises(StoreRefused) as refused:
        SpooledIntake(spool.root, listener.storage.rules).take(no_header, study_uid="1.2", address="192.0.2.7")
    assert refused.value.status == CANNOT_UNDERSTAND
    assert spool.pending() == list((spool.root / "incoming").iterdir()) == []
    assert store_part10(listener.storage, begun + deflated(DATA))[0] is Stored.NEW


@pytest.mark.parametrize("data", [deflated(DATA)[:-8], deflated(DATA)[:-800] + b"\xff" * 800], ids=["cut off", "damaged"])
def test_what_cannot_be_inflated_is_not_promised(listen, spool: Spool, data: bytes) -> None:
    with associated(listen().port, FOR_DEFLATED) as wire:
        assert wire.send(deflated_store(UID, data)).status() == CANNOT_UNDERSTAND
        assert wire.send(deflated_store(UID, deflated(DATA))).status() == 0x0000
    assert len(spool.pending()) == 1


def test_what_fails_here_is_no_verdict_on_the_instance(listen, spool: Spool, monkeypatch, caplog) -> None:
    """And is sent again; nor does it fill the log."""

    def failing(*_: object) -> None:
        raise ValueError("a defect of ours")

    listener = listen()
    monkeypatch.setattr(spool, "keep", failing)
    with associated(listener.port) as wire:
        for _ in range(20):
            assert wire.send(*store_pdus(instance())).status() == PROCESSING_FAILURE
        with pytest.raises(StoreRefused) as refused:
            store_part10(listener.storage, Origin(CR, UID, EXPLICIT).file_head() + DATA, address="192.0.2.7")
        assert refused.value.status == PROCESSING_FAILURE
        monkeypatch.undo()
        assert wire.send(*store_pdus(instance())).status() == 0x0000
    assert len(spool.pending()) == 1
    assert caplog.text.count("127.0.0.1: instance not stored: ValueError") == 1
    assert caplog.text.count("192.0.2.7: instance not stored: ValueError") == 1
    assert caplog.text.count("C-STORE refused with 0x0110") == 1


def test_refusals_do_not_fill_the_log(listen, caplog) -> None:
    with associated(listen().port) as wire:
        for _ in range(50):
            assert wire.send(p_data(pdv(1, 3, store_command("x"))), p_data(pdv(1, 2, DATA))).status() == NO_INSTANCE_UID
            assert wire.send(p_data(pdv(1, 3, store_command("1.9"))), p_data(pdv(1, 2, DATA))).status() == NOT_THE_SOP_CLASS
    assert caplog.text.count("C-STORE refused with 0xC102") == 1
    assert caplog.text.count("C-STORE refused with 0xA900") == 1


def test_messages_in_single_bytes_and_in_one_piece_are_the_same(listen, spool: Spool) -> None:
    content = instance()
    stream = b"".join(store_pdus(content, fragment=3))
    with associated(listen().port) as wire:
        assert wire.send(stream).status() == 0x0000
        for byte in (content_bytes := b"".join(store_pdus(content))):
            wire.socket.sendall(bytes((byte,)))
        assert len(content_bytes) > 4000
        assert wire.status() == 0x0000
        # Two messages at once are answered one after the other.
        wire.send(p_data(pdv(3, 3, ECHO), pdv(3, 3, ECHO)))
        assert (wire.status(), wire.status()) == (0, 0)
    assert len(spool.pending()) == 1


def test_operations_that_are_not_offered_are_answered_so(listen) -> None:
    find = command(sop_class=CR, field=0x0020, message=1, priority=0, data=0)
    with associated(listen().port) as wire:
        assert wire.send(p_data(pdv(1, 3, find)), p_data(pdv(1, 2, bytes(100)))).status() == 0x0211
        assert wire.send(p_data(pdv(3, 3, store_command(UID))), p_data(pdv(3, 2, DATA))).status() == 0x0211
        # A cancel that comes too late has no answer.
        wire.send(p_data(pdv(1, 3, command(field=0x0FFF, responded=1, data=0x0101))))
        assert wire.send(p_data(pdv(3, 3, ECHO))).status() == 0x0000


def test_abort_within_a_data_set_leaves_nothing(listen, spool: Spool) -> None:
    listener = listen()
    for last_word in (pdu(7, bytes(4)), b""):
        with associated(listener.port) as wire:
            first, second, *_ = store_pdus(instance(), fragment=1000)
            wire.send(first, second, last_word)
    until(lambda: nothing_left(listener, spool), "the end of both")
    until(lambda: outcome(listener, "aborted by peer") == outcome(listener, "connection lost") == 1, "both counts")
    assert spool.pending() == []


def test_dripping_does_not_renew_a_deadline(listen, spool: Spool) -> None:
    listener = listen(network_timeout_seconds=1, acse_timeout_seconds=1, dimse_timeout_seconds=1, max_associations=1)

    def drip(wire: Wire, stream: bytes) -> float:
        began = time.monotonic()
        with suppress(OSError):
            for byte in stream:
                wire.socket.sendall(bytes((byte,)))
                time.sleep(0.1)
        return time.monotonic() - began

    # A request, then a PDU within an association: ten bytes a second would take minutes.
    with Wire(listener.port) as wire:
        assert drip(wire, request(*CONTEXTS)) < 15
    with associated(listener.port) as wire:
        assert drip(wire, p_data(pdv(1, 3, store_command(UID)))) < 15
    until(lambda: outcome(listener, "timed out") == 1, "the time-out")
    honest_store(listener.port)


def test_message_has_a_deadline_of_its_own(listen, spool: Spool) -> None:
    listener = listen(message_timeout_seconds=1)
    with associated(listener.port) as wire:
        wire.send(p_data(pdv(1, 3, store_command(UID))))
        with suppress(OSError):
            for _ in range(100):
                wire.send(p_data(pdv(1, 0, b"\x00")))
                time.sleep(0.1)
        assert wire.ends()
    until(lambda: outcome(listener, "timed out") == 1, "the time-out")
    assert not list((spool.root / "incoming").iterdir())


def test_500_connections_that_drip_hold_up_nobody(listen, spool: Spool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    listener = listen(max_connections=64, max_associations=4)
    stop = threading.Event()
    wires: list[socket.socket] = []

    def drip() -> None:
        half = request(*CONTEXTS)
        for position in range(len(half) - 1):
            for wire in wires:
                with suppress(OSError):
                    wire.send(half[position : position + 1])
            if stop.wait(0.05):
                return

    try:
        wires.extend(socket.create_connection(("127.0.0.1", listener.port), 30) for _ in range(500))
        dripping = threading.Thread(target=drip)
        dripping.start()
        for _ in range(20):
            honest_store(listener.port)
        assert listener._connections.pending <= 64
        stop.set()
        dripping.join()
    finally:
        stop.set()
        for wire in wires:
            wire.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(spool.pending()) == 20
    until(lambda: nothing_left(listener, spool) and not listener._connections.pending, "the end of all")


def test_idle_associations_give_their_places_back(listen) -> None:
    listener = listen(max_associations=2, network_timeout_seconds=1)
    with associated(listener.port), associated(listener.port), Wire(listener.port) as third:
        assert third.send(request(*CONTEXTS)).read() == (3, b"\x00\x02\x03\x02")
        until(lambda: outcome(listener, "timed out") == 2, "the time-outs")
        honest_store(listener.port)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def client(certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificates.ca)


def test_silent_tls_clients_hold_up_nobody(listen, certificates) -> None:
    listener = listen(tls_certificate=certificates.server, tls_key=certificates.server_key, max_connections=32)
    silent = [socket.create_connection(("127.0.0.1", listener.port), 30) for _ in range(16)]
    half = [socket.create_connection(("127.0.0.1", listener.port), 30) for _ in range(8)]
    for wire in half:
        wire.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01")
    try:
        for _ in range(3):
            with Wire(listener.port) as wire:
                wire.socket = client(certificates).wrap_socket(wire.socket, server_hostname="127.0.0.1")
                assert wire.send(request(*CONTEXTS)).read()[0] == 2
                assert wire.send(*store_pdus(instance())).status() == 0x0000
    finally:
        for wire in (*silent, *half):
            wire.close()


def test_silent_tls_client_is_dropped(listen, certificates) -> None:
    listener = listen(tls_certificate=certificates.server, tls_key=certificates.server_key, acse_timeout_seconds=0.5)
    with Wire(listener.port) as wire:
        assert wire.ends()
    until(lambda: outcome(listener, "never asked") == 1, "the count")


def test_plain_text_to_the_tls_port_and_back_is_closed_and_told_once(listen, certificates, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        secured = listen(tls_certificate=certificates.server, tls_key=certificates.server_key)
        for _ in range(3):
            with Wire(secured.port) as wire:
                with suppress(ConnectionError):
                    wire.send(request(*CONTEXTS))
                # At most an alert of TLS.
                assert wire.read()[0] != 2
                assert wire.ends()
        until(lambda: outcome(secured, "wrong transport") == 3, "the three")
        plain = listen()
        for _ in range(3):
            with Wire(plain.port) as wire, pytest.raises(OSError, match=r"."):
                client(certificates).wrap_socket(wire.socket, server_hostname="127.0.0.1")
        until(lambda: outcome(plain, "wrong transport") == 3, "the other three")
    assert caplog.text.count("it speaks plain text, this port TLS") == 1
    assert caplog.text.count("it speaks TLS, this port plain text") == 1
    honest_store(plain.port)


def test_mutual_tls_lets_in_whom_the_authority_vouches_for(listen, certificates) -> None:
    listener = listen(tls_certificate=certificates.server, tls_key=certificates.server_key, tls_client_ca=certificates.ca)

    def answer(own: tuple[Path, Path] | None) -> int:
        context = client(certificates)
        if own:
            context.load_cert_chain(*own)
        with Wire(listener.port) as wire:
            try:
                wire.socket = context.wrap_socket(wire.socket, server_hostname="127.0.0.1")
                return wire.send(request(*CONTEXTS)).read()[0]
            except OSError:
                return 0

    assert answer(None) == 0
    assert answer((certificates.stranger, certificates.stranger_key)) == 0
    assert answer((certificates.client, certificates.client_key)) == 2


def test_old_tls_is_not_spoken(listen, certificates) -> None:
    listener = listen(tls_certificate=certificates.server, tls_key=certificates.server_key)
    context = client(certificates)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with Wire(listener.port) as wire, pytest.raises(OSError, match=r"."):
        context.wrap_socket(wire.socket, server_hostname="127.0.0.1")


def test_stop_aborts_what_does_not_end(listen) -> None:
    listener = listen(drain_seconds=0.2)
    with associated(listener.port) as wire, Wire(listener.port) as silent:
        wire.send(store_pdus(instance())[0])
        stopped = threading.Thread(target=listener.stop)
        stopped.start()
        assert wire.read()[0] == 7
        assert wire.ends()
        assert silent.ends()
        stopped.join(30)
        assert not stopped.is_alive()
    with pytest.raises(OSError, match="refused"):
        Wire(listener.port)


def test_stop_lets_a_store_end(listen, spool: Spool) -> None:
    listener = listen(drain_seconds=30)
    with associated(listener.port) as wire:
        first, *rest = store_pdus(instance(), fragment=1000)
        wire.send(first)
        stopped = threading.Thread(target=listener.stop)
        stopped.start()
        until(listener._stopping.is_set, "the stop")
        assert wire.send(*rest).status() == 0x0000
        assert wire.send(RELEASE).read()[0] == 6
        stopped.join(30)
    assert len(spool.pending()) == 1


def test_flood_of_connections_leaves_no_descriptor_and_no_thread(spool: Spool) -> None:
    """Counted in a process that does nothing else."""

    def counted(process: int) -> tuple[int, int]:
        return tuple(sum(1 for _ in Path(f"/proc/{process}/{what}").iterdir()) for what in ("fd", "task"))

    with listener_process(spool.root, json.dumps({"port": 0, "min_free_bytes": 0})) as (listener, port):
        idle = counted(listener.pid)
        for _ in range(2):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: Wire(port).send(b"\x01").socket.close(), range(300)))
            honest_store(port)
            until(lambda: counted(listener.pid) == idle, "as few descriptors and threads as before")
