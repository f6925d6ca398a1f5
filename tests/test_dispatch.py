"""The dispatcher against a real HTTP server that answers as scripted: answers, refusals, patience, kills at any point.

The server stands in for the service here only: it shows statuses that the real one seldom does.
"""

import asyncio
import hashlib
import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path

import pydicom
import pytest
import uvicorn
from conftest import require_program, run_peer
from dicom_peers import DEFLATED, deflated, instance, part10
from dicom_peers import data_set as data_set_of
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from cxr_ray.errors import UsageError
from serve.node.dispatch import Dispatcher
from serve.node.service_client import DispatchSettings
from serve.node.spool import Origin, Spool

ROOT = Path(__file__).resolve().parents[1]
CR = "1.2.840.10008.5.1.4.1.1.1"
GOOD = {
    "model": {"name": "multi-input", "version": "1.0", "digest": "m1"},
    "findings": [
        {"name": f"Finding {number}", "probability": number / 20, "threshold": 0.5, "positive": number > 10}
        for number in range(14)
    ],
    "clinical": {"age": 61, "sex": "F", "view": "PA", "history": [], "missing": ["history"]},
    "warnings": ["no history"],
}
Script = Callable[[int], Response | Awaitable[Response]]


def good() -> Response:
    return JSONResponse(GOOD)


def problem(status: int, **headers: str) -> Response:
    content = {"title": "no", "status": status, "detail": "lateral view: send a frontal one"}
    return JSONResponse(content, status, headers, media_type="application/problem+json")


class Service:
    """Answers the n-th request for an instance with ``script(n)``; remembers when and what was asked."""

    def __init__(self) -> None:
        self.forget()
        app = FastAPI()

        async def predict(request: Request) -> Response:
            form = await request.form()
            image = form["image"]
            assert image.content_type == "application/dicom"
            turns = self.asked.setdefault(image.filename, [])
            turns.append(time.monotonic())
            self.order.append(image.filename)
            self.bodies[image.filename] = await image.read()
            self.arrivals[image.filename] = {field: form[field] for field in form if field != "image"}
            self.authorization.add(request.headers.get("authorization"))
            self.request_ids.append(request.headers["x-request-id"])
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                answer = self.script(len(turns))
                return await answer if inspect.isawaitable(answer) else answer
            finally:
                self.at_once -= 1

        app.add_api_route("/v1/instances", predict, methods=["POST"], response_model=None)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._app = app
        self.url = f"http://127.0.0.1:{self.port}"

    def forget(self) -> None:
        self.script: Script = lambda _: good()
        self.asked: dict[str, list[float]] = {}
        self.bodies: dict[str, bytes] = {}
        self.arrivals: dict[str, dict[str, str]] = {}
        self.authorization: set[str | None] = set()
        self.order: list[str] = []
        self.request_ids: list[str] = []
        self.at_once = self.most_at_once = 0

    def start(self) -> None:
        config = uvicorn.Config(self._app, host="127.0.0.1", port=self.port, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5)

    @property
    def count(self) -> int:
        return sum(map(len, self.asked.values()))


@pytest.fixture(scope="module")
def running():
    service = Service()
    service.start()
    yield service
    service.stop()


@pytest.fixture
def service(running: Service) -> Service:
    running.forget()
    return running


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def dispatch(service: Service, spool: Spool):
    started: list[Dispatcher] = []

    def start(**settings: object) -> Dispatcher:
        defaults = {"service_url": service.url, "first_retry_seconds": 0.05, "poll_seconds": 0.05, "jitter": 0}
        started.append(Dispatcher(DispatchSettings(**{**defaults, **settings}), spool))
        started[-1].start()
        return started[-1]

    yield start
    for dispatcher in started:
        dispatcher.stop()


def put(spool: Spool, uid: str | None = None, patient: str = "P1") -> str:
    uid = uid or generate_uid()
    content = Dataset()
    content.SOPClassUID, content.SOPInstanceUID = CR, uid
    content.StudyInstanceUID, content.SeriesInstanceUID = "1.2", "1.2.3"
    content.PatientName, content.PatientID = "Doe^Jane", patient
    encoded = pydicom.filebase.DicomBytesIO()
    encoded.is_implicit_VR, encoded.is_little_endian = False, True
    pydicom.filewriter.write_dataset(encoded, content)
    before = set(spool.pending())
    spool.store(encoded.getvalue(), Origin(CR, uid, str(ExplicitVRLittleEndian), "PACS"))
    (name,) = set(spool.pending()) - before
    return name


