"""The senders over HTTP, STOW-RS and webhook, against servers that answer as scripted, and Orthanc."""

import hashlib
import hmac
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from result_peers import (
    WebServer,
    answering,
    certificate,
    lying_in,
    orthanc,
    parcel,
    read_part,
    silent_server,
    stored,
    stored_uids,
)
from sending import Sent, dicom, stow, waiting, web, webhook

from serve.node.parcels import Item, Parcel
from serve.node.senders.sender import Delivered, Permanent, Transient

__all__ = ["waiting", "web"]


@pytest.fixture
def summary(tmp_path: Path) -> Parcel:
    return lying_in(tmp_path / "summary", parcel(items=(Item("summary.json", b'{"study": 1}'),)))


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