def until(condition: Callable[[], object], seconds: float = 8) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def settled(spool: Spool) -> Callable[[], bool]:
    return lambda: spool.pending() == []


def done(spool: Spool) -> list[str]:
    return sorted(path.name for path in (spool.root / "done").iterdir())


def test_instance_is_brought_with_its_arrival_and_done(dispatch, service: Service, spool: Spool) -> None:
    name = put(spool, "1.2.3.4")
    sent = spool.path(name).read_bytes()
    received = spool.read(name).received_at
    dispatch(token="secret\n")
    until(settled(spool))
    assert done(spool) == [name]
    assert service.bodies == {name: sent}
    assert service.authorization == {"Bearer secret"}
    assert service.arrivals == {name: {"received_at": received.isoformat(), "calling_ae": "PACS"}}


def test_notification_cuts_the_poll_short(dispatch, service: Service, spool: Spool) -> None:
    dispatcher = dispatch(poll_seconds=60)
    time.sleep(0.2)
    put(spool)
    dispatcher.notify()
    until(settled(spool), 3)


def test_oldest_first_and_not_more_at_once_than_set(dispatch, service: Service, spool: Spool) -> None:
    names = [put(spool) for _ in range(6)]
    for age, name in enumerate(names):
        os.utime(spool.path(name), (1000 - age, 1000 - age))
    dispatch(concurrency=1)
    until(settled(spool))
    assert service.order == names[::-1]
    assert service.most_at_once == 1


@pytest.mark.parametrize("status", [400, 409, 413, 415, 422])
def test_permanent_refusal_is_a_dead_letter_and_can_be_replayed(dispatch, service: Service, spool: Spool, status: int) -> None:
    service.script = lambda turn: problem(status) if turn == 1 else good()
    name = put(spool, "1.2.3.4")
    dispatch()
    until(spool.dead_letters)
    (letter,) = spool.dead_letters()
    assert (letter.name, letter.status, letter.attempts) == (name, status, 1)
    assert letter.reason == "lateral view: send a frontal one"
    assert (letter.sop_instance_uid, letter.study_instance_uid) == ("1.2.3.4", "1.2")
    spool.replay(name)
    until(lambda: done(spool) == [name])
    assert service.count == 2


@pytest.mark.parametrize("status", [301, 401, 403, 404, 429, 500, 502, 503, 504])
def test_passing_trouble_keeps_the_instance_until_it_is_over(
    dispatch, service: Service, spool: Spool, status: int, caplog
) -> None:
    service.script = lambda turn: problem(status) if turn < 4 else good()
    name = put(spool)
    with caplog.at_level(logging.INFO):
        dispatch()
        until(lambda: service.count >= 2)
        assert spool.pending() == [name]
        until(lambda: f"{name}: answered" in caplog.text)
    assert done(spool) == [name]
    assert spool.dead_letters() == []
    assert service.count == 4
    # One line for the change to waiting, one for the answer; none per attempt.
    assert [record.message for record in caplog.records if name in record.message] == [
        f"{name}: waiting; the service answers {status}",
        f"{name}: answered",
    ]
    assert "Doe" not in caplog.text
    # Each attempt has an id of its own, which begins as the name does, and which the lines have too.
    subject, _, content = name.partition("-")
    assert service.request_ids == [f"{subject[:16]}-{content[:8]}-{attempt}" for attempt in range(1, 5)]
    told = [record.fields["request_id"] for record in caplog.records if name in record.message]
    assert told == [service.request_ids[0], service.request_ids[3]]


def test_pauses_double_up_to_the_longest(dispatch, service: Service, spool: Spool) -> None:
    service.script = lambda turn: problem(500) if turn < 6 else good()
    name = put(spool)
    dispatch(first_retry_seconds=0.1, max_retry_seconds=0.4, poll_seconds=5)
    until(settled(spool))
    times = service.asked[name]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    for pause, wanted in zip(pauses, (0.1, 0.2, 0.4, 0.4, 0.4), strict=True):
        assert wanted <= pause < wanted + 0.25


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(dispatch, service: Service, spool: Spool, form: str) -> None:
    value = "1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2.5), usegmt=True)
    service.script = lambda turn: problem(503, **{"Retry-After": value}) if turn == 1 else good()
    name = put(spool)
    dispatch()
    until(settled(spool))
    first, second = service.asked[name]
    assert second - first >= 1.0


def test_one_that_waits_does_not_hold_up_the_others(dispatch, service: Service, spool: Spool) -> None:
    first = put(spool)
    os.utime(spool.path(first), (1000, 1000))
    service.script = lambda _: problem(500) if service.order[-1] == first else good()
    for _ in range(5):
        put(spool)
    dispatch(concurrency=1)
    until(lambda: spool.pending() == [first])
    assert len(done(spool)) == 5


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{}",
        JSONResponse({**GOOD, "findings": []}).body,
        JSONResponse({**GOOD, "findings": [{**GOOD["findings"][0], "probability": 1.5}]}).body,
    ],
)
def test_malformed_answer_is_the_services_fault(dispatch, service: Service, spool: Spool, body: bytes) -> None:
    service.script = lambda turn: Response(body, 200) if turn < 3 else good()
    name = put(spool)
    dispatch()
    until(settled(spool))
    assert done(spool) == [name]


def test_service_that_is_down_or_slow_is_waited_for(dispatch, spool: Spool) -> None:
    async def late() -> Response:
        await asyncio.sleep(1)
        return good()

    service = Service()
    name = put(spool)
    dispatch(service_url=service.url, timeout_seconds=0.3, max_retry_seconds=0.2)
    time.sleep(0.5)
    assert spool.pending() == [name]
    service.script = lambda turn: late() if turn < 3 else good()
    service.start()
    until(settled(spool))
    assert done(spool) == [name]
    assert service.count == 3
    service.stop()


def test_other_bytes_under_a_uid_do_not_overtake_the_first(dispatch, service: Service, spool: Spool) -> None:
    service.script = lambda turn: problem(500) if turn < 3 and service.order[-1] == first else good()
    first = put(spool, "1.2.3.4")
    # As in a spool of an earlier release: nothing says who has the UID.
    next((spool.root / "known").iterdir()).unlink()
    second = put(spool, "1.2.3.4", patient="P2")
    os.utime(spool.path(first), (1000, 1000))
    dispatch(concurrency=2)
    until(settled(spool))
    assert service.order == [first, first, first, second]
    assert done(spool) == sorted([first, second])


def test_unreadable_file_is_a_dead_letter(dispatch, service: Service, spool: Spool) -> None:
    spool.path("broken.dcm").write_bytes(b"no DICOM")
    dispatch()
    until(spool.dead_letters)
    assert "not readable as DICOM" in spool.dead_letters()[0].reason
    assert service.count == 0


def test_what_cannot_be_read_within_bounds_is_a_dead_letter(dispatch, service: Service, spool: Spool) -> None:
    """As it may lie in the spool of an earlier version, whose process it ended, and that of the next."""
    whole = instance()
    head, data = Origin(CR, "1.2.3", DEFLATED).file_head(), data_set_of(whole)
    begun = data[: data.index(b"\x20\x00\x0d\x00")]
    private = b"\x09\x00\x01\x10UN\x00\x00"
    spool.path("deflated.dcm").write_bytes(head + deflated(begun + private + b"\xfe\xff\xff\xff", mebibytes=1000))
    items = b"\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\x00\x00\x00\x00" * 1_000_000
    spool.path("items.dcm").write_bytes(part10(whole).replace(data, begun + private + items))
    # Not for ever waited for, as a disk that fails is.
    spool.path("cut-off.dcm").write_bytes(part10(whole).replace(data, begun + private + items[:12]))
    tracemalloc.start()
    dispatch()
    until(lambda: len(spool.dead_letters()) == 3, seconds=30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120 << 20
    reasons = {letter.name: letter.reason for letter in spool.dead_letters()}
    assert reasons["deflated.dcm"] == "deflated.dcm: its header does not end within 16777216 bytes; mend the sender"
    assert reasons["items.dcm"] == "items.dcm: its header has too many elements and items; mend the sender"
    assert reasons["cut-off.dcm"].startswith("cut-off.dcm: not readable as DICOM")
    assert (service.count, spool.pending()) == (0, [])
    done_after = put(spool)
    until(lambda: done(spool) == [done_after])


def test_crash_after_commit_brings_the_instance_again(dispatch, service: Service, spool: Spool) -> None:
    name = put(spool)
    dispatcher = dispatch()
    until(settled(spool))
    dispatcher.stop()
    (spool.root / "done" / name).rename(spool.path(name))
    dispatch()
    until(settled(spool))
    assert service.count == 2
    assert done(spool) == [name]


def test_second_dispatcher_waits_and_takes_over(dispatch, service: Service, spool: Spool, caplog) -> None:
    with caplog.at_level(logging.INFO):
        first = dispatch()
        until(first._thread.is_alive)
        put(spool)
        until(settled(spool))
        dispatch()
        until(lambda: "holds dispatcher.lock" in caplog.text)
    first.stop()
    put(spool)
    until(settled(spool))
    assert service.count == 2


def test_bad_url_is_named(spool: Spool) -> None:
    with pytest.raises(UsageError, match="service_url 'http://a:b:c'"):
        Dispatcher(DispatchSettings(service_url="http://a:b:c"), spool).start()
    with pytest.raises(ValueError, match="service_url"):
        DispatchSettings(service_url="localhost:8000")


LISTENER = """
import sys, time
from itertools import pairwise
from pathlib import Path
from serve.node.listener import Listener, ListenerSettings
from serve.node.spool import Spool
with Listener(ListenerSettings(port=0, min_free_bytes=0), Spool(Path(sys.argv[1]))) as listener:
    print(listener.port, flush=True)
    time.sleep(60)
"""
DISPATCHER = """
import sys, time
from itertools import pairwise
from pathlib import Path
from serve.node.dispatch import Dispatcher
from serve.node.service_client import DispatchSettings
from serve.node.spool import Spool
settings = DispatchSettings(service_url=sys.argv[2], poll_seconds=0.05, concurrency=4, first_retry_seconds=0.05)
with Dispatcher(settings, Spool(Path(sys.argv[1]))):
    time.sleep(60)
"""


@pytest.mark.system
def test_killed_between_promise_and_answer_is_brought_once(dispatch, service: Service, spool: Spool, tmp_path: Path) -> None:
    require_program("storescu")
    paths = []
    for _ in range(5):
        content = Dataset()
        content.SOPClassUID, content.SOPInstanceUID = CR, generate_uid()
        content.StudyInstanceUID, content.SeriesInstanceUID = "1.2", "1.2.3"
        content.file_meta = FileMetaDataset()
        content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        paths.append(tmp_path / f"{content.SOPInstanceUID}.dcm")
        content.save_as(paths[-1], enforce_file_format=True)
    listener = subprocess.Popen([sys.executable, "-c", LISTENER, spool.root], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    port = listener.stdout.readline().strip()
    run_peer("storescu", "-aec", "CXRRAY", "127.0.0.1", port, *paths).check_returncode()
    listener.send_signal(signal.SIGKILL)
    listener.wait()
    dispatch()
    until(settled(spool))
    wanted = {hashlib.sha256(path.stem.encode()).hexdigest()[:32] for path in paths}
    assert {name.partition("-")[0] for name in service.asked} == wanted
    assert service.count == 5
    assert len(done(spool)) == 5


@pytest.mark.system
def test_dispatcher_killed_again_and_again_loses_nothing(service: Service, spool: Spool) -> None:
    names = {put(spool) for _ in range(40)}
    command = [sys.executable, "-c", DISPATCHER, spool.root, service.url]
    kills = 0
    while spool.pending():
        before = service.count
        process = subprocess.Popen(command, cwd=ROOT)
        # Killed while it works, at another point each time.
        until(lambda: service.count >= before + 8 + kills or not spool.pending())  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    assert set(done(spool)) == names
    assert set(service.asked) == names
